"""The audits of the experiment: what a classifier still reveals of a class, and how far the retrained one is.

All of them stand in the table AUDITS at the end: a new one is one entry there.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import ImageData
from mimu.auditing import jensen_shannon, loss_attack
from mimu.masks import Mask
from mimu.probes import linear, neighbours, two_layer, usable_bits
from mimu.samples import Split, is_correct, some_of_every_class
from mimu.seeds import seeded
from mimu.settings import Count
from mimu.subjects import relearn

BATCH_SIZE = 128  # of the forget class's training samples, from which it is relearned
LEARNING_RATE = 0.0003  # of SGD on these batches
LEARNING_RATE_FROM_FEW = 0.003  # where every step sees all of a few samples
PROBES = {"linear": linear, "two_layer": two_layer, "neighbours": neighbours}


@dataclass(frozen=True)
class Predictions:
    """The outputs and the representations of a classifier on a split, on the CPU."""

    logits: Tensor  # (samples, classes)
    # Inputs of the linear layers after the first, (samples, n) each, the representation last. Where only one layer
    # reads features, the inputs of the layer before it precede them, averaged over tokens or pixels.
    hidden: tuple[Tensor, ...]
    labels: Tensor  # (samples)

    @property
    def correct(self) -> Tensor:
        """1 for each sample that is classified correctly, else 0, (samples)."""
        return is_correct(self.logits, self.labels).double()

    @property
    def loss(self) -> Tensor:
        """Cross entropy of every sample, (samples), nats, in double precision."""
        return F.cross_entropy(self.logits.double(), self.labels, reduction="none")

    @property
    def has_diverged(self) -> bool:
        """True where an output is infinite or not a number; a logit of minus infinity is a removed class."""
        return not (self.hidden[-1].isfinite().all() and (self.logits < torch.inf).all())


@torch.no_grad()
def predictions_of(model: nn.Module, split: Split) -> Predictions:
    """Runs a classifier of one or several linear layers on a split."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    # The representation of a classifier of one layer are the images themselves.
    features, means = ({layer: [] for layer in layers[1:] or layers} for _ in range(2))

    def record(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        if x.ndim == 2:
            return features[layer].append(x)
        # (samples, n, rows, columns) or (samples, tokens, n)
        means[layer].append(x.mean((2, 3)) if isinstance(layer, nn.Conv2d) else x.flatten(1, -2).mean(1))

    hooks = [layer.register_forward_pre_hook(record) for layer in features]
    logits = torch.cat([model(images) for images in split.images.split(10_000)])
    for hook in hooks:
        hook.remove()
    hidden, averaged = (list(filter(None, parts.values())) for parts in (features, means))
    if len(hidden) == 1:
        hidden = averaged[-1:] + hidden
    return Predictions(logits.cpu(), tuple(torch.cat(parts).cpu() for parts in hidden), split.labels.cpu())


@dataclass(frozen=True)
class AuditConfig:
    """Settings of the audits."""

    enabled: bool
    # Those that run beside the linear ones; `hidden`: all of them on layers before the last, too.
    probes: tuple[Literal["two_layer", "neighbours", "hidden"], ...]
    samples: Count | None  # training samples of every class that attacks and probes have; None: all
    relearn_steps: Count  # at most
    relearn_from: tuple[Count, ...]  # sizes of training sets, in samples of every class


@dataclass
class Audit:
    """Audits the classifiers of one request, beside the original and, where there is one, the retrained classifier."""

    config: AuditConfig
    data: ImageData
    forget_class: int
    seed: int
    original: nn.Module
    retrained: nn.Module | None

    def __post_init__(self) -> None:
        self.train = self.data.train
        if self.config.samples is not None:
            self.train = some_of_every_class(self.train, self.config.samples, "audit", self.seed)
        original = predictions_of(self.original, self.data.test)
        # Relearning goes on until the class has half of the original's test accuracy again.
        self.goal = 50 * original.correct[original.labels == self.forget_class].mean().item()
        self.reference = None if self.retrained is None else predictions_of(self.retrained, self.data.test)

    def __call__(self, model: nn.Module) -> dict[str, Any]:
        """Runs all audits on one classifier; where it has diverged, all but `weights_changed` are None.

        Where audits are not enabled, it measures the divergence from the retrained classifier alone.
        """
        test = predictions_of(model, self.data.test)
        if not self.config.enabled:
            return {"js_forget": self.divergence(test, True), "js_retain": self.divergence(test, False)}
        train = predictions_of(model, self.train)
        case = Case(self, model, train, test, train.labels == self.forget_class, test.labels == self.forget_class)
        names = ["weights_changed"] if train.has_diverged or test.has_diverged else AUDITS
        return dict.fromkeys(AUDITS) | {name: AUDITS[name].measure(case) for name in names}

    def divergence(self, test: Predictions, is_forget_set: bool) -> float | None:
        """Returns the divergence from the retrained classifier on a set of test samples, bits; None without one."""
        if self.reference is None or test.has_diverged:
            return None
        chosen = (test.labels == self.forget_class) == is_forget_set
        return jensen_shannon(test.logits[chosen], self.reference.logits[chosen])

    def columns(self) -> dict[str, dict[str, str]]:
        """Returns the title and the number format of every enabled audit that has a column in tables, by its name."""
        titled = AUDITS.items() if self.config.enabled else ()
        return {name: {"title": each.title, "spec": each.spec} for name, each in titled if each.title}


@dataclass
class Case:
    """A classifier to audit, and its predictions on an attacker's training samples and on the test split."""

    audit: Audit
    model: nn.Module
    train: Predictions
    test: Predictions
    is_member: Tensor  # the training samples of the forget class
    is_forget: Tensor  # the test samples of the forget class

    @cached_property
    def probes(self) -> dict[str, Any]:
        audit = self.audit
        return probe_metrics(self.train, self.test, audit.forget_class, audit.seed, audit.config.probes)

    @cached_property
    def relearned(self) -> tuple[int | None, list[float]]:
        """The results of `relearn` on random batches of the class's training samples."""
        forget = self.audit.data.train.forget(self.audit.forget_class)
        return relearned(self, LEARNING_RATE, forget.batches(BATCH_SIZE, seeded("relearn", self.audit.seed)))


def entropy_attack(case: Case) -> float:
    """Membership inference by the entropy of predictions: percent of the class's training samples taken for members.

    A logistic regression, both kinds with the same weight in all, learns from the training samples of the retained
    classes (members) and the test split (non-members). Not a number where all entropies are the same. Foster et al.
    2023, arXiv:2308.07707, after arXiv:2205.08096.
    """
    train, test = (torch.special.entr(each.logits.double().softmax(1)).sum(1) for each in (case.train, case.test))
    members = train[~case.is_member]
    x = torch.cat([members, test])
    if x.max() == x.min():
        return math.nan
    is_member = torch.cat([torch.ones_like(members), torch.zeros_like(test)])
    weight = is_member * len(x) / (2 * len(members)) + (1 - is_member) * len(x) / (2 * len(test))
    inputs = torch.stack([x, torch.ones_like(x)], 1)
    solution, penalty = x.new_zeros(2), x.new_tensor([1.0, 0.0])  # of the slope alone, as in scikit-learn
    for _ in range(30):  # Newton's method, which converges in far fewer steps
        p = (inputs @ solution).sigmoid()
        gradient = inputs.T @ (weight * (p - is_member)) + penalty * solution
        hessian = inputs.T @ (inputs * (weight * p * (1 - p))[:, None]) + torch.diag(penalty)
        solution = solution - torch.linalg.solve(hessian + 1e-9 * torch.eye(2).to(hessian), gradient)
    slope, offset = solution
    return 100 * (slope * train[case.is_member] + offset > 0).double().mean().item()


def prototype_recall(case: Case, count: int) -> float:
    """Percent of the class's test samples that are nearest to its mean: a thief recovers them from few samples.

    Means are those of the representations of `count` random training samples of each class (Mensink et al. 2013, IEEE
    TPAMI 35(11)). Prototypical relearning (Ha et al. 2025, arXiv:2506.01318) would set the class's output weights
    alone, which gives it every sample where features are all positive.
    """
    order = torch.randperm(len(case.train.labels), generator=seeded("prototypes", case.audit.seed))
    features, labels = case.train.hidden[-1][order], case.train.labels[order]
    means = [features[labels == label][:count].mean(0) for label in range(int(labels.max()) + 1)]
    nearest = torch.cdist(case.test.hidden[-1][case.is_forget], torch.stack(means)).argmin(1)
    return 100 * (nearest == case.audit.forget_class).double().mean().item()


def steps_from_few(case: Case, count: int) -> int | None:
    """Relearn time where every step sees the same `count` training samples of every class."""
    few = some_of_every_class(case.audit.data.train, count, "relearn from", case.audit.seed)
    return relearned(case, LEARNING_RATE_FROM_FEW, repeat(few))[0]


def relearned(case: Case, rate: float, samples: Iterator[Split]) -> tuple[int | None, list[float]]:
    """Relearns the class with all weights of a copy free, by SGD, until the audit's goal (see `relearn`)."""
    audit, model = case.audit, copy.deepcopy(case.model)
    if mask := Mask.on(model):
        mask.apply(model, permanent=True)
    model.requires_grad_(True)
    test = audit.data.test.forget(audit.forget_class)

    def accuracy() -> float:
        return 100 * predictions_of(model, test).correct.mean().item()

    optimizer = torch.optim.SGD(model.parameters(), rate)
    return relearn(model, optimizer, samples, accuracy, audit.goal, audit.config.relearn_steps)


def probe_metrics(
    train: Predictions, test: Predictions, forget_class: int, seed: int, probes: Sequence[str] = ()
) -> dict[str, Any]:
    """Trains the linear probe (Alain and Bengio 2016, arXiv:1610.01644) and further ones, by name, and scores them.

    Returns `probe_recall`, percent of the class's test samples that a probe of the representation labels correctly, and
    `usable_bits` about "is it of the class", by layer and probe, one of them `two_class`, the logistic regression to
    just that. Layers are `representation` and, with `hidden` among the probes, `hidden_0` and on.
    """
    is_forget, last, bits = test.labels == forget_class, len(train.hidden) - 1, {}
    for index in range(last + 1) if "hidden" in probes else [last]:
        x, x_test = train.hidden[index], test.hidden[index]
        names = [name for name in ("linear", *probes) if name in PROBES]
        probabilities = {name: PROBES[name](x, train.labels, x_test, seed) for name in names}
        by_probe = {name: usable_bits(each[:, forget_class], is_forget) for name, each in probabilities.items()}
        two_class = linear(x, (train.labels == forget_class).long(), x_test, seed)
        by_probe["two_class"] = usable_bits(two_class[:, 1], is_forget)
        bits["representation" if index == last else f"hidden_{index}"] = by_probe
    shares = {name: (each[is_forget].argmax(1) == forget_class).double() for name, each in probabilities.items()}
    return {"probe_recall": {name: 100 * share.mean().item() for name, share in shares.items()}, "usable_bits": bits}


def weights_changed(case: Case) -> int:
    """Counts the weights that differ from the original's."""
    return sum(int((one != other).sum()) for one, other in zip(case.model.weights, case.audit.original.weights))


class Entry(NamedTuple):
    """An audit: a function of a `Case`, and its column in tables, if it is one number."""

    measure: Callable[[Case], Any]
    title: str = ""
    spec: str = ""


AUDITS: dict[str, Entry] = {
    "js_forget": Entry(
        lambda case: case.audit.divergence(case.test, True), "divergence on the forget set, bits", ".3f"
    ),
    "js_retain": Entry(
        lambda case: case.audit.divergence(case.test, False), "divergence on the retain set, bits", ".4f"
    ),
    "loss_attack": Entry(
        lambda case: loss_attack(case.train.loss[case.is_member], case.test.loss[case.is_forget]),
        "loss attack, area under the curve",
        ".3f",
    ),
    "entropy_attack": Entry(entropy_attack, "entropy attack, % members", ".1f"),
    "probe_recall": Entry(lambda case: case.probes["probe_recall"]),
    "usable_bits": Entry(lambda case: case.probes["usable_bits"]),
    "prototype_recall": Entry(lambda case: {str(n): prototype_recall(case, n) for n in case.audit.config.relearn_from}),
    "relearn_steps": Entry(lambda case: case.relearned[0], "relearn time, steps", ".1f"),
    "came_back": Entry(lambda case: case.relearned[1][-1] >= case.audit.goal),
    "relearn_scores": Entry(lambda case: case.relearned[1]),
    "relearn_from": Entry(lambda case: {str(n): steps_from_few(case, n) for n in case.audit.config.relearn_from}),
    "weights_changed": Entry(weights_changed, "weights changed", ".0f"),
}
