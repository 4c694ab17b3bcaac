"""How well the bar of an erasure is known beforehand, for thirty classes, and what knowing it would bring.

Run it with `uv run docs/bar.py`; it writes docs/bar.md. The truth, a classifier retrained without the class, is trained
here alone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from mimu.audits.predictions import predictions_of
from mimu.audits.probes import probe_scores
from mimu.configs import load_config
from mimu.data import ImageData, load_image_data, some_of_every_class
from mimu.masking.regression import ridge_recall
from mimu.methods.erasing import Erasing, RidgeProbe, erased, nearest
from mimu.networks.hooked import HookedClassifier
from mimu.reporter import markdown_table
from mimu.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]

SEEDS = (0, 1, 2)


def found_by(probe: RidgeProbe, features: Tensor, labels: Tensor, classes: int) -> tuple[float, float]:
    """How well a regression finds a class: percent of its samples among all, and R^2 among its rivals."""
    recall = ridge_recall(features, labels, classes, probe.ridge)[probe.classes[0]].item()
    return recall, probe(features, labels).item()


def judged(model: HookedClassifier, data: ImageData, label: int, seed: int) -> Tensor:
    """Percent of a class's test samples that a linear probe finds, and the retain score, (2)."""
    test = predictions_of(model, data.test)
    recalls, _ = probe_scores(predictions_of(model, data.train), test, label, seed)
    return torch.tensor([recalls["linear"], 100 * test.correct[test.labels != label].mean()])


def measured(overrides: list[str]) -> Iterator[tuple[str, list[tuple[float, float]], Tensor]]:
    """Of every seed and class: the retrained classifier's, the pixels', untrained features', and the original's.

    And what erasing leaves (`judged`, against the retrained classifier), with the bar of untrained features, and with
    that of the retrained classifier, (2, 2).
    """
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
            probe = RidgeProbe(nearest(before, samples.labels, label, erasing.rivals), erasing.ridge)
            untrained = erasing.untrained_features(samples.images, before.shape[1], seed)
            of = (after, samples.images.flatten(1), untrained, before)
            name = f"{seed}, {data.class_names[label]}"
            figures, left = [found_by(probe, each, samples.labels, classes) for each in of], []
            for bar in (None, figures[0][1]):
                mask = erased(original, data.train, label, erasing, seed, bar=bar)
                with mask.applied_to(original):
                    left.append(judged(original, data, label, seed))
            yield name, figures, torch.stack(left) - judged(retrained, data, label, seed)


def main(overrides: list[str]) -> None:
    rows, found, left = [], [], []
    for name, figures, of_masks in measured(overrides):
        rows.append([name, *(f"{recall:.1f}" for recall, _ in figures), *(f"{r2:.2f}" for _, r2 in figures)])
        found.append(figures)
        left.append(of_masks)
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
    masks = torch.stack(left)  # (seeds and classes, 2, 2)
    (excess, gap), spread = masks.mean(0).T, masks[..., 0].std(0)
    erasures = [
        [name, f"{excess[of]:+.1f}", f"{spread[of]:.1f}", f"{gap[of]:+.2f}"]
        for of, name in enumerate(("of untrained features", "of the retrained classifier"))
    ]
    what = "What erasing leaves with either bar: the linear probe and the retain score against retraining, test split."
    of_erasures = ["bar", "probe, points", "standard deviation over classes", "retain score, points"]
    tables = markdown_table(header, rows, texts=1), what, markdown_table(of_erasures, erasures, texts=1)
    (ROOT / "docs" / "bar.md").write_text("\n\n".join([title, note, *tables]) + "\n")
    print("\n".join(" ".join(row) for row in [*rows[-2:], *erasures]))


if __name__ == "__main__":
    main(sys.argv[1:])
