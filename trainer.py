"""All that trains: the classifier, the masking GCN, unlearning by random labels."""

from __future__ import annotations

import math
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, OneCycleLR
from tqdm import tqdm

from experiment.files import Artifact
from mimu.errors import TrainingError
from mimu.graph import MaskingGCN, WeightGraph
from mimu.pruning import PruningConfig, RemainingCounter, prune, prune_until_forgotten
from mimu.saliency import FORGETTING_TEMPERATURE, TERMS, ActivationGraphs, ranked, saliency
from mimu.samples import Split, is_correct
from mimu.seeds import seeded, seeded_initialisation
from mimu.settings import Amount, Count, NonNegative, Positive, number_of_weights
from mimu.tracing import HookedClassifier, Trace, log_odds
from mimu.training import check_weights, descend, learn
from model import VisionTransformer, airbench, cnn, mlp, resnet, whiten

LEAST_SPREAD = 1e-6  # standard deviation of scores, which may be all the same
GRADIENT_NORM = 1.0  # largest norm of a step's gradient of the GCN
SAVED_EVERY = 60.0  # seconds of training, at least, between two writes of how far it is
COMPARED = 10  # classes, at most, that GCN and formula both forget to be compared
TOLERATED = 1.0  # points that a GCN may be behind the formula
TRACES: dict[Hashable, Trace] = {}  # of classifiers, by all that these depend on but their weights


class Progress:
    """How far a training is, kept now and then in the place of its checkpoint: an interrupted one goes on from there.

    parts: all that has a `state_dict` and changes from step to step
    step: the one to begin with
    seconds: that the training has taken, before an interrupt, too
    """

    def __init__(self, checkpoint: Artifact | None, generator: torch.Generator, *parts: Any) -> None:
        self.file = checkpoint and replace(checkpoint, provenance=checkpoint.provenance | {"training": "begun"})
        self.generator, self.parts = generator, parts
        self.step, self._saved = 0, time.monotonic()
        self._started = self._saved
        if self.file and self.file.is_current:
            state = self.file.load()
            self.step = state["step"]
            self._started -= state["seconds"]
            generator.set_state(state["generator"])
            for part, of_part in zip(parts, state["parts"]):
                part.load_state_dict(of_part)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def save(self, step: int) -> None:
        """Keeps the state before a step, where the last one is of `SAVED_EVERY` seconds ago."""
        if self.file and time.monotonic() - self._saved >= SAVED_EVERY:
            states = [part.state_dict() for part in self.parts]
            state = {"step": step, "seconds": self.seconds, "generator": self.generator.get_state(), "parts": states}
            self.file.save(state)
            self._saved = time.monotonic()


@dataclass(frozen=True)
class TrainerConfig:
    """What a classifier is, and how it is trained: on the cross entropy, with a rate that falls linearly to zero."""

    architecture: Literal["mlp", "cnn", "airbench", "resnet", "vit"]
    hidden_sizes: tuple[Count, ...]
    channels: tuple[Count, ...]
    blocks: Count
    patch: Count
    heads: Count
    batch_norm: bool
    bias: bool
    epochs: Count
    batch_size: Count
    learning_rate: Positive
    momentum: Annotated[float, "at least 0, below 1"] | None
    weight_decay: NonNegative
    warm_up: Annotated[float, "at least 0, below 1"]
    label_smoothing: Annotated[float, "at least 0, below 1"]
    shift: Annotated[int, "at least 0"]
    flip: bool
    bfloat16: bool

    def network(self, size: Sequence[int], num_classes: int) -> nn.Module:
        """The classifier as a module, with weights as PyTorch draws them.

        size: height and width of the images, and before them 3 of those in colour; of an mlp also what they have of
            pixels
        """
        if self.architecture == "mlp":
            return mlp([math.prod(size), *self.hidden_sizes, num_classes], self.bias)
        if not self.channels:
            raise ValueError(f"channels must name one at least for {self.architecture}")
        size = (1, *size) if len(size) == 2 else tuple(size)  # channels, height, width
        sizes = [*self.hidden_sizes, num_classes]
        if self.architecture == "cnn":
            return cnn(size, self.channels, sizes, self.bias, self.batch_norm)
        if self.architecture == "airbench":
            return airbench(size, self.channels, sizes, self.bias, self.blocks)
        if self.architecture == "vit":
            widths = [*self.channels, *self.hidden_sizes]
            if len(self.channels) != 1 or len(self.hidden_sizes) != 1:
                raise ValueError(f"channels and hidden_sizes must each be one number for vit, not {widths}")
            return VisionTransformer(size, self.patch, *widths, self.heads, self.blocks, num_classes)
        return resnet(size, self.channels, self.blocks, num_classes)

    def optimizer(self, model: nn.Module, steps: int) -> tuple[torch.optim.Optimizer, LRScheduler]:
        """What takes the steps, Adam or SGD with Nesterov's momentum, and their rate: it rises first or falls alone."""
        decay = {"weight_decay": self.weight_decay}
        if self.momentum is None:
            optimizer = torch.optim.Adam(model.parameters(), self.learning_rate, **decay)
        else:
            momentum = {"momentum": self.momentum, "nesterov": self.momentum > 0}
            optimizer = torch.optim.SGD(model.parameters(), self.learning_rate, **momentum, **decay)
        if not self.warm_up:
            return optimizer, LinearLR(optimizer, 1.0, 0.0, steps)
        if self.warm_up * steps <= 1:
            raise TrainingError(f"classifier.warm_up must be 0 or above {1 / steps:.2g}, one of {steps} steps")
        triangle = {"pct_start": self.warm_up, "anneal_strategy": "linear", "cycle_momentum": False}
        return optimizer, OneCycleLR(optimizer, self.learning_rate, steps, **triangle)


def augmented(images: Tensor, shift: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Images (samples, [channels,] height, width), each moved by up to `shift` pixels, half of them mirrored, too.

    Where an image is moved away from an edge, the pixels at that edge are repeated.
    """
    count, (height, width), device = len(images), images.shape[-2:], images.device
    moves = torch.randint(2 * shift + 1, (2, count, 1), generator=generator).to(device)
    is_mirrored = (torch.rand(count, 1, generator=generator) < 0.5 * flip).to(device)
    rows = torch.arange(height, device=device) + moves[0]
    columns = torch.arange(width, device=device) + moves[1]
    columns = torch.where(is_mirrored, columns.flip(1), columns)
    by_pixel = F.pad(images.view(count, -1, height, width), (shift,) * 4, mode="replicate").permute(0, 2, 3, 1)
    sample = torch.arange(count, device=device)[:, None, None]
    return by_pixel[sample, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2).reshape(images.shape)


class Trained(NamedTuple):
    """A classifier after its training, and the seconds that this took."""

    model: HookedClassifier
    seconds: float


@dataclass(frozen=True)
class Trainer:
    """Trains a classifier from scratch. On the retain set alone this is the gold standard of unlearning."""

    config: TrainerConfig
    seed: int
    size: tuple[int, ...] | None = None  # of the images; None: of pixels alone, for an mlp without shift and flip

    def initial(self, images: Tensor, num_classes: int) -> HookedClassifier:
        """The classifier of images (samples, pixels) before its training, on their device."""
        with seeded_initialisation(self.seed):
            network = self.config.network(self.size or images.shape[1:], num_classes)
        if self.config.architecture == "airbench":
            whiten(network, images)
        of_images = (self.config, self.size, images.shape[1:], images.device, num_classes)
        example = TRACES.get(of_images, images[:2])
        classifier = HookedClassifier(network.to(images.device), example, self.config.bfloat16)
        TRACES[of_images] = classifier.trace
        return classifier

    def train(self, train: Split, num_classes: int) -> HookedClassifier:
        """The classifier after its training."""
        return self.trained(train, num_classes).model

    def trained(self, train: Split, num_classes: int, checkpoint: Artifact | None = None) -> Trained:
        """The classifier after its training, whose `Progress` is kept where its checkpoint will be."""
        config, setting = self.config, "classifier.learning_rate"
        classifier = self.initial(train.images, num_classes)
        optimizer, schedule = config.optimizer(classifier, config.epochs * -(-len(train.labels) // config.batch_size))
        optimizer.register_step_post_hook(lambda *_: schedule.step())
        generator = seeded("classifier", self.seed)
        progress = Progress(checkpoint, generator, classifier, optimizer, schedule)

        def loss(images: Tensor, labels: Tensor) -> Tensor:
            if config.shift or config.flip:
                images = augmented(images.unflatten(1, self.size), config.shift, config.flip, generator).flatten(1)
            return F.cross_entropy(classifier(images), labels, label_smoothing=config.label_smoothing)

        epochs, size = config.epochs, config.batch_size
        learn(classifier, train, epochs, size, optimizer, generator, loss, setting, progress.step, progress.save)
        check_weights(classifier, "classifier", setting)
        return Trained(classifier, progress.seconds)


def top_k_mask(logits: Tensor, k: int, temperature: float) -> Tensor:
    """Straight-through top-k: exactly k ones on the last dimension, ties included.

    Forward 1 on the k largest and 0 elsewhere; backward the gradient of sigmoid((logit - k-th largest) / temperature).
    """
    largest, vertices = logits.topk(k, -1)
    hard = torch.zeros_like(logits).scatter_(-1, vertices, 1.0)
    soft = ((logits - largest[..., -1:].detach()) / temperature).sigmoid()
    return hard + (soft - soft.detach())


def kappa_mask(scores: Tensor, zeroed: Tensor, kappa: int, temperature: float) -> Tensor:
    """`top_k_mask` of scores (vertices) in standard deviations, 1 for the weights to zero: `zeroed`, and kappa more."""
    is_zeroed = torch.zeros_like(scores, dtype=torch.bool).index_fill(0, zeroed, True)
    left = int((~is_zeroed).sum())
    scores = scores / scores.std().clamp_min(LEAST_SPREAD)
    further = top_k_mask(scores.masked_fill(is_zeroed, float("-inf")), max(1, min(kappa, left)), temperature)
    return further.index_fill(0, zeroed, 1.0)


def masked_weights(classifier: HookedClassifier, graph: WeightGraph, keep: Tensor) -> dict[str, Tensor]:
    """A classifier's weights under a mask `keep` (vertices), differentiable in it, as its `outputs` takes them.

    Shapes: of each masked layer, by its name; of several masks (masks, vertices) to (masks, *shape).
    """
    weights = dict(zip(classifier.names, classifier.weights))
    return {name: weights[name].detach() * part for name, part in zip(graph.names, graph.split(keep))}


def log_uniform(span: tuple[Amount, Amount], num_vertices: int, generator: torch.Generator) -> int:
    """A random number of weights from [low, high], small ones as likely as large ones on a logarithmic scale."""
    low, high = (number_of_weights(amount, num_vertices) for amount in span)
    return round(low * (high / low) ** torch.rand((), generator=generator).item())


@dataclass(frozen=True)
class GCNTrainerConfig:
    """The masking GCN and its loss, and the ranges from which a step draws."""

    pretrained: bool  # takes the tracked GCN as it is
    hidden: Count
    rounds: Count
    message_passing: bool
    steps: Count
    learning_rate: Positive
    group_size: Count
    samples: Count
    temperature: Positive
    necessity_forget: NonNegative
    necessity_retain: NonNegative
    kappa: tuple[Amount, Amount]
    partly_masked: tuple[Amount, Amount]
    snapshots: Count

    def network(self, num_features: int) -> MaskingGCN:
        """The GCN that reads so many features of a vertex, with weights as PyTorch draws them."""
        return MaskingGCN(num_features, self.hidden, self.rounds, self.message_passing)

    def __post_init__(self) -> None:
        if not self.necessity_forget and not self.necessity_retain:
            raise ValueError("necessity_forget or necessity_retain must be above 0: every step needs a term")
        for name in ("kappa", "partly_masked"):
            low, high = getattr(self, name)
            if low > high or isinstance(low, int) != isinstance(high, int):
                raise ValueError(f"{name} must be [low, high], both numbers or both shares, not {[low, high]}")


@dataclass(frozen=True)
class GCNLoss:
    """What is asked of a masking GCN on one classifier: of the mask that it makes to forget a class.

    Necessity: without the kappa weights of largest score for class d, p(d) of its samples goes to 0, by -log(1 - p(d))
    at a temperature, and all others keep the original's prediction with class d removed (cross entropy), which weighs
    `retain_weight`. Of both the saliency is the expansion for a single weight.
    """

    config: GCNTrainerConfig
    graphs: ActivationGraphs
    retain_weight: float

    def __call__(
        self, gcn: MaskingGCN, zeroed: Tensor, class_index: int, generator: torch.Generator
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The weighted terms, and the scores (vertices), on the classifier without the vertices `zeroed`."""
        config, graphs = self.config, self.graphs
        group = graphs.draw(config.group_size, generator)
        names = [*TERMS, *graphs.config.features]
        snapshot = graphs.snapshot(group, names, graphs.mask_of(zeroed), class_index)
        scores = saliency(snapshot, class_index, self.retain_weight, gcn)
        kappa = log_uniform(config.kappa, graphs.graph.num_vertices, generator)
        removed = kappa_mask(scores, zeroed, kappa, config.temperature)
        flat = graphs.draw(max(1, config.samples // graphs.num_classes), generator).flatten()
        forget_class = graphs.classes[class_index]
        weights = masked_weights(graphs.classifier, graphs.graph, 1 - removed)
        _, logits = graphs.suffix.outputs(graphs.cached_inputs[flat], weights)
        is_forget = graphs.labels[flat] == forget_class
        own = log_odds(logits[is_forget], graphs.labels[flat][is_forget]) / FORGETTING_TEMPERATURE
        forget = FORGETTING_TEMPERATURE * F.softplus(own).mean()
        without = torch.tensor([forget_class], device=flat.device)
        target = graphs.predictions[flat][~is_forget].index_fill(1, without, float("-inf")).softmax(-1)
        retain = F.cross_entropy(logits[~is_forget], target)
        terms = {
            "necessity_forget": config.necessity_forget * forget / self.retain_weight,
            "necessity_retain": config.necessity_retain * retain,
        }
        return terms, scores.detach()


@dataclass(frozen=True)
class GCNTrainer:
    """Trains one masking GCN on the graphs of one or several classifiers, which must have the same features.

    It follows requests: after a step on a whole classifier come `snapshots` more on it as the GCN's own masks for a
    random class leave it, more and more of it zeroed, half at most.
    """

    config: GCNTrainerConfig
    graphs: Sequence[ActivationGraphs]
    retain_weight: float
    seed: int

    def __post_init__(self) -> None:
        if len({(each.config.features, each.config.other_classes) for each in self.graphs}) > 1:
            raise TrainingError("graphs.features and other_classes must be those of all classifiers")

    def initial(self) -> MaskingGCN:
        """The GCN before its training: the formula."""
        graphs = self.graphs[0]
        with seeded_initialisation(self.seed):
            return self.config.network(graphs.config.num_features).to(graphs.labels.device)

    def train(self, checkpoint: Artifact | None = None) -> MaskingGCN:
        """The GCN after its training, whose `Progress` is kept where its checkpoint will be."""
        config, gcn = self.config, self.initial()
        losses = [GCNLoss(config, of_classifier, self.retain_weight) for of_classifier in self.graphs]
        optimizer = torch.optim.Adam(gcn.parameters(), config.learning_rate)
        schedule = CosineAnnealingLR(optimizer, config.steps)
        generator = seeded("gcn", self.seed)
        loss_on, zeroed = losses[0], self.graphs[0].nothing
        progress = Progress(checkpoint, generator, gcn, optimizer, schedule)
        steps = range(progress.step, config.steps)
        for step in tqdm(steps, "masking GCN", unit="step", leave=False, disable=None):
            is_half_zeroed = 2 * len(zeroed) > loss_on.graphs.graph.num_vertices
            if step == progress.step or step % (1 + config.snapshots) == 0 or is_half_zeroed:
                progress.save(step)
                loss_on = losses[int(torch.randint(len(losses), (), generator=generator))]
                class_index = int(torch.randint(loss_on.graphs.num_classes, (), generator=generator))
                zeroed = loss_on.graphs.nothing
            terms, scores = loss_on(gcn, zeroed, class_index, generator)
            descend(optimizer, terms, step, "gcn.learning_rate and the weight of the term", GRADIENT_NORM)
            schedule.step()
            count = log_uniform(config.partly_masked, len(scores), generator)
            zeroed = torch.cat([zeroed, ranked(scores, zeroed, count)])
        check_weights(gcn, "masking GCN", "gcn.learning_rate")
        return gcn

    @torch.no_grad()
    def points_behind(self, gcn: MaskingGCN, masking: PruningConfig) -> float:
        """By how many points the answers of this GCN are behind the formula's, for the class where they are most.

        Points: what kappa auto keeps of the others less what it leaves of the class, in samples of the first graphs.
        """
        graphs = self.graphs[0]

        def points(class_index: int, label: int, gcn: MaskingGCN | None) -> float:
            counter = RemainingCounter(graphs, class_index, graphs.train.forget(label).images, masking.target)
            steps = prune(graphs, class_index, masking, self.seed, gcn)
            *_, (zeroed, _, _) = prune_until_forgotten(steps, counter, masking)
            with graphs.graph.zeroing(zeroed).applied_to(graphs.classifier):
                logits = graphs.suffix(graphs.cached_inputs)
            correct, is_forget = is_correct(logits, graphs.labels).double(), graphs.labels == label
            return 100 * (correct[~is_forget].mean() - correct[is_forget].mean()).item()

        compared = [*enumerate(graphs.classes[:COMPARED])]
        return max(points(row, label, None) - points(row, label, gcn) for row, label in compared)


def other_labels(labels: Tensor, num_classes: int, generator: torch.Generator) -> Tensor:
    """A random label for each sample, never its own."""
    shift = torch.randint(1, num_classes, labels.shape, generator=generator).to(labels.device)
    return (labels + shift) % num_classes


@dataclass(frozen=True)
class UnlearningSFTConfig:
    """How long and how fast random labels are learned."""

    epochs: Count
    batch_size: Count
    learning_rate: Positive


@dataclass(frozen=True)
class UnlearningSFT:
    """Fine-tunes layers on random labels for the forget class, by SGD (after Graves et al. 2021, arXiv:2010.10981)."""

    config: UnlearningSFTConfig
    seed: int

    def unlearn(self, classifier: HookedClassifier, forget: Split, layers: tuple[int, ...]) -> nn.Module:
        """Trains the given layers of `classifier` in place on `forget`, samples of one class, and returns it."""
        generator = seeded("sft", self.seed, int(forget.labels[0]))
        samples = Split(forget.images, other_labels(forget.labels, classifier.shapes[-1][0], generator))
        optimizer = torch.optim.SGD([classifier.weights[index] for index in layers], self.config.learning_rate)
        return learn(classifier, samples, self.config.epochs, self.config.batch_size, optimizer, generator)
