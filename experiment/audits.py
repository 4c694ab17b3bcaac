"""The audits of the experiment: what a classifier still reveals of a class, and how far the retrained one is.

A new one is a line in the results of `Audit`, and one in AUDITS, which says how tables show it.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat
from typing import Any, Literal

import torch
from torch import Tensor, nn

from data import ImageData
from mimu.auditing import jensen_shannon, loss_attack
from mimu.masks import Mask
from mimu.probes import linear, neighbours, two_layer, usable_bits
from mimu.samples import Split, some_of_every_class
from mimu.seeds import seeded
from mimu.settings import Count
from mimu.subjects import Predictions, relearn

BATCH_SIZE = 128  # of the forget class's training samples, from which it is relearned
LEARNING_RATE = 0.0003  # of SGD on these batches
LEARNING_RATE_FROM_FEW = 0.003  # where every step sees all of a few samples
PROBES = {"linear": linear, "two_layer": two_layer, "neighbours": neighbours}


@torch.no_grad()
def predictions_of(model: nn.Module, split: Split) -> Predictions:
    """Runs a classifier of one or several linear layers on a split.

    Returns the inputs of the linear layers after the first. Where only one layer reads features, the inputs of the
    layer before it precede them, averaged over tokens or pixels.
    """
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
    return Predictions(logits.cpu(), [torch.cat(parts).cpu() for parts in hidden], split.labels.cpu())


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
        self.reference = None if self.retrained is None else predictions_of(self.retrained, self.data.test)

    @cached_property
    def goal(self) -> float:
        """The percentage of the class's test samples at which relearning ends: half of what the original has."""
        return 50 * predictions_of(self.original, self.data.test.forget(self.forget_class)).correct.mean().item()

    def __call__(self, model: nn.Module) -> dict[str, Any]:
        """Runs all audits on one classifier; where it has diverged, all but `weights_changed` are None.

        Where audits are not enabled, it measures the divergence from the retrained classifier alone.
        """
        test = predictions_of(model, self.data.test)
        is_own = test.labels == self.forget_class
        results: dict[str, Any] = {"js_forget": None, "js_retain": None}
        if self.reference is not None and not test.has_diverged:
            for name, chosen in (("js_forget", is_own), ("js_retain", ~is_own)):
                results[name] = jensen_shannon(test.logits[chosen], self.reference.logits[chosen])
        if not self.config.enabled:
            return results
        train, few = predictions_of(model, self.train), self.config.relearn_from
        changed = sum(int((one != other).sum()) for one, other in zip(model.weights, self.original.weights))
        if train.has_diverged or test.has_diverged:
            return dict.fromkeys(AUDITS) | {"weights_changed": changed}
        is_member = train.labels == self.forget_class
        forget = self.data.train.forget(self.forget_class)
        steps, scores = self.relearned(model, LEARNING_RATE, forget.batches(BATCH_SIZE, seeded("relearn", self.seed)))
        return results | {
            "loss_attack": loss_attack(train.loss[is_member], test.loss[is_own]),
            "entropy_attack": entropy_attack(train, test, is_member),
            **probe_metrics(train, test, self.forget_class, self.seed, self.config.probes),
            "prototype_recall": {str(n): prototype_recall(train, test, self.forget_class, self.seed, n) for n in few},
            "relearn_steps": steps,
            "came_back": scores[-1] >= self.goal,
            "relearn_scores": scores,
            "relearn_from": {str(n): self.steps_from_few(model, n) for n in few},
            "weights_changed": changed,
        }

    def relearned(self, model: nn.Module, rate: float, samples: Iterator[Split]) -> tuple[int | None, list[float]]:
        """Relearns the class with all weights of a copy free, by SGD, until `goal` (see `mimu.subjects.relearn`)."""
        model = copy.deepcopy(model)
        if mask := Mask.on(model):
            mask.apply(model, permanent=True)
        model.requires_grad_(True)
        test = self.data.test.forget(self.forget_class)

        def accuracy() -> float:
            return 100 * predictions_of(model, test).correct.mean().item()

        optimizer = torch.optim.SGD(model.parameters(), rate)
        return relearn(model, optimizer, samples, accuracy, self.goal, self.config.relearn_steps)

    def steps_from_few(self, model: nn.Module, count: int) -> int | None:
        """Relearn time where every step sees the same `count` training samples of every class."""
        few = some_of_every_class(self.data.train, count, "relearn from", self.seed)
        return self.relearned(model, LEARNING_RATE_FROM_FEW, repeat(few))[0]

    def columns(self) -> dict[str, dict[str, str]]:
        """Returns the title and the number format of every enabled audit that has a column in tables, by its name."""
        return {name: column for name, column in AUDITS.items() if column and self.config.enabled}


def entropy_attack(train: Predictions, test: Predictions, is_member: Tensor) -> float:
    """Membership inference by the entropy of predictions: percent of the class's training samples taken for members.

    A logistic regression, both kinds with the same weight in all, learns from the training samples of the retained
    classes (members) and the test split (non-members). Not a number where all entropies are the same. Foster et al.
    2023, arXiv:2308.07707, after arXiv:2205.08096.

    Args:
        is_member: the training samples of the class
    """
    entropies, others = (torch.special.entr(each.logits.double().softmax(1)).sum(1) for each in (train, test))
    members = entropies[~is_member]
    x = torch.cat([members, others])
    if x.max() == x.min():
        return math.nan
    target = torch.cat([torch.ones_like(members), torch.zeros_like(others)])
    weight = target * len(x) / (2 * len(members)) + (1 - target) * len(x) / (2 * len(others))
    inputs = torch.stack([x, torch.ones_like(x)], 1)
    solution, penalty = x.new_zeros(2), x.new_tensor([1.0, 0.0])  # of the slope alone, as in scikit-learn
    for _ in range(30):  # Newton's method, which converges in far fewer steps
        p = (inputs @ solution).sigmoid()
        gradient = inputs.T @ (weight * (p - target)) + penalty * solution
        hessian = inputs.T @ (inputs * (weight * p * (1 - p))[:, None]) + torch.diag(penalty)
        solution = solution - torch.linalg.solve(hessian + 1e-9 * torch.eye(2).to(hessian), gradient)
    slope, offset = solution
    return 100 * (slope * entropies[is_member] + offset > 0).double().mean().item()


def prototype_recall(train: Predictions, test: Predictions, forget_class: int, seed: int, count: int) -> float:
    """Percent of the class's test samples that are nearest to its mean: a thief recovers them from few samples.

    Means are those of the representations of `count` random training samples of each class (Mensink et al. 2013, IEEE
    TPAMI 35(11)). Prototypical relearning (Ha et al. 2025, arXiv:2506.01318) would set the class's output weights
    alone, which gives it every sample where features are all positive.
    """
    order = torch.randperm(len(train.labels), generator=seeded("prototypes", seed))
    features, labels = train.hidden[-1][order], train.labels[order]
    means = [features[labels == label][:count].mean(0) for label in range(int(labels.max()) + 1)]
    nearest = torch.cdist(test.hidden[-1][test.labels == forget_class], torch.stack(means)).argmin(1)
    return 100 * (nearest == forget_class).double().mean().item()


def probe_metrics(
    train: Predictions, test: Predictions, forget_class: int, seed: int, probes: Sequence[str] = ()
) -> dict[str, Any]:
    """Trains the linear probe (Alain and Bengio 2016, arXiv:1610.01644) and further ones, by name, and scores them.

    Returns `probe_recall`, percent of the class's test samples that a probe of the representation labels correctly, and
    `usable_bits` about "is it of the class", by layer and probe, one of them `two_class`, the logistic regression to
    just that. Layers are `representation` and, with `hidden` among the probes, `hidden_0` and on.
    """
    is_forget, recalls, bits = test.labels == forget_class, {}, {}
    last = len(train.hidden) - 1
    for index in range(last + 1) if "hidden" in probes else [last]:
        x, x_test = train.hidden[index], test.hidden[index]
        layer = bits["representation" if index == last else f"hidden_{index}"] = {}
        for name in ["linear", *(each for each in probes if each != "hidden")]:
            p = PROBES[name](x, train.labels, x_test, seed)
            layer[name] = usable_bits(p[:, forget_class], is_forget)
            recalls[name] = 100 * (p[is_forget].argmax(1) == forget_class).double().mean().item()
        two_class = linear(x, (train.labels == forget_class).long(), x_test, seed)
        layer["two_class"] = usable_bits(two_class[:, 1], is_forget)
    return {"probe_recall": recalls, "usable_bits": bits}


# Every audit in the order of the results, with its column in tables if it is one number.
AUDITS: dict[str, dict[str, str] | None] = {
    "js_forget": {"title": "divergence on the forget set, bits", "spec": ".3f"},
    "js_retain": {"title": "divergence on the retain set, bits", "spec": ".4f"},
    "loss_attack": {"title": "loss attack, area under the curve", "spec": ".3f"},
    "entropy_attack": {"title": "entropy attack, % members", "spec": ".1f"},
    "probe_recall": None,
    "usable_bits": None,
    "prototype_recall": None,
    "relearn_steps": {"title": "relearn time, steps", "spec": ".1f"},
    "came_back": None,
    "relearn_scores": None,
    "relearn_from": None,
    "weights_changed": {"title": "weights changed", "spec": ".0f"},
}
