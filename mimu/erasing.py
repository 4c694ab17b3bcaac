"""Erasure: a class is taken from the representation, not only from the output, by one direction of a few late layers.

Attackers say what is left: each is a ridge regression from random features, in closed form, and a new one is drawn
at every step, so that what is learned fools none of them. The bar is a classifier that never saw the class. It tells
the class from others all the same: what attackers find in the inputs themselves says how well.
"""

from __future__ import annotations

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
from mimu.masks import LayerMask, Mask
from mimu.probes import held_out_variance, standardised
from mimu.pruning import forgetting_loss
from mimu.samples import Split, drawn_of_every_class
from mimu.seeds import seeded
from mimu.settings import Count, NonNegative, Positive, Share, library_settings
from mimu.tracing import HookedClassifier
from mimu.training import descend

DEEPEST = 4  # late layers, at most, that are edited
HELD_OUT = 5  # one sample of so many is not learned from, and says what is left
FEWEST = 20  # samples of the class to learn from, below which its row alone is learned: all else fits them
JUDGES = 50  # samples of the class, and of the others, of which fewer say little of what is left
ATTACKERS = 5  # whose mean says what is found
NOTICED = 0.02  # of R^2 above the bar, from which on more is left than should be


@dataclass(frozen=True)
class Erasing:
    """How a class is erased.

    samples: of every class; a step takes group_size of the class, and others_ratio times as many others
    steps: of Adam; forget_weight, erase_weight: of the two terms beside the others' cross entropy
    units: random features of an attacker; ridge: of its regression
    share: how far the bar is on the way from what is found in the inputs to what is found in the original
    """

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
    def configured() -> Erasing:
        """What `settings.yaml` says."""
        return Erasing(**library_settings()["erase"])

    def r_squared(self, features: Tensor, is_own: Tensor, generator: torch.Generator) -> Tensor:
        """How much a random attacker finds of a class in features (samples, ...), R^2 (`held_out_variance`).

        It regresses whether a sample is of the class on V z + b, half of it rectified; z are the standardised features,
        V and b random.
        """
        (z,) = standardised(features.flatten(1).float())
        drawn = torch.randn(z.shape[1] + 1, self.units, generator=generator, dtype=torch.float32).to(z)
        directions, offsets = drawn[1:] * math.sqrt(2 / z.shape[1]), drawn[0]
        linear, rectified = (z @ directions + offsets).tensor_split(2, 1)
        return held_out_variance(torch.cat([linear, rectified.relu()], 1), is_own.to(z), self.ridge)

    def mean_r_squared(self, features: Tensor, is_own: Tensor, seed: int) -> float:
        """The mean of what ATTACKERS find, at least 0."""
        generator = seeded("attackers", seed)
        return max(fmean(self.r_squared(features, is_own, generator).item() for _ in range(ATTACKERS)), 0.0)

    def bar(self, in_inputs: float, in_original: float) -> float:
        """How much may be found in the representation, by what is found in the inputs and in the original's."""
        return in_inputs + self.share * max(0.0, in_original - in_inputs)


class Found(NamedTuple):
    """What attackers find of a class in the representation, R^2, 0 to 1.

    Of samples that nothing was learned from, if they are enough (`train_and_held_out`).
    """

    before: float
    left: float
    bar: float

    def __str__(self) -> str:
        return f"attackers find R^2 {self.left:.2f}, before {self.before:.2f}, bar {self.bar:.2f}"

    @property
    def is_at_the_bar(self) -> bool:
        """Whether no more is left than a classifier would know that never saw the class."""
        return self.left <= self.bar + NOTICED


def held_out(labels: Tensor) -> Tensor:
    """Which samples are not learned from: of every class one of HELD_OUT, (samples)."""
    is_held_out = torch.zeros_like(labels, dtype=torch.bool)
    for label in labels.unique():
        of_class = (labels == label).nonzero()[:, 0]
        is_held_out[of_class[HELD_OUT - 1 :: HELD_OUT]] = True
    return is_held_out


def drawn(chosen: Tensor, is_own: Tensor, count: int, ratio: int, generator: torch.Generator) -> Tensor:
    """At random `count` of the chosen samples that are of a class, and `ratio` times as many others, or all it can.

    The rarer a class is, the less R^2 is found of it: so it is as rare in all that is compared.
    """
    chosen = chosen[torch.randperm(len(chosen), generator=generator).to(chosen.device)]
    own, rest = chosen[is_own[chosen]], chosen[~is_own[chosen]]
    ratio, own = min(ratio, len(rest) / len(own)), own[:count]
    return torch.cat([own, rest[: math.ceil(ratio * len(own))]])


def train_and_held_out(labels: Tensor, label: int, config: Erasing, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of random samples: of every class to learn from, and some that are `held_out`, as `drawn`.

    Where fewer than JUDGES of the class, or of the others, are held out, those that are learned from judge, too.
    """
    is_own, is_held_out, generator = labels == label, held_out(labels), seeded("held out", seed, label)
    rest, unseen = (part.nonzero()[:, 0] for part in (~is_held_out, is_held_out))
    known = rest[drawn_of_every_class(labels[rest], config.samples, "erase", seed, label)]
    own = int(is_own[unseen].sum())
    unseen = unseen if min(own, len(unseen) - own) >= JUDGES else known
    return known, drawn(unseen, is_own, config.samples // (HELD_OUT - 1), config.others_ratio, generator)


def own_direction(x: Tensor, labels: Tensor, label: int) -> Tensor:
    """`class_direction`, or where the other classes' means span that, too, the class's mean less theirs, normalised."""
    direction, is_own = class_direction(x, labels, label), labels == label
    return direction if direction.any() else F.normalize((x[is_own].mean(0) - x[~is_own].mean(0)).double(), dim=0)


def late_layers(classifier: HookedClassifier) -> list[str]:
    """The last layers in the order in which they are called, the one that gives the logits at the end.

    Raises InputError where there is no layer before it.
    """
    trace = classifier.trace
    names = [name for name in trace.called.values() if trace.layers[name].groups == 1]
    if len(names) < 2 or trace.layers[names[-1]].node is not trace.output:
        must = "that must give the logits, and stand behind a layer that can be masked"
        raise InputError(f"a class is erased from what the last layer is given: {must}")
    return names[-1 - DEEPEST :]


def suffix_with_inputs(
    classifier: HookedClassifier, layers: Sequence[str], images: Tensor
) -> tuple[HookedClassifier, Tensor]:
    """A classifier begun before layers, and what it is then given for images."""
    indices = [classifier.names.index(name) for name in layers]
    return classifier.suffix_from(indices), classifier.prefix_activations(indices, images)


class Edit:
    """Layers of a classifier that read less of one direction each, W - left right^T, and another row for the class.

    right: of each hidden layer its direction; left: by how much each neuron reads less of it, to be learned, W right at
        first; of the last layer the class's row alone, to be learned, zeros at first
    What the first layer gives, and how much of the direction it reads, is recorded once.
    """

    def __init__(
        self,
        classifier: HookedClassifier,
        start: Mask | None,
        layers: Sequence[str],
        samples: Split,
        label: int,
        known: int,
        directions: Mapping[str, Tensor],
    ) -> None:
        """classifier: begun before the layers, under `start`; samples: as given to it, `known` to learn from.

        directions: `own_direction` of what each hidden layer is given
        """
        self.labels, self.label, self.known = samples.labels, label, known
        indices = {name: classifier.names.index(name) for name in layers}
        self.weights = {name: classifier.weights[index].detach() for name, index in indices.items()}
        self.first, *_, last = layers
        self.masks: dict[str, LayerMask] = {}
        for name, weight in self.weights.items():
            keep = start.by_layer[name].keep if start and name in start.by_layer else torch.ones_like(weight)
            if name == last:
                left = F.one_hot(torch.tensor([label]), len(weight)).T.to(weight)
                right = weight[label][:, None].clone()
            else:
                right = directions[name].to(weight)[:, None]
                left = weight.flatten(1) @ right
            self.masks[name] = LayerMask(keep, left, right)
        is_few = int((samples.labels[:known] == label).sum()) < FEWEST
        hidden = [] if is_few else layers[:-1]
        self.learned = [*(self.masks[name].left for name in hidden), self.masks[last].right]
        for each in self.learned:
            each.requires_grad_()
        self.classifier, self.given, self.read = classifier, [samples.images], None
        first = self.masks[self.first]
        if first.keep.all():
            direction = first.right.T.reshape(1, *first.keep.shape[1:])
            with suppress(ValueError):  # then all of it is run again and again
                self.given, self.read = classifier.recorded(indices[self.first], samples.images, direction)
                self.classifier = classifier.suffix_after(indices[self.first])

    def outputs(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """The representation (samples, ...) and the logits of some samples, by their indices."""
        given = [values[chosen] for values in self.given]
        weights = {name: mask.applied(self.weights[name]) for name, mask in self.masks.items()}
        if self.read is not None:
            del weights[self.first]
            channels = -1 if self.weights[self.first].ndim == 2 else 1
            less = self.read[chosen].movedim(channels, -1) @ self.masks[self.first].left.T
            given[0] = given[0] - less.movedim(-1, channels)
        # As the only one of several: the gradient of each is then laid out row after row.
        return self.classifier.outputs(given, weights={name: weight[None][0] for name, weight in weights.items()})

    def mask(self, start: Mask | None) -> Mask:
        """What it does, beside what a mask to start with does."""
        done = Mask({name: LayerMask(*map(torch.detach, mask)) for name, mask in self.masks.items()})
        return start & done if start else done


def erased(
    classifier: HookedClassifier,
    split: Split,
    label: int,
    config: Erasing,
    seed: int,
    start: Mask | None = None,
    progress: bool = False,
    inputs: Tensor | None = None,
) -> tuple[Mask, Found]:
    """The mask that takes a class from the representation and from the output, with as little harm to the others.

    The linear layers of features before the last one, two at most, or else the last layer before it, read less of the
    class's direction (after Hatami et al. 2026, arXiv:2604.15166). By how much each neuron does (but from fewer than
    FEWEST samples of the class), and the class's row of the last layer, is learned so that

        cross entropy of the others - forget_weight E_d[log(1 - p_d)] + erase_weight max(0, R^2 - R_0^2)

    is least: R^2 says how much a random attacker finds in the representation, R_0^2 is the bar. While attackers find
    more than that in samples that nothing was learned from, one layer more is edited, DEEPEST at most.

    split: samples of the class and of those to keep; start: a mask to begin with, to which this one adds
    inputs: what the whole network is given for the samples, where the classifier is begun within it
    Raises InputError where there is no layer before the last, TrainingError where it diverges.
    """
    layers, hidden = late_layers(classifier), len(classifier.trace.names_at_the_end) - 1
    known, unseen = train_and_held_out(split.labels, label, config, seed)
    chosen = torch.cat([known, unseen])
    labels = split.labels[chosen]
    in_inputs = (split.images if inputs is None else inputs)[unseen]
    answers = []
    with start.applied_to(classifier) if start else nullcontext():
        begun, images = suffix_with_inputs(classifier, layers, split.images.index_select(0, chosen))
        in_original = begun.value_of(begun.trace.representation, images[len(known) :])
        is_own = labels[len(known) :] == label
        least, before = (config.mean_r_squared(each, is_own, seed) for each in (in_inputs, in_original))
        bar = config.bar(least, before)

        directions: dict[str, Tensor] = {}
        for count in range(min(2, hidden) or 1, len(layers)):
            edited = layers[-1 - count :]
            near, given = suffix_with_inputs(begun, edited, images)
            for name in edited[:-1]:
                if name not in directions:
                    x = near.mean_inputs(near.names.index(name), given[: len(known)])
                    directions[name] = own_direction(x, labels[: len(known)], label)
            edit = Edit(near, start, edited, Split(given, labels), label, len(known), directions)
            found = Found(before, learned(edit, bar, config, seed, progress), bar)
            answers.append((edit.mask(start), found))
            if found.is_at_the_bar:
                break
    return min(answers, key=lambda answer: answer[1].left)


def learned(edit: Edit, bar: float, config: Erasing, seed: int, progress: bool) -> float:
    """Learns an edit, and returns what attackers then find."""
    is_own, order = edit.labels == edit.label, torch.arange(len(edit.labels), device=edit.labels.device)
    known, unseen, generator = order[: edit.known], order[edit.known :], seeded("erase", seed, edit.label)
    optimizer = torch.optim.Adam(edit.learned, config.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    about = {"desc": f"class {edit.label}", "unit": "step", "delay": 1, "leave": False}
    for step in tqdm(range(config.steps), **about, disable=None if progress else True):
        chosen = drawn(known, is_own, config.group_size, config.others_ratio, generator)
        is_forget = is_own[chosen]
        features, logits = edit.outputs(chosen)
        forget = forgetting_loss(logits[is_forget].softmax(1)[:, edit.label])
        kept = F.cross_entropy(logits[~is_forget], edit.labels[chosen[~is_forget]])
        excess = (config.r_squared(features, is_forget, generator) - bar).clamp_min(0)
        loss = kept + config.forget_weight * forget + config.erase_weight * excess
        descend(optimizer, {"loss": loss}, step, "eval.hyperparameters.erase")
        schedule.step()
    with torch.no_grad():
        features, _ = edit.outputs(unseen)
    return config.mean_r_squared(features, is_own[unseen], seed)


def class_direction(x: Tensor, labels: Tensor, label: int) -> Tensor:
    """The direction (n) of what no combination of the other classes' means gives of a class's mean of x (samples, n).

    In double precision; 0 where nothing but rounding is left.
    """
    others = [each for each in labels.unique().tolist() if each != label]
    mean, *means = (x[labels == each].mean(0, dtype=torch.double) for each in (label, *others))
    spanned = torch.stack(means)
    left = mean - mean @ torch.linalg.pinv(spanned) @ spanned
    return F.normalize(left, dim=0) if left.norm() > 1e-6 * mean.norm() else torch.zeros_like(left)
