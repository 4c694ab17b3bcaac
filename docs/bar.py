"""How well the bar of an erasure is known beforehand, for thirty classes; writes docs/bar.md.

Run it with `uv run docs/bar.py`. The truth, a classifier retrained without the class, is trained here alone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from configs import load_config  # noqa: E402
from data import load_image_data, some_of_every_class  # noqa: E402
from masking.erasing import Erasing, Telling, nearest  # noqa: E402
from masking.regression import ridge_recall  # noqa: E402
from reporter import markdown_table  # noqa: E402
from trainer import Trainer  # noqa: E402

SEEDS = (0, 1, 2)


def told(features: Tensor, labels: Tensor, telling: Telling, classes: int) -> tuple[float, float]:
    """How well a regression finds a class: percent of its samples among all, and R^2 among its rivals."""
    recall = ridge_recall(features, labels, classes, telling.ridge)[telling.classes[0]].item()
    return recall, telling(features, labels).item()


def measured(overrides: list[str]) -> Iterator[tuple[str, list[tuple[float, float]]]]:
    """Of every seed and class: the retrained classifier's, the pixels', untrained features', and the original's."""
    config, erasing = load_config(overrides=overrides), Erasing.configured()
    data = load_image_data(config.dataset, ROOT / "datasets", "cpu")
    classes = len(data.class_names)
    for seed in SEEDS:
        samples = some_of_every_class(data.train, erasing.samples, "bar", seed)
        original = Trainer(config.classifier, seed, config.source.size).train(data.train, classes)
        for label in range(classes):
            trainer = Trainer(config.classifier, seed + 1_000_000, config.source.size)
            retrained = trainer.train(data.train.retain(label), classes)
            with torch.no_grad():
                after, before = (model.features(samples.images) for model in (retrained, original))
            telling = Telling(nearest(before, samples.labels, label, erasing.rivals), erasing.ridge)
            untrained = erasing.untrained_features(samples.images, before.shape[1], seed)
            of = (after, samples.images.flatten(1), untrained, before)
            name = f"{seed}, {data.class_names[label]}"
            yield name, [told(each, samples.labels, telling, classes) for each in of]


def main(overrides: list[str]) -> None:
    rows, found = [], []
    for name, figures in measured(overrides):
        rows.append([name, *(f"{recall:.1f}" for recall, _ in figures), *(f"{r2:.2f}" for _, r2 in figures)])
        found.append(figures)
    figures = torch.tensor(found, dtype=torch.double)  # (seeds and classes, 4, 2)
    # What the classifier that another seed retrained would say: no estimate can be expected to come nearer.
    another = figures[:, 0].roll(len(figures) // len(SEEDS), 0)
    errors = torch.cat([another[:, None], figures[:, 1:]], 1) - figures[:, :1]
    for name, values in (("mean error", errors.mean(0)), ("mean absolute error", errors.abs().mean(0))):
        rows.append([name, *(f"{v:+.1f}" for v in values[:, 0]), *(f"{v:+.3f}" for v in values[:, 1])])
    of = ("retrained", "pixels", "untrained", "original")
    header = ["seed, class", *(f"recall, %, {each}" for each in of), *(f"R^2, {each}" for each in of)]
    said = f"`{' '.join(['uv run docs/bar.py', *map(repr, overrides)])}`"
    title = f"# What a regression finds of a class that was never trained on, and what estimates it: {said}"
    note = "The errors under `retrained` are those of the classifier that another seed retrained."
    (ROOT / "docs" / "bar.md").write_text(f"{title}\n\n{note}\n\n{markdown_table(header, rows, texts=1)}\n")
    print("\n".join(" ".join(row) for row in rows[-2:]))


if __name__ == "__main__":
    main(sys.argv[1:])
