"""The models of an audit: what they give for samples, and how fast they relearn classes."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimu.batches import Batch, Form, joined, sketch
from mimu.errors import InputError
from mimu.hiding import HIDDEN_BIAS
from mimu.inputs import check_model, copy_of, exported, layers_to_mask, run_on_few
from mimu.samples import Split, held_out, is_correct
from mimu.seeds import seeded

OWN = 1000  # samples of every class to forget that are read, at most, to learn from and to test
OTHERS = 9000  # of all other classes together
FEWEST = 5  # of each of them
RELEARNED = 128  # samples of the classes to forget from which they are relearned, and as many of the others
BATCH_SIZE = 64  # of these, half of each kind
LEARNING_RATE = 0.0003  # of Adam, when they are relearned with all weights
HEAD_RATE = 0.003  # with the output layer alone
MOST_STEPS = 60
WIDEST = 2048  # features; more are reduced by `sketch`
WAYS = ("all weights", "output layer", "reset")  # the last: the output layer alone, the classes' weights reset first


@dataclass(frozen=True)
class Predictions:
    """What a classifier gives for samples, on the CPU.

    logits: (samples, classes)
    hidden: the inputs of layers, (samples, n) each; the last one is the representation
    labels: (samples)
    """

    logits: Tensor
    hidden: Sequence[Tensor]
    labels: Tensor

    def __getitem__(self, chosen: Tensor) -> "Predictions":
        return Predictions(self.logits[chosen], [each[chosen] for each in self.hidden], self.labels[chosen])

    @property
    def correct(self) -> Tensor:
        """1 for each sample that is classified correctly, else 0, (samples)."""
        return is_correct(self.logits, self.labels).double()

    @property
    def loss(self) -> Tensor:
        """Cross entropy of every sample, (samples), nats, in double precision."""
        return F.cross_entropy(self.logits.double(), self.labels, reduction="none")

    @property
    def has_diverged(self) -> bool:
        """True where a number is infinite or not a number; a logit of minus infinity is a removed class."""
        return not ((self.logits < torch.inf).all() and all(each.isfinite().all() for each in self.hidden))


def relearn(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[Split],
    accuracy: Callable[[], float],
    goal: float,
    most_steps: int,
) -> tuple[int | None, list[float]]:
    """Trains a model in place on batches until its accuracy reaches a goal, percent, for at most so many steps.

    Returns the relearn time (Golatkar et al. 2020, arXiv:1911.04933), steps, None where the loss is not finite, and the
    accuracy before every step and after the last, percent.
    """
    scores: list[float] = []
    for batch in batches:
        scores.append(accuracy())
        if scores[-1] >= goal or len(scores) > most_steps:
            break
        loss = F.cross_entropy(model(batch.images), batch.labels)
        if not loss.isfinite():
            return None, scores
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return len(scores) - 1, scores


def together(parts: Sequence[Split]) -> Split:
    """Joins samples, in their order."""
    return Split(torch.cat([each.images for each in parts]), torch.cat([each.labels for each in parts]))


class Subject:
    """A model that is audited: a copy, in float32, run operation by operation.

    is_hidden: whether the classes are hidden in it when they are relearned
    """

    is_hidden = False

    def __init__(self, name: str, model: nn.Module, first: Batch, layers: Any) -> None:
        """Copies a model and exports it.

        Args:
            first: some samples
            layers: those whose inputs are read beside the last one's, as `mimu.inputs.layers_to_mask` takes them
        Raises:
            InputError: names the model and what is wrong with it
        """
        try:
            check_model(model)
            network = copy_of(model)
            logits, few = run_on_few(network, first)
            if not (logits < torch.inf).all():
                raise InputError("model: logits are not finite")
            few = few.float() if few.is_floating_point() else few
            self.num_classes, self.like = logits.shape[1], few[:0]
            self.classifier = exported(network, few, logits)
            names, at_the_end = self.classifier.names, self.classifier.trace.names_at_the_end
            indices = () if layers is None else layers_to_mask(layers, names, at_the_end, self.num_classes)
        except InputError as error:
            text = str(error).removeprefix("model").replace("mask_layer", "layers")
            raise InputError(f"{name}{text if text[0] in ': ' else f': {text}'}") from error
        self.last = names.index(at_the_end[-1])
        self.layers = {names[index].removesuffix(".weight"): index for index in indices if index != self.last}
        self.layers["last"] = self.last

    @torch.no_grad()
    def __call__(self, images: Tensor) -> list[Tensor]:
        """The logits of samples, and the input of every layer, averaged over positions, on the CPU."""
        classifier, parts = self.classifier, []
        layers = [classifier.layers[index] for index in self.layers.values()]
        for part in images.to(self.like).split(classifier.samples_at_once):
            values = classifier.trace.run(classifier.network, part, watched=[layer.node.args[0] for layer in layers])
            inputs = [layer.mean_read(values[layer.node.args[0]]) for layer in layers]
            inputs = [each if each.shape[1] <= WIDEST else sketch(each) for each in inputs]
            parts.append([each.float().cpu() for each in (values[classifier.trace.output], *inputs)])
        return [torch.cat(each) for each in zip(*parts)]

    @property
    def head(self) -> list[nn.Parameter]:
        """The weight of the last layer, and its bias if there is one."""
        classifier, node = self.classifier, self.classifier.layers[self.last].node
        names = [classifier.names[self.last], *(classifier.trace.parameters.get(each) for each in node.args[2:3])]
        return [classifier.network.get_parameter(name) for name in names if name]

    @torch.no_grad()
    def reset(self, forget: Sequence[int], are_hidden: bool = False) -> None:
        """Sets the output weights of classes to the mean of the other classes', or so that the classes are hidden."""
        weight, *bias = self.head
        retained = [label for label in range(self.num_classes) if label not in forget]
        if len(weight) == self.num_classes:
            for each in (weight, *bias):
                each[forget] = each[retained].mean(0)
            for each in bias if are_hidden else ():
                weight[forget], each[forget] = 0, HIDDEN_BIAS

    def relearned(self, way: str, forget: Sequence[int], few: Split, test: Split, goal: float) -> dict[str, Any]:
        """Relearns classes in one of WAYS; returns the steps that it takes, or None, and the accuracy after each.

        few: training samples; test: those of the classes on which the accuracy is measured
        """
        classifier, network = self.classifier, self.classifier.network
        state = copy.deepcopy(network.state_dict())
        if self.is_hidden:
            self.reset(forget, are_hidden=True)
        if way == "reset":
            self.reset(forget)
        parameters, rate = [*network.parameters()], LEARNING_RATE
        few, test = (Split(each.images.to(self.like), each.labels.to(self.like.device)) for each in (few, test))
        if way != "all weights":
            prefix = partial(classifier.prefix_activations, [self.last])
            few, test = (Split(prefix(each.images), each.labels) for each in (few, test))
            classifier, parameters, rate = classifier.suffix_from([self.last]), self.head, HEAD_RATE
        is_own = torch.isin(few.labels, few.labels.new_tensor(forget))
        parts = [few[chosen].batches(BATCH_SIZE // 2, seeded("relearn")) for chosen in (is_own, ~is_own)]
        batches = map(together, zip(*parts))

        @torch.no_grad()
        def accuracy() -> float:
            return 100 * is_correct(classifier(test.images), test.labels).double().mean().item()

        optimizer = torch.optim.Adam([each for each in parameters if each.requires_grad], rate)
        steps, scores = relearn(classifier, optimizer, batches, accuracy, goal, MOST_STEPS)
        network.load_state_dict(state)
        return {"steps": steps if scores[-1] >= goal else None, "scores": scores}


@dataclass(frozen=True)
class Samples:
    """The samples that are read, to learn from or to test, and what every model gives for them, by its name.

    kept: the first ones of every class as they are, to relearn from
    """

    labels: Tensor
    predictions: dict[str, Predictions]
    kept: Split

    def part(self, is_test: bool) -> "Samples":
        """The samples that are held out, to test, or all others."""
        chosen, of_kept = (held_out(each) == is_test for each in (self.labels, self.kept.labels))
        predictions = {name: each[chosen] for name, each in self.predictions.items()}
        return Samples(self.labels[chosen], predictions, self.kept[of_kept])


def read(
    subjects: dict[str, Subject], num_samples: int, batches: Iterable[Batch], forget: Sequence[int], form: Form
) -> Samples:
    """Reads the first samples of every class, batch by batch, and runs the models on them.

    Args:
        num_samples, batches: as `batches_of` returns them
        form: of the samples that the models take

    Raises:
        InputError: if the samples do not fit, or what a model gives for them is not finite, but for logits of minus
            infinity
    """
    quota = quotas(forget, subjects["original"].num_classes)
    counts, kept = torch.zeros_like(quota[0]), []

    def rows() -> Iterator[tuple[Tensor, ...]]:
        for images, labels, own_form in batches:
            shapes, own_shapes = ({name: shape for name, (shape, _) in each.items()} for each in (form, own_form))
            if own_shapes != shapes:
                raise InputError(f"test must have inputs of shapes {shapes}, as the other samples, not {own_shapes}")
            if not 0 <= labels.min() <= labels.max() < len(counts):
                raise InputError(f"labels must be from 0 to {len(counts) - 1}, not {labels.min()} to {labels.max()}")
            of_class = F.one_hot(labels.cpu(), len(counts))
            place = ((of_class.cumsum(0) - 1 + counts) * of_class).sum(1)
            is_read, is_kept = (place < quota[:, labels.cpu()]).to(labels.device)
            counts.add_(of_class.sum(0))
            if is_read.any():
                kept.append(Split(images[is_kept], labels[is_kept]))
                outputs = [subject(images[is_read]) for subject in subjects.values()]
                yield labels[is_read], *chain(*outputs)
            if (counts >= quota[0]).all():
                return

    labels, *outputs = (each.cpu() for each in joined(rows(), min(num_samples, int(quota[0].sum()))))
    predictions = {}
    for name, subject in subjects.items():
        logits, *hidden = outputs[: 1 + len(subject.layers)]
        outputs = outputs[1 + len(subject.layers) :]
        predictions[name] = Predictions(logits, hidden, labels)
        if predictions[name].has_diverged:
            raise InputError(f"{name}: logits, or what a layer is given, are not finite")
    return Samples(labels, predictions, together(kept))


def quotas(forget: Sequence[int], num_classes: int) -> Tensor:
    """How many samples of each class are read, and how many of these are kept as they are, (2, classes)."""
    rows = []
    for own, others, fewest in ((OWN, OTHERS, FEWEST), (RELEARNED, RELEARNED, 1)):
        row = torch.full((num_classes,), max(fewest, others // (num_classes - len(forget))))
        row[list(forget)] = max(fewest, min(own, others // len(forget)))
        rows.append(row)
    return torch.stack(rows)
