"""Erasing a class: late layers are edited so that the representation says little about it, and not only the output.

The representation is what the last layer reads. Attackers tell the class from others by it: each is a ridge regression
on random features, and a new one is drawn at every training step, so that an edit cannot just fool one of them. A
classifier that never saw the class still tells it apart a little. The target estimates what attackers would find there:
it lies between what they find in the inputs and what they find in the original (`target_r_squared`).
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from mimu.errors import InputError
from mimu.hooked import HookedClassifier
from mimu.masks import LayerMask, Mask
from mimu.probes import held_out_variance, standardised
from mimu.samples import Split, drawn_of_every_class
from mimu.seeds import seeded
from mimu.settings import Count, NonNegative, Positive, Share, library_settings
from mimu.training import descend, forgetting_loss

MAX_EDITED = 4  # layers before the last one that are edited, at most
HELD_OUT = 5  # every fifth sample of a class is held out from training
MIN_TO_TRAIN = 20  # training samples of the class below which only its output weights are trained: more would overfit
MIN_TO_JUDGE = 50  # held-out samples, of the class and of the others, below which they say too little
ATTACKERS = 5  # whose mean R^2 counts
TOLERANCE = 0.02  # of R^2 above the target that still counts as reaching it


@dataclass(frozen=True)
class ErasingConfig:
    """Settings of `erase_class` (explained in settings.yaml), and the attackers that they describe."""

    samples: Count
    group_size: Count
    others_ratio: Count
    steps: Count
    learning_rate: Positive
    forget_weight: NonNegative
    erase_weight: NonNegative
    units: Count
    ridge: Positive
    share: Share

    @staticmethod
    def configured() -> "ErasingConfig":
        """Reads the settings of `settings.yaml`."""
        return ErasingConfig(**library_settings()["erase"])

    def attacker_r_squared(self, features: Tensor, is_forget: Tensor, generator: torch.Generator) -> Tensor:
        """Draws one attacker, and returns its R^2 on whether a sample is of the class (`held_out_variance`).

        It reads V z + b, one half rectified: z are the standardised features (samples, ...), V and b are random.
        """
        (z,) = standardised(features.flatten(1).float())
        random = torch.randn(z.shape[1] + 1, self.units, generator=generator, dtype=torch.float32).to(z)
        directions, offsets = random[1:] * math.sqrt(2 / z.shape[1]), random[0]
        linear, rectified = (z @ directions + offsets).tensor_split(2, 1)
        return held_out_variance(torch.cat([linear, rectified.relu()], 1), is_forget.to(z), self.ridge)

    def mean_r_squared(self, features: Tensor, is_forget: Tensor, seed: int) -> float:
        """The mean R^2 of several attackers, at least 0."""
        generator = seeded("attackers", seed)
        return max(fmean(self.attacker_r_squared(features, is_forget, generator).item() for _ in range(ATTACKERS)), 0.0)

    def target_r_squared(self, in_inputs: float, in_original: float) -> float:
        """The R^2 that attackers may reach in the edited representation, from what they find before any edit."""
        return in_inputs + self.share * max(0.0, in_original - in_inputs)


class RecoveredInformation(NamedTuple):
    """The mean R^2 of attackers on a class: before an edit, after it, and the target."""

    before: float
    after: float
    target: float

    def __str__(self) -> str:
        return f"attackers find R^2 {self.after:.2f}, before {self.before:.2f}, target {self.target:.2f}"

    @property
    def is_at_target(self) -> bool:
        """True if attackers find at most TOLERANCE more than the target."""
        return self.after <= self.target + TOLERANCE


def erase_class(
    classifier: HookedClassifier,
    split: Split,
    forget_class: int,
    config: ErasingConfig,
    seed: int,
    start: Mask | None = None,
    progress: bool = False,
    model_inputs: Tensor | None = None,
) -> tuple[Mask, RecoveredInformation]:
    """Edits the last layers of a classifier so that attackers hardly tell the class, and returns the edit as a mask.

    The first edit (`Edit`) changes the weights of the last layer and of one layer before it. It changes two before it
    if the network ends in three linear layers with a ReLU between each two. If attackers still find more than the
    target in the samples that judge (`split_samples`), a new edit of one more layer is trained from the start, up to
    MAX_EDITED. The mask under which attackers find least is returned. An edit minimises

        cross entropy of the retained classes - forget_weight E[log(1 - p)] + erase_weight max(0, R^2 - target)

    where p is the probability of the class on its own samples, and R^2 what a new attacker finds in the step.

    Args:
        split: samples of the class and of the retained classes, as the classifier reads them
        start: a mask to begin with; the mask returned includes it
        model_inputs: what the whole network reads for the samples, if the classifier is only its suffix

    Raises:
        InputError: there is no layer before the last one. TrainingError: the training diverges.
    """
    layers, num_linear = late_layers(classifier), len(classifier.trace.names_at_the_end) - 1
    train, judging = split_samples(split.labels, forget_class, config, seed)
    chosen, num_train = torch.cat([train, judging]), len(train)
    labels, model_inputs = split.labels[chosen], split.images if model_inputs is None else model_inputs
    is_forget, directions, rounds = labels[num_train:] == forget_class, {}, []
    with start.applied_to(classifier) if start else nullcontext():
        suffix = classifier.suffix_from(layers)
        inputs = classifier.prefix_activations(layers, split.images.index_select(0, chosen))
        representation = suffix.value_of(suffix.trace.representation, inputs[num_train:])
        before = config.mean_r_squared(representation, is_forget, seed)
        target = config.target_r_squared(config.mean_r_squared(model_inputs[judging], is_forget, seed), before)
        for num_hidden in range(min(2, num_linear) or 1, len(layers)):
            edited = layers[-1 - num_hidden :]
            edited_suffix, cached_inputs = suffix.suffix_from(edited), suffix.prefix_activations(edited, inputs)
            for layer in edited[:-1]:
                if layer not in directions:
                    x = edited_suffix.mean_inputs(layer, cached_inputs[:num_train])
                    directions[layer] = direction_to_erase(x, labels[:num_train], forget_class)
            samples = Split(cached_inputs, labels)
            edit = Edit(edited_suffix, start, edited, samples, num_train, forget_class, directions)
            recovered = RecoveredInformation(before, edit.train(target, config, seed, progress), target)
            rounds.append((edit.mask(start), recovered))
            if recovered.is_at_target:
                break
    return min(rounds, key=lambda each: each[1].after)


class Edit:
    """A trainable change of the weights W of the last layers of a classifier to W - U V^T, of rank 1 in each.

    In a hidden layer V is the direction of the class (after Hatami et al. 2026, arXiv:2604.15166). U, trained, says how
    much less of it each neuron reads. At first no neuron reads that direction. In the last layer U selects the class,
    and V, trained, is subtracted from its output weights. At first V equals them, so that they are zero.
    """

    def __init__(
        self,
        classifier: HookedClassifier,
        start: Mask | None,
        layers: Sequence[int],
        samples: Split,
        num_train: int,
        forget_class: int,
        directions: Mapping[int, Tensor],
    ) -> None:
        """Prepares the edit of a classifier, which is under the mask `start`, and runs what no training step changes.

        samples: as the classifier reads them; the first num_train are trained on, the others judge
        directions: `direction_to_erase` in the inputs of each hidden layer
        """
        self.labels, self.num_train, self.forget_class = samples.labels, num_train, forget_class
        self.weights = {classifier.names[layer]: classifier.weights[layer].detach() for layer in layers}
        self.masks: dict[str, LayerMask] = {}
        is_few = (self.labels[:num_train] == forget_class).sum() < MIN_TO_TRAIN
        for layer, (name, weight) in zip(layers, self.weights.items()):
            keep = start.by_layer[name].keep if start and name in start.by_layer else torch.ones_like(weight)
            if layer == layers[-1]:
                u = F.one_hot(torch.tensor([forget_class]), len(weight)).T.to(weight)
                v = weight[forget_class][:, None].clone().requires_grad_()
            else:
                v = directions[layer].to(weight)[:, None]
                u = (weight.flatten(1) @ v).requires_grad_(not is_few)
            self.masks[name] = LayerMask(keep, u, v)
        self.trained = [*(mask.u for mask in self.masks.values() if mask.u.requires_grad), v]
        self.classifier, self.cached_inputs, self.read = classifier, [samples.images], None
        first = next(iter(self.masks.values()))
        if first.keep.all():  # then W x and V^T x of the first layer need to be computed only once
            direction = first.v.T.reshape(1, *first.keep.shape[1:])
            with suppress(ValueError):  # of a network that cannot be run from behind this layer on
                self.cached_inputs, self.read = classifier.recorded(layers[0], samples.images, direction)
                self.classifier = classifier.suffix_after(layers[0])

    def outputs(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """The representation (samples, ...) and the logits (samples, classes) of the samples with these indices."""
        inputs = [values[chosen] for values in self.cached_inputs]
        weights = {name: mask.applied(self.weights[name]) for name, mask in self.masks.items()}
        if self.read is not None:
            first = next(iter(self.masks))
            channels = -1 if weights.pop(first).ndim == 2 else 1
            lost = self.read[chosen].movedim(channels, -1) @ self.masks[first].u.T
            inputs[0] = inputs[0] - lost.movedim(-1, channels)
        # Indexing a batch of one makes the gradient of each weight contiguous by rows.
        return self.classifier.outputs(inputs, weights={name: weight[None][0] for name, weight in weights.items()})

    def train(self, target: float, config: ErasingConfig, seed: int, progress: bool) -> float:
        """Trains the edit, and returns the R^2 that attackers then find on the samples that judge it.

        Batch and attacker are new in every step. The factors, Adam's moments, the learning rate's schedule and the
        random generator are kept from one step to the next.
        """
        is_forget = self.labels == self.forget_class
        indices = torch.arange(len(self.labels), device=self.labels.device)
        train, judging = indices[: self.num_train], indices[self.num_train :]
        generator = seeded("erase", seed, self.forget_class)
        optimizer = torch.optim.Adam(self.trained, config.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
        bar = {"desc": f"class {self.forget_class}", "unit": "step", "delay": 1, "leave": False}
        for step in tqdm(range(config.steps), **bar, disable=None if progress else True):
            batch = draw_batch(train, is_forget, config.group_size, config.others_ratio, generator)
            is_own = is_forget[batch]
            features, logits = self.outputs(batch)
            forget = forgetting_loss(logits[is_own].softmax(1)[:, self.forget_class])
            retain = F.cross_entropy(logits[~is_own], self.labels[batch[~is_own]])
            excess = (config.attacker_r_squared(features, is_own, generator) - target).clamp_min(0)
            loss = retain + config.forget_weight * forget + config.erase_weight * excess
            descend(optimizer, {"loss": loss}, step, "eval.hyperparameters.erase")
            schedule.step()
        with torch.no_grad():
            features, _ = self.outputs(judging)
        return config.mean_r_squared(features, is_forget[judging], seed)

    def mask(self, start: Mask | None) -> Mask:
        """The edit as a mask, together with the mask that it started from."""
        mask = Mask({name: LayerMask(*map(torch.detach, part)) for name, part in self.masks.items()})
        return start & mask if start else mask


def late_layers(classifier: HookedClassifier) -> list[int]:
    """The indices of the layers that an edit may change, in the order of their calls. Raises InputError."""
    trace = classifier.trace
    names = [name for name in trace.called.values() if trace.layers[name].groups == 1]
    if len(names) < 2 or trace.layers[names[-1]].node is not trace.output:
        must = "that must give the logits, and stand behind a layer that can be masked"
        raise InputError(f"a class is erased from what the last layer is given: {must}")
    return [classifier.names.index(name) for name in names[-1 - MAX_EDITED :]]


def held_out(labels: Tensor) -> Tensor:
    """Marks the samples that are not trained on: one in HELD_OUT of every class, (samples)."""
    is_held_out = torch.zeros_like(labels, dtype=torch.bool)
    for label in labels.unique():
        indices = (labels == label).nonzero()[:, 0]
        is_held_out[indices[HELD_OUT - 1 :: HELD_OUT]] = True
    return is_held_out


def split_samples(labels: Tensor, forget_class: int, config: ErasingConfig, seed: int) -> tuple[Tensor, Tensor]:
    """Draws the indices of samples to train on, and of held-out samples on which attackers judge the edit.

    Where too few are held out, of the class or of the others, training samples judge.
    """
    is_forget, is_held_out = labels == forget_class, held_out(labels)
    train, judging = (~is_held_out).nonzero()[:, 0], is_held_out.nonzero()[:, 0]
    num_forget = int(is_forget[judging].sum())
    is_enough = min(num_forget, len(judging) - num_forget) >= MIN_TO_JUDGE
    train = train[drawn_of_every_class(labels[train], config.samples, "erase", seed, forget_class)]
    count, generator = config.samples // (HELD_OUT - 1), seeded("held out", seed, forget_class)
    return train, draw_batch(judging if is_enough else train, is_forget, count, config.others_ratio, generator)


def draw_batch(candidates: Tensor, is_forget: Tensor, count: int, ratio: int, generator: torch.Generator) -> Tensor:
    """Draws `count` candidates of the class, and `ratio` times as many others, or fewer, as among all candidates."""
    # The rarer the class, the smaller the R^2 of an attacker: it must be as rare wherever two are compared.
    candidates = candidates[torch.randperm(len(candidates), generator=generator).to(candidates.device)]
    forget, retain = candidates[is_forget[candidates]], candidates[~is_forget[candidates]]
    ratio, forget = min(ratio, len(retain) / len(forget)), forget[:count]
    return torch.cat([forget, retain[: math.ceil(ratio * len(forget))]])


def direction_to_erase(x: Tensor, labels: Tensor, forget_class: int) -> Tensor:
    """`class_direction`; where that is 0, the class's mean less the mean of all others, normalised."""
    direction, is_forget = class_direction(x, labels, forget_class), labels == forget_class
    return direction if direction.any() else F.normalize((x[is_forget].mean(0) - x[~is_forget].mean(0)).double(), dim=0)


def class_direction(x: Tensor, labels: Tensor, forget_class: int) -> Tensor:
    """The part (n) of a class's mean of x (samples, n) that the other classes' means do not span, normalised, or 0."""
    classes = [forget_class, *(label for label in labels.unique().tolist() if label != forget_class)]
    mean, *means = (x[labels == label].mean(0, dtype=torch.double) for label in classes)
    spanned = torch.stack(means)
    residual = mean - mean @ torch.linalg.pinv(spanned) @ spanned
    return F.normalize(residual, dim=0) if residual.norm() > 1e-6 * mean.norm() else torch.zeros_like(residual)
