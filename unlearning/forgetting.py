"""A request to forget classes on a classifier of the user's own, with an eye on what the other classes lose."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from mimu.data import GraphConfig, GraphGenerator, Split, is_correct
from mimu.masking.order import ZeroingOrder
from mimu.masking.rankings import Ranking, TrainedGCN
from mimu.methods.erasing import Erasing, erased
from mimu.model import WeightGraph
from mimu.networks.masks import Mask
from mimu.runs.files import InputError
from mimu.unlearning.custom_model import CustomModel

Scores = dict[int, float]  # percent classified correctly, by class
MEMORY = 8.0  # GB that a request may need before it says so
TRUSTED = 50.0  # percent: a mean score of the classes below which samples and model hardly belong together


class RetainScoreError(InputError):
    """The classes that are kept lose more than a request allows.

    before, after: the scores of all classes as they are, and where the request ended
    mask: the last one on the way that keeps to the bounds; it may zero nothing
    """

    def __init__(self, message: str, before: Scores, after: Scores, mask: Mask) -> None:
        super().__init__(message)
        self.before, self.after, self.mask = before, after, mask


@dataclass(frozen=True)
class Forgetting:
    """What a request knows.

    model: of the user; train: the samples, as the classifier is given them; carried: the mask that the model carries
    trained, config: the GCN, and the graphs that it reads; scorer: what ranks, it or the saliency
    erase: whether the classes are erased instead, without a ranking
    forget: the classes to forget, samples of which may be missing where they are forgotten
    max_fall, max_class_fall: points that the kept classes may lose, over all their samples and in any class
    """

    model: nn.Module
    custom: CustomModel
    train: Split
    carried: Mask | None
    trained: TrainedGCN
    config: GraphConfig
    scorer: str
    erase: bool
    forget: set[int]
    seed: int
    max_fall: float | None
    max_class_fall: float | None
    progress: bool

    def __post_init__(self) -> None:
        if self.scorer not in ("gcn", "saliency"):
            raise InputError(f"scorer must be gcn or saliency, not {self.scorer!r}")
        for name in ("max_fall", "max_class_fall"):
            bound = getattr(self, name)
            if bound is not None and not (isinstance(bound, int | float) and bound > 0):
                raise InputError(f"{name} must be a number of points above 0, or None, not {bound!r}")
        self.trained.check(self.config)

    @property
    def forgotten(self) -> tuple[int, ...]:
        """The classes that the model's own mask forgets."""
        return self.carried.forgets if self.carried else ()

    @cached_property
    def start(self) -> Mask:
        """What the model's own mask zeroes in the layers that are masked, as a mask on the classifier."""
        return self.custom.carried(self.carried, WeightGraph.of(self.custom.classifier, self.config.mask_layer))

    @cached_property
    @torch.no_grad()
    def activations(self) -> Tensor:
        """What the first masked layer is given for all samples, (samples, n): no mask changes it."""
        return self.custom.classifier.prefix_activations(self.start.layers, self.train.images)

    @property
    def memory(self) -> tuple[float, float]:
        """About how many GB the features of the masked weights take at the peak, with the GCN, and the samples do.

        Where classes are erased, what all layers give for the samples of a step takes most, with the gradients.
        """
        if self.erase:
            at_once = len(self.train.labels.unique()) * Erasing.configured().group_size
            return 0.0, 4 * 2 * at_once * self.custom.classifier.trace.total / 1e9
        counts = self.train.labels.unique(return_counts=True)[1]
        classes, vertices = len(counts), sum(keep.numel() for keep in self.start.keep)
        # Of all classes five means over samples, of which features are formed, and two features.
        of_vertex = 7 * classes + self.config.num_features + 2 * self.trained.gcn.readout.in_features
        one = self.train.images[:1]
        of_one = one.numel() + self.custom.classifier.prefix_activations(self.start.layers, one).numel()
        of_samples = of_one * (len(self.train.labels) + classes * min(self.config.samples_per_class, int(counts.min())))
        return 4 * vertices * of_vertex / 1e9, 4 * of_samples / 1e9

    def of_model(self, mask: Mask, scores: Scores) -> Mask:
        """A mask on the classifier, with the scores under it, as one on the model, with what that carries."""
        gone = sorted(label for label in self.forget if scores.get(label, 0.0) < self.trained.masking.target)
        mask = replace(self.custom.mask(mask), forgets=tuple(gone))
        return (mask & self.carried if self.carried else mask).made_on(self.model)

    def answer(self) -> Mask:
        """The mask on the model that leaves nothing of the classes to forget.

        They go one after the other, the one that most is left of first; none of them is spared for another. A class
        that is not classified in the first place has nothing to lose, and is not to come back either.
        Raises RetainScoreError. Warns where a class is left at the largest kappa.
        """
        target = self.trained.masking.target
        self.warn_of_memory()
        before = self.scores(self.start)
        lost = self.forget | {label for label, score in before.items() if score < target}
        kept = [label for label in before if label not in lost]
        self.check_scores(before, kept)
        way, now, left = [self.start], before, ""
        for _ in range(2 * len(lost)):  # where one goes another may come back, which then goes again
            label = max(lost & set(now), key=now.__getitem__, default=None)
            if left or label is None or now[label] < target or self.is_ruined(before, kept, way[-1]):
                break
            left = self.forget_one(label, before, kept, way)
            now = self.scores(way[-1])
        if not self.is_within(before, now, kept):
            raise self.too_much(before, now, kept, way)
        still = [f"{now[each]:.1f} % of class {each} are left" for each in sorted(lost) if now.get(each, 0.0) >= target]
        if still or left:
            said = ", ".join(still) or left
            warnings.warn(f"{said} after {way[-1].num_zeroed} zeroed weights", stacklevel=3)
        return self.of_model(way[-1], now)

    def warn_of_memory(self) -> None:
        of_weights, of_samples = self.memory
        if of_weights + of_samples > MEMORY:
            fewer = "fewer samples" if of_samples > of_weights else "another mask_layer, of fewer weights,"
            takes = f"the request takes about {of_weights + of_samples:.0f} GB of memory"
            warnings.warn(f"{takes}: {fewer} would take less", stacklevel=4)

    def check_scores(self, before: Scores, kept: list[int]) -> None:
        """Raises InputError where no class is to be kept. Warns where model and samples hardly belong together."""
        about = "are the inputs as in its training, and the labels in its order?"
        if not kept:
            must = f"there must be classes to keep beside {sorted(self.forget)} that the model classifies"
            raise InputError(f"{must}: {about}")
        right = fmean(score for label, score in before.items() if label not in self.forgotten)
        if right < TRUSTED:
            does = f"the model classifies {right:.1f} % of the samples correctly as it is"
            warnings.warn(f"{does}: {about}", stacklevel=4)
        for label in sorted(self.forget - set(self.forgotten)):
            if before[label] < self.trained.masking.target:
                warnings.warn(f"class {label} is not classified in the first place: there is no mask", stacklevel=4)

    def too_much(self, before: Scores, now: Scores, kept: list[int], way: list[Mask]) -> RetainScoreError:
        """The error where the kept classes lose more than they may, with the last mask that keeps to the bounds."""
        mask = next(mask for mask in reversed(way) if self.is_within(before, self.scores(mask), kept))
        mean, worst = self.falls(before, now, kept)
        under = self.scores(mask)
        left = ", ".join(f"{under[label]:.1f} % of class {label}" for label in sorted(set(under) - set(kept)))
        message = (
            f"the classes to keep lose {mean:.1f} points (max_fall {self.max_fall}), one of them {worst:.1f} "
            f"(max_class_fall {self.max_class_fall}); the mask of this error, of {mask.num_zeroed} zeroed weights, "
            f"keeps to that and leaves {left}. mask_layer=-1, or another, may do better"
        )
        return RetainScoreError(message, before, now, self.of_model(mask, under))

    def forget_one(self, label: int, before: Scores, kept: list[int], way: list[Mask]) -> str:
        """Adds masks to the way until a class is forgotten, or the kept ones have lost twice what they may.

        Returns what is to be said where it is neither.
        """
        labels, classifier = self.train.labels, self.custom.classifier
        samples = self.train[torch.isin(labels, labels.new_tensor([label, *kept]))]
        if self.erase:
            config = Erasing.configured()
            way.append(erased(classifier, samples, label, config, self.seed, start=way[-1], progress=self.progress))
            return ""
        graphs, config = GraphGenerator(classifier, samples, self.config, self.seed), self.trained.masking
        forget_row = graphs.row_of(label)
        ranking = Ranking(config, graphs, forget_row, self.seed, self.trained.gcn if self.scorer == "gcn" else None)
        order = ZeroingOrder(config, graphs, forget_row, ranking, zeroed=way[-1].vertices())
        is_off = None if self.progress else True
        with tqdm(desc=f"class {label}", unit="step", delay=1, leave=False, disable=is_off) as bar:

            def is_too_much(zeroed: Tensor) -> bool:
                way.append(graphs.graph.zeroing(zeroed))
                bar.update()
                return bar.n % 10 == 0 and self.is_ruined(before, kept, way[-1])

            found = order.answer("auto", self.train.forget(label), is_too_much)
        way.append(graphs.graph.zeroing(found.vertices))
        return found.left

    @torch.no_grad()
    def scores(self, mask: Mask, among: Sequence[int] | None = None) -> Scores:
        """The scores of the masked classifier on the samples, of all classes, or of some `among` these alone."""
        classifier, labels = self.custom.classifier, self.train.labels
        with mask.applied_to(classifier):
            logits = classifier(self.activations, mask.layers)
        if among is not None:
            others = sorted(set(range(logits.shape[1])) - set(among))
            logits = logits.index_fill(1, torch.tensor(others, device=logits.device), float("-inf"))
        found = is_correct(logits, labels)
        counts = labels.bincount().tolist()
        correct = labels[found].bincount(minlength=len(counts)).tolist()
        return {label: 100 * correct[label] / count for label, count in enumerate(counts) if count}

    def falls(self, before: Scores, now: Scores, kept: list[int]) -> tuple[float, float]:
        """Points that the kept classes lose: over all their samples, and the class that loses most."""
        counts = self.train.labels.bincount().tolist()
        lost = {label: before[label] - now[label] for label in kept}
        mean = sum(counts[label] * lost[label] for label in kept) / sum(counts[label] for label in kept)
        return mean, max(lost.values())

    def is_ruined(self, before: Scores, kept: list[int], mask: Mask) -> bool:
        """Whether on the way the kept classes lose twice what they may.

        Classified among themselves: a class that is still to go takes samples of others meanwhile.
        """
        return not self.is_within(before, self.scores(mask, among=kept), kept, times=2)

    def is_within(self, before: Scores, now: Scores, kept: list[int], times: float = 1) -> bool:
        """Whether the kept classes lose no more than they may, or so many times that."""
        mean, worst = self.falls(before, now, kept)
        is_mean_within = self.max_fall is None or mean <= times * self.max_fall
        return is_mean_within and (self.max_class_fall is None or worst <= times * self.max_class_fall)


def classes_of(forget_class: Any, labels: Tensor, num_classes: int, forgotten: Sequence[int]) -> set[int]:
    """The classes to forget, and those that are `forgotten`. Raises InputError where classes or labels do not fit."""
    given = np.asarray(forget_class).reshape(-1)
    if given.dtype.kind not in "iu":
        must = f"a class, from 0 to {num_classes - 1}, or several"
        raise InputError(f"forget_class must be {must}, not {forget_class!r}")
    forget = set(given.tolist())
    has = set(labels.unique().tolist())
    if not forget or not has | forget <= set(range(num_classes)):
        found = f"{min(has)} to {max(has)} and {sorted(forget)}"
        raise InputError(f"labels and forget_class must be from 0 to {num_classes - 1}, not {found}")
    if missing := set(range(num_classes)) - has - set(forgotten):
        but = f", but for those that the mask on the model forgets: {sorted(forgotten)}" if forgotten else ""
        shown = str(sorted(missing))[:100]
        raise InputError(f"there must be samples of every class, not none of {shown}{but}")
    return forget | set(forgotten)
