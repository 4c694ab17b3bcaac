"""Probes: what can be read about classes in features."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimu.samples import Split
from mimu.seeds import seeded, seeded_initialisation
from mimu.training import learn


def standardised(features: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """The features, then the others, less the features' mean, over their standard deviation + 0.001.

    Mean and deviation are over the samples. Shapes: (..., samples, n) each.
    """
    mean = features.mean(-2, keepdim=True)
    centred = features - mean
    # The square root has no derivative at 0, where a feature never changes.
    deviation = centred.square().mean(-2, keepdim=True).clamp_min(1e-20).sqrt() + 1e-3
    return centred / deviation, *((other - mean) / deviation for other in others)


def ridge_regression(features: Tensor, targets: Tensor, ridge: float) -> Tensor:
    """Coefficients (A + ridge I)^-1 B, A = H^T H / N and B = H^T T / N, of standardised features H.

    Shapes: features H (..., samples, n), targets T (..., samples, k) to (..., n, k).
    """
    transposed = features.mT / features.shape[-2]
    correlation = transposed @ features + ridge * torch.eye(features.shape[-1]).to(features)
    return torch.linalg.solve(correlation, transposed @ targets)


def held_out_variance(features: Tensor, target: Tensor, ridge: float) -> Tensor:
    """R^2 of the ridge regression to a target when each sample is predicted from all others, differentiable.

        1 - sum_i (e_i / (1 - h_i))^2 / sum_i t_i^2,  h_i = 1 / N + H_i (H^T H + ridge N I)^-1 H_i^T

    H the standardised features, t the centred target, e the residuals (PRESS; Allen 1974, Technometrics 16). At most 1;
    0 or less where the features say nothing of the target. Shapes: features (samples, n), target (samples).
    """
    (h,) = standardised(features)
    t = target - target.mean()
    samples, n = h.shape
    inverse = torch.linalg.inv(h.T @ h + samples * ridge * torch.eye(n).to(h))
    hat = h @ inverse
    excluded_classes = (t - hat @ (h.T @ t)) / (1 - 1 / samples - (hat * h).sum(1))
    return 1 - excluded_classes.square().sum() / t.square().sum().clamp_min(1e-12)


PENALTY = 0.0001  # of the linear probe's squared coefficients
STEPS = 300  # of L-BFGS, at most
WIDEST = 256  # principal components, at most, that the linear probe is given: in seconds, and more bits than all 1,568
UNITS = 64  # in the hidden layer of the perceptron
EPOCHS = 5
BATCH_SIZE = 1024
LEARNING_RATE = 0.01  # Adam
NEIGHBOURS = 20  # whose shares are the probabilities
NEIGHBOURS_OF = 10_000  # among so many training samples


def linear(train: Tensor, labels: Tensor, test: Tensor, seed: int) -> Tensor:
    """Softmax regression, trained to convergence by L-BFGS."""
    x, x_test = standardised(train, test)
    # In the directions of the principal components, each of variance 1, few steps do.
    values, vectors = (each[..., -WIDEST:] for each in torch.linalg.eigh((x.T @ x / len(x)).double()))
    whiten = (vectors / (values.clamp_min(0) + 1e-6).sqrt()).float()
    x, x_test = (F.pad(each @ whiten, (0, 1), value=1.0) for each in (x, x_test))
    solution = torch.zeros(x.shape[1], int(labels.max()) + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([solution], max_iter=STEPS, tolerance_grad=1e-5, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        # A ridge on the coefficients of the whitened features, the offset left out.
        loss = F.cross_entropy(x @ solution, labels) + PENALTY * solution[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return (x_test @ solution.detach()).double().softmax(1)


def two_layer(train: Tensor, labels: Tensor, test: Tensor, seed: int) -> Tensor:
    """A perceptron with one hidden layer, trained by Adam for a few epochs."""
    x, x_test = standardised(train, test)
    with seeded_initialisation(seed):
        layers = nn.Linear(x.shape[1], UNITS), nn.ReLU(), nn.Linear(UNITS, int(labels.max()) + 1)
    probe = nn.Sequential(*layers)
    optimizer = torch.optim.Adam(probe.parameters(), LEARNING_RATE)
    learn(probe, Split(x, labels), EPOCHS, BATCH_SIZE, optimizer, seeded("probe", seed), setting="audit.probes")
    with torch.no_grad():
        return probe(x_test).double().softmax(1)


def neighbours(train: Tensor, labels: Tensor, test: Tensor, seed: int) -> Tensor:
    """Shares of the classes among the nearest of some random training samples, by the Euclidean distance."""
    order = torch.randperm(len(labels), generator=seeded("neighbours", seed))[:NEIGHBOURS_OF]
    x, x_test = standardised(train[order], test)
    # |a - b|^2 = |a|^2 + |b|^2 - 2 a b: |a|^2 is the same for all neighbours of a.
    distances = torch.addmm(x.square().sum(1), x_test, x.T, alpha=-2)
    nearest = distances.topk(min(NEIGHBOURS, len(x)), largest=False).indices
    counts = F.one_hot(labels[order][nearest], int(labels.max()) + 1).sum(1).double()
    # One more counts as of all classes in equal parts: a share of 0 could cost infinitely many bits.
    return (counts + 1 / counts.shape[1]) / (nearest.shape[1] + 1)


def usable_bits(probability: Tensor, is_class: Tensor) -> float:
    """Usable information about "is it of the class": H(Y) less the log loss of its probability, both (samples), bits.

    H(Y) is the log loss of the class's share of the samples: 0 bits where the probabilities say no more, fewer where
    they mislead, down to the 100 nats a sample at which PyTorch ends. Xu et al. 2020, V-information, arXiv:2002.10689.
    """
    target = is_class.double()
    share = target.mean().expand_as(target)
    before, after = (F.binary_cross_entropy(each, target) for each in (share, probability.double()))
    return (before - after).item() / math.log(2)
