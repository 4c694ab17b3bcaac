"""Every method beside the classifier that was retrained without the class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from matplotlib.figure import Figure

from reporter import METRICS, SECONDS, Column, Experiments, markdown_table
from tables.panels import Row, draw_panels, symmetric_log

DIVERGENCES = (
    Column(("audit_metrics", "js_forget"), "divergence on the forget set, bits", ".3f"),
    Column(("audit_metrics", "js_retain"), "divergence on the retain set, bits", ".4f"),
)
GAPS = tuple(
    replace(each, name=each.name.replace("%", "points"), spec=f"+{each.spec}", is_gap=True) for each in METRICS
)
INDEX = Column(("audit_metrics", "usable_bits", "representation"), "IDI", "+.2f", is_gap=True, reduction="index")
PROBE = Column(("audit_metrics", "probe_recall", "linear"), "probe, recall of the forget class, %", ".1f")
RELEARN_STEPS = Column(("audit_metrics", "relearn_steps"), "relearn time, steps", ".1f")
CAME_BACK = Column(("audit_metrics", "came_back"))
COST = (SECONDS, Column(("audit_metrics", "weights_changed"), "weights changed", ".0f"))
PLACED = ("js_forget", "js_retain", "relearn_steps", "weights_changed")  # audits whose column stands above
ABOUT = {"does": "what it does", "touches": "what it may change", "needs": "data it needs", "paper": "paper"}


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
    methods = experiments.first["methods"]
    about = [[name, *map(methods[name].get, ABOUT)] for name in by_distance(experiments)]
    return [
        "## Distance to retraining",
        "The Jensen-Shannon divergence of a method's predictions from the retrained classifier's (0: the same, 1: the "
        "largest), and the five metrics minus those of the retrained classifier. Methods are sorted by the mean of the "
        f"two divergences; ± is the standard deviation over {'seeds' if len(experiments.seeds) > 1 else 'classes'}.",
        audit_table(experiments, DIVERGENCES + GAPS),
        "## Audits",
        "A loss attack of 0.5 learns nothing. IDI is what the best probe finds: 0 as after retraining, 1 as in the "
        "original, – if the original has no more to forget than the difference between two retrained classifiers. "
        "Relearn time: > if the class had not come back by the last step, – if it has no logit to learn with.",
        audit_table(experiments, audit_columns(experiments)),
        "## Cost",
        f"Training the masking GCN takes {gcn} s, once for all requests, which the seconds of mimu do not include.",
        audit_table(experiments, COST),
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
