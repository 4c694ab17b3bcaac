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
from itertools import cycle, product
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any, Literal

import matplotlib.pyplot as plt
import numpy as np
from matplotlib import cycler
from matplotlib.figure import Figure

from mimu.files import write_text, written_whole

# Hues of Okabe and Ito's palette, which colour-blind readers can tell apart; shades of them for methods of one group.
COLORS = {
    "original": "#000000", "retrain": "#009E73", "retrain_again": "#7FD4B9", "mimu": "#0072B2", "random": "#7F7F7F",
    "magnitude": "#BCBD22", "optimised_mask": "#332288", "saliency": "#CC79A7", "output_row": "#E69F00",
    "logit_removed": "#F0C75E", "sft": "#D55E00", "salun": "#8F3F00", "fine_tune": "#8C564B",
    "neg_grad_plus": "#5A2E26", "delete": "#B8860B", "ssd": "#7E4FA8", "scrub": "#BC8FDB", "damp": "#2E8B57",
    "erase": "#DC267F", "cola": "#17BECF", "eu_k": "#A6761D",
}  # fmt: skip
FORMATS = ("png", "pdf", "svg")
FREE_COLORS = ("#DDCC77", "#999933", "#56B4E9", "#44AA99", "#117733", "#882255")  # lines by hand: from the last on
MARKERS = "D*pov^<sPXdh>"
DASHES = 14.0  # the period of dashed lines, in units of their width
FORGOTTEN = 5.0  # percent: marks with at most that forget score are enlarged in the summary
# How many weights are zeroed; auto: as was chosen for each request; None: what a reporter reports first.
Kappa = int | Literal["auto"] | None


@dataclass(frozen=True)
class Column:
    """A figure of every method: where it stands in the JSON of an experiment, what it is called, how it is written."""

    keys: tuple[str, ...]  # the first before the name of the method, the others behind it
    name: str = ""
    spec: str = ".2f"
    is_gap: bool = False  # less the figure of the classifier retrained without the class
    is_share: bool = False  # percent of the masked weights
    is_index: bool = False  # of a gap: the information difference index, see Reporter.index
    is_worst: bool = False  # not the mean over the digits, but the largest of any digit and seed, of gaps the smallest

    def of(self, method: str, experiment: Mapping[str, Any], retrained: Mapping[str, Any]) -> float:
        """A method's figure in an experiment (JSON), the largest of several; nan where it has no such key, or null."""
        found: Any = experiment
        for key in (self.keys[0], method, *self.keys[1:]):
            found = (found or {}).get(key)
        if isinstance(found, Mapping):
            found = max(found.values())
        if found is None:
            return math.nan
        if self.is_gap:
            return found - replace(self, is_gap=False).of("retrain", retrained, {})
        return 100 * found / experiment["num_graph_vertices"] if self.is_share else found

    def text(self, numbers: Sequence[float]) -> str:
        """Their mean ± standard deviation, of one number that alone; a dash where it is not finite."""
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
FORGET_SCORE = Column((FORGET, "score"), "forget score, %", ".2f")
RETAIN_SCORE = Column((RETAIN, "score"), "retain score, %", ".2f")
RETAIN_GAP = Column((RETAIN, "score"), "retain score against retrain, points", "+.2f", is_gap=True)
PROBABILITY = Column((FORGET, "probability"), "probability of the forget class", ".4f")
FORGET_LOSS = Column((FORGET, "loss"), "forget loss, nats", ".2f")
RETAIN_LOSS = Column((RETAIN, "loss"), "retain loss, nats", ".3f")
TRAINING_SCORES = [Column(("training_split_metrics", part, "score")) for part in ("retain", "forget")]
METRICS = (FORGET_SCORE, RETAIN_SCORE, PROBABILITY, FORGET_LOSS, RETAIN_LOSS)
ZEROED = Column(("num_zeroed",), "weights zeroed", ".0f")
SECONDS = Column(("seconds",), "seconds a request", ".2f")
EVERYTHING = (FORGET_SCORE, RETAIN_SCORE, RETAIN_GAP, PROBABILITY, FORGET_LOSS, RETAIN_LOSS, ZEROED, SECONDS)
WORST = tuple(replace(column, is_worst=True) for column in (FORGET_SCORE, RETAIN_GAP))
EFFICACY = [replace(of, keys=(KEPT, of.keys[1]), spec=".3f") for of in (FORGET_SCORE, PROBABILITY, FORGET_LOSS)]


def method_styles(methods: Iterable[str]) -> dict[str, dict[str, Any]]:
    """How each method is drawn, in every plot alike; those without a colour take free ones in turn."""
    free = [name for name in dict.fromkeys(methods) if name not in COLORS]
    colors = COLORS | dict(zip(free, cycle(FREE_COLORS)))
    return {name: {"color": colors[name], "marker": marker} for name, marker in zip(colors, cycle(MARKERS))}


@dataclass(frozen=True)
class ReporterConfig:
    """Resolution of the figures, dots per inch, and the formats that each is written in."""

    dpi: Annotated[int, "at least 20, at most 1200"]
    format: tuple[Literal[FORMATS], ...]


def save_figure(figure: Figure, path: Path, config: ReporterConfig) -> None:
    """Writes a figure in every format of the config, each file whole, and closes it."""
    for suffix in config.format:
        with written_whole(path.with_suffix(f".{suffix}")) as file:
            figure.savefig(file, format=suffix, dpi=config.dpi)
    plt.close(figure)


def frame(numbers: np.ndarray) -> tuple[float, float]:
    """Where an axis ends that shows those within Tukey's fences, 1.5 times the quartiles' distance beyond them."""
    numbers = numbers[np.isfinite(numbers)]
    if not len(numbers):
        return 0.0, 1.0
    first, third = np.quantile(numbers, (0.25, 0.75))
    reach = 2 * (third - first) or math.inf  # from the middle between the quartiles
    within = numbers[np.abs(numbers - (first + third) / 2) <= reach]
    margin = 0.08 * np.ptp(within) + 1e-3
    return within.min() - margin, within.max() + margin


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]], texts: int = 1) -> str:
    """A Markdown table; the first `texts` columns are text, the others are numbers."""
    cells = [list(map(str, row)) for row in (header, *rows)]
    widths = [max(map(len, column)) for column in np.transpose(cells)]
    cells.insert(1, ["-" * width if index < texts else "-" * (width - 1) + ":" for index, width in enumerate(widths)])
    lines = []
    for row in cells:
        padded = [*map(str.ljust, row[:texts], widths), *map(str.rjust, row[texts:], widths[texts:])]
        lines.append(f"| {' | '.join(padded)} |")
    return "\n".join(lines)


class Reporter:
    """Curves and tables of experiments that share classifier, mask layer and top_k, and differ in seed, digit, kappa.

    Curves run over the fixed kappas and mark `auto`, the kappa chosen for each request; tables show both. A new plot is
    a `draw_*` method that `plot` calls: whatever `plt` draws within `self._figure` is in it. For every method and
    metric there is a getter with one value per fixed kappa, for instance `get_sft_unlearning_forget_set_score()`.

    metrics: JSON files of the experiments; folder: where the figures and `summary.md` go
    retrained: the experiments, by seed and digit, whose retrained classifier gaps are measured against
    kappa: what to report first, auto where the sweep has it, else the best of the fixed ones
    """

    def __init__(self, config: ReporterConfig, metrics: Iterable[Path], folder: Path) -> None:
        self.config = config
        self.folder = folder
        self.experiments = [json.loads(path.read_text()) for path in metrics]
        self.found: dict[Kappa, dict[tuple[int, int], dict[str, Any]]] = {}
        for each in self.experiments:
            kappa = "auto" if each["kappa_choice"] == "auto" else each["kappa"]
            self.found.setdefault(kappa, {})[each["seed"], each["forget_digit"]] = each
        self.has_auto = "auto" in self.found
        self.kappas = sorted(kappa for kappa in self.found if kappa != "auto")
        self.has_audits = all(each["audit_metrics"] for each in self.experiments)
        self.digits = sorted({each["forget_digit"] for each in self.experiments})
        self.seeds = sorted({each["seed"] for each in self.experiments})
        first = self.experiments[0]
        self.titles = {}
        for digit in self.digits:
            name = first["class_names"][digit]
            self.titles[digit] = name if name == str(digit) else f"{digit} ({name})"
        self.names = f"class{'es' if len(self.digits) > 1 else ''} {', '.join(self.titles.values())}"
        classes = self.names if len(self.digits) < 4 else f"mean over {len(self.digits)} classes"
        self.subject = (first["dataset"], classes, first["split"], first["classifier"])
        self.methods = list(first[FORGET] | first[RETAIN])
        self.styles = method_styles(self.methods)
        self.retrained = {(e["seed"], e["forget_digit"]): e for e in self.experiments if "retrain" in e[RETAIN]}
        self.kappa: Kappa = "auto" if self.has_auto else self.best_kappa()

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
        with self._figure("loss_forget_set.png", "cross entropy on the forget set (nats)", is_zoomed=True):
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
        """Forget score against retain score, a mark per method and kappa; on the right those near retraining."""
        with self._figure("summary.png", "score on the retain set (%)", panels=2):
            for panel in (1, 2):
                axes = plt.subplot(1, 2, panel)
                plt.xlabel("score on the forget set (%), a mark for each kappa")
                for rank, name in enumerate(self.methods):
                    x, y = self.curve(FORGET_SCORE, name), self.curve(RETAIN_SCORE, name)
                    marks = {"markersize": 8 - 4 * rank / len(self.methods)}  # smaller ones are seen on larger ones
                    star = {"markersize": 16, "fillstyle": "none", "zorder": 4} if name == "retrain" else {}
                    plt.plot(x, y, label=name, **self.styles[name] | marks | star)
                self._mark_auto(FORGET_SCORE, RETAIN_SCORE)
            x, y = np.unique(np.concatenate([line.get_xydata() for line in axes.lines]), axis=0).T
            forgotten = (x <= FORGOTTEN) & np.isfinite(y)
            if forgotten.any():
                plt.xlim(np.multiply((-0.05, 1.05), max(0.1, x[forgotten].max())))
                plt.ylim(frame(y[forgotten]))
            plt.title(f"enlarged: most marks of a forget score of at most {FORGOTTEN:g} %", fontsize=9)

    def __getattr__(self, name: str) -> Callable[[], list[float]]:
        getter = re.fullmatch(r"get_(.+)_unlearning_(forget|retain)_set_(loss|score|probability)", name)
        if getter is None or getter[1] not in self.methods:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        method, samples, metric = getter.groups()
        return lambda: self.curve(Column((FORGET if samples == "forget" else RETAIN, metric)), method)

    def numbers(self, column: Column, method: str, kappa: Kappa = None) -> list[list[float]]:
        """A method's figures: a row for every seed, one for every digit."""
        found = self.found.get(kappa or self.kappa, {})
        rows = []
        for seed in self.seeds:
            places = [(seed, digit) for digit in self.digits]
            rows.append([column.of(method, found.get(each, {}), self.retrained.get(each, {})) for each in places])
        return rows

    def figures(self, column: Column, method: str, kappa: Kappa = None) -> list[float]:
        """A method's figures for every seed, means over the digits; of the worst one, that alone."""
        numbers = self.numbers(column, method, kappa)
        if column.is_worst:
            return [float(np.min(numbers) if column.is_gap else np.max(numbers))]
        figures = list(map(fmean, numbers))
        return self.index(column, figures) if column.is_index else figures

    def index(self, column: Column, excess: Sequence[float]) -> list[float]:
        """The information difference index of every seed: 1 as in the original, 0 as after retraining.

            IDI = sum_d (b(unlearned) - b(retrained)) / sum_d (b(original) - b(retrained))

        over the digits d, one of which may have too little to forget; b: the most bits that a probe of the layer finds.
        Not a number where another retrained one is as far from the retrained one as the original. After Jeon et al.
        2024, arXiv:2405.17878: there, b is InfoNCE's estimate of mutual information, and layers are summed up, too.

        excess: b(unlearned) - b(retrained), mean over the digits, of every seed
        """
        found = []
        for seed, bits in zip(self.seeds, excess):
            beside = [self.retrained.get((seed, digit), {}) for digit in self.digits]
            methods = ("original", "retrain_again")
            most, again = (fmean(column.of(method, each, each) for each in beside) for method in methods)
            band = abs(again) if math.isfinite(again) else 0.0
            found.append(bits / most if most > band else math.nan)
        return found

    def spread(self, column: Column, method: str) -> list[float]:
        """A method's figures for every seed, or where there is only one seed for every digit, which has no index."""
        of_seeds = len(self.seeds) > 1 or column.is_index
        return self.figures(column, method) if of_seeds else self.numbers(column, method)[0]

    def mean(self, column: Column, method: str, kappa: Kappa = None) -> float:
        """A method's figure, mean over digits and seeds."""
        return fmean(self.figures(column, method, kappa))

    def curve(self, column: Column, method: str) -> list[float]:
        """A method's mean figure at every fixed kappa."""
        return [self.mean(column, method, kappa) for kappa in self.kappas]

    def best_kappa(self) -> Kappa:
        """The one fixed kappa with the largest difference of mimu's retain and forget score on training samples."""

        def gained(kappa: Kappa) -> float:
            retain, forget = (self.mean(column, "mimu", kappa) for column in TRAINING_SCORES)
            return -math.inf if math.isnan(retain - forget) else retain - forget

        return max(self.kappas, key=gained, default="auto")

    def write_summary(self, more: Sequence[str] = ()) -> None:
        """Writes `summary.md`: the numbers of the figures, more sections, and the mask efficacy."""
        first = self.experiments[0]
        dataset, _, split, classifier = self.subject
        averaged = f"Mean over classes: {len(self.digits)}, ± standard deviation over seeds: {len(self.seeds)}."
        sections = [f"# Forgetting {self.names} of {dataset}", f"{classifier}, scored on {split}. {averaged}"]
        sections += [f"## Every method, kappa = {self.kappa}", self.about(), self.table(EVERYTHING)]
        if len(self.digits) > 1:
            sections += ["The worst class of any seed:", self.table(WORST)]
        sections += [*more, f"## Mask efficacy, K = {first['top_k']}"]
        sections += ["Scores on the forget set with only K weights of the masked layers."]
        sections += [self.table(EFFICACY, first[KEPT])]
        if self.kappas:
            sections += ["## Every kappa", self.kappas_table()]
        write_text(self.folder / "summary.md", "\n\n".join(sections) + "\n")

    def closing_table(self) -> str:
        """What a run says last: what was forgotten, how many weights every method zeroes, and its scores."""
        dataset, _, split, classifier = self.subject
        about = f"{dataset}, {classifier}: forgetting {self.names}, scored on {split}. {self.about()}"
        return f"{about}\n\n{self.table((FORGET_SCORE, RETAIN_SCORE, ZEROED))}"

    def about(self) -> str:
        """How kappa came about, how much of the classifier it zeroes, and which methods did not get there."""
        requests = self.found[self.kappa].values()
        zeroed = fmean(each["kappa"] for each in requests)
        of_masked, of_all = (100 * zeroed / self.experiments[0][key] for key in ("num_graph_vertices", "num_weights"))
        share = f"{zeroed:.0f} weights, {of_masked:.2g} % of the masked ones and {of_all:.2g} % of all"
        if not self.has_auto:
            return f"Of the fixed kappas, {self.kappa} is the one that is best on training samples: {share}."
        chosen = f"kappa is chosen for each request and method on the training split; mimu's is {share} on average."
        gave_up: Counter[str] = Counter()
        for each in requests:
            gave_up.update(name for name, did in each.get("gave_up", {}).items() if did)
        counts = ", ".join(f"{name} on {count} of {len(requests)} requests" for name, count in gave_up.items())
        if counts:
            chosen += f" Gave up before the class was forgotten: {counts}."
        if untrained := sum(each.get("gcn_untrained", False) for each in requests):
            chosen += f" The GCN is as before its training, which cost too much, on {untrained} of {len(requests)}."
        return chosen

    def cells(self, columns: Iterable[Column], method: str, kappa: Kappa = None) -> list[str]:
        """A method's row of a table."""
        return [column.text(self.figures(column, method, kappa)) for column in columns]

    def table(self, columns: Sequence[Column], methods: Iterable[str] = ()) -> str:
        """A row for every method (none given: all), a column for each figure."""
        rows = [[name, *self.cells(columns, name)] for name in methods or self.methods]
        return markdown_table(["method", *(column.name for column in columns)], rows)

    def kappas_table(self) -> str:
        """The five metrics of every method at every kappa."""
        columns = [replace(column, spec=".3f") for column in METRICS]
        places = product(self.methods, self.kappas + ["auto"] * self.has_auto)
        rows = [[name, kappa, *self.cells(columns, name, kappa)] for name, kappa in places]
        return markdown_table(["method", "kappa", *(column.name for column in columns)], rows)

    def _plot_methods(self, x: Sequence[int], evaluation: str, metric: str) -> None:
        """A curve for every method, a dashed line where kappa changes nothing; those that coincide are all seen."""
        plt.xlabel("weights zeroed, kappa")
        plt.xscale("log")
        plt.xticks(x, map(str, x), fontsize=8)
        plt.minorticks_off()
        curves = {name: self.curve(Column((evaluation, metric)), name) for name in self.methods}
        constant = [name for name in self.methods if len(set(curves[name])) == 1]
        level = [name for name in self.styles if name in constant and self.curve(ZEROED, name) != self.kappas]
        for rank, (name, y) in enumerate(curves.items()):
            if name in level:
                gap = DASHES * (level.index(name) + 1) / (len(level) + 1)
                line = {"linestyle": (0, (DASHES - gap, gap)), "linewidth": 1.8, "zorder": 3 + gap / DASHES}
                plt.axhline(y[0], label=name, color=self.styles[name]["color"], **line)
            else:
                wide = 1 - rank / len(curves)
                plt.plot(x, y, label=name, linewidth=1.2 + 2.5 * wide, markersize=4 + 4 * wide, **self.styles[name])
        self._mark_auto(ZEROED, Column((evaluation, metric)))

    def _mark_auto(self, x: Column, y: Column) -> None:
        """A ring where each method stands that chooses a kappa of its own for each request."""
        own = next(iter(self.found["auto"].values()))["gave_up"] if self.has_auto else ()
        for name in own:
            ring = {"marker": "o", "fillstyle": "none", "markersize": 12, "markeredgewidth": 1.5, "linestyle": "none"}
            ring |= {"color": self.styles[name]["color"], "label": "kappa auto", "zorder": 5}
            plt.plot(self.mean(x, name, "auto"), self.mean(y, name, "auto"), **ring)

    @contextmanager
    def _figure(self, name: str, y_label: str, is_zoomed: bool = False, panels: int = 1) -> Iterator[None]:
        """A figure: lines plotted while the context is open are in it; zoomed, its y axis ends where most marks are."""
        high = max(4, 0.8 + 0.2 * len(self.methods))
        figure = plt.figure(figsize=(3 + 5 * panels, high), layout="constrained")
        by_hand = cycler(color=FREE_COLORS[::-1], marker=list(MARKERS[: len(FREE_COLORS)]))
        with plt.rc_context({"axes.prop_cycle": by_hand, "axes.grid": True, "grid.alpha": 0.3}):
            yield
        axes = figure.axes[0]
        axes.set_ylabel(y_label)
        axes.set_title(title([self]), fontsize=9)
        if is_zoomed:
            low, high = axes.set_ylim(frame(np.concatenate([line.get_ydata() for line in axes.lines])))
            curves = [line for line in axes.lines if line.get_label() != "kappa auto"]
            heights = {line.get_label(): np.array(line.get_ydata()) for line in curves}
            outside = [f"{each} {y.mean():.4g}" for each, y in heights.items() if np.all((y < low) | (y > high))]
            note = textwrap.fill(f"outside the frame (mean): {', '.join(outside)}", 90)
            axes.set_xlabel(f"{axes.get_xlabel()}\n{note}" if outside else axes.get_xlabel())
        lines, names = plt.gca().get_legend_handles_labels()
        once = dict(zip(names, lines))
        figure.legend(once.values(), once, loc="outside right upper", handlelength=2.8, frameon=False, fontsize=9)
        save_figure(figure, self.folder / name, self.config)


def title(reporters: Iterable[Reporter]) -> str:
    """What a figure shows: data set, forget classes, split and classifier; all of them where reporters differ."""
    parts = zip(*(each.subject for each in reporters))
    return textwrap.fill(", ".join(" / ".join(dict.fromkeys(values)) for values in parts), 90)
