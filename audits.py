"""What an unlearned classifier still knows of a class, beyond its predictions, and how far it is from retraining."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from data import ImageData, Split, check_range, is_correct, seeded
from model import linear_layers

AUDITS = (
    "js_forget", "js_retain", "loss_attack", "entropy_attack", "probe_recall", "probe_retain", "relearn_steps",
    "came_back", "relearn_scores", "weights_changed",
)  # fmt: skip


@dataclass(frozen=True)
class AuditConfig:
    """Whether audits are made, and the settings of the probe and of the relearning.

    probe_penalty: weight of the squared norm in the loss of the probe
    """

    enabled: bool
    probe_penalty: float
    probe_steps: int
    relearn_steps: int
    relearn_batch_size: int
    relearn_rate: float

    def __post_init__(self) -> None:
        for name in ("probe_steps", "relearn_steps", "relearn_batch_size"):
            check_range(name, getattr(self, name), at_least=1)
        check_range("probe_penalty", self.probe_penalty, at_least=0)
        check_range("relearn_rate", self.relearn_rate, above=0)


@dataclass(frozen=True)
class Seen:
    """What a classifier does with a split: its logits (samples, classes), and the input of its last layer.

    features: (samples, n); labels: (samples)
    """

    logits: Tensor
    features: Tensor
    labels: Tensor

    def of(self, chosen: Tensor) -> Seen:
        return Seen(self.logits[chosen], self.features[chosen], self.labels[chosen])

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
    """Runs a classifier on a split; the features are what its last linear layer is given. All of it on the CPU."""
    features: list[Tensor] = []
    last = linear_layers(model)[-1]
    hook = last.register_forward_pre_hook(lambda module, inputs: features.append(inputs[0].detach()))
    try:
        logits = torch.cat([model(images) for images in split.images.split(10_000)])
    finally:
        hook.remove()
    return Seen(logits.cpu(), torch.cat(features).cpu(), split.labels.cpu())


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


def linear_probe(train: Seen, test: Seen, penalty: float, steps: int) -> Tensor:
    """Softmax regression on the features, standardised on the training split, trained to convergence by L-BFGS.

    What the representation still holds of the classes, whatever the output layer makes of it: Alain and Bengio 2016,
    arXiv:1610.01644. Returns the predicted class of every test sample, (samples).
    """
    deviation, mean = torch.std_mean(train.features, 0)
    x, x_test = ((seen.features - mean) / (deviation + 1e-6) for seen in (train, test))
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


def weights_changed(model: nn.Module, original: nn.Module) -> int:
    """How many weights differ from the original's."""
    pairs = zip(linear_layers(model), linear_layers(original))
    return sum(int((one.weight != other.weight).sum()) for one, other in pairs)


class Audit:
    """The audits of the methods that answer one request.

    original, retrained: the classifier before, and the one trained from scratch without the class
    """

    def __init__(
        self,
        config: AuditConfig,
        data: ImageData,
        forget_class: int,
        original: nn.Module,
        retrained: nn.Module,
        seed: int,
    ) -> None:
        self.config = config
        self.data = data
        self.forget_class = forget_class
        self.seed = seed
        self.original = original
        self.retrained = look_at(retrained, data.test)
        self.is_forget = self.retrained.labels == forget_class
        self.goal = 50 * look_at(original, data.test).of(self.is_forget).correct.mean().item()

    def __call__(self, model: nn.Module) -> dict[str, Any]:
        """The audits of one classifier.

        js_forget, js_retain: Jensen-Shannon divergence from the retrained classifier on the test split, bits
        loss_attack: area under the curve, its forget class's training against test samples
        entropy_attack: percent of the forget class's training samples that pass for members
        probe_recall: percent of the forget class's test samples that a linear probe of the features finds
        probe_retain: percent of the other classes' test samples that it classifies correctly
        relearn_steps: until the class's score is half of the original's, or those of the config where it does not come
            back; null where the loss is infinite, so that there is nothing to learn from
        came_back: whether it did
        relearn_scores: the score before every step and after the last
        weights_changed: how many differ from the original's

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
            "js_forget": jensen_shannon(test.logits[self.is_forget], self.retrained.logits[self.is_forget]),
            "js_retain": jensen_shannon(test.logits[~self.is_forget], self.retrained.logits[~self.is_forget]),
            "loss_attack": loss_attack(train.of(is_member).loss, test.of(self.is_forget).loss),
            "entropy_attack": entropy_attack(train.logits[~is_member], test.logits, train.logits[is_member]),
            "probe_recall": 100 * found[self.is_forget].mean().item(),
            "probe_retain": 100 * found[~self.is_forget].mean().item(),
            "relearn_steps": len(scores) - 1 if came_back or len(scores) > self.config.relearn_steps else None,
            "came_back": came_back,
            "relearn_scores": scores,
            "weights_changed": changed,
        }
