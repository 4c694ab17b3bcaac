"""The reports of a run, drawn from the JSON of its experiments alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import chain, product
from pathlib import Path

import matplotlib.pyplot as plt

from experiment.files import slug
from reporter import FORMATS, KEPT, Reporter, ReporterConfig, title
from tables.experiment import draw_metrics
from tables.pictures import Row, draw_masks, draw_scores
from tables.retraining import audit_sections, draw_audits
from tables.variants import compare

FIGURES = (
    "loss_forget_set", "loss_retain_set", "score_forget_set", "score_retain_set", "probability_on_forget_class",
    "summary", "mask_efficacy", "trade_off", "masks", "audits", "variants", "frontier",
)  # fmt: skip
REPORTS = ("summary.md", "variants.md", *map(".".join, product(FIGURES, FORMATS)))
# By variants ("" without them) and top_k: the settings of figures, and the JSON of experiments. Figures that compare
# variants have the settings of the first.
Results = Mapping[tuple[str, int], tuple[ReporterConfig, Sequence[Path]]]


def report(results: Results, folder: Path) -> list[str]:
    """Draws and writes the reports, in the place of those that are there. Returns the tables that a run ends with."""
    plt.switch_backend("Agg")
    remove_reports(folder)
    top_ks = Counter(variant for variant, _ in results)
    reporters = {}
    for (variant, top_k), (config, paths) in results.items():
        parts = {variant: f"variants/{slug(variant)}"} if variant else {}
        if top_ks[variant] > 1:
            parts[f"top-K {top_k}"] = f"top_k_{top_k}"
        reporters[", ".join(parts)] = Reporter(config, paths, folder / "/".join(parts.values()))
    has_variants = any(top_ks)
    for reporter in reporters.values():
        draw_alone(reporter, with_curves=not has_variants)
    if has_variants:
        return compare(reporters, folder)
    return [reporter.closing_table() for reporter in reporters.values()]


def draw_alone(reporter: Reporter, with_curves: bool) -> None:
    """The summary of one variant and top_k and its audits, and where no variants stand beside it all other pictures."""
    sections = []
    if reporter.has_audits and reporter.retrained:
        draw_audits(reporter)
        sections = audit_sections(reporter)
    if not with_curves:
        return reporter.write_summary(sections)
    reporter.plot(sections)
    of_kept = f"{title([reporter])}, K = {reporter.experiments[0]['top_k']} weights kept (original: all)"
    draw_metrics(reporter, "mask_efficacy.png", of_kept, KEPT)
    if reporter.retrained:
        rows = [Row(name, reporter, name) for name in reporter.methods]
        draw_scores(rows, reporter.folder / "trade_off.png", reporter.config)
    if len(reporter.digits) > 1 and len(reporter.experiments[0]["mask_shapes"]) == 1:
        draw_masks(reporter)


def remove_reports(folder: Path) -> None:
    """Removes the reports by their known names, and folders of theirs that are empty then; nothing else."""
    inner = map(folder.glob, ("top_k_*", "variants/*", "variants/*/top_k_*"))
    for place, name in product([folder, *chain.from_iterable(inner)], REPORTS):
        if (place / name).is_file():
            (place / name).unlink()
            with suppress(OSError):  # something is left there
                place.rmdir()
