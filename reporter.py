"""Curves over kappa and the summary of a sweep, from the JSON of its experiments alone."""

import json
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import cycle, product
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any, Literal

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.cbook import boxplot_stats
from matplotlib.figure import Figure

from mimu.files import write_text, written_whole
from mimu.settings import Bounds

# Hues of Okabe and Ito's palette, which colour-blind readers can tell apart; shades of them for methods of one group.
COLORS = {
    "original": "#000000", "retrain": "#009E73", "retrain_again": "#7FD4B9", "mimu": "#0072B2", "random": "#7F7F7F",
    "magnitude": "#BCBD22", "optimised_mask": "#332288", "saliency": "#CC79A7", "output_row": "#E69F00",
    "logit_removed": "#F0C75E", "sft": "#D55E00", "salun": "#8F3F00", "fine_tune": "#8C564B",
    "neg_grad_plus": "#5A2E26", "delete": "#B8860B", "ssd": "#7E4FA8", "scrub": "#BC8FDB", "damp": "#2E8B57",
    "erase": "#DC267F", "cola": "#17BECF", "eu_k": "#A6761D",
}  # fmt: skip
FREE_COLORS = ("#DDCC77", "#999933", "#56B4E9", "#44AA99", "#117733", "#882255")
MARKERS = "D*pov^<sPXdh>"
DASHES = 14.0  # the period of dashed lines, in units of their width
FORGOTTEN = 5.0  # percent: the summary enlarges marks whose forget accuracy is at most this


@dataclass(frozen=True)
class Column:
    """A number of every method: where the JSON of an experiment holds it, its title, and how it is written.

    Args:
        keys: (FORGET, "loss") reads `experiment[FORGET][method]["loss"]`, the largest value where that is a mapping.
        name: The title in tables and on axes.
        spec: The format of the mean; the standard deviation gets the same precision.
        is_gap: The number of the classifier that was retrained without the class is subtracted.
        percent_of: A key of the experiment. If set, the column is in percent of the number there.
        reduction: "mean" averages over the digits. "worst" takes the largest number of any digit and seed, of gaps the
            smallest. "index" divides a mean gap by that of the original, see `Experiments.original_gaps`.
    """

    keys: tuple[str, ...]
    name: str = ""
    spec: str = ".2f"
    is_gap: bool = False
    percent_of: str = ""
    reduction: Literal["mean", "worst", "index"] = "mean"

    def read(self, method: str, experiment: Mapping[str, Any], retrained: Mapping[str, Any]) -> float:
        """Return a method's number in an experiment, nan where a key is missing or the number is null."""
        value: Any = experiment
        for key in (self.keys[0], method, *self.keys[1:]):
            value = (value or {}).get(key)
        if isinstance(value, Mapping):
            value = max(value.values())
        if value is None:
            return math.nan
        if self.is_gap:
            return value - replace(self, is_gap=False).read("retrain", retrained, {})
        return 100 * value / experiment[self.percent_of] if self.percent_of else value

    def text(self, numbers: Sequence[float]) -> str:
        """Format numbers as mean ± standard deviation, one number without it, and a mean that is not finite as –."""
        mean = fmean(numbers)
        sign, _, precision = self.spec.partition(".")
        if not math.isfinite(mean):
            return "–"
        if abs(mean) >= 1e6:  # a loss that exploded
            return f"{mean:{sign}.1e}"
        spread = f" ± {stdev(numbers):.{precision}}" if len(numbers) > 1 else ""
        return f"{mean:{self.spec}}{spread}"


FORGET = "unlearning_metrics"
RETAIN = "performance_degradation_metrics"
KEPT = "mask_efficacy_metrics"
FORGET_SCORE = Column((FORGET, "score"), "forget accuracy, %", ".2f")
RETAIN_SCORE = Column((RETAIN, "score"), "retain accuracy, %", ".2f")
RETAIN_GAP = Column((RETAIN, "score"), "gap to retraining, points", "+.2f", is_gap=True)
PROBABILITY = Column((FORGET, "probability"), "probability of the forget class", ".4f")
DIVERGENCE = Column(("audit_metrics", "js_forget"), "divergence on the forget set, bits", ".3f")
FORGET_LOSS = Column((FORGET, "loss"), "forget loss, nats", ".2f")
RETAIN_LOSS = Column((RETAIN, "loss"), "retain loss, nats", ".3f")
METRICS = (FORGET_SCORE, RETAIN_SCORE, PROBABILITY, FORGET_LOSS, RETAIN_LOSS)
ZEROED = Column(("num_zeroed",), "weights zeroed", ".0f")
SECONDS = Column(("seconds",), "seconds a request", ".2f")
EVERYTHING = (FORGET_SCORE, RETAIN_SCORE, RETAIN_GAP, DIVERGENCE, *METRICS[2:], ZEROED, SECONDS)
WORST = tuple(replace(column, reduction="worst") for column in (FORGET_SCORE, RETAIN_GAP))
EFFICACY = [replace(each, keys=(KEPT, each.keys[1]), spec=".3f") for each in (FORGET_SCORE, PROBABILITY, FORGET_LOSS)]


@dataclass(frozen=True)
class ReporterConfig:
    """Resolution of the figures, dots per inch."""

    dpi: Annotated[int, Bounds(ge=20, le=1200)]


def save_figure(figure: Figure, path: Path, config: ReporterConfig) -> None:
    """Write a figure as PNG, and close it."""
    with written_whole(path) as file:
        figure.savefig(file, format="png", dpi=config.dpi)
    plt.close(figure)


def method_styles(methods: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return each method's colour and marker, the same in every plot. Unknown methods take free colours in turn."""
    free = [name for name in dict.fromkeys(methods) if name not in COLORS]
    colors = COLORS | dict(zip(free, cycle(FREE_COLORS)))
    return {name: {"color": colors[name], "marker": marker} for name, marker in zip(colors, cycle(MARKERS))}


def frame(numbers: np.ndarray) -> tuple[float, float]:
    """Return the limits of an axis that leaves out what is beyond the whiskers of a boxplot."""
    (box,) = boxplot_stats(numbers[np.isfinite(numbers)], autorange=True)
    low, high = np.nan_to_num([box["whislo"], box["whishi"]])
    margin = 0.08 * (high - low) + 1e-3
    return low - margin, high + margin


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]], texts: int = 1) -> str:
    """Format a Markdown table; the first `texts` columns are text, the others are numbers."""
    cells = [list(map(str, row)) for row in (header, *rows)]
    widths = [max(map(len, column)) for column in np.transpose(cells)]
    cells.insert(1, ["-" * width if index < texts else "-" * (width - 1) + ":" for index, width in enumerate(widths)])
    lines = []
    for row in cells:
        padded = [*map(str.ljust, row[:texts], widths), *map(str.rjust, row[texts:], widths[texts:])]
        lines.append(f"| {' | '.join(padded)} |")
    return "\n".join(lines)


class Experiments:
    """The numbers of experiments that share classifier and mask layer, and differ in seed, digit and kappa.

    Where a method takes a kappa, it is a number of weights, or "auto", or None for what the attribute `kappa` says.

    Attributes:
        by_kappa: The JSON of the experiments by kappa ("auto": chosen for each request), then by seed and digit.
        retrained: The JSON by seed and digit whose `retrain` is what gaps are measured against.
        choosing: The methods that choose their own kappa if it is auto.
        subject: Data set, forget classes, split and classifier, for the titles of figures.
        kappa: The kappa that is reported first: auto if it was run, else the largest.
    """

    def __init__(self, metrics: Iterable[Path]) -> None:
        self.every = [json.loads(path.read_text()) for path in metrics]
        self.by_kappa: dict[int | str, dict[tuple[int, int], dict[str, Any]]] = {}
        self.retrained: dict[tuple[int, int], dict[str, Any]] = {}
        for each in self.every:
            kappa = "auto" if each["kappa_choice"] == "auto" else each["kappa"]
            place = each["seed"], each["forget_digit"]
            self.by_kappa.setdefault(kappa, {})[place] = each
            if "retrain" in each[RETAIN]:
                self.retrained[place] = each
        self.kappas = sorted(kappa for kappa in self.by_kappa if kappa != "auto")
        self.is_audited = bool(self.retrained) and all(each["audits"] for each in self.every)
        self.digits = sorted({each["forget_digit"] for each in self.every})
        self.seeds = sorted({each["seed"] for each in self.every})
        self.kappa = "auto" if "auto" in self.by_kappa else self.kappas[-1]
        self.first = first = next(iter(self.by_kappa[self.kappa].values()))
        self.choosing = list(first["gave_up"])
        self.methods = list(first[FORGET] | first[RETAIN])
        names = {digit: first["class_names"][digit] for digit in self.digits}
        titles = [name if name == str(digit) else f"{digit} ({name})" for digit, name in names.items()]
        self.classes = f"class{'es' if len(titles) > 1 else ''} {', '.join(titles)}"
        classes = self.classes if len(titles) < 4 else f"mean over {len(titles)} classes"
        self.subject = (first["dataset"], classes, first["split"], first["classifier"])

    def numbers(self, column: Column, method: str, kappa: int | str | None = None) -> list[list[float]]:
        """Return a method's numbers: a row for every seed, with a number for every digit."""
        return self._numbers(self.by_kappa.get(kappa or self.kappa, {}), column, method)

    def _numbers(self, experiments: Mapping[tuple[int, int], Any], column: Column, method: str) -> list[list[float]]:
        places = product(self.seeds, self.digits)
        numbers = [column.read(method, experiments.get(at, {}), self.retrained.get(at, {})) for at in places]
        return np.reshape(numbers, (len(self.seeds), len(self.digits))).tolist()

    def by_seed(self, column: Column, method: str, kappa: int | str | None = None) -> list[float]:
        """Reduce a method's numbers to one for every seed, or if the column asks for the worst, to that alone."""
        numbers = self.numbers(column, method, kappa)
        if column.reduction == "worst":
            return [float(np.min(numbers) if column.is_gap else np.max(numbers))]
        means = list(map(fmean, numbers))
        return means if column.reduction == "mean" else np.divide(means, self.original_gaps(column)).tolist()

    def original_gaps(self, column: Column) -> list[float]:
        """Return for every seed the original's gap, the divisor of the information difference index:

            IDI = sum_d (b(unlearned) - b(retrained)) / sum_d (b(original) - b(retrained))

        over the digits d, one of which may have too little to forget; b: the most bits that a probe of the layer finds.
        1: as in the original, 0: as after retraining. The divisor is nan where the gap of another retrained classifier
        is as large. After Jeon et al. 2024, arXiv:2405.17878, who estimate b by InfoNCE and sum over layers, too.
        """
        original = map(fmean, self._numbers(self.retrained, column, "original"))
        again = map(fmean, self._numbers(self.retrained, column, "retrain_again"))
        return [gap if gap > np.nan_to_num(abs(other)) else math.nan for gap, other in zip(original, again)]

    def spread(self, column: Column, method: str) -> list[float]:
        """Return a number for every seed, or if there is only one seed, for every digit (which has no index)."""
        is_over_digits = len(self.seeds) == 1 and column.reduction == "mean"
        return self.numbers(column, method)[0] if is_over_digits else self.by_seed(column, method)

    def mean(self, column: Column, method: str, kappa: int | str | None = None) -> float:
        """Return a method's mean over digits and seeds."""
        return fmean(self.by_seed(column, method, kappa))

    def curve(self, column: Column, method: str) -> list[float]:
        """Return a method's mean at every fixed kappa."""
        return [self.mean(column, method, kappa) for kappa in self.kappas]

    def cells(self, columns: Iterable[Column], method: str, kappa: int | str | None = None) -> list[str]:
        """Return a method's row of a table."""
        return [column.text(self.by_seed(column, method, kappa)) for column in columns]

    def table(self, columns: Sequence[Column], methods: Iterable[str] = ()) -> str:
        """Return a table with a row for every method (none given: all) and a column for each of `columns`."""
        rows = [[name, *self.cells(columns, name)] for name in methods or self.methods]
        return markdown_table(["method", *(column.name for column in columns)], rows)

    def kappas_table(self) -> str:
        """Return a table of the five metrics of every method at every kappa."""
        columns = [replace(column, spec=".3f") for column in METRICS]
        places = product(self.methods, [*self.kappas, *(["auto"] if "auto" in self.by_kappa else [])])
        rows = [[name, kappa, *self.cells(columns, name, kappa)] for name, kappa in places]
        return markdown_table(["method", "kappa", *(column.name for column in columns)], rows)


class Reporter:
    """Draws the curves of experiments over the fixed kappas, with a ring at auto, and writes their summary.

    A new plot is a `draw_*` method, which `plot` calls: what `plt` draws within `self._figure` is in it. Every method
    and metric has a getter with one value per fixed kappa, for instance `get_sft_unlearning_forget_set_score()`.

    Args:
        metrics: The JSON files of the experiments.
        folder: The place of the figures and of `summary.md`.
    """

    def __init__(self, config: ReporterConfig, metrics: Iterable[Path], folder: Path) -> None:
        self.config = config
        self.folder = folder
        self.experiments = Experiments(metrics)
        self.styles = method_styles(self.experiments.methods)

    def plot(self, sections: Sequence[str] = ()) -> None:
        """Draw the curves over the fixed kappas, if there are any, and write the summary with further sections."""
        if self.experiments.kappas:
            for name in dir(self):
                if name.startswith("draw_"):
                    getattr(self, name)()
        self.write_summary(sections)

    def draw_loss_curves_on_forget_set(self) -> None:
        with self._figure("loss_forget_set.png", "cross entropy on the forget set (nats)", is_zoomed=True) as x:
            self._plot_methods(x, FORGET, "loss")

    def draw_score_curves_on_forget_set(self) -> None:
        with self._figure("score_forget_set.png", "forget accuracy (%)") as x:
            self._plot_methods(x, FORGET, "score")

    def draw_loss_curves_on_retain_set(self) -> None:
        with self._figure("loss_retain_set.png", "cross entropy on the retain set (nats)", is_zoomed=True) as x:
            self._plot_methods(x, RETAIN, "loss")

    def draw_score_curves_on_retain_set(self) -> None:
        with self._figure("score_retain_set.png", "retain accuracy (%)", is_zoomed=True) as x:
            self._plot_methods(x, RETAIN, "score")

    def draw_classifier_probability_on_forget_class(self) -> None:
        with self._figure("probability_on_forget_class.png", "probability of the forget class") as x:
            self._plot_methods(x, FORGET, "probability")

    def draw_summary(self) -> None:
        """Draw retain accuracy over forget accuracy, a mark per method and kappa; on the right, those that forget."""
        methods = self.experiments.methods
        with self._figure("summary.png", "retain accuracy (%)", panels=2):
            for panel in (1, 2):
                axes = plt.subplot(1, 2, panel)
                plt.xlabel("forget accuracy (%), one mark per kappa")
                for rank, name in enumerate(methods):
                    x, y = (self.experiments.curve(column, name) for column in (FORGET_SCORE, RETAIN_SCORE))
                    size = {"markersize": 8 - 4 * rank / len(methods)}  # small marks lie on larger ones
                    star = {"markersize": 16, "fillstyle": "none", "zorder": 4} if name == "retrain" else {}
                    plt.plot(x, y, label=name, **self.styles[name] | size | star)
                self._mark_auto(FORGET_SCORE, RETAIN_SCORE)
            x, y = np.unique(np.concatenate([line.get_xydata() for line in axes.lines]), axis=0).T
            forgotten = (x <= FORGOTTEN) & np.isfinite(y)
            if forgotten.any():
                plt.xlim(np.multiply((-0.05, 1.05), max(0.1, x[forgotten].max())))
                plt.ylim(frame(y[forgotten]))
            plt.title(f"enlarged: most marks of a forget accuracy of at most {FORGOTTEN:g} %", fontsize=9)

    def __getattr__(self, name: str) -> Callable[[], list[float]]:
        getter = re.fullmatch(r"get_(.+)_unlearning_(forget|retain)_set_(loss|score|probability)", name)
        if getter is None or getter[1] not in self.experiments.methods:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        method, samples, metric = getter.groups()
        return lambda: self.experiments.curve(Column((FORGET if samples == "forget" else RETAIN, metric)), method)

    def write_summary(self, more: Sequence[str] = ()) -> None:
        """Write `summary.md`: the numbers of the figures, further sections, and the mask efficacy."""
        experiments = self.experiments
        dataset, _, split, classifier = experiments.subject
        digits, seeds = len(experiments.digits), len(experiments.seeds)
        scope = f"Mean over classes: {digits}, ± standard deviation over seeds: {seeds}."
        sections = [f"# Forgetting {experiments.classes} of {dataset}", f"{classifier}, evaluated on {split}. {scope}"]
        sections += [f"## Every method, kappa = {experiments.kappa}", self.about(), experiments.table(EVERYTHING)]
        if digits > 1:
            sections += ["The worst class of any seed:", experiments.table(WORST)]
        sections += [*more, f"## Mask efficacy, K = {experiments.first['top_k']}"]
        sections += ["The forget set is evaluated with only K weights of the masked layers kept."]
        sections += [experiments.table(EFFICACY, experiments.first[KEPT])]
        if experiments.kappas:
            sections += ["## Every kappa", experiments.kappas_table()]
        write_text(self.folder / "summary.md", "\n\n".join(sections) + "\n")

    def closing_table(self) -> str:
        """Return what a run prints last: what was forgotten, how many weights each method zeroes, and accuracies."""
        dataset, _, split, classifier = self.experiments.subject
        about = f"{dataset}, {classifier}: forgetting {self.experiments.classes}, evaluated on {split}. {self.about()}"
        return f"{about}\n\n{self.experiments.table((FORGET_SCORE, RETAIN_SCORE, ZEROED))}"

    def about(self) -> str:
        """Return how kappa was chosen, how much of the classifier it zeroes, and which methods gave up."""
        experiments = self.experiments
        requests = experiments.by_kappa[experiments.kappa].values()
        kappa = fmean(each["kappa"] for each in requests)
        masked, total = (100 * kappa / experiments.first[key] for key in ("num_graph_vertices", "num_weights"))
        share = f"{kappa:.0f} weights, {masked:.2g} % of the masked ones and {total:.2g} % of all"
        if experiments.kappa != "auto":
            return f"Of the fixed kappas, {experiments.kappa} is the largest: {share}."
        text = "kappa is chosen automatically on the training split, for each request and method; "
        text += f"mimu's is {share} on average."
        for name in experiments.choosing:
            if count := sum(each["gave_up"][name] for each in requests):
                text += f" {name} gave up before the class was forgotten on {count} of {len(requests)} requests."
        if count := sum(each.get("gcn_untrained", False) for each in requests):
            text += f" The GCN stayed untrained on {count} of {len(requests)}: its training cost too much accuracy."
        return text

    def _plot_methods(self, x: Sequence[int], evaluation: str, metric: str) -> None:
        """Plot a curve for every method, dashed if kappa changes nothing. Lines that coincide remain visible."""
        plt.xlabel("weights zeroed, kappa")
        plt.xscale("log")
        plt.xticks(x, map(str, x), fontsize=8)
        plt.minorticks_off()
        column = Column((evaluation, metric))
        curves = {name: self.experiments.curve(column, name) for name in self.experiments.methods}
        level = [name for name, y in curves.items() if len(set(y)) == 1 and self.experiments.curve(ZEROED, name) != x]
        for rank, (name, y) in enumerate(curves.items()):
            if name in level:
                gap = DASHES * (level.index(name) + 1) / (len(level) + 1)
                line = {"linestyle": (0, (DASHES - gap, gap)), "linewidth": 1.8, "zorder": 3 + gap / DASHES}
                plt.axhline(y[0], label=name, color=self.styles[name]["color"], **line)
            else:
                size = 1 - rank / len(curves)
                plt.plot(x, y, label=name, linewidth=1.2 + 2.5 * size, markersize=4 + 4 * size, **self.styles[name])
        self._mark_auto(ZEROED, column)

    def _mark_auto(self, x: Column, y: Column) -> None:
        """Draw a ring where each method stands that chooses its own kappa for each request."""
        ring = {"fillstyle": "none", "markersize": 12, "markeredgewidth": 1.5, "label": "kappa auto", "zorder": 5}
        for name in self.experiments.choosing:
            across, up = (self.experiments.mean(column, name, "auto") for column in (x, y))
            plt.plot(across, up, "o", color=self.styles[name]["color"], **ring)

    @contextmanager
    def _figure(self, name: str, y_label: str, is_zoomed: bool = False, panels: int = 1) -> Iterator[list[int]]:
        """Yield the fixed kappas, and save a figure of what is plotted in the context.

        If it is zoomed, its y axis leaves outliers out, with a note.
        """
        high = max(4, 0.8 + 0.2 * len(self.styles))
        figure = plt.figure(figsize=(3 + 5 * panels, high), layout="constrained")
        with plt.rc_context({"axes.grid": True, "grid.alpha": 0.3}):
            yield self.experiments.kappas
        axes = figure.axes[0]
        axes.set_ylabel(y_label)
        axes.set_title(title([self.experiments]), fontsize=9)
        if is_zoomed:
            low, high = axes.set_ylim(frame(np.concatenate([line.get_ydata() for line in axes.lines])))
            heights = {line.get_label(): np.array(line.get_ydata()) for line in axes.lines}
            outside = [f"{label} {y.mean():.4g}" for label, y in heights.items() if np.all((y < low) | (y > high))]
            if outside:
                note = textwrap.fill(f"outside the frame (mean): {', '.join(outside)}", 90)
                axes.set_xlabel(f"{axes.get_xlabel()}\n{note}")
        legend = dict(zip(*plt.gca().get_legend_handles_labels()[::-1]))  # one entry for all rings
        figure.legend(legend.values(), legend, loc="outside right upper", handlelength=2.8, frameon=False, fontsize=9)
        save_figure(figure, self.folder / name, self.config)


def title(every: Iterable[Experiments]) -> str:
    """Return the title of a figure: data set, forget classes, split and classifier, all of them where they differ."""
    parts = zip(*(each.subject for each in every))
    return textwrap.fill(", ".join(" / ".join(dict.fromkeys(values)) for values in parts), 90)
