"""Published ways to forget by training, each in its published form; the tables name what each needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eval import Request
from methods.controls import further
from mimu.layers import by_weight, class_by_class, mean_squared_gradient
from mimu.masks import Mask
from mimu.pruning import forgetting_loss
from mimu.samples import Split
from mimu.seeds import seeded
from mimu.settings import Count, NonNegative, Positive, Share
from mimu.tracing import NUMBERS_AT_ONCE, HookedClassifier
from mimu.training import descend, learn
from trainer import UnlearningSFTConfig, masked_weights, other_labels

MOMENTUM = partial(torch.optim.SGD, momentum=0.9)


@dataclass(frozen=True)
class FineTuning(UnlearningSFTConfig):
    """How long and how fast a classifier is trained further."""

    def train(
        self, model: nn.Module, samples: Split, generator: torch.Generator, by: Callable = MOMENTUM, **given: Any
    ) -> nn.Module:
        """Trains a model by `learn` with what is given; by: makes the optimizer of parameters and a rate."""
        given = {"optimizer": by(model.parameters(), self.learning_rate), "generator": generator} | given
        return learn(model, samples, self.epochs, self.batch_size, **given)


def draws(request: Request, name: str) -> torch.Generator:
    """The random draws of a method."""
    return seeded(name, request.seed, request.forget_class)


def divergence(logits: Tensor, target: Tensor) -> Tensor:
    """KL(target || prediction) in nats, mean over the batch; both are logits (batch, classes)."""
    return F.kl_div(logits.log_softmax(1), target.log_softmax(1), reduction="batchmean", log_target=True)


@further("fine_tune", paper="Golatkar et al. 2020, arXiv:1911.04933", needs="retain set")
def fine_tune(request: Request, *, config: FineTuning) -> nn.Module:
    """Fine-tuning on the retain set alone (SGD with momentum): the class fades as it is no longer seen."""
    return config.train(request.classifier, request.retain, draws(request, "fine_tune"))


@further("neg_grad_plus", paper="Kurmanji et al. 2023, arXiv:2302.09880")
def neg_grad_plus(request: Request, *, config: FineTuning, retain_weight: Share) -> nn.Module:
    """NegGrad+: descent on the retain set and ascent on the forget set in one loss, a L_retain - (1 - a) L_forget."""
    classifier = request.classifier
    generator = draws(request, "neg_grad_plus")
    forget = request.forget.batches(config.batch_size, generator)

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        batch = next(forget)
        on_retain = F.cross_entropy(classifier(images), labels)
        on_forget = F.cross_entropy(classifier(batch.images), batch.labels)
        return retain_weight * on_retain - (1 - retain_weight) * on_forget

    return config.train(classifier, request.retain, generator, loss=loss)


def fisher_information(classifier: HookedClassifier, split: Split) -> list[Tensor]:
    """The diagonal Fisher information E[(dL/dw)^2] of every weight, as of the matrix of its layer, (m, n) each."""
    layers = range(len(classifier.names))
    means = [0.0 for _ in layers]
    sizes = [weight.numel() for layer, weight in enumerate(classifier.weights) if classifier.positions(layer)]
    fit = NUMBERS_AT_ONCE // max(sizes, default=1)  # the gradient of every sample by a weight that sums positions
    at_once = min(classifier.recorded_at_once(layers), max(1, fit))
    for images, labels in zip(split.images.split(at_once), split.labels.split(at_once)):
        record = classifier.record(images, labels, layers)
        share = len(labels) / len(split.labels)
        factor = (-record.log_odds).sigmoid().square()[None]  # (1 - p)^2, of the loss
        for index, layer in enumerate(record.layers):
            mean = mean_squared_gradient(by_weight(layer.each(lambda x: class_by_class(x, 1))), factor)
            means[index] += share * mean.flatten(0, 1)
    return means


@further("ssd", paper="Foster et al. 2023, arXiv:2308.07707")
@torch.no_grad()
def ssd(request: Request, *, selection: NonNegative, dampening: NonNegative) -> nn.Module:
    """Selective synaptic dampening: weights with F_forget > selection F_all shrink by dampening F_all / F_forget.

    F is the diagonal Fisher information on the forget set and on the whole training split; no weight grows.
    """
    classifier = request.classifier
    of_forget = fisher_information(classifier, request.forget)
    if "fisher information" not in request.kept:
        request.kept["fisher information"] = fisher_information(classifier, request.train)
    of_all = request.kept["fisher information"]
    for weight, forget, everything in zip(classifier.weights, of_forget, of_all):
        factor = (dampening * everything / forget.clamp_min(1e-30)).clamp(max=1.0)
        weight *= torch.where(forget > selection * everything, factor, 1.0).view_as(weight)
    return classifier


@further("salun", paper="Fan et al. 2023, arXiv:2310.12508")
def salun(request: Request, *, config: FineTuning, share: Share) -> nn.Module:
    """SalUn: fine-tuning with random labels of the share of weights alone that has the largest forget gradient."""
    classifier, forget, retain = request.classifier, request.forget, request.retain
    at_once = classifier.recorded_at_once(())
    for images, labels in zip(forget.images.split(at_once), forget.labels.split(at_once)):
        (F.cross_entropy(classifier(images), labels) * len(labels) / len(forget.labels)).backward()
    saliency = [parameter.grad.abs() for parameter in classifier.parameters()]
    largest = torch.cat([each.flatten() for each in saliency]).sort(descending=True).values
    threshold = largest[round(share * (len(largest) - 1))]
    for parameter, each in zip(classifier.parameters(), saliency):
        parameter.register_hook((each >= threshold).float().mul)  # of its gradient
    labels = other_labels(forget.labels, request.graphs.num_classes, draws(request, "random labels"))
    samples = Split(torch.cat([retain.images, forget.images]), torch.cat([retain.labels, labels]))
    return config.train(classifier, samples, draws(request, "salun"))


@further("scrub", paper="Kurmanji et al. 2023, arXiv:2302.09880")
def scrub(
    request: Request,
    *,
    config: FineTuning,
    max_epochs: Count,
    divergence_weight: NonNegative,
    label_weight: NonNegative,
) -> nn.Module:
    """SCRUB: in turn away from the original on the forget set (in the first epochs) and towards it on the retain set.

    KL(original || student) is maximised there, its weighted sum with the cross entropy minimised here (Adam).
    """
    classifier = request.classifier
    generator = draws(request, "scrub")
    optimizer = torch.optim.Adam(classifier.parameters(), config.learning_rate)
    train_once = replace(config, epochs=1).train

    def apart(images: Tensor, labels: Tensor) -> Tensor:
        return -divergence(classifier(images), request.original(images).detach())

    def together(images: Tensor, labels: Tensor) -> Tensor:
        logits = classifier(images)
        from_original = divergence(logits, request.original(images).detach())
        return divergence_weight * from_original + label_weight * F.cross_entropy(logits, labels)

    for epoch in range(config.epochs):
        if epoch < max_epochs:
            train_once(classifier, request.forget, generator, loss=apart, optimizer=optimizer)
        train_once(classifier, request.retain, generator, loss=together, optimizer=optimizer)
    return classifier


def contrastive_loss(features: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Supervised contrastive loss of features (samples, n), mean: Khosla et al. 2020, arXiv:2004.11362, equation 2."""
    z = F.normalize(features)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    log_p = (z @ z.T / temperature).masked_fill(itself, float("-inf")).log_softmax(1)
    is_alike = (labels[:, None] == labels) & ~itself
    return -(log_p.where(is_alike, 0.0).sum(1) / is_alike.sum(1).clamp_min(1)).mean()


@further("cola", paper="Jeon et al. 2024, arXiv:2405.17878", needs="retain set")
def cola(request: Request, *, config: FineTuning, temperature: Positive, align_epochs: Count) -> nn.Module:
    """COLA: on the retain set, first the supervised contrastive loss of the representation, then cross entropy (Adam).

    By the first (collapse) the class, which it does not see, falls into the clusters of the others; the second (align)
    trains the output layer and all before it. After summaries of the paper, not its text.
    """
    classifier = request.classifier
    generator = draws(request, "cola")

    def collapse(images: Tensor, labels: Tensor) -> Tensor:
        return contrastive_loss(classifier.outputs(images)[0], labels, temperature)

    config.train(classifier, request.retain, generator, torch.optim.Adam, loss=collapse)
    return replace(config, epochs=align_epochs).train(classifier, request.retain, generator, torch.optim.Adam)


@further("eu_k", paper="Goel et al. 2022, arXiv:2201.06640", touches="the last layers", needs="retain set")
def eu_k(request: Request, *, config: FineTuning, layers: Count) -> nn.Module:
    """EU-k: the last k layers are trained on the retain set from their initial weights, all else stays (Adam)."""
    classifier = request.trainer.initial(request.train.images, request.graphs.num_classes)
    trace, network = classifier.trace, classifier.network
    first = [*trace.called][-layers:][0]
    behind = {*trace.nodes[trace.nodes.index(first) :]}
    read = {name for weight, name in trace.parameters.items() if not behind.isdisjoint(weight.users)}
    kept = {name: x for name, x in request.original.network.state_dict().items() if name not in read}
    network.load_state_dict(kept, strict=False)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in read)
    config.train(classifier, request.retain, draws(request, "eu_k"), torch.optim.Adam)
    network.load_state_dict(kept, strict=False)  # means and variances of batch normalisation
    return classifier.requires_grad_(True)


@further("delete", paper="Zhou et al. 2025, arXiv:2503.23751", needs="forget set")
def delete(request: Request, *, config: FineTuning) -> nn.Module:
    """DELETE: on the forget set, towards the original's predictions without the class (SGD with momentum).

    KL(softmax(z) || student), z the original's logits, that of the label -1e10 as in the published code.
    """
    classifier = request.classifier

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        without_class = request.original(images).detach().scatter(1, labels[:, None], -1e10)
        return divergence(classifier(images), without_class)

    return config.train(classifier, request.forget, draws(request, "delete"), loss=loss)


@further("optimised_mask", paper="after Mallya et al. 2018, arXiv:1801.06519", touches="a mask")
def optimised_mask(
    request: Request,
    *,
    steps: Count,
    samples: Count,
    learning_rate: Positive,
    forget_weight: NonNegative,
    sparsity: NonNegative,
) -> Mask:
    """A mask of the same layers trained for this class alone: Adam on a real number per weight, kept where above 0.

    Backwards through the threshold as through a sigmoid. The loss has the terms of the masking GCN's, and the share of
    the weights that go, weighted by sparsity.
    """
    graphs, d = request.graphs, request.forget_class
    generator = draws(request, "optimised_mask")
    without_class = graphs.predictions.index_fill(1, torch.tensor([d]).to(graphs.labels), float("-inf")).softmax(1)
    numbers = torch.ones(graphs.graph.num_vertices, device=graphs.labels.device, requires_grad=True)
    optimizer = torch.optim.Adam([numbers], learning_rate)
    for step in range(steps):
        soft = numbers.sigmoid()
        keep = (numbers > 0).float() + soft - soft.detach()
        flat = graphs.draw(max(1, samples // graphs.num_classes), generator).flatten()
        weights = masked_weights(request.original, graphs.graph, keep)
        _, logits = graphs.suffix.outputs(graphs.cached_inputs[flat], weights)
        log_p = logits.log_softmax(1)
        is_forget = graphs.labels[flat] == d
        forget = forgetting_loss(log_p[is_forget, d].exp())
        retain = -(without_class[flat] * log_p).sum(1)[~is_forget].mean()
        loss = forget_weight * forget + retain + sparsity * (1 - keep).mean()
        descend(optimizer, {"loss": loss}, step, "eval.hyperparameters.optimised_mask")
    return graphs.graph.zeroing((numbers <= 0).nonzero()[:, 0])
