"""The reports of a run, drawn from the JSON of its experiments alone."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import matplotlib.pyplot as plt

from experiment.files import slug
from mimu.files import write_text
from reporter import WRITTEN, Reporter, ReporterConfig, listed, save_figure
from tables.comparison import audit_sections, compare, draw_audits
from tables.figures import Row, draw_accuracies

# By variant ("" if there are none) and top_k: the settings of figures, and the JSON of the experiments.
Results = Mapping[tuple[str, int], tuple[ReporterConfig, Sequence[Path]]]
SUBFOLDERS = re.compile(r"\.|top_k_\d+|variants/[^/]+(/top_k_\d+)?")  # of a folder of reports, and itself


def report(results: Results, folder: Path) -> list[str]:
    """Draw and write the reports of a run in the place of earlier ones.

    Figures that compare variants have the settings of the first variant.

    Returns:
        The tables that the run prints at its end.
    """
    plt.switch_backend("Agg")
    remove_reports(folder)
    top_ks = Counter(variant for variant, _ in results)
    reporters = {}
    for (variant, top_k), (config, metrics) in results.items():
        parts = {variant: f"variants/{slug(variant)}"} if variant else {}
        if top_ks[variant] > 1:
            parts[f"top-K {top_k}"] = f"top_k_{top_k}"
        reporters[", ".join(parts)] = Reporter(config, metrics, folder / "/".join(parts.values()))
    has_variants = any(top_ks)
    for reporter in reporters.values():
        write_alone(reporter, with_curves=not has_variants)
    if not has_variants:
        return [reporter.closing_table() for reporter in reporters.values()]
    tables, figure = compare({name: reporter.experiments for name, reporter in reporters.items()})
    write_text(listed(folder / "variants.md"), "\n\n".join(["# Variants", *tables]) + "\n")
    save_figure(figure, folder / "variants.png", next(iter(results.values()))[0])
    return tables


def write_alone(reporter: Reporter, with_curves: bool) -> None:
    """Write the summary of one variant and top_k and draw its audits, and if asked for, all other figures."""
    experiments, folder, config = reporter.experiments, reporter.folder, reporter.config
    sections = []
    if experiments.is_audited:
        save_figure(draw_audits(experiments), folder / "audits.png", config)
        sections = audit_sections(experiments)
    if not with_curves:
        return reporter.write_summary(sections)
    reporter.plot(sections)
    if experiments.retrained:
        rows = [Row(name, experiments, name) for name in experiments.methods]
        save_figure(draw_accuracies(rows), folder / "trade_off.png", config)


def remove_reports(folder: Path) -> None:
    """Remove what the lists in a folder of reports name, and folders that are empty then, but no symbolic links."""
    for listing in sorted(folder.rglob(WRITTEN), reverse=True):  # subfolders first, none through a symbolic link
        place = listing.parent
        if listing.is_symlink() or not SUBFOLDERS.fullmatch(place.relative_to(folder).as_posix()):
            continue
        for path in [place / name for name in listing.read_text().splitlines()]:
            if path.parent == place and path.is_file() and not path.is_symlink():
                path.unlink()
        listing.unlink()
        for emptied in (place, folder / "variants"):
            with suppress(OSError):  # it holds something else
                emptied.rmdir()
