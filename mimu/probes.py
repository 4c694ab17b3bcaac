"""Probes: how much features tell about classes, whatever the classifier's output layer makes of them.

A probe learns from features (samples, n) and labels (samples), and returns the probabilities of the classes for test
features (test samples, n), (test samples, classes); its seed fixes what is random.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimu.samples import Split
from mimu.seeds import seeded, seeded_initialisation
from mimu.training import learn

PENALTY = 0.0001  # of the linear probe's squared coefficients
STEPS = 300  # of L-BFGS, at most
WIDEST = 256  # principal components of the linear probe, at most: fast, and more bits than from all of 1,568 features
UNITS = 64  # in the hidden layer of the two-layer probe
EPOCHS = 5
BATCH_SIZE = 1024
LEARNING_RATE = 0.01  # of Adam
NEIGHBOURS = 20
NEIGHBOURS_OF = 10_000  # training samples among which they are sought


def standardised(features: Tensor, *further: Tensor) -> tuple[Tensor, ...]:
    """Subtracts the features' mean over samples from all, and divides by their deviation + 0.001, (..., samples, n)."""
    mean = features.mean(-2, keepdim=True)
    centred = features - mean
    # The square root has no derivative at 0, where a feature never changes.
    deviation = centred.square().mean(-2, keepdim=True).clamp_min(1e-20).sqrt() + 1e-3
    return centred / deviation, *((each - mean) / deviation for each in further)


def ridge_regression(features: Tensor, targets: Tensor, ridge: float) -> Tensor:
    """Coefficients (..., n, k) of standardised features (..., samples, n) for targets (..., samples, k)."""
    transposed = features.mT / features.shape[-2]
    correlation = transposed @ features + ridge * torch.eye(features.shape[-1]).to(features)
    return torch.linalg.solve(correlation, transposed @ targets)


def held_out_variance(features: Tensor, targets: Tensor, ridge: float, weight: Tensor | None = None) -> Tensor:
    """R^2 of ridge regressions that predict each sample from all others, differentiable; at most 1, 0 for noise.

        1 - sum_i w_i (e_i / (1 - h_i))^2 / sum_i w_i t_i^2,  h_i = w_i (1 + H_i (H^T W H + ridge I)^-1 H_i^T)

    where H are the standardised features, t a centred target, e the residuals, and w the weights of the samples, whose
    sum is 1 (PRESS; Allen 1974, Technometrics 16).

    Args:
        features: (samples, n)
        targets: (samples, targets)
        weight: of each sample, (samples), of any sum; None: all are alike

    Returns: (targets)
    """
    w = (torch.ones_like(targets[:, 0]) if weight is None else weight)[:, None]
    w = w / w.sum()
    centred, t = features - (w * features).sum(0), targets - (w * targets).sum(0)
    # The square root has no derivative at 0, where a feature never changes.
    h = centred / ((w * centred.square()).sum(0).clamp_min(1e-20).sqrt() + 1e-3)
    hat = h @ torch.linalg.inv(h.T @ (w * h) + ridge * torch.eye(h.shape[1]).to(h))
    residuals = (t - hat @ (h.T @ (w * t))) / (1 - w * (1 + (hat * h).sum(1, keepdim=True)))
    return 1 - (w * residuals.square()).sum(0) / (w * t.square()).sum(0).clamp_min(1e-12)


def linear(train: Tensor, labels: Tensor, test: Tensor, seed: int) -> Tensor:
    """Softmax regression, trained to convergence by L-BFGS."""
    x, x_test = standardised(train, test)
    # Along principal components, each of variance 1, few steps are enough.
    values, vectors = (each[..., -WIDEST:] for each in torch.linalg.eigh((x.T @ x / len(x)).double()))
    whiten = (vectors / (values.clamp_min(0) + 1e-6).sqrt()).float()
    x, x_test = (F.pad(each @ whiten, (0, 1), value=1.0) for each in (x, x_test))
    solution = torch.zeros(x.shape[1], int(labels.max()) + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([solution], max_iter=STEPS, tolerance_grad=1e-5, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        # The ridge spares the offset.
        loss = F.cross_entropy(x @ solution, labels) + PENALTY * solution[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return (x_test @ solution.detach()).double().softmax(1)


def two_layer(train: Tensor, labels: Tensor, test: Tensor, seed: int) -> Tensor:
    """A perceptron with one hidden layer, trained by Adam for a few epochs."""
    x, x_test = standardised(train, test)
    with seeded_initialisation(seed):
        probe = nn.Sequential(nn.Linear(x.shape[1], UNITS), nn.ReLU(), nn.Linear(UNITS, int(labels.max()) + 1))
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
    # One more neighbour is of all classes in equal parts: a share of 0 could cost infinitely many bits.
    return (counts + 1 / counts.shape[1]) / (nearest.shape[1] + 1)


def usable_bits(probability: Tensor, is_class: Tensor) -> float:
    """Usable information about "is it of the class": H(Y) less the log loss of its probability, both (samples), bits.

    H(Y) is the log loss of the class's share of the samples: probabilities that say no more give 0 bits, and misleading
    ones fewer, down to PyTorch's limit of 100 nats a sample. Xu et al. 2020, V-information, arXiv:2002.10689.
    """
    target = is_class.double()
    share = target.mean().expand_as(target)
    before, after = (F.binary_cross_entropy(each, target) for each in (share, probability.double()))
    return (before - after).item() / math.log(2)
