"""Compares the target R^2 of an erasure with the R^2 of attackers after retraining, for thirty classes.

`uv run docs/bar.py` prints R^2 for every class, and writes the mean errors to docs/erasure.md. With overrides of the
config, as of sweep.seeds and sweep.forget_digits, it writes nothing.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from build import ROOT, write_block

from data import load_image_data
from experiment.config import load_config
from mimu.erasing import ErasingConfig
from mimu.samples import some_of_every_class
from reporter import markdown_table
from trainer import Trainer

OVERRIDES = ("sweep.seeds=[0, 1, 2]", "sweep.forget_digits=[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]")
SOURCES = ("retrained", "another retrained", "inputs", "untrained", "original", "target")


def measure(overrides: Sequence[str]) -> dict[str, list[float]]:
    """Returns R^2 of attackers in each of SOURCES on samples of the training split, by seed and class."""
    config, erasing = load_config(overrides=[*OVERRIDES, *overrides]), ErasingConfig.configured()
    data = load_image_data(config.dataset, ROOT / "datasets", "cpu")
    classes, rows = len(data.class_names), {}
    for seed in config.seeds:
        samples = some_of_every_class(data.train, erasing.samples, "bar", seed)
        trainer = Trainer(config.classifier, seed, config.source.size)
        untrained, original = trainer.initial(data.train.images, classes), trainer.train(data.train, classes)
        for label in config.forget_digits:
            trainers = [replace(trainer, seed=seed + more) for more in (1_000_000, 2_000_000)]
            retrained = [each.train(data.train.retain(label), classes) for each in trainers]
            with torch.no_grad():
                features = [each.outputs(samples.images)[0] for each in (*retrained, untrained, original)]
            features.insert(2, samples.images)
            is_own = (samples.labels == label)[:, None]
            values = [erasing.mean_r_squared(each, is_own, seed) for each in features]
            _, _, in_inputs, _, in_original = values
            target = erasing.target_r_squared(in_inputs, in_original, classes)
            rows[f"{seed}, {data.class_names[label]}"] = [*map(float, values), float(target)]
    return rows


def main(overrides: Sequence[str]) -> None:
    r_squared = measure(overrides)
    rows = [[name, *(f"{value:.2f}" for value in values)] for name, values in r_squared.items()]
    print(markdown_table(["seed, class", *SOURCES], rows))
    summary = []
    for place, source in enumerate(SOURCES[1:], 1):
        errors = [values[place] - values[0] for values in r_squared.values()]
        summary.append([source, f"{fmean(errors):+.3f}", f"{fmean(map(abs, errors)):.3f}"])
    table = markdown_table(["R^2 in", "mean difference to retrained", "mean absolute difference"], summary)
    print(table)
    if not overrides:
        write_block("bar", table)


if __name__ == "__main__":
    main(sys.argv[1:])
