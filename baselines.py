"""Published ways to forget a class by training, each in its published form; the tables name what each needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import Split, seeded, seeded_initialisation
from methods import Positive, Request, Share, unlearning_method
from model import HookedMNISTClassifier
from trainer import check_finite, forgetting_loss, masked_outputs, other_labels

Batch = tuple[Tensor, Tensor]  # images (batch, 784), labels (batch)


def shuffled(split: Split, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
    """The samples once, in random batches."""
    order = torch.randperm(len(split.labels), generator=generator).to(split.labels.device)
    for batch in order.split(batch_size):
        yield split.images.index_select(0, batch), split.labels[batch]


def endlessly(split: Split, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
    """The samples again and again, in random batches, anew each time."""
    while True:
        yield from shuffled(split, batch_size, generator)


def joined(*splits: Split) -> Split:
    return Split(torch.cat([split.images for split in splits]), torch.cat([split.labels for split in splits]))


def random_part(split: Split, share: Share, generator: torch.Generator) -> Split:
    """A random share of the samples."""
    kept = torch.randperm(len(split.labels), generator=generator)[: round(share * len(split.labels))]
    kept = kept.to(split.labels.device)
    return Split(split.images.index_select(0, kept), split.labels[kept])


def with_random_labels(request: Request) -> Split:
    """The forget class's training samples, each labelled as a random other class."""
    generator = seeded("random labels", request.seed, request.forget_class)
    labels = other_labels(request.forget.labels, request.graphs.num_classes, generator)
    return Split(request.forget.images, labels)


def generator_of(name: str, request: Request) -> torch.Generator:
    """The generator of a method's batches."""
    return seeded(name, request.seed, request.forget_class)


def minimise(
    loss: Callable[[Tensor, Tensor], Tensor],
    batches: Iterable[Batch],
    classifier: nn.Module,
    optimizer: torch.optim.Optimizer,
    trainable: list[Tensor] | None = None,
) -> None:
    """A step of the optimizer on the loss of every batch.

    trainable: for every parameter of the classifier, 1 where it may change and 0 where not; None: everywhere
    Raises TrainingError on a loss that is not a finite number.
    """
    for step, (images, labels) in enumerate(batches):
        optimizer.zero_grad()
        value = loss(images, labels)
        check_finite({"loss": value.item()}, step, "eval.hyperparameters")
        value.backward()
        if trainable is not None:
            for parameter, mask in zip(classifier.parameters(), trainable):
                parameter.grad *= mask
        optimizer.step()


def learn(
    classifier: nn.Module,
    samples: Split,
    epochs: int,
    batch_size: int,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    trainable: list[Tensor] | None = None,
) -> nn.Module:
    """Trains the classifier on the labels of the samples (cross entropy), and returns it."""

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(classifier(images), labels)

    for _ in range(epochs):
        minimise(loss, shuffled(samples, batch_size, generator), classifier, optimizer, trainable)
    return classifier


def sgd(classifier: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(classifier.parameters(), learning_rate, momentum=0.9)


def divergence(logits: Tensor, target: Tensor) -> Tensor:
    """KL(target || prediction) in nats, mean over the batch; both are logits (batch, classes)."""
    return F.kl_div(logits.log_softmax(1), target.log_softmax(1), reduction="batchmean", log_target=True)


@unlearning_method(
    "fine_tune", paper="Golatkar et al. 2020, arXiv:1911.04933", needs="retain set", in_default_run=False
)
def fine_tune(request: Request, *, epochs: int, batch_size: int, learning_rate: Positive) -> nn.Module:
    """Fine-tuning on the retain set alone (SGD with momentum): the class fades as it is no longer seen."""
    classifier, generator = request.classifier, generator_of("fine_tune", request)
    return learn(classifier, request.retain, epochs, batch_size, sgd(classifier, learning_rate), generator)


@unlearning_method("random_labels", paper="Graves et al. 2021, arXiv:2010.10981", in_default_run=False)
def random_labels(request: Request, *, epochs: int, batch_size: int, learning_rate: Positive) -> nn.Module:
    """Fine-tuning of the whole network (SGD with momentum) on the retain set and the relabelled forget set together."""
    classifier, generator = request.classifier, generator_of("random_labels", request)
    samples = joined(request.retain, with_random_labels(request))
    return learn(classifier, samples, epochs, batch_size, sgd(classifier, learning_rate), generator)


@unlearning_method(
    "gradient_ascent", paper="Golatkar et al. 2020, arXiv:1911.04933", needs="forget set", in_default_run=False
)
def gradient_ascent(request: Request, *, epochs: int, batch_size: int, learning_rate: Positive) -> nn.Module:
    """Negative gradient: ascent of the cross entropy on the forget set (SGD)."""
    classifier, generator = request.classifier, generator_of("gradient_ascent", request)
    optimizer = torch.optim.SGD(classifier.parameters(), learning_rate)
    for _ in range(epochs):
        batches = shuffled(request.forget, batch_size, generator)
        minimise(lambda images, labels: -F.cross_entropy(classifier(images), labels), batches, classifier, optimizer)
    return classifier


@unlearning_method("neg_grad_plus", paper="Kurmanji et al. 2023, arXiv:2302.09880", in_default_run=False)
def neg_grad_plus(
    request: Request, *, epochs: int, batch_size: int, learning_rate: Positive, retain_weight: Share
) -> nn.Module:
    """NegGrad+: descent on the retain set and ascent on the forget set in one loss, a L_retain - (1 - a) L_forget."""
    classifier, generator = request.classifier, generator_of("neg_grad_plus", request)
    forget = endlessly(request.forget, batch_size, generator)

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        forget_images, forget_labels = next(forget)
        on_retain = F.cross_entropy(classifier(images), labels)
        on_forget = F.cross_entropy(classifier(forget_images), forget_labels)
        return retain_weight * on_retain - (1 - retain_weight) * on_forget

    optimizer = sgd(classifier, learning_rate)
    for _ in range(epochs):
        minimise(loss, shuffled(request.retain, batch_size, generator), classifier, optimizer)
    return classifier


def fisher_information(classifier: HookedMNISTClassifier, split: Split) -> list[Tensor]:
    """The diagonal Fisher information E[(dL/dw)^2] of every weight matrix, (m, n) each.

    The gradient of a sample is delta a^T: its squares summed over samples are one product, (delta^2)^T a^2.
    """
    totals = [torch.zeros(shape, device=split.images.device) for shape in classifier.shapes]
    layers = range(len(classifier.layers))
    for images, labels in zip(split.images.split(10_000), split.labels.split(10_000)):
        records, _ = classifier.record(images, labels, layers)
        for total, record in zip(totals, records):
            total += (record.loss_gradient**2).T @ record.inputs**2
    return [total / len(split.labels) for total in totals]


@unlearning_method("ssd", paper="Foster et al. 2023, arXiv:2308.07707", in_default_run=False)
@torch.no_grad()
def ssd(request: Request, *, selection: float, dampening: float) -> nn.Module:
    """Selective synaptic dampening: weights with F_forget > selection F_all shrink by dampening F_all / F_forget.

    F is the diagonal Fisher information on the forget set and on the whole training split; no weight grows.
    """
    classifier = request.classifier
    of_forget = fisher_information(classifier, request.forget)
    of_all = fisher_information(classifier, request.train)
    for layer, forget, everything in zip(classifier.layers, of_forget, of_all):
        factor = (dampening * everything / forget.clamp_min(1e-30)).clamp(max=1.0)
        layer.weight *= torch.where(forget > selection * everything, factor, 1.0)
    return classifier


@unlearning_method("salun", paper="Fan et al. 2023, arXiv:2310.12508", in_default_run=False)
def salun(request: Request, *, epochs: int, batch_size: int, learning_rate: Positive, share: Share) -> nn.Module:
    """SalUn: random labels as above, but only the share of weights with the largest forget gradient may change."""
    classifier, generator = request.classifier, generator_of("salun", request)
    F.cross_entropy(classifier(request.forget.images), request.forget.labels).backward()
    saliency = torch.cat([parameter.grad.abs().flatten() for parameter in classifier.parameters()])
    threshold = saliency.sort(descending=True).values[round(share * (len(saliency) - 1))]
    trainable = [(parameter.grad.abs() >= threshold).float() for parameter in classifier.parameters()]
    samples = joined(request.retain, with_random_labels(request))
    return learn(classifier, samples, epochs, batch_size, sgd(classifier, learning_rate), generator, trainable)


@unlearning_method("scrub", paper="Kurmanji et al. 2023, arXiv:2302.09880", in_default_run=False)
def scrub(
    request: Request,
    *,
    epochs: int,
    max_epochs: int,
    batch_size: int,
    learning_rate: Positive,
    divergence_weight: float,
    label_weight: float,
) -> nn.Module:
    """SCRUB: in turn away from the original on the forget set (in the first epochs) and towards it on the retain set.

    KL(original || student) is maximised on the forget set; on the retain set its weighted sum with the cross entropy is
    minimised (Adam). The temperature of both is 1.
    """
    classifier, teacher, generator = request.classifier, request.classifier, generator_of("scrub", request)
    optimizer = torch.optim.Adam(classifier.parameters(), learning_rate)

    def apart(images: Tensor, labels: Tensor) -> Tensor:
        return -divergence(classifier(images), teacher(images).detach())

    def together(images: Tensor, labels: Tensor) -> Tensor:
        logits = classifier(images)
        from_teacher = divergence(logits, teacher(images).detach())
        return divergence_weight * from_teacher + label_weight * F.cross_entropy(logits, labels)

    for epoch in range(epochs):
        if epoch < max_epochs:
            minimise(apart, shuffled(request.forget, batch_size, generator), classifier, optimizer)
        minimise(together, shuffled(request.retain, batch_size, generator), classifier, optimizer)
    return classifier


def random_teacher(request: Request) -> HookedMNISTClassifier:
    """A classifier of the same shape that was never trained, from other initial weights than the original's."""
    config, in_features = request.trainer.config, request.train.images.shape[1]
    with seeded_initialisation(request.other_seed):
        teacher = HookedMNISTClassifier(config.hidden_sizes, in_features, request.graphs.num_classes, config.bias)
    return teacher.to(request.train.images.device)


@unlearning_method("bad_teacher", paper="Chundawat et al. 2022, arXiv:2205.08096", in_default_run=False)
def bad_teacher(
    request: Request, *, epochs: int, batch_size: int, learning_rate: Positive, retain_share: Share
) -> nn.Module:
    """Bad teaching: towards a random classifier on the forget set, the original on a part of the retain set (Adam)."""
    classifier, good, bad = request.classifier, request.classifier, random_teacher(request)
    generator = generator_of("bad_teacher", request)

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        is_forget = labels == request.forget_class
        target = torch.where(is_forget[:, None], bad(images), good(images)).detach()
        return divergence(classifier(images), target)

    samples = joined(random_part(request.retain, retain_share, generator), request.forget)
    optimizer = torch.optim.Adam(classifier.parameters(), learning_rate)
    for _ in range(epochs):
        minimise(loss, shuffled(samples, batch_size, generator), classifier, optimizer)
    return classifier


@unlearning_method("unsir", paper="Tarun et al. 2021, arXiv:2111.08947", needs="retain set", in_default_run=False)
def unsir(
    request: Request,
    *,
    noise_steps: int,
    noise_rate: Positive,
    noise_penalty: float,
    batch_size: int,
    noise_batches: int,
    retain_share: Share,
    impair_rate: Positive,
    repair_rate: Positive,
) -> nn.Module:
    """UNSIR: an epoch on retain samples and on noise that maximises the class's loss (impair), one without it (repair).

    The noise is a batch of images labelled as the forget class, made by Adam on -L + penalty E[|noise|^2]; the two
    epochs use Adam.
    """
    classifier, generator = request.classifier, generator_of("unsir", request)
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


@unlearning_method(
    "optimised_mask", paper="after Mallya et al. 2018, arXiv:1801.06519", touches="a mask", in_default_run=False
)
def optimised_mask(
    request: Request,
    *,
    steps: int,
    samples: int,
    learning_rate: Positive,
    forget_weight: float,
    sparsity: float,
    erasure_weight: float,
) -> nn.Module:
    """A mask of the same layers trained for this class alone: Adam on a real number per weight, kept where above 0.

    Backwards through the threshold as through a sigmoid. The loss is that of the masking GCN: without the class
    -log(1 - p(d)) on the forget set, the original's predictions without d on the retain set, and where erasure is asked
    for, R^2 of the class in the representation; plus the kept share's distance from 1, weighted by sparsity.
    """
    graphs, classifier, d = request.graphs, request.classifier, request.forget_class
    generator = generator_of("optimised_mask", request)
    with torch.no_grad():
        predictions = classifier(graphs.inputs, graphs.graph.layers[0])
    without_class = predictions.index_fill(1, torch.tensor([d], device=predictions.device), float("-inf")).softmax(1)
    numbers = torch.ones(graphs.graph.num_vertices, device=graphs.labels.device, requires_grad=True)
    optimizer = torch.optim.Adam([numbers], learning_rate)
    group_size = max(1, samples // graphs.num_classes)
    for step in range(steps):
        soft = numbers.sigmoid()
        keep = (numbers > 0).float() + soft - soft.detach()
        chosen = graphs.draw(group_size, generator)
        flat = chosen.flatten()
        features, logits = masked_outputs(classifier, graphs.graph, keep[None], graphs.inputs[flat])
        log_p = logits[0].log_softmax(1)
        is_forget = graphs.labels[flat] == d
        forget = forgetting_loss(log_p[is_forget, d].exp())
        retain = -(without_class[flat] * log_p).sum(1)[~is_forget].mean()
        loss = forget_weight * forget + retain + sparsity * (1 - keep).mean()
        if weight := erasure_weight * request.config.erasure:
            by_class = features.view(*chosen.shape, -1)
            loss = loss + weight * graphs.explained_variance(graphs.against_rivals(by_class, [d]), [d])[0]
        check_finite({"loss of the mask": loss.item()}, step, "eval.hyperparameters.optimised_mask")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return request.zeroing((numbers <= 0).nonzero()[:, 0])
