"""`unlearn`: forgets classes on a classifier of the user's own, within bounds on what other classes lose."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import NormalDist, fmean
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from mimu.erasing import Erasing, Found, erased, held_out
from mimu.errors import InputError
from mimu.graph import MaskingGCN
from mimu.inputs import CustomModel, plain_torch, samples_of, tensor_of
from mimu.masks import LayerMask, Mask
from mimu.pretrained import TrainedGCN
from mimu.pruning import FEW, Pruning, SaliencyScorer, percent_above_zero
from mimu.saliency import ActivationGraphs
from mimu.samples import Split, is_correct, margins
from mimu.settings import number_of_weights

Scores = dict[int, float]  # percent classified correctly, by class
FOLDS = 5  # parts of few samples that are held out in turn
WORTH_A_TRY = 1.0  # points that the others lose by the GCN, where the formula is tried
TRUSTED = 50.0  # percent: a mean score of the classes below which samples and model hardly belong together
CONFIDENCE = 0.95  # one-sided, of what few samples show
SHOWN = 1.0  # percent of a class that samples may say to be left before it is said


class RetainScoreError(InputError):
    """The classes that are kept lose more than a request allows.

    before, after: the scores of all classes as they are, and where the request ended
    mask: the last one on the way that keeps to the bounds; it may zero nothing
    """

    def __init__(self, message: str, before: Scores, after: Scores, mask: Mask) -> None:
        super().__init__(message)
        self.before, self.after, self.mask = before, after, mask


class Made(NamedTuple):
    """What samples make of a request: the masks on the way, by what ranks.

    logits, left, fall: of the last, the samples' logits, what is left in words, and the points that the others lose
    found: what attackers find of each class that was erased
    """

    scorer: str
    way: list[Mask]
    logits: Tensor
    left: str
    fall: float
    found: dict[int, Found]


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

    def __getitem__(self, chosen: Tensor | slice) -> Self:
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


@dataclass(frozen=True)
class Forgetting:
    """A request: what makes masks. What its samples say of them is a `Judgement`.

    model: of the user; carried: the mask on it; train: the samples, as the classifier is given them
    asked: the classes that are asked for, samples of which may be missing where they are forgotten
    trained: the GCN; scorer: what ranks, it or the saliency; erase: whether classes are erased, without a ranking
    bounds: as a judgement takes them
    """

    model: nn.Module
    carried: Mask | None
    custom: CustomModel
    train: Split
    asked: set[int]
    trained: TrainedGCN
    scorer: str
    erase: bool
    seed: int
    bounds: tuple[float | None, float | None]
    progress: bool

    def __post_init__(self) -> None:
        if self.scorer not in ("gcn", "saliency"):
            raise InputError(f"scorer must be gcn or saliency, not {self.scorer!r}")
        for name, bound in zip(("max_fall", "max_class_fall"), self.bounds):
            if bound is not None and not (isinstance(bound, int | float) and bound > 0):
                raise InputError(f"{name} must be a number of points above 0, or None, not {bound!r}")

    @cached_property
    def forget(self) -> set[int]:
        """The classes to forget: with those that are asked for those of a mask on the model stay forgotten."""
        return self.asked | set(self.carried.forgets if self.carried else ())

    @property
    def other_ways(self) -> str:
        """What a user may try where a request falls short: an erasure can make use of samples alone."""
        others = "" if self.erase else "mask_layer=-1 or another, scorer='saliency', or "
        return f"{others}more samples may do better"

    @cached_property
    def start(self) -> Mask:
        """What the model's own mask zeroes in the layers that are masked, as a mask on the classifier."""
        classifier, found = self.custom.classifier, {}
        carried = self.carried.by_layer if self.carried else {}
        for layer in self.custom.masked:
            name = classifier.names[layer]
            keep = carried[name].keep if name in carried else torch.ones(classifier.shapes[layer])
            found[name] = LayerMask.of(keep.to(self.train.labels.device, torch.float32))
        return Mask(found)

    @torch.no_grad()
    def logits(self, mask: Mask, chosen: Tensor | slice = slice(None)) -> Tensor:
        """What the masked classifier gives for the samples, or for chosen ones, (samples, classes)."""
        with mask.applied_to(self.custom.classifier):
            return self.custom.classifier(self.train.images[chosen])

    @cached_property
    def judgement(self) -> Judgement:
        """That of all samples.

        A class that is not classified in the first place has nothing to lose, and is not to come back either.
        """
        found = Judgement(self.train.labels, self.logits(self.start), (), self.bounds, self.erase)
        scores, target = found.scores_before, self.trained.masking.target
        known = [label for label, count in found.counts.items() if scores[label] >= target or count < FEW]
        return replace(found, kept=[label for label in known if label not in self.forget])

    def of_model(self, mask: Mask, scores: Scores, about: str = "") -> Mask:
        """A mask on the classifier, with the scores under it, as one on the model, with what that carries."""
        gone = sorted(label for label in self.forget if scores.get(label, 0.0) < self.trained.masking.target)
        mask = replace(mask, forgets=tuple(gone), about=about)
        if self.erase and (edited := {name: part for name, part in mask.by_layer.items() if part.rank}):
            mask = replace(mask, by_layer=edited)
        return (mask & self.carried if self.carried else mask).with_origins_of(self.model)

    def answer(self) -> Mask:
        """The mask on the model that leaves nothing of the classes to forget.

        Where the GCN's mask costs the others more than a point or leaves something, the formula's is taken if that is
        better. Samples of a class with fewer than FEW are each judged under a mask that is made without it.
        Raises RetainScoreError. Warns where a class is left, or where samples cannot show that none is.
        """
        judgement = self.judgement
        self.check_scores(judgement)
        made = self.made(judgement, self.scorer)
        if self.scorer == "gcn" and not self.erase and (made.left or made.fall > WORTH_A_TRY):
            formula = self.made(judgement, "saliency")
            made = min(made, formula, key=lambda each: (each.left != "", each.fall))
        chosen, logits = self.judges(made, judgement)
        judged = judgement[chosen]
        now = judged.scores(logits)
        said = [made.left] if made.left else []
        for part, scores in ((chosen, now), (slice(None), judgement.scores(made.logits))):
            # Of fewer samples a mask that is made without one is not like that made of all.
            each = judgement[part]
            enough = replace(each, kept=[label for label in each.kept if each.counts[label] >= FOLDS])
            if enough.kept and not enough.is_within(scores):
                raise self.too_much(scores, enough, made.way, part)
        if not judged.is_within(now):
            mean, worst = judged.falls(now)
            said.append(f"by samples held out the classes to keep lose {mean:.0f} points, one of them {worst:.0f}")
        said += judgement.not_shown(made.logits if self.erase else logits)
        said += [f"of class {label} {found}" for label, found in made.found.items() if not found.is_at_the_bar]
        if said:
            warnings.warn(f"{'; '.join(said)} ({self.other_ways})", stacklevel=3)
        by = f"ranked by the {'GCN' if made.scorer == 'gcn' else 'formula'}"
        by = [f"{by} in {len(self.custom.masked)} of {len(self.custom.classifier.names)} layers that can be masked"]
        if self.erase:
            by = [f"class {label} erased: {found}" for label, found in made.found.items()]
        return self.of_model(made.way[-1], judgement.scores(made.logits), "; ".join([*by, *said]))

    def made(self, judgement: Judgement, scorer: str) -> Made:
        """What the samples make of a request.

        The classes go one after the other, the one that most is left of first; none of them is spared for another.
        """
        target = self.trained.masking.target
        way, logits, left, found = [self.start], judgement.before, "", {}
        for _ in range(2 * len(judgement.lost)):  # where one goes another may come back, which then goes again
            of_class = {label: judgement.left(label, logits) for label in judgement.lost}
            # What is hidden can be erased.
            due = [label for label in judgement.lost if self.erase and label in self.asked and label not in found]
            label = max(due or of_class, key=of_class.__getitem__)
            if left or (of_class[label] < target and not due) or judgement.is_ruined(logits):
                break
            left = self.forget_one(label, judgement, scorer, way, found)
            logits = self.logits(way[-1])
        now = judgement.scores(logits)
        still = [f"{now[each]:.1f} % of class {each} are left" for each in judgement.lost if now[each] >= target]
        left = ", ".join(still) or ("" if judgement.are_few else left)
        left = f"{left} after {way[-1].num_zeroed} zeroed weights" if left else ""
        return Made(scorer, way, logits, left, judgement.falls(now)[0], found)

    def judges(self, made: Made, judgement: Judgement) -> tuple[Tensor | slice, Tensor]:
        """Which samples judge the mask made, and their logits: of an erasure, if enough, those not learned from."""
        chosen = held_out(judgement.labels)
        counts = judgement[chosen].counts
        if self.erase and all(counts.get(label, 0) >= FOLDS for label in judgement.kept):
            return chosen, made.logits[chosen]
        return slice(None), self.held_out_logits(made, judgement)

    def held_out_logits(self, made: Made, judgement: Judgement) -> Tensor:
        """The logits of all samples under the mask made; of classes with few, each under one that is made without it.

        A single sample of a class is never held out.
        """
        logits, labels = made.logits.clone(), judgement.labels
        folds = torch.full_like(labels, FOLDS)
        for label, count in judgement.counts.items():
            if 1 < count < FEW:
                folds[labels == label] = torch.arange(count, device=labels.device) % FOLDS
        for fold in folds[folds < FOLDS].unique():
            is_held_out = folds == fold
            custom = replace(self.custom, images=self.custom.images[~is_held_out])
            others = replace(self, custom=custom, train=self.train[~is_held_out], progress=False)
            mask = others.made(judgement[~is_held_out], made.scorer).way[-1]
            logits[is_held_out] = self.logits(mask, is_held_out)
        return logits

    def check_scores(self, judgement: Judgement) -> None:
        """Raises InputError where no class is to be kept. Warns where model and samples hardly belong together."""
        about = "are the inputs as in its training, and the labels in its order?"
        if not judgement.kept:
            must = f"there must be classes to keep beside {sorted(self.forget)} that the model classifies"
            raise InputError(f"{must}: {about}")
        forgotten = self.carried.forgets if self.carried else ()
        right = fmean(score for label, score in judgement.scores_before.items() if label not in forgotten)
        if right < TRUSTED:
            does = f"the model classifies {right:.1f} % of the samples correctly as it is"
            warnings.warn(f"{does}: {about}", stacklevel=4)
        for label in () if self.erase else sorted(self.forget - set(forgotten)):
            if judgement.left(label, judgement.before) < self.trained.masking.target:
                warnings.warn(f"class {label} is not classified in the first place: there is no mask", stacklevel=4)

    def too_much(self, now: Scores, judgement: Judgement, way: list[Mask], chosen: Tensor | slice) -> RetainScoreError:
        """The error where the kept classes of chosen samples lose too much, with the last mask within the bounds."""
        for mask in reversed(way[:-1] or way):
            under = judgement.scores(self.logits(mask, chosen))
            if judgement.is_within(under):
                break
        mean, worst = judgement.falls(now)
        left = ", ".join(f"{under[label]:.1f} % of class {label}" for label in judgement.lost)
        message = (
            f"the classes to keep lose {mean:.1f} points (max_fall {self.bounds[0]}), one of them {worst:.1f} "
            f"(max_class_fall {self.bounds[1]}); the mask of this error, of {mask.num_zeroed} zeroed "
            f"weights, keeps to that on its samples and leaves {left} ({self.other_ways})"
        )
        return RetainScoreError(message, judgement.scores_before, now, self.of_model(mask, under))

    def forget_one(
        self, label: int, judgement: Judgement, scorer: str, way: list[Mask], found: dict[int, Found]
    ) -> str:
        """Adds masks to the way until a class is forgotten, or the kept ones have lost twice what they may.

        Returns what is to be said where it is neither; adds what attackers find where the class is erased.
        """
        labels, classifier = self.train.labels, self.custom.classifier
        chosen = torch.isin(labels, labels.new_tensor([label, *judgement.kept]))
        samples = self.train[chosen]
        if self.erase:
            images, about = self.custom.images[chosen], {"start": way[-1], "progress": self.progress}
            about["inputs"] = images if images.is_floating_point() else None  # of words what is recorded
            mask, found[label] = erased(classifier, samples, label, Erasing.configured(), self.seed, **about)
            way.append(mask)
            return ""
        graphs, config = ActivationGraphs(classifier, samples, self.trained.graphs, self.seed), self.trained.masking
        class_index = graphs.class_index_of(label)
        ranking = SaliencyScorer(config, graphs, class_index, self.seed, self.trained.gcn if scorer == "gcn" else None)
        order = Pruning(config, graphs, class_index, ranking, zeroed=way[-1].vertices())
        begun, limit = len(order.zeroed), number_of_weights(config.max_kappa, graphs.graph.num_vertices)
        before, shown = len(way), {"delay": 1, "leave": False, "disable": None if self.progress else True}
        with tqdm(desc=f"class {label}, at most", total=limit, unit=" weights", **shown) as bar:

            def is_too_much(zeroed: Tensor) -> bool:
                way.append(graphs.graph.zeroing(zeroed))
                bar.update(len(zeroed) - begun - bar.n)
                return (len(way) - before) % 10 == 0 and judgement.is_ruined(self.logits(way[-1]))

            answer = order.answer("auto", self.train.forget(label), is_too_much)
        way.append(graphs.graph.zeroing(answer.vertices))
        return answer.left


def classes_of(forget_class: Any, labels: Tensor, num_classes: int, forgotten: Sequence[int]) -> set[int]:
    """The classes that are asked for. Raises InputError where they, labels or those `forgotten` do not fit."""
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
    return forget


def unlearn(
    model: nn.Module,
    inputs: Any,
    labels: Any = None,
    forget_class: int | Sequence[int] | None = None,
    gcn: MaskingGCN | TrainedGCN | None = None,
    mask_layer: int | str | Sequence[int | str] | None = "auto",
    seed: int = 0,
    *,
    scorer: Literal["gcn", "saliency"] = "gcn",
    erase: bool = False,
    max_fall: float | None = 1.0,
    max_class_fall: float | None = 5.0,
    progress: bool = True,
) -> Mask:
    """The mask that makes a classifier of the user's own forget classes; the model is left as it is, to the bit.

    A copy runs, in evaluation mode and float32, operation by operation (torch.export). What can be masked are weights
    that one linear operation or convolution reads; where the model cannot be exported, the linear layers at its end.
    Other threads may predict meanwhile, but not export or compile (torch.export then switches off oneDNN for a moment).

    model: returns logits; inputs, labels: training samples as it takes them, (samples, ...), and their classes, from 0
        on; or, as inputs alone, a DataLoader or data set of pairs. Some of every class, but for those that a mask on
        the model forgets
    forget_class: one class or several; those of a mask that the model carries stay forgotten: the answer includes it
    gcn: what ranks the weights; None: the pretrained one, whose settings a bare MaskingGCN takes too, and the formula
        (`saliency`) in convolutions and linear layers on tokens, of which it has not seen any
    mask_layer: names, as named_parameters has them, of modules or with * and ?, or indices among what can be masked;
        one or several; None: all; auto: of linear layers at the end the last but one if they are three, else the last
    seed: of the samples that are drawn; scorer: the GCN, or the saliency that it adapts
    erase: takes the classes from what the last layer is given, too (`methods.erasing`), by one direction less in as few
        layers before it as do it: without a GCN, and with mask_layer auto or None
    max_fall, max_class_fall: points that the other classes may lose on the samples, together and each; None: any
    progress: shows bars, on a terminal, and how long a class takes at most

    Warns where a class is left at the largest kappa, or samples are too few to show that it is not, where an attacker
    still finds one that was to be erased, where the model does not know the samples, and where less is masked than was
    asked for.
    Raises RetainScoreError, which has the last mask within the bounds, where the others lose more; InputError, another
    ValueError, where the model is something else, or samples do not fit it or are not finite.
    """
    if isinstance(inputs, DataLoader | Dataset) and forget_class is None:
        labels, forget_class = None, labels
    with plain_torch():
        inputs, labels = samples_of(inputs, labels, progress)
        if erase and mask_layer not in ("auto", None):
            raise InputError(f"mask_layer must be auto or None where classes are erased, not {mask_layer!r}")
        custom = CustomModel.of(model, inputs, mask_layer, progress, erase)
        carried = Mask.on(model)
        train = Split(custom.inputs, labels.to(custom.inputs.device))
        asked = classes_of(forget_class, train.labels, custom.num_classes, carried.forgets if carried else ())
        trained = TrainedGCN.of(gcn, custom.inputs.device)
        if gcn is None and not custom.is_of_features and not erase:
            scorer, trained = "saliency", trained.for_kernels(custom.classifier.shapes[each] for each in custom.masked)
        trained = replace(trained, graphs=replace(trained.graphs, mask_layer=custom.masked, scope="measured"))
        bounds = (max_fall, max_class_fall)
        about = {"scorer": scorer, "erase": erase, "seed": seed, "bounds": bounds, "progress": progress}
        request = Forgetting(model, carried, custom, train, asked, trained, **about)
        request.of_model(request.start, {})  # raises before any work
        return request.answer()
