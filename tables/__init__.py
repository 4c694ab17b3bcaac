"""The reports of a run, drawn from the JSON of its experiments alone."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import matplotlib.pyplot as plt

from experiment.files import slug
from mimu.files import write_text
from reporter import WRITTEN, Reporter, ReporterConfig, listed, save_figure
from tables.comparison import audit_sections, compare, draw_audits
from tables.figures import Row, draw_accuracies

# By variant ("" if there are none): the settings of figures, and the JSON of the experiments.
Results = Mapping[str, tuple[ReporterConfig, Sequence[Path]]]


def report(results: Results, folder: Path) -> list[str]:
    """Draw and write the reports of a run in the place of earlier ones.

    Figures that compare variants have the settings of the first variant.

    Returns:
        The tables that the run prints at its end.
    """
    plt.switch_backend("Agg")
    remove_reports(folder)
    variants = {}
    for variant, (config, metrics) in results.items():
        place = folder / "variants" / slug(variant) if variant else folder
        reporter, sections = Reporter(config, metrics, place), []
        variants[variant] = experiments = reporter.experiments
        if experiments.is_audited:
            save_figure(draw_audits(experiments), place / "audits.png", config)
            sections = audit_sections(experiments)
        if variant:
            reporter.write_summary(sections)
            continue
        reporter.plot(sections)
        if experiments.retrained:
            rows = [Row(name, experiments, name) for name in experiments.methods]
            save_figure(draw_accuracies(rows), folder / "trade_off.png", config)
        return [reporter.closing_table()]
    tables, figure = compare(variants)
    write_text(listed(folder / "variants.md"), "\n\n".join(["# Variants", *tables]) + "\n")
    save_figure(figure, folder / "variants.png", next(iter(results.values()))[0])
    return tables


def remove_reports(folder: Path) -> None:
    """Remove what the lists in a folder of reports name, and folders that are empty then, but no symbolic links."""
    for listing in (folder / WRITTEN, *folder.glob(f"variants/*/{WRITTEN}")):
        place = listing.parent
        if listing.is_file() and not place.is_symlink():
            for path in [place / name for name in listing.read_text().splitlines()]:
                if path.parent == place and path.is_file() and not path.is_symlink():
                    path.unlink()
            listing.unlink()
            for emptied in (place, folder / "variants"):
                with suppress(OSError):  # it holds something else
                    emptied.rmdir()
