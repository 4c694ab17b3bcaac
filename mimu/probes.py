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
SUREST = 1e-4  # probability of an error that `balanced_bits` takes a probe to have at least
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


def linear(train: Tensor, labels: Tensor, test: Tensor, seed: int, cost: float | None = None) -> Tensor:
    """Softmax regression, trained to convergence by L-BFGS.

    cost: C of the standard form, the sum of cross entropies plus the squared coefficients of the standardised features
        over 2 C. None: up to WIDEST principal components, and PENALTY times their squared coefficients
    """
    x, x_test = standardised(train, test)
    # Along principal components, each of variance 1, few steps are enough.
    widest, penalty, smallest = (WIDEST, PENALTY, 1e-6) if cost is None else (0, 1 / (2 * cost * len(x)), 1 / len(x))
    values, vectors = (each[..., -widest:] for each in torch.linalg.eigh((x.T @ x / len(x)).double()))
    scales = (values.clamp_min(0) + smallest).sqrt()
    whiten = (vectors / scales).float()
    by_feature = 1.0 if cost is None else scales.reciprocal().float()[:, None]
    x, x_test = (F.pad(each @ whiten, (0, 1), value=1.0) for each in (x, x_test))
    solution = torch.zeros(x.shape[1], int(labels.max()) + 1, requires_grad=True)
    tolerance = 1e-5 if cost is None else 1e-4
    optimizer = torch.optim.LBFGS([solution], max_iter=STEPS, tolerance_grad=tolerance, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        # The ridge spares the offset.
        loss = F.cross_entropy(x @ solution, labels) + penalty * (solution[:-1] * by_feature).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return (x_test @ solution.detach()).double().softmax(1)


def two_layer(train: Tensor, labels: Tensor, test: Tensor, seed: int, steps: int = 0) -> Tensor:
    """A perceptron with one hidden layer, trained by Adam for a few epochs, and for at least so many steps."""
    x, x_test = standardised(train, test)
    with seeded_initialisation(seed):
        probe = nn.Sequential(nn.Linear(x.shape[1], UNITS), nn.ReLU(), nn.Linear(UNITS, int(labels.max()) + 1))
    optimizer = torch.optim.Adam(probe.parameters(), LEARNING_RATE)
    samples = Split(x, labels)
    epochs = max(EPOCHS, -(-steps // samples.num_batches(BATCH_SIZE)))
    learn(probe, samples, epochs, BATCH_SIZE, optimizer, seeded("probe", seed), setting="audit.probes")
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


def balanced_bits(probability: Tensor, is_class: Tensor, share: float) -> Tensor:
    """What a probability says about "is it of the class" of each sample, if half of all samples were, (samples), bits.

    Its mean over the samples of the class and its mean over the others average to the usable information under that
    balance, whose entropy is 1 bit. So a rare class can be judged as well as a frequent one.

    Args:
        probability: from a probe, (samples)
        is_class: (samples)
        share: of the class in the samples that the probe learned from
    """
    p = probability.double().clamp(SUREST, 1 - SUREST)
    odds = p / (1 - p) * (1 - share) / share
    return 1 - torch.where(is_class, 1 + 1 / odds, 1 + odds).log2()
