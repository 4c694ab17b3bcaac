"""Erasing classes: late layers are edited so that the representation says little about them, and not only the output.

The representation is what the last layer reads. Attackers tell the class from others by it: each is a ridge regression
on random features, and a new one is drawn at every training step, so that an edit cannot just fool one of them. A
classifier that never saw the class still tells it apart. The target estimates what attackers would find there: it lies
between what they find in the inputs and what they find in the original (`target_r_squared`). Where they find no more
than the target in the first place, the class's output weights alone are edited.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from mimu.errors import InputError, named
from mimu.hooked import HookedClassifier
from mimu.masks import LayerMask, Mask
from mimu.probes import held_out_variance, standardised
from mimu.samples import HELD_OUT, Split, drawn_of_every_class, held_out
from mimu.seeds import seeded
from mimu.settings import Count, NonNegative, Positive, Share, library_settings
from mimu.training import descend, forgetting_loss

MAX_EDITED = 4  # layers before the last one that are edited, at most
MIN_TO_JUDGE = 50  # held-out samples, of the class and of the others, below which they say too little
ATTACKERS = 5  # whose mean R^2 counts
LINEAR_SHARE = 0.25  # of an attacker's random features that are not rectified
SHARE_OF = 10  # classes, for which `share` in settings.yaml is given
START = 0.5  # of the class's direction is removed before training; from 0 on, some edits do not come to remove any
SHARES = (0.75, 0.5, 0.25)  # to which an edit is weakened while it takes more than the target asks for
TOLERANCE = 0.02  # of R^2 above the target that still counts as reaching it
SEEN = 0.1  # R^2 in the original below which attackers see too little of a class to judge its erasure
FEWEST = 10  # samples of a class below which its erasure cannot be judged


@dataclass(frozen=True)
class ErasingConfig:
    """Settings of `erase_classes` (explained in settings.yaml), and the attackers that they describe."""

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
        """Draws one attacker, and returns its R^2 on whether a sample is of each class to forget, (classes).

        It reads V z + b, a part of it rectified: z are the standardised features, V and b are random. However many
        samples there are, all those of a class to forget weigh as much as 1 / others_ratio of the others together.

        Args:
            features: (samples, ...)
            is_forget: (samples, classes) bool
        """
        (z,) = standardised(features.flatten(1).float())
        random = torch.randn(z.shape[1] + 1, self.units, generator=generator, dtype=torch.float32).to(z)
        directions, offsets = random[1:] * math.sqrt(2 / z.shape[1]), random[0]
        linear, rectified = (z @ directions + offsets).tensor_split([int(LINEAR_SHARE * self.units)], 1)
        targets, is_other = is_forget.to(z), ~is_forget.any(1)
        weight = (targets / targets.sum(0)).sum(1) + is_other.to(z) * self.others_ratio / is_other.sum()
        return held_out_variance(torch.cat([linear, rectified.relu()], 1), targets, self.ridge, weight)

    def mean_r_squared(self, features: Tensor, is_forget: Tensor, seed: int) -> Tensor:
        """The mean R^2 of several attackers on each class to forget, at least 0, (classes)."""
        generator = seeded("attackers", seed)
        drawn = [self.attacker_r_squared(features, is_forget, generator) for _ in range(ATTACKERS)]
        return torch.stack(drawn).mean(0).clamp_min(0)

    def target_r_squared(self, in_inputs: Tensor, in_original: Tensor, num_classes: int) -> Tensor:
        """The R^2 that attackers may reach in the edited representation, at most what they find before any edit.

        The more other classes a network learned, the more its features tell of one that it never saw: the share of the
        way from the inputs to the original that is missing there falls with the root of their number (docs/erasure.md).
        """
        share = max(0.0, 1 - (1 - self.share) * math.sqrt(SHARE_OF / num_classes))
        return torch.minimum(in_inputs + share * (in_original - in_inputs), in_original)


class RecoveredInformation(NamedTuple):
    """The mean R^2 of attackers on a class, before an edit, after it and the target, and how many samples it has."""

    before: float
    after: float
    target: float
    num_samples: int

    def __str__(self) -> str:
        r_squared = f"attackers find R^2 {self.after:.2f}, before {self.before:.2f}, target {self.target:.2f}"
        if not self.can_be_judged:
            return f"cannot be judged by {self.num_samples} sample{'s' * (self.num_samples > 1)} ({r_squared})"
        return f"{'erased' if self.is_at_target else 'not erased'}: {r_squared}"

    @property
    def can_be_judged(self) -> bool:
        """True if there are samples enough, and attackers see the class in the original."""
        return self.num_samples >= FEWEST and self.before >= SEEN

    @property
    def is_at_target(self) -> bool:
        """True if attackers find at most TOLERANCE more than the target."""
        return self.after <= self.target + TOLERANCE


def erase_classes(
    classifier: HookedClassifier,
    split: Split,
    forget: Sequence[int],
    config: ErasingConfig,
    seed: int,
    start: Mask | None = None,
    progress: bool = False,
    model_inputs: Tensor | None = None,
) -> tuple[Mask, dict[int, RecoveredInformation]]:
    """Edits the last layers of a classifier so that attackers hardly tell classes, and returns the edit as a mask.

    Where attackers find no more than the target, the output weights alone are edited. Else an edit (`Edit`) changes the
    last layer and the one before it, or the two before it in a network that ends in three linear layers. While
    attackers find more than the target in the samples that judge (`split_samples`), an edit of one more layer is
    trained, up to MAX_EDITED. The mask under which attackers find least is returned. An edit minimises

        cross entropy of the retained classes - forget_weight E[log(1 - p)] + erase_weight max(0, R^2 - target)

    where p is the probability of the class on its own samples, and R^2 what a new attacker finds in the step. The last
    two terms are sums over the classes to forget.

    Args:
        split: samples of these classes and of the retained classes, as the classifier reads them
        start: a mask to begin with; the mask returned includes it
        model_inputs: what the whole network reads for the samples, if the classifier is only its suffix

    Raises:
        InputError: there is no layer before the last one. TrainingError: the training diverges.
    """
    layers, num_linear = late_layers(classifier), len(classifier.trace.names_at_the_end) - 1
    train, judging = split_samples(split.labels, forget, config, seed)
    chosen, num_train = torch.cat([train, judging]), len(train)
    labels, model_inputs = split.labels[chosen], split.images if model_inputs is None else model_inputs
    is_forget = membership(labels[num_train:], forget)
    edits: list[tuple[Mask, Tensor]] = []  # and what attackers find under each
    with start.applied_to(classifier) if start else nullcontext():
        suffix = classifier.suffix_from(layers)
        inputs = classifier.prefix_activations(layers, split.images.index_select(0, chosen))
        representation = suffix.value_of(suffix.trace.representation, inputs[num_train:])
        before = config.mean_r_squared(representation, is_forget, seed)
        in_inputs = config.mean_r_squared(model_inputs[judging], is_forget, seed)
        target = config.target_r_squared(in_inputs, before, len(split.labels.unique()))
        is_at_target = bool((before <= target + TOLERANCE).all())
        for num_hidden in [0] if is_at_target else range(min(2, num_linear) or 1, len(layers)):
            edited = layers[-1 - num_hidden :]
            samples = Split(suffix.prefix_activations(edited, inputs), labels)
            edit = Edit(suffix.suffix_from(edited), edited, samples, num_train, forget)
            after = edit.train(target, config, seed, progress)
            edits.append((edit.mask(), after))
            if (after <= target + TOLERANCE).all():
                break
    mask, least = min(edits, key=lambda each: each[1].sum().item())
    counts = membership(split.labels, forget).sum(0).tolist()
    recovered = map(RecoveredInformation, before.tolist(), least.tolist(), target.tolist(), counts)
    return start & mask if start else mask, dict(zip(forget, recovered))


class Edit:
    """A trainable change of the weights W of the last layers to W - U V^T, of as many columns as classes to forget.

    In a hidden layer V holds the `directions_to_erase` (after Hatami et al. 2026, arXiv:2604.15166). U, trained,
    says how much less of them each neuron reads. At first every neuron reads START less of them. In the last layer U
    selects the classes, and V, trained, is subtracted from their output weights. At first V equals them, so that they
    are zero.
    """

    def __init__(
        self, classifier: HookedClassifier, layers: Sequence[int], samples: Split, num_train: int, forget: Sequence[int]
    ) -> None:
        """Prepares the edit of a classifier, which may carry a mask, and runs what no training step changes.

        samples: as the classifier reads them; the first num_train are trained on, the others judge
        """
        self.labels, self.num_train, self.forget = samples.labels, num_train, forget
        self.weights = {classifier.names[layer]: classifier.weights[layer].detach() for layer in layers}
        self.masks: dict[str, LayerMask] = {}
        carried = Mask.on(classifier)
        for layer, (name, weight) in zip(layers, self.weights.items()):
            is_masked = carried is not None and name in carried.by_layer
            keep = carried.by_layer[name].keep if is_masked else torch.ones_like(weight)
            if layer == layers[-1]:
                u = F.one_hot(torch.tensor(forget), len(weight)).T.to(weight)
                v = weight[list(forget)].T.clone().requires_grad_()
            else:
                x = classifier.mean_inputs(layer, samples.images[:num_train])
                v = directions_to_erase(x, samples.labels[:num_train], forget).to(weight)
                u = (START * weight.flatten(1) @ torch.linalg.pinv(v).T).requires_grad_()
            self.masks[name] = LayerMask(keep, u, v)
        self.trained = [*(mask.u for mask in self.masks.values() if mask.u.requires_grad), v]
        self.classifier, self.cached_inputs, self.read = classifier, [samples.images], None
        first = next(iter(self.masks.values()))
        if len(layers) > 1 and first.keep.all():  # then W x and V^T x of the first layer need to be computed only once
            direction = first.v.T.reshape(-1, *first.keep.shape[1:])
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

    def train(self, target: Tensor, config: ErasingConfig, seed: int, progress: bool) -> Tensor:
        """Trains the edit, and returns the R^2 that attackers then find on the samples that judge it, (classes).

        Batch and attacker are new in every step. The factors, Adam's moments, the learning rate's schedule and the
        random generator are kept from one step to the next.

        target: R^2 on each class, (classes)
        """
        is_forget = membership(self.labels, self.forget)
        indices = torch.arange(len(self.labels), device=self.labels.device)
        train, judging = indices[: self.num_train], indices[self.num_train :]
        generator = seeded("erase", seed, *self.forget)
        optimizer = torch.optim.Adam(self.trained, config.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
        bar = {"desc": named(self.forget), "unit": "step", "delay": 1, "leave": False}
        for step in tqdm(range(config.steps), **bar, disable=None if progress else True):
            batch = draw_batch(train, is_forget, config.group_size, config.others_ratio, generator)
            labels, is_own = self.labels[batch], is_forget[batch].any(1)
            features, logits = self.outputs(batch)
            p = logits[is_own].softmax(1).gather(1, labels[is_own, None])
            retain = F.cross_entropy(logits[~is_own], labels[~is_own])
            excess = (config.attacker_r_squared(features, is_forget[batch], generator) - target).clamp_min(0)
            forget = len(self.forget) * forgetting_loss(p)
            loss = retain + config.forget_weight * forget + config.erase_weight * excess.sum()
            descend(optimizer, {"loss": loss}, step, "eval.hyperparameters.erase")
            schedule.step()
        return self.weaken(target, judging, is_forget[judging], config, seed)

    @torch.no_grad()
    def weaken(self, target: Tensor, judging: Tensor, is_forget: Tensor, config: ErasingConfig, seed: int) -> Tensor:
        """Weakens the edit of hidden layers to the least of SHARES that reaches the target; returns the R^2, (classes).

        Attackers err from step to step, and the edit would take away far more than the target asks for.

        Args:
            judging: the indices of the samples that judge, (samples)
            is_forget: whether each is of each class, (samples, classes)
        """
        hidden = [(u, u.clone()) for u in self.trained[:-1]]
        chosen, after = 1.0, config.mean_r_squared(self.outputs(judging)[0], is_forget, seed)
        for share in SHARES if hidden and (after < target - TOLERANCE).all() else ():
            for u, whole in hidden:
                u.copy_(share * whole)
            r_squared = config.mean_r_squared(self.outputs(judging)[0], is_forget, seed)
            if (r_squared > target).any():
                break
            chosen, after = share, r_squared
        for u, whole in hidden:
            u.copy_(chosen * whole)
        return after

    def mask(self) -> Mask:
        """The edit as a mask, without the mask that the classifier carried before."""
        return Mask({name: LayerMask(*map(torch.detach, part)) for name, part in self.masks.items()})


def late_layers(classifier: HookedClassifier) -> list[int]:
    """The indices of the layers that an edit may change, in the order of their calls. Raises InputError."""
    trace = classifier.trace
    names = [name for name in trace.called.values() if trace.layers[name].groups == 1]
    if len(names) < 2 or trace.layers[names[-1]].node is not trace.output:
        must = "that must give the logits, and stand behind a layer that can be masked"
        raise InputError(f"a class is erased from what the last layer is given: {must}")
    return [classifier.names.index(name) for name in names[-1 - MAX_EDITED :]]


def membership(labels: Tensor, classes: Sequence[int]) -> Tensor:
    """Says whether each sample is of each of some classes, (samples, classes) bool."""
    return labels[:, None] == labels.new_tensor(classes)


def split_samples(labels: Tensor, forget: Sequence[int], config: ErasingConfig, seed: int) -> tuple[Tensor, Tensor]:
    """Draws the indices of samples to train on, and of held-out samples on which attackers judge the edit.

    Where too few are held out, of a class to forget or of the others, training samples judge.
    """
    is_forget, is_held_out = membership(labels, forget), held_out(labels)
    train, judging = (~is_held_out).nonzero()[:, 0], is_held_out.nonzero()[:, 0]
    counts = [*is_forget[judging].sum(0).tolist(), int((~is_forget[judging].any(1)).sum())]
    train = train[drawn_of_every_class(labels[train], config.samples, "erase", seed, *forget)]
    candidates = judging if min(counts) >= MIN_TO_JUDGE else train
    count, generator = config.samples // (HELD_OUT - 1), seeded("held out", seed, *forget)
    return train, draw_batch(candidates, is_forget, count, config.others_ratio, generator)


def draw_batch(candidates: Tensor, is_forget: Tensor, count: int, ratio: int, generator: torch.Generator) -> Tensor:
    """Draws `count` candidates of each class to forget, or fewer, and others up to (1 + ratio) * count samples in all.

    With many classes to forget, half of the samples are of others.
    """
    candidates = candidates[torch.randperm(len(candidates), generator=generator).to(candidates.device)]
    size, is_own = (1 + ratio) * count, is_forget[candidates]
    count = min(count, max(1, size // (2 * is_own.shape[1])))
    own = torch.cat([candidates[column][:count] for column in is_own.T])
    return torch.cat([own, candidates[~is_own.any(1)][: max(size - len(own), count)]])


def directions_to_erase(x: Tensor, labels: Tensor, forget: Sequence[int]) -> Tensor:
    """The `class_directions`, (n, classes); where one is 0, the class's mean less that of the retained samples."""
    is_retained, directions = ~membership(labels, forget).any(1), class_directions(x, labels, forget)
    for label, direction in zip(forget, directions.T):
        if not direction.any():
            direction.copy_(F.normalize((x[labels == label].mean(0) - x[is_retained].mean(0)).double(), dim=0))
    return directions


def class_directions(x: Tensor, labels: Tensor, forget: Sequence[int]) -> Tensor:
    """The part of each class's mean of x that the retained classes' means do not span, normalised, or 0, (n, classes).

    Args:
        x: (samples, n)
        labels: (samples)
        forget: the classes; all others are retained
    """
    classes = [*forget, *(label for label in labels.unique().tolist() if label not in forget)]
    means = torch.stack([x[labels == label].mean(0, dtype=torch.double) for label in classes])
    own, spanned = means[: len(forget)], means[len(forget) :]
    residuals = own - own @ torch.linalg.pinv(spanned) @ spanned
    is_spanned = residuals.norm(dim=1) <= 1e-6 * own.norm(dim=1)
    return F.normalize(residuals, dim=1).masked_fill(is_spanned[:, None], 0).T
