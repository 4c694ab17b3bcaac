"""A request to forget classes on a classifier of the user's own, with an eye on what the other classes lose."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from data import GraphGenerator, Split
from masking.order import ZeroingOrder
from masking.rankings import MaskingConfig
from model import Mask
from own.classifier import OwnClassifier
from runs.files import InputError

Scores = dict[int, float]  # percent classified correctly, by class


class RetainScoreError(InputError):
    """The classes that are kept lose more than a request allows.

    before, after: the scores of all classes as they are, and where the request ended
    mask: of those on the way that keep to the bounds, the one that leaves least of the classes to forget
    """

    def __init__(self, message: str, before: Scores, after: Scores, mask: Mask) -> None:
        super().__init__(message)
        self.before, self.after, self.mask = before, after, mask


@dataclass(frozen=True)
class Forgetting:
    """What a request knows.

    train: the samples, as the classifier is given them; activations: the same, as its first masked layer is
    graphs_of: makes the activation graphs of some of the samples
    rank: from graphs, and the place of a class among theirs, to a ranking (`ZeroingOrder`)
    forget: the classes to forget, samples of which may be missing where they are forgotten
    max_fall, max_class_fall: points that the kept classes may lose, over all their samples and in any class
    """

    own: OwnClassifier
    train: Split
    activations: Tensor
    graphs_of: Callable[[Split], GraphGenerator]
    rank: Callable[[GraphGenerator, int], Callable[[int, Tensor], Tensor]]
    masking: MaskingConfig
    forget: set[int]
    max_fall: float
    max_class_fall: float
    progress: bool

    def answer(self, start: Mask) -> Mask:
        """The mask that adds to one until nothing is left of the classes to forget.

        They go one after the other, the one that most is left of first; none of them is spared for another. A class
        that is not classified in the first place has nothing to lose, and is not to come back either.
        Raises RetainScoreError. Warns where a class is left at the largest kappa.
        """
        before, way, left = self.scores(start), [start], ""
        lost = self.forget | {label for label, score in before.items() if score < self.masking.target}
        kept = [label for label in before if label not in lost]
        if not kept:
            raise InputError(f"a class must be kept, but there are no samples of any but {sorted(lost)} to keep")
        # Where one goes another may come back, which then goes again.
        for _ in range(2 * len(lost)):
            now = self.scores(way[-1])
            label = max(lost & set(now), key=now.__getitem__, default=None)
            if left or label is None or now[label] < self.masking.target or self.excess(before, now, kept) > 1:
                break
            left = self.forget_one(label, before, kept, way)
        now, within = self.scores(way[-1]), way[-1]
        if self.excess(before, now, kept) > 1:
            within = next(mask for mask in reversed(way) if self.excess(before, self.scores(mask), kept) <= 1)
            mean, worst = self.falls(before, now, kept)
            raise RetainScoreError(
                f"the classes to keep lose {mean:.1f} points (max_fall {self.max_fall:g}), one of them {worst:.1f} "
                f"(max_class_fall {self.max_class_fall:g}), for class {label} to be forgotten: the mask of this error keeps "
                "to the bounds; another mask_layer may do better",
                before, now, self.own.mask(within),
            )  # fmt: skip
        if left:
            warnings.warn(f"{left} after {within.num_zeroed} zeroed weights", stacklevel=4)
        return within

    def forget_one(self, label: int, before: Scores, kept: list[int], way: list[Mask]) -> str:
        """Adds masks to the way until nothing is left of a class; returns what is, in words.

        Ends where the kept classes have lost twice what they may.
        """
        labels = self.train.labels
        graphs = self.graphs_of(self.train[torch.isin(labels, labels.new_tensor([label, *kept]))])
        place, is_own = graphs.classes.index(label), labels == label
        order = ZeroingOrder(self.masking, graphs, place, self.rank(graphs, place), way[-1].vertices())
        bar = {"unit": "look", "delay": 1, "leave": False, "disable": None if self.progress else True}
        for look, found in enumerate(tqdm(order.looks(), f"class {label}", **bar), 1):
            way.append(Mask.zeroing(graphs.graph, found.vertices))
            score = self.scores(way[-1], is_own)[label]
            left = f"{score:.1f} % of class {label} are left" if score >= self.masking.target else ""
            if not left and graphs.auxiliary and not graphs.auxiliary.is_reached(way[-1], place):
                left = f"class {label} is still represented"
            if not left or (look % 10 == 0 and self.excess(before, self.scores(way[-1]), kept) > 2):
                break
        return left

    @torch.no_grad()
    def scores(self, mask: Mask, chosen: Tensor | slice = slice(None)) -> Scores:
        """The scores of the masked classifier, on some of the samples."""
        classifier, labels = self.own.classifier, self.train.labels[chosen]
        with mask.applied_to(classifier):
            is_correct = classifier(self.activations[chosen], mask.layers[0]).argmax(1) == labels
        counts = labels.bincount().tolist()
        correct = labels[is_correct].bincount(minlength=len(counts)).tolist()
        return {label: 100 * correct[label] / count for label, count in enumerate(counts) if count}

    def falls(self, before: Scores, now: Scores, kept: list[int]) -> tuple[float, float]:
        """Points that the kept classes lose: over all their samples, and the class that loses most."""
        counts = self.train.labels.bincount().tolist()
        lost = {label: before[label] - now[label] for label in kept}
        return sum(counts[label] * lost[label] for label in kept) / sum(counts[label] for label in kept), max(
            lost.values()
        )

    def excess(self, before: Scores, now: Scores, kept: list[int]) -> float:
        """What the kept classes lose, in what they may."""
        mean, worst = self.falls(before, now, kept)
        return max(mean / self.max_fall, worst / self.max_class_fall)
