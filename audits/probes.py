"""What a probe reads in a representation, whatever the classifier's own output layer makes of it.

A probe goes from features (samples, n) and labels (samples) of the training split, features of others (others, n) and a
seed to the predicted classes (others). Alain and Bengio 2016, arXiv:1610.01644.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mimu.audits.predictions import Predictions
from mimu.data import Split, seeded, seeded_initialisation
from mimu.masking.regression import standardised
from mimu.model import HookedMNISTClassifier
from mimu.trainer import learn

PENALTY = 0.0001  # of the linear probe's squared coefficients
STEPS = 300  # of L-BFGS, at most
UNITS = 64  # in the hidden layer of the perceptron
EPOCHS = 5
BATCH_SIZE = 1024
LEARNING_RATE = 0.01  # Adam
NEIGHBOURS = 20  # whose majority decides
NEIGHBOURS_OF = 10_000  # among so many training samples


def linear(train: Tensor, labels: Tensor, test: Tensor, seed: int) -> Tensor:
    """Softmax regression, trained to convergence by L-BFGS."""
    x, x_test = standardised(train, test)
    # In the directions of the principal components, each of variance 1, few steps do.
    values, vectors = torch.linalg.eigh((x.T @ x / len(x)).double())
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
    return (x_test @ solution.detach()).argmax(1)


def two_layer(train: Tensor, labels: Tensor, test: Tensor, seed: int) -> Tensor:
    """A perceptron with one hidden layer, trained by Adam for a few epochs."""
    x, x_test = standardised(train, test)
    with seeded_initialisation(seed):
        probe = HookedMNISTClassifier((UNITS,), x.shape[1], int(labels.max()) + 1, bias=True)
    optimizer = torch.optim.Adam(probe.parameters(), LEARNING_RATE)
    learn(probe, Split(x, labels), EPOCHS, BATCH_SIZE, optimizer, seeded("probe", seed), setting="audit.probes")
    with torch.no_grad():
        return probe(x_test).argmax(1)


def neighbours(train: Tensor, labels: Tensor, test: Tensor, seed: int) -> Tensor:
    """The most frequent class among the nearest of some random training samples, by the Euclidean distance."""
    order = torch.randperm(len(labels), generator=seeded("neighbours", seed))[:NEIGHBOURS_OF]
    x, x_test = standardised(train[order], test)
    # |a - b|^2 = |a|^2 + |b|^2 - 2 a b: |a|^2 is the same for all neighbours of a.
    distances = torch.addmm(x.square().sum(1), x_test, x.T, alpha=-2)
    nearest = distances.topk(min(NEIGHBOURS, len(x)), largest=False).indices
    return F.one_hot(labels[order][nearest]).sum(1).argmax(1)


def prototype_recall(train: Predictions, test: Predictions, forget_class: int, count: int, seed: int) -> float:
    """Percent of the forget class's test samples that are nearest to its mean: what a thief with few samples gets back.

    The mean is that of the representations of `count` random training samples, as those of the other classes are, by
    the Euclidean distance: no training (Mensink et al. 2013, IEEE TPAMI 35(11); prototypes in few-shot learning).
    """
    order = torch.randperm(len(train.labels), generator=seeded("prototypes", seed))
    features, labels = train.hidden[-1][order], train.labels[order]
    means = [features[labels == label][:count].mean(0) for label in range(int(labels.max()) + 1)]
    of_class = test.hidden[-1][test.labels == forget_class]
    return 100 * (torch.cdist(of_class, torch.stack(means)).argmin(1) == forget_class).double().mean().item()


def probe_scores(
    train: Predictions, test: Predictions, forget_class: int, seed: int, probes: Sequence[str] = ()
) -> tuple[dict[str, float], float]:
    """Percent of the forget class's test samples that each probe finds, and of the others that `linear` has right.

    `linear` comes first, then those given; `hidden` gives `hidden_0`, `hidden_1` ..., one for every layer.
    """
    is_forget = test.labels == forget_class
    is_right = linear(train.hidden[-1], train.labels, test.hidden[-1], seed) == test.labels
    found = {"linear": is_right[is_forget]}
    for name in probes:
        probe = {"two_layer": two_layer, "neighbours": neighbours, "hidden": linear}[name]
        for layer in range(len(train.hidden) - 1) if name == "hidden" else [-1]:
            classes = probe(train.hidden[layer], train.labels, test.hidden[layer][is_forget], seed)
            found[name if layer < 0 else f"{name}_{layer}"] = classes == forget_class
    recalls = {name: 100 * of_probe.double().mean().item() for name, of_probe in found.items()}
    return recalls, 100 * is_right[~is_forget].double().mean().item()
