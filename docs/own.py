"""Measures `unlearn` on classifiers that no setting was chosen on, and writes docs/own.md: `uv run docs/own.py`.

It takes half an hour, and Fashion-MNIST in datasets/FashionMNIST/raw/. With names of tables it measures those.
"""

from __future__ import annotations

import copy
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
import torchvision
from build import write_block
from torch import Tensor, nn

from mimu.configs import load_config
from mimu.data import ImageData, Split, load_image_data
from mimu.model import Mask
from mimu.reporter import markdown_table
from mimu.trainer import Trainer
from mimu.unlearning import RetainScoreError, unlearn

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
def scores(model: nn.Module, split: Split, classes: Sequence[int], shape: tuple[int, ...] = (784,)) -> list[float]:
    """Percent of each class's samples that are classified correctly, and of the samples of all others."""
    model.eval()
    found = torch.cat([model(images.view(-1, *shape)).argmax(1) for images in split.images.split(1000)]) == split.labels
    others = torch.isin(split.labels, torch.tensor(classes), invert=True)
    return [100 * found[each].float().mean().item() for each in [*(split.labels == c for c in classes), others]]


def asked(request: Callable[[], Mask]) -> tuple[Mask, str, float]:
    """The mask of a request, or the one of its error; what it said; and its seconds."""
    started, said = time.perf_counter(), ""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            mask = request()
        except RetainScoreError as error:
            mask, said = error.mask, "error"
    return mask, said or ("left" if warned else ""), time.perf_counter() - started


def by_layer(data: ImageData) -> Iterator[tuple[str, str]]:
    """Every single layer, the last two, and all."""
    rows = []
    for shape in SHAPES:
        model = trainer(shape).train(data.train, 10)
        count = len(model.layers)
        chosen: list = [*range(count), *([(count - 2, count - 1)] if count > 2 else []), None]
        for layers in chosen:
            figures, said = [], []
            for digit in DIGITS:
                mask, word, seconds = asked(partial(unlearn, model, *samples(data.train), digit, mask_layer=layers))
                before = [scores(model, data.test, [c])[0] for c in range(10)]
                _, retain_before = scores(model, data.test, [digit])
                with mask.applied_to(model):
                    after = [scores(model, data.test, [c])[0] for c in range(10)]
                    forget, retain = scores(model, data.test, [digit])
                fall = max(b - a for c, (b, a) in enumerate(zip(before, after)) if c != digit)
                figures.append((forget, retain - retain_before, -fall, mask.num_zeroed, seconds))
                said += [f"{word} ({digit})"] if word else []
            forget, retain, worst, zeroed, seconds = zip(*figures)
            cells = f"{max(forget):.2f}", " ".join(f"{each:+.2f}" for each in retain), f"{min(worst):+.1f}"
            name = "all" if layers is None else str(layers)
            more = " ".join(map(str, zeroed)), f"{max(seconds):.0f}", ", ".join(said)
            rows.append([shape, name, *cells, *more])
            print(*rows[-1], flush=True)
    header = ["classifier", "mask_layer", "forget, worst", "others, points, each digit", "any other class, worst"]
    header += ["weights zeroed", "seconds", "said"]
    yield "own_layers", markdown_table(header, rows, texts=2)


def several(data: ImageData) -> Iterator[tuple[str, str]]:
    """Classes together, and one after the other, beside a classifier retrained without all of them."""
    rows = []
    for shape in (name for name in SHAPES if name.count("-") > 2):
        original = trainer(shape).train(data.train, 10)
        retrained: dict[frozenset, float] = {}
        for classes in TOGETHER:
            if frozenset(classes) not in retrained:
                kept = torch.isin(data.train.labels, torch.tensor(classes), invert=True)
                retrained[frozenset(classes)] = scores(trainer(shape).train(data.train[kept], 10), data.test, classes)[
                    -1
                ]
            cells = []
            for way in ("together", "in a row", "in a row, permanent"):
                model = copy.deepcopy(original)
                for step in [classes] if way == "together" else classes:
                    mask, word, _ = asked(partial(unlearn, model, *samples(data.train), step))
                    mask.apply(model, permanent="permanent" in way)
                *forget, retain = scores(model, data.test, classes)
                cells += [f"{max(forget):.2f}", f"{retain - retrained[frozenset(classes)]:+.2f}{word}"]
            rows.append([shape, " ".join(map(str, classes)), *cells])
            print(*rows[-1], flush=True)
    header = ["classifier", "classes"]
    header += [f"{way}{of}" for way in ("together", "in a row", "permanent") for of in (": forget, worst", ": others")]
    yield "own_several", markdown_table(header, rows, texts=2)


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


def networks(_: ImageData) -> Iterator[tuple[str, str]]:
    """Networks whose last linear layers are what is masked; requests on 1,000 images of every class."""
    rows = []
    for name in ("MNIST", "FashionMNIST"):
        data = load_image_data(name)
        few = torch.cat([(data.train.labels == label).nonzero()[:1000, 0] for label in range(10)])
        for network in ("two convolutions", "ResNet-18"):
            torch.manual_seed(SEED)
            train, test = data.train[few], data.test if network != "ResNet-18" else data.test[:2000]
            images = train.images.view(-1, 1, 28, 28)
            if network == "ResNet-18":
                model = resnet()
                fit(model, model.fc, features(model, images), train.labels, 20)
            else:
                model = Convolutional()
                fit(model, model, data.train.images.view(-1, 1, 28, 28), data.train.labels, 2)
            for layers, bounds in (("auto", {}), ("auto", {"max_class_fall": None})):
                figures, said = [], []
                for label in DIGITS:
                    request = partial(unlearn, model, images, train.labels, label, mask_layer=layers, **bounds)
                    mask, word, seconds = asked(request)
                    _, before = scores(model, test, [label], (1, 28, 28))
                    with mask.applied_to(model):
                        forget, retain = scores(model, test, [label], (1, 28, 28))
                    figures.append((forget, retain - before, before, seconds))
                    said += [f"{word} ({label})"] if word else []
                forget, retain, before, seconds = zip(*figures)
                cells = f"{max(before):.1f}", f"{max(forget):.2f}", " ".join(f"{each:+.2f}" for each in retain)
                asked_for = f"{layers}{', no max_class_fall' if bounds else ''}"
                rows.append([name, network, asked_for, *cells, f"{max(seconds):.0f}", ", ".join(said)])
                print(*rows[-1], flush=True)
    header = ["data set", "network", "mask_layer", "others before, %", "forget, worst", "others, points, each class"]
    yield "own_networks", markdown_table([*header, "seconds", "said"], rows, texts=3)


def samples(split: Split) -> tuple[Tensor, Tensor]:
    return split.images, split.labels


if __name__ == "__main__":
    measures = {measure.__name__: measure for measure in (by_layer, several, networks)}
    mnist = load_image_data("MNIST")
    for name in sys.argv[1:] or measures:
        for block, table in measures[name](mnist):
            write_block(block, table)
