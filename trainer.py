"""The trainings of an experiment: the classifier, the masking GCN, and unlearning by random labels."""

import itertools
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, OneCycleLR
from tqdm import tqdm

from experiment.files import Artifact
from mimu.errors import TrainingError
from mimu.graph import MaskingGCN, WeightGraph
from mimu.hooked import HookedClassifier, log_odds
from mimu.pruning import Pruning, PruningConfig, RemainingCounter, prune
from mimu.saliency import FORGETTING_TEMPERATURE, ActivationGraphs, ranked, saliency
from mimu.samples import Split, is_correct
from mimu.seeds import seeded, seeded_initialisation
from mimu.settings import Amount, Bounds, Count, NonNegative, Positive, number_of_weights
from mimu.tracing import Trace
from mimu.training import check_weights, descend, learn
from model import ARCHITECTURES

LEAST_SPREAD = 1e-6  # divisor, at least, in the place of the scores' standard deviation, which may be 0
GRADIENT_NORM = 1.0  # a step's gradient of the GCN is scaled down to this norm if it is larger
SAVED_EVERY = 60.0  # seconds, at least, between two times that the state of a training is saved
COMPARED = 10  # classes, at most, that both the GCN and the formula forget in order to be compared
TOLERATED = 1.0  # points that a GCN may be behind the formula
TRACES: dict[Hashable, Trace] = {}  # exported networks, by everything that they depend on but their weights


Parts = tuple[nn.Module, torch.optim.Optimizer, LRScheduler]
Rounds = Callable[[int], Iterator[dict[str, Tensor]]]


def train_in_rounds(
    section: str, parts: Parts, generator: Generator, next_round: Rounds, steps: int, checkpoint: Artifact | None
) -> float:
    """Trains a model in place. If the same training was interrupted before, it is resumed from its saved state.

    Args:
        section: of the settings, for messages
        parts: the model, its optimizer, and the schedule of the learning rate
        generator: of all random draws
        next_round: a function from the number of a step to the losses of this step and the next ones, by their names;
            each step descends their sum. The state is saved between rounds alone
        steps: of the whole training, which may end within a round
        checkpoint: where the trained model will be saved, and until then the state; None: nowhere
    Returns:
        The seconds that the training took, those before an interrupt included.
    Raises:
        TrainingError: a loss or a weight is not a finite number.
    """
    model, optimizer, schedule = parts
    optimizer.register_step_post_hook(lambda *_: schedule.step())
    setting, step, started = f"{section}.learning_rate", 0, time.monotonic()
    saved = started
    unfinished = checkpoint and replace(checkpoint, provenance=f"unfinished: {checkpoint.provenance}")
    if unfinished and unfinished.is_current:
        state = unfinished.load()
        step, started = state["step"], started - state["seconds"]
        generator.set_state(state["generator"])
        for part, part_state in zip(parts, state["parts"]):
            part.load_state_dict(part_state)
    model.train()
    with tqdm(desc=section, initial=step, total=steps, unit="step", delay=1, leave=False, disable=None) as bar:
        while step < steps:
            if unfinished and time.monotonic() - saved >= SAVED_EVERY:
                saved = time.monotonic()
                state = {"step": step, "seconds": saved - started, "generator": generator.get_state()}
                unfinished.save(state | {"parts": [part.state_dict() for part in parts]})
            for losses in itertools.islice(next_round(step), steps - step):
                descend(optimizer, losses, step, setting)
                step += 1
                bar.update()
    check_weights(model.eval(), section, setting)
    return time.monotonic() - started


# The bounds are so wide that a network, without its weights, is built at once.
Sizes = Annotated[tuple[Annotated[int, Bounds(ge=1, le=10**6)], ...], Field(max_length=20)]


@dataclass(frozen=True)
class TrainerConfig:
    """The settings of a classifier and of its training, which lowers the cross entropy."""

    architecture: Literal[*ARCHITECTURES]
    hidden_sizes: Sizes
    channels: Sizes
    blocks: Annotated[int, Bounds(ge=1, le=50)]
    patch: Count
    heads: Count
    bias: bool
    epochs: Count
    batch_size: Count
    learning_rate: Positive
    momentum: Annotated[float, Bounds(ge=0, lt=1)] | None
    weight_decay: NonNegative
    warm_up: Annotated[float, Bounds(ge=0, lt=1)]
    label_smoothing: Annotated[float, Bounds(ge=0, lt=1)]
    shift: Annotated[int, Bounds(ge=0)]
    flip: bool
    bfloat16: bool

    def network(self, size: Sequence[int], num_classes: int) -> nn.Module:
        """The classifier as a module, with weights as PyTorch draws them; `Architecture.build` says what it takes."""
        return ARCHITECTURES[self.architecture].build(self, size, [*self.hidden_sizes, num_classes])

    def optimizer(self, model: nn.Module, steps: int) -> tuple[torch.optim.Optimizer, LRScheduler]:
        """Returns Adam, or SGD with Nesterov's momentum, and its rate, which rises in the warm-up and falls to zero."""
        kind = torch.optim.Adam
        if self.momentum is not None:
            kind = partial(torch.optim.SGD, momentum=self.momentum, nesterov=self.momentum > 0)
        optimizer = kind(model.parameters(), self.learning_rate, weight_decay=self.weight_decay)
        if not self.warm_up:
            return optimizer, LinearLR(optimizer, 1.0, 0.0, steps)
        if self.warm_up * steps <= 1:
            raise TrainingError(f"classifier.warm_up must be 0 or above {1 / steps:.2g}, one of {steps} steps")
        triangle = {"pct_start": self.warm_up, "anneal_strategy": "linear", "cycle_momentum": False}
        return optimizer, OneCycleLR(optimizer, self.learning_rate, steps, **triangle)


def augmented(images: Tensor, shift: int, flip: bool, generator: Generator) -> Tensor:
    """Moves each image by up to `shift` pixels, and with `flip` mirrors half of them.

    Pixels at an edge are repeated where an image moves away from it. Shapes: (samples, [channels,] height, width).
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
    """A trained classifier, and the seconds that its training took."""

    model: HookedClassifier
    seconds: float


@dataclass(frozen=True)
class Trainer:
    """Trains a classifier from scratch. On the retain set alone this is the gold standard of unlearning.

    size: of the images; None: they have pixels alone, and an mlp without shift and flip reads them
    """

    config: TrainerConfig
    seed: int
    size: tuple[int, ...] | None = None

    def initial(self, images: Tensor, num_classes: int) -> HookedClassifier:
        """Returns the untrained classifier of images (samples, pixels), on their device."""
        with seeded_initialisation(self.seed):
            network = self.config.network(self.size or images.shape[1:], num_classes)
        ARCHITECTURES[self.config.architecture].initialise(network, images)
        key = (self.config, self.size, images.shape[1:], images.device, num_classes)
        classifier = HookedClassifier(network.to(images.device), TRACES.get(key, images[:2]), self.config.bfloat16)
        TRACES[key] = classifier.trace
        return classifier

    def train(self, train: Split, num_classes: int) -> HookedClassifier:
        """Returns the trained classifier."""
        return self.trained(train, num_classes).model

    def trained(self, train: Split, num_classes: int, checkpoint: Artifact | None = None) -> Trained:
        """Returns the trained classifier and its seconds; with a checkpoint, an interrupted training is resumed."""
        config, classifier = self.config, self.initial(train.images, num_classes)
        num_batches = train.num_batches(config.batch_size)
        steps, generator = config.epochs * num_batches, seeded("classifier", self.seed)

        def epoch(step: int) -> Iterator[dict[str, Tensor]]:
            for batch in itertools.islice(train.batches(config.batch_size, generator), num_batches):
                images = batch.images
                if config.shift or config.flip:
                    images = augmented(images.unflatten(1, self.size), config.shift, config.flip, generator).flatten(1)
                logits = classifier(images)
                yield {"loss": F.cross_entropy(logits, batch.labels, label_smoothing=config.label_smoothing)}

        parts = (classifier, *config.optimizer(classifier, steps))
        return Trained(classifier, train_in_rounds("classifier", parts, generator, epoch, steps, checkpoint))


def top_k_mask(logits: Tensor, k: int, temperature: float) -> Tensor:
    """Computes a straight-through mask of the k largest logits on the last dimension.

    The mask is 1 on exactly k logits, ties included, and 0 elsewhere. Backward it has the gradient of
    sigmoid((logit - k-th largest) / temperature).
    """
    largest, vertices = logits.topk(k, -1)
    hard = torch.zeros_like(logits).scatter_(-1, vertices, 1.0)
    soft = ((logits - largest[..., -1:].detach()) / temperature).sigmoid()
    return hard + (soft - soft.detach())


def kappa_mask(scores: Tensor, zeroed: Tensor, kappa: int, temperature: float) -> Tensor:
    """Computes the mask of the weights to zero, (vertices): 1 on those that are `zeroed` before, and on kappa more.

    The kappa ones are the `top_k_mask` of scores (vertices), which are divided by their standard deviation.
    """
    is_zeroed = torch.zeros_like(scores, dtype=torch.bool).index_fill(0, zeroed, True)
    kappa = max(1, min(kappa, int((~is_zeroed).sum())))
    scores = scores / scores.std().clamp_min(LEAST_SPREAD)
    further = top_k_mask(scores.masked_fill(is_zeroed, float("-inf")), kappa, temperature)
    return further.index_fill(0, zeroed, 1.0)


def masked_weights(classifier: HookedClassifier, graph: WeightGraph, keep: Tensor) -> dict[str, Tensor]:
    """Computes the weights of the masked layers, by their names, under a mask `keep`, which gradients reach.

    Shapes: a mask (vertices) gives each weight its own shape; several, (masks, vertices), give (masks, *shape).
    """
    weights = dict(zip(classifier.names, classifier.weights))
    return {name: weights[name].detach() * part for name, part in zip(graph.names, graph.split(keep))}


def log_uniform(span: tuple[Amount, Amount], num_vertices: int, generator: Generator) -> int:
    """Draws a number of weights from [low, high], uniformly on a logarithmic scale."""
    low, high = (number_of_weights(amount, num_vertices) for amount in span)
    return round(low * (high / low) ** torch.rand((), generator=generator).item())


@dataclass(frozen=True)
class GCNTrainerConfig:
    """The settings of the masking GCN, of its loss and of its training."""

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

    def __post_init__(self) -> None:
        if not self.necessity_forget and not self.necessity_retain:
            raise ValueError("necessity_forget or necessity_retain must be above 0: every step needs a term")
        for name in ("kappa", "partly_masked"):
            low, high = getattr(self, name)
            if low > high or isinstance(low, int) != isinstance(high, int):
                raise ValueError(f"{name} must be [low, high], both numbers or both shares, not {[low, high]}")


@dataclass(frozen=True)
class GCNTrainer:
    """Trains one masking GCN on the graphs of one or several classifiers, which must have the same features.

    The training follows requests to forget a random class: a step on a whole classifier, then `snapshots` more on the
    classifier as the GCN's own masks leave it, of which they zero more and more, at most half.
    """

    config: GCNTrainerConfig
    graphs: Sequence[ActivationGraphs]
    retain_weight: float
    seed: int

    def __post_init__(self) -> None:
        if len({(each.config.features, each.config.other_classes) for each in self.graphs}) > 1:
            raise TrainingError("graphs.features and other_classes must be those of all classifiers")

    def initial(self) -> MaskingGCN:
        """Returns the GCN before its training, which leaves the formula as it is."""
        config, graphs = self.config, self.graphs[0]
        with seeded_initialisation(self.seed):
            gcn = MaskingGCN(graphs.config.num_features, config.hidden, config.rounds, config.message_passing)
        return gcn.to(graphs.labels.device)

    def train(self, checkpoint: Artifact | None = None) -> MaskingGCN:
        """Returns the trained GCN; with a checkpoint, an interrupted training is resumed."""
        config, gcn, generator = self.config, self.initial(), seeded("gcn", self.seed)
        optimizer = torch.optim.Adam(gcn.parameters(), config.learning_rate)
        parts = gcn, optimizer, CosineAnnealingLR(optimizer, config.steps)

        def clip(*_: object) -> None:
            nn.utils.clip_grad_norm_(gcn.parameters(), GRADIENT_NORM)

        def request(step: int) -> Iterator[dict[str, Tensor]]:
            graphs = self.graphs[int(torch.randint(len(self.graphs), (), generator=generator))]
            class_index = int(torch.randint(graphs.num_classes, (), generator=generator))
            zeroed, is_complete = graphs.nothing, False
            while not is_complete:
                terms, scores = self.necessity(gcn, graphs, zeroed, class_index, generator)
                yield terms
                count = log_uniform(config.partly_masked, len(scores), generator)
                zeroed = torch.cat([zeroed, ranked(scores, zeroed, count)])
                step += 1
                is_complete = step % (1 + config.snapshots) == 0 or 2 * len(zeroed) > len(scores)

        optimizer.register_step_pre_hook(clip)
        train_in_rounds("gcn", parts, generator, request, config.steps, checkpoint)
        return gcn

    def necessity(
        self, gcn: MaskingGCN, graphs: ActivationGraphs, zeroed: Tensor, class_index: int, generator: Generator
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Computes the loss of the mask that the GCN makes to forget a class, on a classifier that may be masked.

        Without the kappa weights of the highest scores, the probability p of the class on its own samples shall be 0:
        -log(1 - p), at a temperature. The samples of the retained classes shall keep the original's prediction with the
        class removed: cross entropy, weighted by `retain_weight`. For a single weight the saliency is the expansion of
        both.

        Args:
            graphs: of the classifier
            zeroed: vertices that are masked before
            generator: draws the samples and kappa
        Returns:
            The weighted terms by their names, and the scores, (vertices).
        """
        config = self.config
        group = graphs.draw(config.group_size, generator)
        snapshot = graphs.snapshot(group, class_index, zeroed, graphs.config.features)
        scores = saliency(snapshot, self.retain_weight, gcn)
        kappa = log_uniform(config.kappa, graphs.graph.num_vertices, generator)
        removed = kappa_mask(scores, zeroed, kappa, config.temperature)
        weights = masked_weights(graphs.classifier, graphs.graph, 1 - removed)
        samples = graphs.draw(max(1, config.samples // graphs.num_classes), generator).flatten()
        _, logits = graphs.suffix.outputs(graphs.cached_inputs[samples], weights)
        labels, forget_class = graphs.labels[samples], graphs.classes[class_index]
        is_forget = labels == forget_class
        forget_log_odds = log_odds(logits[is_forget], labels[is_forget]) / FORGETTING_TEMPERATURE
        forget = FORGETTING_TEMPERATURE * F.softplus(forget_log_odds).mean()
        terms = {"necessity_forget": config.necessity_forget * forget / self.retain_weight}
        removed_class = torch.tensor([forget_class], device=labels.device)
        target = graphs.predictions[samples][~is_forget].index_fill(1, removed_class, float("-inf")).softmax(-1)
        terms["necessity_retain"] = config.necessity_retain * F.cross_entropy(logits[~is_forget], target)
        return terms, scores.detach()

    @torch.no_grad()
    def points_behind(self, gcn: MaskingGCN, masking: PruningConfig) -> float:
        """Computes by how many points requests with this GCN are behind the formula's, for the class where it is worst.

        Points are retain accuracy less forget accuracy under the mask of kappa auto, on samples of the first graphs.
        """
        graphs = self.graphs[0]

        def points(class_index: int, gcn: MaskingGCN | None) -> float:
            label = graphs.classes[class_index]
            counter = RemainingCounter(graphs, class_index, graphs.train.forget(label), masking.target)
            steps = prune(graphs, class_index, masking, self.seed, gcn, counter=counter)
            logits = graphs.logits(graphs.cached_inputs, Pruning(steps, counter, masking).chosen().vertices)
            correct, is_forget = is_correct(logits, graphs.labels).double(), graphs.labels == label
            return 100 * (correct[~is_forget].mean() - correct[is_forget].mean()).item()

        return max(points(row, None) - points(row, gcn) for row in range(min(COMPARED, graphs.num_classes)))


def other_labels(labels: Tensor, num_classes: int, generator: Generator) -> Tensor:
    """Draws a label for each sample, which is never its own."""
    shift = torch.randint(1, num_classes, labels.shape, generator=generator).to(labels.device)
    return (labels + shift) % num_classes


@dataclass(frozen=True)
class UnlearningSFTConfig:
    """The settings of the fine-tuning on random labels."""

    epochs: Count
    batch_size: Count
    learning_rate: Positive


@dataclass(frozen=True)
class UnlearningSFT:
    """Fine-tunes layers on random labels for the forget class, by SGD (after Graves et al. 2021, arXiv:2010.10981)."""

    config: UnlearningSFTConfig
    seed: int

    def unlearn(self, classifier: HookedClassifier, forget: Split, layers: tuple[int, ...]) -> nn.Module:
        """Trains these layers of a classifier in place on `forget`, samples of one class, and returns it."""
        generator = seeded("sft", self.seed, int(forget.labels[0]))
        samples = Split(forget.images, other_labels(forget.labels, classifier.shapes[-1][0], generator))
        optimizer = torch.optim.SGD([classifier.weights[index] for index in layers], self.config.learning_rate)
        return learn(classifier, samples, self.config.epochs, self.config.batch_size, optimizer, generator)
