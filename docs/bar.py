"""How well the bar of an erasure is known beforehand, for thirty classes, and what knowing it would bring.

Run it with `uv run docs/bar.py`; it writes docs/bar.md; with overrides of the config it prints the tables alone. The
truth, a classifier retrained without the class, is trained here alone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from build import ROOT, write_block
from torch import Tensor

from mimu.audits.predictions import predictions_of
from mimu.audits.probes import found_by_probes
from mimu.configs import load_config
from mimu.data import ImageData, load_image_data, some_of_every_class
from mimu.masking.regression import ridge_regression, standardised
from mimu.methods.erasing import Erasing, erased, nearest, told_apart
from mimu.networks.hooked import HookedClassifier
from mimu.reporter import markdown_table
from mimu.trainer import Trainer

SEEDS = (0, 1, 2)


def ridge_recall(features: Tensor, labels: Tensor, num_classes: int, ridge: float) -> Tensor:
    """Percent of each class's samples that a regression from the features (samples, n) finds, (classes)."""
    (x,) = standardised(features)
    targets = F.one_hot(labels, num_classes).to(x)
    coefficients, _ = ridge_regression(x, targets - targets.mean(0), ridge)
    found = ((x @ coefficients + targets.mean(0)).argmax(1) == labels).cpu().double()
    return 100 * torch.stack([found[labels.cpu() == label].mean() for label in range(num_classes)])


def found_by(ridge: float, rivals: list[int], features: Tensor, labels: Tensor, classes: int) -> tuple[float, float]:
    """How well a regression finds the first of `rivals`: percent of its samples among all, and R^2 among them."""
    recall = ridge_recall(features, labels, classes, ridge)[rivals[0]].item()
    return recall, told_apart(features, labels, rivals, ridge).item()


def judged(model: HookedClassifier, data: ImageData, label: int, seed: int) -> Tensor:
    """Percent of a class's test samples that a linear probe finds, and the retain score, (2)."""
    test = predictions_of(model, data.test)
    found = found_by_probes(predictions_of(model, data.train), test, label, seed)["probe_recall"]
    return torch.tensor([found["linear"], 100 * test.correct[test.labels != label].mean()])


def measured(overrides: list[str]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Of every seed and class: what a regression finds in four representations, and what erasing leaves.

    The first, recall and R^2 (4, 2), of the retrained classifier, the pixels, untrained features, and the original; the
    second, `judged` against the retrained classifier (2, 2), with the bar of untrained features, and with that of the
    retrained classifier.
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
                before, after = (each.outputs(samples.images)[0] for each in (original, retrained))
            rivals = nearest(before, samples.labels, label, erasing.rivals)
            untrained = erasing.untrained_features(samples.images, before.shape[1], seed)
            features = [after, samples.images.flatten(1), untrained, before]
            found = [found_by(erasing.ridge, rivals, each, samples.labels, classes) for each in features]
            _, of_retrained = found[0]
            left = []
            for bar in (None, of_retrained):
                mask = erased(original, data.train, label, erasing, seed, bar=bar)
                with mask.applied_to(original):
                    left.append(judged(original, data, label, seed))
            name = f"{seed}, {data.class_names[label]}"
            of_erasing = torch.stack(left) - judged(retrained, data, label, seed)
            yield name, torch.tensor(found, dtype=torch.double), of_erasing


def shown(values: Tensor, spec: str) -> list[str]:
    return [f"{value:{spec}}" for value in values.tolist()]


def tables_of(measured: Iterator[tuple[str, Tensor, Tensor]]) -> str:
    rows, found, left = [], [], []
    for name, figures, of_masks in measured:
        rows.append([name] + shown(figures[:, 0], ".1f") + shown(figures[:, 1], ".2f"))
        found.append(figures)
        left.append(of_masks)
    figures = torch.stack(found)  # (seeds and classes, 4, 2)
    # What the classifier that another seed retrained would say: no estimate can be expected to come nearer.
    another = figures[:, 0].roll(len(figures) // len(SEEDS), 0)
    errors = torch.cat([another[:, None], figures[:, 1:]], 1) - figures[:, :1]
    for name, values in (("mean error", errors.mean(0)), ("mean absolute error", errors.abs().mean(0))):
        rows.append([name] + shown(values[:, 0], "+.1f") + shown(values[:, 1], "+.3f"))
    of = ("retrained", "pixels", "untrained", "original")
    header = ["seed, class"] + [f"recall, %, {each}" for each in of] + [f"R^2, {each}" for each in of]

    masks = torch.stack(left)  # (seeds and classes, 2, 2)
    means, spreads = masks.mean(0), masks.std(0)
    erasures = []
    for bar, name in enumerate(("of untrained features", "of the retrained classifier")):
        excess, gap = means[bar].tolist()
        erasures.append([name, f"{excess:+.1f}", f"{spreads[bar, 0]:.1f}", f"{gap:+.2f}"])
    of_erasures = ["bar", "probe, points", "standard deviation over classes", "retain score, points"]
    parts = [
        "The errors under `retrained` are those of the classifier that another seed retrained.",
        markdown_table(header, rows),
        "What erasing leaves with either bar: the linear probe and the retain score against retraining, test split.",
        markdown_table(of_erasures, erasures),
    ]
    return "\n\n".join(parts)


def main(overrides: list[str]) -> None:
    tables = tables_of(measured(overrides))
    print(tables)
    if not overrides:
        write_block("bar", tables)


if __name__ == "__main__":
    main(sys.argv[1:])
