"""`unlearn`: makes a classifier of the user's own forget classes, within bounds on what the retained classes lose."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from mimu.attempts import Attempt, UnlearningRequest, forget_classes
from mimu.erasing import FEWEST
from mimu.errors import InputError, shortened
from mimu.graph import MaskingGCN
from mimu.hiding import mask_that_hides
from mimu.inputs import CustomModel, plain_torch, requested_classes
from mimu.judgement import Accuracies, Judgement
from mimu.masks import Mask
from mimu.pretrained import TrainedGCN
from mimu.samples import FEW, held_out

FOLDS = 5  # parts of few samples that are held out in turn
WORTH_A_TRY = 1.0  # points: if the retained classes lose more by the GCN, the formula is tried


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
    max_fall: float | None = 1.0,
    max_class_fall: float | None = 5.0,
    progress: bool = True,
) -> Mask:
    """Makes the mask that lets a classifier forget classes, by a copy in float32; the model itself is not changed.

    Args:
        model: returns logits (samples, classes), or an object that has them as `logits`
        inputs: training samples (samples, ...), or a DataLoader or data set of pairs (input, label), or of several
            tensors, as `mimu.batches.batches_of` takes them; to hide classes, none are needed
        labels: the classes of the samples, (samples), from 0 on
        forget_class: one class or several; the classes of a mask on the model stay forgotten, and need no samples
        gcn: rescales the scores; None: the pretrained one, but the formula alone for convolutions and on tokens
        mask_layer: one or several layers, as `mimu.inputs.layers_to_mask` takes them
        seed: of the samples that are drawn
        method: "erase" takes the classes from the last layer's input, too (`mimu.erasing`); "mask" zeroes the few
            weights that they need; "hide" changes their output weights alone (`mimu.hiding`). None: erase; where `gcn`,
            `mask_layer` or `scorer` is set, mask; with fewer than FEWEST samples of a class, hide
        scorer: the GCN, or the saliency formula alone
        max_fall, max_class_fall: points of accuracy that the retained classes may lose, together and each; None: any
        progress: whether bars are shown on a terminal

    Raises:
        RetainScoreError: if the retained classes lose more; it holds the last mask within the bounds
        InputError: a ValueError, if the model is something else, or samples do not fit it or are not finite

    Warns if some of a class may remain, if attackers recognise an erased class, or the model does not know the samples.
    """
    if isinstance(inputs, DataLoader | Dataset) and forget_class is None:
        labels, forget_class = None, labels
    is_for_mask = gcn is not None or mask_layer != "auto" or scorer != "gcn"  # only masks have these arguments
    chosen = method or ("mask" if is_for_mask else "erase")
    check_arguments(scorer, chosen, mask_layer, {"max_fall": max_fall, "max_class_fall": max_class_fall})
    with plain_torch():
        if chosen == "hide":
            return mask_that_hides(model, inputs, labels, forget_class, mask_layer, progress)
        erases = chosen == "erase"
        custom = CustomModel.of(model, inputs, labels, mask_layer, progress, erases)
        carried = Mask.on(model)
        forgotten = carried.forgets if carried else ()
        requested = requested_classes(forget_class, custom.labels, custom.num_classes, forgotten)
        if erases and not method and has_too_few(custom.labels, requested - set(forgotten)):
            last_layer = custom.classifier.trace.names_at_the_end[-1]  # found already: a stream is not read twice
            return mask_that_hides(model, None, None, forget_class, last_layer, progress)
        trained = what_ranks(custom, gcn, scorer, erases)
        bounds = max_fall, max_class_fall
        request = UnlearningRequest(model, carried, custom, requested, trained, erases, seed, bounds, progress)
        request.check()
        return erasing_mask(request) if erases else pruning_mask(request)


def has_too_few(labels: Tensor, requested: set[int]) -> bool:
    """True if requested classes have too few samples to be erased. Warns that they are hidden."""
    few = [label for label in sorted(requested) if (labels == label).sum() < FEWEST]
    if few:
        needs = f"to erase and to judge takes {FEWEST} samples of each, and these have fewer: {shortened(str(few))}"
        warnings.warn(f"classes are hidden, and stay in the representation: {needs}", stacklevel=3)
    return bool(few)


def what_ranks(custom: CustomModel, gcn: Any, scorer: str, erase: bool) -> TrainedGCN:
    """The GCN, or None for the formula alone, and the settings for the layers to mask.

    Without a GCN of the user's, the formula ranks kernels and what reads tokens, as the pretrained GCN was trained on
    linear layers of features. To erase, nothing is ranked.
    """
    trained = TrainedGCN.of(gcn, custom.cached_inputs.device)
    layers = [custom.classifier.layers[index] for index in custom.masked]
    read_features = all(len(layer.shape) == 2 and layer.positions is None for layer in layers)
    if gcn is None and not (read_features or erase):
        scorer, trained = "saliency", trained.for_kernels(layer.shape for layer in layers)
    graphs = replace(trained.graphs, mask_layer=custom.masked, scope="measured")
    return replace(trained, graphs=graphs, gcn=trained.gcn if scorer == "gcn" else None)


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


def pruning_mask(request: UnlearningRequest) -> Mask:
    """The mask on the model that zeroes the weights which the classes need.

    If the GCN's mask costs the retained classes more than a point or something remains, the formula's mask is taken
    where that is better. Raises and warns as `unlearn`.
    """
    judgement = request.judgement

    def flaws(attempt: Attempt) -> tuple[bool, float]:
        lost, _ = judgement.lost_points(judgement.accuracies(attempt.logits))
        return shortfall(judgement, attempt) != "", lost

    attempt = forget_classes(request, judgement)
    if request.trained.gcn is not None and flaws(attempt) > (False, WORTH_A_TRY):
        by_formula = replace(request, trained=replace(request.trained, gcn=None))
        formula = forget_classes(by_formula, judgement)
        if flaws(formula) < flaws(attempt):
            request, attempt = by_formula, formula
    logits = held_out_logits(request, attempt)
    chosen = held_out(judgement.labels, FEW)  # the scores did not see these, and no mask saw those of small classes
    for label, count in judgement.counts.items():
        if count < FEW:
            chosen |= judgement.labels == label
    layers = f"{len(request.custom.masked)} of {len(request.custom.classifier.names)} layers that can be masked"
    words = [f"ranked by the {'GCN' if request.trained.gcn is not None else 'formula'} in {layers}"]
    if attempt.num_free:
        needed = attempt.masks[-1].num_zeroed - attempt.num_free
        words.append(f"{needed} weights forget, {attempt.num_free} more cost the retained classes nothing")
    return judged_mask(request, attempt, chosen, logits[chosen], words, judgement.uncertainties(logits))


def erasing_mask(request: UnlearningRequest) -> Mask:
    """The mask on the model that takes the classes from the last layer's input. Raises and warns as `unlearn`."""
    judgement = request.judgement
    attempt = forget_classes(request, judgement)
    chosen = held_out(judgement.labels)  # nothing was learned from these
    judge = judgement[chosen]
    if sum(judge.counts[label] for label in judge.retained) >= FEW:
        logits = attempt.logits[chosen]
    else:
        chosen, logits = slice(None), held_out_logits(request, attempt)
    words, messages = [], judgement.uncertainties(attempt.logits)
    for label, recovered in attempt.recovered.items():
        is_erased = recovered.is_at_target and recovered.can_be_judged
        (words if is_erased else messages).append(f"class {label} {recovered}")
    return judged_mask(request, attempt, chosen, logits, words, messages)


def shortfall(judgement: Judgement, attempt: Attempt) -> str:
    """Says what remains of the classes to forget, or ""; few samples cannot show it (`Judgement.uncertainties`)."""
    words = judgement.remaining(attempt.logits) or ("" if judgement.has_few else attempt.message)
    return f"{words} after {attempt.masks[-1].num_zeroed} zeroed weights" if words else ""


def held_out_logits(request: UnlearningRequest, attempt: Attempt) -> Tensor:
    """The logits of all samples; each of a class with few samples is judged by a mask that is made without it.

    A single sample of a class is never held out.
    """
    logits, judgement = attempt.logits.clone(), request.judgement
    folds = torch.full_like(judgement.labels, FOLDS)
    for label, count in judgement.counts.items():
        if 1 < count < FEW:
            folds[judgement.labels == label] = torch.arange(count, device=folds.device) % FOLDS
    for fold in folds[folds < FOLDS].unique():
        is_held_out = folds == fold
        mask = forget_classes(request.on(~is_held_out), judgement[~is_held_out]).masks[-1]
        logits[is_held_out] = request.logits(mask, is_held_out)
    return logits


def judged_mask(
    request: UnlearningRequest,
    attempt: Attempt,
    chosen: Tensor | slice,
    logits: Tensor,
    words: list[str],
    messages: list[str],
) -> Mask:
    """The mask on the model, if the retained classes lose no more than the bounds allow.

    Args:
        chosen: the samples that judge the mask
        logits: theirs
        words: on how the mask was made, for its repr
        messages: further reasons to warn

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
            raise retain_score_error(request, attempt.masks, enough, accuracies, part)
    found = [shortfall(judgement, attempt), judge.behind_hiding(logits, sorted(request.forget))]
    if not judge.is_within(after):
        mean, worst = judge.lost_points(after)
        found.append(f"by samples held out the retained classes lose {mean:.0f} points, one of them {worst:.0f}")
    if messages := [*filter(None, found), *messages]:
        warnings.warn(f"{'; '.join(messages)} ({request.advice}more samples may do better)", stacklevel=4)
    accuracies = judgement.accuracies(attempt.logits)
    return request.mask_on_model(attempt.masks[-1], accuracies, "; ".join([*words, *messages]))


def retain_score_error(
    request: UnlearningRequest, masks: list[Mask], judgement: Judgement, after: Accuracies, chosen: Tensor | slice
) -> RetainScoreError:
    """The error of a request whose last mask costs the chosen samples' retained classes too much.

    If some classes have few samples, its mask is made from four fifths of each class, and chosen by the last fifth,
    unless classes are erased.
    """
    judge, candidates, (max_fall, max_class_fall) = judgement, masks[:-1] or masks, request.bounds
    if request.judgement.has_few and not request.erase:
        chosen = held_out(request.judgement.labels)
        candidates = forget_classes(request.on(~chosen), request.judgement[~chosen]).masks
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
