"""Published methods that train the classifier further, each in its published form."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from eval import Request, unlearning_method
from mimu.hooked import HookedClassifier, samples_that_fit
from mimu.masks import Mask
from mimu.samples import Split
from mimu.seeds import seeded
from mimu.settings import Count, NonNegative, Positive, Share
from mimu.training import descend, forgetting_loss, learn
from trainer import UnlearningSFTConfig, masked_weights, other_labels

MOMENTUM = partial(torch.optim.SGD, momentum=0.9)
baseline = partial(unlearning_method, runs_with="all")


@dataclass(frozen=True)
class FineTuning(UnlearningSFTConfig):
    """The length and the learning rate of a training that starts from the original."""

    def train(
        self, model: nn.Module, samples: Split, generator: Generator, loss: Callable | None = None, optimizer=MOMENTUM
    ) -> nn.Module:
        """Trains a model in place on random batches of the samples, as `learn` does, and returns it."""
        steps = optimizer(model.parameters(), self.learning_rate)
        return learn(model, samples, self.epochs, self.batch_size, optimizer=steps, generator=generator, loss=loss)


def draws(request: Request, name: str) -> Generator:
    """Returns the random generator of a method for a request."""
    return seeded(name, request.seed, request.forget_class)


def divergence(logits: Tensor, target: Tensor) -> Tensor:
    """Returns KL(target || prediction) in nats, averaged over the batch; both are logits (batch, classes)."""
    return F.kl_div(logits.log_softmax(1), target.log_softmax(1), reduction="batchmean", log_target=True)


@baseline("fine_tune", paper="Golatkar et al. 2020, arXiv:1911.04933", needs="retain set")
def fine_tune(request: Request, *, config: FineTuning) -> nn.Module:
    """Fine-tuning on the retain set alone (SGD with momentum): the class fades because it is no longer seen."""
    return config.train(request.classifier, request.retain, draws(request, "fine_tune"))


@baseline("neg_grad_plus", paper="Kurmanji et al. 2023, arXiv:2302.09880")
def neg_grad_plus(request: Request, *, config: FineTuning, retain_weight: Share) -> nn.Module:
    """NegGrad+: descent on the retain set and ascent on the forget set in one loss, a L_retain - (1 - a) L_forget."""
    classifier, generator = request.classifier, draws(request, "neg_grad_plus")
    forget_batches = request.forget.batches(config.batch_size, generator)

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        forget = next(forget_batches)
        on_retain = F.cross_entropy(classifier(images), labels)
        on_forget = F.cross_entropy(classifier(forget.images), forget.labels)
        return retain_weight * on_retain - (1 - retain_weight) * on_forget

    return config.train(classifier, request.retain, generator, loss)


def fisher_information(classifier: HookedClassifier, split: Split) -> list[Tensor]:
    """Returns the diagonal Fisher information E[(dL/dw)^2] of every layer's weights, (m, n) each; L: cross entropy."""
    layers = range(len(classifier.names))
    means = [0.0 for _ in layers]
    # For a weight that is read at several positions, the gradient of every sample is formed.
    sizes = [weight.numel() for weight, layer in zip(classifier.weights, classifier.layers) if layer.positions]
    at_once = min(classifier.recorded_at_once(layers), samples_that_fit(max(sizes, default=0)))
    for images, labels in zip(split.images.split(at_once), split.labels.split(at_once)):
        record = classifier.record(images, labels, layers)
        factor = (-record.log_odds).sigmoid().square() / len(split.labels)  # (dL / d log-odds)^2 = (1 - p)^2
        squares = [layer.squared_gradient(factor).flatten(0, 1) for layer in record.layers]
        means = [mean + square for mean, square in zip(means, squares)]
    return means


@baseline("ssd", paper="Foster et al. 2023, arXiv:2308.07707")
@torch.no_grad()
def ssd(request: Request, *, selection: NonNegative, dampening: NonNegative) -> nn.Module:
    """Selective synaptic dampening: weights with F_forget > selection F_all shrink by dampening F_all / F_forget.

    F is the diagonal Fisher information on the forget set and on the whole training split; no weight grows.
    """
    classifier = request.classifier
    if "fisher information" not in request.kept:
        request.kept["fisher information"] = fisher_information(classifier, request.train)
    on_forget, on_all = fisher_information(classifier, request.forget), request.kept["fisher information"]
    for weight, f_forget, f_all in zip(classifier.weights, on_forget, on_all):
        factor = (dampening * f_all / f_forget.clamp_min(1e-30)).clamp(max=1.0)
        weight *= torch.where(f_forget > selection * f_all, factor, 1.0).view_as(weight)
    return classifier


@baseline("salun", paper="Fan et al. 2023, arXiv:2310.12508")
def salun(request: Request, *, config: FineTuning, share: Share) -> nn.Module:
    """SalUn: fine-tuning with random labels for the class, only of the weights whose loss gradient on the forget set is
    largest (SGD with momentum).

    share: the fraction of the weights that are trained
    """
    classifier, forget, retain = request.classifier, request.forget, request.retain
    at_once = classifier.recorded_at_once(())
    for images, labels in zip(forget.images.split(at_once), forget.labels.split(at_once)):
        (F.cross_entropy(classifier(images), labels) * len(labels) / len(forget.labels)).backward()
    gradients = [parameter.grad.abs() for parameter in classifier.parameters()]
    descending = torch.cat([gradient.flatten() for gradient in gradients]).sort(descending=True).values
    threshold = descending[round(share * (len(descending) - 1))]
    for parameter, gradient in zip(classifier.parameters(), gradients):
        parameter.register_hook((gradient >= threshold).float().mul)  # masks every later gradient
    labels = other_labels(forget.labels, request.graphs.num_classes, draws(request, "random labels"))
    samples = Split(torch.cat([retain.images, forget.images]), torch.cat([retain.labels, labels]))
    return config.train(classifier, samples, draws(request, "salun"))


@dataclass(frozen=True)
class Scrub(FineTuning):
    """The epochs on the forget set, and the weights of the two terms on the retain set."""

    max_epochs: Count
    divergence_weight: NonNegative
    label_weight: NonNegative


@baseline("scrub", paper="Kurmanji et al. 2023, arXiv:2302.09880")
def scrub(request: Request, *, config: Scrub) -> nn.Module:
    """SCRUB: epochs that move away from the original on the forget set alternate with epochs towards it on the retain
    set (Adam).

    The first `max_epochs` maximise KL(original || student) on the forget set. All minimise its weighted sum with the
    cross entropy on the retain set.
    """
    classifier, generator = request.classifier, draws(request, "scrub")
    optimizer = torch.optim.Adam(classifier.parameters(), config.learning_rate)

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        logits = classifier(images)
        from_original = divergence(logits, request.original(images).detach())
        if labels[0] == request.forget_class:
            return -from_original
        return config.divergence_weight * from_original + config.label_weight * F.cross_entropy(logits, labels)

    for epoch in range(config.epochs):
        if epoch < config.max_epochs:
            learn(classifier, request.forget, 1, config.batch_size, optimizer, generator, loss)
        learn(classifier, request.retain, 1, config.batch_size, optimizer, generator, loss)
    return classifier


def contrastive_loss(features: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Returns the mean supervised contrastive loss of features (samples, n): Khosla et al. 2020, arXiv:2004.11362,
    equation 2."""
    z = F.normalize(features)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    log_p = (z @ z.T / temperature).masked_fill(itself, float("-inf")).log_softmax(1)
    is_alike = (labels[:, None] == labels) & ~itself
    return -(log_p.where(is_alike, 0.0).sum(1) / is_alike.sum(1).clamp_min(1)).mean()


@baseline("cola", paper="Jeon et al. 2024, arXiv:2405.17878", needs="retain set")
def cola(request: Request, *, config: FineTuning, temperature: Positive, align_epochs: Count) -> nn.Module:
    """COLA: on the retain set, first the supervised contrastive loss of the representation, then cross entropy (Adam).

    The first phase (collapse) never sees the class, which falls into the clusters of the retained classes. The second
    (align) trains all layers. Written from summaries of the paper, not from its text.
    """
    classifier, generator = request.classifier, draws(request, "cola")

    def collapse(images: Tensor, labels: Tensor) -> Tensor:
        return contrastive_loss(classifier.outputs(images)[0], labels, temperature)

    config.train(classifier, request.retain, generator, collapse, torch.optim.Adam)
    align = replace(config, epochs=align_epochs)
    return align.train(classifier, request.retain, generator, optimizer=torch.optim.Adam)


@baseline("eu_k", paper="Goel et al. 2022, arXiv:2201.06640", touches="the last layers", needs="retain set")
def eu_k(request: Request, *, config: FineTuning, layers: Count) -> nn.Module:
    """EU-k: the last k layers are trained on the retain set from their initial weights; all else stays (Adam)."""
    classifier = request.trainer.initial(request.train.images, request.graphs.num_classes)
    trace, network = classifier.trace, classifier.network
    first = [*trace.called][-layers:][0]
    suffix = {*trace.nodes[trace.nodes.index(first) :]}
    trained = {name for weight, name in trace.parameters.items() if not suffix.isdisjoint(weight.users)}
    kept = {name: x for name, x in request.original.network.state_dict().items() if name not in trained}
    network.load_state_dict(kept, strict=False)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in trained)
    config.train(classifier, request.retain, draws(request, "eu_k"), optimizer=torch.optim.Adam)
    network.load_state_dict(kept, strict=False)  # training changed the statistics of batch normalisation
    return classifier.requires_grad_(True)


@baseline("delete", paper="Zhou et al. 2025, arXiv:2503.23751", needs="forget set")
def delete(request: Request, *, config: FineTuning) -> nn.Module:
    """DELETE: on the forget set, towards the original's predictions without the class (SGD with momentum).

    The loss is KL(softmax(z) || student), z the original's logits with -1e10 for the label, as in the published code.
    """
    classifier = request.classifier

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        without_class = request.original(images).detach().scatter(1, labels[:, None], -1e10)
        return divergence(classifier(images), without_class)

    return config.train(classifier, request.forget, draws(request, "delete"), loss)


@baseline("optimised_mask", paper="after Mallya et al. 2018, arXiv:1801.06519", touches="a mask")
def optimised_mask(
    request: Request,
    *,
    steps: Count,
    samples: Count,
    learning_rate: Positive,
    forget_weight: NonNegative,
    sparsity: NonNegative,
) -> Mask:
    """An optimised mask: one real number per weight of the same layers is trained for this class alone, and weights
    whose number falls to 0 or below are zeroed (Adam).

    The gradient passes the threshold as if it were a sigmoid. The loss has the terms of the masking GCN, and the
    fraction of zeroed weights, weighted by `sparsity`.
    """
    graphs, forget_class, generator = request.graphs, request.forget_class, draws(request, "optimised_mask")
    removed = torch.tensor([forget_class]).to(graphs.labels)
    without_class = graphs.predictions.index_fill(1, removed, float("-inf")).softmax(1)
    numbers = torch.ones(graphs.graph.num_vertices, device=graphs.labels.device, requires_grad=True)
    optimizer = torch.optim.Adam([numbers], learning_rate)
    for step in range(steps):
        soft = numbers.sigmoid()
        keep = (numbers > 0).float() + soft - soft.detach()
        batch = graphs.draw(max(1, samples // graphs.num_classes), generator).flatten()
        weights = masked_weights(request.original, graphs.graph, keep)
        log_p = graphs.suffix.outputs(graphs.cached_inputs[batch], weights)[1].log_softmax(1)
        is_forget = graphs.labels[batch] == forget_class
        forget = forgetting_loss(log_p[is_forget, forget_class].exp())
        retain = -(without_class[batch] * log_p).sum(1)[~is_forget].mean()
        loss = forget_weight * forget + retain + sparsity * (1 - keep).mean()
        descend(optimizer, {"loss": loss}, step, "eval.hyperparameters.optimised_mask")
    return graphs.graph.zeroing((numbers <= 0).nonzero()[:, 0])
