"""Variants of a config side by side."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from reporter import (
    FORGET_SCORE,
    RETAIN_GAP,
    SECONDS,
    WORST,
    Column,
    Experiments,
    Reporter,
    markdown_table,
    save_figure,
    save_text,
)
from tables.panels import Row, draw_accuracies
from tables.retraining import INDEX, PROBE

WORST_FORGET, WORST_GAP = (replace(column, name="worst") for column in WORST)
SHARE = Column(("num_zeroed",), "weights zeroed, %", percent_of="num_graph_vertices")
COLUMNS = (FORGET_SCORE, WORST_FORGET, RETAIN_GAP, WORST_GAP, SHARE, SECONDS)
PROBE_GAP = replace(PROBE, name="probe recall against retrain, points", spec="+.1f", is_gap=True)


def compare(reporters: Mapping[str, Reporter], folder: Path) -> list[str]:
    """Write and draw variants side by side, and return their tables.

    A row is a method of a variant; that of mimu has the name of the variant alone.
    """
    experiments = [reporter.experiments for reporter in reporters.values()]
    share_retrained(experiments)
    rows = []
    for variant, reporter in reporters.items():
        for method in reporter.experiments.methods:
            rows.append(Row(variant if method == "mimu" else f"{variant}: {method}", reporter.experiments, method))
    tables = [table([row for row in rows if row.method != "retrain"], COLUMNS)]
    if columns := audit_columns(experiments):
        tables.append(table(rows, columns))
    save_text("\n\n".join(["# Variants", *tables]) + "\n", folder / "variants.md")
    unlearned = [row for row in rows if row.method not in ("original", "retrain")]
    config = next(iter(reporters.values())).config
    save_figure(draw_accuracies(unlearned), folder / "variants.png", config)
    return tables


def share_retrained(variants: Iterable[Experiments]) -> None:
    """Let variants of the same original classifier share the retrained ones, preferably those that were audited."""
    retrained: dict[str, dict[tuple[int, int], Any]] = {}
    for experiments in sorted(variants, key=lambda each: each.is_audited):
        config = experiments.first["config"]
        classifier = json.dumps([config["dataset"], config["held_out"], config["classifier"]])
        retrained.setdefault(classifier, {}).update(experiments.retrained)
        experiments.retrained = retrained[classifier]


def audit_columns(variants: Iterable[Experiments]) -> list[Column]:
    """Return columns of what probes find in each layer of any variant, of prototypes, and of relearning from few."""
    layers: dict[str, None] = {}
    counts: dict[str, None] = {}
    for experiments in variants:
        for audits in experiments.first["audit_metrics"].values():
            layers |= dict.fromkeys(audits.get("usable_bits") or ())
            counts |= dict.fromkeys(audits.get("relearn_from") or ())
    columns = []
    for layer in layers:
        name = f"IDI, {layer.replace('hidden_', 'hidden layer ')}"
        columns.append(replace(INDEX, keys=("audit_metrics", "usable_bits", layer), name=name))
    if layers:
        columns.append(PROBE_GAP)
    for count in counts:
        keys = ("audit_metrics", "prototype_recall", count)
        columns.append(replace(PROBE_GAP, keys=keys, name=f"prototype, {count} a class"))
    for count in counts:
        columns.append(Column(("audit_metrics", "relearn_from", count), f"steps, {count} a class", ".0f"))
    return columns


def table(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """Return a table with a column for each of `columns` and a line for every row that has any number."""
    lines = [[row.name, *row.experiments.cells(columns, row.method)] for row in rows]
    numbered = [line for line in lines if set(line[1:]) != {"–"}]
    return markdown_table(["variant", *(column.name for column in columns)], numbered)
