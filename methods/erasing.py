"""Erasure: a class is taken from the representation, not only from the output, by one direction of every layer.

The bar is a classifier that never saw the class. It tells the class from others all the same: about as well as
features of the images do that were never trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor
from tqdm import tqdm

from mimu.data import Count, NonNegative, Positive, Split, drawn_of_every_class, seeded, some_of_every_class
from mimu.eval import Request
from mimu.masking.order import FEW, forgetting_loss
from mimu.masking.regression import explained_variance, standardised
from mimu.methods.controls import further
from mimu.methods.projections import class_direction
from mimu.networks.hooked import HookedClassifier
from mimu.networks.masks import LayerMask, Mask
from mimu.runs.files import PACKAGE, InputError
from mimu.trainer import descend


@dataclass(frozen=True)
class Erasing:
    """How a class is erased.

    samples: of every class, of which a step draws group_size; steps: of Adam, 0 for the projections alone
    forget_weight, erase_weight: of the two terms beside the others' cross entropy
    rivals: how many of the nearest classes must not be distinguished from the class; ridge: of the regressions
    untrained: how many untrained features say how well a classifier does that never saw the class, for each feature of
        the representation
    """

    samples: Count
    group_size: Count
    steps: Annotated[int, "at least 0"]
    learning_rate: Positive
    forget_weight: NonNegative
    erase_weight: NonNegative
    rivals: Count
    untrained: Positive
    ridge: Positive

    @staticmethod
    def configured() -> Erasing:
        """What configs/methods.yaml says."""
        config = yaml.safe_load((PACKAGE / "configs" / "methods.yaml").read_text())
        return Erasing(**config["eval"]["hyperparameters"]["erase"])

    def untrained_features(self, images: Tensor, count: int, seed: int) -> Tensor:
        """relu(V x) of images (samples, ...), V drawn as for a layer that is to be trained; they stand for `count`."""
        x, units = images.flatten(1), max(1, round(self.untrained * count))
        uniform = torch.rand(units, x.shape[1], generator=seeded("untrained", seed), dtype=torch.float32)
        return (x @ (2 * uniform.to(x) - 1).T).relu()


def nearest(features: Tensor, labels: Tensor, label: int, count: int) -> list[int]:
    """A class, and those whose means of the standardised features (samples, n) are nearest to its own."""
    (x,) = standardised(features)
    classes = labels.unique()
    means = torch.stack([x[labels == each].mean(0) for each in classes])
    distances = (means - x[labels == label].mean(0)).norm(dim=1).masked_fill(classes == label, -1)
    return classes[distances.argsort()[: 1 + count]].tolist()


def together(start: Mask | None, edits: dict[str, LayerMask]) -> Mask:
    """The mask that takes directions from layers, by their names, beside what a mask to start with does."""
    return start & Mask(edits) if start else Mask(dict(edits))


@torch.no_grad()
def projections(
    classifier: HookedClassifier, samples: Split, label: int, start: Mask | None = None
) -> dict[str, LayerMask]:
    """What of each layer reads the class: W u u^T, u what of the class's mean input the other classes' do not span.

    After Hatami et al. 2026, arXiv:2604.15166; here layer after layer, each on what those before it give without
    theirs, under a mask to start with. Of the last layer it is the class's row, e_d w_d^T.
    Raises InputError where there is no layer before the last.
    """
    trace = classifier.trace
    name_of_call = {layer.node: name for name, layer in trace.layers.items() if layer.groups == 1}
    *hidden, last = [name_of_call[node] for node in trace.nodes if node in name_of_call] or [None]
    if not hidden or trace.layers[last].node is not trace.output:
        must = "that must give the logits, and stand behind a layer that can be masked"
        raise InputError(f"a class is erased from what the last layer is given: {must}")
    weights = dict(zip(classifier.names, classifier.weights))
    found = {name: LayerMask.of(torch.ones_like(weights[name])) for name in (*hidden, last)}
    activations, begun = samples.images, classifier
    for name in hidden:
        index = classifier.names.index(name)
        with together(start, found).applied_to(classifier):
            activations = begun.prefix_activations([index], activations)
            begun = classifier.begun_before([index])
            weight = classifier.weights[index].flatten(1)
            u = class_direction(begun.mean_inputs(index, activations), samples.labels, label).to(weight)[:, None]
            found[name] = found[name]._replace(left=weight @ u, right=u)
    with together(start, found).applied_to(classifier):
        weight = classifier.weights[classifier.names.index(last)]
        is_row = F.one_hot(torch.tensor([label]), len(weight)).T.to(weight)
        found[last] = found[last]._replace(left=is_row, right=weight[label][:, None].clone())
    return found


def told_apart(features: Tensor, labels: Tensor, classes: list[int], ridge: float) -> Tensor:
    """How well a ridge regression tells the first of some classes from the others: R^2 (`explained_variance`)."""
    parts = [features[labels == each] for each in classes]
    return explained_variance(torch.cat(parts), len(parts[0]), ridge)


def erased(
    classifier: HookedClassifier,
    split: Split,
    label: int,
    config: Erasing,
    seed: int,
    start: Mask | None = None,
    progress: bool = False,
    bar: float | None = None,
) -> Mask:
    """The mask that takes a class from the representation and from the output, with as little harm to the others.

    It begins as `projections`. By how much of its direction each neuron reads less, and the class's row of the last
    layer, is learned (from fewer than FEW samples of a class, to which all layers overfit, the row alone), so that

        cross entropy of the others - forget_weight E_d[log(1 - p_d)] + erase_weight max(0, R^2 - R_0^2)

    is least: R^2 says how well a ridge regression tells the class from its rivals in the representation, R_0^2 how well
    it does so in untrained features of the images, below which there is nothing to erase.

    split: samples of the class and of those to keep; start: a mask to begin with, to which this one adds
    bar: R_0^2 where it is known; None: that of untrained features
    Raises InputError where there is no layer before the last, TrainingError where it diverges.
    """
    samples = some_of_every_class(split, config.samples, "erase", seed, label)
    generator = seeded("erase", seed, label)
    edits = projections(classifier, samples, label, start)
    features = classifier.value_of(classifier.trace.representation, samples.images)
    rivals = nearest(features, samples.labels, label, config.rivals)
    probe = partial(told_apart, classes=rivals, ridge=config.ridge)
    if bar is None:
        bar = probe(config.untrained_features(samples.images, features.shape[1], seed), samples.labels)
    *hidden, row = edits.values()
    is_few = int(samples.labels.unique(return_counts=True)[1].min()) < FEW
    learned = [row.right] if is_few else [*(edit.left for edit in hidden), row.right]
    optimizer = torch.optim.Adam([each.requires_grad_() for each in learned], config.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, config.steps))
    about = {"desc": f"class {label}", "unit": "step", "delay": 1, "leave": False}
    for step in tqdm(range(config.steps), **about, disable=None if progress else True):
        chosen = samples[drawn_of_every_class(samples.labels, config.group_size, lambda _: generator)]
        # As the only one of several: the gradient of each is then laid out row after row.
        weights = {name: w[None][0] for name, w in together(start, edits).weights(classifier).items()}
        features, logits = classifier.outputs(chosen.images, weights=weights)
        is_forget = chosen.labels == label
        forget = forgetting_loss(logits[is_forget].softmax(1)[:, label])
        loss = F.cross_entropy(logits[~is_forget], chosen.labels[~is_forget]) + config.forget_weight * forget
        loss = loss + config.erase_weight * (probe(features, chosen.labels) - bar).clamp_min(0)
        descend(optimizer, {"loss": loss}, step, "eval.hyperparameters.erase")
        schedule.step()
    done = {name: LayerMask(*map(torch.detach, edit)) for name, edit in edits.items()}
    return together(start, done)


@further("erase", paper="after Hatami et al. 2026, arXiv:2604.15166", touches="a mask")
def erase(request: Request, *, config: Erasing) -> Mask:
    """One direction less in what every layer reads, the class's, by shares that are learned, and its output row."""
    return erased(request.classifier, request.train, request.forget_class, config, request.seed)
