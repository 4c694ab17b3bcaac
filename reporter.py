"""Curves over kappa, a summary and tables of a sweep, from the JSON of its experiments alone."""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from itertools import chain, cycle
from pathlib import Path
from statistics import fmean, quantiles, stdev
from typing import Annotated, Any, Literal

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mimu.runs.files import write_text, written_whole

# A line for every group of methods (dashed: references, dotted: methods that train, with dashes: projections), a colour
# for every method: hues of Okabe and Ito's palette, which colour-blind readers can tell apart, and shades of them.
# Markers are given in turn.
FAMILIES = (
    ("--", {"original": "#000000", "retrain": "#009E73", "retrain_again": "#7FD4B9"}),
    ("-", {"mimu": "#0072B2", "random": "#7F7F7F", "magnitude": "#CC79A7", "optimised_mask": "#332288"}),
    ("-", {"saliency": "#56B4E9", "first_order": "#A6D8F4", "saliency_contrast": "#3F7FA6"}),
    ("-", {"output_row": "#E69F00", "logit_removed": "#F0C75E"}),
    (":", {"sft": "#D55E00", "random_labels": "#F2A46B", "salun": "#8F3F00"}),
    (":", {"fine_tune": "#8C564B", "gradient_ascent": "#C49C94", "neg_grad_plus": "#5A2E26", "delete": "#B8860B"}),
    (":", {"ssd": "#7E4FA8", "scrub": "#BC8FDB", "bad_teacher": "#4B2A6B", "unsir": "#AA4499"}),
    ("-.", {"damp": "#2E8B57", "svd": "#6B8E23", "esc": "#B22222", "pour": "#4682B4", "erase": "#DC267F"}),
)
FORMATS = ("png", "pdf", "svg")
FREE_COLORS = ("#17BECF", "#BCBD22", "#F0E442", "#882255", "#117733", "#44AA99")
MARKERS = "D*pov^<sPXdh>"

Kappa = int | Literal["auto"]  # a number of weights, or the one that was chosen for each request
Digits = Sequence[int] | None  # None: all of the sweep


@dataclass(frozen=True)
class Column:
    """A figure of every method: where it stands in the JSON of an experiment, what it is called, how it is written.

    keys: in the JSON, the first before the name of the method, the others behind it
    is_gap: less the figure of the classifier retrained without the class; is_share: percent of the masked weights
    is_worst: not the mean over the digits, but the largest of any digit and seed, of gaps the smallest
    """

    keys: tuple[str, ...]
    name: str = ""
    spec: str = ".2f"
    is_gap: bool = False
    is_share: bool = False
    is_worst: bool = False

    def of(self, method: str, experiment: Mapping[str, Any]) -> float:
        """What stands in the JSON for a method; not a number where it has no such key, or null there."""
        keys = (self.keys[0], method, *self.keys[1:])
        number = reduce(lambda found, key: (found or {}).get(key), keys, experiment)
        return math.nan if number is None else number

    def text(self, numbers: Sequence[float]) -> str:
        """Their mean ± standard deviation, of one number that alone; a dash where it is not finite."""
        mean, spec = fmean(numbers), self.spec
        if not math.isfinite(mean):
            return "–"
        if abs(mean) >= 1e6:  # a loss that exploded
            return f"{mean:{spec[:-1].partition('.')[0]}.1e}"
        spread = f" ± {stdev(numbers):{spec.lstrip('+')}}" if len(numbers) > 1 else ""
        return f"{mean:{spec}}{spread}"


FORGET, RETAIN = "unlearning_metrics", "performance_degradation_metrics"
FORGET_SCORE = Column((FORGET, "score"), "forget score, %", ".2f")
RETAIN_SCORE = Column((RETAIN, "score"), "retain score, %", ".2f")
RETAIN_GAP = Column((RETAIN, "score"), "retain score against retrain, points", "+.2f", is_gap=True)
PROBABILITY = Column((FORGET, "probability"), "probability of the forget class", ".4f")
FORGET_LOSS = Column((FORGET, "loss"), "forget loss, nats", ".2f")
RETAIN_LOSS = Column((RETAIN, "loss"), "retain loss, nats", ".3f")
METRICS = (FORGET_SCORE, RETAIN_SCORE, PROBABILITY, FORGET_LOSS, RETAIN_LOSS)
ZEROED = Column(("num_zeroed",), "weights zeroed", ".0f")
SECONDS = Column(("seconds",), "seconds a request", ".2f")
EVERYTHING = (FORGET_SCORE, RETAIN_SCORE, RETAIN_GAP, PROBABILITY, FORGET_LOSS, RETAIN_LOSS, ZEROED, SECONDS)
WORST = tuple(replace(column, is_worst=True) for column in (FORGET_SCORE, RETAIN_GAP))
EFFICACY = tuple(
    replace(column, keys=("mask_efficacy_metrics", column.keys[1]), spec=".3f")
    for column in (FORGET_SCORE, PROBABILITY, FORGET_LOSS)
)


def method_styles(methods: Iterable[str]) -> dict[str, dict[str, Any]]:
    """How each method is drawn, in every plot alike; those of no family take free colours in turn."""
    styles = {name: {"color": color, "linestyle": line} for line, family in FAMILIES for name, color in family.items()}
    free = [name for name in dict.fromkeys(methods) if name not in styles]
    styles |= {name: {"color": color} for name, color in zip(free, cycle(FREE_COLORS))}
    return {name: style | {"marker": marker} for (name, style), marker in zip(styles.items(), cycle(MARKERS))}


@dataclass(frozen=True)
class ReporterConfig:
    """Resolution of the figures, dots per inch, and the formats that each is written in."""

    dpi: Annotated[int, "at least 20, at most 1200"]
    format: tuple[Literal[FORMATS], ...]

    def __post_init__(self) -> None:
        if not 0 < len(self.format) == len(set(self.format)):
            raise ValueError(f"format must name at least one of {FORMATS}, each once, not {self.format}")


def save_figure(figure: Figure, path: Path, config: ReporterConfig) -> None:
    """Writes a figure in every format of the config, each file whole, and closes it."""
    for suffix in config.format:
        with written_whole(path.with_suffix(f".{suffix}")) as file:
            figure.savefig(file, format=suffix, dpi=config.dpi)
    plt.close(figure)


def zoom(axes: Axes) -> None:
    """Ends the y axis at the last marks within Tukey's fences: 1.5 times their distance beyond the quartiles."""
    numbers = sorted(y for line in axes.lines for y in line.get_ydata() if math.isfinite(y))
    if len(set(numbers)) > 1:
        first, _, third = quantiles(numbers, method="inclusive")
        reach = max(1.5 * (third - first), 0.05 * (numbers[-1] - numbers[0]))
        inside = [y for y in numbers if first - reach <= y <= third + reach]
        axes.set_ylim(inside[0] - 0.1 * reach, inside[-1] + 0.1 * reach)


def subject(reporters: Iterable[Reporter]) -> str:
    """What a figure shows: data set, forget classes, split and classifier; all of them where reporters differ."""
    parts = zip(*(each.subject for each in reporters))
    return textwrap.fill(", ".join(" / ".join(dict.fromkeys(values)) for values in parts), 90)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]], texts: int = 1) -> str:
    """A Markdown table; the first `texts` columns are text, the others are numbers."""
    cells = [[str(cell) for cell in line] for line in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width if index < texts else "-" * (width - 1) + ":" for index, width in enumerate(widths)])
    padded = [[*map(str.ljust, line[:texts], widths), *map(str.rjust, line[texts:], widths[texts:])] for line in cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def class_title(experiment: Mapping[str, Any], label: int) -> str:
    """A class by its number, and its name where it has one."""
    name = experiment["class_names"][label]
    return str(label) if name == str(label) else f"{label} ({name})"


class Reporter:
    """Curves and tables of experiments that share classifier, mask layer and top_k, and differ in seed, digit, kappa.

    Curves run over the fixed kappas and mark `auto`, the kappa chosen for each request; tables show both.

    metrics: JSON files of the experiments
    folder: where the figures and `summary.md` go
    retrained: the experiments, by seed and digit, whose retrained classifier gaps are measured against
    kappa: what to report first, auto where the sweep has it, else the best of the fixed ones

    For every method and metric there is a getter with one value per kappa, for instance
    `get_sft_unlearning_forget_set_score()` and `get_mimu_unlearning_retain_set_loss()`.
    """

    def __init__(self, config: ReporterConfig, metrics: Iterable[Path], folder: Path) -> None:
        self.config = config
        self.folder = folder
        self.experiments = [json.loads(path.read_text()) for path in metrics]
        self.found: dict[Kappa, dict[tuple[int, int], dict[str, Any]]] = {}
        for each in self.experiments:
            kappa = "auto" if each["kappa_choice"] == "auto" else each["kappa"]
            self.found.setdefault(kappa, {})[each["seed"], each["forget_digit"]] = each
        shared = {(str(each["mask_layer"]), each["top_k"]) for each in self.experiments}
        if len(shared) != 1 or sum(map(len, self.found.values())) < len(self.experiments):
            raise ValueError("there must be experiments that share mask layer and top_k and differ in the rest")
        self.has_auto = "auto" in self.found
        self.kappas = sorted(kappa for kappa in self.found if kappa != "auto")
        self.has_audits = all(each["audit_metrics"] for each in self.experiments)
        self.digits = sorted({each["forget_digit"] for each in self.experiments})
        self.seeds = sorted({each["seed"] for each in self.experiments})
        first = self.experiments[0]
        self.titles = [class_title(first, digit) for digit in self.digits]
        self.names = f"class{'es' if len(self.digits) > 1 else ''} {', '.join(self.titles)}"
        classes = self.names if len(self.digits) < 4 else f"mean over {len(self.digits)} classes"
        self.subject = (first["dataset"], classes, first["split"], first["classifier"])
        self.methods = list(dict.fromkeys(name for key in (FORGET, RETAIN) for name in first[key]))
        self.styles = method_styles(self.methods)
        self.retrained = {(e["seed"], e["forget_digit"]): e for e in self.experiments if "retrain" in e[RETAIN]}
        self.kappa: Kappa = "auto" if self.has_auto else self.best_kappa()

    def __getattr__(self, name: str) -> Callable[[], list[float]]:
        getter = re.fullmatch(r"get_(.+)_unlearning_(forget|retain)_set_(loss|score|probability)", name)
        if getter is None or getter[1] not in self.methods:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        method, samples, metric = getter.groups()
        return lambda: self.curve(Column((FORGET if samples == "forget" else RETAIN, metric)), method)

    def number(self, column: Column, method: str, seed: int, digit: int, kappa: Kappa | None = None) -> float:
        """A method's figure in one experiment, not a number where that is missing. kappa None: what to report first."""
        found = self.found.get(self.kappa if kappa is None else kappa, {})
        number = column.of(method, found.get((seed, digit), {}))
        if column.is_share:
            return 100 * number / self.experiments[0]["num_graph_vertices"]
        return number - column.of("retrain", self.retrained.get((seed, digit), {})) if column.is_gap else number

    def single_figures(self, column: Column, method: str, kappa: Kappa | None = None) -> list[float]:
        """A method's figures for every digit and seed."""
        return [self.number(column, method, seed, digit, kappa) for digit in self.digits for seed in self.seeds]

    def figures(self, column: Column, method: str, kappa: Kappa | None = None, digits: Digits = None) -> list[float]:
        """A method's figures for every seed, means over the given digits."""
        if column.is_worst:
            numbers = self.single_figures(column, method, kappa)
            return [max(numbers, key=lambda x: (math.isnan(x), -x if column.is_gap else x))]
        of_seeds = ([self.number(column, method, seed, d, kappa) for d in digits or self.digits] for seed in self.seeds)
        return list(map(fmean, of_seeds))

    def spread(self, column: Column, method: str) -> list[float]:
        """A method's figures for every seed, or where there is only one seed for every digit."""
        return (self.figures if len(self.seeds) > 1 else self.single_figures)(column, method)

    def mean(self, column: Column, method: str, kappa: Kappa | None = None) -> float:
        """A method's figure, mean over digits and seeds."""
        return fmean(self.figures(column, method, kappa))

    def curve(self, column: Column, method: str) -> list[float]:
        """A method's mean figure at every fixed kappa."""
        return [self.mean(column, method, kappa) for kappa in self.kappas]

    def best_kappa(self) -> Kappa:
        """The one fixed kappa with the largest difference of mimu's retain and forget score on training samples."""
        columns = (Column(("training_split_metrics", part, "score")) for part in ("retain", "forget"))
        retain, forget = (self.curve(column, "mimu") for column in columns)
        better = {kappa: a - b for kappa, a, b in zip(self.kappas, retain, forget)}
        return max(better, key=lambda kappa: (math.isfinite(better[kappa]), better[kappa]), default="auto")

    def plot(self, sections: Sequence[str] = ()) -> None:
        """Draws the curves over kappa, where there are fixed ones, and writes the summary, with further sections."""
        if self.kappas:
            self.draw_loss_curves_on_forget_set()
            self.draw_score_curves_on_forget_set()
            self.draw_loss_curves_on_retain_set()
            self.draw_score_curves_on_retain_set()
            self.draw_classifier_probability_on_forget_class()
            self.draw_summary()
        self.write_summary(sections)

    def draw_loss_curves_on_forget_set(self) -> None:
        x = self.kappas
        with self._figure("loss_forget_set.png", "cross entropy on the forget set (nats)"):
            self._plot_methods(x, FORGET, "loss")

    def draw_score_curves_on_forget_set(self) -> None:
        x = self.kappas
        with self._figure("score_forget_set.png", "score on the forget set (%)"):
            self._plot_methods(x, FORGET, "score")

    def draw_loss_curves_on_retain_set(self) -> None:
        x = self.kappas
        with self._figure("loss_retain_set.png", "cross entropy on the retain set (nats)", is_zoomed=True):
            self._plot_methods(x, RETAIN, "loss")

    def draw_score_curves_on_retain_set(self) -> None:
        x = self.kappas
        with self._figure("score_retain_set.png", "score on the retain set (%)", is_zoomed=True):
            self._plot_methods(x, RETAIN, "score")

    def draw_classifier_probability_on_forget_class(self) -> None:
        x = self.kappas
        with self._figure("probability_on_forget_class.png", "probability of the forget class"):
            self._plot_methods(x, FORGET, "probability")

    def draw_summary(self) -> None:
        """Forget score against retain score, a mark per method and kappa: where the retrained one stands is the aim."""
        with self._figure("summary.png", "score on the retain set (%)", "score on the forget set (%)", True):
            for name in self.methods:
                x, y = self.curve(FORGET_SCORE, name), self.curve(RETAIN_SCORE, name)
                size, order = (13, 3) if name == "retrain" else (6, 2)
                plt.plot(x, y, label=name, markersize=size, zorder=order, **self.styles[name])
                if name == "mimu":
                    for end, at in ((0, (6, -11)), (-1, (6, 6))):
                        about = f"kappa {self.kappas[end]}"
                        plt.annotate(about, (x[end], y[end]), at, textcoords="offset points", fontsize=8)
            self._mark_auto(FORGET_SCORE, RETAIN_SCORE)

    def write_summary(self, more: Sequence[str] = ()) -> None:
        """Writes `summary.md`: the numbers of the figures, more sections, the mask efficacy, and the single digits."""
        first, kappa, several = self.experiments[0], self.kappa, len(self.digits) > 1
        mean = f"; mean over {len(self.digits)} classes" if several else ""
        spread = f"{mean}, ± standard deviation over {len(self.seeds)} seeds" if len(self.seeds) > 1 else mean
        masks = {name: layers for name, layers in first["zeroed_by_layer"].items() if layers}
        layers = [Column(("zeroed_by_layer", each), each, ".1f") for each in dict.fromkeys(chain(*masks.values()))]
        dataset, _, split, classifier = self.subject
        sections = [f"# Forgetting {self.names} of {dataset}", f"{classifier}, scored on {split}{spread}."]
        for each in dict.fromkeys((kappa, self.best_kappa())):
            sections += [f"## Every method, kappa = {each}", self.about(each), self.table(EVERYTHING, each)]
            if len(layers) > 1:
                sections += ["Where the zeroed weights are:", self.table(layers, each, methods=masks)]
            if several:
                sections += ["The worst class of any seed:", self.table(WORST, each)]
        sections += [*more, f"## Mask efficacy, K = {first['top_k']}"]
        sections += ["Scores on the forget set with only K weights of the masked layers."]
        sections += [self.table(EFFICACY, kappa, methods=first["mask_efficacy_metrics"])]
        if self.kappas:
            sections += ["## Every kappa", self.kappas_table()]
        for digit, title in zip(self.digits, self.titles) if several else ():
            sections += [f"## Class {title}, kappa = {kappa}", self.about(kappa, [digit])]
            sections += [self.table(EVERYTHING, kappa, [digit])]
        write_text(self.folder / "summary.md", "\n\n".join(sections) + "\n")

    def closing_table(self) -> str:
        """What a run says last: what was forgotten, how many weights every method zeroes, and its scores."""
        dataset, _, split, classifier = self.subject
        about = f"{dataset}, {classifier}: forgetting {self.names}, scored on {split}. {self.about(self.kappa)}"
        return f"{about}\n\n{self.table((*METRICS[:2], ZEROED), self.kappa)}"

    def about(self, kappa: Kappa, digits: Digits = None) -> str:
        """How this kappa came about, how much of the classifier it zeroes, and which methods did not get there."""
        requests = [each for (_, digit), each in self.found[kappa].items() if digit in (digits or self.digits)]
        zeroed = fmean(each["kappa"] for each in requests)
        masked, everything = (self.experiments[0][key] for key in ("num_graph_vertices", "num_weights"))
        share = f"{zeroed:.0f} weights, {100 * zeroed / masked:.2g} % of the masked ones"
        share += f" and {100 * zeroed / everything:.2g} % of all" if masked < everything else ""
        if kappa != "auto":
            return f"Of the fixed kappas, {kappa} is the one that is best on training samples: {share}."
        gave_up = Counter(name for e in requests for name, did in e.get("gave_up", {}).items() if did)
        counts = ", ".join(f"{name} on {count} of {len(requests)} requests" for name, count in gave_up.items())
        chosen = f"kappa is chosen for each request and method on the training split; mimu's is {share} on average."
        return f"{chosen} Gave up before the class was forgotten: {counts}." if counts else chosen

    def cells(self, columns: Iterable[Column], method: str, kappa: Kappa, digits: Digits = None) -> list[str]:
        """A method's row of a table, over the given digits."""
        return [column.text(self.figures(column, method, kappa, digits)) for column in columns]

    def table(self, columns: Sequence[Column], kappa: Kappa, digits: Digits = None, methods: Iterable[str] = ()) -> str:
        """A row for every method (none given: all), a column for each figure, over the given digits."""
        rows = [[name, *self.cells(columns, name, kappa, digits)] for name in methods or self.methods]
        return markdown_table(["method", *(column.name for column in columns)], rows)

    def kappas_table(self) -> str:
        """The five metrics of every method at every kappa."""
        columns, kappas = [replace(column, spec=".3f") for column in METRICS], (*self.kappas, *["auto"] * self.has_auto)
        rows = [[name, kappa, *self.cells(columns, name, kappa)] for name in self.methods for kappa in kappas]
        return markdown_table(["method", "kappa", *(column.name for column in columns)], rows)

    def _plot_methods(self, x: Sequence[int], evaluation: str, metric: str) -> None:
        plt.xscale("log")
        plt.xticks(x, map(str, x))
        plt.minorticks_off()
        column = Column((evaluation, metric))
        for name in self.methods:
            plt.plot(x, self.curve(column, name), label=name, markersize=5, **self.styles[name])
        self._mark_auto(ZEROED, column)

    def _mark_auto(self, *columns: Column) -> None:
        """A ring where mimu stands with the kappa that is chosen for each request."""
        if self.has_auto and "mimu" in self.methods:
            x, y = (self.mean(column, "mimu", "auto") for column in columns)
            ring = {"markerfacecolor": "none", "markersize": 12, "markeredgewidth": 1.5, "linestyle": "none"}
            plt.plot(x, y, label="mimu, kappa auto", zorder=4, **self.styles["mimu"] | ring)

    @contextmanager
    def _figure(
        self, name: str, y_label: str, x_label: str = "weights zeroed, kappa", is_zoomed: bool = False
    ) -> Iterator[None]:
        """A figure: lines plotted while the context is open are in it, and in the legend where a mark is in the frame.

        is_zoomed: whether the y axis ends where most marks are, with a line of text on the others
        """
        rows_of_legend = -(-len(self.methods) // 4)
        figure = plt.figure(figsize=(6.5, 4 + 0.2 * rows_of_legend), layout="constrained")
        yield
        plt.xlabel(x_label)
        plt.ylabel(y_label)
        plt.title(subject([self]), fontsize=9)
        plt.grid(alpha=0.3)
        axes = plt.gca()
        if is_zoomed:
            zoom(axes)
        (low, high), handles, beyond = axes.get_ylim(), [], []
        for line in axes.lines:
            marks = [y for x, y in line.get_xydata() if math.isfinite(x + y)]
            outside = [y for y in marks if not low <= y <= high]
            handles += [line] if len(outside) < len(marks) else []
            beyond += [f"{line.get_label()} {max(outside, key=lambda y: abs(y - low)):.3g}"] if outside else []
        if beyond:
            named = f"outside of the frame, farthest marks: {', '.join(beyond)}"
            figure.supxlabel(textwrap.fill(named, 100), fontsize=8)
        figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False, fontsize=9)
        save_figure(figure, self.folder / name, self.config)
