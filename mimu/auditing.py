"""`audit`: what remains of classes in an unlearned classifier, beside the original and retrained ones.

The classes may be forgotten in any way: the models are only read. Each is compared with the original whose logits of
the classes are set to minus infinity (`hidden`), which forgets nothing that the last layer is given.
"""

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain
from statistics import NormalDist, fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from mimu.batches import batches_of
from mimu.errors import InputError, in_one_line, named
from mimu.inputs import copy_of, plain_torch, requested_classes
from mimu.judgement import Judgement, lower_end
from mimu.masks import Mask
from mimu.probes import balanced_bits, linear, two_layer
from mimu.pruning import CONFIDENCE
from mimu.report import OWN_PROBE, AuditReport
from mimu.samples import is_correct
from mimu.subjects import WAYS, Samples, Subject, read

STEPS = 300  # of the two-layer probe, at least
KEPT = 0.9  # of the original's bits, from which on a class is hidden
NAMED = 5.0  # percent of a class that is still classified correctly, from which on it is not forgotten
SEEN = 0.1  # bits that a probe finds in the original, below which nothing can be judged


def jensen_shannon(logits: Tensor, reference: Tensor) -> float:
    """Jensen-Shannon divergence of two classifiers' predictions, mean over samples, bits: 0 to 1, 0 where they agree.

    Lin 1991, Divergence measures based on the Shannon entropy. Both are logits (samples, classes).
    """
    p, q = logits.double().softmax(1), reference.double().softmax(1)
    middle = (p + q) / 2
    terms = [torch.xlogy(x, x) - torch.xlogy(x, middle) for x in (p, q)]
    return (sum(term.sum(1) for term in terms).mean() / (2 * math.log(2))).item()


def loss_attack(members: Tensor, others: Tensor) -> float:
    """Membership inference by losses (Yeom et al. 2018, arXiv:1709.01604): area under the ROC curve, 0.5 is chance.

    It is the probability that the loss of a training sample is smaller than that of another one, ties counted half.
    """
    if not members.isfinite().any() and not others.isfinite().any():
        return math.nan
    ordered = others.sort().values
    above, not_below = (len(ordered) - torch.searchsorted(ordered, members, side=side) for side in ("right", "left"))
    return ((above + not_below).double().mean() / (2 * len(ordered))).item()


class Bits(NamedTuple):
    """A mean of bits, and how far the samples may be from it with CONFIDENCE."""

    bits: float
    error: float

    def __str__(self) -> str:
        return f"{self.bits:.3f} ± {self.error:.3f}"


def interval(bits: Tensor, is_own: Tensor) -> Bits:
    """The mean of `balanced_bits`, or of a difference of them, and its error.

    Half of the mean is that of the samples of the classes, `is_own` (samples), half that of the others.
    """
    parts = bits[is_own], bits[~is_own]
    variance = sum(part.var().item() / len(part) if len(part) > 1 else math.inf for part in parts) / 4
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    return Bits(fmean(part.mean().item() for part in parts), z * math.sqrt(variance))


def is_certain(bits: Tensor, is_own: Tensor, margin: float = 0.0) -> bool:
    """Tells if the mean of `interval` is above a margin by more than the samples' error."""
    mean, error = interval(bits, is_own)
    return mean - error > margin


class Audit:
    """An audit of the models of a request.

    Attributes:
        figures: what is measured, by the name of the model
        bits: `balanced_bits` of the test samples by the name of the model, from the fresh probe that finds most in the
            last layer's input
        own_bits: the same from the linear probe of the original, where a model has as many features
        means: the `interval` of `bits`
        retrained: the names of the retrained models; once probes are trained, from the one in which they find least
    """

    def __init__(
        self, subjects: dict[str, Subject], train: Samples, test: Samples, forget: list[int], seed: int, progress: bool
    ) -> None:
        self.subjects, self.train, self.test, self.forget = subjects, train, test, forget
        self.seed, self.progress = seed, progress
        self.is_member, self.is_own = (torch.isin(each.labels, torch.tensor(forget)) for each in (train, test))
        self.retrained = [name for name in subjects if name.startswith("retrained")]
        retained = sorted(set(test.labels.tolist()) - set(forget))
        original = test.predictions["original"].logits
        self.judgement = Judgement(test.labels, original, retained, (None, None), target=NAMED, erase=True)
        self.figures: dict[str, dict[str, Any]] = {name: self.predictions(name) for name in subjects}
        for name in self.retrained:
            percent, count = self.figures[name]["forget_accuracy"], int(self.is_own.sum())
            if lower_end(percent, count) > 100 / subjects[name].num_classes:
                classifies = f"classifies {percent:.1f} % of {count} test samples of them correctly"
                raise InputError(f"{name} must be trained without the classes to forget, but {classifies}")
        self.bits: dict[str, Tensor] = {}
        self.own_bits: dict[str, Tensor] = {}

    def predictions(self, name: str) -> dict[str, Any]:
        """The accuracies, where the samples of the classes go, and the divergence from the (other) retrained models."""
        own, logits = self.is_own, self.test.predictions[name].logits
        correct = 100 * self.test.predictions[name].correct
        before, after = self.judgement.accuracies_before, self.judgement.accuracies(logits)
        lost = {label: before[label] - after[label] for label in self.judgement.retained}
        shares = 100 * logits[own].argmax(1).bincount(minlength=logits.shape[1]).double() / own.sum()
        others = [self.test.predictions[each].logits for each in self.retrained if each != name]
        figures = {
            "forget_accuracy": correct[own].mean().item(),
            "retain_accuracy": correct[~own].mean().item(),
            "most_lost": max(lost.values()),
            "most_lost_class": max(lost, key=lost.get),
            "predicted": {str(label): shares[label].item() for label in shares.argsort(descending=True)[:10].tolist()},
        }
        for part, chosen in (("forget", own), ("retain", ~own)):
            divergences = [jensen_shannon(logits[chosen], each[chosen]) for each in others]
            figures[f"divergence_{part}"] = fmean(divergences) if others else None
        return figures

    def bar(self, about: str) -> Iterable[tuple[str, Subject]]:
        """The models by their names, with a progress bar on a terminal."""
        return tqdm(self.subjects.items(), about, delay=1, leave=False, disable=not self.progress or None)

    def probe(self) -> None:
        """Trains probes on the features of every model, and puts the original's linear one onto the other models'."""
        labels, own, share = self.train.labels, self.is_own, self.is_member.double().mean().item()
        features = {name: each.hidden[-1] for name, each in self.train.predictions.items()}
        alike = [name for name in self.subjects if features[name].shape == features["original"].shape]
        tests = torch.cat([self.test.predictions[name].hidden[-1] for name in alike])
        of_original = linear(features["original"], labels, tests, self.seed, cost=1.0).chunk(len(alike))
        own_probe = dict(zip(alike, of_original))
        for name, subject in self.bar("probes"):
            if subject.is_hidden:  # the original, in all that its last layer is given
                self.bits[name] = self.bits["original"]
                self.figures[name]["probes"] = self.figures["original"]["probes"]
                continue
            probes = self.figures[name]["probes"] = {}
            train, test = (each.predictions[name].hidden for each in (self.train, self.test))
            for layer, x, x_test in zip(subject.layers, train, test):
                is_known = name == "original" and layer == "last"
                by_probe = {
                    "linear": own_probe[name] if is_known else linear(x, labels, x_test, self.seed, cost=1.0),
                    "two-layer": two_layer(x, labels, x_test, self.seed, STEPS),
                }
                if layer == "last" and name in alike:
                    by_probe[OWN_PROBE] = own_probe[name]
                bits = {probe: balanced_bits(p[:, self.forget].sum(1), own, share) for probe, p in by_probe.items()}
                probes[layer] = {}
                for probe, p in by_probe.items():
                    recall = 100 * is_correct(p[own], self.test.labels[own]).double().mean().item()
                    probes[layer][probe] = {"recall": recall, **interval(bits[probe], own)._asdict()}
            self.own_bits[name] = bits.pop(OWN_PROBE, None)
            self.bits[name] = max(bits.values(), key=lambda each: interval(each, own).bits)
        self.means = {name: interval(bits, own) for name, bits in self.bits.items()}
        self.retrained.sort(key=lambda name: self.means[name].bits)

    def relearn(self) -> None:
        """Relearns the classes in every model in all of WAYS, until half of the original's accuracy is back."""
        labels, goal = self.test.kept.labels, self.figures["original"]["forget_accuracy"] / 2
        test = self.test.kept[torch.isin(labels, labels.new_tensor(self.forget))]
        for name, subject in self.bar("relearning"):
            relearned = {way: subject.relearned(way, self.forget, self.train.kept, test, goal) for way in WAYS}
            self.figures[name]["relearning"] = relearned

    def verdict(self) -> tuple[str, str]:
        """The verdict of an `AuditReport`, and the numbers that say so."""
        figures, own, bits = self.figures["unlearned"], self.is_own, self.bits
        accuracies = self.judgement.accuracies(self.test.predictions["unlearned"].logits)
        counts = self.judgement.counts
        certain = [lower_end(accuracies[label], counts[label], len(self.forget)) for label in self.forget]
        remaining = f"{figures['forget_accuracy']:.1f} % of {int(own.sum())} test samples are classified correctly"
        if max([figures["forget_accuracy"]] + certain) >= NAMED:
            return "not forgotten", remaining
        before, after, of_original = bits["original"], bits["unlearned"], self.own_bits["unlearned"]
        means, retrained = self.means, self.retrained
        reason = f"{remaining}; probes find {means['unlearned']} bits, in the original {means['original']}"
        if retrained:
            reason += f", after retraining {' and '.join(str(means[name]) for name in retrained)}"
        if not is_certain(before, own, SEEN):
            return "cannot be judged", f"{reason}: this is too little, or there are too few samples"
        if of_original is not None and is_certain(of_original - KEPT * before, own):
            return "hidden", f"{reason}; the original's own probe still finds {interval(of_original, own)}"
        if not retrained:
            return "cannot be judged", f"{reason}; a retrained model, which may hold as much, is not given"
        least, most = bits[retrained[0]], bits[retrained[-1]]
        spread = means[retrained[-1]].bits - means[retrained[0]].bits
        if len(retrained) == 1:
            spread = means[retrained[0]].error
            reason += "; how far retrained models differ is unknown, as one is given"
        if is_certain(least - after, own) and means[retrained[0]].bits - means["unlearned"].bits > spread:
            return "less than after retraining", reason
        if not is_certain(before - most, own, spread):
            return "cannot be judged", f"{reason}: retrained models hold about as much as the original"
        if not is_certain(after - most, own, spread):
            return "as after retraining", reason
        return "hidden" if is_certain(after - KEPT * before, own) else "partly erased", reason

    def index(self, name: str) -> float | None:
        """IDI: the bits beyond those after retraining, as a share of the original's; None where these are noise.

        It is 1 as in the original, and 0 as after retraining (after Jeon et al. 2024, arXiv:2405.17878).
        """
        retrained = self.retrained
        if not retrained or not is_certain(self.bits["original"] - self.bits[retrained[-1]], self.is_own):
            return None
        after = fmean(self.means[each].bits for each in retrained)
        return (self.means[name].bits - after) / (self.means["original"].bits - after)

    def report(self, has_test: bool) -> AuditReport:
        """Measures everything, and reports it."""
        self.probe()
        self.relearn()
        for name, figures in self.figures.items():
            members, others = (each.predictions[name].loss for each in (self.train, self.test))
            figures["idi"] = self.index(name)
            figures["loss_attack"] = loss_attack(members[self.is_member], others[self.is_own]) if has_test else None
        notes = []
        if not self.retrained:
            notes.append("No retrained model is given: only what is not forgotten, or hidden, can be told.")
        if not has_test:
            notes.append("No test samples are given: every fifth sample is held out, and membership is left out.")
        return AuditReport(self.forget, *self.verdict(), notes, self.figures)


def audit(
    original: nn.Module,
    unlearned: nn.Module | Mask,
    inputs: Any,
    labels: Any = None,
    *,
    forget_class: int | Sequence[int],
    test: Any = None,
    retrained: nn.Module | Sequence[nn.Module] | None = None,
    layers: Any = None,
    seed: int = 0,
    progress: bool = True,
) -> AuditReport:
    """Measures what remains of classes in a classifier, however these were unlearned. The models are not changed.

    Of every class to forget up to OWN samples are read, of the others up to OTHERS together, to train and to test.

    Args:
        original: returns logits (samples, classes), as `mimu.unlearn` takes it
        unlearned: another such model, or a mask for the original
        inputs, labels: training samples, as `mimu.unlearn` takes them
        forget_class: one class or several
        test: a pair of inputs and labels that no model was trained on, or a DataLoader. None: every fifth of the
            training samples is held out of the audit, and membership is not measured
        retrained: one model that was trained without the classes, or better several
        layers: names, patterns or indices of layers whose input probes read beside the last one's, as the argument
            `mask_layer` of `mimu.unlearn`
        seed: of the probes
        progress: whether bars are shown on a terminal

    Raises:
        InputError: a ValueError, if a model is something else or names a class that it was trained without, or samples
            do not fit it or are not finite
    """
    with plain_torch():
        num_samples, batches = batches_of(inputs, labels, progress)
        first = next(batches)
        models = models_of(original, unlearned, retrained)
        subjects = {name: Subject(name, model, first, layers) for name, model in models.items()}
        sizes = {name: subject.num_classes for name, subject in subjects.items()}
        num_classes = sizes["original"]
        if set(sizes.values()) != {num_classes}:
            raise InputError(f"the models must have the same classes, but return logits for {sizes}")
        forget = sorted(requested_classes(forget_class, torch.arange(num_classes), num_classes, ()))
        if len(forget) == num_classes:
            raise InputError(f"there must be classes to retain beside {forget}")
        train = read(subjects, num_samples, chain([first], batches), forget, first.form)
        if test is None:
            train, tested = train.part(is_test=False), train.part(is_test=True)
        else:
            test_inputs, test_labels = pair_of(test)
            num_samples, batches = batches_of(test_inputs, test_labels, progress)
            tested = read(subjects, num_samples, batches, forget, first.form)
        for name, samples in (("inputs", train), ("test", tested)):
            present = set(samples.labels.tolist())
            if not present > set(forget):
                raise InputError(f"{name} must be of {named(forget)} and others, not of {named(sorted(present))} alone")
        subjects = with_hidden(subjects, (train, tested), forget)
        return Audit(subjects, train, tested, forget, seed, progress).report(test is not None)


def models_of(original: nn.Module, unlearned: nn.Module | Mask, retrained: Any) -> dict[str, nn.Module]:
    """The models of an audit by their names. Raises InputError if a mask does not fit the original."""
    several = [retrained] if isinstance(retrained, nn.Module) else [*(retrained or ())]
    if isinstance(unlearned, Mask):
        mask, unlearned = unlearned, copy_of(original)
        with in_one_line(InputError, "unlearned: the mask does not fit the original"):
            mask.apply(unlearned, permanent=True)
    models = {"original": original, "unlearned": unlearned}
    return models | {f"retrained {place}": model for place, model in enumerate(several, 1)}


def pair_of(test: Any) -> tuple[Any, Any]:
    """The inputs and labels of test samples; a loader holds both. Raises InputError if they are neither."""
    if isinstance(test, DataLoader | Dataset):
        return test, None
    if not (isinstance(test, tuple | list) and len(test) == 2):
        raise InputError(f"test must be a pair of inputs and labels, not {type(test).__name__}")
    return test[0], test[1]


def with_hidden(subjects: dict[str, Subject], parts: tuple[Samples, ...], forget: list[int]) -> dict[str, Subject]:
    """Adds the original whose logits of the classes are minus infinity, with its predictions for all samples."""
    hidden = copy.copy(subjects["original"])
    hidden.is_hidden = True
    for samples in parts:
        original = samples.predictions["original"]
        logits = original.logits.index_fill(1, torch.tensor(forget), -torch.inf)
        samples.predictions["hidden"] = replace(original, logits=logits)
    return {"original": subjects["original"], "hidden": hidden} | subjects
