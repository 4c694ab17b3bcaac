"""Variants of a config side by side."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from reporter import FORGET_SCORE, RETAIN_GAP, SECONDS, WORST, Column, Reporter, markdown_table, save_figure
from runs.files import write_text
from tables.pictures import Row, draw_frontier, draw_panels, symmetric_log


class Comparison:
    """Variants side by side, a row for every method of each; mimu's is called by the variant alone.

    The reference is the same classifier retrained without the class: one variant that has `retrain` among its methods
    is enough for all that share the classifier, whose reporters are told so.

    reporters: of every variant by its name; folder: where `variants.md`, `variants.png` and `frontier.png` go
    """

    def __init__(self, reporters: Mapping[str, Reporter], folder: Path) -> None:
        self.reporters = list(reporters.values())
        self.folder = folder
        self.rows: list[Row] = [
            (variant if method == "mimu" else f"{variant}: {method}", reporter, method)
            for variant, reporter in reporters.items()
            for method in reporter.methods
        ]
        retrained: dict[str, dict[tuple[int, int], Any]] = {}
        for reporter in sorted(self.reporters, key=lambda each: each.has_audits):  # the audited ones stay
            config = reporter.experiments[0]["config"]
            classifier = json.dumps([config["dataset"], config["held_out"], config["classifier"]])
            retrained.setdefault(classifier, {}).update(reporter.retrained)
            reporter.retrained = retrained[classifier]  # that of all who share it

    def tables(self) -> list[str]:
        """Forgetting, distance to retraining, size of the mask and time; and of audited variants what they leave."""
        worst_forget, worst_gap = (replace(column, name="worst") for column in WORST)
        share = Column(("num_zeroed",), "weights zeroed, %", ".2f", is_share=True)
        columns = (FORGET_SCORE, worst_forget, RETAIN_GAP, worst_gap, share, SECONDS)
        compared = table([row for row in self.rows if row[2] != "retrain"], columns)
        return [compared, table(self.rows, audits)] if (audits := self.audit_columns()) else [compared]

    def audit_columns(self) -> list[Column]:
        """What any variant's probes found above the retrained classifier's, points, and the steps of relearning."""
        found = [audits for each in self.reporters for audits in each.experiments[0]["audit_metrics"].values()]
        columns = {}
        for probe in (name for audits in found for name in audits["probe_recall"] or ()):
            name = re.sub(r"hidden_(\d+)", lambda layer: f"at layer {int(layer[1]) + 1}", probe).replace("_", " ")
            columns[probe] = Column(("audit_metrics", "probe_recall", probe), name, "+.1f", is_gap=True)
        for number in (number for audits in found for number in audits["relearn_from"] or ()):
            columns[number] = Column(("audit_metrics", "relearn_from", number), f"steps, {number} a class", ".0f")
        return list(columns.values())

    def plot(self) -> None:
        """Writes the tables, draws forget score and distance to retraining, and of audited variants the frontier."""
        write_text(self.folder / "variants.md", "\n\n".join(["# Variants", *self.tables()]) + "\n")
        rows = [row for row in self.rows if row[2] not in ("original", "retrain")]
        figure, axes = draw_panels(rows, (FORGET_SCORE, RETAIN_GAP), high=1)
        for panel, linear in zip(axes, (1.0, 0.5)):
            panel.axvline(0, color="0.5", linewidth=0.8)
            symmetric_log(panel, "x", linear)
        save_figure(figure, self.folder / "variants.png", self.reporters[0].config.dpi)
        if audited := [reporter for reporter in self.reporters if reporter.has_audits and reporter.retrained]:
            draw_frontier(audited, self.folder / "frontier.png")


def table(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """A column for each figure, a line for every row of which one is known."""
    lines = [[name, *reporter.cells(columns, method, reporter.headline_kappa())] for name, reporter, method in rows]
    known = [line for line in lines if set(line[1:]) != {"–"}]
    return markdown_table(["variant", *(column.name for column in columns)], known)
