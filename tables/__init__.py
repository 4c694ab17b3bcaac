"""The reports of a run, drawn from the JSON of its experiments alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from shutil import rmtree

import matplotlib.pyplot as plt

from experiment.files import slug
from mimu.files import write_text
from reporter import Reporter, ReporterConfig, save_figure
from tables.comparison import audit_sections, compare, draw_audits
from tables.figures import Row, draw_accuracies

# The reports of any run, but for those in `variants/` and the plots of `draw_*` methods that others add.
NAMES = (
    "loss_forget_set.png", "score_forget_set.png", "loss_retain_set.png", "score_retain_set.png", "summary.png",
    "probability_on_forget_class.png", "audits.png", "trade_off.png", "variants.png", "summary.md", "variants.md",
)  # fmt: skip
# By variant ("" if there are none): the settings of figures, and the JSON of the experiments.
Results = Mapping[str, tuple[ReporterConfig, Sequence[Path]]]


def report(results: Results, folder: Path) -> list[str]:
    """Draw and write the reports of a run in the place of earlier ones, which had variants or audits, maybe.

    Figures that compare variants have the settings of the first variant.

    Returns:
        The tables that the run prints at its end.
    """
    plt.switch_backend("Agg")
    rmtree(folder / "variants", ignore_errors=True)
    for path in map(folder.joinpath, NAMES):
        path.unlink(missing_ok=True)
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
    write_text(folder / "variants.md", "\n\n".join(["# Variants", *tables]) + "\n")
    save_figure(figure, folder / "variants.png", next(iter(results.values()))[0])
    return tables
