"""Attempts at a request of `unlearn`: masks on a copy of the model, made step by step until no class remains."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mimu.erasing import ErasingConfig, RecoveredInformation, erase_classes
from mimu.errors import InputError
from mimu.inputs import CustomModel
from mimu.judgement import Accuracies, Bounds, Judgement
from mimu.masks import LayerMask, Mask
from mimu.pretrained import TrainedGCN
from mimu.pruning import PruningResult, RemainingCounter, choose_kappa, prune
from mimu.saliency import ActivationGraphs
from mimu.samples import FEW, Split
from mimu.settings import number_of_weights

ERASURES = 3  # of the same classes, at most, where one brings back another
LARGEST_STEP = 1 / 800  # of the weights of the last layer, in a step there
TRUSTED = 50.0  # percent: with a lower mean accuracy, samples and model hardly belong together


@dataclass(frozen=True)
class UnlearningRequest:
    """A request of `unlearn`, its parts checked.

    carried: the mask on the user's model
    requested: the classes asked for; samples of them may be missing if they are forgotten already
    trained: the settings of pruning, and the GCN that rescales the scores, or None
    """

    model: nn.Module
    carried: Mask | None
    custom: CustomModel
    requested: set[int]
    trained: TrainedGCN
    erase: bool
    seed: int
    bounds: Bounds
    progress: bool

    def on(self, chosen: Tensor) -> "UnlearningRequest":
        """The request on some of the samples."""
        names = "cached_inputs", "labels", "model_inputs"
        custom = replace(self.custom, **{name: getattr(self.custom, name)[chosen] for name in names})
        return replace(self, custom=custom, progress=False)

    @property
    def train(self) -> Split:
        """The samples, as the classifier of `custom` takes them."""
        return Split(self.custom.cached_inputs, self.custom.labels)

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

    def check(self) -> None:
        """Raises InputError before any work if a mask would not fit the model, or if there is no class to retain.

        Warns if model and samples hardly belong together.
        """
        self.mask_on_model(self.start, {})
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


def forget_classes(request: UnlearningRequest, judgement: Judgement) -> Attempt:
    """Makes an attempt by the method of the request."""
    return forget_by_erasing(request, judgement) if request.erase else forget_by_mask(request, judgement)


def forget_by_mask(request: UnlearningRequest, judgement: Judgement) -> Attempt:
    """Prunes until no class to forget remains: all of them as one, then alone the one of which most remains, if any.

    It ends early if a class cannot be forgotten, or if the retained classes have lost more than they may after a
    search, or twice that within one.
    """
    masks, logits, message, num_free = [request.start], judgement.before, "", 0
    due = [label for label in judgement.forget if judgement.percent_remaining(label, logits) >= judgement.target]
    for _ in range(2 * len(judgement.forget)):
        if message or not due or judgement.is_ruined(logits, 1):
            break
        result = prune_classes(request, judgement, due, masks)
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
    request: UnlearningRequest, judgement: Judgement, forget: Sequence[int], masks: list[Mask]
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
    counter = RemainingCounter(graphs, class_index, own, config.target)
    steps = prune(graphs, class_index, config, request.seed, trained.gcn, zeroed=zeroed, counter=counter)
    limit = number_of_weights(config.max_kappa, graphs.graph.num_vertices)
    shown = {"delay": 1, "leave": False, "disable": None if request.progress else True}
    with tqdm(desc=f"{counter.name}, at most", total=limit, unit=" weights", **shown) as bar:
        results = choose_kappa(steps, counter, config, len(zeroed))
        for number, result in enumerate(results, 1):
            masks.append(graphs.graph.zeroing(result.vertices))
            bar.update(len(result.vertices) - len(zeroed) - bar.n)
            if result.message is None and number % 10 == 0 and judgement.is_ruined(request.logits(masks[-1])):
                break
    if result.message != "":
        result = result._replace(num_needed=len(result.vertices), message=counter.message(result.vertices))
    return result
