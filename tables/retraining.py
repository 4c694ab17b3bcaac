"""Every method beside the classifier that was retrained without the class."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean

from mimu.reporter import FORGET_SCORE, METRICS, RETAIN_SCORE, SECONDS, Column, Reporter, markdown_table, save_figure
from mimu.tables.pictures import Row, draw_rows, symmetric_log

REFERENCES = ("original", "retrain", "retrain_again")  # what an unlearned classifier is measured against
FORGOTTEN = 1.0  # percent: a forget score above it is worth a word
LOST = 2.0  # points of the retain score below the original's that are worth a word

DIVERGENCES = (
    Column(("audit_metrics", "js_forget"), "divergence on the forget set, bits", ".3f"),
    Column(("audit_metrics", "js_retain"), "divergence on the retain set, bits", ".4f"),
)
GAPS = tuple(replace(of, name=of.name.replace("%", "points"), spec=f"+{of.spec}", is_gap=True) for of in METRICS)
LEFT_BEHIND = (
    Column(("audit_metrics", "loss_attack"), "loss attack, area under the curve", ".3f"),
    Column(("audit_metrics", "entropy_attack"), "entropy attack, % members", ".1f"),
    Column(("audit_metrics", "probe_recall", "linear"), "probe, recall of the forget class, %", ".1f"),
    Column(("audit_metrics", "probe_retain"), "probe, score on the retain set, %", ".1f"),
    Column(("audit_metrics", "relearn_steps"), "relearn time, steps", ".1f"),
)
COST = (SECONDS, Column(("audit_metrics", "weights_changed"), "weights changed", ".0f"))
ABOUT = {"does": "what it does", "touches": "what it may change", "needs": "data it needs", "paper": "paper"}


class AuditReport:
    """Every method beside the classifier retrained without the class, in the order of their distance to it.

    The distance is the Jensen-Shannon divergence of the predictions, mean of the forget set's and the retain set's.
    """

    def __init__(self, reporter: Reporter) -> None:
        self.reporter = reporter
        self.about = reporter.experiments[0]["methods"]  # without models that are scored by hand
        forget, retain = DIVERGENCES
        distances = {name: fmean([reporter.mean(forget, name), reporter.mean(retain, name)]) for name in self.about}
        self.methods = sorted(distances, key=lambda name: (math.isnan(distances[name]), distances[name]))
        others = [name for name in self.methods if name not in REFERENCES]
        least = reporter.mean(RETAIN_SCORE, "original" if "original" in self.about else "retrain") - LOST
        self.leave = [name for name in others if not reporter.mean(FORGET_SCORE, name) <= FORGOTTEN]
        self.lose = [name for name in others if not reporter.mean(RETAIN_SCORE, name) >= least]

    def tables(self) -> list[str]:
        """The sections of the summary."""
        spread = "seeds" if len(self.reporter.seeds) > 1 else "classes"
        gcn = replace(SECONDS, spec=".0f").text(self.reporter.figures(SECONDS, "gcn"))
        about = [[name, *map(self.about[name].get, ABOUT)] for name in self.methods]
        return [
            "## Distance to retraining",
            "Jensen-Shannon divergence of the predictions from the retrained classifier's (0: the same, 1: at most), "
            "and the five metrics less those of the retrained classifier. Sorted by the mean of the two divergences; "
            f"± standard deviation over the {spread}.",
            self.table(DIVERGENCES + GAPS),
            f"Forget score above {FORGOTTEN:g} %: {', '.join(self.leave) or 'none'}. Retain score more than {LOST:g} "
            f"points below the original's: {', '.join(self.lose) or 'none'}.",
            "## Audits",
            "Loss attack: 0.5 tells nothing. Relearn time: '>' where a class was not back by the last step; – where it "
            "has no logit to learn with.",
            self.table(LEFT_BEHIND),
            "## Cost",
            f"Training the masking GCN, once for all requests, takes {gcn} s, which is not in mimu's seconds.",
            self.table(COST),
            "## The methods",
            markdown_table(["method", *ABOUT.values()], about, texts=1 + len(ABOUT)),
        ]

    def table(self, columns: Sequence[Column]) -> str:
        """A row for every method, a column for each figure."""
        rows = [[method, *map(partial(self.text, method), columns)] for method in self.methods]
        return markdown_table(["method", *(column.name for column in columns)], rows)

    def text(self, method: str, column: Column) -> str:
        """A method's figure, marked where the class did not always come back within the steps of relearning."""
        text = column.text(self.reporter.spread(column, method))
        came_back = all(map(all, self.reporter.numbers(Column(("audit_metrics", "came_back")), method)))
        return text if came_back or text == "–" or column is not LEFT_BEHIND[-1] else f"> {text}"

    def draw(self) -> None:
        """Draws `audits.png`: a panel for every audit, with a grey line where the retrained classifier is."""
        columns = (*DIVERGENCES, *LEFT_BEHIND, SECONDS)
        figure, axes = draw_rows([Row(name, self.reporter, name) for name in self.methods], columns)
        for panel, column in zip(axes, columns):
            panel.axvline(self.reporter.mean(column, "retrain"), color="0.5", linewidth=0.8)
        symmetric_log(axes[1], linear=0.01)
        axes[-1].set_xscale("log")
        save_figure(figure, self.reporter.folder / "audits.png", self.reporter.config)
