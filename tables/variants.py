"""Variants of a config side by side."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mimu.files import write_text
from reporter import FORGET_SCORE, RETAIN_GAP, SECONDS, WORST, Column, Reporter, markdown_table
from tables.pictures import INDEX, PROBE, Row, draw_frontier, draw_scores

WORST_FORGET, WORST_GAP = (replace(column, name="worst") for column in WORST)
SHARE = Column(("num_zeroed",), "weights zeroed, %", is_share=True)
COLUMNS = (FORGET_SCORE, WORST_FORGET, RETAIN_GAP, WORST_GAP, SHARE, SECONDS)


def compare(reporters: Mapping[str, Reporter], folder: Path) -> list[str]:
    """Writes and draws variants side by side, the frontier of those that are audited too; returns their tables.

    A row is a method of a variant; mimu's is called by the variant alone. Figures have the settings of the first one.
    """
    share_retrained(reporters.values())
    rows = []
    for variant, reporter in reporters.items():
        for method in reporter.methods:
            rows.append(Row(variant if method == "mimu" else f"{variant}: {method}", reporter, method))
    tables = [table([row for row in rows if row.method != "retrain"], COLUMNS)]
    if left_behind := audits_of(reporters.values()):
        tables.append(table(rows, left_behind))
    write_text(folder / "variants.md", "\n\n".join(["# Variants", *tables]) + "\n")
    config = rows[0].reporter.config
    unlearned = [row for row in rows if row.method not in ("original", "retrain")]
    draw_scores(unlearned, folder / "variants.png", config)
    if audited := [each for each in reporters.values() if each.has_audits and each.retrained]:
        of_first = [each for each in audited if each.retrained is audited[0].retrained]  # the same classifier
        draw_frontier(of_first, folder / "frontier.png", config)
    return tables


def share_retrained(reporters: Iterable[Reporter]) -> None:
    """Tells every reporter of the classifiers that any variant with the same original retrained without the class."""
    retrained: dict[str, dict[tuple[int, int], Any]] = {}
    for reporter in sorted(reporters, key=lambda each: each.has_audits):  # the audited ones stay
        config = reporter.experiments[0]["config"]
        classifier = json.dumps([config["dataset"], config["held_out"], config["classifier"]])
        retrained.setdefault(classifier, {}).update(reporter.retrained)
        reporter.retrained = retrained[classifier]


def audits_of(reporters: Iterable[Reporter]) -> list[Column]:
    """What probes find in every layer of any variant, and prototypes, beside retraining, and steps of relearning."""
    layers: dict[str, None] = {}
    counts: dict[str, None] = {}
    for reporter in reporters:
        for audits in reporter.experiments[0]["audit_metrics"].values():
            layers |= dict.fromkeys(audits["usable_bits"] or ())
            counts |= dict.fromkeys(audits["relearn_from"] or ())

    def column(of: Column, audit: str, key: str, name: str) -> Column:
        return replace(of, keys=("audit_metrics", audit, key), name=name.replace("hidden_", "hidden layer "))

    columns = [column(INDEX, "usable_bits", each, f"IDI, {each}") for each in layers] + [PROBE] * bool(layers)
    columns += [column(PROBE, "prototype_recall", each, f"prototype, {each} a class") for each in counts]
    columns += [Column(("audit_metrics", "relearn_from", each), f"steps, {each} a class", ".0f") for each in counts]
    return columns


def table(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """A column for each figure, a line for every row of which one is known."""
    lines = [[row.name, *row.reporter.cells(columns, row.method)] for row in rows]
    known = [line for line in lines if set(line[1:]) != {"–"}]
    return markdown_table(["variant", *(column.name for column in columns)], known)
