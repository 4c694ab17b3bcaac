"""What forgetting in the representation costs: the retain score against what a probe finds there, method by method."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import matplotlib.pyplot as plt

from comparison import RETAIN_SCORE, Column, Comparison
from reporter import Kappa, Value, method_styles, save_figure

PROBE = Column(
    ("audit_metrics", "probes", "softmax"), "probe recall against the retrained classifier's (points)", "+.1f"
)
COST = "retain score against the retrained classifier's (points)"


@dataclass(frozen=True)
class Point:
    """A method of a variant at one kappa, both values against the classifier retrained without the class.

    weight: of the erasure in its requests; layers: the masked ones, as the config names them
    excess: recall of the probe, points; gap: retain score, points
    """

    variant: str
    method: str
    kappa: Kappa
    weight: float
    layers: str
    excess: Value
    gap: Value

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.excess.mean) and math.isfinite(self.gap.mean)


class Frontier:
    """Retain score against the recall of a probe, for all variants of a config in one picture.

    A method is one curve over the weight of the erasure, at the kappa that is chosen for each request; and one over the
    fixed kappas for every weight that has some. Methods that know neither are single marks. Variants that mask other
    layers than the first one are hollow marks.
    """

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison
        self.points = [point for point in self._points() if point.is_finite]

    def _points(self) -> Iterator[Point]:
        for variant, reporter in self.comparison.reporters.items():
            config = reporter.experiments[0]["config"]
            weight, layers = config["eval"]["erasure"], str(reporter.experiments[0]["mask_layer"])
            for kappa in (*reporter.kappas, *(["auto"] if reporter.has_auto else [])):
                for method in reporter.methods:
                    values = (
                        self.comparison.against_retraining(variant, column, method, kappa)
                        for column in (PROBE, RETAIN_SCORE)
                    )
                    yield Point(variant, method, kappa, weight, layers, *values)

    @property
    def is_there(self) -> bool:
        """Whether there is anything to draw: variants that were audited with the softmax probe."""
        return bool(self.points)

    def over_weight(self, method: str) -> list[Point]:
        """Its points at the chosen kappa, on the layers of the first variant, by the weight of the erasure."""
        here = [point for point in self._at_chosen_kappa(method) if point.layers == self.points[0].layers]
        return sorted(here, key=lambda point: point.weight)

    def on_other_layers(self, method: str) -> list[Point]:
        """Its points at the chosen kappa on other layers."""
        return [point for point in self._at_chosen_kappa(method) if point.layers != self.points[0].layers]

    def _at_chosen_kappa(self, method: str) -> list[Point]:
        return [point for point in self.points if point.method == method and point.kappa == "auto"]

    def over_kappa(self, method: str) -> list[list[Point]]:
        """The points of a method at fixed kappas, those of every variant together."""
        fixed = [point for point in self.points if point.method == method and point.kappa != "auto"]
        variants = dict.fromkeys(point.variant for point in fixed)
        return [[point for point in fixed if point.variant == variant] for variant in variants]

    def draw(self) -> None:
        """Draws `frontier.png`: a small mark for every seed, a large one for their mean."""
        methods = list(dict.fromkeys(point.method for point in self.points))
        styles = method_styles(methods)
        figure, axes = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
        axes.axhline(0, color="0.6", linewidth=0.8)
        axes.axvline(0, color="0.6", linewidth=0.8)
        beside = itertools.cycle([(6, 4), (-10, -10), (6, -10), (-10, 4)])  # so that neighbours do not overlap
        for method in methods:
            style = {"color": styles[method]["color"], "marker": styles[method]["marker"]}
            for points in self.over_kappa(method):
                axes.plot(
                    [point.excess.mean for point in points],
                    [point.gap.mean for point in points],
                    linestyle=":",
                    linewidth=1,
                    markersize=3,
                    alpha=0.6,
                    **style,
                )
            points = self.over_weight(method)
            is_curve = len({point.weight for point in points}) > 1
            axes.plot(
                [point.excess.mean for point in points],
                [point.gap.mean for point in points],
                linestyle="-" if is_curve else "none",
                markersize=6,
                label=method,
                **style,
            )
            for point in points:
                axes.plot(
                    point.excess.per_seed, point.gap.per_seed, linestyle="none", markersize=2.5, alpha=0.5, **style
                )
            for point in self.on_other_layers(method):
                axes.plot(point.excess.mean, point.gap.mean, linestyle="none", markersize=6, fillstyle="none", **style)
            if not is_curve:
                continue
            offset = next(beside)
            for point in (points[0], points[-1]):
                axes.annotate(
                    f"{point.weight:g}",
                    (point.excess.mean, point.gap.mean),
                    xytext=offset,
                    textcoords="offset points",
                    fontsize=7,
                    color=styles[method]["color"],
                )
        axes.set_xlabel(PROBE.name)
        axes.set_ylabel(COST)
        axes.grid(alpha=0.3)
        figure.legend(loc="outside right upper", fontsize=8)
        save_figure(figure, self.comparison.folder / "frontier.png", 150)
        plt.close(figure)
