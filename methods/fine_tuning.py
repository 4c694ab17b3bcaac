"""Published ways to forget by training, each in its published form; the tables name what each needs."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimu.data import Count, NonNegative, Positive, Share, Split, mean_squared_gradient, seeded
from mimu.eval import Request
from mimu.methods.controls import further
from mimu.networks.hooked import HookedClassifier
from mimu.networks.masks import Mask
from mimu.trainer import check_finite, forgetting_loss, learn, masked_weights, other_labels


def joined(*splits: Split) -> Split:
    return Split(torch.cat([split.images for split in splits]), torch.cat([split.labels for split in splits]))


def random_part(split: Split, share: Share, generator: torch.Generator) -> Split:
    """A random share of the samples."""
    return next(split.batches(max(1, round(share * len(split.labels))), generator))


def with_random_labels(request: Request) -> Split:
    """The forget class's training samples, each labelled as a random other class."""
    forget, generator = request.forget, seeded("random labels", request.seed, request.forget_class)
    return Split(forget.images, other_labels(forget.labels, request.graphs.num_classes, generator))


def divergence(logits: Tensor, target: Tensor) -> Tensor:
    """KL(target || prediction) in nats, mean over the batch; both are logits (batch, classes)."""
    return F.kl_div(logits.log_softmax(1), target.log_softmax(1), reduction="batchmean", log_target=True)


def sgd(classifier: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(classifier.parameters(), learning_rate, momentum=0.9)


@further("fine_tune", paper="Golatkar et al. 2020, arXiv:1911.04933", needs="retain set")
def fine_tune(request: Request, *, epochs: Count, batch_size: Count, learning_rate: Positive) -> nn.Module:
    """Fine-tuning on the retain set alone (SGD with momentum): the class fades as it is no longer seen."""
    classifier, generator = request.classifier, seeded("fine_tune", request.seed, request.forget_class)
    return learn(classifier, request.retain, epochs, batch_size, sgd(classifier, learning_rate), generator)


@further("random_labels", paper="Graves et al. 2021, arXiv:2010.10981")
def random_labels(request: Request, *, epochs: Count, batch_size: Count, learning_rate: Positive) -> nn.Module:
    """Fine-tuning of the whole network (SGD with momentum) on the retain set and the relabelled forget set together."""
    classifier, generator = request.classifier, seeded("random_labels", request.seed, request.forget_class)
    samples = joined(request.retain, with_random_labels(request))
    return learn(classifier, samples, epochs, batch_size, sgd(classifier, learning_rate), generator)


@further("gradient_ascent", paper="Golatkar et al. 2020, arXiv:1911.04933", needs="forget set")
def gradient_ascent(request: Request, *, epochs: Count, batch_size: Count, learning_rate: Positive) -> nn.Module:
    """Negative gradient: ascent of the cross entropy on the forget set (SGD)."""
    classifier, generator = request.classifier, seeded("gradient_ascent", request.seed, request.forget_class)
    optimizer = torch.optim.SGD(classifier.parameters(), learning_rate, maximize=True)
    return learn(classifier, request.forget, epochs, batch_size, optimizer, generator)


@further("neg_grad_plus", paper="Kurmanji et al. 2023, arXiv:2302.09880")
def neg_grad_plus(
    request: Request, *, epochs: Count, batch_size: Count, learning_rate: Positive, retain_weight: Share
) -> nn.Module:
    """NegGrad+: descent on the retain set and ascent on the forget set in one loss, a L_retain - (1 - a) L_forget."""
    classifier, generator = request.classifier, seeded("neg_grad_plus", request.seed, request.forget_class)
    forget = request.forget.batches(batch_size, generator)

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        batch = next(forget)
        on_retain = F.cross_entropy(classifier(images), labels)
        on_forget = F.cross_entropy(classifier(batch.images), batch.labels)
        return retain_weight * on_retain - (1 - retain_weight) * on_forget

    return learn(classifier, request.retain, epochs, batch_size, sgd(classifier, learning_rate), generator, loss)


def fisher_information(classifier: HookedClassifier, split: Split) -> list[Tensor]:
    """The diagonal Fisher information E[(dL/dw)^2] of every weight, as of the matrix of its layer, (m, n) each."""
    layers = range(len(classifier.layers))
    means, at_once = [0.0 for _ in layers], classifier.recorded_at_once(layers)
    for images, labels in zip(split.images.split(at_once), split.labels.split(at_once)):
        record = classifier.record(images, labels, layers)
        share = len(labels) / len(split.labels)
        factor = (-record.log_odds).sigmoid().square()[None]  # (1 - p)^2, of the loss
        for index, layer in enumerate(record.layers):
            means[index] += share * mean_squared_gradient(layer.each(lambda x: x[None]), factor)[0]
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
    for layer, forget, everything in zip(classifier.layers, of_forget, of_all):
        factor = (dampening * everything / forget.clamp_min(1e-30)).clamp(max=1.0)
        layer.weight *= torch.where(forget > selection * everything, factor, 1.0).view_as(layer.weight)
    return classifier


@further("salun", paper="Fan et al. 2023, arXiv:2310.12508")
def salun(request: Request, *, epochs: Count, batch_size: Count, learning_rate: Positive, share: Share) -> nn.Module:
    """SalUn: fine-tuning with random labels of the share of weights alone that has the largest forget gradient."""
    classifier, generator = request.classifier, seeded("salun", request.seed, request.forget_class)
    at_once = classifier.recorded_at_once(())
    for images, labels in zip(request.forget.images.split(at_once), request.forget.labels.split(at_once)):
        (F.cross_entropy(classifier(images), labels) * len(labels) / len(request.forget.labels)).backward()
    saliency = torch.cat([parameter.grad.abs().flatten() for parameter in classifier.parameters()])
    threshold = saliency.sort(descending=True).values[round(share * (len(saliency) - 1))]
    trainable = [(parameter.grad.abs() >= threshold).float() for parameter in classifier.parameters()]
    samples, optimizer = joined(request.retain, with_random_labels(request)), sgd(classifier, learning_rate)
    return learn(classifier, samples, epochs, batch_size, optimizer, generator, trainable=trainable)


@further("scrub", paper="Kurmanji et al. 2023, arXiv:2302.09880")
def scrub(
    request: Request,
    *,
    epochs: Count,
    max_epochs: Count,
    batch_size: Count,
    learning_rate: Positive,
    divergence_weight: NonNegative,
    label_weight: NonNegative,
) -> nn.Module:
    """SCRUB: in turn away from the original on the forget set (in the first epochs) and towards it on the retain set.

    KL(original || student) is maximised on the forget set; on the retain set its weighted sum with the cross entropy is
    minimised (Adam). The temperature of both is 1.
    """
    classifier, generator = request.classifier, seeded("scrub", request.seed, request.forget_class)
    optimizer = torch.optim.Adam(classifier.parameters(), learning_rate)

    def apart(images: Tensor, labels: Tensor) -> Tensor:
        return -divergence(classifier(images), request.original(images).detach())

    def together(images: Tensor, labels: Tensor) -> Tensor:
        logits = classifier(images)
        from_original = divergence(logits, request.original(images).detach())
        return divergence_weight * from_original + label_weight * F.cross_entropy(logits, labels)

    forget, retain = request.forget, request.retain
    for epoch in range(epochs):
        if epoch < max_epochs:
            learn(classifier, forget, 1, batch_size, optimizer, generator, apart)
        learn(classifier, retain, 1, batch_size, optimizer, generator, together)
    return classifier


@further("bad_teacher", paper="Chundawat et al. 2022, arXiv:2205.08096")
def bad_teacher(
    request: Request, *, epochs: Count, batch_size: Count, learning_rate: Positive, retain_share: Share
) -> nn.Module:
    """Bad teaching: towards a random classifier on the forget set, the original on a part of the retain set (Adam)."""
    classifier, generator = request.classifier, seeded("bad_teacher", request.seed, request.forget_class)
    untrained = replace(request.trainer, seed=request.other_seed)
    random = untrained.initial(request.train.images, request.graphs.num_classes)

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        is_forget = labels == request.forget_class
        target = torch.where(is_forget[:, None], random(images), request.original(images)).detach()
        return divergence(classifier(images), target)

    samples = joined(random_part(request.retain, retain_share, generator), request.forget)
    optimizer = torch.optim.Adam(classifier.parameters(), learning_rate)
    return learn(classifier, samples, epochs, batch_size, optimizer, generator, loss)


@further("unsir", paper="Tarun et al. 2021, arXiv:2111.08947", needs="retain set")
def unsir(
    request: Request,
    *,
    noise_steps: Count,
    noise_rate: Positive,
    noise_penalty: NonNegative,
    batch_size: Count,
    noise_batches: Count,
    retain_share: Share,
    impair_rate: Positive,
    repair_rate: Positive,
) -> nn.Module:
    """UNSIR: an epoch on retain samples and on noise that maximises the class's loss (impair), one without it (repair).

    The noise is a batch of images labelled as the forget class, made by Adam on -L + penalty E[|noise|^2]; the two
    epochs use Adam.
    """
    classifier, generator = request.classifier, seeded("unsir", request.seed, request.forget_class)
    device = request.train.images.device
    noise = torch.randn(batch_size, request.train.images.shape[1], generator=generator).to(device).requires_grad_()
    labels = torch.full((batch_size,), request.forget_class, device=device)
    optimizer = torch.optim.Adam([noise], noise_rate)
    for step in range(noise_steps):
        loss = -F.cross_entropy(classifier(noise), labels) + noise_penalty * noise.square().sum(1).mean()
        check_finite({"loss of the noise": loss.item()}, step, "eval.hyperparameters.unsir")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    noisy = Split(noise.detach().repeat(noise_batches, 1), labels.repeat(noise_batches))
    retain = random_part(request.retain, retain_share, generator)
    for samples, learning_rate in ((joined(retain, noisy), impair_rate), (retain, repair_rate)):
        learn(classifier, samples, 1, batch_size, torch.optim.Adam(classifier.parameters(), learning_rate), generator)
    return classifier


@further("delete", paper="Zhou et al. 2025, arXiv:2503.23751", needs="forget set")
def delete(request: Request, *, epochs: Count, batch_size: Count, learning_rate: Positive) -> nn.Module:
    """DELETE: on the forget set, towards the original's predictions without the class (SGD with momentum).

    KL(softmax(z) || student), z the original's logits, that of the label -1e10 as in the published code.
    """
    classifier, generator = request.classifier, seeded("delete", request.seed, request.forget_class)

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        without_class = request.original(images).detach().scatter(1, labels[:, None], -1e10)
        return divergence(classifier(images), without_class)

    return learn(classifier, request.forget, epochs, batch_size, sgd(classifier, learning_rate), generator, loss)


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

    Backwards through the threshold as through a sigmoid. The loss is that of the masking GCN: without the class
    -log(1 - p(d)) on the forget set, the original's predictions without d on the retain set; plus the share of the
    weights that go, weighted by sparsity.
    """
    graphs, classifier, d = request.graphs, request.classifier, request.forget_class
    first, generator = graphs.graph.layers, seeded("optimised_mask", request.seed, d)
    with torch.no_grad():
        predictions = classifier(graphs.inputs, first)
    without_class = predictions.index_fill(1, torch.tensor([d], device=predictions.device), float("-inf")).softmax(1)
    numbers = torch.ones(graphs.graph.num_vertices, device=graphs.labels.device, requires_grad=True)
    optimizer = torch.optim.Adam([numbers], learning_rate)
    for step in range(steps):
        soft = numbers.sigmoid()
        keep = (numbers > 0).float() + soft - soft.detach()
        flat = graphs.draw(max(1, samples // graphs.num_classes), generator).flatten()
        weights = masked_weights(classifier, graphs.graph, keep[None])
        _, logits = classifier.outputs(graphs.inputs[flat], first, weights)
        log_p = logits[0].log_softmax(1)
        is_forget = graphs.labels[flat] == d
        forget = forgetting_loss(log_p[is_forget, d].exp())
        retain = -(without_class[flat] * log_p).sum(1)[~is_forget].mean()
        loss = forget_weight * forget + retain + sparsity * (1 - keep).mean()
        check_finite({"loss of the mask": loss.item()}, step, "eval.hyperparameters.optimised_mask")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return request.zeroing((numbers <= 0).nonzero()[:, 0])
