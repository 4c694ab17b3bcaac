"""Tries the candidates of docs/tuning.yaml on held-out training samples, and writes the chosen ones to docs/tuning.md.

`uv run docs/tune.py` tries all of them; `uv run docs/tune.py cnn` those of one section; `uv run docs/tune.py cnn ssd
salun` those of some of its methods. All other rows of the table stay. The configs hold what was chosen.
"""

import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import yaml
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from build import DOCS, ROOT, block, cells, head, write_block

from data import GraphGenerator, load_image_data
from eval import Request, run_method
from experiment.audits import Predictions, predictions_of, probe_metrics
from experiment.config import load_config
from mimu.auditing import jensen_shannon
from mimu.errors import TrainingError
from mimu.pretrained import TrainedGCN
from mimu.settings import number_of_weights
from reporter import markdown_table
from trainer import Trainer

SETTINGS = yaml.safe_load((DOCS / "tuning.yaml").read_text())["sections"]
HEADER = ["section", "method", "chosen", "forget accuracy, %", "retain accuracy, %", "distance", "commit"]
Values = dict[str, int | float]  # hyperparameters of a method


@dataclass(frozen=True)
class Trial:
    """Scores of a candidate, mean over the classes: accuracy in percent, and the distance to retraining."""

    values: Values
    forget: float
    retain: float
    distance: float


class Tuning:
    """Requests on one classifier, scored on samples that are held out of its training split."""

    def __init__(self, settings: dict[str, Any]) -> None:
        config = load_config(overrides=["gcn.pretrained=true", *settings.get("overrides", [])])
        seed = settings["seed"]
        self.settings = settings
        data = load_image_data(config.dataset, ROOT / "datasets", "cpu", settings["held_out"])
        self.held_out = data.test[: settings.get("scored")]
        trainer = Trainer(config.classifier, seed, config.source.size)
        classifier = trainer.train(data.train, len(data.class_names))
        graphs = GraphGenerator(classifier, data.train, config.graphs, seed)
        top_k = number_of_weights(config.sweep.top_k, graphs.graph.num_vertices)
        gcn = TrainedGCN.load().gcn
        kept: dict[str, Any] = {}
        self.requests = [
            Request(config.eval, classifier, trainer, data.train, graphs, gcn, digit, top_k, seed, "auto", kept=kept)
            for digit in settings.get("digits", range(graphs.num_classes))
        ]
        retrained = [run_method(request, "retrain").model for request in self.requests]
        self.retrained = [predictions_of(model, self.held_out) for model in retrained]
        self.by_probe = settings.get("by_probe", False)
        if self.by_probe:
            self.retrained_bits = [self.bits(request, model) for request, model in zip(self.requests, retrained)]
            original_bits = fmean(self.bits(request, classifier) for request in self.requests)
            self.full_excess = original_bits - fmean(self.retrained_bits)
        original = predictions_of(classifier, self.held_out)
        retain = fmean(self.accuracy(original, request.forget_class)[1] for request in self.requests)
        self.smallest_retain = retain - settings["largest_retain_loss"]

    def accuracy(self, predictions: Predictions, forget_class: int) -> tuple[float, float]:
        """Returns forget accuracy and retain accuracy, percent."""
        is_forget = predictions.labels == forget_class
        return tuple(100 * predictions.correct[chosen].mean().item() for chosen in (is_forget, ~is_forget))

    def bits(self, request: Request, model: nn.Module) -> float:
        """Returns the most bits about "is it this class" that a probe finds in held-out samples' representation."""
        splits = (predictions_of(model, samples) for samples in (request.train, self.held_out))
        metrics = probe_metrics(*splits, request.forget_class, request.seed, ["two_layer", "neighbours"])
        return max(metrics["usable_bits"]["representation"].values())

    def trial(self, method: str, values: Values) -> Trial:
        """Makes all requests by a method with these hyperparameters; one that diverges counts as keeping nothing."""
        figures = []
        for place, (request, retrained) in enumerate(zip(self.requests, self.retrained)):
            configured, forget_class = request.config.hyperparameters, request.forget_class
            hyperparameters = configured | {method: configured.get(method, {}) | values}
            config = replace(request.config, hyperparameters=hyperparameters)
            try:
                model = run_method(replace(request, config=config, prunings={}), method).model
            except TrainingError:
                return Trial(values, 100.0, 0.0, math.inf)
            predictions = predictions_of(model, self.held_out)
            forget, retain = self.accuracy(predictions, forget_class)
            if self.by_probe:
                index = (self.bits(request, model) - self.retrained_bits[place]) / self.full_excess
                figures.append((forget, retain, index, self.accuracy(retrained, forget_class)[1] - retain))
            else:
                is_forget = predictions.labels == forget_class
                parts = [is_forget, ~is_forget]
                distance = sum(jensen_shannon(predictions.logits[part], retrained.logits[part]) for part in parts) / 2
                figures.append((forget, retain, distance))
        forget, retain, *away = torch.tensor(figures, dtype=torch.double).mean(0).tolist()
        return Trial(values, forget, retain, abs(away[0]) + max(0.0, away[1]) if self.by_probe else away[0])

    def best(self, trials: list[Trial]) -> Trial:
        """Chooses the nearest to retraining within both limits; without one, the least beyond them, in points."""

        def rank(trial: Trial) -> tuple[float, float]:
            beyond = max(0.0, trial.forget - self.settings["largest_forget_score"])
            return beyond + max(0.0, self.smallest_retain - trial.retain), trial.distance

        return min(trials, key=rank)


def candidates(rounds: list[dict[str, list[int | float]]]) -> Iterator[Values]:
    """Yields every combination of the values of each grid."""
    for grid in rounds:
        for values in itertools.product(*grid.values()):
            yield dict(zip(grid, values))


def row(section: str, method: str, trial: Trial) -> list[str]:
    values = ", ".join(f"{name} {value:g}" for name, value in trial.values.items())
    figures = [f"{trial.forget:.2f}", f"{trial.retain:.2f}", f"{trial.distance:.4f}"]
    return [section, method, values, *figures, head()]


def main(arguments: Sequence[str]) -> None:
    sections, methods = list(arguments[:1]) or list(SETTINGS), arguments[1:]
    rows = {
        (section, method): [section, method, *figures]
        for section, method, *figures in cells(block("tuning").content)[1:]
    }
    for section in sections:
        tuning = Tuning(SETTINGS[section])
        for method, rounds in SETTINGS[section]["candidates"].items():
            if methods and method not in methods:
                continue
            trials = []
            for values in tqdm(list(candidates(rounds)), f"{section}, {method}", leave=False):
                trials.append(tuning.trial(method, values))
                tqdm.write(" ".join(row(section, method, trials[-1])))
            rows[section, method] = row(section, method, tuning.best(trials))
    write_block("tuning", markdown_table(HEADER, rows.values(), texts=3))


if __name__ == "__main__":
    main(sys.argv[1:])
