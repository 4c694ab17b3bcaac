"""Tables of every method beside the classifier that was retrained without the class, and of variants side by side."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from reporter import DIVERGENCE, FORGET_SCORE, METRICS, RETAIN_GAP, SECONDS, WORST, Column, Experiments, markdown_table
from tables.figures import Row, draw_accuracies, draw_panels, symmetric_log

DIVERGENCES = DIVERGENCE, Column(("audit_metrics", "js_retain"), "divergence on the retain set, bits", ".4f")
GAPS = [replace(each, name=each.name.replace("%", "points"), spec=f"+{each.spec}", is_gap=True) for each in METRICS]
INDEX = Column(("audit_metrics", "usable_bits", "representation"), "IDI", "+.2f", is_gap=True, reduction="index")
PROBE = Column(("audit_metrics", "probe_recall", "linear"), "probe, recall of the forget class, %", ".1f")
RELEARN_STEPS = Column(("audit_metrics", "relearn_steps"), "relearn time, steps", ".1f")
CAME_BACK = Column(("audit_metrics", "came_back"))
PLACED = ("js_forget", "js_retain", "relearn_steps", "weights_changed")  # audits whose column stands above
ABOUT = {"does": "what it does", "touches": "what it may change", "needs": "data it needs", "paper": "paper"}
WORST_FORGET, WORST_GAP = (replace(column, name="worst") for column in WORST)
SHARE = Column(("num_zeroed",), "weights zeroed, %", percent_of="num_graph_vertices")
COLUMNS = (FORGET_SCORE, WORST_FORGET, RETAIN_GAP, WORST_GAP, DIVERGENCE, SHARE, SECONDS)
PROBE_GAP = replace(PROBE, name="probe recall, gap to retraining, points", spec="+.1f", is_gap=True)


def audit_columns(experiments: Experiments) -> tuple[Column, ...]:
    """Return the columns of the audits, first all that the JSON names and that have no place of their own."""
    audits = {name: audit for name, audit in experiments.first["audits"].items() if name not in PLACED}
    further = [Column(("audit_metrics", name), audit["title"], audit["spec"]) for name, audit in audits.items()]
    return *further, INDEX, PROBE, RELEARN_STEPS


def by_distance(experiments: Experiments) -> list[str]:
    """Return the audited methods, sorted by the mean of their `DIVERGENCES` from the retrained classifier."""
    methods = list(experiments.first["methods"])  # without models that were evaluated by hand
    distances = [sum(experiments.mean(column, method) for column in DIVERGENCES) for method in methods]
    return [methods[index] for index in np.argsort(distances, kind="stable")]  # nan comes last


def audit_sections(experiments: Experiments) -> list[str]:
    """Return the sections of the summary that compare every method with the retrained classifier."""
    gcn = replace(SECONDS, spec=".0f").text(experiments.by_seed(SECONDS, "gcn"))
    about = [[name, *map(experiments.first["methods"][name].get, ABOUT)] for name in by_distance(experiments)]
    return [
        "## Distance to retraining",
        "The Jensen-Shannon divergence of a method's predictions from the retrained classifier's (0: the same, 1: the "
        "largest), and the five metrics minus those of the retrained classifier. Methods are sorted by the mean of the "
        f"two divergences; ± is the standard deviation over {'seeds' if len(experiments.seeds) > 1 else 'classes'}.",
        audit_table(experiments, [*DIVERGENCES, *GAPS]),
        "## Audits",
        "A loss attack of 0.5 learns nothing. IDI is what the best probe finds: 0 as after retraining, 1 as in the "
        "original, – if the original has no more to forget than the difference between two retrained classifiers. "
        "Relearn time: > if the class had not come back by the last step, – if it has no logit to learn with.",
        audit_table(experiments, audit_columns(experiments)),
        "## Cost",
        f"Training the masking GCN takes {gcn} s, once for all requests, which the seconds of mimu do not include.",
        audit_table(experiments, (SECONDS, Column(("audit_metrics", "weights_changed"), "weights changed", ".0f"))),
        "## The methods",
        markdown_table(["method", *ABOUT.values()], about, texts=1 + len(ABOUT)),
    ]


def audit_table(experiments: Experiments, columns: Sequence[Column]) -> str:
    """Return a table with a row for every method; relearn times are marked if the class did not come back."""
    rows = []
    for method in by_distance(experiments):
        cells = [column.text(experiments.spread(column, method)) for column in columns]
        if columns[-1] is RELEARN_STEPS and cells[-1] != "–" and not np.all(experiments.numbers(CAME_BACK, method)):
            cells[-1] = f"> {cells[-1]}"
        rows.append([method, *cells])
    return markdown_table(["method", *(column.name for column in columns)], rows)


def draw_audits(experiments: Experiments) -> Figure:
    """Draw a panel for every audit."""
    columns = (*DIVERGENCES, *audit_columns(experiments), SECONDS)
    figure, panels = draw_panels([Row(name, experiments, name) for name in by_distance(experiments)], columns)
    symmetric_log(panels[1], linear=0.01)
    panels[-1].set(xscale="log", xlabel=f"{SECONDS.name} (log scale)")
    return figure


def compare(variants: Mapping[str, Experiments]) -> tuple[list[str], Figure]:
    """Return tables of all methods of all variants, and a figure of their accuracies.

    A row has the names of a variant and a method, that of mimu the name of the variant alone.
    """
    share_retrained(variants.values())
    rows = []
    for variant, experiments in variants.items():
        for method in experiments.methods:
            rows.append(Row(variant if method == "mimu" else f"{variant}: {method}", experiments, method))
    tables = [table([row for row in rows if row.method != "retrain"], COLUMNS)]
    if columns := layer_columns(variants.values()):
        tables.append(table(rows, columns))
    return tables, draw_accuracies([row for row in rows if row.method not in ("original", "retrain")])


def share_retrained(variants: Iterable[Experiments]) -> None:
    """Let variants of the same original classifier share the retrained ones, preferably those that were audited."""
    retrained: dict[str, dict[tuple[int, int], Any]] = {}
    for experiments in sorted(variants, key=lambda each: each.is_audited):
        config = experiments.first["config"]
        classifier = json.dumps([config["dataset"], config["held_out"], config["classifier"]])
        retrained.setdefault(classifier, {}).update(experiments.retrained)
        experiments.retrained = retrained[classifier]


def layer_columns(variants: Iterable[Experiments]) -> list[Column]:
    """Return columns of what probes find in each layer of any variant, of prototypes, and of relearning from few."""
    audits = [audit for each in variants for audit in each.first["audit_metrics"].values()]
    layers = dict.fromkeys(chain.from_iterable(audit.get("usable_bits") or () for audit in audits))
    counts = dict.fromkeys(chain.from_iterable(audit.get("relearn_from") or () for audit in audits))

    def column(base: Column, audit: str, key: str, name: str) -> Column:
        return replace(base, keys=("audit_metrics", audit, key), name=name.replace("hidden_", "hidden layer "))

    columns = [column(INDEX, "usable_bits", each, f"IDI, {each}") for each in layers] + [PROBE_GAP] * bool(layers)
    columns += [column(PROBE_GAP, "prototype_recall", each, f"prototype, {each} a class") for each in counts]
    return columns + [column(Column((), spec=".0f"), "relearn_from", each, f"steps, {each} a class") for each in counts]


def table(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """Return a table with a column for each of `columns` and a line for every row that has any number."""
    lines = [[row.name, *row.experiments.cells(columns, row.method)] for row in rows]
    numbered = [line for line in lines if set(line[1:]) != {"–"}]
    return markdown_table(["variant", *(column.name for column in columns)], numbered)
