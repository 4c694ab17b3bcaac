"""Measures `unlearn` on classifiers that no setting was chosen on, for several pages and the README.

`uv run docs/own.py` measures all tables, in half an hour. `uv run docs/own.py choice` measures the table of this name.
Fashion-MNIST must be in datasets/FashionMNIST/raw/.
"""

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
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from build import write_block

from data import load_image_data
from experiment.audits import Predictions, probe_metrics
from experiment.config import load_config
from mimu import Mask, RetainScoreError, unlearn
from mimu.samples import Split, some_of_every_class
from model import VisionTransformer
from reporter import markdown_table
from trainer import Trainer

SHAPES = {  # hidden sizes, bias
    "784-128-64-10": ((128, 64), False),
    "784-200-50-10 with biases": ((200, 50), True),
    "784-100-10 with biases": ((100,), True),
    "784-64-10": ((64,), False),
    "784-256-128-64-10 with biases": ((256, 128, 64), True),
}
DIGITS = (0, 3, 7)
TOGETHER = ((3, 7), (7, 3), (0, 8), (4, 9), (9, 4), (3, 5, 8), (8, 3, 5), (1, 4, 7))
SEED = 300  # of the first classifier
Row = dict[str, str]  # of a table, by its columns


def train_perceptron(shape: str, train: Split) -> nn.Module:
    hidden, bias = SHAPES[shape]
    config = replace(load_config().classifier, hidden_sizes=hidden, bias=bias)
    return Trainer(config, SEED + list(SHAPES).index(shape)).train(train, 10)


def images_of(dataset: str) -> tuple[Split, Split]:
    """Returns the training and the test split of a data set, as images (samples, 1, 28, 28)."""
    data = load_image_data(dataset)
    train, test = (Split(split.images.view(-1, 1, 28, 28), split.labels) for split in (data.train, data.test))
    return train, test


def without(classes: Sequence[int], labels: Tensor) -> Tensor:
    """Tells which samples are of none of these classes, (samples)."""
    return torch.isin(labels, torch.tensor(classes), invert=True)


@torch.no_grad()
def is_correct(model: nn.Module, split: Split) -> Tensor:
    """Tells which samples are classified correctly, (samples)."""
    model.eval()
    return torch.cat([model(images).argmax(1) for images in split.images.split(1000)]) == split.labels


def accuracy(correct: Tensor, chosen: Tensor) -> float:
    """Returns the percentage of the chosen samples that are classified correctly."""
    return 100 * correct[chosen].float().mean().item()


def request(
    model: nn.Module, train: Split, forget_class: int | Sequence[int], method: str = "mask", **arguments: Any
) -> tuple[Mask, str]:
    """Returns the mask, or that of a RetainScoreError; and "error", "warning", or "" if there was neither."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            mask = unlearn(model, train.images, train.labels, forget_class, method=method, **arguments)
        except RetainScoreError as error:
            return error.mask, "error"
    return mask, "warning" if caught else ""


class Outcome(NamedTuple):
    """One request on the test split: accuracy in percent, changes of accuracy in percentage points."""

    retain_before: float
    forget: float
    change: float  # of retain accuracy
    worst_change: float  # of the retained class that loses most
    zeroed: int
    seconds: float
    message: str

    @property
    def is_harm(self) -> bool:
        """Tells whether more than 2 % of the class remain, or another class loses six points."""
        return self.forget > 2 or self.worst_change <= -6


def measure(model: nn.Module, train: Split, test: Split, digit: int, **arguments: Any) -> Outcome:
    """Makes one request, and scores its mask."""
    started = time.perf_counter()
    mask, message = request(model, train, digit, **arguments)
    seconds, before = time.perf_counter() - started, is_correct(model, test)
    with mask.applied_to(model):
        after = is_correct(model, test)
    retained, changes = test.labels != digit, []
    for chosen in [retained, *(test.labels == label for label in range(10) if label != digit)]:
        changes.append(accuracy(after, chosen) - accuracy(before, chosen))
    forget, worst_change = accuracy(after, ~retained), min(changes[1:])
    return Outcome(
        accuracy(before, retained), forget, changes[0], worst_change, mask.num_zeroed, seconds, message=message
    )


def messages(outcomes: dict[int, Outcome]) -> str:
    return ", ".join(f"{outcome.message} ({label})" for label, outcome in outcomes.items() if outcome.message)


def requests_for_digits(model: nn.Module, train: Split, test: Split, **arguments: Any) -> Row:
    """Makes a request for each of DIGITS, and returns the figure of the worst, or of each."""
    outcomes = {digit: measure(model, train, test, digit, **arguments) for digit in DIGITS}
    values = outcomes.values()
    return {
        "retain accuracy before, %": f"{max(each.retain_before for each in values):.1f}",
        "forget accuracy, worst, %": f"{max(each.forget for each in values):.2f}",
        "retain accuracy, change, points": " ".join(f"{each.change:+.2f}" for each in values),
        "worst retained class, points": f"{min(each.worst_change for each in values):+.1f}",
        "weights zeroed": " ".join(str(each.zeroed) for each in values),
        "seconds": f"{max(each.seconds for each in values):.0f}",
        "message": messages(outcomes),
    }


def own_layers() -> Iterator[Row]:
    """Masks every single layer, the last two, and all, of the default shape and of a deeper one with biases."""
    data = load_image_data("MNIST")
    for shape in ("784-128-64-10", "784-256-128-64-10 with biases"):
        model = train_perceptron(shape, data.train)
        count = len(model.names)
        last_two = [(count - 2, count - 1)] if count > 2 else []
        for layers in [*range(count), *last_two, None]:
            row = requests_for_digits(model, data.train, data.test, mask_layer=layers)
            del row["retain accuracy before, %"]
            yield {"classifier": shape, "mask_layer": "all" if layers is None else str(layers)} | row


def own_several() -> Iterator[Row]:
    """Forgets classes together, and one after the other, beside a classifier retrained without all of them."""
    data, shape, retrained = load_image_data("MNIST"), "784-128-64-10", {}
    original = train_perceptron(shape, data.train)
    for classes in TOGETHER:
        retained, key = without(classes, data.test.labels), frozenset(classes)
        if key not in retrained:
            model = train_perceptron(shape, data.train[without(classes, data.train.labels)])
            retrained[key] = accuracy(is_correct(model, data.test), retained)
        row = {"classes": " ".join(map(str, classes))}
        for order in ("together", "in a row", "permanent"):
            model = copy.deepcopy(original)
            for step in [classes] if order == "together" else classes:
                mask, message = request(model, data.train, step)
                mask.apply(model, permanent=order == "permanent")
            after = is_correct(model, data.test)
            worst = max(accuracy(after, data.test.labels == label) for label in classes)
            row[f"{order}: forget accuracy, worst, %"] = f"{worst:.2f}"
            row[f"{order}: gap, points"] = f"{accuracy(after, retained) - retrained[key]:+.2f}{message}"
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


def fit(
    model: nn.Module, part: nn.Module, train: Split, epochs: int, learning_rate: float = 0.001, end_factor: float = 1.0
) -> nn.Module:
    """Trains a part of a model in place by Adam; the learning rate changes linearly to end_factor times itself."""
    optimizer, generator = torch.optim.Adam(part.parameters(), learning_rate), torch.Generator().manual_seed(0)
    steps = epochs * -(-len(train.labels) // 128)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, end_factor, steps)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(train.labels), generator=generator).split(128):
            optimizer.zero_grad()
            F.cross_entropy(part(train.images[batch]), train.labels[batch]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def train_head(few: Split) -> nn.Module:
    """Trains two linear layers on the random, standardised features of torchvision's ResNet-18 for grey images."""
    model = torchvision.models.resnet18()
    model.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    model.fc = nn.Sequential(nn.BatchNorm1d(512, affine=False), nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 10))
    body = copy.copy(model)
    body._modules = model._modules | {"fc": nn.Identity()}
    features = torch.cat([body.eval()(batch) for batch in few.images.split(500)])
    with torch.enable_grad():
        return fit(model, model.fc, Split(features, few.labels), 20)


def own_networks() -> Iterator[Row]:
    """Masks the last linear layers of networks; the requests see 1,000 images of every class."""
    for dataset in ("MNIST", "FashionMNIST"):
        train, test = images_of(dataset)
        few = train[torch.cat([(train.labels == label).nonzero()[:1000, 0] for label in range(10)])]
        for network in ("two convolutions", "ResNet-18"):
            torch.manual_seed(SEED)
            if network == "ResNet-18":
                model, scored = train_head(few), test[:2000]
            else:
                model = Convolutional()
                model, scored = fit(model, model, train, 2), test
            row = requests_for_digits(model, few, scored)
            del row["worst retained class, points"], row["weights zeroed"]
            yield {"data set": dataset, "network": network} | row


def transformer() -> nn.Module:
    """Builds the transformer of configs/vit.yaml."""
    return VisionTransformer((1, 28, 28), patch=7, width=64, hidden=128, heads=4, blocks=2, num_classes=10)


def separable(n: int, m: int, stride: int) -> nn.Sequential:
    """Builds a depthwise convolution and one of 1 x 1 behind it (Howard et al. 2017, arXiv:1704.04861)."""
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

    def train(self, samples: Split) -> nn.Module:
        torch.manual_seed(SEED)
        model = self.network().to(memory_format=torch.channels_last)
        return fit(model, model, samples, self.epochs, self.learning_rate, end_factor=0.0)


KINDS = (
    Kind("ViT", transformer, 5, 0.002, ("auto", "head.weight", "blocks.1.linear*", "blocks.1.*")),
    Kind("depthwise", depthwise, 5, 0.004, ("auto", "3.pointwise.weight", "3.*")),
    Kind("ConvNeXt", convnext, 4, 0.003, ("auto", "3.narrow.weight", "3.*")),
)
CLASSES = (0, 4, 6, 9)


def own_kinds() -> Iterator[Row]:
    """Compares a transformer, depthwise convolutions and a ConvNeXt with each retrained without the class."""
    train, test = images_of("FashionMNIST")
    few = some_of_every_class(train, 1000, "kinds")
    for kind in KINDS:
        model, retrained = kind.train(train), {}
        for label in CLASSES:
            retrained[label] = accuracy(is_correct(kind.train(train.retain(label)), test), test.labels != label)
        total = accuracy(is_correct(model, test), test.labels >= 0)
        for layers in kind.mask_layers:
            outcomes = {label: measure(model, few, test, label, mask_layer=layers) for label in CLASSES}
            values = outcomes.values()
            gaps = [each.retain_before + each.change - retrained[label] for label, each in outcomes.items()]
            yield {
                "network": f"{kind.name}, {total:.1f} %",
                "mask_layer": f"`{layers}`",
                "forget accuracy, %": " ".join(f"{each.forget:.2f}" for each in values),
                "gap to retraining, points": " ".join(f"{gap:+.2f}" for gap in gaps),
                "mean": f"{fmean(gaps):+.2f}",
                "weights zeroed": " ".join(str(each.zeroed) for each in values),
                "seconds": f"{max(each.seconds for each in values):.0f}",
                "message": messages(outcomes),
            }


def last_layer(model: nn.Module) -> nn.Linear:
    return [module for module in model.modules() if isinstance(module, nn.Linear)][-1]


@torch.no_grad()
def predictions(model: nn.Module, split: Split) -> Predictions:
    """Records the representation, which is the input of the last layer; predicted classes stand for the logits."""
    features: list[Tensor] = []
    hook = last_layer(model.eval()).register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    predicted = torch.cat([model(batch).argmax(1) for batch in split.images.split(500)])
    hook.remove()
    return Predictions(predicted, (torch.cat(features),), split.labels)


@dataclass
class Chosen:
    """A classifier of the README's table of choices.

    few: the samples of requests and probes
    retrained_bits: by digit the bits in the classifier retrained without it, and in the original
    """

    trainer: Trainer
    train: Split
    few: Split
    test: Split
    retrained_bits: dict[int, tuple[float, float]] = field(default_factory=dict)

    @cached_property
    def original(self) -> nn.Module:
        return self.trainer.train(self.train, 10).network

    def bits(self, model: nn.Module, digit: int) -> float:
        """Returns the most bits about "is it this digit" that a probe finds in the test samples' representation."""
        splits = (predictions(model, split) for split in (self.few, self.test))
        metrics = probe_metrics(*splits, digit, SEED, ("two_layer", "neighbours"))
        return max(metrics["usable_bits"]["representation"].values())

    def cells(self, forget: "Forget", requests: Sequence[list[int]]) -> Row:
        """Makes the requests: worst forget accuracy, means of all else, how many `unlearn` refused."""
        labels, rows, refused = self.test.labels, [], 0
        before = predictions(self.original, self.test).logits == labels
        for classes in requests:
            started = time.perf_counter()
            try:
                model = forget(self, classes)
            except RetainScoreError:
                refused += 1
                continue
            seconds = time.perf_counter() - started
            after, retained = predictions(model, self.test).logits == labels, without(classes, labels)
            worst = max(accuracy(after, labels == label) for label in classes)
            excess = full_excess = math.nan
            if len(classes) == 1:
                digit, bits = classes[0], self.bits(model, classes[0])
                if digit not in self.retrained_bits:  # the first row of CHOICES is retraining
                    self.retrained_bits[digit] = bits, self.bits(self.original, digit)
                retrained, original = self.retrained_bits[digit]
                excess, full_excess = bits - retrained, original - retrained
            change = accuracy(after, retained) - accuracy(before, retained)
            rows.append([worst, change, excess, full_excess, seconds])
        worst, change, excess, full_excess, seconds = torch.tensor(rows).T
        return {
            "forget accuracy, %": f"{worst.max():.1f}" + f" ({refused} refused)" * bool(refused),
            "retain accuracy, change, points": f"{change.mean():+.1f}",
            "IDI": "–" if excess.isnan().any() else f"{excess.sum() / full_excess.sum():+.1f}",
            "seconds": f"{seconds.mean():.1f}",
        }


Forget = Callable[[Chosen, list[int]], nn.Module]  # returns a model without these classes


def by_retraining(chosen: Chosen, classes: list[int]) -> nn.Module:
    return chosen.trainer.train(chosen.train.retain(*classes), 10).network


def by_hiding(chosen: Chosen, classes: list[int]) -> nn.Module:
    """Hides classes without samples, in the last layer by name."""
    model = copy.deepcopy(chosen.original)
    name = next(name for name, module in model.named_modules() if module is last_layer(model))
    unlearn(model, forget_class=classes, method="hide", mask_layer=name).apply(model)
    return model


def by_output_row(chosen: Chosen, classes: list[int]) -> nn.Module:
    """Zeroes the output weights of classes."""
    model = copy.deepcopy(chosen.original)
    last_layer(model).weight.data[classes] = 0
    return model


def by_removed_logit(chosen: Chosen, classes: list[int]) -> nn.Module:
    """Sets the logits of classes to minus infinity."""
    model = copy.deepcopy(chosen.original)
    model.register_forward_hook(lambda _, images, logits: logits.index_fill(1, torch.tensor(classes), -torch.inf))
    return model


def by_unlearn(samples: int, method: str) -> Forget:
    """Calls `unlearn` with this many samples of every class."""

    def forget(chosen: Chosen, classes: list[int]) -> nn.Module:
        model = copy.deepcopy(chosen.original)
        train = some_of_every_class(chosen.few, samples, "choice")
        unlearn(model, train.images, train.labels, classes, method=method).apply(model)
        return model

    return forget


SINGLE, TWO = [[digit] for digit in DIGITS], [list(TOGETHER[0])]
ERASE, MASK = "`unlearn(model, inputs, labels, 3)`", '`unlearn(model, inputs, labels, 3, method="mask")`'
SEVERAL = '`unlearn(model, inputs, labels, [3, 7], method="mask")`'
HIDE = '`unlearn(model, forget_class=3, method="hide", mask_layer="fc")`'
PUBLISH = "`unlearn(model, inputs, labels, [3, 7]).apply(model, permanent=True)`"
CHOICES: tuple[tuple[str, str, Forget | None, Sequence[list[int]]], ...] = (  # retraining first: IDI needs its bits
    ("retraining is cheap", "train without the class", by_retraining, SINGLE),
    ("a mask, by 1,000 samples per class", MASK, by_unlearn(1000, "mask"), SINGLE),
    ("the same for several classes", SEVERAL, by_unlearn(1000, "mask"), TWO),
    ("ten samples per class", MASK, by_unlearn(10, "mask"), SINGLE),
    ("no samples", HIDE, by_hiding, SINGLE),
    ("the same by hand: `output_row`", "`last.weight.data[3] = 0`", by_output_row, SINGLE),
    ("the same by hand: `logit_removed`", "`logits[:, 3] = -math.inf`", by_removed_logit, SINGLE),
    ("the class must also leave the representation", ERASE, by_unlearn(1000, "erase"), SINGLE),
    ("to restore the class next week", "`mask.apply(model)`, then `mask.remove(model)`", None, ()),
    ("to make it permanent", PUBLISH, None, ()),
)


def choice() -> Iterator[Row]:
    """Measures every choice on a perceptron, a CNN and a ResNet."""
    data, config = load_image_data("MNIST"), load_config()
    few = some_of_every_class(data.train, 1000, "choice")
    base = replace(config.classifier, epochs=4, batch_size=128)
    cnn = replace(base, architecture="cnn", hidden_sizes=(64,), channels=(8, 16), bias=True)
    resnet = replace(base, architecture="resnet", channels=(8, 16, 32))
    classifiers = []
    for settings, train in ((config.classifier, data.train), (cnn, few), (resnet, few)):
        classifiers.append(Chosen(Trainer(settings, SEED, config.source.size), train, few, data.test))
    for situation, call, forget, requests in CHOICES:
        row = {"you have, or want": situation, "call": call}
        if forget is not None:
            rows = [chosen.cells(forget, requests) for chosen in classifiers]
            columns = {column: " / ".join(cells[column] for cells in rows) for column in rows[0]}
        else:
            columns = dict.fromkeys(columns, "")
        yield row | columns


def normalised() -> nn.Module:
    """Builds a network as `Convolutional`, with batch normalisation."""
    layers: list[nn.Module] = []
    for n, m in ((1, 16), (16, 32)):
        layers += [nn.Conv2d(n, m, 3, padding=1), nn.BatchNorm2d(m), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 49, 64), nn.ReLU(), nn.Linear(64, 10))


def perceptron_on_images(shape: str, train: Split) -> nn.Module:
    """Trains a perceptron that takes images (samples, 1, 28, 28)."""
    flat = Split(train.images.flatten(1), train.labels)
    return nn.Sequential(nn.Flatten(), train_perceptron(shape, flat).network)


def own_few() -> Iterator[Row]:
    """Makes twelve requests for each number of samples, and counts which do harm, and which report it."""
    train, test = images_of("MNIST")
    torch.manual_seed(SEED)
    models = [fit(model, model, train, 1) for model in (Convolutional(), normalised())]
    models += [perceptron_on_images(shape, train) for shape in ("784-100-10 with biases", "784-200-50-10 with biases")]
    for samples in (1, 2, 3, 5, 10):
        for erase in (False, True):
            outcomes = []
            for place, (model, digit) in enumerate(itertools.product(models, (3, 5, 8))):
                few = some_of_every_class(train, samples, "few", place)
                outcomes.append(measure(model, few, test, digit, method="erase" if erase else "mask"))
            harmful = [each for each in outcomes if each.is_harm]
            needless = [each for each in outcomes if each.message == "error" and each.change > -1]
            yield {
                "samples a class": str(samples),
                "call": "erase" if erase else "mask",
                "harm": str(len(harmful)),
                "harm without a message": str(sum(not each.message for each in harmful)),
                "errors at less than a point": str(len(needless)),
                "warnings without harm": str(sum(each.message == "warning" and not each.is_harm for each in outcomes)),
                "seconds": f"{fmean(each.seconds for each in outcomes):.1f}",
            }


def own_training() -> Iterator[Row]:
    """Trains unlearned classifiers for five epochs more, and measures how much of the class is learned again."""
    data = load_image_data("MNIST")
    few = some_of_every_class(data.train, 100, "training")
    for shape in ("784-128-64-10", "784-200-50-10 with biases"):
        original = train_perceptron(shape, data.train)
        for method in ("hide", "mask", "erase"):
            outcomes = []
            for digit in DIGITS:
                mask, _ = request(original, data.train, digit, method)
                trainings = (few, False), (few, True), (data.train, False), (data.train.retain(digit), False)
                figures, is_forget = [], data.test.labels == digit
                for samples, permanent in trainings:
                    model = copy.deepcopy(original)
                    mask.apply(model, permanent)
                    before = is_correct(model, data.test)
                    after = is_correct(fit(model, model, samples, 5), data.test)
                    change = accuracy(after, ~is_forget) - accuracy(before, ~is_forget)
                    figures += [accuracy(after, is_forget), change]
                outcomes.append(figures)
            means = torch.tensor(outcomes).mean(0)
            row = {"classifier": shape, "method": method}
            for place, kind in enumerate(("100 of each class", "100, permanent", "all samples", "without the class")):
                row[kind] = f"{means[2 * place]:.1f} ({means[2 * place + 1]:+.1f})"
            yield row


TABLES = {
    table.__name__: table for table in (own_layers, own_several, own_networks, choice, own_kinds, own_few, own_training)
}

if __name__ == "__main__":
    torch.set_num_threads(1)  # as in runs
    for name in sys.argv[1:] or TABLES:
        rows = []
        for row in TABLES[name]():
            print(*row.values(), flush=True)
            rows.append(row)
        write_block(name, markdown_table(rows[0], [row.values() for row in rows], texts=2))
