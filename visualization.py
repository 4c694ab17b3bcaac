"""The five plots of one experiment, from its JSON alone."""

from __future__ import annotations

import io
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from PIL import Image

from artifacts import code_of, digest, written_whole
from reporter import FORGET, RETAIN, method_styles

AXIS_LABELS = {
    "loss": "cross entropy (nats)",
    "score": "classified correctly (%)",
    "probability": "probability of the forget class",
}


def plots_folder(folder: Path, experiment: str) -> Path:
    """Where the plots of an experiment stand in the folder of an evaluation."""
    return folder / "Metrics and Plots" / "plots" / experiment


class Visualization:
    """Bar charts of each evaluation, where the forget set goes, and which weights are zeroed.

    Every picture carries the digest of what it is drawn from: the numbers, and the code that draws them.

    results: the JSON of the experiment
    folder: that of the evaluation, where `Metrics and Plots/plots/<id>/` goes
    shared: layouts and pictures, kept from one experiment of a request to the next
    """

    def __init__(self, results: dict[str, Any], folder: Path, shared: dict[Hashable, Any] | None = None) -> None:
        self.results = results
        self.folder = plots_folder(folder, results["id"])
        self._shared = {} if shared is None else shared
        self._code = code_of("visualization")
        digit, kappa, top_k = (results[key] for key in ("forget_digit", "kappa", "top_k"))
        forgetting = f"Forgetting digit {digit}, kappa = {kappa}"
        keeping = f"Digit {digit}: every weight kept (original), or only K = {top_k}"
        # name: title, what is drawn, how
        self.drawings: dict[str, tuple[str, Any, Callable[[Figure, Any], None]]] = {
            "unlearning": (f"{forgetting}: forget set", results[FORGET], self._draw_bars),
            "performance_degradation": (f"{forgetting}: retain set", results[RETAIN], self._draw_bars),
            "mask_efficacy": (keeping, results["mask_efficacy_metrics"], self._draw_bars),
            "class_probabilities": (
                f"{forgetting}: forget set",
                results["class_probabilities"],
                self._draw_class_probabilities,
            ),
            "weights": (forgetting, results["weight_histograms"], self._draw_weights),
        }

    def sources(self) -> dict[Path, str]:
        """Every picture and the digest of what it is drawn from."""
        return {
            self.folder / f"{name}.png": digest([name, title, content, list(self.results["methods"]), self._code])
            for name, (title, content, _) in self.drawings.items()
        }

    def missing(self) -> list[Path]:
        """The pictures that are not there as they would be drawn now."""
        return [path for path, source in self.sources().items() if source_of(path) != source]

    def draw(self) -> None:
        """Draws the pictures that are missing."""
        for path, source in self.sources().items():
            if source_of(path) == source:
                continue
            # Several kappas have the same picture of the mask efficacy.
            png = self._once(source, lambda name=path.stem, source=source: self._picture(name, source))
            with written_whole(path) as file:
                file.write(png)

    def _picture(self, name: str, source: str) -> bytes:
        """A drawing as PNG. Finding room for its labels takes half the time: all kappas share what the first found."""
        title, content, draw = self.drawings[name]
        figure = Figure(figsize=(9, 3), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.08)  # room for a longer number on the axis of another kappa
        draw(figure, content)
        figure.suptitle(title, fontsize=10)

        def positions() -> list[Bbox]:
            figure.draw_without_rendering()
            return [axes.get_position() for axes in figure.axes]

        found = self._once((name, "positions"), positions)
        figure.set_layout_engine("none")
        for axes, position in zip(figure.axes, found):
            axes.set_position(position)
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=100, metadata={"Source": source})
        return png.getvalue()

    def _draw_bars(self, figure: Figure, metrics: dict[str, dict[str, float | None]]) -> None:
        styles = method_styles([*self.results["methods"], *metrics])
        measured = next(iter(metrics.values()))
        for axes, metric in zip(figure.subplots(1, len(measured), squeeze=False)[0], measured):
            values = [metrics[name][metric] for name in metrics]
            heights = [0.0 if value is None else value for value in values]
            bars = axes.bar(range(len(values)), heights, color=[styles[name]["color"] for name in metrics])
            # Upright, since side by side they would touch.
            labels = ["inf" if value is None else f"{value:.3g}" for value in values]
            axes.bar_label(bars, labels, fontsize=7, rotation=90, padding=2)
            axes.set_ylabel(AXIS_LABELS[metric], fontsize=9)
            axes.margins(y=0.35)
            axes.set_xticks(range(len(values)), list(metrics), rotation=45, ha="right")

    def _draw_class_probabilities(self, figure: Figure, probabilities: dict[str, list[float]]) -> None:
        """Mean predicted probability of every class on the forget set, a row per method."""
        axes = figure.subplots()
        rows = list(probabilities.values())
        image = axes.imshow(rows, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for row, of_row in enumerate(rows):
            for column, value in enumerate(of_row):
                color = "w" if value > 0.6 else "k"
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=color)
        axes.set_yticks(range(len(rows)), probabilities)
        axes.set_xticks(range(len(rows[0])))
        axes.set_xlabel("class")
        figure.colorbar(image, label="mean probability")

    def _draw_weights(self, figure: Figure, histograms: list[dict[str, Any]]) -> None:
        """Histogram of the weights of every masked layer, and of those that the masking GCN zeroes."""
        color = method_styles(["mimu"])["mimu"]["color"]
        for axes, histogram in zip(figure.subplots(1, len(histograms), squeeze=False)[0], histograms):
            for counts, face, label in (
                (histogram["all"], "0.75", f"all {sum(histogram['all'])} weights"),
                (histogram["zeroed"], color, f"{sum(histogram['zeroed'])} zeroed by mimu"),
            ):
                # One outline, where `hist` draws a rectangle for every bin.
                axes.stairs(counts, histogram["edges"], fill=True, color=face, label=label)
            axes.set_yscale("log")
            axes.set_xlabel(f"weight of layer {histogram['layer']}, {' x '.join(map(str, histogram['shape']))}")
            axes.set_ylabel("number of weights")
            axes.legend(fontsize=8)

    def _once(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """Computes what all experiments of a request share once."""
        if key not in self._shared:
            self._shared[key] = compute()
        return self._shared[key]


def source_of(path: Path) -> str | None:
    """The digest that a picture carries; None where it is not there, damaged, or another one."""
    try:
        with Image.open(path) as image:
            source = image.info.get("Source")
            image.verify()
    except Exception:  # any byte may be wrong, and what that raises is anything
        return None
    return source
