"""Curves, a summary and tables of a sweep, and variants side by side, from the JSON of the experiments alone."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

import matplotlib.pyplot as plt

# Okabe and Ito's palette, which colour-blind readers can tell apart. Dashed: the two references.
METHOD_STYLES: dict[str, dict[str, Any]] = {
    "original": {"color": "#000000", "marker": "D", "linestyle": "--"},
    "retrain": {"color": "#009E73", "marker": "*", "linestyle": "--"},
    "mimu": {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    "saliency": {"color": "#56B4E9", "marker": "v", "linestyle": "-"},
    "random": {"color": "#7F7F7F", "marker": "s", "linestyle": "-"},
    "magnitude": {"color": "#CC79A7", "marker": "P", "linestyle": "-"},
    "sft": {"color": "#D55E00", "marker": "^", "linestyle": ":"},
}
FREE_COLORS = ("#E69F00", "#8C564B", "#9467BD", "#BCBD22", "#17BECF", "#F0E442")
FREE_MARKERS = "X<>phdH"

FORGET, RETAIN = "unlearning_metrics", "performance_degradation_metrics"

# A number of weights, or the number that was chosen for each request.
Kappa = int | Literal["auto"]


def method_styles(methods: Iterable[str]) -> dict[str, dict[str, Any]]:
    """How each method is drawn, the same in every plot; those without a style of their own take free ones in turn."""
    styles: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(methods):
        turn = sum(other not in METHOD_STYLES for other in styles)
        free = {"color": FREE_COLORS[turn % len(FREE_COLORS)], "marker": FREE_MARKERS[turn % len(FREE_MARKERS)]}
        styles[name] = METHOD_STYLES.get(name, free)
    return styles


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    cells = [[str(cell) for cell in line] for line in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width if index == 0 else "-" * (width - 1) + ":" for index, width in enumerate(widths)])
    padded = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


@dataclass(frozen=True)
class ReporterConfig:
    """Resolution (dots per inch, 20 to 1200) and size (inches, 2 to 40) of the figures."""

    dpi: int
    width: float
    height: float

    def __post_init__(self) -> None:
        for name, low, high in (("dpi", 20, 1200), ("width", 2, 40), ("height", 2, 40)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} must be from {low} to {high}, not {getattr(self, name)}")


@dataclass(frozen=True)
class Value:
    """A number for every seed (its mean over digits), read as mean ± standard deviation over the seeds."""

    per_seed: tuple[float, ...]

    @property
    def mean(self) -> float:
        return fmean(self.per_seed)

    def __sub__(self, other: Value) -> Value:
        return Value(tuple(a - b for a, b in zip(self.per_seed, other.per_seed)))

    def __format__(self, spec: str) -> str:
        if not math.isfinite(self.mean):
            return "–"
        spread = f" ± {stdev(self.per_seed):{spec.lstrip('+')}}" if len(self.per_seed) > 1 else ""
        return f"{self.mean:{spec}}{spread}"


class Reporter:
    """Plots and tables over kappa; a value is the mean over the digits and seeds of the sweep.

    Curves run over the fixed kappas and mark `auto`, the kappa chosen for each request; tables show both.

    metrics: JSON files of the experiments to report, which share mask layer and top_k
    folder: where the figures and `summary.md` go

    For every method and metric there is a getter with one value per kappa, for instance
    `get_sft_unlearning_forget_set_score()` and `get_mimu_unlearning_retain_set_loss()`.
    """

    def __init__(self, config: ReporterConfig, metrics: Iterable[Path], folder: Path) -> None:
        self.config = config
        self.folder = folder
        self.experiments = [json.loads(path.read_text()) for path in metrics]
        if not self.experiments:
            raise ValueError("there is no experiment to report")
        cells = [tuple(e[key] for key in ("seed", "forget_digit", "kappa", "kappa_choice")) for e in self.experiments]
        if len(set(cells)) < len(cells) or len({(str(e["mask_layer"]), e["top_k"]) for e in self.experiments}) > 1:
            raise ValueError("the experiments to report must share mask layer and top_k, and differ in the rest")
        self.kappas = sorted({e["kappa"] for e in self.experiments if e["kappa_choice"] == "fixed"})
        self.has_auto = any(e["kappa_choice"] == "auto" for e in self.experiments)
        self.digits = sorted({experiment["forget_digit"] for experiment in self.experiments})
        self.seeds = sorted({experiment["seed"] for experiment in self.experiments})
        self.methods = list(
            dict.fromkeys(name for e in self.experiments for key in (FORGET, RETAIN) for name in e[key])
        )
        self.styles = method_styles(self.methods)

    def __getattr__(self, name: str) -> Callable[[], list[float]]:
        getter = re.fullmatch(r"get_(.+)_unlearning_(forget|retain)_set_(loss|score|probability)", name)
        if getter is None or getter[1] not in self.methods:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        method, samples, metric = getter.groups()
        return lambda: self.curve(FORGET if samples == "forget" else RETAIN, method, metric)

    def value(self, *keys: str, kappa: Kappa, digits: Sequence[int] | None = None) -> Value:
        """What stands under `keys` in the JSON at one kappa, over the given digits (None: all) and all seeds.

        Not a number where an experiment is missing, has no such key, or null under it.
        """
        means = []
        for seed in self.seeds:
            numbers: list[float] = []
            for experiment in self.experiments_at(kappa):
                if experiment["seed"] == seed and (digits is None or experiment["forget_digit"] in digits):
                    number: Any = experiment
                    for key in keys:
                        number = (number or {}).get(key)
                    numbers.append(math.nan if number is None else number)
            expected = len(self.digits if digits is None else digits)
            means.append(fmean(numbers) if len(numbers) == expected else math.nan)
        return Value(tuple(means))

    def experiments_at(self, kappa: Kappa) -> list[dict[str, Any]]:
        """The experiments with this kappa, fixed or chosen for each request."""
        return [e for e in self.experiments if kappa == ("auto" if e["kappa_choice"] == "auto" else e["kappa"])]

    def curve(self, *keys: str) -> list[float]:
        """The mean value at every fixed kappa."""
        return [self.value(*keys, kappa=kappa).mean for kappa in self.kappas]

    def best_kappa(self) -> Kappa:
        """The one fixed kappa with the largest difference of mimu's retain and forget score on training samples."""
        if not self.kappas:
            return "auto"
        retain = self.curve("training_split_metrics", "mimu", "retain", "score")
        forget = self.curve("training_split_metrics", "mimu", "forget", "score")
        differences = [a - b if math.isfinite(a - b) else -math.inf for a, b in zip(retain, forget)]
        return self.kappas[differences.index(max(differences))]

    def plot(self) -> None:
        """Draws the five curves and the summary, and writes the tables."""
        plt.switch_backend("Agg")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.draw_loss_curves_on_forget_set()
        self.draw_score_curves_on_forget_set()
        self.draw_loss_curves_on_retain_set()
        self.draw_score_curves_on_retain_set()
        self.draw_classifier_probability_on_forget_class()
        self.draw_summary()
        self.write_summary()

    def draw_loss_curves_on_forget_set(self) -> None:
        x = self.kappas
        with self._curves("loss_forget_set.png", "cross entropy on the forget set (nats)"):
            self._plot_methods(x, FORGET, "loss")

    def draw_score_curves_on_forget_set(self) -> None:
        x = self.kappas
        with self._curves("score_forget_set.png", "score on the forget set (%)"):
            self._plot_methods(x, FORGET, "score")

    def draw_loss_curves_on_retain_set(self) -> None:
        x = self.kappas
        with self._curves("loss_retain_set.png", "cross entropy on the retain set (nats)"):
            self._plot_methods(x, RETAIN, "loss")

    def draw_score_curves_on_retain_set(self) -> None:
        x = self.kappas
        with self._curves("score_retain_set.png", "score on the retain set (%)"):
            self._plot_methods(x, RETAIN, "score")

    def draw_classifier_probability_on_forget_class(self) -> None:
        x = self.kappas
        with self._curves("probability_on_forget_class.png", "probability of the forget class"):
            self._plot_methods(x, FORGET, "probability")

    def draw_summary(self) -> None:
        """Forget score against retain score, a mark per method and kappa: where the retrained one stands is the aim."""
        with self._figure("summary.png", "score on the forget set (%)", "score on the retain set (%)"):
            for name in self.methods:
                x, y = self.curve(FORGET, name, "score"), self.curve(RETAIN, name, "score")
                emphasis = {"markersize": 13, "zorder": 3} if name == "retrain" else {"markersize": 6}
                plt.plot(x, y, label=name, **self.styles[name] | emphasis, linewidth=0.8, alpha=0.85)
                if name == "mimu":
                    self._annotate_kappas(x, y)
            if self.has_auto:
                self._mark_auto(*(self.value(key, "mimu", "score", kappa="auto").mean for key in (FORGET, RETAIN)))

    def write_summary(self) -> None:
        """Writes `summary.md`: the numbers of the figures, the mask efficacy, and the digits one by one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        averaged = f"Mean over {len(self.digits)} digits" if len(self.digits) > 1 else f"Digit {self.digits[0]}"
        if len(self.seeds) > 1:
            averaged += f", ± standard deviation over {len(self.seeds)} seeds"
        top_k = self.experiments[0]["top_k"]
        sections = [f"# Forgetting {', '.join(map(str, self.digits))}", f"{averaged}; scored on {self.split()}."]
        for kappa in dict.fromkeys((self.headline_kappa(), self.best_kappa())):
            sections += [f"## Every method, kappa = {kappa}", self.about(kappa), self.methods_table(kappa)]
            if len(self.layers()) > 1:
                sections += ["Where the zeroed weights are:", self.layers_table(kappa)]
            if len(self.digits) > 1:
                sections += ["The worst digit of any seed:", self.worst_table(kappa)]
                sections += ["Digit by digit:", self.digits_table(kappa)]
        sections += [
            f"## Mask efficacy, K = {top_k}",
            "Scores on the forget set when only K weights of the masked layers are kept.",
            self.efficacy_table(self.headline_kappa()),
            "## Every kappa",
            self.kappas_table(),
        ]
        if len(self.digits) > 1:
            kappa = self.headline_kappa()
            for digit in self.digits:
                sections += [f"## Digit {digit}, kappa = {kappa}", self.about(kappa, [digit])]
                sections += [self.methods_table(kappa, [digit])]
        (self.folder / "summary.md").write_text("\n\n".join(sections) + "\n")

    def split(self) -> str:
        """What the experiments were scored on."""
        held_out = self.experiments[0].get("config", {}).get("held_out", 0)
        return f"{held_out} held-out training samples" if held_out else "the test split"

    def headline_kappa(self) -> Kappa:
        """What to report first: auto where the sweep has it, else the best of the fixed kappas."""
        return "auto" if self.has_auto else self.best_kappa()

    def about(self, kappa: Kappa, digits: Sequence[int] | None = None) -> str:
        """How this kappa came about, and how much of the classifier it zeroes."""
        zeroed = self.value("kappa", kappa=kappa, digits=digits).mean
        masked, everything = (self.experiments[0][key] for key in ("num_graph_vertices", "num_weights"))
        share = f"{zeroed:.0f} weights, {100 * zeroed / masked:.2g} % of the masked ones"
        if masked < everything:
            share += f" and {100 * zeroed / everything:.2g} % of all"
        if kappa == "auto":
            return f"kappa is chosen for each request on the training split: {share} on average."
        return f"Of the fixed kappas, {kappa} is the one that is best on training samples: {share}."

    def worst_table(self, kappa: Kappa) -> str:
        """The largest forget score and the smallest retain score against retrain, of one digit and one seed."""
        rows = []
        for name in self.methods:
            forget, gap = [], []
            for digit in self.digits:
                retain = self.value(RETAIN, name, "score", kappa=kappa, digits=[digit])
                gap += (retain - self.value(RETAIN, "retrain", "score", kappa=kappa, digits=[digit])).per_seed
                forget += self.value(FORGET, name, "score", kappa=kappa, digits=[digit]).per_seed
            rows.append([name, f"{Value((max(forget),)):.2f}", f"{Value((worst(gap),)):+.2f}"])
        return markdown_table(["method", "forget score, %", "retain score against retrain, points"], rows)

    def methods_table(self, kappa: Kappa, digits: Sequence[int] | None = None) -> str:
        """All metrics of every method at one kappa, over the given digits (None: all)."""
        reference = self.value(RETAIN, "retrain", "score", kappa=kappa, digits=digits)
        rows = []
        for name in self.methods:
            retain = self.value(RETAIN, name, "score", kappa=kappa, digits=digits)
            rows.append([
                name,
                f"{self.value(FORGET, name, 'score', kappa=kappa, digits=digits):.2f}",
                f"{retain:.2f}",
                f"{retain - reference:+.2f}",
                f"{self.value(FORGET, name, 'probability', kappa=kappa, digits=digits):.4f}",
                f"{self.value(FORGET, name, 'loss', kappa=kappa, digits=digits):.2f}",
                f"{self.value(RETAIN, name, 'loss', kappa=kappa, digits=digits):.3f}",
                f"{self.value('num_zeroed', name, kappa=kappa, digits=digits):.0f}",
                f"{self.value('seconds', name, kappa=kappa, digits=digits):.2f}",
            ])  # fmt: skip
        header = ["method", "forget score, %", "retain score, %", "retain score against retrain, points"]
        header += ["probability of the forget class", "forget loss, nats", "retain loss, nats", "weights zeroed"]
        header += ["seconds a request"]
        return markdown_table(header, rows)

    def layers(self) -> list[str]:
        """The masked layers, the output row of the forget class apart."""
        counts = [counts for e in self.experiments for counts in e.get("zeroed_by_layer", {}).values()]
        return list(dict.fromkeys(layer for of_method in counts for layer in of_method or {}))

    def layers_table(self, kappa: Kappa) -> str:
        """How many weights every mask zeroes in each layer."""
        rows = [
            [name, *(f"{self.value('zeroed_by_layer', name, layer, kappa=kappa):.1f}" for layer in self.layers())]
            for name in self.methods
            if any(e["zeroed_by_layer"].get(name) for e in self.experiments_at(kappa))
        ]
        return markdown_table(["weights zeroed", *self.layers()], rows)

    def closing_table(self) -> str:
        """What a run says last: forget and retain score of every method."""
        kappa = self.headline_kappa()
        rows = [
            [name, *(f"{self.value(evaluation, name, 'score', kappa=kappa):.2f}" for evaluation in (FORGET, RETAIN))]
            for name in self.methods
        ]
        return markdown_table([f"kappa = {kappa}", "forget score, %", "retain score, %"], rows)

    def efficacy_table(self, kappa: Kappa) -> str:
        """The mask efficacy of everything that can say which weights a class needs; it does not depend on kappa."""
        names = dict.fromkeys(name for experiment in self.experiments for name in experiment["mask_efficacy_metrics"])
        metrics = ("score", "probability", "loss")
        rows = [
            [name, *(f"{self.value('mask_efficacy_metrics', name, metric, kappa=kappa):.3f}" for metric in metrics)]
            for name in names
        ]
        return markdown_table(
            ["weights kept", "forget score, %", "probability of the forget class", "forget loss, nats"], rows
        )

    def digits_table(self, kappa: Kappa) -> str:
        """Forget / retain score of every method for each digit."""
        rows = []
        for digit in self.digits:
            cells = [
                f"{self.value(FORGET, name, 'score', kappa=kappa, digits=[digit]):.2f} / "
                f"{self.value(RETAIN, name, 'score', kappa=kappa, digits=[digit]):.2f}"
                for name in self.methods
            ]
            rows.append([digit, f"{self.value('kappa', kappa=kappa, digits=[digit]):.0f}", *cells])
        return markdown_table(["digit", "kappa", *(f"{name}: forget / retain score, %" for name in self.methods)], rows)

    def kappas_table(self) -> str:
        """The five metrics of every method at every kappa."""
        metrics = [(FORGET, "score"), (RETAIN, "score"), (FORGET, "probability"), (FORGET, "loss"), (RETAIN, "loss")]
        rows = [
            [
                name,
                kappa,
                *(f"{self.value(evaluation, name, metric, kappa=kappa):.3f}" for evaluation, metric in metrics),
            ]
            for name in self.methods
            for kappa in (*self.kappas, *["auto"] * self.has_auto)
        ]
        header = ["method", "kappa", "forget score, %", "retain score, %", "probability of the forget class"]
        return markdown_table([*header, "forget loss, nats", "retain loss, nats"], rows)

    def _plot_methods(self, x: Sequence[int], evaluation: str, metric: str) -> None:
        for name in self.methods:
            plt.plot(x, self.curve(evaluation, name, metric), label=name, markersize=5, **self.styles[name])
        if self.has_auto:
            x_auto = self.value("kappa", kappa="auto").mean
            self._mark_auto(x_auto, self.value(evaluation, "mimu", metric, kappa="auto").mean)

    def _mark_auto(self, x: float, y: float) -> None:
        """A ring where mimu stands with the kappa that is chosen for each request."""
        ring = {"markerfacecolor": "none", "markersize": 12, "markeredgewidth": 1.5, "linestyle": "none", "zorder": 4}
        plt.plot(x, y, label="mimu, kappa auto", **{**self.styles["mimu"], **ring})

    @contextmanager
    def _curves(self, name: str, y_label: str) -> Iterator[None]:
        """A figure over kappa: lines plotted while the context is open are in it."""
        with self._figure(name, "weights zeroed, kappa", y_label):
            yield
            plt.xscale("log")
            plt.xticks(self.kappas, [str(kappa) for kappa in self.kappas])
            plt.minorticks_off()

    @contextmanager
    def _figure(self, name: str, x_label: str, y_label: str) -> Iterator[None]:
        figure = plt.figure(figsize=(self.config.width, self.config.height), layout="constrained")
        try:
            yield
            plt.xlabel(x_label)
            plt.ylabel(y_label)
            plt.grid(alpha=0.3)
            figure.legend(loc="outside upper center", ncols=4, frameon=False)
            figure.savefig(self.folder / name, dpi=self.config.dpi)
        finally:
            plt.close(figure)

    def _annotate_kappas(self, x: Sequence[float], y: Sequence[float]) -> None:
        """Writes kappa beside the marks, but for marks too near to one that has it."""
        written: list[float] = []
        for kappa, forget, retain in zip(self.kappas, x, y):
            if all(abs(forget - other) > 12 for other in written):
                plt.annotate(
                    f"kappa {kappa}", (forget, retain), xytext=(6, -11), textcoords="offset points", fontsize=8
                )
                written.append(forget)


def worst(gaps: Iterable[float]) -> float:
    """The smallest gap; not a number where one is not known."""
    known = list(gaps)
    return math.nan if any(math.isnan(gap) for gap in known) else min(known)


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
