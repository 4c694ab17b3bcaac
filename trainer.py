"""All that trains: the classifier, the masking GCN, unlearning by random labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import data
from data import Amount, Count, GraphGenerator, NonNegative, Positive, Split
from masking.order import forgetting_loss
from masking.rankings import contrast, mask_of, ranked
from model import HookedMNISTClassifier, MaskingGCN, WeightGraph, is_finite
from runs.files import InputError


class TrainingError(InputError):
    """A training that cannot start, or whose loss is no longer a finite number."""


def check_finite(losses: dict[str, float], step: int, setting: str) -> None:
    """Raises TrainingError on a loss that is infinite or not a number; `setting` is what to look at."""
    for name, loss in losses.items():
        if not math.isfinite(loss):
            raise TrainingError(f"{name} is {loss} at step {step}: training diverged, see {setting}")


def check_weights(model: nn.Module, name: str, setting: str) -> None:
    """Raises TrainingError on weights that the last step of a training has left without a finite number."""
    if not is_finite(model):
        raise TrainingError(f"a weight of the {name} is not a finite number: training diverged, see {setting}")


@dataclass(frozen=True)
class TrainerConfig:
    """How a classifier is trained: Adam on the cross entropy, the learning rate falling linearly to zero."""

    hidden_sizes: tuple[Count, ...]
    bias: bool
    epochs: Count
    batch_size: Count
    learning_rate: Positive

    def shapes(self, in_features: int, num_classes: int) -> list[tuple[int, int]]:
        """(out, in) of every weight matrix of the classifier."""
        sizes = [in_features, *self.hidden_sizes, num_classes]
        return list(zip(sizes[1:], sizes))


def learn(
    model: nn.Module,
    samples: Split,
    epochs: int,
    batch_size: int,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    trainable: list[Tensor] | None = None,
    setting: str = "eval.hyperparameters",
) -> nn.Module:
    """Trains a model in place on random batches of the samples, drawn anew in every epoch, and returns it.

    loss: of images and labels; None: the cross entropy
    trainable: for every parameter of the model, 1 where it may change and 0 where not; None: everywhere
    Raises TrainingError on a loss that is not a finite number, and names the `setting` to look at.
    """
    loss = loss or (lambda images, labels: F.cross_entropy(model(images), labels))
    steps = range(epochs * -(-len(samples.labels) // batch_size))
    batches = samples.batches(batch_size, generator)
    for step in tqdm(steps, "training", unit="step", delay=1, leave=False, disable=None):
        batch = next(batches)
        value = loss(batch.images, batch.labels)
        check_finite({"loss": value.item()}, step, setting)
        optimizer.zero_grad()
        value.backward()
        if trainable is not None:
            for parameter, mask in zip(model.parameters(), trainable):
                parameter.grad *= mask
        optimizer.step()
    return model


@dataclass(frozen=True)
class Trainer:
    """Trains a classifier from scratch. On the retain set alone this is the gold standard of unlearning."""

    config: TrainerConfig
    seed: int

    def train(self, train: Split, num_classes: int) -> HookedMNISTClassifier:
        config, setting = self.config, "classifier.learning_rate"
        with data.seeded_initialisation(self.seed):
            classifier = HookedMNISTClassifier(config.hidden_sizes, train.images.shape[1], num_classes, config.bias)
        classifier = classifier.to(train.images.device)
        optimizer = torch.optim.Adam(classifier.parameters(), config.learning_rate)
        steps = config.epochs * -(-len(train.labels) // config.batch_size)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
        optimizer.register_step_post_hook(lambda *_: schedule.step())
        generator = data.seeded("classifier", self.seed)
        learn(classifier, train, config.epochs, config.batch_size, optimizer, generator, setting=setting)
        check_weights(classifier, "classifier", setting)
        return classifier


def top_k_mask(logits: Tensor, k: int, temperature: float) -> Tensor:
    """Straight-through top-k: exactly k ones on the last dimension, ties included.

    Forward 1 on the k largest and 0 elsewhere; backward the gradient of sigmoid((logit - k-th largest) / temperature).
    """
    largest, vertices = logits.topk(k, -1)
    hard = torch.zeros_like(logits).scatter_(-1, vertices, 1.0)
    soft = ((logits - largest[..., -1:].detach()) / temperature).sigmoid()
    return hard + (soft - soft.detach())


def top_k_masks(scores: Tensor, graph: WeightGraph, scope: str, zeroed: Tensor, k: int, temperature: float) -> Tensor:
    """`top_k_mask` of scores (masks, vertices) in standard deviations, without the vertices `zeroed`, which are 1, too.

    With the scope layerwise, of every layer by itself, each with its share of k.
    """
    sizes = graph.sizes if scope == "layerwise" else [graph.num_vertices]
    is_zeroed = torch.zeros(graph.num_vertices, dtype=torch.bool, device=scores.device).index_fill(0, zeroed, True)
    masks = []
    for part, gone in zip(scores.split(sizes, 1), is_zeroed.split(sizes)):
        share = min(max(1, round(k * len(gone) / graph.num_vertices)), int((~gone).sum()))
        if share > 0:
            part = part / part.std(1, keepdim=True)
            part = top_k_mask(part.masked_fill(gone, float("-inf")), share, temperature)
        masks.append(part)
    return torch.cat(masks, 1).index_fill(1, zeroed, 1.0)


def masked_weights(classifier: HookedMNISTClassifier, graph: WeightGraph, keep: Tensor) -> dict[int, Tensor]:
    """A classifier's weights under masks `keep` (masks, vertices), differentiable in it, as its `outputs` takes them.

    Shapes: (masks, m, n) of each masked layer, (m, n) of the others, by the index of the layer.
    """
    weights = {index: layer.weight.detach() for index, layer in enumerate(classifier.layers)}
    return weights | {index: weights[index] * part for index, part in zip(graph.layers, graph.split(keep))}


def log_uniform(span: tuple[Amount, Amount], num_vertices: int, generator: torch.Generator) -> int:
    """A random number of weights from [low, high], small ones as likely as large ones on a logarithmic scale."""
    low, high = (data.number_of_weights(amount, num_vertices) for amount in span)
    return round(low * (high / low) ** torch.rand((), generator=generator).item())


def prior_divergence(logits: Tensor, weights: Tensor) -> Tensor:
    """KL(Q || P) in nats (graphs), Q = softmax(logits) (graphs, vertices), P proportional to |w| + 1e-12 (vertices)."""
    log_p = (weights.abs() + 1e-12).log().log_softmax(-1)
    log_q = logits.log_softmax(-1)
    return (log_q.exp() * (log_q - log_p)).sum(-1)


@dataclass(frozen=True)
class GCNTrainerConfig:
    """The masking GCN and its loss: the weight of each term, and the ranges from which a step draws."""

    pretrained: bool  # takes the tracked GCN as it is
    hidden: Count
    rounds: Count
    message_passing: bool
    steps: Count
    learning_rate: Positive
    gradient_norm: Positive
    group_size: Count
    samples: Count
    contrast: Literal["damage", "mean"]
    temperature: Positive
    gumbel: NonNegative
    sufficiency: NonNegative
    prior: NonNegative
    necessity_forget: NonNegative
    necessity_retain: NonNegative
    kappa: tuple[Amount, Amount]
    partly_masked: tuple[Amount, Amount] | None
    warmup: Annotated[int, "at least 0"]

    def __post_init__(self) -> None:
        terms = ["sufficiency", "prior", "necessity_forget", "necessity_retain"]
        # Sufficiency is asked of whole classifiers only.
        needed = terms if self.partly_masked is None else terms[1:]
        if not any(getattr(self, name) for name in needed):
            raise ValueError(f"{' or '.join(needed)} must be above 0: every step needs a term")
        for name in ("kappa", "partly_masked"):
            low, high = getattr(self, name) or (1, 1)
            if low > high or isinstance(low, int) != isinstance(high, int):
                raise ValueError(f"{name} must be [low, high], both numbers or both shares, not {[low, high]}")


class GCNLoss:
    """What is asked of a masking GCN on one classifier: of the masks that it makes from a graph of every class.

    - sufficiency: with the top-K weights of a class alone, its samples keep their label (cross entropy);
    - prior: KL(Q || P) between softmax(logits) and the distribution proportional to |w|;
    - necessity: without the kappa weights of largest contrast for class d, p(d) of its samples goes to 0, by
      -log(1 - p(d)), and all others keep the original's prediction with class d removed (cross entropy);
    - auxiliary: what else is asked of masks. Its weight is drawn anew at every step, and the GCN is told: it serves
      requests that ask for any of them.
    """

    def __init__(self, config: GCNTrainerConfig, graphs: GraphGenerator, top_k: Amount) -> None:
        self.config = config
        self.graphs = graphs
        self.graph = graphs.graph
        self.top_k = data.number_of_weights(top_k, self.graph.num_vertices)
        with torch.no_grad():
            self.predictions = graphs.classifier(graphs.inputs, self.graph.layers[0])
        self.weights = torch.cat([weight.flatten() for weight in graphs.weights()])

    def __call__(self, gcn: MaskingGCN, zeroed: Tensor, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        """The weighted terms on the classifier without the vertices `zeroed`, and the contrast (classes, vertices)."""
        config, graphs = self.config, self.graphs
        mask = mask_of(graphs, zeroed)
        auxiliary_weight = graphs.auxiliary.draw_weight(generator) if graphs.auxiliary else 0.0
        group = graphs.draw(config.group_size, generator)
        x, damage = graphs.class_graphs(group, mask, auxiliary_weight)
        importance = gcn(x, self.graph)  # (classes, vertices)
        scores = contrast(importance, damage if config.contrast == "damage" else None)
        samples = graphs.draw(max(1, config.samples // graphs.num_classes), generator)
        terms: dict[str, Tensor] = {}
        if config.sufficiency and mask is None:
            terms["sufficiency"] = config.sufficiency * self._sufficiency(importance, samples, generator)
        if config.prior:
            terms["prior"] = config.prior * prior_divergence(importance, self.weights).mean()
        if config.necessity_forget or config.necessity_retain or auxiliary_weight:
            kappa = log_uniform(config.kappa, self.graph.num_vertices, generator)
            removed = top_k_masks(scores, self.graph, graphs.config.scope, zeroed, kappa, config.temperature)
            terms |= self._necessity(removed, samples, auxiliary_weight)
        return terms, scores.detach()

    def partial_mask(self, scores: Tensor, generator: torch.Generator) -> Tensor:
        """The vertices that a classifier lacks midway through a request: the first of `scores` for a random class."""
        forget_class = int(torch.randint(len(scores), (), generator=generator))
        count = log_uniform(self.config.partly_masked, self.graph.num_vertices, generator)
        return ranked(scores[forget_class], self.graph, self.graphs.config.scope, self.graphs.nothing, count)

    def _sufficiency(self, importance: Tensor, samples: Tensor, generator: torch.Generator) -> Tensor:
        classifier, first = self.graphs.classifier, self.graph.layers[0]
        scores = importance / importance.std(1, keepdim=True)
        # The k largest of logits + Gumbel noise are a sample without replacement (Kool et al. 2019, arXiv:1903.06059).
        noise = -torch.empty(scores.shape).exponential_(generator=generator).log()
        keep = top_k_mask(scores + self.config.gumbel * noise.to(scores.device), self.top_k, self.config.temperature)
        weights = masked_weights(classifier, self.graph, keep)
        _, logits = classifier.outputs(self.graphs.inputs[samples], first, weights)
        return F.cross_entropy(logits.flatten(0, 1), self.graphs.labels[samples].flatten())

    def _necessity(self, removed: Tensor, samples: Tensor, auxiliary_weight: float) -> dict[str, Tensor]:
        config, graphs, classifier, flat = self.config, self.graphs, self.graphs.classifier, samples.flatten()
        weights = masked_weights(classifier, self.graph, 1 - removed)
        features, logits = classifier.outputs(graphs.inputs[flat], self.graph.layers[0], weights)
        log_p = logits.unflatten(1, samples.shape).log_softmax(-1)  # (masks, classes of the samples, samples, classes)

        is_forget = torch.eye(len(removed), dtype=torch.bool, device=removed.device)
        # p(d) of the samples of d under the mask of d, (samples, masks)
        p_forget = log_p[is_forget].diagonal(dim1=0, dim2=2).exp()
        forget = config.necessity_forget * forgetting_loss(p_forget)

        predictions = self.predictions[flat].unflatten(0, samples.shape)  # (classes of the samples, samples, classes)
        target = predictions.masked_fill(is_forget[:, None, None], float("-inf")).softmax(-1)
        retain = -(target * log_p).sum(-1)[~is_forget].mean()
        terms = {"necessity_forget": forget, "necessity_retain": config.necessity_retain * retain}
        if auxiliary_weight:
            by_class = features.expand(len(removed), -1, -1).unflatten(1, samples.shape)
            terms["auxiliary"] = auxiliary_weight * graphs.auxiliary.loss(by_class, range(len(removed)))
        return terms


@dataclass(frozen=True)
class GCNTrainer:
    """Trains one masking GCN on the graphs of one or several classifiers, which must have the same features.

    Every second step works on the classifier that the step before has masked for a random class, as later steps of a
    request will find it.
    """

    config: GCNTrainerConfig
    graphs: Sequence[GraphGenerator]
    top_k: Amount
    seed: int

    def __post_init__(self) -> None:
        if len({(each.config.features, each.config.other_classes, each.num_features) for each in self.graphs}) > 1:
            raise TrainingError("graphs.features, other_classes and an auxiliary one must be those of all classifiers")

    def train(self) -> MaskingGCN:
        config, (first, *_) = self.config, self.graphs
        with data.seeded_initialisation(self.seed):
            gcn = MaskingGCN(first.num_features, config.hidden, config.rounds, config.message_passing)
        gcn = gcn.to(first.labels.device)
        losses = [GCNLoss(config, of_classifier, self.top_k) for of_classifier in self.graphs]
        optimizer = torch.optim.Adam(gcn.parameters(), config.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
        generator = data.seeded("gcn", self.seed, self.top_k)
        zeroed = first.nothing
        progress = tqdm(range(config.steps), "masking GCN", unit="step", leave=False, disable=None)
        for step in progress:
            if not len(zeroed):
                loss_on = losses[int(torch.randint(len(losses), (), generator=generator))]
            terms, scores = loss_on(gcn, zeroed, generator)
            optimizer.zero_grad()
            sum(terms.values()).backward()
            nn.utils.clip_grad_norm_(gcn.parameters(), config.gradient_norm)
            optimizer.step()
            schedule.step()
            # All of them in one copy: a GPU is waited for once a step.
            values = dict(zip(terms, torch.stack([value.detach() for value in terms.values()]).tolist()))
            check_finite(values, step, "gcn.learning_rate and the weight of the term")
            progress.set_postfix(values, refresh=False)
            go_on = config.partly_masked is not None and step + 1 >= config.warmup and not len(zeroed)
            zeroed = loss_on.partial_mask(scores, generator) if go_on else first.nothing
        check_weights(gcn, "masking GCN", "gcn.learning_rate")
        return gcn


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

    def unlearn(self, classifier: HookedMNISTClassifier, forget: Split, layers: tuple[int, ...]) -> nn.Module:
        """Trains the given layers of `classifier` in place on `forget`, samples of one class, and returns it."""
        generator = data.seeded("sft", self.seed, int(forget.labels[0]))
        samples = Split(forget.images, other_labels(forget.labels, classifier.shapes[-1][0], generator))
        optimizer = torch.optim.SGD([classifier.layers[index].weight for index in layers], self.config.learning_rate)
        return learn(classifier, samples, self.config.epochs, self.config.batch_size, optimizer, generator)
