"""Methods beside the retrained classifier, and variants of a config side by side, from the JSON alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

import artifacts
from reporter import (
    FORGET,
    RETAIN,
    Kappa,
    Reporter,
    Value,
    markdown_table,
    method_styles,
    number_at,
    save_figure,
    worst,
)

# What an unlearned classifier is measured against; the others compete.
REFERENCES = ("original", "retrain", "retrain_again")
FORGOTTEN = 1.0  # percent: the largest mean forget score of a method that competes for the best figures
LOST = 2.0  # points of the retain score below the original's that are worth a word


@dataclass(frozen=True)
class Column:
    """A figure of the experiments: where it stands in their JSON, what it is called, and how it is written.

    aim: what is best: the retrained classifier's value, or a number
    """

    keys: tuple[str, ...]
    name: str
    spec: str
    aim: Literal["retrain"] | float = "retrain"

    def of(self, method: str) -> tuple[str, ...]:
        """Its keys for one method."""
        return (self.keys[0], method, *self.keys[1:])


DIVERGENCES = (
    Column(("audit_metrics", "js_forget"), "divergence on the forget set, bits", ".3f", 0),
    Column(("audit_metrics", "js_retain"), "divergence on the retain set, bits", ".4f", 0),
)
METRICS = (
    Column((FORGET, "score"), "forget score, points", "+.2f"),
    Column((RETAIN, "score"), "retain score, points", "+.2f"),
    Column((FORGET, "probability"), "probability of the forget class", "+.4f"),
    Column((FORGET, "loss"), "forget loss, nats", "+.2f"),
    Column((RETAIN, "loss"), "retain loss, nats", "+.3f"),
)
RETAIN_SCORE = METRICS[1]
RELEARN = Column(("audit_metrics", "relearn_steps"), "relearn time, steps", ".1f")
LEFT_BEHIND = (
    Column(("audit_metrics", "loss_attack"), "loss attack, area under the curve", ".3f"),
    Column(("audit_metrics", "entropy_attack"), "entropy attack, % members", ".1f"),
    Column(("audit_metrics", "probe_recall"), "probe, recall of the forget class, %", ".1f"),
    Column(("audit_metrics", "probe_retain"), "probe, score on the retain set, %", ".1f"),
    RELEARN,
)
SECONDS = Column(("seconds",), "seconds a request", ".2f", 0)
COST = (SECONDS, Column(("audit_metrics", "weights_changed"), "weights changed", ".0f", 0))


def probe_name(name: str) -> str:
    """How tables call a probe of the audits: those of hidden layers by the number of the layer."""
    return f"at layer {int(name.removeprefix('hidden_')) + 1}" if name.startswith("hidden_") else name.replace("_", " ")


class AuditReport:
    """Every method beside the classifier retrained without the class, in the order of their distance to it.

    The distance is the Jensen-Shannon divergence of the predictions, mean of the forget set's and the retain set's.
    In every column the best of the methods is bold, and with it those that are written alike: the one whose values are
    least far from the aim of the column, mean over digits and seeds. The references (the original and the retrained
    classifiers) do not compete, nor do methods that leave more than FORGOTTEN percent of the class or lose more than
    LOST points of the retain score.
    """

    def __init__(self, reporter: Reporter) -> None:
        self.reporter = reporter
        self.kappa = reporter.headline_kappa()
        self.folder = reporter.folder
        self.about = reporter.experiments[0]["methods"]  # without models that are scored by hand
        distances = {name: self.distance(name).mean for name in self.about}
        self.methods = sorted(distances, key=lambda name: (math.isnan(distances[name]), distances[name]))
        self.others = [name for name in self.methods if name not in REFERENCES]
        self.leave = [name for name in self.others if not self.score(FORGET, name) <= FORGOTTEN]
        least = self.score(RETAIN, "original" if "original" in self.about else "retrain") - LOST
        self.lose = [name for name in self.others if not self.score(RETAIN, name) >= least]

    def score(self, evaluation: str, method: str) -> float:
        """Mean score, percent."""
        return self.reporter.value(evaluation, method, "score", kappa=self.kappa).mean

    def distance(self, method: str) -> Value:
        """Mean divergence from the retrained classifier, bits."""
        forget, retain = (self.value(column, method) for column in DIVERGENCES)
        return Value(tuple((a + b) / 2 for a, b in zip(forget.per_seed, retain.per_seed)))

    def value(self, column: Column, method: str, digits: Sequence[int] | None = None) -> Value:
        """A method's value in a column, over the given digits (None: all)."""
        return self.reporter.value(*column.of(method), kappa=self.kappa, digits=digits)

    def single_values(self, column: Column, method: str) -> list[float]:
        """Its values for every digit and seed."""
        return [value for digit in self.reporter.digits for value in self.value(column, method, [digit]).per_seed]

    def spread(self, column: Column, method: str) -> Value:
        """The value for the tables: over the seeds, or where there is only one, over the digits."""
        value = self.value(column, method)
        return value if len(value.per_seed) > 1 else Value(tuple(self.single_values(column, method)))

    def tables(self) -> list[str]:
        """The sections of the summary."""
        spread = "seeds" if len(self.reporter.seeds) > 1 else "digits"
        gcn = self.reporter.value("seconds", "gcn", kappa=self.kappa)
        return [
            "## Distance to retraining",
            "Jensen-Shannon divergence of the predictions from the retrained classifier's (0: the same, 1: at most), "
            "and the five metrics less those of the retrained classifier. Sorted by the mean of the two divergences; "
            f"± standard deviation over the {spread}. Bold: the smallest mean absolute value over digits and seeds.",
            self.table(DIVERGENCES + METRICS, METRICS),
            self.shortfalls(),
            "## Audits",
            "Bold: the smallest mean absolute difference from the retrained classifier, which never saw the class, "
            "over digits and seeds. Loss attack: 0.5 tells nothing. Relearn time: '>' where a class did not come back "
            "by the last step; – where the class has no logit to learn with.",
            self.table(LEFT_BEHIND),
            "## Cost",
            f"Training the masking GCN, once for all requests, takes {gcn:.0f} s, which is not in mimu's seconds.",
            self.cost_table(),
            "## The methods",
            self.about_table(),
        ]

    def shortfalls(self) -> str:
        """Which methods leave the class, and which take the others along."""
        return (
            f"Forget score above {FORGOTTEN:g} %: {', '.join(self.leave) or 'none'}. Retain score more than {LOST:g} "
            f"points below the original's: {', '.join(self.lose) or 'none'}. These and the references are never bold."
        )

    def table(self, columns: Sequence[Column], gaps: Sequence[Column] = ()) -> str:
        """A row for every method, a column for each figure; of those in `gaps` the difference from retraining."""
        cells = [self.cells(column, column in gaps) for column in columns]
        return markdown_table(["method", *(column.name for column in columns)], zip(self.methods, *cells))

    def cells(self, column: Column, is_gap: bool = False) -> list[str]:
        """A column as text, the best of the competing methods bold."""
        references = self.single_values(column, "retrain")
        aims = references if column.aim == "retrain" else [column.aim] * len(references)
        texts, far = [], []
        for name in self.methods:
            value = self.spread(column, name)
            if is_gap:
                value = value - self.spread(column, "retrain")
            texts.append(f"{value:{column.spec}}")
            if column is RELEARN and not self.always_came_back(name):
                texts[-1] = f"> {texts[-1]}" if math.isfinite(value.mean) else "–"
            far.append(fmean(abs(one - aim) for one, aim in zip(self.single_values(column, name), aims)))
        competing = [
            index
            for index, name in enumerate(self.methods)
            if name in self.others and name not in self.leave + self.lose and math.isfinite(far[index])
        ]
        if not competing:
            return texts
        best = texts[min(competing, key=far.__getitem__)]
        return [f"**{text}**" if index in competing and text == best else text for index, text in enumerate(texts)]

    def always_came_back(self, method: str) -> bool:
        """Whether the class came back within the steps of the relearning, for every digit and seed."""
        return all(e["audit_metrics"][method]["came_back"] for e in self.reporter.experiments_at(self.kappa))

    def cost_table(self) -> str:
        needs = [self.about[name]["needs"] for name in self.methods]
        header = ["method", "data it needs", *(column.name for column in COST)]
        return markdown_table(header, zip(self.methods, needs, *map(self.cells, COST)), texts=2)

    def about_table(self) -> str:
        keys = ("does", "touches", "needs", "paper")
        rows = [[name, *(self.about[name][key] for key in keys)] for name in self.methods]
        header = ["method", "what it does", "what it may change", "data it needs", "paper"]
        return markdown_table(header, rows, texts=len(header))

    def draw_audits(self) -> None:
        """A panel for every audit: a small mark for every digit, a large one for their mean; a line for retraining."""
        figure, panels = plt.subplots(
            2, 4, figsize=(13, 1.2 + 0.44 * len(self.methods)), sharey=True, layout="constrained"
        )
        for axes, column in zip(panels.flat, (*DIVERGENCES, *LEFT_BEHIND, SECONDS), strict=True):
            self._draw_panel(axes, column)
        panels.flat[-1].set_xscale("log")
        panels.flat[0].set_yticks(range(len(self.methods)), self.methods, fontsize=8)
        panels.flat[0].invert_yaxis()
        save_figure(figure, self.folder / "audits.png", self.reporter.config.dpi)
        plt.close(figure)

    def _draw_panel(self, axes: Axes, column: Column) -> None:
        for height, name in enumerate(self.methods):
            style = {"color": self.reporter.styles[name]["color"], "marker": self.reporter.styles[name]["marker"]}
            of_digits = [self.value(column, name, [digit]).mean for digit in self.reporter.digits]
            axes.plot(of_digits, [height] * len(of_digits), linestyle="none", markersize=3, alpha=0.4, **style)
            axes.plot(self.value(column, name).mean, height, linestyle="none", markersize=7, **style)
            if name == "retrain":
                axes.axvline(
                    self.value(column, name).mean, color=style["color"], linewidth=0.8, linestyle="--", zorder=0
                )
        axes.set_xlabel(column.name, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)


def row_name(variant: str, method: str) -> str:
    """How a method of a variant is called: the project's own by the variant alone."""
    return variant if method == "mimu" else f"{variant}: {method}"


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
        return row_name(self.variant, self.method)


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
            self._request(experiment): experiment
            for reporter in sorted(reporters.values(), key=lambda each: each.has_audits)  # the audited ones stay
            for experiment in reporter.experiments
            if "retrain" in experiment[RETAIN]
        }

    def against_retraining(self, variant: str, column: Column, method: str, kappa: Kappa) -> Value:
        """A method's figure less that of the classifier retrained without the class: mean over digits a seed."""
        complete = len(self.reporters[variant].digits)
        gaps = self._gaps(variant, column, method, kappa).values()
        return Value(tuple(fmean(of_seed) if len(of_seed) == complete else math.nan for of_seed in gaps))

    def _gaps(self, variant: str, column: Column, method: str, kappa: Kappa) -> dict[int, list[float]]:
        """The same for every digit, by the seed."""
        gaps: dict[int, list[float]] = {seed: [] for seed in self.reporters[variant].seeds}
        for experiment in self.reporters[variant].experiments_at(kappa):
            retrained = self._retrained.get(self._request(experiment), {})
            gap = number_at(experiment, column.of(method)) - number_at(retrained, column.of("retrain"))
            gaps[experiment["seed"]].append(gap)
        return gaps

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

    def audit_columns(self) -> list[Column]:
        """What the audits of any variant have found with probes, and how long relearning from few samples took."""
        found = [audits for each in self.reporters.values() for audits in each.experiments[0]["audit_metrics"].values()]
        probes = dict.fromkeys(name for audits in found for name in audits.get("probes") or ())
        numbers = dict.fromkeys(number for audits in found for number in audits.get("relearn_from") or ())
        columns = [Column(("audit_metrics", "probes", name), probe_name(name), "+.1f") for name in probes]
        columns += [Column(("audit_metrics", "probe_recall"), "to convergence", "+.1f")] if found else []
        return columns + [
            Column(("audit_metrics", "relearn_from", number), f"steps, {number} a class", ".0f") for number in numbers
        ]

    def audit_table(self) -> str:
        """What every row leaves in the representation: a column for each probe, then one for each relearning.

        Of the probes the recall of the class above the retrained classifier's, points; of the relearning the steps.
        """
        columns = self.audit_columns()
        lines = []
        for variant, reporter in self.reporters.items():
            kappa = reporter.headline_kappa()
            for method in reporter.methods:
                cells = []
                for column in columns:
                    if column.spec.startswith("+"):
                        value = self.against_retraining(variant, column, method, kappa)
                    else:
                        value = reporter.value(*column.of(method), kappa=kappa)
                    cells.append(f"{value:{column.spec}}")
                if any(cell != "–" for cell in cells):
                    lines.append([row_name(variant, method), *cells])
        return markdown_table(["variant", *(column.name for column in columns)], lines)

    def tables(self) -> list[str]:
        """The table of the variants, and where they were audited that of what they leave behind."""
        return [self.table()] + ([self.audit_table()] if self.audit_columns() else [])

    def plot(self) -> None:
        """Draws `variants.png` and writes `variants.md`."""
        plt.switch_backend("Agg")
        artifacts.write_text(self.folder / "variants.md", "\n\n".join(["# Variants", *self.tables()]) + "\n")
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
        save_figure(figure, self.folder / "variants.png", 150)
        plt.close(figure)

    def _row(self, variant: str, reporter: Reporter, method: str) -> ComparisonRow:
        kappa = reporter.headline_kappa()
        gaps = self._gaps(variant, RETAIN_SCORE, method, kappa).values()
        zeroed = reporter.value("num_zeroed", method, kappa=kappa)
        return ComparisonRow(
            variant=variant,
            method=method,
            forget=reporter.value(FORGET, method, "score", kappa=kappa),
            worst_forget=max(experiment[FORGET][method]["score"] for experiment in reporter.experiments_at(kappa)),
            gap=self.against_retraining(variant, RETAIN_SCORE, method, kappa),
            worst_gap=worst(gap for of_seed in gaps for gap in of_seed),
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
