"""What an unlearned classifier still knows of a class, beyond its predictions, and how far it is from retraining."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from data import ImageData, Split, check_range, is_correct, seeded, seeded_initialisation, some_of_every_class
from model import HookedMNISTClassifier, linear_layers

AUDITS = (
    "js_forget", "js_retain", "loss_attack", "entropy_attack", "probe_recall", "probe_retain", "relearn_steps",
    "came_back", "relearn_scores", "weights_changed", "probes", "relearn_from",
)  # fmt: skip
PROBES = ("softmax", "two_layer", "neighbours", "hidden")


@dataclass(frozen=True)
class AuditConfig:
    """Whether audits are made, and the settings of the probes and of the relearning.

    probe_penalty: weight of the squared norm in the loss of the linear probe, which is trained to convergence
    probes: more of them, names of PROBES: `softmax`, the linear one trained for few epochs; `two_layer`, a perceptron;
        `neighbours`, the majority of the nearest training samples; `hidden`, softmax at the layers before
    relearn_from: from how few samples of every class the class is relearned, numbers of samples
    """

    enabled: bool
    probe_penalty: float
    probe_steps: int
    probes: tuple[str, ...]
    probe_epochs: int
    probe_batch_size: int
    probe_rate: float
    probe_units: int
    probe_neighbours: int
    probe_neighbours_of: int
    relearn_steps: int
    relearn_batch_size: int
    relearn_rate: float
    relearn_from: tuple[int, ...]
    relearn_from_rate: float

    def __post_init__(self) -> None:
        for name in (
            "probe_steps", "probe_epochs", "probe_batch_size", "probe_units", "probe_neighbours", "probe_neighbours_of",
            "relearn_steps", "relearn_batch_size",
        ):  # fmt: skip
            check_range(name, getattr(self, name), at_least=1)
        check_range("probe_penalty", self.probe_penalty, at_least=0)
        for name in ("probe_rate", "relearn_rate", "relearn_from_rate"):
            check_range(name, getattr(self, name), above=0)
        for name in self.probes:
            if name not in PROBES:
                raise ValueError(f"probes: {name!r} is not known: valid are {', '.join(PROBES)}")
        for number in self.relearn_from:
            check_range("relearn_from", number, at_least=1)
        if self.probe_neighbours > self.probe_neighbours_of:
            raise ValueError(
                f"probe_neighbours must be at most probe_neighbours_of, {self.probe_neighbours_of}, "
                f"not {self.probe_neighbours}"
            )


@dataclass(frozen=True)
class Seen:
    """What a classifier does with a split: its logits (samples, classes), and the inputs of its layers after the first.

    hidden: of every layer after the first, (samples, n); labels: (samples)
    """

    logits: Tensor
    hidden: tuple[Tensor, ...]
    labels: Tensor

    def of(self, chosen: Tensor) -> Seen:
        return Seen(self.logits[chosen], tuple(x[chosen] for x in self.hidden), self.labels[chosen])

    @property
    def features(self) -> Tensor:
        """What the last layer is given: the representation, (samples, n)."""
        return self.hidden[-1]

    @property
    def correct(self) -> Tensor:
        """1 for each sample that is classified correctly, else 0, (samples)."""
        return is_correct(self.logits, self.labels).double()

    @property
    def has_diverged(self) -> bool:
        """Whether an output is not a number, or infinite; a logit of minus infinity is a removed class."""
        return not (self.features.isfinite().all() and (self.logits < torch.inf).all())

    @property
    def loss(self) -> Tensor:
        """Cross entropy of every sample, (samples), nats, in double precision."""
        return F.cross_entropy(self.logits.double(), self.labels, reduction="none")


@torch.no_grad()
def look_at(model: nn.Module, split: Split) -> Seen:
    """Runs a classifier on a split. All of it on the CPU."""
    # A classifier of one layer represents the images by themselves.
    watched = linear_layers(model)[1:] or linear_layers(model)
    hidden: list[list[Tensor]] = [[] for _ in watched]
    hooks = [
        layer.register_forward_pre_hook(lambda module, inputs, of_layer=of_layer: of_layer.append(inputs[0].detach()))
        for layer, of_layer in zip(watched, hidden)
    ]
    try:
        logits = torch.cat([model(images) for images in split.images.split(10_000)])
    finally:
        for hook in hooks:
            hook.remove()
    return Seen(logits.cpu(), tuple(torch.cat(of_layer).cpu() for of_layer in hidden), split.labels.cpu())


def jensen_shannon(logits: Tensor, others: Tensor) -> float:
    """Jensen-Shannon divergence of two classifiers' predictions, mean over samples, bits: 0 to 1, 0 where they agree.

    Lin 1991, Divergence measures based on the Shannon entropy. Both are logits (samples, classes).
    """
    p, q = logits.double().softmax(1), others.double().softmax(1)
    middle = (p + q) / 2
    terms = [torch.xlogy(x, x) - torch.xlogy(x, middle) for x in (p, q)]
    return (sum(term.sum(1) for term in terms).mean() / (2 * math.log(2))).item()


def loss_attack(members: Tensor, others: Tensor) -> float:
    """Membership inference by the loss: the area under the ROC curve when a smaller loss says "member".

    The probability that a member's loss is below that of a non-member, ties counted half: 0.5 tells nothing. Not a
    number where no loss is finite. Yeom et al. 2018, arXiv:1709.01604. Both are losses (samples).
    """
    if not members.isfinite().any() and not others.isfinite().any():
        return math.nan
    ordered = others.sort().values
    above = len(others) - torch.searchsorted(ordered, members, right=True)
    not_below = len(others) - torch.searchsorted(ordered, members, right=False)
    return ((above + not_below).double().mean() / (2 * len(others))).item()


def entropy(logits: Tensor) -> Tensor:
    """Entropy of every prediction, (samples), nats."""
    return torch.special.entr(logits.double().softmax(1)).sum(1)


def entropy_attack(retain: Tensor, test: Tensor, forget: Tensor) -> float:
    """The membership attack of the SSD paper: percent of the forget class's training samples that pass for members.

    Logistic regression on the entropy of the prediction, the retain set's training samples as members and the test
    split as non-members, both with the same weight. Foster et al. 2023, arXiv:2308.07707, after Chundawat et al. 2022,
    arXiv:2205.08096. Not a number where all entropies are the same. All are logits (samples, classes).
    """
    x = torch.cat([entropy(retain), entropy(test)])
    if x.max() == x.min():
        return math.nan
    is_member = torch.cat([torch.ones(len(retain)), torch.zeros(len(test))]).to(x)
    weight = is_member * len(x) / (2 * len(retain)) + (1 - is_member) * len(x) / (2 * len(test))
    inputs = torch.stack([x, torch.ones_like(x)], 1)
    solution = torch.zeros(2, dtype=x.dtype, device=x.device)
    penalty = torch.tensor([1.0, 0.0], dtype=x.dtype, device=x.device)  # of the slope, as scikit-learn has it
    for _ in range(30):  # Newton's method
        p = (inputs @ solution).sigmoid()
        gradient = inputs.T @ (weight * (p - is_member)) + penalty * solution
        hessian = inputs.T @ (inputs * (weight * p * (1 - p))[:, None]) + torch.diag(penalty)
        step = torch.linalg.solve(hessian + 1e-9 * torch.eye(2).to(hessian), gradient)
        solution = solution - step
        if step.abs().max() < 1e-9:
            break
    slope, offset = solution
    return 100 * (slope * entropy(forget) + offset > 0).double().mean().item()


def standardised(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Both less the mean of the first, over its standard deviation, (samples, n) each."""
    deviation, mean = torch.std_mean(train, 0)
    return (train - mean) / (deviation + 1e-6), (test - mean) / (deviation + 1e-6)


def linear_probe(train: Seen, test: Seen, penalty: float, steps: int) -> Tensor:
    """Softmax regression on the features, standardised on the training split, trained to convergence by L-BFGS.

    What the representation still holds of the classes, whatever the output layer makes of it: Alain and Bengio 2016,
    arXiv:1610.01644. Returns the predicted class of every test sample, (samples).
    """
    x, x_test = standardised(train.features, test.features)
    # In the directions of the principal components, each of variance 1, few steps do.
    values, vectors = torch.linalg.eigh((x.T @ x / len(x)).double())
    whiten = (vectors / (values.clamp_min(0) + 1e-6).sqrt()).float()
    x = F.pad(x @ whiten, (0, 1), value=1.0)
    classes = int(train.labels.max()) + 1
    solution = torch.zeros(x.shape[1], classes, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [solution], max_iter=steps, tolerance_grad=1e-5, tolerance_change=1e-9, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        # A ridge on the coefficients of the whitened features, the offset left out.
        loss = F.cross_entropy(x @ solution, train.labels) + penalty * solution[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return (F.pad(x_test @ whiten, (0, 1), value=1.0) @ solution.detach()).argmax(1)


def trained_probe(
    train: Tensor, labels: Tensor, test: Tensor, hidden: Sequence[int], config: AuditConfig, seed: int
) -> Tensor:
    """A perceptron on standardised features, a softmax regression where `hidden` is empty: Adam, a few epochs.

    train: (samples, n) with labels (samples); test: (others, n); hidden: units of each of its hidden layers
    Returns the predicted class of every one of the others.
    """
    x, x_test = standardised(train, test)
    with seeded_initialisation(seed):
        probe = HookedMNISTClassifier(hidden, x.shape[1], int(labels.max()) + 1, bias=True)
    optimizer = torch.optim.Adam(probe.parameters(), config.probe_rate)
    generator = seeded("probe", seed)
    for _ in range(config.probe_epochs):
        for batch in torch.randperm(len(x), generator=generator).split(config.probe_batch_size):
            loss = F.cross_entropy(probe(x.index_select(0, batch)), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        return probe(x_test).argmax(1)


def neighbours_probe(train: Tensor, labels: Tensor, test: Tensor, count: int) -> Tensor:
    """The most frequent class among the nearest training samples, by the Euclidean distance of standardised features.

    train: (samples, n) with labels (samples); test: (others, n). Returns a class for every one of the others.
    """
    x, x_test = standardised(train, test)
    # |a - b|^2 = |a|^2 + |b|^2 - 2 a b: |a|^2 is the same for all neighbours of a.
    squares = x.square().sum(1)
    found = []
    for part in x_test.split(1000):
        nearest = torch.addmm(squares, part, x.T, alpha=-2).topk(min(count, len(x)), largest=False).indices
        found.append(F.one_hot(labels[nearest], int(labels.max()) + 1).sum(1).argmax(1))
    return torch.cat(found)


def made_permanent(model: nn.Module) -> nn.Module:
    """A copy in which the zeros of a mask are the weights themselves, free to change again."""
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and parametrize.is_parametrized(layer, "weight"):
            # Not `remove_parametrizations`: the copy shares its class with the model, which would lose its weight.
            m, n = layer.out_features, layer.in_features
            plain = nn.utils.skip_init(nn.Linear, n, m, bias=layer.bias is not None, device=layer.weight.device)
            plain.weight = nn.Parameter(layer.weight.detach().clone())
            plain.bias = layer.bias
            model.set_submodule(name, plain)
    return model


def relearn(model: nn.Module, forget: Split, test: Split, goal: float, config: AuditConfig, seed: int) -> list[float]:
    """How fast the class comes back: its score on `test`, percent, before and after every step of fine-tuning on it.

    Relearn time, Golatkar et al. 2020, arXiv:1911.04933. SGD on the cross entropy of the forget class's training
    samples, all weights free, until the score reaches the goal or the steps run out; it ends early where the loss is
    not finite.
    """
    model = made_permanent(model).requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), config.relearn_rate)
    generator = seeded("relearn", seed)
    scores: list[float] = []
    while True:
        order = torch.randperm(len(forget.labels), generator=generator).to(forget.labels.device)
        for batch in order.split(config.relearn_batch_size):
            scores.append(100 * look_at(model, test).correct.mean().item())
            if scores[-1] >= goal or len(scores) > config.relearn_steps:
                return scores
            loss = F.cross_entropy(model(forget.images.index_select(0, batch)), forget.labels[batch])
            if not loss.isfinite():
                return scores
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def relearn_from(model: nn.Module, samples: Split, test: Split, goal: float, rate: float, max_steps: int) -> int | None:
    """How many steps bring the class back from few samples: SGD on all of `samples` at once, all weights free.

    samples: some of every class; test: of the class, on which its score must reach the goal, percent
    Returns `max_steps` where it does not come back by then, None where the loss is not finite.
    """
    model = made_permanent(model).requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), rate)
    for step in range(max_steps):
        with torch.no_grad():
            if 100 * is_correct(model(test.images), test.labels).double().mean().item() >= goal:
                return step
        loss = F.cross_entropy(model(samples.images), samples.labels)
        if not loss.isfinite():
            return None
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return max_steps


def weights_changed(model: nn.Module, original: nn.Module) -> int:
    """How many weights differ from the original's."""
    pairs = zip(linear_layers(model), linear_layers(original))
    return sum(int((one.weight != other.weight).sum()) for one, other in pairs)


class Audit:
    """The audits of the methods that answer one request.

    original, retrained: the classifier before, and the one trained from scratch without the class, if it is there
    """

    def __init__(
        self,
        config: AuditConfig,
        data: ImageData,
        forget_class: int,
        original: nn.Module,
        retrained: nn.Module | None,
        seed: int,
    ) -> None:
        self.config = config
        self.data = data
        self.forget_class = forget_class
        self.seed = seed
        self.original = original
        self.retrained = None if retrained is None else look_at(retrained, data.test)
        before = look_at(original, data.test)
        self.is_forget = before.labels == forget_class
        self.goal = 50 * before.of(self.is_forget).correct.mean().item()

    def __call__(self, model: nn.Module) -> dict[str, Any]:
        """The audits of one classifier.

        js_forget, js_retain: Jensen-Shannon divergence from the retrained classifier on the test split, bits; null
            without one
        loss_attack: area under the curve, its forget class's training against test samples
        entropy_attack: percent of the forget class's training samples that pass for members
        probe_recall: percent of the forget class's test samples that a linear probe of the features finds
        probe_retain: percent of the other classes' test samples that it classifies correctly
        relearn_steps: until the class's score is half of the original's, or those of the config where it does not come
            back; null where the loss is infinite, so that there is nothing to learn from
        came_back: whether it did
        relearn_scores: the score before every step and after the last
        weights_changed: how many differ from the original's
        probes: the recall of every further probe by its name, percent
        relearn_from: steps until the class is back from so many samples of every class, by their number

        All but the last are null for a classifier that has diverged, whose outputs are not numbers.
        """
        train, test = look_at(model, self.data.train), look_at(model, self.data.test)
        changed = weights_changed(model, self.original)
        if train.has_diverged or test.has_diverged:
            return dict.fromkeys(AUDITS) | {"weights_changed": changed}
        is_member = train.labels == self.forget_class
        found = (linear_probe(train, test, self.config.probe_penalty, self.config.probe_steps) == test.labels).double()
        splits = (split.forget(self.forget_class) for split in (self.data.train, self.data.test))
        scores = relearn(model, *splits, self.goal, self.config, self.seed)
        came_back = scores[-1] >= self.goal
        return {
            "js_forget": self._divergence(test, self.is_forget),
            "js_retain": self._divergence(test, ~self.is_forget),
            "loss_attack": loss_attack(train.of(is_member).loss, test.of(self.is_forget).loss),
            "entropy_attack": entropy_attack(train.logits[~is_member], test.logits, train.logits[is_member]),
            "probe_recall": 100 * found[self.is_forget].mean().item(),
            "probe_retain": 100 * found[~self.is_forget].mean().item(),
            "relearn_steps": len(scores) - 1 if came_back or len(scores) > self.config.relearn_steps else None,
            "came_back": came_back,
            "relearn_scores": scores,
            "weights_changed": changed,
            "probes": self._probes(train, test),
            "relearn_from": {str(count): self._relearn_from(model, count) for count in self.config.relearn_from},
        }

    def _divergence(self, test: Seen, chosen: Tensor) -> float | None:
        if self.retrained is None:
            return None
        return jensen_shannon(test.logits[chosen], self.retrained.logits[chosen])

    def _probes(self, train: Seen, test: Seen) -> dict[str, float]:
        """Percent of the forget class's test samples that each further probe finds."""
        config, labels = self.config, train.labels
        forget = test.of(self.is_forget)
        predicted: dict[str, Tensor] = {}
        if "softmax" in config.probes:
            predicted["softmax"] = trained_probe(train.features, labels, forget.features, (), config, self.seed)
        if "two_layer" in config.probes:
            units = (config.probe_units,)
            predicted["two_layer"] = trained_probe(train.features, labels, forget.features, units, config, self.seed)
        if "neighbours" in config.probes:
            order = torch.randperm(len(labels), generator=seeded("neighbours", self.seed))[: config.probe_neighbours_of]
            predicted["neighbours"] = neighbours_probe(
                train.features[order], labels[order], forget.features, config.probe_neighbours
            )
        if "hidden" in config.probes:
            for index, (x, x_forget) in enumerate(zip(train.hidden[:-1], forget.hidden)):
                predicted[f"hidden_{index}"] = trained_probe(x, labels, x_forget, (), config, self.seed)
        return {name: 100 * (found == self.forget_class).double().mean().item() for name, found in predicted.items()}

    def _relearn_from(self, model: nn.Module, count: int) -> int | None:
        samples = some_of_every_class(self.data.train, count, "relearn from", self.seed)
        test = self.data.test.forget(self.forget_class)
        return relearn_from(model, samples, test, self.goal, self.config.relearn_from_rate, self.config.relearn_steps)
