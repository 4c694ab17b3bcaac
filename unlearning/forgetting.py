"""A request to forget classes on a classifier of the user's own, with an eye on what the other classes lose."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import NormalDist, fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mimu.data import GraphConfig, GraphGenerator, Split, is_correct, margins
from mimu.masking.order import FEW, ZeroingOrder, percent_above_zero
from mimu.masking.rankings import Ranking, TrainedGCN
from mimu.methods.erasing import Erasing, erased
from mimu.model import WeightGraph
from mimu.networks.masks import Mask
from mimu.runs.files import InputError
from mimu.unlearning.custom_model import CustomModel
from mimu.unlearning.samples import tensor_of

Scores = dict[int, float]  # percent classified correctly, by class
FOLDS = 5  # parts of few samples that are held out in turn
CONFIDENCE = 0.95  # one-sided, of what few samples show
SHOWN = 1.0  # percent of a class that samples may say to be left before it is said
WORTH_A_TRY = 1.0  # points that the others lose by the GCN, where the formula is tried
OTHER_WAYS = "mask_layer=-1 or another, scorer='saliency', or more samples may do better"
TRUSTED = 50.0  # percent: a mean score of the classes below which samples and model hardly belong together


class RetainScoreError(InputError):
    """The classes that are kept lose more than a request allows.

    before, after: the scores of all classes as they are, and where the request ended
    mask: the last one on the way that keeps to the bounds; it may zero nothing
    """

    def __init__(self, message: str, before: Scores, after: Scores, mask: Mask) -> None:
        super().__init__(message)
        self.before, self.after, self.mask = before, after, mask


class Made(NamedTuple):
    """The masks on the way to forgetting, what is left in words, and the points that the others lose at its end."""

    way: list[Mask]
    left: str
    fall: float


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
        return self.custom.classifier.prefix_activations(self.custom.masked, self.train.images)

    def of_model(self, mask: Mask, scores: Scores, about: str = "") -> Mask:
        """A mask on the classifier, with the scores under it, as one on the model, with what that carries."""
        gone = sorted(label for label in self.forget if scores.get(label, 0.0) < self.trained.masking.target)
        mask = replace(self.custom.mask(mask), forgets=tuple(gone), about=about)
        return (mask & self.carried if self.carried else mask).made_on(self.model)

    def answer(self) -> Mask:
        """The mask on the model that leaves nothing of the classes to forget.

        A class that is not classified in the first place has nothing to lose, and is not to come back either. Where the
        GCN's mask costs the others more than a point or leaves something, the formula's is taken if that is better.
        Samples of a class with fewer than FEW are each judged under a mask that is made without it.
        Raises RetainScoreError. Warns where a class is left, or where samples cannot show that none is.
        """
        before = self.scores(self.logits(self.start))
        target = self.trained.masking.target
        lost = self.forget | {each for each, score in before.items() if score < target and self.counts[each] >= FEW}
        kept = [label for label in before if label not in lost]
        self.check_scores(before, kept)
        made, ranks = self.made(lost, kept), self.scorer
        if self.scorer == "gcn" and not self.erase and (made.left or made.fall > WORTH_A_TRY):
            formula = replace(self, scorer="saliency").made(lost, kept)
            if (formula.left != "", formula.fall) < (made.left != "", made.fall):
                made, ranks = formula, "saliency"
        judge = replace(self, scorer=ranks)
        logits = judge.held_out_logits(made.way[-1], lost, kept)
        now = self.scores(logits)
        said = [made.left] if made.left else []
        # Of fewer samples a mask that is made without one is not like that made of all.
        enough = [label for label in kept if self.counts[label] >= FOLDS]
        if enough and not self.is_within(before, now, enough):
            raise self.too_much(before, now, enough, made.way)
        if not self.is_within(before, now, kept):
            mean, worst = self.falls(before, now, kept)
            said.append(f"by samples held out the classes to keep lose {mean:.0f} points, one of them {worst:.0f}")
        said += self.not_shown(logits)
        if said:
            warnings.warn(f"{'; '.join(said)} ({OTHER_WAYS})", stacklevel=3)
        by = "erased" if self.erase else f"ranked by the {'GCN' if ranks == 'gcn' else 'formula'}"
        under = self.scores(self.logits(made.way[-1]))
        return self.of_model(made.way[-1], under, "; ".join([by, *said]))

    def made(self, lost: set[int], kept: list[int]) -> Made:
        """What the samples make of a request.

        The classes go one after the other, the one that most is left of first; none of them is spared for another.
        """
        target = self.trained.masking.target
        before = self.scores(self.logits(self.start))
        way, left = [self.start], ""
        for _ in range(2 * len(lost)):  # where one goes another may come back, which then goes again
            of_class = {label: self.left(label, self.logits(way[-1])) for label in lost & set(before)}
            label = max(of_class, key=of_class.__getitem__, default=None)
            if left or label is None or of_class[label] < target or self.is_ruined(before, kept, way[-1]):
                break
            left = self.forget_one(label, before, kept, way)
        now = self.scores(self.logits(way[-1]))
        still = [f"{now[each]:.1f} % of class {each} are left" for each in sorted(lost) if now.get(each, 0.0) >= target]
        left = ", ".join(still) or ("" if self.is_few else left)
        left = f"{left} after {way[-1].num_zeroed} zeroed weights" if left else ""
        return Made(way, left, self.falls(before, now, kept)[0])

    @cached_property
    def counts(self) -> dict[int, int]:
        """How many samples there are of each class."""
        classes, counts = self.train.labels.unique(return_counts=True)
        return dict(zip(classes.tolist(), counts.tolist()))

    @property
    def is_few(self) -> bool:
        """Whether there are few samples of some class."""
        return min(self.counts.values()) < FEW

    def left(self, label: int, logits: Tensor) -> float:
        """The percentage of a class that is left, by the samples' logits; of few samples, of others like them."""
        score, labels = self.scores(logits)[label], self.train.labels
        if self.erase or self.counts[label] >= FEW:
            return score
        spread = float(margins(self.logits(self.start), labels).std())
        return max(score, percent_above_zero(margins(logits, labels)[labels == label], spread))

    def held_out_logits(self, mask: Mask, lost: set[int], kept: list[int]) -> Tensor:
        """The logits of all samples under a mask; of classes with few, each under one that is made without it.

        A single sample of a class is never held out.
        """
        logits, labels = self.logits(mask), self.train.labels
        folds = torch.full_like(labels, FOLDS)
        for label, count in self.counts.items():
            if 1 < count < FEW:
                folds[labels == label] = torch.arange(count, device=labels.device) % FOLDS
        for fold in range(int(folds.min()), FOLDS):
            is_held_out = folds == fold
            if is_held_out.any():
                others = replace(self, train=self.train[~is_held_out], progress=False)
                held_out = replace(self, train=self.train[is_held_out])
                logits[is_held_out] = held_out.logits(others.made(lost, kept).way[-1])
        return logits

    def not_shown(self, logits: Tensor) -> list[str]:
        """What few samples of classes to forget, by their logits, do not show."""
        said = []
        for label in sorted(self.forget & set(self.counts)):
            count, left = self.counts[label], self.left(label, logits)
            if count == 1 or (count == 2 and not self.erase):  # a mask made of one of two says little of that of both
                most = 100 * (1 - (1 - CONFIDENCE) ** (1 / count))
                samples = "one sample" if count == 1 else "two samples"
                said.append(f"{samples} of class {label}: up to {most:.0f} % of it may be left")
            elif count < FEW and left > SHOWN:
                said.append(f"{count} samples of class {label}, held out in turn: some {left:.0f} % of it may be left")
        return said

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
            if self.left(label, self.logits(self.start)) < self.trained.masking.target:
                warnings.warn(f"class {label} is not classified in the first place: there is no mask", stacklevel=4)

    def too_much(self, before: Scores, now: Scores, kept: list[int], way: list[Mask]) -> RetainScoreError:
        """The error where the kept classes lose more than they may, with the last mask that keeps to the bounds."""
        mask = next(each for each in reversed(way[:-1]) if self.is_within(before, self.scores(self.logits(each)), kept))
        mean, worst = self.falls(before, now, kept)
        under = self.scores(self.logits(mask))
        left = ", ".join(f"{under[label]:.1f} % of class {label}" for label in sorted(set(under) - set(kept)))
        message = (
            f"the classes to keep lose {mean:.1f} points (max_fall {self.max_fall}), one of them {worst:.1f} "
            f"(max_class_fall {self.max_class_fall}); the mask of this error, of {mask.num_zeroed} zeroed weights, "
            f"keeps to that on its samples and leaves {left} ({OTHER_WAYS})"
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
    def logits(self, mask: Mask) -> Tensor:
        """What the masked classifier gives for the samples, (samples, classes)."""
        with mask.applied_to(self.custom.classifier):
            return self.custom.classifier(self.activations, self.custom.masked)

    def scores(self, logits: Tensor, among: Sequence[int] | None = None) -> Scores:
        """The scores of the samples' logits, of all classes, or of some `among` these alone."""
        labels = self.train.labels
        if among is not None:
            others = sorted(set(range(logits.shape[1])) - set(among))
            logits = logits.index_fill(1, torch.tensor(others, device=logits.device), float("-inf"))
        found = is_correct(logits, labels)
        correct = labels[found].bincount(minlength=max(self.counts) + 1).tolist()
        return {label: 100 * correct[label] / count for label, count in self.counts.items()}

    def falls(self, before: Scores, now: Scores, kept: list[int], is_shown: bool = False) -> tuple[float, float]:
        """Points that kept classes lose: over all their samples, and the class that loses most.

        is_shown: the least that their samples show
        """
        counts = {label: self.counts[label] for label in kept}
        lost = {label: before[label] - now[label] for label in kept}
        mean = sum(counts[label] * lost[label] for label in kept) / sum(counts.values())
        if is_shown:
            mean = lower_end(mean, sum(counts.values()))
            lost = {label: lower_end(fall, counts[label], among=len(kept)) for label, fall in lost.items()}
        return mean, max(lost.values())

    def is_ruined(self, before: Scores, kept: list[int], mask: Mask) -> bool:
        """Whether on the way the kept classes lose twice what they may.

        Classified among themselves: a class that is still to go takes samples of others meanwhile.
        """
        return not self.is_within(before, self.scores(self.logits(mask), among=kept), kept, times=2)

    def is_within(self, before: Scores, now: Scores, kept: list[int], times: float = 1) -> bool:
        """Whether kept classes lose no more than they may, or so many times that; few samples have to show it."""
        mean, worst = self.falls(before, now, kept, is_shown=self.is_few)
        is_mean_within = self.max_fall is None or mean <= times * self.max_fall
        return is_mean_within and (self.max_class_fall is None or worst <= times * self.max_class_fall)


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


def classes_of(forget_class: Any, labels: Tensor, num_classes: int, forgotten: Sequence[int]) -> set[int]:
    """The classes to forget, and those that are `forgotten`. Raises InputError where classes or labels do not fit."""
    given = torch.empty(0) if forget_class is None else tensor_of(forget_class, "forget_class")
    if given.ndim > 1 or given.is_floating_point() or given.dtype == torch.bool:
        must = f"a class, from 0 to {num_classes - 1}, or several"
        raise InputError(f"forget_class must be {must}, not {forget_class!r}")
    forget = set(given.flatten().tolist())
    has = set(labels.unique().tolist())
    if not forget or not has | forget <= set(range(num_classes)):
        found = f"{min(has)} to {max(has)} and {sorted(forget)}"
        raise InputError(f"labels and forget_class must be from 0 to {num_classes - 1}, not {found}")
    if missing := set(range(num_classes)) - has - set(forgotten):
        but = f", but for those that the mask on the model forgets: {sorted(forgotten)}" if forgotten else ""
        shown = str(sorted(missing))[:100]
        raise InputError(f"there must be samples of every class, not none of {shown}{but}")
    return forget | set(forgotten)
