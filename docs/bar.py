"""How near the bar of an erasure is to what attackers find after retraining, for thirty classes.

Run it with `uv run docs/bar.py`; it writes docs/bar.md; with overrides of the config, and of the seeds and classes by
sweep.seeds and sweep.forget_digits, it prints the table alone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

import torch
from build import ROOT, write_block

from data import load_image_data
from experiment.config import load_config
from mimu.erasing import ErasingConfig
from mimu.samples import some_of_every_class
from reporter import markdown_table
from trainer import Trainer

OVERRIDES = ("sweep.seeds=[0, 1, 2]", "sweep.forget_digits=[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]")
FOUND_IN = ("retrained", "another retrained", "inputs", "untrained", "original", "bar")


def measured(overrides: Sequence[str]) -> dict[str, list[float]]:
    """By seed and class: R^2 of attackers in each of FOUND_IN, on samples of the training split."""
    config, erasing, found = load_config(overrides=[*OVERRIDES, *overrides]), ErasingConfig.configured(), {}
    data = load_image_data(config.dataset, ROOT / "datasets", "cpu")
    classes = len(data.class_names)
    for seed in config.seeds:
        samples = some_of_every_class(data.train, erasing.samples, "bar", seed)
        trainer = Trainer(config.classifier, seed, config.source.size)
        untrained, original = trainer.initial(data.train.images, classes), trainer.train(data.train, classes)
        for label in config.forget_digits:
            others = [replace(trainer, seed=seed + more) for more in (1_000_000, 2_000_000)]
            classifiers = [each.train(data.train.retain(label), classes) for each in others]
            with torch.no_grad():
                features = [each.outputs(samples.images)[0] for each in (*classifiers, untrained, original)]
            features.insert(2, samples.images)
            values = [erasing.mean_r_squared(each, samples.labels == label, seed) for each in features]
            _, _, in_inputs, _, in_original = values
            found[f"{seed}, {data.class_names[label]}"] = [*values, erasing.target_r_squared(in_inputs, in_original)]
    return found


def main(overrides: Sequence[str]) -> None:
    found = measured(overrides)
    rows = [[name, *(f"{value:.2f}" for value in values)] for name, values in found.items()]
    errors = [[value - values[0] for value in values] for values in found.values()]
    rows.append(["mean error", *(f"{fmean(column):+.3f}" for column in zip(*errors))])
    rows.append(["mean absolute error", *(f"{fmean(map(abs, column)):.3f}" for column in zip(*errors))])
    table = markdown_table(["seed, class", *FOUND_IN], rows)
    print(table)
    if not overrides:
        write_block("bar", table)


if __name__ == "__main__":
    main(sys.argv[1:])
