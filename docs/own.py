"""Measures `unlearn` on classifiers that no setting was chosen on, and writes docs/own.md: `uv run docs/own.py`.

It takes half an hour, and Fashion-MNIST in datasets/FashionMNIST/raw/. With names of tables it measures those.
"""

from __future__ import annotations

import copy
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from build import write_block
from torch import Tensor, nn

from mimu import Mask, RetainScoreError, unlearn
from mimu.configs import load_config
from mimu.data import Split, load_image_data
from mimu.reporter import markdown_table
from mimu.trainer import Trainer

SHAPES = {
    "784-128-64-10": ((128, 64), False),
    "784-200-50-10 with biases": ((200, 50), True),
    "784-100-10 with biases": ((100,), True),
    "784-64-10": ((64,), False),
    "784-256-128-64-10 with biases": ((256, 128, 64), True),
}
DIGITS = (0, 3, 7)
TOGETHER = ((3, 7), (7, 3), (0, 8), (4, 9), (9, 4), (3, 5, 8), (8, 3, 5), (1, 4, 7))
SEED = 300  # of the first classifier


def trainer(shape: str) -> Trainer:
    hidden, bias = SHAPES[shape]
    config = replace(load_config().classifier, hidden_sizes=hidden, bias=bias)
    return Trainer(config, SEED + list(SHAPES).index(shape))


@torch.no_grad()
def is_correct(model: nn.Module, split: Split) -> Tensor:
    """Which samples are classified correctly, (samples)."""
    model.eval()
    return torch.cat([model(images).argmax(1) for images in split.images.split(1000)]) == split.labels


def score(correct: Tensor, chosen: Tensor) -> float:
    """Percent of the chosen samples."""
    return 100 * correct[chosen].float().mean().item()


def answer(model: nn.Module, train: Split, forget_class: int | Sequence[int], **asked: Any) -> tuple[Mask, str]:
    """The mask of a request, or the one of its error; and "error", "left" where it warned, or ""."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            mask = unlearn(model, train.images, train.labels, forget_class, **asked)
        except RetainScoreError as error:
            return error.mask, "error"
    return mask, "left" if warned else ""


def measured(model: nn.Module, train: Split, test: Split, digit: int, **asked: Any) -> dict[str, Any]:
    """What one request makes of a model: scores on the test split in percent, their changes in points, and the rest."""
    started = time.perf_counter()
    mask, said = answer(model, train, digit, **asked)
    seconds, before = time.perf_counter() - started, is_correct(model, test)
    with mask.applied_to(model):
        after = is_correct(model, test)
    is_other, changes = test.labels != digit, []
    for chosen in [is_other, *(test.labels == each for each in range(10) if each != digit)]:
        changes.append(score(after, chosen) - score(before, chosen))
    found = {"before": score(before, is_other), "forget": score(after, ~is_other), "others": changes[0]}
    found |= {"any other": min(changes[1:]), "zeroed": mask.num_zeroed, "seconds": seconds}
    return found | {"said": f"{said} ({digit})" if said else ""}


def cells(model: nn.Module, train: Split, test: Split, **asked: Any) -> dict[str, str]:
    """Of the requests for DIGITS: the figure of the worst, or of each of them."""
    found = [measured(model, train, test, digit, **asked) for digit in DIGITS]
    return {
        "others before, %": f"{max(each['before'] for each in found):.1f}",
        "forget, worst": f"{max(each['forget'] for each in found):.2f}",
        "others, points, each class": " ".join(f"{each['others']:+.2f}" for each in found),
        "any other class, worst": f"{min(each['any other'] for each in found):+.1f}",
        "weights zeroed": " ".join(str(each["zeroed"]) for each in found),
        "seconds": f"{max(each['seconds'] for each in found):.0f}",
        "said": ", ".join(each["said"] for each in found if each["said"]),
    }


def by_layer() -> Iterator[dict[str, str]]:
    """Every single layer, the last two, and all."""
    data = load_image_data("MNIST")
    for shape in SHAPES:
        model = trainer(shape).train(data.train, 10)
        count = len(model.layers)
        last_two = [(count - 2, count - 1)] if count > 2 else []
        for layers in [*range(count), *last_two, None]:
            found = cells(model, data.train, data.test, mask_layer=layers)
            del found["others before, %"]
            yield {"classifier": shape, "mask_layer": "all" if layers is None else str(layers)} | found


def several() -> Iterator[dict[str, str]]:
    """Classes together, and one after the other, beside a classifier retrained without all of them."""
    data = load_image_data("MNIST")
    for shape in (name for name in SHAPES if name.count("-") > 2):
        original, retrained = trainer(shape).train(data.train, 10), {}
        for classes in TOGETHER:
            is_other = torch.isin(data.test.labels, torch.tensor(classes), invert=True)
            key = frozenset(classes)
            if key not in retrained:
                kept = torch.isin(data.train.labels, torch.tensor(classes), invert=True)
                retrained[key] = score(is_correct(trainer(shape).train(data.train[kept], 10), data.test), is_other)
            row = {"classifier": shape, "classes": " ".join(map(str, classes))}
            for way in ("together", "in a row", "permanent"):
                model = copy.deepcopy(original)
                for step in [classes] if way == "together" else classes:
                    mask, said = answer(model, data.train, step)
                    mask.apply(model, permanent=way == "permanent")
                after = is_correct(model, data.test)
                row[f"{way}: forget, worst"] = f"{max(score(after, data.test.labels == each) for each in classes):.2f}"
                row[f"{way}: others"] = f"{score(after, is_other) - retrained[key]:+.2f}{said}"
            yield row


class Convolutional(nn.Module):
    """Two convolutions and a head of two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        self.inner, self.dropout, self.head = nn.Linear(32 * 49, 64), nn.Dropout(0.25), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.first(x).relu(), 2)
        x = F.max_pool2d(self.second(x).relu(), 2)
        return self.head(self.dropout(self.inner(x.flatten(1)).relu()))


def resnet() -> nn.Module:
    """torchvision's ResNet-18 for grey images, its features random and standardised, with a head of two to train."""
    model = torchvision.models.resnet18()
    model.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    model.fc = nn.Sequential(nn.BatchNorm1d(512, affine=False), nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 10))
    return model


def fit(model: nn.Module, part: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> nn.Module:
    optimizer, generator = torch.optim.Adam(part.parameters(), 0.001), torch.Generator().manual_seed(0)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(labels), generator=generator).split(128):
            optimizer.zero_grad()
            F.cross_entropy(part(images[batch]), labels[batch]).backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def features(model: nn.Module, images: Tensor) -> Tensor:
    """What the head of a ResNet is given."""
    body = copy.copy(model)
    body._modules = model._modules | {"fc": nn.Identity()}
    return torch.cat([body.eval()(batch) for batch in images.split(500)])


def trained_network(name: str, few: Split, train: Split) -> nn.Module:
    """On all of the training samples; of the ResNet-18 the head alone, on a few."""
    torch.manual_seed(SEED)
    if name == "ResNet-18":
        model = resnet()
        return fit(model, model.fc, features(model, few.images), few.labels, 20)
    model = Convolutional()
    return fit(model, model, train.images, train.labels, 2)


def networks() -> Iterator[dict[str, str]]:
    """Networks whose last linear layers are what is masked; requests on 1,000 images of every class."""
    for name in ("MNIST", "FashionMNIST"):
        data = load_image_data(name)
        train, test = (Split(part.images.view(-1, 1, 28, 28), part.labels) for part in (data.train, data.test))
        few = train[torch.cat([(train.labels == label).nonzero()[:1000, 0] for label in range(10)])]
        for network in ("two convolutions", "ResNet-18"):
            model = trained_network(network, few, train)
            scored_on = test[:2000] if network == "ResNet-18" else test
            for asked_for, bounds in (("auto", {}), ("auto, no max_class_fall", {"max_class_fall": None})):
                found = cells(model, few, scored_on, **bounds)
                del found["any other class, worst"], found["weights zeroed"]
                yield {"data set": name, "network": network, "mask_layer": asked_for} | found


TABLES = {"by_layer": (by_layer, "own_layers", 2), "several": (several, "own_several", 2),
          "networks": (networks, "own_networks", 3)}  # fmt: skip

if __name__ == "__main__":
    for name in sys.argv[1:] or TABLES:
        measure, block, texts = TABLES[name]
        rows = []
        for row in measure():
            print(*row.values(), flush=True)
            rows.append(row)
        write_block(block, markdown_table(rows[0], [row.values() for row in rows], texts=texts))
