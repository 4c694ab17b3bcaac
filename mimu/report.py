"""The report of an audit: a table as text, JSON, and a figure."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from mimu.errors import named
from mimu.files import save, written_whole

OWN_PROBE = "original's"  # the probe that is trained on the original's features, and put onto those of another model
SHOWN_CLASSES = 8  # in a figure, at most
# Colours that colour-blind people tell apart (Okabe and Ito), with markers and lines.
COLOURS = ("#000000", "#E69F00", "#D55E00", "#0072B2", "#56B4E9", "#009E73", "#CC79A7")
MARKERS = ("o", "s", "D", "^", "v", "<", ">")
LINES = ("-", "--", "-", ":", ":", ":", ":")
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
        verdict: `not forgotten`, `hidden`, `partly erased`, `as after retraining`, `less than after retraining` or
            `cannot be judged`
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
        values = {}
        for key, (title, spec) in ROWS.items():
            values[title] = "-" if figures[key] is None else format(figures[key], spec)
        predicted = [f"{label}: {share:.0f}" for label, share in figures["predicted"].items() if share >= 0.5]
        values["predicted, class: % of samples"] = ", ".join(predicted[:3])
        for layer, probes in figures["probes"].items():
            for probe, found in probes.items():
                values[f"{probe} probe, {layer}: recall, %; bits"] = f"{found['recall']:.1f}; {found['bits']:.3f}"
        for way, relearned in figures["relearning"].items():
            steps, most = relearned["steps"], len(relearned["scores"]) - 1
            values[f"relearned, {way}: steps"] = f"not in {most}" if steps is None else str(steps)
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
        """Draws what every model predicts for the classes, what probes find in each layer, and the relearning.

        Raises ArtifactError if the file cannot be written.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(15, 4.6), layout="constrained")
        predictions, probes, relearning = figure.subplots(1, 3, width_ratios=(1.2, 1, 1))
        self._draw_predictions(predictions)
        self._draw_probes(probes)
        self._draw_relearning(relearning)
        figure.suptitle(f"{named(self.forget).capitalize()}: {self.verdict}", fontweight="bold")
        figure.legend(*relearning.get_legend_handles_labels(), loc="outside lower center", ncols=7, frameon=False)
        with written_whole(Path(path)) as file:
            figure.savefig(file, format=Path(path).suffix[1:] or "png", dpi=150)

    def _styles(self) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
        """The name of every model, its figures, and how it is drawn: apart in grey as well as in colour."""
        for place, (name, figures) in enumerate(self.figures.items()):
            place = min(place, len(COLOURS) - 1)
            style = {"color": COLOURS[place], "marker": MARKERS[place], "linestyle": LINES[place], "label": name}
            yield name, figures, style

    def _draw_predictions(self, axes: Any) -> None:
        shares: dict[str, float] = {}
        for figures in self.figures.values():
            for label, share in figures["predicted"].items():
                shares[label] = max(share, shares.get(label, 0.0))
        labels = sorted(sorted(shares, key=shares.__getitem__)[-SHOWN_CLASSES:], key=int)
        table = [[figures["predicted"].get(label, 0.0) for label in labels] for figures in self.figures.values()]
        axes.imshow(table, cmap="Blues", vmin=0, vmax=100, aspect="auto")
        for row, values in enumerate(table):
            for column, share in enumerate(values):
                if share >= 1:
                    colour = "white" if share > 50 else "black"
                    axes.text(column, row, f"{share:.0f}", ha="center", va="center", color=colour)
        axes.set_xticks(range(len(labels)), labels)
        axes.set_yticks(range(len(table)), [*self.figures])
        axes.set(xlabel="predicted class", title="predictions for the class, % of its test samples")

    def _draw_probes(self, axes: Any) -> None:
        layers = [*self.figures["original"]["probes"]]
        for place, (name, figures, style) in enumerate(self._styles()):
            if name == "hidden":  # what the original's layers are given
                continue
            best = []
            for probes in figures["probes"].values():
                fresh = [found for probe, found in probes.items() if probe != OWN_PROBE]
                best.append(max(fresh, key=lambda found: found["bits"]))
            x = [index + 0.05 * place for index in range(len(layers))]  # beside one another
            axes.errorbar(x, [found["bits"] for found in best], [found["error"] for found in best], capsize=3, **style)
        axes.set_xticks([index + 0.025 * len(self.figures) for index in range(len(layers))], layers)
        axes.set(xlabel="layer whose input the probes read", ylabel="usable bits of the better probe (1: all)")
        axes.set(title="what probes find of the class", ylim=(None, 1.02), xlim=(-0.5, len(layers) - 0.25))

    def _draw_relearning(self, axes: Any) -> None:
        for _, figures, style in self._styles():
            scores = figures["relearning"]["all weights"]["scores"]
            axes.plot(range(len(scores)), scores, markevery=max(1, len(scores) // 5), **style)
        axes.set(xlabel="training steps with all weights", ylabel="accuracy on the class, %")
        axes.set(title="relearning, until half is back", ylim=(-3, 103))
