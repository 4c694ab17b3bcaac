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
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any, Literal

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from runs.files import write_text, written_whole

# Okabe and Ito's palette, which colour-blind readers can tell apart: a colour and a line for every family of methods
# (dashed: the references), a marker for each method in it.
METHOD_STYLES: dict[str, dict[str, Any]] = {
    name: {"color": color, "marker": marker, "linestyle": line}
    for color, line, markers in (
        ("#000000", "--", {"original": "D"}),
        ("#009E73", "--", {"retrain": "*", "retrain_again": "p"}),
        ("#0072B2", "-", {"mimu": "o"}),
        ("#56B4E9", "-", {"saliency": "v", "first_order": "^", "saliency_contrast": "<", "optimised_mask": "D"}),
        ("#7F7F7F", "-", {"random": "s"}),
        ("#CC79A7", "-", {"magnitude": "P"}),
        ("#E69F00", "-", {"output_row": "X", "logit_removed": "d"}),
        ("#D55E00", ":", {"sft": "^", "random_labels": "v", "salun": "s"}),
        ("#8C564B", ":", {"fine_tune": "o", "gradient_ascent": "^", "neg_grad_plus": "P"}),
        ("#9467BD", ":", {"ssd": "D", "scrub": "o", "bad_teacher": "^", "unsir": "s"}),
    )
    for name, marker in markers.items()
}
FREE_COLORS = ("#17BECF", "#BCBD22", "#F0E442", "#882255", "#332288", "#44AA99")
FREE_MARKERS = "X<>phdH"

Kappa = int | Literal["auto"]  # a number of weights, or the one that was chosen for each request
Digits = Sequence[int] | None  # None: all of the sweep


@dataclass(frozen=True)
class Column:
    """A figure of every method: where it stands in the JSON of an experiment, what it is called, how it is written.

    keys: the first stands before the name of the method, the others behind it
    is_gap: less the figure of the classifier retrained without the class; is_share: percent of the masked weights
    is_worst: not the mean over the digits, but the largest of any digit and seed, of gaps the smallest
    """

    keys: tuple[str, ...]
    name: str
    spec: str
    is_gap: bool = False
    is_share: bool = False
    is_worst: bool = False

    def of(self, method: str) -> tuple[str, ...]:
        """The keys in the JSON for one method."""
        return (self.keys[0], method, *self.keys[1:])


FORGET, RETAIN = "unlearning_metrics", "performance_degradation_metrics"
FORGET_SCORE = Column((FORGET, "score"), "forget score, %", ".2f")
RETAIN_SCORE = Column((RETAIN, "score"), "retain score, %", ".2f")
RETAIN_GAP = Column((RETAIN, "score"), "retain score against retrain, points", "+.2f", is_gap=True)
PROBABILITY = Column((FORGET, "probability"), "probability of the forget class", ".4f")
FORGET_LOSS = Column((FORGET, "loss"), "forget loss, nats", ".2f")
RETAIN_LOSS = Column((RETAIN, "loss"), "retain loss, nats", ".3f")
METRICS = (FORGET_SCORE, RETAIN_SCORE, PROBABILITY, FORGET_LOSS, RETAIN_LOSS)
WORST = tuple(replace(column, is_worst=True) for column in (FORGET_SCORE, RETAIN_GAP))
ZEROED = Column(("num_zeroed",), "weights zeroed", ".0f")
SECONDS = Column(("seconds",), "seconds a request", ".2f")


def method_styles(methods: Iterable[str]) -> dict[str, dict[str, Any]]:
    """How each method is drawn, in every plot alike; those without a style of their own take free ones in turn."""
    free = enumerate(name for name in dict.fromkeys(methods) if name not in METHOD_STYLES)
    return METHOD_STYLES | {name: {"color": FREE_COLORS[i % 6], "marker": FREE_MARKERS[i % 7]} for i, name in free}


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


def number_at(experiment: Mapping[str, Any], keys: Sequence[str]) -> float:
    """What stands under `keys` in the JSON of an experiment; not a number where it has no such key, or null there."""
    number = reduce(lambda found, key: (found or {}).get(key), keys, experiment)
    return math.nan if number is None else number


@dataclass(frozen=True)
class ReporterConfig:
    """Resolution of the figures, dots per inch."""

    dpi: Annotated[int, "at least 20, at most 1200"]


@dataclass(frozen=True)
class Value:
    """A number for every seed (the mean over digits), written as mean ± standard deviation over the seeds."""

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


class Reporter:
    """Curves and tables of experiments that share classifier, mask layer and top_k, and differ in seed, digit, kappa.

    Curves run over the fixed kappas and mark `auto`, the kappa chosen for each request; tables show both.

    metrics: JSON files of the experiments
    folder: where the figures and `summary.md` go
    retrained: the experiments, by seed and digit, whose retrained classifier gaps are measured against

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
        self.methods = list(dict.fromkeys(name for key in (FORGET, RETAIN) for name in self.experiments[0][key]))
        self.styles = method_styles(self.methods)
        counts = self.experiments[0]["zeroed_by_layer"].values()
        self.layers = list(dict.fromkeys(layer for of_method in counts for layer in of_method or ()))
        self.retrained = {(e["seed"], e["forget_digit"]): e for e in self.experiments if "retrain" in e[RETAIN]}

    def __getattr__(self, name: str) -> Callable[[], list[float]]:
        getter = re.fullmatch(r"get_(.+)_unlearning_(forget|retain)_set_(loss|score|probability)", name)
        if getter is None or getter[1] not in self.methods:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        method, samples, metric = getter.groups()
        return lambda: self.curve(FORGET if samples == "forget" else RETAIN, method, metric)

    def value(self, *keys: str, kappa: Kappa, digits: Digits = None) -> Value:
        """What stands under `keys` in the JSON at one kappa; not a number where that or an experiment is missing."""
        return self._mean(self.found.get(kappa, {}), keys, digits)

    def figure(self, column: Column, method: str, kappa: Kappa, digits: Digits = None) -> Value:
        """A method's value in a column at one kappa, over the given digits and all seeds."""
        if column.is_worst:
            numbers = self.single_figures(replace(column, is_worst=False), method, kappa)
            return Value((max(numbers, key=lambda x: (math.isnan(x), -x if column.is_gap else x)),))
        value = self.value(*column.of(method), kappa=kappa, digits=digits)
        if column.is_share:
            return Value(tuple(100 * number / self.experiments[0]["num_graph_vertices"] for number in value.per_seed))
        return value - self._mean(self.retrained, column.of("retrain"), digits) if column.is_gap else value

    def _mean(self, found: Mapping[tuple[int, int], Any], keys: Sequence[str], digits: Digits) -> Value:
        of_seeds = ([number_at(found.get((seed, d), {}), keys) for d in digits or self.digits] for seed in self.seeds)
        return Value(tuple(map(fmean, of_seeds)))

    def single_figures(self, column: Column, method: str, kappa: Kappa) -> list[float]:
        """A method's values in a column for every digit and seed."""
        return [number for digit in self.digits for number in self.figure(column, method, kappa, [digit]).per_seed]

    def spread(self, column: Column, method: str, kappa: Kappa) -> Value:
        """A method's values in a column for every seed, or where there is only one seed for every digit."""
        value = self.figure(column, method, kappa)
        return value if len(self.seeds) > 1 else Value(tuple(self.single_figures(column, method, kappa)))

    def curve(self, *keys: str) -> list[float]:
        """The mean value at every fixed kappa."""
        return [self.value(*keys, kappa=kappa).mean for kappa in self.kappas]

    def best_kappa(self) -> Kappa:
        """The one fixed kappa with the largest difference of mimu's retain and forget score on training samples."""
        retain, forget = (self.curve("training_split_metrics", "mimu", part, "score") for part in ("retain", "forget"))
        better = {kappa: a - b for kappa, a, b in zip(self.kappas, retain, forget)}
        return max(better, key=lambda kappa: (math.isfinite(better[kappa]), better[kappa]), default="auto")

    def headline_kappa(self) -> Kappa:
        """What to report first: auto where the sweep has it, else the best of the fixed kappas."""
        return "auto" if self.has_auto else self.best_kappa()

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
                x, y = self.curve(FORGET, name, "score"), self.curve(RETAIN, name, "score")
                plt.plot(x, y, label=name, markersize=13 if name == "retrain" else 6, **self.styles[name])
                if name == "mimu":
                    below = {"xytext": (6, -11), "textcoords": "offset points", "fontsize": 8}
                    for end in (0, -1):
                        plt.annotate(f"kappa {self.kappas[end]}", (x[end], y[end]), **below)
            self._mark_auto((FORGET, "mimu", "score"), (RETAIN, "mimu", "score"))

    def write_summary(self, more: Sequence[str] = ()) -> None:
        """Writes `summary.md`: the numbers of the figures, more sections, the mask efficacy, and the single digits."""
        several, kappa = len(self.digits) > 1, self.headline_kappa()
        sections = [f"# {self.title()}", f"Means over digits: {len(self.digits)}; ± over seeds: {len(self.seeds)}."]
        for each in dict.fromkeys((kappa, self.best_kappa())):
            sections += [f"## Every method, kappa = {each}", self.about(each), self.methods_table(each)]
            if len(self.layers) > 1:
                sections += ["Where the zeroed weights are:", self.layers_table(each)]
            if several:
                sections += ["The worst digit of any seed:", self.table(self.methods, WORST, each)]
        sections += [*more, f"## Mask efficacy, K = {self.experiments[0]['top_k']}"]
        sections += ["Scores on the forget set when only K weights of the masked layers are kept."]
        sections += [self.efficacy_table(kappa)]
        if self.kappas:
            sections += ["## Every kappa", self.kappas_table()]
        for digit in self.digits if several else ():
            sections += [f"## Digit {digit}, kappa = {kappa}", self.about(kappa, [digit])]
            sections += [self.methods_table(kappa, [digit])]
        write_text(self.folder / "summary.md", "\n\n".join(sections) + "\n")

    def title(self) -> str:
        """What was forgotten, and what it is scored on."""
        held_out = self.experiments[0]["config"]["held_out"]
        split = f"{held_out} held-out training samples" if held_out else "the test split"
        return f"Forgetting {', '.join(map(str, self.digits))}, scored on {split}"

    def closing_table(self) -> str:
        """What a run says last: what was forgotten, and forget and retain score of every method."""
        kappa = self.headline_kappa()
        return f"{self.title()}. {self.about(kappa)}\n\n{self.table(self.methods, METRICS[:2], kappa)}"

    def about(self, kappa: Kappa, digits: Digits = None) -> str:
        """How this kappa came about, how much of the classifier it zeroes, and which methods did not get there."""
        zeroed = self.value("kappa", kappa=kappa, digits=digits).mean
        masked, everything = (self.experiments[0][key] for key in ("num_graph_vertices", "num_weights"))
        share = f"{zeroed:.0f} weights, {100 * zeroed / masked:.2g} % of the masked ones"
        share += f" and {100 * zeroed / everything:.2g} % of all" if masked < everything else ""
        if kappa != "auto":
            return f"Of the fixed kappas, {kappa} is the one that is best on training samples: {share}."
        requests = [e for (_, digit), e in self.found["auto"].items() if digit in (digits or self.digits)]
        gave_up = Counter(name for e in requests for name, did in e.get("gave_up", {}).items() if did)
        counts = ", ".join(f"{name} on {count} of {len(requests)} requests" for name, count in gave_up.items())
        chosen = f"kappa is chosen for each request on the training split: {share} on average."
        return f"{chosen} Gave up before the class was forgotten: {counts}." if counts else chosen

    def cells(self, columns: Iterable[Column], method: str, kappa: Kappa, digits: Digits = None) -> list[str]:
        """A method's row of a table, over the given digits."""
        return [f"{self.figure(column, method, kappa, digits):{column.spec}}" for column in columns]

    def table(self, methods: Iterable[str], columns: Sequence[Column], kappa: Kappa, digits: Digits = None) -> str:
        """A row for every method, a column for each figure, over the given digits."""
        rows = [[name, *self.cells(columns, name, kappa, digits)] for name in methods]
        return markdown_table(["method", *(column.name for column in columns)], rows)

    def methods_table(self, kappa: Kappa, digits: Digits = None) -> str:
        """All metrics of every method at one kappa, over the given digits."""
        columns = (FORGET_SCORE, RETAIN_SCORE, RETAIN_GAP, PROBABILITY, FORGET_LOSS, RETAIN_LOSS, ZEROED, SECONDS)
        return self.table(self.methods, columns, kappa, digits)

    def layers_table(self, kappa: Kappa) -> str:
        """How many weights every mask zeroes in each layer, the output row of the forget class apart."""
        columns = [Column(("zeroed_by_layer", layer), layer, ".1f") for layer in self.layers]
        masks = [name for name, counts in self.experiments[0]["zeroed_by_layer"].items() if counts]
        return self.table(masks, columns, kappa)

    def efficacy_table(self, kappa: Kappa) -> str:
        """Scores of everything that can say which weights a class needs, where only those are kept."""
        metrics = (FORGET_SCORE, PROBABILITY, FORGET_LOSS)
        columns = [replace(each, keys=("mask_efficacy_metrics", each.keys[1]), spec=".3f") for each in metrics]
        return self.table(self.experiments[0]["mask_efficacy_metrics"], columns, kappa)

    def kappas_table(self) -> str:
        """The five metrics of every method at every kappa."""
        columns, kappas = [replace(column, spec=".3f") for column in METRICS], (*self.kappas, *["auto"] * self.has_auto)
        rows = [[name, kappa, *self.cells(columns, name, kappa)] for name in self.methods for kappa in kappas]
        return markdown_table(["method", "kappa", *(column.name for column in columns)], rows)

    def _plot_methods(self, x: Sequence[int], evaluation: str, metric: str) -> None:
        plt.xscale("log")
        plt.xticks(x, map(str, x))
        plt.minorticks_off()
        for name in self.methods:
            plt.plot(x, self.curve(evaluation, name, metric), label=name, markersize=5, **self.styles[name])
        self._mark_auto(("kappa",), (evaluation, "mimu", metric))

    def _mark_auto(self, *keys: Sequence[str]) -> None:
        """A ring where mimu stands with the kappa that is chosen for each request; keys: in the JSON, of x and of y."""
        if self.has_auto and "mimu" in self.methods:
            x, y = (self.value(*each, kappa="auto").mean for each in keys)
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
