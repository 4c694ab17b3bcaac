"""Variants of a config side by side."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from matplotlib.figure import Figure

from reporter import FORGET_SCORE, RETAIN_GAP, SECONDS, WORST, Column, Experiments, markdown_table
from tables.panels import Row, draw_accuracies
from tables.retraining import INDEX, PROBE

WORST_FORGET, WORST_GAP = (replace(column, name="worst") for column in WORST)
SHARE = Column(("num_zeroed",), "weights zeroed, %", percent_of="num_graph_vertices")
COLUMNS = (FORGET_SCORE, WORST_FORGET, RETAIN_GAP, WORST_GAP, SHARE, SECONDS)
STEPS = Column((), spec=".0f")
PROBE_GAP = replace(PROBE, name="probe recall against retrain, points", spec="+.1f", is_gap=True)


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
    if columns := audit_columns(variants.values()):
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


def audit_columns(variants: Iterable[Experiments]) -> list[Column]:
    """Return columns of what probes find in each layer of any variant, of prototypes, and of relearning from few."""
    audits = [audit for each in variants for audit in each.first["audit_metrics"].values()]
    layers = dict.fromkeys(chain.from_iterable(audit.get("usable_bits") or () for audit in audits))
    counts = dict.fromkeys(chain.from_iterable(audit.get("relearn_from") or () for audit in audits))

    def column(base: Column, audit: str, key: str, name: str) -> Column:
        return replace(base, keys=("audit_metrics", audit, key), name=name.replace("hidden_", "hidden layer "))

    columns = [column(INDEX, "usable_bits", each, f"IDI, {each}") for each in layers] + [PROBE_GAP] * bool(layers)
    columns += [column(PROBE_GAP, "prototype_recall", each, f"prototype, {each} a class") for each in counts]
    return columns + [column(STEPS, "relearn_from", each, f"steps, {each} a class") for each in counts]


def table(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """Return a table with a column for each of `columns` and a line for every row that has any number."""
    lines = [[row.name, *row.experiments.cells(columns, row.method)] for row in rows]
    numbered = [line for line in lines if set(line[1:]) != {"–"}]
    return markdown_table(["variant", *(column.name for column in columns)], numbered)
