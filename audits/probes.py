"""What a probe reads in a representation, whatever the classifier's own output layer makes of it.

A probe goes from features (samples, n) and labels (samples) of the training split, features of others (others, n) and a
seed to the probabilities of the classes (others, classes). Alain and Bengio 2016, arXiv:1610.01644.
"""

import math
from collections.abc import Sequence
from typing import Any

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
        probe = HookedMNISTClassifier((UNITS,), x.shape[1], int(labels.max()) + 1, bias=True)
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


def prototype_recall(train: Predictions, test: Predictions, forget_class: int, count: int, seed: int) -> float:
    """Percent of the forget class's test samples that are nearest to its mean: what a thief with few samples gets back.

    The mean is that of the representations of `count` random training samples, as those of the other classes are, by
    the Euclidean distance: no training (Mensink et al. 2013, IEEE TPAMI 35(11)). Prototypical relearning (Ha et al.
    2025, arXiv:2506.01318) sets the class's output row alone: features that are all positive then give it every sample.
    """
    order = torch.randperm(len(train.labels), generator=seeded("prototypes", seed))
    features, labels = train.hidden[-1][order], train.labels[order]
    means = [features[labels == label][:count].mean(0) for label in range(int(labels.max()) + 1)]
    of_class = test.hidden[-1][test.labels == forget_class]
    return 100 * (torch.cdist(of_class, torch.stack(means)).argmin(1) == forget_class).double().mean().item()


def found_by_probes(
    train: Predictions, test: Predictions, forget_class: int, seed: int, probes: Sequence[str] = ()
) -> dict[str, Any]:
    """What `linear` and other probes, each by its name, find of a class in the test split.

    `probe_recall`: percent of the class's samples that get its label, in the representation. `usable_bits`: about "is
    it of the class", by layer, also of `two_class`, the logistic regression to just that; layers are `representation`,
    and where `hidden` is among the probes `hidden_0` and on, those before it.
    """
    known = {"linear": linear, "two_layer": two_layer, "neighbours": neighbours}
    is_forget = test.labels == forget_class
    last, bits = len(train.hidden) - 1, {}
    for index in range(last + 1) if "hidden" in probes else [last]:
        x, x_test = train.hidden[index], test.hidden[index]
        given = {name: known[name](x, train.labels, x_test, seed) for name in ("linear", *probes) if name in known}
        of_class = {name: probabilities[:, forget_class] for name, probabilities in given.items()}
        of_class["two_class"] = linear(x, (train.labels == forget_class).long(), x_test, seed)[:, 1]
        of_layer = {name: usable_bits(probability, is_forget) for name, probability in of_class.items()}
        bits["representation" if index == last else f"hidden_{index}"] = of_layer
    named = {name: (each[is_forget].argmax(1) == forget_class).double().mean().item() for name, each in given.items()}
    return {"probe_recall": {name: 100 * share for name, share in named.items()}, "usable_bits": bits}
