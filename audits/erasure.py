"""Erasure: a class goes from the representation too, until a regression finds it there no better than in the pixels.

The recall in the pixels estimates, without retraining, what is told of a class that was never trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audits.predictions import look_at
from audits.probes import standardised
from data import Count, GraphGenerator, NonNegative, Positive
from model import Mask
from networks.hooked import weight_gradient


@dataclass(frozen=True)
class ErasureConfig:
    """How much forgetting in the representation is worth, and how it is measured.

    trained: range from which a training step of the masking GCN draws the weight of the term; None: no erasure at all
    weight: what a request asks for; target: points above the recall in the pixels, below which it is done; None: any
    rivals: how many of the nearest classes a class must be told from; ridge: of the regressions
    """

    trained: tuple[NonNegative, NonNegative] | None
    weight: NonNegative
    target: float | None
    rivals: Count
    ridge: Positive

    def __post_init__(self) -> None:
        if self.trained is not None and self.trained[0] > self.trained[1]:
            raise ValueError(f"trained must be null or [low, high], not {list(self.trained)}")


def ridge_regression(features: Tensor, targets: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Coefficients (A + ridge I)^-1 B, and B: A = H^T H / N and B = H^T T / N, of standardised features H.

    Shapes: features H (..., samples, n), targets T (..., samples, k) to (..., n, k) both.
    """
    transposed = features.mT / features.shape[-2]
    correlation = transposed @ features + ridge * torch.eye(features.shape[-1]).to(features)
    products = transposed @ targets
    return torch.linalg.solve(correlation, products), products


def explained_variance(features: Tensor, num_own: int, ridge: float) -> Tensor:
    """R^2 of the ridge regression to the centred indicator t of the first `num_own` samples, differentiable.

        b^T (A + ridge I)^-1 b / var(t),  A = H^T H / N,  b = H^T t / N,  H the standardised features

    From 0, where the features say nothing of these samples, to 1. Shapes: features (..., samples, n) to (...).
    """
    is_own = torch.arange(features.shape[-2], device=features.device) < num_own
    target = is_own.expand(features.shape[:-1]).to(features)
    target = (target - target.mean(-1, keepdim=True))[..., None]
    coefficients, products = ridge_regression(*standardised(features), target, ridge)
    return (coefficients * products).sum((-2, -1)) / target.square().mean((-2, -1)).clamp_min(1e-12)


def ridge_recall(features: Tensor, labels: Tensor, num_classes: int, ridge: float) -> Tensor:
    """Percent of each class's samples that a regression from the features (samples, n) finds, (classes)."""
    (x,) = standardised(features)
    targets = F.one_hot(labels, num_classes).to(x)
    coefficients, _ = ridge_regression(x, targets - targets.mean(0), ridge)
    found = ((x @ coefficients + targets.mean(0)).argmax(1) == labels).cpu().double()
    return 100 * torch.stack([found[labels.cpu() == label].mean() for label in range(num_classes)])


class Erasure:
    """Asks of masks (`data.Auxiliary`) that no ridge regression tells a class from its rivals in the representation."""

    def __init__(self, config: ErasureConfig, graphs: GraphGenerator) -> None:
        self.config = config
        self.graphs = graphs
        self.weight = config.weight

    def draw_weight(self, generator: torch.Generator) -> float:
        low, high = self.config.trained
        return low + (high - low) * torch.rand((), generator=generator).item()

    @cached_property
    def with_rivals(self) -> Tensor:
        """Each class and the classes whose means of the standardised features are nearest, (classes, 1 + rivals)."""
        graphs = self.graphs
        with torch.no_grad():
            (x,) = standardised(graphs.classifier.features(graphs.inputs, graphs.graph.layers))
        means = torch.stack([x[graphs.labels == label].mean(0) for label in range(graphs.num_classes)])
        distances = torch.cdist(means, means).fill_diagonal_(-1)  # the class itself comes first
        return distances.topk(min(1 + self.config.rivals, graphs.num_classes), largest=False).indices

    def feature(self, samples: Tensor, classes: Sequence[int], mask: Mask | None = None) -> Tensor:
        """How much each weight carries a class into the representation: w dR^2/dw, the first-order fall of its R^2.

        samples: (all classes, group_size) to (classes, vertices), on the classifier or on a masked one
        """
        graphs, flat, layers = self.graphs, samples.flatten(), self.graphs.graph.layers
        positions = torch.arange(len(flat), device=flat.device).view(samples.shape)
        rows = positions[self.with_rivals[list(classes)]].flatten(
            1
        )  # (classes, samples of the class and of its rivals)
        with torch.enable_grad(), nullcontext() if mask is None else mask.applied_to(graphs.classifier):
            weights = graphs.weights()
            watched = graphs.classifier.watch(graphs.inputs[flat], layers, layers)
            features = watched.features
            chosen = features.detach()[rows].requires_grad_()
            carried = explained_variance(chosen, samples.shape[1], self.config.ridge)
            (gradients,) = torch.autograd.grad(carried.sum(), chosen)
        falls = torch.zeros(len(classes), graphs.graph.num_vertices, device=flat.device, dtype=features.dtype)
        if not features.requires_grad:  # of the output layer alone, which follows after the representation
            return falls
        own_layers = [graphs.classifier.layers[index] for index in layers]
        for fall, own, gradient in zip(falls, rows, gradients):
            upstream = torch.zeros_like(features).index_copy_(0, own, gradient)
            outputs = watched.pre_activations
            deltas = torch.autograd.grad(features, outputs, upstream, retain_graph=True, allow_unused=True)
            for layer, a, delta, weight, of_layer in zip(
                own_layers, watched.inputs, deltas, weights, graphs.graph.split(fall)
            ):
                if delta is not None:
                    torch.mul(weight, weight_gradient(layer, a[own], delta[own]), out=of_layer)
        return falls

    def loss(self, features: Tensor, classes: Sequence[int]) -> Tensor:
        """R^2 of each of `classes` under a mask of its own, mean over the classes.

        features: of the masked classifiers' representations, (classes, all classes, group_size, n)
        """
        own = [under_mask[self.with_rivals[label]].flatten(0, 1) for label, under_mask in zip(classes, features)]
        return explained_variance(torch.stack(own), features.shape[2], self.config.ridge).mean()

    @cached_property
    def pixel_recall(self) -> Tensor:
        """Percent of each class's training samples that a ridge regression finds in the pixels alone, (classes)."""
        train = self.graphs.train
        return ridge_recall(train.images, train.labels, self.graphs.num_classes, self.config.ridge)

    def recalls(self, model: nn.Module, forget_class: int) -> dict[str, float]:
        """Percent of the class found in the `representation`, on the samples of the graphs, and in the `pixels`."""
        seen = look_at(model, self.graphs.samples)
        recall = ridge_recall(seen.hidden[-1], seen.labels, self.graphs.num_classes, self.config.ridge)
        return {"representation": recall[forget_class].item(), "pixels": self.pixel_recall[forget_class].item()}

    def is_reached(self, mask: Mask, forget_class: int) -> bool:
        if self.config.target is None:
            return True
        with mask.applied_to(self.graphs.classifier):
            recalls = self.recalls(self.graphs.classifier, forget_class)
        return recalls["representation"] - recalls["pixels"] < self.config.target
