"""Curves, a summary, tables and audits of a sweep, from the JSON of the experiments alone."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

import artifacts

# Okabe and Ito's palette, which colour-blind readers can tell apart. Dashed: the two references.
# A colour for every family of methods, a marker for each method in it.
METHOD_STYLES: dict[str, dict[str, Any]] = {
    "original": {"color": "#000000", "marker": "D", "linestyle": "--"},
    "retrain": {"color": "#009E73", "marker": "*", "linestyle": "--"},
    "retrain_again": {"color": "#009E73", "marker": "p", "linestyle": "--"},
    "mimu": {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    "saliency": {"color": "#56B4E9", "marker": "v", "linestyle": "-"},
    "first_order": {"color": "#56B4E9", "marker": "^", "linestyle": "-"},
    "saliency_contrast": {"color": "#56B4E9", "marker": "<", "linestyle": "-"},
    "optimised_mask": {"color": "#56B4E9", "marker": "D", "linestyle": "-"},
    "random": {"color": "#7F7F7F", "marker": "s", "linestyle": "-"},
    "magnitude": {"color": "#CC79A7", "marker": "P", "linestyle": "-"},
    "output_row": {"color": "#E69F00", "marker": "X", "linestyle": "-"},
    "logit_removed": {"color": "#E69F00", "marker": "d", "linestyle": "-"},
    "sft": {"color": "#D55E00", "marker": "^", "linestyle": ":"},
    "random_labels": {"color": "#D55E00", "marker": "v", "linestyle": ":"},
    "salun": {"color": "#D55E00", "marker": "s", "linestyle": ":"},
    "fine_tune": {"color": "#8C564B", "marker": "o", "linestyle": ":"},
    "gradient_ascent": {"color": "#8C564B", "marker": "^", "linestyle": ":"},
    "neg_grad_plus": {"color": "#8C564B", "marker": "P", "linestyle": ":"},
    "ssd": {"color": "#9467BD", "marker": "D", "linestyle": ":"},
    "scrub": {"color": "#9467BD", "marker": "o", "linestyle": ":"},
    "bad_teacher": {"color": "#9467BD", "marker": "^", "linestyle": ":"},
    "unsir": {"color": "#9467BD", "marker": "s", "linestyle": ":"},
}
FREE_COLORS = ("#17BECF", "#BCBD22", "#F0E442", "#882255", "#332288", "#44AA99")
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


def save_figure(figure: Figure, path: Path, dpi: int) -> None:
    """Writes a figure as PNG, whole."""
    with artifacts.written_whole(path) as file:
        figure.savefig(file, format="png", dpi=dpi)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]], texts: int = 1) -> str:
    """A Markdown table; the first `texts` columns are text, the others are numbers."""
    cells = [[str(cell) for cell in line] for line in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width if index < texts else "-" * (width - 1) + ":" for index, width in enumerate(widths)])
    padded = [[*map(str.ljust, line[:texts], widths), *map(str.rjust, line[texts:], widths[texts:])] for line in cells]
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
        if abs(self.mean) >= 1e6:  # a loss that exploded
            return f"{self.mean:{spec[:-1].partition('.')[0]}.1e}"
        spread = f" ± {stdev(self.per_seed):{spec.lstrip('+')}}" if len(self.per_seed) > 1 else ""
        return f"{self.mean:{spec}}{spread}"


def number_at(experiment: dict[str, Any], keys: Sequence[str]) -> float:
    """What stands under `keys` in the JSON of an experiment; not a number where it has no such key, or null there."""
    number: Any = experiment
    for key in keys:
        number = (number or {}).get(key)
    return math.nan if number is None else number


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
        self.has_audits = all(e.get("audit_metrics") for e in self.experiments)
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
                    numbers.append(number_at(experiment, keys))
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

    def plot(self, sections: Sequence[str] = ()) -> None:
        """Draws the curves over kappa (without fixed ones the trade-off) and the masks, and writes the tables.

        sections: what else the summary says
        """
        plt.switch_backend("Agg")
        if self.kappas:
            self.draw_loss_curves_on_forget_set()
            self.draw_score_curves_on_forget_set()
            self.draw_loss_curves_on_retain_set()
            self.draw_score_curves_on_retain_set()
            self.draw_classifier_probability_on_forget_class()
            self.draw_summary()
        if "retrain" in self.methods and (self.has_audits or not self.kappas):
            self.draw_trade_off()
        if len(self.digits) > 1 and len(self.experiments[0].get("mask_shapes", [])) == 1:
            draw_masks(self)
        self.write_summary(sections)

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

    def draw_trade_off(self) -> None:
        """Forget score and retain score against retraining: means over the digits, bars of a standard deviation."""
        figure, axes = plt.subplots(figsize=(8, 5.5), layout="constrained")
        kappa = self.headline_kappa()
        for name in self.methods:
            forget, gap = [], []
            for digit in self.digits:
                retain, reference = (
                    self.value(RETAIN, each, "score", kappa=kappa, digits=[digit]).mean for each in (name, "retrain")
                )
                forget.append(self.value(FORGET, name, "score", kappa=kappa, digits=[digit]).mean)
                gap.append(retain - reference)
            spread = [stdev(values) if len(values) > 1 else 0.0 for values in (gap, forget)]
            emphasis = {"markersize": 13, "zorder": 3} if name == "retrain" else {"markersize": 6}
            style = self.styles[name] | emphasis | {"linestyle": "none"}
            axes.errorbar(fmean(forget), fmean(gap), *spread, label=name, elinewidth=0.7, alpha=0.85, **style)
        # Most methods stand near retraining, a few far away.
        axes.set_xscale("symlog", linthresh=1)
        axes.set_yscale("symlog", linthresh=1)
        axes.set_xticks([0, 1, 3, 10, 30, 100])
        axes.set_xlim(-0.3, 130)  # no score is below 0, though a bar may reach there
        ticks = [-100, -30, -10, -3, -1, 0, 1]
        axes.set_yticks([tick for tick in ticks if tick >= 1.2 * axes.get_ylim()[0]])
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.set_xlabel("score on the forget set (%)")
        axes.set_ylabel("retain score against retraining (points)")
        axes.grid(alpha=0.3)
        figure.legend(loc="outside right upper", frameon=False, fontsize=8)
        save_figure(figure, self.folder / "trade_off.png", self.config.dpi)
        plt.close(figure)

    def write_summary(self, more: Sequence[str] = ()) -> None:
        """Writes `summary.md`: the numbers of the figures, more sections, the mask efficacy, and the single digits."""
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
        sections += more
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
        artifacts.write_text(self.folder / "summary.md", "\n\n".join(sections) + "\n")

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
        """What a run says last: what was forgotten, and forget and retain score of every method."""
        kappa = self.headline_kappa()
        rows = [
            [name, *(f"{self.value(evaluation, name, 'score', kappa=kappa):.2f}" for evaluation in (FORGET, RETAIN))]
            for name in self.methods
        ]
        table = markdown_table(["method", "forget score, %", "retain score, %"], rows)
        digits = f"digit{'s' if len(self.digits) > 1 else ''} {', '.join(map(str, self.digits))}"
        return f"Forgetting {digits}, scored on {self.split()}. {self.about(kappa)}\n\n{table}"

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
            save_figure(figure, self.folder / name, self.config.dpi)
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


def draw_masks(reporter: Reporter) -> None:
    """Which weights of the masked layer go for which digit, and how many of them two digits have in common.

    Above: the layer's matrix, a point per zeroed weight; below: how many digits zero a weight, and of the digit of the
    row, the share of its weights that the digit of the column zeroes too. Of the first seed.
    """
    (m, n), digits = reporter.experiments[0]["mask_shapes"][0], reporter.digits
    kappa = reporter.headline_kappa()
    zeroed = {
        e["forget_digit"]: set(e["zeroed"]) for e in reporter.experiments_at(kappa) if e["seed"] == reporter.seeds[0]
    }
    figure = plt.figure(figsize=(11, 7), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1))
    for digit, axes in zip(
        digits, above.subplots(2, -(-len(digits) // 2), sharex=True, sharey=True, squeeze=False).flat
    ):
        rows, columns = zip(*(divmod(vertex, n) for vertex in sorted(zeroed[digit])))
        axes.scatter(columns, rows, s=2, color=METHOD_STYLES["mimu"]["color"], linewidths=0)
        axes.set_title(f"digit {digit}: {len(zeroed[digit])} weights", fontsize=8)
        axes.set(xlim=(-0.5, n - 0.5), ylim=(m - 0.5, -0.5))
        axes.tick_params(labelsize=7)
    above.supxlabel("source neuron", fontsize=9)
    above.supylabel("target neuron", fontsize=9)
    left, right = below.subplots(1, 2, width_ratios=(2, 1))
    counts = [[sum(r * n + c in of_digit for of_digit in zeroed.values()) for c in range(n)] for r in range(m)]
    image = left.imshow(counts, cmap="Blues", vmin=0, aspect="auto", interpolation="nearest")
    left.set(xlabel="source neuron", ylabel="target neuron")
    figure.colorbar(image, ax=left, label="digits that zero the weight", ticks=range(max(map(max, counts)) + 1))
    shares = [[100 * len(zeroed[a] & zeroed[b]) / len(zeroed[a]) for b in digits] for a in digits]
    image = right.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    for row, of_row in enumerate(shares):
        for column, share in enumerate(of_row):
            right.text(
                column, row, f"{share:.0f}", ha="center", va="center", fontsize=7, color="w" if share > 60 else "k"
            )
    right.set_xticks(range(len(digits)), digits)
    right.set_yticks(range(len(digits)), digits)
    right.set(xlabel="digit", ylabel="digit")
    figure.colorbar(image, ax=right, label="weights in common (%)")
    save_figure(figure, reporter.folder / "masks.png", reporter.config.dpi)
    plt.close(figure)
