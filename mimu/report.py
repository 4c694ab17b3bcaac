"""The report of an audit: a table as text, JSON, and a figure."""

import json
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from mimu.errors import named
from mimu.files import save

VERDICTS = (
    "not forgotten",
    "hidden",
    "partly erased",
    "as after retraining",
    "less than after retraining",
    "cannot be judged",
)
ROWS = {  # of a report's table: the titles and the formats of figures
    "forget_accuracy": ("forget accuracy, %", ".1f"),
    "retain_accuracy": ("retain accuracy, %", ".2f"),
    "most_lost": ("retained class that lost most, points", ".1f"),
    "divergence_forget": ("divergence from retraining, forget set, bits", ".3f"),
    "divergence_retain": ("divergence from retraining, retain set, bits", ".4f"),
    "loss_attack": ("loss attack, area under the curve", ".3f"),
    "idi": ("IDI", "+.2f"),
}


@dataclass(frozen=True)
class AuditReport:
    """What remains of classes in an unlearned model.

    Attributes:
        forget: the classes
        verdict: one of VERDICTS
        reason: the numbers that say so
        notes: what was not measured
        figures: by model: `original`, `hidden` (the original without the logits of the classes), `unlearned`,
            `retrained 1` and on. `probes` are by layer, whose input they read, and by probe: the recall of the classes,
            percent, `balanced_bits`, and how far these may be off. `relearning` is by way
    """

    forget: list[int]
    verdict: str
    reason: str
    notes: list[str]
    figures: dict[str, dict[str, Any]]

    def values(self, name: str) -> dict[str, str]:
        """The figures of a model as the table has them, by the title of their row."""
        figures = self.figures[name]
        values = {
            title: "-" if figures[key] is None else format(figures[key], spec) for key, (title, spec) in ROWS.items()
        }
        predicted = [f"{label}: {share:.0f}" for label, share in figures["predicted"].items() if share >= 0.5]
        values["predicted, class: % of samples"] = ", ".join(predicted[:3])
        for layer, probes in figures["probes"].items():
            for probe, found in probes.items():
                values[f"{probe} probe, {layer}: recall, %; bits"] = f"{found['recall']:.1f}; {found['bits']:.3f}"
        for way, relearned in figures["relearning"].items():
            steps = relearned["steps"]
            values[f"relearned, {way}: steps"] = (
                f"not in {len(relearned['scores']) - 1}" if steps is None else str(steps)
            )
        return values

    def __str__(self) -> str:
        columns = {name: self.values(name) for name in self.figures}
        titles = dict.fromkeys(chain(*columns.values()))
        table = [["", *columns]]
        table += [[title, *(values.get(title, "-") for values in columns.values())] for title in titles]
        widths = [max(map(len, cells)) for cells in zip(*table)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]
        about = [f"{named(self.forget).capitalize()}: {self.verdict}.", f"{self.reason}.", *self.notes, ""]
        return "\n".join(about + lines)

    def save(self, path: Path | str) -> None:
        """Writes the report as JSON; what could not be measured is null. Raises ArtifactError where this fails."""
        save(Path(path).with_suffix(".json"), json.loads(json.dumps(asdict(self)), parse_constant=lambda name: None))

    def plot(self, path: Path | str) -> None:
        """Draws what every model predicts for the classes, the probes by layer, and the relearning."""
        draw(self, Path(path))
