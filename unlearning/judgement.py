"""What samples say of masks: how much of each class is left under one, and what few of them do not show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import NormalDist

import torch
from torch import Tensor

from mimu.data import is_correct, margins
from mimu.masking.order import FEW, percent_above_zero

Scores = dict[int, float]  # percent classified correctly, by class
CONFIDENCE = 0.95  # one-sided, of what few samples show
SHOWN = 1.0  # percent of a class that samples may say to be left before it is said


@dataclass(frozen=True, eq=False)
class Judgement:
    """What samples say of a mask, by the logits (samples, classes) that they are given under it.

    labels: (samples); before: the logits under the mask that a request starts with
    kept: the classes that are to stay; the others go
    bounds: points that the kept ones may lose, over all their samples and in any class; None: any
    erase: whether classes are erased, which few samples show as many do
    """

    labels: Tensor
    before: Tensor
    kept: Sequence[int]
    bounds: tuple[float | None, float | None]
    erase: bool

    def __getitem__(self, chosen: Tensor) -> Judgement:
        """That of some of the samples."""
        return replace(self, labels=self.labels[chosen], before=self.before[chosen])

    @cached_property
    def counts(self) -> dict[int, int]:
        """How many samples there are of each class."""
        classes, counts = self.labels.unique(return_counts=True)
        return dict(zip(classes.tolist(), counts.tolist()))

    @cached_property
    def scores_before(self) -> Scores:
        return self.scores(self.before)

    @property
    def lost(self) -> list[int]:
        """The classes that are to go and have samples."""
        return sorted(set(self.counts) - set(self.kept))

    @property
    def are_few(self) -> bool:
        """Whether there are few samples of some class."""
        return min(self.counts.values()) < FEW

    def scores(self, logits: Tensor, among: Sequence[int] | None = None) -> Scores:
        """The scores of the samples' logits, of all classes, or of some `among` these alone."""
        if among is not None:
            others = sorted(set(range(logits.shape[1])) - set(among))
            logits = logits.index_fill(1, torch.tensor(others, device=logits.device), float("-inf"))
        found = is_correct(logits, self.labels)
        correct = self.labels[found].bincount(minlength=max(self.counts) + 1).tolist()
        return {label: 100 * correct[label] / count for label, count in self.counts.items()}

    def left(self, label: int, logits: Tensor) -> float:
        """The percentage of a class that is left; of few samples, of others like them."""
        score = self.scores(logits)[label]
        if self.erase or self.counts[label] >= FEW:
            return score
        of_class = margins(logits, self.labels)[self.labels == label]
        return max(score, percent_above_zero(of_class, float(margins(self.before, self.labels).std())))

    def falls(self, now: Scores, are_shown: bool = False) -> tuple[float, float]:
        """Points that kept classes lose: over all their samples, and the class that loses most.

        are_shown: the least that their samples show
        """
        counts = {label: self.counts[label] for label in self.kept}
        lost = {label: self.scores_before[label] - now[label] for label in self.kept}
        mean = sum(counts[label] * lost[label] for label in self.kept) / sum(counts.values())
        if are_shown:
            mean = lower_end(mean, sum(counts.values()))
            lost = {label: lower_end(fall, counts[label], among=len(counts)) for label, fall in lost.items()}
        return mean, max(lost.values())

    def is_within(self, now: Scores, times: float = 1) -> bool:
        """Whether kept classes lose no more than they may, or so many times that; few samples have to show it."""
        falls = self.falls(now, are_shown=self.are_few)
        return all(bound is None or fall <= times * bound for fall, bound in zip(falls, self.bounds))

    def is_ruined(self, logits: Tensor) -> bool:
        """Whether on the way the kept classes lose twice what they may.

        Classified among themselves: a class that is still to go takes samples of others meanwhile.
        """
        return not self.is_within(self.scores(logits, among=self.kept), times=2)

    def not_shown(self, logits: Tensor) -> list[str]:
        """What few samples of the classes that go, by their logits, do not show."""
        said = []
        for label in self.lost:
            count, left = self.counts[label], self.left(label, logits)
            if count == 1 or (count == 2 and not self.erase):  # a mask made of one of two says little of that of both
                most = 100 * (1 - (1 - CONFIDENCE) ** (1 / count))
                samples = "one sample" if count == 1 else "two samples"
                said.append(f"{samples} of class {label}: up to {most:.0f} % of it may be left")
            elif count < FEW and left > SHOWN:
                said.append(f"{count} samples of class {label}, held out in turn: some {left:.0f} % of it may be left")
        return said


def lower_end(percent: float, count: int, among: int = 1) -> float:
    """The least that so many percent of `count` samples show, with 95 % confidence for all `among` several.

    Of Wilson's interval with continuity correction (Newcombe 1998, Statistics in Medicine 17).
    """
    found, z = count * percent / 100, NormalDist().inv_cdf(1 - (1 - CONFIDENCE) / among)
    share = found / count
    if found <= 0:
        return 0.0
    half = z * math.sqrt(z**2 - 1 / count + 4 * found * (1 - share) + 4 * share - 2) + 1
    return max(0.0, 100 * (2 * found + z**2 - half) / (2 * (count + z**2)))
