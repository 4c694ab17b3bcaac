"""What a probe reads in a representation, whatever the classifier's own output layer makes of it.

A probe goes from features (samples, n) and labels (samples) of the training split, features of others (others, n) and a
seed to the probabilities of the classes (others, classes). Alain and Bengio 2016, arXiv:1610.01644.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from audits.predictions import Predictions
from mimu.probes import linear, neighbours, two_layer, usable_bits
from mimu.seeds import seeded


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
