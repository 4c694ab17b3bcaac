"""`unlearn`: makes a classifier of the user's own forget classes, within bounds on what the retained classes lose."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from statistics import fmean
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from mimu.erasing import FEWEST, ErasingConfig, RecoveredInformation, erase_classes
from mimu.errors import InputError, named, shortened
from mimu.graph import MaskingGCN
from mimu.hiding import mask_that_hides
from mimu.inputs import CustomModel, plain_torch, requested_classes
from mimu.judgement import Accuracies, Bounds, Judgement
from mimu.masks import LayerMask, Mask
from mimu.pretrained import TrainedGCN
from mimu.pruning import PruningResult, RemainingCounter, choose_kappa, prune
from mimu.saliency import ActivationGraphs
from mimu.samples import FEW, Split, held_out
from mimu.settings import number_of_weights

ERASURES = 3  # of the same classes, at most, where one brings back another
FOLDS = 5  # parts of few samples that are held out in turn
LARGEST_STEP = 1 / 800  # of the weights of the last layer, in a step there
WORTH_A_TRY = 1.0  # points: if the retained classes lose more by the GCN, the formula is tried
HIDDEN_FOR_WANT_OF_SAMPLES = (
    f"classes are hidden, and stay in the representation: to erase and to judge takes {FEWEST} samples of each, and "
    "these have fewer"
)
TRUSTED = 50.0  # percent: with a lower mean accuracy, samples and model hardly belong together


def unlearn(
    model: nn.Module,
    inputs: Any = None,
    labels: Any = None,
    forget_class: int | Sequence[int] | None = None,
    gcn: MaskingGCN | TrainedGCN | None = None,
    mask_layer: int | str | Sequence[int | str] | None = "auto",
    seed: int = 0,
    *,
    method: Literal["erase", "mask", "hide"] | None = None,
    scorer: Literal["gcn", "saliency"] = "gcn",
    erase: bool | None = None,
    max_fall: float | None = 1.0,
    max_class_fall: float | None = 5.0,
    progress: bool = True,
) -> Mask:
    """Makes the mask that lets a classifier forget classes; the model itself is not changed.

    A copy runs in evaluation mode and float32, operation by operation (torch.export). Weights can be masked if one
    linear operation or convolution reads them. Other threads may predict meanwhile, but not export or compile.

    Args:
        model: returns logits (samples, classes), or an object that has them as `logits`
        inputs: training samples (samples, ...), or a DataLoader or data set of pairs (input, label); or of several
            tensors, as `mimu.batches.batches_of` takes them. To hide classes, none are needed
        labels: the classes of the samples, (samples), from 0 on
        forget_class: one class or several. The classes of a mask on the model stay forgotten, and need no samples
        gcn: rescales the scores; None: the pretrained one, but the formula alone for convolutions and on tokens
        mask_layer: one or several layers, as `mimu.inputs.layers_to_mask` takes them
        seed: of the samples that are drawn
        method: "erase" takes the classes from the last layer's input, too (`mimu.erasing`); "mask" zeroes the few
            weights that they need; "hide" changes their output weights alone (`mimu.hiding`). None: erase; where `gcn`,
            `mask_layer` or `scorer` is set, mask; with fewer than FEWEST samples of a class, hide
        scorer: the GCN, or the saliency formula alone
        erase: the name that method="erase" had before
        max_fall, max_class_fall: points of accuracy that the retained classes may lose, together and each; None: any
        progress: whether bars are shown on a terminal

    Raises:
        RetainScoreError: if the retained classes lose more; it holds the last mask within the bounds
        InputError: a ValueError, if the model is something else, or samples do not fit it or are not finite

    Warns if some of a class may remain, if attackers recognise an erased class, or the model does not know the samples.
    """
    if isinstance(inputs, DataLoader | Dataset) and forget_class is None:
        labels, forget_class = None, labels
    is_free = method is None and erase is None
    method = chosen_method(method, erase, is_for_mask=gcn is not None or mask_layer != "auto" or scorer != "gcn")
    check_arguments(scorer, method, mask_layer, {"max_fall": max_fall, "max_class_fall": max_class_fall})
    with plain_torch():
        if method == "hide":
            return mask_that_hides(model, inputs, labels, forget_class, mask_layer, progress)
        erase = method == "erase"
        custom = CustomModel.of(model, inputs, labels, mask_layer, progress, erase)
        carried = Mask.on(model)
        train = Split(custom.cached_inputs, custom.labels)
        forgotten = carried.forgets if carried else ()
        requested = requested_classes(forget_class, train.labels, custom.num_classes, forgotten)
        counts = train.labels.bincount(minlength=custom.num_classes)
        few = [label for label in sorted(requested - set(forgotten)) if counts[label] < FEWEST]
        if is_free and erase and few:
            warnings.warn(f"{HIDDEN_FOR_WANT_OF_SAMPLES}: {shortened(str(few))}", stacklevel=2)
            return mask_that_hides(model, inputs, labels, forget_class, mask_layer, progress)
        trained, scorer = what_ranks(custom, gcn, scorer, erase)
        bounds = max_fall, max_class_fall
        request = UnlearningRequest(model, carried, custom, train, requested, trained, erase, seed, bounds, progress)
        request.mask_on_model(request.start, {})  # raises before any work
        request.check_accuracies()
        return erasing_mask(request) if erase else pruning_mask(request, scorer)


def what_ranks(custom: CustomModel, gcn: Any, scorer: str, erase: bool) -> tuple[TrainedGCN, str]:
    """The GCN and its settings for the layers to mask, and the scorer.

    Without a GCN of the user's, the formula ranks kernels and what reads tokens. To erase, nothing is ranked.
    """
    trained = TrainedGCN.of(gcn, custom.cached_inputs.device)
    if gcn is None and not (custom.reads_features or erase):
        scorer = "saliency"
        trained = trained.for_kernels(custom.classifier.shapes[layer] for layer in custom.masked)
    return replace(trained, graphs=replace(trained.graphs, mask_layer=custom.masked, scope="measured")), scorer


def chosen_method(method: str | None, erase: bool | None, is_for_mask: bool) -> str:
    """The method of a call. Warns if it names the method by `erase`.

    is_for_mask: whether an argument is set that only masks have
    """
    if erase is not None:
        method = "erase" if erase else "mask"
        warnings.warn(f"erase={erase} is the old name of method={method!r}", FutureWarning, stacklevel=3)
    return method or ("mask" if is_for_mask else "erase")


def check_arguments(scorer: str, method: str, mask_layer: Any, bounds: dict[str, Any]) -> None:
    """Raises InputError if an argument of `unlearn` has a value that it cannot have."""
    if method not in ("erase", "mask", "hide"):
        raise InputError(f"method must be erase, mask or hide, not {method!r}")
    if scorer not in ("gcn", "saliency"):
        raise InputError(f"scorer must be gcn or saliency, not {scorer!r}")
    if method == "erase" and mask_layer not in ("auto", None):
        raise InputError(f"mask_layer must be auto or None where classes are erased, not {mask_layer!r}")
    for name, bound in bounds.items():
        if bound is not None and not (isinstance(bound, int | float) and bound > 0):
            raise InputError(f"{name} must be a number of points above 0, or None, not {bound!r}")


class RetainScoreError(InputError):
    """The retained classes lose more than a request allows.

    before, after: the accuracy of every class of the model as it is, and at the end of the request, percent
    mask: the last one on the way that keeps within the bounds; it may zero nothing
    """

    def __init__(self, message: str, before: Accuracies, after: Accuracies, mask: Mask) -> None:
        super().__init__(message)
        self.before, self.after, self.mask = before, after, mask


@dataclass(frozen=True)
class UnlearningRequest:
    """A request of `unlearn`, its parts checked.

    carried: the mask on the user's model
    train: the samples, as the classifier of `custom` takes them
    requested: the classes asked for; samples of them may be missing if they are forgotten already
    """

    model: nn.Module
    carried: Mask | None
    custom: CustomModel
    train: Split
    requested: set[int]
    trained: TrainedGCN
    erase: bool
    seed: int
    bounds: Bounds
    progress: bool

    def on(self, chosen: Tensor) -> "UnlearningRequest":
        """The request on some of the samples."""
        custom = replace(self.custom, model_inputs=self.custom.model_inputs[chosen])
        return replace(self, custom=custom, train=self.train[chosen], progress=False)

    @property
    def forgotten(self) -> set[int]:
        """The classes that the mask on the model forgets."""
        return set(self.carried.forgets if self.carried else ())

    @property
    def forget(self) -> set[int]:
        """The requested classes, and those that are forgotten already."""
        return self.requested | self.forgotten

    @property
    def advice(self) -> str:
        """The things to try if a request falls short; for an erasure, only samples."""
        return "" if self.erase else "mask_layer=-1 or another, scorer='saliency', or "

    @cached_property
    def start(self) -> Mask:
        """The zeros of the model's mask in the masked layers, as a mask on the classifier."""
        classifier, masks = self.custom.classifier, {}
        carried = self.carried.by_layer if self.carried else {}
        for layer in self.custom.masked:
            name = classifier.names[layer]
            keep = carried[name].keep if name in carried else torch.ones(classifier.shapes[layer])
            masks[name] = LayerMask.of(keep.to(self.train.labels.device, torch.float32))
        return Mask(masks)

    @torch.no_grad()
    def logits(self, mask: Mask, chosen: Tensor | slice = slice(None)) -> Tensor:
        """The logits (samples, classes) of the samples, or of chosen ones, under a mask."""
        with mask.applied_to(self.custom.classifier):
            return self.custom.classifier(self.train.images[chosen])

    @cached_property
    def judgement(self) -> Judgement:
        """The judgement by all samples.

        A class that the model does not classify in the first place has nothing to lose, and is not to come back either.
        """
        target = self.trained.pruning.target
        judgement = Judgement(self.train.labels, self.logits(self.start), (), self.bounds, target, self.erase)
        accuracies = judgement.accuracies_before
        classified = [label for label, count in judgement.counts.items() if accuracies[label] >= target or count < FEW]
        return replace(judgement, retained=[label for label in classified if label not in self.forget])

    def mask_on_model(self, mask: Mask, accuracies: Accuracies, about: str = "") -> Mask:
        """Turns a mask on the classifier into one on the model, together with what that carries."""
        forgotten = sorted(label for label in self.forget if accuracies.get(label, 0.0) < self.trained.pruning.target)
        mask = replace(mask, forgets=tuple(forgotten), about=about, method="erase" if self.erase else "mask")
        if self.erase and (edited := {name: part for name, part in mask.by_layer.items() if part.rank}):
            mask = replace(mask, by_layer=edited)
        return (mask & self.carried if self.carried else mask).with_origins_of(self.model)

    def check_accuracies(self) -> None:
        """Raises InputError if there is no class to retain. Warns if model and samples hardly belong together."""
        judgement, question = self.judgement, "are the inputs as in its training, and the labels in its order?"
        if not judgement.retained:
            must = f"there must be classes to retain beside {sorted(self.forget)} that the model classifies"
            raise InputError(f"{must}: {question}")
        classified = judgement.accuracies_before.items()
        accuracy = fmean(percent for label, percent in classified if label not in self.forgotten)
        if accuracy < TRUSTED:
            warnings.warn(f"the model classifies {accuracy:.1f} % of the samples correctly: {question}", stacklevel=3)
        for label in () if self.erase else sorted(self.forget - self.forgotten):
            if judgement.percent_remaining(label, judgement.before) < judgement.target:
                warnings.warn(f"class {label} is not classified in the first place: there is no mask", stacklevel=3)


class Attempt(NamedTuple):
    """An attempt to answer a request.

    masks: on the classifier, from the one it starts with to the last one
    logits: of all samples under the last mask, (samples, classes)
    message: "" unless pruning ended before a class was forgotten
    num_free: how many weights were zeroed beyond those that forget the classes
    recovered: what attackers recover of every class that was erased
    """

    masks: list[Mask]
    logits: Tensor
    message: str
    num_free: int
    recovered: dict[int, RecoveredInformation]


def pruning_mask(request: UnlearningRequest, scorer: str) -> Mask:
    """The mask on the model that zeroes the weights which the classes need.

    If the GCN's mask costs the retained classes more than a point or something remains, the formula's mask is taken
    where that is better. Raises and warns as `unlearn`.
    """
    judgement = request.judgement

    def flaws(attempt: Attempt) -> tuple[bool, float]:
        lost, _ = judgement.lost_points(judgement.accuracies(attempt.logits))
        return shortfall(judgement, attempt) != "", lost

    attempt = forget_by_mask(request, judgement, scorer)
    if scorer == "gcn" and flaws(attempt) > (False, WORTH_A_TRY):
        formula = forget_by_mask(request, judgement, "saliency")
        if flaws(formula) < flaws(attempt):
            scorer, attempt = "saliency", formula
    forget = partial(forget_by_mask, scorer=scorer)
    logits = held_out_logits(request, attempt, forget)
    chosen = held_out(judgement.labels, FEW)  # the scores did not see these, and no mask saw those of small classes
    for label, count in judgement.counts.items():
        if count < FEW:
            chosen |= judgement.labels == label
    layers = f"{len(request.custom.masked)} of {len(request.custom.classifier.names)} layers that can be masked"
    words = [f"ranked by the {'GCN' if scorer == 'gcn' else 'formula'} in {layers}"]
    if attempt.num_free:
        needed = attempt.masks[-1].num_zeroed - attempt.num_free
        words.append(f"{needed} weights forget, {attempt.num_free} more cost the retained classes nothing")
    return judged_mask(request, attempt, chosen, logits[chosen], words, judgement.uncertainties(logits), forget)


def erasing_mask(request: UnlearningRequest) -> Mask:
    """The mask on the model that takes the classes from the last layer's input. Raises and warns as `unlearn`."""
    judgement = request.judgement
    attempt = forget_by_erasing(request, judgement)
    chosen = held_out(judgement.labels)  # nothing was learned from these
    judge = judgement[chosen]
    if sum(judge.counts[label] for label in judge.retained) >= FEW:
        logits = attempt.logits[chosen]
    else:
        chosen, logits = slice(None), held_out_logits(request, attempt, forget_by_erasing)
    words = [f"class {label} {recovered}" for label, recovered in attempt.recovered.items()]
    messages = judgement.uncertainties(attempt.logits)
    for label, recovered in attempt.recovered.items():
        if not (recovered.is_at_target and recovered.can_be_judged):
            messages.append(f"class {label} {recovered}")
    return judged_mask(request, attempt, chosen, logits, words, messages)


def forget_by_mask(request: UnlearningRequest, judgement: Judgement, scorer: str) -> Attempt:
    """Prunes until no class to forget remains: all of them as one, then alone the one of which most remains, if any.

    It ends early if a class cannot be forgotten, or if the retained classes have lost more than they may after a
    search, or twice that within one.
    """
    masks, logits, message, num_free = [request.start], judgement.before, "", 0
    due = [label for label in judgement.forget if judgement.percent_remaining(label, logits) >= judgement.target]
    for _ in range(2 * len(judgement.forget)):
        if message or not due or judgement.is_ruined(logits, 1):
            break
        result = prune_classes(request, judgement, due, scorer, masks)
        message, num_free = result.message, num_free + len(result.vertices) - result.num_needed
        logits = request.logits(masks[-1])
        accuracies = judgement.accuracies(logits)
        most = max(judgement.forget, key=accuracies.__getitem__)
        due = [most] if accuracies[most] >= judgement.target else []
    return Attempt(masks, logits, message, num_free, {})


def forget_by_erasing(request: UnlearningRequest, judgement: Judgement) -> Attempt:
    """Erases the requested classes together, and again those which another one brings back."""
    masks, logits, recovered = [request.start], judgement.before, {}
    labels, due = request.train.labels, [label for label in judgement.forget if label in request.requested]
    while due and len(masks) <= ERASURES and not judgement.is_ruined(logits):
        chosen = torch.isin(labels, labels.new_tensor([*due, *judgement.retained]))
        images = Split(request.custom.model_inputs, labels)[chosen].images
        mask, by_class = erase_classes(
            request.custom.classifier,
            request.train[chosen],
            due,
            ErasingConfig.configured(),
            request.seed,
            start=masks[-1],
            progress=request.progress,
            model_inputs=images if images.is_floating_point() else None,  # integers are words, not features
        )
        recovered |= by_class
        masks.append(mask)
        logits = request.logits(mask)
        due = [label for label in judgement.forget if judgement.percent_remaining(label, logits) >= judgement.target]
    return Attempt(masks, logits, "", 0, recovered)


def prune_classes(
    request: UnlearningRequest, judgement: Judgement, forget: Sequence[int], scorer: str, masks: list[Mask]
) -> PruningResult:
    """Adds masks to `masks` until classes, taken for one, are forgotten, and further zeros would cost accuracy."""
    labels, trained, label = request.train.labels, request.trained, forget[0]
    samples = request.train[torch.isin(labels, labels.new_tensor([*forget, *judgement.retained]))]
    is_forget = torch.isin(samples.labels, labels.new_tensor(forget))
    own, samples = samples[is_forget], replace(samples, labels=samples.labels.masked_fill(is_forget, label))
    graphs = ActivationGraphs(request.custom.classifier.merging(forget), samples, trained.graphs, request.seed)
    config, class_index, zeroed = trained.pruning, graphs.classes.index(label), masks[-1].vertices()
    if config.step is not None:
        step = number_of_weights(config.step, graphs.graph.num_vertices)
        if graphs.graph.names == graphs.suffix.trace.names_at_the_end[-1:]:
            # With many classes a step would otherwise be more than the few weights that one of them needs.
            step = min(step, max(1, int(LARGEST_STEP * graphs.graph.num_vertices)))
        config = replace(config, step=int(step * len(forget) ** 0.5))
    gcn = trained.gcn if scorer == "gcn" else None
    counter = RemainingCounter(graphs, class_index, own.images, config.target, own.labels)
    steps = prune(graphs, class_index, config, request.seed, gcn, zeroed=zeroed, counter=counter)
    limit = number_of_weights(config.max_kappa, graphs.graph.num_vertices)
    shown = {"delay": 1, "leave": False, "disable": None if request.progress else True}
    name = named(forget)
    with tqdm(desc=f"{name}, at most", total=limit, unit=" weights", **shown) as bar:
        results = choose_kappa(steps, counter, config, len(zeroed))
        for number, result in enumerate(results, 1):
            masks.append(graphs.graph.zeroing(result.vertices))
            bar.update(len(result.vertices) - len(zeroed) - bar.n)
            if result.message is None and number % 10 == 0 and judgement.is_ruined(request.logits(masks[-1])):
                break
    if result.message != "":
        remains = f"{counter.percent_remaining(result.vertices):.1f} % of {name} remains"
        result = result._replace(num_needed=len(result.vertices), message=remains)
    return result


def shortfall(judgement: Judgement, attempt: Attempt) -> str:
    """Says what remains of the classes to forget, or ""; few samples cannot show it (`Judgement.uncertainties`)."""
    words = judgement.remaining(attempt.logits) or ("" if judgement.has_few else attempt.message)
    return f"{words} after {attempt.masks[-1].num_zeroed} zeroed weights" if words else ""


def held_out_logits(
    request: UnlearningRequest, attempt: Attempt, forget: Callable[[UnlearningRequest, Judgement], Attempt]
) -> Tensor:
    """The logits of all samples; each of a class with few samples is judged by a mask that is made without it.

    A single sample of a class is never held out. forget: makes an attempt from part of the samples
    """
    logits, judgement = attempt.logits.clone(), request.judgement
    folds = torch.full_like(judgement.labels, FOLDS)
    for label, count in judgement.counts.items():
        if 1 < count < FEW:
            folds[judgement.labels == label] = torch.arange(count, device=folds.device) % FOLDS
    for fold in folds[folds < FOLDS].unique():
        is_held_out = folds == fold
        mask = forget(request.on(~is_held_out), judgement[~is_held_out]).masks[-1]
        logits[is_held_out] = request.logits(mask, is_held_out)
    return logits


def judged_mask(
    request: UnlearningRequest,
    attempt: Attempt,
    chosen: Tensor | slice,
    logits: Tensor,
    words: list[str],
    messages: list[str],
    forget: Callable[[UnlearningRequest, Judgement], Attempt] | None = None,
) -> Mask:
    """The mask on the model, if the retained classes lose no more than the bounds allow.

    Args:
        chosen: the samples that judge the mask
        logits: theirs
        words: on how the mask was made, for its repr
        messages: further reasons to warn
        forget: makes an attempt from part of the samples; if some are few, the mask of an error is made so

    Raises:
        RetainScoreError: if the chosen samples, or all samples under the last mask, show a larger loss
    """
    judgement, judge = request.judgement, request.judgement[chosen]
    after = judge.accuracies(logits)
    for part, accuracies in ((chosen, after), (slice(None), judgement.accuracies(attempt.logits))):
        # With fewer samples, a mask that is made without one is not like the mask made of all.
        each = judgement[part]
        enough = replace(each, retained=[label for label in each.retained if each.counts[label] >= FOLDS])
        if enough.retained and not enough.is_within(accuracies):
            raise retain_score_error(request, attempt.masks, enough, accuracies, part, forget)
    if not judge.is_within(after):
        mean, worst = judge.lost_points(after)
        lost = f"by samples held out the retained classes lose {mean:.0f} points, one of them {worst:.0f}"
        messages = [lost, *messages]
    if behind := judge.behind_hiding(logits, sorted(request.forget)):
        messages = [behind, *messages]
    if remains := shortfall(judgement, attempt):
        messages = [remains, *messages]
    if messages:
        warnings.warn(f"{'; '.join(messages)} ({request.advice}more samples may do better)", stacklevel=4)
    accuracies = judgement.accuracies(attempt.logits)
    return request.mask_on_model(attempt.masks[-1], accuracies, "; ".join([*words, *messages]))


def retain_score_error(
    request: UnlearningRequest,
    masks: list[Mask],
    judgement: Judgement,
    after: Accuracies,
    chosen: Tensor | slice,
    forget: Callable[[UnlearningRequest, Judgement], Attempt] | None,
) -> RetainScoreError:
    """The error of a request whose last mask costs the chosen samples' retained classes too much.

    If some classes have few samples, its mask is made from four fifths of each class, and chosen by the last fifth.
    """
    judge, candidates, (max_fall, max_class_fall) = judgement, masks[:-1] or masks, request.bounds
    if forget and request.judgement.has_few:
        chosen = held_out(request.judgement.labels)
        candidates = forget(request.on(~chosen), request.judgement[~chosen]).masks
        judge = replace(request.judgement, retained=judgement.retained)[chosen]
    for mask in reversed(candidates):
        accuracies = judge.accuracies(request.logits(mask, chosen))
        # Of the mean, few samples show enough, and need not show a larger loss for certain.
        is_within_mean = max_fall is None or judge.lost_points(accuracies)[0] <= max_fall
        if is_within_mean and judge.is_within(accuracies):
            break
    accuracies = request.judgement.accuracies(request.logits(mask))
    mean, worst = judgement.lost_points(after)
    remaining = ", ".join(f"{accuracies[label]:.1f} % of class {label}" for label in judgement.forget)
    together = f"the retained classes {'lose' if mean > 0 else 'gain'} {abs(mean):.1f} points (max_fall {max_fall})"
    alone = f"one retained class loses {worst:.1f} points (max_class_fall {max_class_fall})"
    is_broken_together = max_fall is not None and mean > max_fall
    losses = f"{together}, {alone}" if is_broken_together else f"{alone}, {together}"  # the broken bound comes first
    on = "its samples" if judge is judgement else "samples that it was not made from"
    message = (
        f"{losses}; the mask of this error, of {mask.num_zeroed} zeroed weights, keeps to that on {on} "
        f"and leaves {remaining} ({request.advice}more samples may do better)"
    )
    return RetainScoreError(message, judgement.accuracies_before, after, request.mask_on_model(mask, accuracies))
