"""Measures `unlearn` on classifiers that no setting was chosen on: `uv run docs/own.py`.

It writes docs/own.md, and `choice`, five minutes of an idle core, into the README. All of it takes half an hour, and
Fashion-MNIST in datasets/FashionMNIST/raw/. With names of tables it measures those.
"""

from __future__ import annotations

import copy
import itertools
import math
import sys
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import fmean
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from build import write_block
from torch import Tensor, nn

from audits import Predictions, probe_metrics
from data import load_image_data
from experiment.config import load_config
from mimu import Mask, RetainScoreError, unlearn
from mimu.samples import Split, some_of_every_class
from model import VisionTransformer
from reporter import markdown_table
from trainer import Trainer

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
        count = len(model.names)
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


def fit(
    model: nn.Module,
    part: nn.Module,
    images: Tensor,
    labels: Tensor,
    epochs: int,
    learning_rate: float = 0.001,
    end_factor: float = 1.0,
) -> nn.Module:
    """Trains a part of a model in place, by Adam; end_factor: of the learning rate, which changes linearly."""
    optimizer, generator = torch.optim.Adam(part.parameters(), learning_rate), torch.Generator().manual_seed(0)
    steps = epochs * -(-len(labels) // 128)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, end_factor, steps)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(labels), generator=generator).split(128):
            optimizer.zero_grad()
            F.cross_entropy(part(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
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


def transformer() -> nn.Module:
    """That of configs/vit.yaml."""
    return VisionTransformer((1, 28, 28), patch=7, width=64, hidden=128, heads=4, blocks=2, num_classes=10)


def separable(n: int, m: int, stride: int) -> nn.Sequential:
    """A convolution of each channel by itself, then one of 1 x 1 (Howard et al. 2017, arXiv:1704.04861)."""
    layers = {
        "depthwise": nn.Conv2d(n, n, 3, stride, 1, groups=n, bias=False),
        "norm1": nn.BatchNorm2d(n),
        "relu1": nn.ReLU(),
        "pointwise": nn.Conv2d(n, m, 1, bias=False),
        "norm2": nn.BatchNorm2d(m),
        "relu2": nn.ReLU(),
    }
    return nn.Sequential(OrderedDict(layers))


def depthwise() -> nn.Module:
    stem = nn.Sequential(nn.Conv2d(1, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    blocks = separable(16, 32, 1), separable(32, 64, 2), separable(64, 64, 1)
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


class ConvNeXtBlock(nn.Module):
    """A depthwise convolution and two linear layers on its channels, added to its input (arXiv:2201.03545)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.norm = nn.LayerNorm(width)
        self.wide, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + self.narrow(F.gelu(self.wide(inner))).permute(0, 3, 1, 2)


def convnext() -> nn.Module:
    layers = [nn.Conv2d(1, 48, 4, 4), ConvNeXtBlock(48), ConvNeXtBlock(48), ConvNeXtBlock(48)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(48), nn.Linear(48, 10))


class Kind(NamedTuple):
    """A network of the user's own, how it is trained, and the layers that are masked, one row for each."""

    name: str
    network: Callable[[], nn.Module]
    epochs: int
    learning_rate: float
    mask_layers: Sequence[str]

    def trained(self, train: Split) -> nn.Module:
        torch.manual_seed(SEED)
        model = self.network().to(memory_format=torch.channels_last)
        return fit(model, model, train.images, train.labels, self.epochs, self.learning_rate, end_factor=0.0)


KINDS = (
    Kind("ViT", transformer, 5, 0.002, ("auto", "head.weight", "blocks.1.linear*", "blocks.1.*")),
    Kind("depthwise", depthwise, 5, 0.004, ("auto", "3.pointwise.weight", "3.*")),
    Kind("ConvNeXt", convnext, 4, 0.003, ("auto", "3.narrow.weight", "3.*")),
)
CLASSES = (0, 4, 6, 9)


def kinds() -> Iterator[dict[str, str]]:
    """A transformer, depthwise convolutions, a ConvNeXt, on Fashion-MNIST, beside each retrained without the class."""
    data = load_image_data("FashionMNIST")
    train, test = (Split(part.images.view(-1, 1, 28, 28), part.labels) for part in (data.train, data.test))
    few = some_of_every_class(train, 1000, "kinds")
    for kind in KINDS:
        model, retrained = kind.trained(train), {}
        for each in CLASSES:
            retrained[each] = score(is_correct(kind.trained(train.retain(each)), test), test.labels != each)
        accuracy = score(is_correct(model, test), test.labels >= 0)
        for layers in kind.mask_layers:
            found = {each: measured(model, few, test, each, mask_layer=layers) for each in CLASSES}
            gaps = [cells["before"] + cells["others"] - retrained[each] for each, cells in found.items()]
            rows = found.values()
            yield {
                "network": f"{kind.name}, {accuracy:.1f} %",
                "mask_layer": f"`{layers}`",
                "forget, %, each class": " ".join(f"{each['forget']:.2f}" for each in rows),
                "others against retrained, points": " ".join(f"{gap:+.2f}" for gap in gaps),
                "mean": f"{fmean(gaps):+.2f}",
                "weights zeroed": " ".join(str(each["zeroed"]) for each in rows),
                "seconds": f"{max(each['seconds'] for each in rows):.0f}",
                "said": ", ".join(each["said"] for each in rows if each["said"]),
            }


def last_layer(model: nn.Module) -> nn.Linear:
    return [module for module in model.modules() if isinstance(module, nn.Linear)][-1]


@torch.no_grad()
def looked_into(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """The representation, which the last layer is given, (samples, n), and the classes that a model names (samples)."""
    given: list[Tensor] = []
    hook = last_layer(model.eval()).register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    named = [model(batch).argmax(1) for batch in images.split(500)]
    hook.remove()
    return torch.cat(given), torch.cat(named)


@dataclass
class Chosen:
    """A classifier of the README's table of choices: how and on what it is trained, and what requests are made with.

    few: the samples of requests and probes
    found: by digit the bits in the classifier retrained without it, once that was done, and in the original
    """

    name: str
    trainer: Trainer
    train: Split
    few: Split
    test: Split
    found: dict[int, tuple[float, float]] = field(default_factory=dict)

    @cached_property
    def original(self) -> nn.Module:
        return self.trainer.train(self.train, 10).network

    def bits(self, model: nn.Module, digit: int) -> float:
        """The most bits about "is it this digit" that a probe finds in the representation of the test samples."""
        seen = []
        for split in (self.few, self.test):
            features, logits = looked_into(model, split.images)
            seen.append(Predictions(logits, (features,), split.labels))
        metrics = probe_metrics(*seen, digit, SEED, ("two_layer", "neighbours"))
        return max(metrics["usable_bits"]["representation"].values())

    def cells(self, forget: Way, requests: Sequence[list[int]]) -> dict[str, str]:
        """Of the requests: the worst of what is left, and the means of the rest; how many `unlearn` refused."""
        labels, rows, refused = self.test.labels, [], 0
        before = looked_into(self.original, self.test.images)[1] == labels
        for classes in requests:
            started = time.perf_counter()
            try:
                model = forget(self, classes)
            except RetainScoreError:
                refused += 1
                continue
            seconds = time.perf_counter() - started
            after = looked_into(model, self.test.images)[1] == labels
            is_other = torch.isin(labels, torch.tensor(classes), invert=True)
            left = max(score(after, labels == each) for each in classes)
            excess = to_forget = math.nan
            if len(classes) == 1:
                digit, bits = classes[0], self.bits(model, classes[0])
                if digit not in self.found:  # the first way to forget is retraining
                    self.found[digit] = bits, self.bits(self.original, digit)
                retrained, known = self.found[digit]
                excess, to_forget = bits - retrained, known - retrained
            rows.append([left, score(after, is_other) - score(before, is_other), excess, to_forget, seconds])
        left, others, excess, to_forget, seconds = torch.tensor(rows).T
        return {
            "left of the class, %": f"{left.max():.1f}" + f" ({refused} refused)" * bool(refused),
            "others, points": f"{others.mean():+.1f}",
            "IDI": "–" if excess.isnan().any() else f"{excess.sum() / to_forget.sum():+.1f}",
            "seconds": f"{seconds.mean():.1f}",
        }


Way = Callable[[Chosen, list[int]], nn.Module]  # to forget classes: gives a model without them


def by_retraining(chosen: Chosen, classes: list[int]) -> nn.Module:
    return chosen.trainer.train(chosen.train.retain(*classes), 10).network


def by_hand(chosen: Chosen, classes: list[int]) -> nn.Module:
    """Without a sample: zeros the rows of the last layer; where it has biases, these keep the classes out."""
    model = copy.deepcopy(chosen.original)
    last = last_layer(model)
    last.weight.data[classes] = 0
    if last.bias is not None:
        last.bias.data[classes] = -1e4
    return model


def by_unlearn(samples: int, **asked: Any) -> Way:
    """With so many samples of every class."""

    def forget(chosen: Chosen, classes: list[int]) -> nn.Module:
        model = copy.deepcopy(chosen.original)
        train = some_of_every_class(chosen.few, samples, "choice")
        unlearn(model, train.images, train.labels, classes, **asked).apply(model)
        return model

    return forget


SINGLE, TWO = [[digit] for digit in DIGITS], [list(TOGETHER[0])]
MASK, ERASE = "`unlearn(model, inputs, labels, 3)`", "`unlearn(model, inputs, labels, 3, erase=True)`"
CHOICES: tuple[tuple[str, str, Way, Sequence[list[int]]], ...] = (  # retraining first, which the others stand beside
    ("retraining is cheap", "train without the class", by_retraining, SINGLE),
    ("some thousand samples; hidden is enough", MASK, by_unlearn(1000), SINGLE),
    ("the same, several classes", "`unlearn(model, inputs, labels, [3, 7])`", by_unlearn(1000), TWO),
    ("ten samples a class", MASK, by_unlearn(10), SINGLE),
    ("no data: nothing here, by hand", "`last.weight.data[3] = 0; last.bias.data[3] = -1e4`", by_hand, SINGLE),
    ("gone from the representation, too", ERASE, by_unlearn(1000, erase=True), SINGLE),
)
MORE_CHOICES = (
    ("to be taken back next week", "`mask.apply(model)`, then `mask.remove(model)`"),
    (
        "for good, the file to be published",
        "`unlearn(model, inputs, labels, [3, 7], erase=True).apply(model, permanent=True)`",
    ),
    ("evidence beside retraining", "`uv run main.py`, [your data](#configuration-runs-and-artifacts)"),
)


def choice() -> Iterator[dict[str, str]]:
    """What each way to forget leaves, costs and takes, on a perceptron, a CNN and a ResNet."""
    data, config = load_image_data("MNIST"), load_config()
    few = some_of_every_class(data.train, 1000, "choice")
    of_few = replace(config.classifier, epochs=4, batch_size=128)
    configs = {
        "perceptron": config.classifier,
        "CNN": replace(of_few, architecture="cnn", hidden_sizes=(64,), channels=(8, 16), bias=True),
        "ResNet": replace(of_few, architecture="resnet", channels=(8, 16, 32)),
    }
    classifiers = []
    for name, of_classifier in configs.items():
        trainer = Trainer(of_classifier, SEED, config.source.size)
        classifiers.append(Chosen(name, trainer, data.train if name == "perceptron" else few, few, data.test))
    for wanted, call, forget, requests in CHOICES:
        found = [chosen.cells(forget, requests) for chosen in classifiers]
        columns = {column: " / ".join(cells[column] for cells in found) for column in found[0]}
        row = {"you have, or want": wanted, "call": call} | columns
        yield row
    for wanted, call in MORE_CHOICES:
        yield dict.fromkeys(row, "") | {"you have, or want": wanted, "call": call}


def normalised() -> nn.Module:
    """As `Convolutional`, with batch normalisation."""
    layers: list[nn.Module] = []
    for channels, given in ((16, 1), (32, 16)):
        layers += [nn.Conv2d(given, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 49, 64), nn.ReLU(), nn.Linear(64, 10))


def on_images(shape: str, train: Split) -> nn.Module:
    """A perceptron that takes images (samples, 1, 28, 28)."""
    return nn.Sequential(nn.Flatten(), trainer(shape).train(Split(train.images.flatten(1), train.labels), 10).network)


def with_few_samples() -> Iterator[dict[str, str]]:
    """Twelve requests for each number of samples: what of their harm they say, and what they say without harm."""
    data = load_image_data("MNIST")
    train, test = (Split(part.images.view(-1, 1, 28, 28), part.labels) for part in (data.train, data.test))
    torch.manual_seed(SEED)
    models = [fit(model, model, train.images, train.labels, 1) for model in (Convolutional(), normalised())]
    models += [on_images(shape, train) for shape in ("784-100-10 with biases", "784-200-50-10 with biases")]
    for samples in (1, 2, 3, 5, 10):
        for erase in (False, True):
            requests = []
            for place, (model, digit) in enumerate(itertools.product(models, (3, 5, 8))):
                few = some_of_every_class(train, samples, "few", place)
                found = measured(model, few, test, digit, erase=erase)
                is_harm = found["forget"] > 2 or found["any other"] <= -6
                kind = found["said"].partition(" ")[0]
                requests.append((is_harm, kind, kind == "error" and found["others"] > -1, found["seconds"]))
            yield {
                "samples a class": str(samples),
                "call": "erase" if erase else "mask",
                "harm": str(sum(is_harm for is_harm, *_ in requests)),
                "harm without a word": str(sum(is_harm and not kind for is_harm, kind, *_ in requests)),
                "errors at less than a point": str(sum(is_needless for *_, is_needless, _ in requests)),
                "warnings without harm": str(sum(kind == "left" and not is_harm for is_harm, kind, *_ in requests)),
                "seconds": f"{sum(seconds for *_, seconds in requests) / len(requests):.1f}",
            }


TABLES = {"by_layer": (by_layer, "own_layers", 2), "several": (several, "own_several", 2),
          "networks": (networks, "own_networks", 3), "choice": (choice, "choice", 2), "kinds": (kinds, "own_kinds", 2),
          "with_few_samples": (with_few_samples, "own_few", 2)}  # fmt: skip

if __name__ == "__main__":
    torch.set_num_threads(1)  # as in runs
    for name in sys.argv[1:] or TABLES:
        measure, block, texts = TABLES[name]
        rows = []
        for row in measure():
            print(*row.values(), flush=True)
            rows.append(row)
        write_block(block, markdown_table(rows[0], [row.values() for row in rows], texts=texts))
