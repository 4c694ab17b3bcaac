"""Tries candidates for the hyperparameters of every method on held-out training samples, for docs/tuning.md.

Run it with `uv run docs/tune.py`, or with the names of some methods, the others staying as they are written:
`uv run docs/tune.py sft scrub`. What it chooses stands in configs/config.yaml (sft) and configs/methods.yaml. A first
argument as cnn tries docs/tuning_cnn.yaml, whose choices stand in configs/cnn.yaml. Where the settings say `by_probe`,
the distance to retraining is the information difference index of the representation (see `Column.is_index`), its
absolute value, plus the points of the retain score lost.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch
from build import DOCS, ROOT, block, cells, tuning_settings, write_block
from torch import nn
from tqdm import tqdm

from audits.predictions import Predictions, jensen_shannon, predictions_of
from audits.probes import found_by_probes
from data import GraphGenerator, load_image_data
from eval import Request, answer
from experiment.config import load_config
from mimu.errors import TrainingError
from mimu.pretrained import TrainedGCN
from mimu.settings import number_of_weights
from reporter import markdown_table
from trainer import Trainer

Values = dict[str, int | float]  # of the hyperparameters of a method


@dataclass(frozen=True)
class Trial:
    """What a candidate comes to, mean over the digits: scores in percent, distance to retraining."""

    values: Values
    forget: float
    retain: float
    distance: float


class Tuning:
    """The requests of one classifier, and what is held out of its training split to score their answers."""

    def __init__(self, settings: dict[str, Any]) -> None:
        config = load_config(overrides=["gcn.pretrained=true", *settings.get("overrides", [])])
        seed = settings["seed"]
        self.settings = settings
        data = load_image_data(config.dataset, ROOT / "datasets", "cpu", settings["held_out"])
        self.held_out = data.test[: settings.get("scored")]
        trainer = Trainer(config.classifier, seed, config.source.size)
        classifier = trainer.train(data.train, len(data.class_names))
        graphs = GraphGenerator(classifier, data.train, config.graphs, seed)
        top_k = number_of_weights(config.sweep.top_k[0], graphs.graph.num_vertices)
        gcn = TrainedGCN.load().gcn
        kept: dict[str, Any] = {}
        self.requests = [
            Request(config.eval, classifier, trainer, data.train, graphs, gcn, digit, top_k, seed, "auto", kept=kept)
            for digit in settings.get("digits", range(graphs.num_classes))
        ]
        retrained = [answer(request, "retrain").model for request in self.requests]
        self.retrained = [self.seen(model) for model in retrained]
        self.by_probe = settings.get("by_probe", False)
        if self.by_probe:
            self.known = [self.bits(*each) for each in zip(self.requests, retrained)]
            self.learned = fmean(self.bits(request, classifier) for request in self.requests) - fmean(self.known)
        original = self.seen(classifier)
        scores = [self.scores(original, request.forget_class)[1] for request in self.requests]
        self.smallest_retain = sum(scores) / len(scores) - settings["largest_retain_loss"]

    def seen(self, model: nn.Module) -> Predictions:
        """What a classifier does with the held-out samples."""
        return predictions_of(model, self.held_out)

    def scores(self, seen: Predictions, digit: int) -> tuple[float, float]:
        """Forget and retain score, percent."""
        is_forget = seen.labels == digit
        return 100 * seen.correct[is_forget].mean().item(), 100 * seen.correct[~is_forget].mean().item()

    def bits(self, request: Request, model: nn.Module) -> float:
        """The most that any probe of the representation says of the class or not, of held-out samples."""
        train, held_out = predictions_of(model, request.train), self.seen(model)
        found = found_by_probes(train, held_out, request.forget_class, request.seed, ["two_layer", "neighbours"])
        return max(found["usable_bits"]["representation"].values())

    def trial(self, method: str, values: Values) -> Trial:
        """Lets a method with these hyperparameters answer the requests; a candidate that diverges keeps nothing."""
        figures = []
        for place, (request, retrained) in enumerate(zip(self.requests, self.retrained)):
            given, digit = request.config.hyperparameters, request.forget_class
            config = replace(request.config, hyperparameters=given | {method: given.get(method, {}) | values})
            try:
                model = answer(replace(request, config=config, prunings={}), method).model
            except TrainingError:
                return Trial(values, 100.0, 0.0, math.inf)
            seen = self.seen(model)
            forget, retain = self.scores(seen, digit)
            if not self.by_probe:
                parts = [seen.labels == digit, seen.labels != digit]
                distance = sum(jensen_shannon(seen.logits[part], retrained.logits[part]) for part in parts) / 2
                figures.append((forget, retain, distance))
            else:
                index = (self.bits(request, model) - self.known[place]) / self.learned
                figures.append((forget, retain, index, self.scores(retrained, digit)[1] - retain))
        forget, retain, *away = torch.tensor(figures, dtype=torch.double).mean(0).tolist()
        return Trial(values, forget, retain, abs(away[0]) + max(0.0, away[1]) if self.by_probe else away[0])

    def best(self, trials: list[Trial]) -> Trial:
        """The nearest to retraining of those that forget and keep enough; else what falls short by fewest points."""

        def rank(trial: Trial) -> tuple[float, float]:
            left = max(0.0, trial.forget - self.settings["largest_forget_score"])
            return left + max(0.0, self.smallest_retain - trial.retain), trial.distance

        return min(trials, key=rank)


def candidates(rounds: list[dict[str, list[int | float]]]) -> Iterator[Values]:
    """Every combination of the values of each grid."""
    for grid in rounds:
        for values in itertools.product(*grid.values()):
            yield dict(zip(grid, values))


def row(method: str, trial: Trial, mark: str) -> list[str]:
    values = ", ".join(f"{name} {value:g}" for name, value in trial.values.items())
    return [method, values, f"{trial.forget:.2f}", f"{trial.retain:.2f}", f"{trial.distance:.4f}", mark]


def main(arguments: list[str]) -> None:
    is_named = bool(arguments) and (DOCS / f"tuning_{arguments[0]}.yaml").exists()
    name = f"tuning_{arguments[0]}" if is_named else "tuning"
    methods = arguments[1:] if is_named else arguments
    settings, before = tuning_settings(name), block(name)
    tuning, rows = Tuning(settings), []
    for method, rounds in settings["candidates"].items():
        if methods and method not in methods:
            rows += [written for written in cells(before.content)[1:] if written[0] == method]
            continue
        trials = [tuning.trial(method, values) for values in tqdm(list(candidates(rounds)), method, leave=False)]
        best = tuning.best(trials)
        tried = [row(method, trial, "chosen" if trial is best else "") for trial in trials]
        print("\n".join(map(" ".join, tried)), flush=True)
        rows += tried
    distance = f"distance to retraining, {'IDI + points' if tuning.by_probe else 'bits'}"
    header = ["method", "hyperparameters", "forget score, %", "retain score, %", distance, ""]
    table = markdown_table(header, rows, texts=2)
    write_block(name, table, before.provenance if methods else None)  # some rows are no newer than they were


if __name__ == "__main__":
    main(sys.argv[1:])
