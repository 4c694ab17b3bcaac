"""All that trains: the classifier, the masking GCN, unlearning by random labels; and the masks of the GCN."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import artifacts
from artifacts import ArtifactError, InputError, one_line
from data import (
    LARGEST,
    Amount,
    GraphConfig,
    GraphGenerator,
    Split,
    check_amount,
    check_range,
    check_span,
    number_of_weights,
    seeded,
    seeded_initialisation,
)
from model import HookedMNISTClassifier, Mask, MaskingGCN, WeightGraph

PRETRAINED = Path(__file__).resolve().parent / "checkpoints" / "pretrained" / "gcn.pt"


class TrainingError(InputError):
    """A training that cannot start, or whose loss is no longer a finite number."""


def check_finite(losses: dict[str, float], step: int, setting: str) -> None:
    """Raises TrainingError on a loss that is infinite or not a number; `setting` is what to look at."""
    for name, loss in losses.items():
        if not math.isfinite(loss):
            raise TrainingError(f"{name} is {loss} at step {step}: training diverged, see {setting}")


def check_weights(model: nn.Module, name: str, setting: str) -> None:
    """The same for the weights that the last step has left."""
    if not all(weight.isfinite().all() for weight in model.parameters()):
        raise TrainingError(f"a weight of the {name} is not a finite number: training diverged, see {setting}")


@dataclass(frozen=True)
class TrainerConfig:
    """How a classifier is trained: Adam on the cross entropy, the learning rate falling linearly to zero."""

    hidden_sizes: tuple[int, ...]
    bias: bool
    epochs: int
    batch_size: int
    learning_rate: float

    def __post_init__(self) -> None:
        for size in self.hidden_sizes:
            check_range("hidden_sizes", size, at_least=1)
        check_range("epochs", self.epochs, at_least=1)
        check_range("batch_size", self.batch_size, at_least=1)
        check_range("learning_rate", self.learning_rate, above=0)

    def shapes(self, in_features: int, num_classes: int) -> list[tuple[int, int]]:
        """(out, in) of every weight matrix of the classifier."""
        sizes = [in_features, *self.hidden_sizes, num_classes]
        return list(zip(sizes[1:], sizes))


class Trainer:
    """Trains a classifier from scratch. On the retain set alone this is the gold standard of unlearning."""

    def __init__(self, config: TrainerConfig, seed: int) -> None:
        self.config = config
        self.seed = seed

    def train(self, train: Split, num_classes: int, description: str = "classifier") -> HookedMNISTClassifier:
        device = train.images.device
        with seeded_initialisation(self.seed):
            classifier = HookedMNISTClassifier(
                self.config.hidden_sizes, train.images.shape[1], num_classes, self.config.bias
            )
        classifier = classifier.to(device)
        steps = self.config.epochs * -(-len(train.labels) // self.config.batch_size)
        optimizer = torch.optim.Adam(classifier.parameters(), self.config.learning_rate)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
        generator = seeded("classifier", self.seed)
        setting = "classifier.learning_rate"
        for _ in tqdm(range(self.config.epochs), description, unit="epoch", delay=1, leave=False, disable=None):
            order = torch.randperm(len(train.labels), generator=generator).to(device)
            for batch in order.split(self.config.batch_size):
                loss = F.cross_entropy(classifier(train.images[batch]), train.labels[batch])
                check_finite({f"loss of the {description}": loss.item()}, schedule.last_epoch, setting)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        check_weights(classifier, description, setting)
        return classifier


def top_k_mask(logits: Tensor, k: int, temperature: float) -> Tensor:
    """Straight-through top-k: exactly k ones on the last dimension, ties included.

    Forward 1 on the k largest and 0 elsewhere; backward the gradient of sigmoid((logit - k-th largest) / temperature).
    """
    largest, vertices = logits.topk(k, -1)
    hard = torch.zeros_like(logits).scatter_(-1, vertices, 1.0)
    soft = ((logits - largest[..., -1:].detach()) / temperature).sigmoid()
    return hard + (soft - soft.detach())


def gumbel_noise(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Standard Gumbel noise: the k largest of logits + noise are a sample of k without replacement.

    Kool et al. 2019, arXiv:1903.06059.
    """
    return -torch.empty(shape).exponential_(generator=generator).log()


def log_uniform(span: tuple[int, ...], generator: torch.Generator) -> int:
    """A random integer from [low, high], small ones as likely as large ones on a logarithmic scale."""
    low, high = span
    return round(low * (high / low) ** torch.rand((), generator=generator).item())


def forgetting_loss(p: Tensor) -> Tensor:
    """Mean of -log(1 - p) in nats, p the probability of the forget class on its own samples: 0 where all forget it."""
    return -torch.log1p(-p.clamp(max=1 - 1e-6)).mean()


def prior_divergence(logits: Tensor, weights: Tensor) -> Tensor:
    """KL(Q || P) in nats, Q = softmax(logits) and P proportional to |w| + 1e-12, both over the vertices.

    Shapes: logits (graphs, vertices), weights (vertices) to (graphs).
    """
    log_p = (weights.abs() + 1e-12).log().log_softmax(-1)
    log_q = logits.log_softmax(-1)
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def contrast(importance: Tensor, damage: Tensor | None = None) -> Tensor:
    """How much more class d needs a weight than the others do: Q_d - sum(v_c Q_c, c != d) / sum(v_c, c != d).

    With `damage`, the cross entropy (classes) of each class under the current mask, v_c is proportional to
    (damage_c + 0.02)^0.5, so that a class that the mask has hurt is spared next; without it all v_c are equal.

    Shapes: importance Q (classes, vertices) to contrast (classes, vertices), a row for every forget class d.
    """
    v = torch.ones_like(importance[:, 0]) if damage is None else (damage + 0.02).sqrt()
    weighted = v[:, None] * importance
    return importance - (weighted.sum(0) - weighted) / (v.sum() - v)[:, None]


def ranked(scores: Tensor, graph: WeightGraph, scope: str, zeroed: Tensor, count: int) -> Tensor:
    """The vertices to zero next, (count): those of the largest scores (vertices) that are not among `zeroed`.

    With the scope layerwise, those of the largest place within their layer: counted together with `zeroed`, every layer
    gives the same share.
    """
    free = len(scores) - len(zeroed)
    if scope == "layerwise":
        scores = scores.index_fill(0, zeroed, float("inf"))
        places = []
        for of_layer in scores.split(graph.sizes):
            order = of_layer.argsort(descending=True, stable=True)
            place = torch.empty_like(of_layer)
            place[order] = torch.arange(len(order), device=order.device).to(place) + 0.5
            places.append(-place / len(order))
        scores = torch.cat(places)
    return scores.index_fill(0, zeroed, float("-inf")).topk(min(count, free)).indices


def top_k_masks(scores: Tensor, graph: WeightGraph, scope: str, zeroed: Tensor, k: int, temperature: float) -> Tensor:
    """`top_k_mask` of scores (masks, vertices) in standard deviations, without the vertices `zeroed`, which are 1, too.

    With the scope layerwise, of every layer by itself, each with its share of k.
    """
    sizes = graph.sizes if scope == "layerwise" else [graph.num_vertices]
    is_zeroed = torch.zeros(graph.num_vertices, dtype=torch.bool, device=scores.device).index_fill(0, zeroed, True)
    masks = []
    for part, gone in zip(scores.split(sizes, 1), is_zeroed.split(sizes)):
        share = min(max(1, round(k * len(gone) / graph.num_vertices)), int((~gone).sum()))
        if share == 0:
            masks.append(torch.ones_like(part))
            continue
        part = part / part.std(1, keepdim=True)
        masks.append(top_k_mask(part.masked_fill(gone, float("-inf")), share, temperature))
    return torch.cat(masks, 1).index_fill(1, zeroed, 1.0)


def masked_outputs(
    classifier: HookedMNISTClassifier, graph: WeightGraph, keep: Tensor, inputs: Tensor
) -> tuple[Tensor, Tensor]:
    """The classifier under many masks at once, differentiable with respect to the masks.

    keep: (masks, vertices); inputs of the first masked layer: (samples, n) for all, or (masks, samples, n)
    Returns the features, which the last layer is given (masks, samples, n), or (samples, n) where no mask touches them,
    and the logits (masks, samples, classes).
    """
    keep_of = dict(zip(graph.layers, graph.split(keep)))
    x = inputs
    for index in range(graph.layers[0], len(classifier.layers)):
        features = x
        layer = classifier.layers[index]
        weight = layer.weight.detach()
        if index in keep_of:
            weight = weight * keep_of[index]  # (masks, m, n)
        x = x @ weight.mT
        if layer.bias is not None:
            x = x + layer.bias.detach()
        if index < len(classifier.layers) - 1:
            x = x.relu()
    return features, x


def masked_logits(classifier: HookedMNISTClassifier, graph: WeightGraph, keep: Tensor, inputs: Tensor) -> Tensor:
    """The logits of `masked_outputs` alone, (masks, samples, classes)."""
    return masked_outputs(classifier, graph, keep, inputs)[1]


def mask_of(graphs: GraphGenerator, zeroed: Tensor) -> Mask | None:
    """The mask that switches off the vertices `zeroed`; None where there is none."""
    return Mask.zeroing(graphs.graph, zeroed) if len(zeroed) else None


@dataclass(frozen=True)
class GCNTrainerConfig:
    """The masking GCN and its loss: the weight of each term, and the ranges from which a step draws.

    pretrained: whether the tracked GCN is taken as it is, instead of training one
    """

    pretrained: bool
    hidden: int
    rounds: int
    message_passing: bool
    steps: int
    learning_rate: float
    gradient_norm: float
    group_size: int
    samples: int
    contrast: Literal["damage", "mean"]
    temperature: float
    gumbel: float
    sufficiency: float
    prior: float
    necessity_forget: float
    necessity_retain: float
    erasure: tuple[float, ...] | None
    kappa: tuple[Amount, ...]
    partly_masked: tuple[Amount, ...] | None
    warmup: int

    def __post_init__(self) -> None:
        for name in ("hidden", "rounds", "steps", "group_size", "samples"):
            check_range(name, getattr(self, name), at_least=1)
        for name in ("learning_rate", "gradient_norm", "temperature"):
            check_range(name, getattr(self, name), above=0)
        terms = ("sufficiency", "prior", "necessity_forget", "necessity_retain")
        for name in ("gumbel", *terms, "warmup"):
            check_range(name, getattr(self, name), at_least=0)
        if not any(getattr(self, name) for name in terms):
            raise ValueError(f"{', '.join(terms)} are all 0: the loss needs a term")
        if self.erasure is not None and not (
            len(self.erasure) == 2 and 0 <= self.erasure[0] <= self.erasure[1] <= LARGEST
        ):
            raise ValueError(f"erasure must be null or [low, high], weights from 0, not {list(self.erasure)}")
        check_span("kappa", self.kappa)
        if self.partly_masked is not None:
            check_span("partly_masked", self.partly_masked)
            if not any(getattr(self, name) for name in terms[1:]):
                raise ValueError(
                    "necessity_forget, necessity_retain or prior must be above 0, or partly_masked null: "
                    "sufficiency is asked of whole classifiers only"
                )


class GCNLoss:
    """What is asked of a masking GCN on one classifier.

    A graph of every class is drawn, its weights are scored, and the classifiers under the masks that follow are tried:

    - sufficiency: with the top-K weights of a class alone, its samples keep their label (cross entropy);
    - prior: KL(Q || P) between softmax(logits) and the distribution proportional to |w|;
    - necessity: without the kappa weights of largest contrast for class d, p(d) of its samples goes to 0, by
      -log(1 - p(d)), and all others keep the original's prediction with class d removed (cross entropy);
    - erasure: without them, the representation does not tell class d from its rivals (R^2 of a linear regression). Its
      weight is drawn anew at every step, and the GCN is told: it serves requests that ask for any of them.
    """

    def __init__(self, config: GCNTrainerConfig, graphs: GraphGenerator, top_k: Amount) -> None:
        self.config = config
        self.graphs = graphs
        self.graph = graphs.graph
        self.top_k = number_of_weights(top_k, self.graph.num_vertices)
        self.kappa = self._numbers(config.kappa)
        self.partly_masked = None if config.partly_masked is None else self._numbers(config.partly_masked)
        with torch.no_grad():
            self.predictions = graphs.classifier(graphs.inputs, self.graph.layers[0])
        self.weights = torch.cat([weight.flatten() for weight in graphs.weights()])

    def _numbers(self, span: tuple[Amount, ...]) -> tuple[int, ...]:
        return tuple(number_of_weights(amount, self.graph.num_vertices) for amount in span)

    def __call__(self, gcn: MaskingGCN, zeroed: Tensor, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        """The terms with a weight above 0 on the classifier without the vertices `zeroed`, and the contrast.

        The erasure term comes with its weight.
        """
        mask = mask_of(self.graphs, zeroed)
        erasure_weight = self._erasure_weight(generator)
        group = self.graphs.draw(self.config.group_size, generator)
        x, damage = self.graphs.class_graphs(group, mask, erasure_weight)
        importance = gcn(x, self.graph)  # (classes, vertices)
        scores = contrast(importance, damage if self.config.contrast == "damage" else None)
        samples = self.graphs.draw(max(1, self.config.samples // self.graphs.num_classes), generator)
        terms: dict[str, Tensor] = {}
        if self.config.sufficiency and mask is None:
            terms["sufficiency"] = self._sufficiency(importance, samples, generator)
        if self.config.prior:
            terms["prior"] = prior_divergence(importance, self.weights).mean()
        if self.config.necessity_forget or self.config.necessity_retain or erasure_weight:
            kappa = log_uniform(self.kappa, generator)
            terms |= self._necessity(scores, zeroed, kappa, samples, erasure_weight)
        return terms, scores.detach()

    def _erasure_weight(self, generator: torch.Generator) -> float:
        if self.config.erasure is None:
            return 0.0
        low, high = self.config.erasure
        return low + (high - low) * torch.rand((), generator=generator).item()

    def partial_mask(self, scores: Tensor, generator: torch.Generator) -> Tensor:
        """The vertices that a classifier lacks midway through a request: the first of `scores` for a random class."""
        forget_class = int(torch.randint(len(scores), (), generator=generator))
        count = log_uniform(self.partly_masked, generator)
        nothing = torch.empty(0, dtype=torch.long, device=scores.device)
        return ranked(scores[forget_class], self.graph, self.graphs.config.scope, nothing, count)

    def _sufficiency(self, importance: Tensor, samples: Tensor, generator: torch.Generator) -> Tensor:
        scores = importance / importance.std(1, keepdim=True)
        noise = self.config.gumbel * gumbel_noise(scores.shape, generator).to(scores.device)
        keep = top_k_mask(scores + noise, self.top_k, self.config.temperature)
        logits = masked_logits(self.graphs.classifier, self.graph, keep, self.graphs.inputs[samples])
        return F.cross_entropy(logits.flatten(0, 1), self.graphs.labels[samples].flatten())

    def _necessity(
        self, scores: Tensor, zeroed: Tensor, kappa: int, samples: Tensor, erasure_weight: float
    ) -> dict[str, Tensor]:
        graphs, temperature = self.graphs, self.config.temperature
        removed = top_k_masks(scores, self.graph, graphs.config.scope, zeroed, kappa, temperature)
        flat = samples.flatten()
        features, logits = masked_outputs(graphs.classifier, self.graph, 1 - removed, graphs.inputs[flat])
        log_p = logits.unflatten(1, samples.shape).log_softmax(-1)  # (masks, classes of the samples, samples, classes)

        is_forget = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
        # p(d) of the samples of d under the mask of d, (samples, masks)
        p_forget = log_p[is_forget].diagonal(dim1=0, dim2=2).exp()
        forget = forgetting_loss(p_forget)

        predictions = self.predictions[flat].unflatten(0, samples.shape)  # (classes of the samples, samples, classes)
        target = predictions.masked_fill(is_forget[:, None, None], float("-inf")).softmax(-1)
        retain = -(target * log_p).sum(-1)[~is_forget].mean()
        terms = {"necessity_forget": forget, "necessity_retain": retain}
        if erasure_weight:
            by_class = features.expand(len(scores), -1, -1).unflatten(1, samples.shape)
            own = [graphs.against_rivals(under_mask, [d]) for d, under_mask in enumerate(by_class)]
            variance = graphs.explained_variance(torch.cat(own), range(len(scores)))
            terms["erasure"] = erasure_weight * variance.mean()
        return terms


class GCNTrainer:
    """Trains one masking GCN for all classes of a classifier, or of several classifiers in turn.

    Every second step works on the classifier that the step before has masked for a random class, as later steps of a
    request will find it.

    graphs: of each classifier; raises TrainingError where their features differ
    """

    def __init__(self, config: GCNTrainerConfig, graphs: Sequence[GraphGenerator], top_k: Amount, seed: int) -> None:
        if len({(each.config.features, each.config.other_classes, each.config.erasure) for each in graphs}) > 1:
            raise TrainingError(
                "features, other_classes and erasure of the graphs must be the same for all classifiers"
            )
        self.config = config
        self.graphs = graphs
        self.top_k = top_k
        self.seed = seed
        self.losses = [GCNLoss(config, of_classifier, top_k) for of_classifier in graphs]
        self.history: list[dict[str, float]] = []

    def train(self) -> MaskingGCN:
        """The trained GCN; `history` holds the terms of the loss at every step."""
        config = self.config
        with seeded_initialisation(self.seed):
            gcn = MaskingGCN(self.graphs[0].config.num_features, config.hidden, config.rounds, config.message_passing)
        gcn = gcn.to(self.graphs[0].labels.device)
        optimizer = torch.optim.Adam(gcn.parameters(), config.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
        generator = seeded("gcn", self.seed, self.top_k)
        nothing = zeroed = torch.empty(0, dtype=torch.long, device=self.graphs[0].labels.device)
        progress = tqdm(range(config.steps), "masking GCN", unit="step", leave=False, disable=None)
        for step in progress:
            if not len(zeroed):
                loss_on = self.losses[int(torch.randint(len(self.losses), (), generator=generator))]
            terms, scores = loss_on(gcn, zeroed, generator)
            loss = sum(value if name == "erasure" else getattr(config, name) * value for name, value in terms.items())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(gcn.parameters(), config.gradient_norm)
            optimizer.step()
            schedule.step()
            # All of them in one copy: a GPU is waited for once a step.
            self.history.append(dict(zip(terms, torch.stack([value.detach() for value in terms.values()]).tolist())))
            check_finite(self.history[-1], step, "gcn.learning_rate and the weight of the term")
            progress.set_postfix({name: f"{value:.3f}" for name, value in self.history[-1].items()}, refresh=False)
            go_on = config.partly_masked is not None and step + 1 >= config.warmup and not len(zeroed)
            zeroed = loss_on.partial_mask(scores, generator) if go_on else nothing
        check_weights(gcn, "masking GCN", "gcn.learning_rate")
        return gcn


def set_difference(importance: Tensor, top_k: int) -> Tensor:
    """The published ranking as one score.

    Weights in the top-K of class d and of no other class come first, by Q_d; the others follow by contrast.

    Shapes: importance (classes, vertices) to scores (classes, vertices), larger is zeroed earlier.
    """
    in_top_k = torch.zeros_like(importance).scatter_(1, importance.topk(top_k, 1).indices, 1.0)
    only_here = (in_top_k == 1) & (in_top_k.sum(0) == 1)
    rest = contrast(importance)
    lift = rest.amax(1, keepdim=True) - importance.amin(1, keepdim=True) + 1
    return torch.where(only_here, importance + lift, rest)


@dataclass(frozen=True)
class MaskingConfig:
    """How a trained GCN answers a request: the class graphs it scores, and how their scores rank the weights."""

    step: Amount | None
    momentum: float
    ranking: Literal["damage", "mean", "set_difference"]
    group_size: int
    draws: int
    target: float
    erasure: float
    erasure_target: float | None
    max_kappa: Amount

    def __post_init__(self) -> None:
        for name in ("group_size", "draws"):
            check_range(name, getattr(self, name), at_least=1)
        for name in ("max_kappa",) + (() if self.step is None else ("step",)):
            check_amount(name, getattr(self, name))
        check_range("target", self.target, above=0)
        check_range("erasure", self.erasure, at_least=0)
        if self.erasure_target is not None:
            check_range("erasure_target", self.erasure_target)
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be at least 0 and below 1, not {self.momentum}")


@dataclass(frozen=True)
class TrainedGCN:
    """A masking GCN, the features that it reads, and the settings of its requests: what its checkpoint holds."""

    gcn: MaskingGCN
    graphs: GraphConfig
    masking: MaskingConfig
    top_k: Amount

    @staticmethod
    def load(path: Path | str = PRETRAINED) -> TrainedGCN:
        """Reads what a run left in `checkpoints/`, or the tracked GCN. Raises ArtifactError."""
        checkpoint = artifacts.load(Path(path))
        try:
            config = checkpoint["config"]
            graphs = GraphConfig(**config["graphs"])
            masking = MaskingConfig(**{field.name: config["eval"][field.name] for field in fields(MaskingConfig)})
            sizes = {name: config["gcn"][name] for name in ("hidden", "rounds", "message_passing")}
            with seeded_initialisation(0):
                gcn = MaskingGCN(graphs.num_features, **sizes)
            gcn.load_state_dict(checkpoint["state_dict"])
            top_k = checkpoint["top_k"]
            check_amount("top_k", top_k)
            if not all(weight.isfinite().all() for weight in gcn.parameters()):
                raise ValueError("a weight is not a finite number")
        except (RuntimeError, LookupError, TypeError, ValueError) as error:
            raise ArtifactError(f"{path}: is not the checkpoint of a masking GCN ({one_line(error)})") from None
        return TrainedGCN(gcn, graphs, masking, top_k)

    def check(self, graphs: GraphConfig) -> None:
        """Raises ArtifactError where the graphs do not have the features that the GCN reads."""
        for name in ("features", "other_classes", "erasure"):
            reads, has = getattr(self.graphs, name), getattr(graphs, name)
            if reads != has:
                raise ArtifactError(f"graphs.{name} must be {reads}, which the trained GCN reads, not {has}")


class GCNRanking:
    """How much a trained GCN wants each weight zeroed to forget a class, on the classifier masked so far."""

    def __init__(
        self, config: MaskingConfig, gcn: MaskingGCN, graphs: GraphGenerator, forget_class: int, top_k: int, seed: int
    ) -> None:
        self.config = config
        self.gcn = gcn
        self.graphs = graphs
        self.forget_class = forget_class
        self.top_k = top_k
        self.seed = seed

    def __call__(self, step: int, zeroed: Tensor) -> Tensor:
        """Scores (vertices), largest first to go, for the step that follows after the vertices `zeroed`."""
        importance, damage = self.importance(step, zeroed)
        if self.config.ranking == "set_difference":
            return set_difference(importance, self.top_k)[self.forget_class]
        return contrast(importance, damage if self.config.ranking == "damage" else None)[self.forget_class]

    @torch.no_grad()
    def importance(self, step: int, zeroed: Tensor) -> tuple[Tensor, Tensor]:
        """The GCN's mean logits Q (classes, vertices), and each class's cross entropy (classes)."""
        importance, damage = [], []
        for draw in range(self.config.draws):
            samples = request_samples(self.config, self.graphs, self.seed, self.forget_class, step, draw)
            x, loss = self.graphs.class_graphs(samples, mask_of(self.graphs, zeroed), self.config.erasure)
            importance.append(self.gcn(x, self.graphs.graph))
            damage.append(loss)
        return torch.stack(importance).mean(0), torch.stack(damage).mean(0)

    def most_needed(self) -> Tensor:
        """The top-K weights of the forget class in the unmasked classifier, (K)."""
        nothing = torch.empty(0, dtype=torch.long, device=self.graphs.labels.device)
        return self.importance(0, nothing)[0][self.forget_class].topk(self.top_k).indices


class SaliencyRanking:
    """The same without a GCN: what removing a weight does to the forget class's margin and to the other classes' loss.

        w E_d[d margin/dw] + retain_weight (w E_r[dL/dw] - w^2 E_r[(dL/dw)^2] / 2) + erasure_weight w dR^2/dw

    The first term is the first-order fall of the margin, the bracket the second-order fall of the loss, with the Fisher
    information for the curvature; E_r is the mean over the other classes, weighted by damage as in `contrast`. The last
    one is what the representation loses of the class, `GraphGenerator.erasure`.
    """

    def __init__(
        self,
        config: MaskingConfig,
        graphs: GraphGenerator,
        forget_class: int,
        seed: int,
        retain_weight: float,
        erasure_weight: float,
    ) -> None:
        self.config = config
        self.graphs = graphs
        self.forget_class = forget_class
        self.seed = seed
        self.retain_weight = retain_weight
        self.erasure_weight = erasure_weight

    def __call__(self, step: int, zeroed: Tensor) -> Tensor:
        """Scores (vertices), largest first to go, for the step that follows after the vertices `zeroed`."""
        samples = request_samples(self.config, self.graphs, self.seed, self.forget_class, step)
        names = ("margin", "effect", "fisher")
        mask = mask_of(self.graphs, zeroed)
        features, damage = self.graphs.class_features(samples, names, mask)
        fall_of_loss = features["effect"] - features["fisher"] ** 2 / 2
        # With 0 for its own class, the contrast is minus the weighted mean over the others.
        fall_of_loss[self.forget_class] = 0
        retain = -contrast(fall_of_loss, damage)[self.forget_class]
        scores = features["margin"][self.forget_class] + self.retain_weight * retain
        if self.erasure_weight:
            (erasure,) = self.graphs.erasure(samples, [self.forget_class], mask)
            scores += self.erasure_weight * erasure
        return scores


def request_samples(
    config: MaskingConfig, graphs: GraphGenerator, seed: int, forget_class: int, step: int, draw: int = 0
) -> Tensor:
    """The samples (classes, group_size) whose graphs one step of a request looks at."""
    return graphs.draw(config.group_size, seeded("request", seed, forget_class, step, draw))


class ZeroingOrder:
    """The order in which weights are zeroed to forget a class: the mask at kappa is its first kappa entries.

    Weights stand in for one another, which scores given all at once cannot see. So a step zeroes `config.step` weights
    (None: all of them), and the next one is ranked on graphs recorded anew on the classifier masked so far. Since each
    ranking is drawn from few samples, a step follows the running mean m = momentum m + (1 - momentum) s of the scores
    s, each divided by their standard deviation. Steps are made when they are asked for: a larger kappa goes on from a
    smaller one.

    ranking: from the number of the step and the vertices zeroed before it to scores (vertices), largest first to go
    """

    def __init__(self, config: MaskingConfig, graphs: GraphGenerator, ranking: Callable[[int, Tensor], Tensor]) -> None:
        self.config = config
        self.graphs = graphs
        self.ranking = ranking
        num_vertices = graphs.graph.num_vertices
        self.max_kappa = min(number_of_weights(config.max_kappa, num_vertices), num_vertices)
        self.step = num_vertices if config.step is None else number_of_weights(config.step, num_vertices)
        self._zeroed = torch.empty(0, dtype=torch.long, device=graphs.labels.device)
        self._mean: Tensor | None = None
        self._seconds: list[float] = []
        self._forgotten_at: int | None = None

    def first(self, kappa: int) -> Tensor:
        """The vertices to zero for this kappa, in order, (kappa): all of them where kappa is larger."""
        while len(self._zeroed) < min(kappa, self.graphs.graph.num_vertices):
            started = time.perf_counter()
            scores = self.ranking(len(self._seconds), self._zeroed)
            scores = scores / scores.std().clamp_min(1e-12)
            self._mean = scores if self._mean is None else torch.lerp(scores, self._mean, self.config.momentum)
            graph, scope = self.graphs.graph, self.graphs.config.scope
            self._zeroed = torch.cat([self._zeroed, ranked(self._mean, graph, scope, self._zeroed, self.step)])
            self._seconds.append(time.perf_counter() - started)
        return self._zeroed[:kappa]

    @torch.no_grad()
    def forgotten_at(self, forget: Split) -> int:
        """The smallest kappa of whole steps that leaves less than `config.target` percent of these samples correct.

        With an `erasure_target`, a ridge regression on the representation must also find the class less often than it
        would in one that never saw the class, or by less than so many points more often. That recall is estimated by
        what the regression finds in the pixels. Both are recalls on training samples.

        Where all is zeroed at once, it goes in hundredths of `max_kappa`. At `max_kappa` it is given up, and that is
        returned.

        forget: the training samples of the forget class, the same at every call
        """
        if self._forgotten_at is None:
            self._forgotten_at = self._search(forget)
        return self._forgotten_at

    def _search(self, forget: Split) -> int:
        classifier, first = self.graphs.classifier, self.graphs.graph.layers[0]
        with classifier.hooks([first]) as seen:
            classifier(forget.images)
        inputs = seen[first][0]
        stride = self.step if self.config.step is not None else max(1, self.max_kappa // 100)
        for kappa in range(stride, self.max_kappa, stride):
            zeroed = self.first(kappa)
            started = time.perf_counter()
            mask = Mask.zeroing(self.graphs.graph, zeroed)
            with mask.applied_to(classifier):
                correct = (classifier(inputs, first).argmax(1) == forget.labels).float().mean().item()
            is_forgotten = 100 * correct < self.config.target and self.is_erased(mask, int(forget.labels[0]))
            self._seconds[-(-kappa // self.step) - 1] += time.perf_counter() - started
            if is_forgotten:
                return kappa
        return self.max_kappa

    def is_erased(self, mask: Mask, forget_class: int) -> bool:
        """Whether a mask brings the recall of the class below the `erasure_target`; with none, every mask does."""
        if self.config.erasure_target is None:
            return True
        excess = self.graphs.probe_recall(mask)[forget_class] - self.graphs.pixel_recall[forget_class]
        return excess.item() < self.config.erasure_target

    def seconds(self, kappa: int) -> float:
        """What the steps up to this kappa took, of those that are made."""
        return sum(self._seconds[: -(-kappa // self.step)])


def other_labels(labels: Tensor, num_classes: int, generator: torch.Generator) -> Tensor:
    """A random label for each sample, never its own."""
    shift = torch.randint(1, num_classes, labels.shape, generator=generator).to(labels.device)
    return (labels + shift) % num_classes


@dataclass(frozen=True)
class UnlearningSFTConfig:
    """How long and how fast random labels are learned."""

    epochs: int
    batch_size: int
    learning_rate: float

    def __post_init__(self) -> None:
        check_range("epochs", self.epochs, at_least=1)
        check_range("batch_size", self.batch_size, at_least=1)
        check_range("learning_rate", self.learning_rate, above=0)


class UnlearningSFT:
    """Unlearning by fine-tuning on random labels (Graves et al. 2021, arXiv:2010.10981), of some layers only.

    The forget class's training samples get random labels of the other classes; SGD on the cross entropy.
    """

    def __init__(self, config: UnlearningSFTConfig, seed: int) -> None:
        self.config = config
        self.seed = seed

    def unlearn(
        self, classifier: HookedMNISTClassifier, forget: Split, layers: tuple[int, ...]
    ) -> HookedMNISTClassifier:
        """Trains the given layers of `classifier` in place on `forget`, samples of one class, and returns it."""
        num_classes = classifier.shapes[-1][0]
        generator = seeded("sft", self.seed, int(forget.labels[0]))
        labels = other_labels(forget.labels, num_classes, generator)
        optimizer = torch.optim.SGD([classifier.layers[index].weight for index in layers], self.config.learning_rate)
        steps = itertools.count()
        for _ in range(self.config.epochs):
            order = torch.randperm(len(labels), generator=generator).to(labels.device)
            for batch in order.split(self.config.batch_size):
                loss = F.cross_entropy(classifier(forget.images[batch]), labels[batch])
                check_finite({"loss": loss.item()}, next(steps), "eval.hyperparameters.sft")
                classifier.zero_grad()
                loss.backward()
                optimizer.step()
        return classifier
