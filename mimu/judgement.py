"""The judgement of a mask by samples: how much of the classes to forget remains, and what the retained ones lose."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import NormalDist
from typing import Self

import torch
from torch import Tensor

from mimu.pruning import CONFIDENCE, percent_above_zero
from mimu.samples import FEW, is_correct, margins

Accuracies = dict[int, float]  # percent of the samples classified correctly, by class
Bounds = tuple[float | None, float | None]  # points that retained classes may lose, together and each; None: any
WORTH_SAYING = 0.3  # points that the retained classes keep less than if the classes were only hidden
SHOWN = 1.0  # percent of a class that may remain by few samples without a warning


@dataclass(frozen=True, eq=False)
class Judgement:
    """A judgement of a mask by samples, from the logits (samples, classes) that they get under it.

    labels: (samples)
    before: the logits under the mask that the request starts with
    retained: the classes to retain; all others are to be forgotten
    bounds: see `unlearn`
    target: percent; a class is forgotten if less of it remains
    erase: whether classes are erased; a class is then counted as it is, however few its samples are
    """

    labels: Tensor
    before: Tensor
    retained: Sequence[int]
    bounds: Bounds
    target: float
    erase: bool

    def __getitem__(self, chosen: Tensor | slice) -> Self:
        """Restricts the judgement to some of the samples, and to the retained classes that they are of."""
        labels = self.labels[chosen]
        present = set(labels.unique().tolist())
        retained = [label for label in self.retained if label in present]
        return replace(self, labels=labels, before=self.before[chosen], retained=retained)

    @cached_property
    def counts(self) -> dict[int, int]:
        """The number of samples of each class."""
        classes, counts = self.labels.unique(return_counts=True)
        return dict(zip(classes.tolist(), counts.tolist()))

    @cached_property
    def accuracies_before(self) -> Accuracies:
        return self.accuracies(self.before)

    @property
    def forget(self) -> list[int]:
        """The classes to forget that have samples."""
        return sorted(set(self.counts) - set(self.retained))

    @property
    def has_few(self) -> bool:
        """True if some class has few samples."""
        return min(self.counts.values()) < FEW

    def accuracies(self, logits: Tensor, among: Sequence[int] | None = None) -> Accuracies:
        """The accuracy of every class; if `among` names classes, samples are classified among these alone."""
        if among is not None:
            excluded = sorted(set(range(logits.shape[1])) - set(among))
            logits = logits.index_fill(1, torch.tensor(excluded, device=logits.device), float("-inf"))
        correct_labels = self.labels[is_correct(logits, self.labels)]
        correct = correct_labels.bincount(minlength=max(self.counts) + 1).tolist()
        return {label: 100 * correct[label] / count for label, count in self.counts.items()}

    def percent_remaining(self, label: int, logits: Tensor) -> float:
        """The percentage of a class still classified correctly; with few samples, what further ones would show."""
        percent = self.accuracies(logits)[label]
        if self.erase or self.counts[label] >= FEW:
            return percent
        class_margins = margins(logits, self.labels)[self.labels == label]
        return max(percent, percent_above_zero(class_margins, float(margins(self.before, self.labels).std())))

    def remaining(self, logits: Tensor) -> str:
        """Says how much remains of every class that is not forgotten."""
        accuracies = self.accuracies(logits)
        remaining = [label for label in self.forget if accuracies[label] >= self.target]
        return ", ".join(f"{accuracies[label]:.1f} % of class {label} remains" for label in remaining)

    def lost_points(self, after: Accuracies, are_certain: bool = False) -> tuple[float, float]:
        """Points that retained classes lose: over all their samples, and the class that loses most.

        are_certain: gives the least that the samples show with confidence
        """
        counts = {label: self.counts[label] for label in self.retained}
        lost = {label: self.accuracies_before[label] - after[label] for label in self.retained}
        mean = sum(counts[label] * lost[label] for label in self.retained) / sum(counts.values())
        if are_certain:
            mean = lower_end(mean, sum(counts.values()))
            lost = {label: lower_end(points, counts[label], among=len(counts)) for label, points in lost.items()}
        return mean, max(lost.values())

    def is_within(self, after: Accuracies, times: float = 1) -> bool:
        """Tells whether retained classes lose at most `times` their bounds; few samples must show more for certain."""
        lost = self.lost_points(after, are_certain=self.has_few)
        return all(bound is None or points <= times * bound for points, bound in zip(lost, self.bounds))

    def is_ruined(self, logits: Tensor, times: float = 2) -> bool:
        """Tells whether retained classes, classified among themselves, lose more than `times` what the bounds allow.

        A class that is not forgotten yet takes over some of their samples.
        """
        return not self.is_within(self.accuracies(logits, among=self.retained), times)

    def behind_hiding(self, logits: Tensor, forget: Sequence[int]) -> str:
        """Says what the retained classes keep if hiding the classes keeps more, by more than the samples' error."""
        is_retained = torch.isin(self.labels, self.labels.new_tensor(self.retained))
        hidden = self.before.index_fill(1, self.labels.new_tensor(forget), float("-inf"))
        kept, kept_hidden = (100 * is_correct(each, self.labels)[is_retained].double() for each in (logits, hidden))
        behind = kept_hidden - kept
        error = NormalDist().inv_cdf(CONFIDENCE) * float(behind.std(correction=0)) / math.sqrt(len(behind))
        if behind.mean() <= max(WORTH_SAYING, error):
            return ""
        return f"the retained classes keep {kept.mean():.1f} %, and {kept_hidden.mean():.1f} % by method='hide'"

    def uncertainties(self, logits: Tensor) -> list[str]:
        """Messages on the classes to forget whose samples are too few to show that none of the class remains."""
        messages = []
        for label in self.forget:
            count, percent = self.counts[label], self.percent_remaining(label, logits)
            if count == 1 or (count == 2 and not self.erase):  # a mask made from one of two says little of both
                most = 100 * (1 - (1 - CONFIDENCE) ** (1 / count))
                samples = "one sample" if count == 1 else "two samples"
                messages.append(f"{samples} of class {label}: up to {most:.0f} % of it may remain")
            elif count < FEW and percent > SHOWN:
                messages.append(f"{count} samples of class {label}, held out in turn: some {percent:.0f} % may remain")
        return messages


def lower_end(percent: float, count: int, among: int = 1) -> float:
    """The lower end of an interval for a percentage of `count` samples, with 95 % confidence for all `among` several.

    Wilson's interval with continuity correction (Newcombe 1998, Statistics in Medicine 17).
    """
    positives, z = count * percent / 100, NormalDist().inv_cdf(1 - (1 - CONFIDENCE) / among)
    share = positives / count
    if positives <= 0:
        return 0.0
    half = z * math.sqrt(z**2 - 1 / count + 4 * positives * (1 - share) + 4 * share - 2) + 1
    return max(0.0, 100 * (2 * positives + z**2 - half) / (2 * (count + z**2)))
