"""Variants of a config side by side, from the JSON of their experiments alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib.pyplot as plt

from reporter import FORGET, RETAIN, Reporter, Value, markdown_table, method_styles, worst


@dataclass(frozen=True)
class ComparisonRow:
    """A method of a variant: mean over digits for every seed, and the worst digit of any seed.

    gap: retain score against that of the classifier retrained without the class, points
    zeroed: share of the masked weights, percent
    """

    variant: str
    method: str
    forget: Value
    worst_forget: float
    gap: Value
    worst_gap: float
    zeroed: Value
    seconds: Value

    @property
    def name(self) -> str:
        return self.variant if self.method == "mimu" else f"{self.variant}: {self.method}"


class Comparison:
    """Variants side by side, one row for every method of each.

    The reference is the same classifier retrained without the class: one variant that has `retrain` among its methods
    is enough for all that share the classifier.

    reporters: of every variant by its name
    folder: where `variants.png` and `variants.md` go
    """

    def __init__(self, reporters: Mapping[str, Reporter], folder: Path) -> None:
        self.reporters = reporters
        self.folder = folder
        self._retrained = {
            self._request(experiment): experiment[RETAIN]["retrain"]["score"]
            for reporter in reporters.values()
            for experiment in reporter.experiments
            if "retrain" in experiment[RETAIN]
        }

    def rows(self) -> list[ComparisonRow]:
        return [
            self._row(variant, reporter, method)
            for variant, reporter in self.reporters.items()
            for method in reporter.methods
            if method != "retrain"
        ]

    def table(self) -> str:
        """Forgetting, distance to retraining, size of the mask and time of every row."""
        header = ["variant", "forget score, %", "worst", "retain score against retrain, points", "worst"]
        header += ["weights zeroed, %", "seconds a request"]
        return markdown_table(
            header,
            [
                [
                    row.name,
                    f"{row.forget:.2f}",
                    f"{row.worst_forget:.2f}",
                    f"{row.gap:+.2f}",
                    f"{Value((row.worst_gap,)):+.2f}",
                    f"{row.zeroed:.2f}",
                    f"{row.seconds:.2f}",
                ]
                for row in self.rows()
            ],
        )

    def plot(self) -> None:
        """Draws `variants.png` and writes `variants.md`."""
        plt.switch_backend("Agg")
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "variants.md").write_text(f"# Variants\n\n{self.table()}\n")
        self.draw_variants()

    def draw_variants(self) -> None:
        """Forget score and distance to retraining: a small mark for every seed, a large one for their mean."""
        rows = [row for row in self.rows() if row.method != "original"]
        styles = method_styles(row.method for row in rows)
        figure, panels = plt.subplots(1, 2, figsize=(10, 1.2 + 0.28 * len(rows)), sharey=True, layout="constrained")
        columns = (
            ([row.forget for row in rows], "forget score (%)", 1.0),
            ([row.gap for row in rows], "retain score against retraining (points)", 0.5),
        )
        for axes, (values, x_label, linear) in zip(panels, columns):
            for height, (row, value) in enumerate(zip(rows, values)):
                style = {"color": styles[row.method]["color"], "marker": styles[row.method]["marker"]}
                axes.plot(value.per_seed, [height] * len(value.per_seed), linestyle="none", markersize=3, **style)
                axes.plot(value.mean, height, linestyle="none", markersize=7, alpha=0.7, **style)
            axes.axvline(0, color="0.5", linewidth=0.8)
            finite = [abs(number) for value in values for number in value.per_seed if math.isfinite(number)]
            if max(finite, default=0.0) > 4 * linear:
                # Most rows lie near 0, a few far away.
                axes.set_xscale("symlog", linthresh=linear)
                numbers = [number for value in values for number in value.per_seed if math.isfinite(number)]
                low, high = min(0.0, *numbers) * 1.4 - linear / 5, max(0.0, *numbers) * 1.4 + linear / 5
                ticks = [sign * linear * far for sign in (-1, 1) for far in (1, 3, 10, 30, 100)]
                axes.set_xticks([tick for tick in sorted([0.0, *ticks]) if low <= tick <= high])
                axes.set_xlim(low, high)
                axes.minorticks_off()
            axes.xaxis.set_major_formatter("{x:g}")
            axes.set_xlabel(x_label)
            axes.grid(alpha=0.3)
        panels[0].set_yticks(range(len(rows)), [row.name for row in rows], fontsize=8)
        panels[0].invert_yaxis()
        figure.savefig(self.folder / "variants.png", dpi=150)
        plt.close(figure)

    def _row(self, variant: str, reporter: Reporter, method: str) -> ComparisonRow:
        kappa = reporter.headline_kappa()
        gaps: dict[int, list[float]] = {seed: [] for seed in reporter.seeds}
        forget: list[float] = []
        for experiment in reporter.experiments_at(kappa):
            retrained = self._retrained.get(self._request(experiment), math.nan)
            gaps[experiment["seed"]].append(experiment[RETAIN][method]["score"] - retrained)
            forget.append(experiment[FORGET][method]["score"])
        zeroed = reporter.value("num_zeroed", method, kappa=kappa)
        return ComparisonRow(
            variant=variant,
            method=method,
            forget=reporter.value(FORGET, method, "score", kappa=kappa),
            worst_forget=max(forget),
            gap=Value(tuple(fmean(of_seed) for of_seed in gaps.values())),
            worst_gap=worst(gap for of_seed in gaps.values() for gap in of_seed),
            zeroed=Value(
                tuple(100 * number / reporter.experiments[0]["num_graph_vertices"] for number in zeroed.per_seed)
            ),
            seconds=reporter.value("seconds", method, kappa=kappa),
        )

    @staticmethod
    def _request(experiment: dict[str, Any]) -> tuple[str, int, int]:
        """What a retrained classifier depends on."""
        config = experiment["config"]
        trained = json.dumps([config["dataset"], config["held_out"], config["classifier"]])
        return trained, experiment["seed"], experiment["forget_digit"]
