"""Every method beside the classifier that was retrained without the class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from reporter import METRICS, SECONDS, Column, Reporter, markdown_table, save_figure
from tables.pictures import INDEX, Row, draw_panels, symmetric_log

DIVERGENCES = (
    Column(("audit_metrics", "js_forget"), "divergence on the forget set, bits", ".3f"),
    Column(("audit_metrics", "js_retain"), "divergence on the retain set, bits", ".4f"),
)
GAPS = tuple(replace(of, name=of.name.replace("%", "points"), spec=f"+{of.spec}", is_gap=True) for of in METRICS)
RELEARN_STEPS = Column(("audit_metrics", "relearn_steps"), "relearn time, steps", ".1f")
LEFT_BEHIND = (
    Column(("audit_metrics", "loss_attack"), "loss attack, area under the curve", ".3f"),
    Column(("audit_metrics", "entropy_attack"), "entropy attack, % members", ".1f"),
    INDEX,
    Column(("audit_metrics", "probe_recall", "linear"), "probe, recall of the forget class, %", ".1f"),
    RELEARN_STEPS,
)
COST = (SECONDS, Column(("audit_metrics", "weights_changed"), "weights changed", ".0f"))
ABOUT = {"does": "what it does", "touches": "what it may change", "needs": "data it needs", "paper": "paper"}


def by_distance(reporter: Reporter) -> list[str]:
    """The methods in the order of their distance to the retrained classifier: the mean of both `DIVERGENCES`."""

    def distance(method: str) -> float:
        return np.nan_to_num(sum(reporter.mean(column, method) for column in DIVERGENCES) / 2, nan=np.inf)

    return sorted(reporter.experiments[0]["methods"], key=distance)  # without models that are scored by hand


def audit_sections(reporter: Reporter) -> list[str]:
    """The sections of the summary on every method beside the classifier retrained without the class."""
    gcn = replace(SECONDS, spec=".0f").text(reporter.figures(SECONDS, "gcn"))
    methods = reporter.experiments[0]["methods"]
    about = [[name, *map(methods[name].get, ABOUT)] for name in by_distance(reporter)]
    return [
        "## Distance to retraining",
        "Jensen-Shannon divergence of the predictions from the retrained classifier's (0: the same, 1: at most), "
        "and the five metrics less those of the retrained classifier. Sorted by the mean of the two divergences; "
        f"± standard deviation over the {'seeds' if len(reporter.seeds) > 1 else 'classes'}.",
        audit_table(reporter, DIVERGENCES + GAPS),
        "## Audits",
        "Loss attack: 0.5 tells nothing. IDI: what the best probe finds, 0 as after retraining, 1 as in the original; "
        "– where no more is to forget than other retrained classifiers differ by. Relearn time: '>' where a class was "
        "not back by the last step; – where it has no logit to learn with.",
        audit_table(reporter, LEFT_BEHIND),
        "## Cost",
        f"Training the masking GCN, once for all requests, takes {gcn} s, which is not in mimu's seconds.",
        audit_table(reporter, COST),
        "## The methods",
        markdown_table(["method", *ABOUT.values()], about, texts=1 + len(ABOUT)),
    ]


def audit_table(reporter: Reporter, columns: Sequence[Column]) -> str:
    """A row for every method, a column for each figure; marked where a class did not come back within the steps."""
    rows = []
    for method in by_distance(reporter):
        row = [column.text(reporter.spread(column, method)) for column in columns]
        came_back = reporter.numbers(Column(("audit_metrics", "came_back")), method)
        if columns[-1] is RELEARN_STEPS and row[-1] != "–" and not np.all(came_back):
            row[-1] = f"> {row[-1]}"
        rows.append([method, *row])
    return markdown_table(["method", *(column.name for column in columns)], rows)


def draw_audits(reporter: Reporter) -> None:
    """Draws `audits.png`: a panel for every audit, with a grey line where the retrained classifier is."""
    columns = (*DIVERGENCES, *LEFT_BEHIND, SECONDS)
    figure, axes = draw_panels([Row(name, reporter, name) for name in by_distance(reporter)], columns)
    for panel, column in zip(axes, columns):
        panel.axvline(reporter.mean(column, "retrain"), color="0.5", linewidth=0.8)
    symmetric_log(axes[1], linear=0.01)
    axes[-1].set(xscale="log", xlabel=f"{SECONDS.name} (log scale)")
    save_figure(figure, reporter.folder / "audits.png", reporter.config)
