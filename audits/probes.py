"""What a probe reads in a representation, whatever the classifier's own output layer makes of it.

Alain and Bengio 2016, arXiv:1610.01644.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from audits.predictions import Seen
from data import Count, NonNegative, Positive, seeded, seeded_initialisation
from model import HookedMNISTClassifier


@dataclass(frozen=True)
class AuditConfig:
    """Whether audits are made, and the settings of the probes and of the relearning.

    probes: those beside the linear one, which always runs: `two_layer`, a perceptron; `neighbours`, the majority of the
        nearest training samples; `hidden`, the linear one at the layers before the last
    relearn_from: from how few samples of every class the class is relearned, too
    """

    enabled: bool
    probes: tuple[Literal["two_layer", "neighbours", "hidden"], ...]
    probe_penalty: NonNegative
    probe_steps: Count
    probe_epochs: Count
    probe_batch_size: Count
    probe_rate: Positive
    probe_units: Count
    probe_neighbours: Count
    probe_neighbours_of: Count
    relearn_steps: Count
    relearn_batch_size: Count
    relearn_rate: Positive
    relearn_from: tuple[Count, ...]
    relearn_from_rate: Positive

    def __post_init__(self) -> None:
        count, among = self.probe_neighbours, self.probe_neighbours_of
        if count > among:
            raise ValueError(f"probe_neighbours must be at most probe_neighbours_of, {among}, not {count}")


def standardised(features: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """The features, then the others, less the features' mean, over their standard deviation + 0.001.

    Mean and deviation are over the samples. Shapes: (..., samples, n) each.
    """
    mean = features.mean(-2, keepdim=True)
    centred = features - mean
    # The square root has no derivative at 0, where a feature never changes.
    deviation = centred.square().mean(-2, keepdim=True).clamp_min(1e-20).sqrt() + 1e-3
    return centred / deviation, *((other - mean) / deviation for other in others)


def linear(train: Tensor, labels: Tensor, test: Tensor, config: AuditConfig, seed: int) -> Tensor:
    """Softmax regression, trained to convergence by L-BFGS."""
    x, x_test = standardised(train, test)
    # In the directions of the principal components, each of variance 1, few steps do.
    values, vectors = torch.linalg.eigh((x.T @ x / len(x)).double())
    whiten = (vectors / (values.clamp_min(0) + 1e-6).sqrt()).float()
    x, x_test = (F.pad(each @ whiten, (0, 1), value=1.0) for each in (x, x_test))
    solution = torch.zeros(x.shape[1], int(labels.max()) + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [solution], max_iter=config.probe_steps, tolerance_grad=1e-5, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        # A ridge on the coefficients of the whitened features, the offset left out.
        loss = F.cross_entropy(x @ solution, labels) + config.probe_penalty * solution[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return (x_test @ solution.detach()).argmax(1)


def two_layer(train: Tensor, labels: Tensor, test: Tensor, config: AuditConfig, seed: int) -> Tensor:
    """A perceptron with one hidden layer, trained by Adam for a few epochs."""
    x, x_test = standardised(train, test)
    with seeded_initialisation(seed):
        probe = HookedMNISTClassifier((config.probe_units,), x.shape[1], int(labels.max()) + 1, bias=True)
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


def neighbours(train: Tensor, labels: Tensor, test: Tensor, config: AuditConfig, seed: int) -> Tensor:
    """The most frequent class among the nearest of some random training samples, by the Euclidean distance."""
    order = torch.randperm(len(labels), generator=seeded("neighbours", seed))[: config.probe_neighbours_of]
    x, x_test = standardised(train[order], test)
    # |a - b|^2 = |a|^2 + |b|^2 - 2 a b: |a|^2 is the same for all neighbours of a.
    squares, count = x.square().sum(1), min(config.probe_neighbours, len(x))
    found = []
    for part in x_test.split(1000):
        nearest = torch.addmm(squares, part, x.T, alpha=-2).topk(count, largest=False).indices
        found.append(F.one_hot(labels[order][nearest]).sum(1).argmax(1))
    return torch.cat(found)


# From features (samples, n) and labels (samples) of the training split, features of others (others, n), the settings
# and a seed to the predicted class of every one of the others, (others).
Probe = Callable[[Tensor, Tensor, Tensor, AuditConfig, int], Tensor]
PROBES: dict[str, Probe] = {"linear": linear, "two_layer": two_layer, "neighbours": neighbours}


def predicted(train: Seen, test: Seen, config: AuditConfig, seed: int) -> dict[str, Tensor]:
    """The class of every test sample as each probe predicts it, (samples), by the name of the probe.

    `linear` comes first, then those of the config; `hidden` gives `hidden_0`, `hidden_1` ..., one for every layer.
    """
    probes = {"linear": (linear, -1)}
    for name in config.probes:
        if name == "hidden":
            probes |= {f"hidden_{layer}": (linear, layer) for layer in range(len(train.hidden) - 1)}
        else:
            probes[name] = (PROBES[name], -1)
    return {
        name: probe(train.hidden[layer], train.labels, test.hidden[layer], config, seed)
        for name, (probe, layer) in probes.items()
    }
