"""The reports of a run, drawn from the JSON of its experiments alone."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt

from mimu.reporter import FORMATS, Reporter, ReporterConfig
from mimu.runs.files import slug
from mimu.tables.pictures import draw_masks, draw_scores
from mimu.tables.retraining import AuditReport
from mimu.tables.variants import compare

CURVES = [f"{metric}_{part}_set" for metric in ("loss", "score") for part in ("forget", "retain")]
FIGURES = [*CURVES, "probability_on_forget_class", "summary", "trade_off", "masks", "audits", "variants", "frontier"]
REPORTS = ["summary.md", "variants.md", *(f"{name}.{suffix}" for name in FIGURES for suffix in FORMATS)]


@dataclass(frozen=True)
class Result:
    """Finished experiments: of a variant ("" without variants), with one top_k; the paths of their JSON."""

    variant: str
    top_k: int
    config: ReporterConfig
    paths: list[Path]


def report(results: Sequence[Result], folder: Path) -> list[str]:
    """Draws and writes the reports, in the place of those that are there. Returns the tables that a run ends with."""
    plt.switch_backend("Agg")
    remove_reports(folder)
    paths: dict[tuple[str, int], list[Path]] = {}
    for result in results:
        paths.setdefault((result.variant, result.top_k), []).extend(result.paths)
    reporters = {}
    for variant, top_k in paths:
        parts = {variant: f"variants/{slug(variant)}"} if variant else {}
        if sum(other == variant for other, _ in paths) > 1:
            parts[f"top-K {top_k}"] = f"top_k_{top_k}"
        place = folder.joinpath(*parts.values())
        reporters[", ".join(parts)] = Reporter(results[0].config, paths[variant, top_k], place)
    has_variants = any(result.variant for result in results)
    for reporter in reporters.values():
        draw_alone(reporter, with_curves=not has_variants)
    if not has_variants:
        return [reporter.closing_table() for reporter in reporters.values()]
    return compare(reporters, folder)


def draw_alone(reporter: Reporter, with_curves: bool) -> None:
    """The summary of one variant and top_k and its audits, and where no variants stand beside it all other pictures."""
    audits = AuditReport(reporter) if reporter.has_audits and reporter.retrained else None
    sections = audits.tables() if audits else []
    if audits:
        audits.draw()
    if not with_curves:
        return reporter.write_summary(sections)
    reporter.plot(sections)
    if reporter.retrained and (audits or not reporter.kappas):
        draw_scores([(name, reporter, name) for name in reporter.methods], reporter.folder / "trade_off.png")
    if len(reporter.digits) > 1 and len(reporter.experiments[0]["mask_shapes"]) == 1:
        draw_masks(reporter)


def remove_reports(folder: Path) -> None:
    """Removes the reports by their known names, and folders of theirs that are empty then; nothing else."""
    inner = [each for pattern in ("top_k_*", "variants/*", "variants/*/top_k_*") for each in folder.glob(pattern)]
    for path in [each / name for each in (folder, *inner) for name in REPORTS]:
        if path.is_file():
            path.unlink()
            with suppress(OSError):  # something is left there
                path.parent.rmdir()
