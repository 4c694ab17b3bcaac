"""Curves over kappa, a summary and tables of a sweep, from the JSON of its experiments alone."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from itertools import chain, cycle
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any, Literal

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from runs.files import write_text, written_whole

# Okabe and Ito's palette, which colour-blind readers can tell apart: a colour and a line (dashed: references, dotted:
# methods that train) for every family of methods. Markers are given in turn.
FAMILIES = (
    ("#000000", "--", ("original",)),
    ("#009E73", "--", ("retrain", "retrain_again")),
    ("#0072B2", "-", ("mimu",)),
    ("#56B4E9", "-", ("saliency", "first_order", "saliency_contrast", "optimised_mask")),
    ("#7F7F7F", "-", ("random",)),
    ("#CC79A7", "-", ("magnitude",)),
    ("#E69F00", "-", ("output_row", "logit_removed")),
    ("#D55E00", ":", ("sft", "random_labels", "salun")),
    ("#8C564B", ":", ("fine_tune", "gradient_ascent", "neg_grad_plus")),
    ("#9467BD", ":", ("ssd", "scrub", "bad_teacher", "unsir")),
)
FREE_COLORS = ("#17BECF", "#BCBD22", "#F0E442", "#882255", "#332288", "#44AA99")
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
    styles = {name: {"color": color, "linestyle": line} for color, line, names in FAMILIES for name in names}
    free = [name for name in dict.fromkeys(methods) if name not in styles]
    styles |= {name: {"color": color} for name, color in zip(free, cycle(FREE_COLORS))}
    return {name: style | {"marker": marker} for (name, style), marker in zip(styles.items(), cycle(MARKERS))}


def save_figure(figure: Figure, path: Path, dpi: int) -> None:
    """Writes a figure as PNG, whole, and closes it."""
    with written_whole(path) as file:
        figure.savefig(file, format="png", dpi=dpi)
    plt.close(figure)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]], texts: int = 1) -> str:
    """A Markdown table; the first `texts` columns are text, the others are numbers."""
    cells = [[str(cell) for cell in line] for line in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width if index < texts else "-" * (width - 1) + ":" for index, width in enumerate(widths)])
    padded = [[*map(str.ljust, line[:texts], widths), *map(str.rjust, line[texts:], widths[texts:])] for line in cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


@dataclass(frozen=True)
class ReporterConfig:
    """Resolution of the figures, dots per inch."""

    dpi: Annotated[int, "at least 20, at most 1200"]


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
        self.names = ", ".join(map(str, self.digits))
        held_out = self.experiments[0]["config"]["held_out"]
        self.split = f"{held_out} held-out training samples" if held_out else "the test split"
        self.methods = list(dict.fromkeys(name for key in (FORGET, RETAIN) for name in self.experiments[0][key]))
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
        with self._figure("loss_retain_set.png", "cross entropy on the retain set (nats)"):
            self._plot_methods(x, RETAIN, "loss")

    def draw_score_curves_on_retain_set(self) -> None:
        x = self.kappas
        with self._figure("score_retain_set.png", "score on the retain set (%)"):
            self._plot_methods(x, RETAIN, "score")

    def draw_classifier_probability_on_forget_class(self) -> None:
        x = self.kappas
        with self._figure("probability_on_forget_class.png", "probability of the forget class"):
            self._plot_methods(x, FORGET, "probability")

    def draw_summary(self) -> None:
        """Forget score against retain score, a mark per method and kappa: where the retrained one stands is the aim."""
        with self._figure("summary.png", "score on the retain set (%)", "score on the forget set (%)"):
            for name in self.methods:
                x, y = self.curve(FORGET_SCORE, name), self.curve(RETAIN_SCORE, name)
                plt.plot(x, y, label=name, markersize=13 if name == "retrain" else 6, **self.styles[name])
                if name == "mimu":
                    below = {"xytext": (6, -11), "textcoords": "offset points", "fontsize": 8}
                    for end in (0, -1):
                        plt.annotate(f"kappa {self.kappas[end]}", (x[end], y[end]), **below)
            self._mark_auto(FORGET_SCORE, RETAIN_SCORE)

    def write_summary(self, more: Sequence[str] = ()) -> None:
        """Writes `summary.md`: the numbers of the figures, more sections, the mask efficacy, and the single digits."""
        first, kappa, several = self.experiments[0], self.kappa, len(self.digits) > 1
        mean = f"Mean over {len(self.digits)} digits" if several else f"Digit {self.names}"
        spread = f", ± standard deviation over {len(self.seeds)} seeds" if len(self.seeds) > 1 else ""
        masks = {name: layers for name, layers in first["zeroed_by_layer"].items() if layers}
        layers = [Column(("zeroed_by_layer", each), each, ".1f") for each in dict.fromkeys(chain(*masks.values()))]
        sections = [f"# Forgetting {self.names}", f"{mean}{spread}; scored on {self.split}."]
        for each in dict.fromkeys((kappa, self.best_kappa())):
            sections += [f"## Every method, kappa = {each}", self.about(each), self.table(EVERYTHING, each)]
            if len(layers) > 1:
                sections += ["Where the zeroed weights are:", self.table(layers, each, methods=masks)]
            if several:
                sections += ["The worst digit of any seed:", self.table(WORST, each)]
        sections += [*more, f"## Mask efficacy, K = {first['top_k']}"]
        sections += ["Scores on the forget set with only K weights of the masked layers."]
        sections += [self.table(EFFICACY, kappa, methods=first["mask_efficacy_metrics"])]
        if self.kappas:
            sections += ["## Every kappa", self.kappas_table()]
        for digit in self.digits if several else ():
            sections += [f"## Digit {digit}, kappa = {kappa}", self.about(kappa, [digit])]
            sections += [self.table(EVERYTHING, kappa, [digit])]
        write_text(self.folder / "summary.md", "\n\n".join(sections) + "\n")

    def closing_table(self) -> str:
        """What a run says last: what was forgotten, and forget and retain score of every method."""
        kappa, digits = self.kappa, f"digit{'s' if len(self.digits) > 1 else ''} {self.names}"
        about = f"Forgetting {digits}, scored on {self.split}. {self.about(kappa)}"
        return f"{about}\n\n{self.table(METRICS[:2], kappa)}"

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
        chosen = f"kappa is chosen for each request on the training split: {share} on average."
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
    def _figure(self, name: str, y_label: str, x_label: str = "weights zeroed, kappa") -> Iterator[None]:
        """A figure: lines plotted while the context is open are in it."""
        figure = plt.figure(figsize=(6.5, 4.2), layout="constrained")
        yield
        plt.xlabel(x_label)
        plt.ylabel(y_label)
        plt.grid(alpha=0.3)
        figure.legend(loc="outside upper center", ncols=4, frameon=False)
        save_figure(figure, self.folder / name, self.config.dpi)
