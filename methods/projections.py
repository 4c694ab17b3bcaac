"""Published ways to forget by projecting what layers are given; only the mask of ESC-T is trained.

Where a layer is given x, its weight becomes W (I - P), or it is given Q x itself; biases stay. A convolution is given
what its kernels read, at every position. They measure the original classifier, in double precision.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eval import Request
from methods.controls import further, output_layer
from methods.fine_tuning import FineTuning, draws
from mimu.erasing import class_direction
from mimu.probes import ridge_regression, standardised
from mimu.samples import Split, some_of_every_class
from mimu.settings import Count, NonNegative, Positive, Share
from mimu.tracing import HookedClassifier


def moments(classifier: HookedClassifier, images: Tensor, index: int) -> tuple[Tensor, Tensor]:
    """Squared singular values (n), ascending, and left singular vectors (n, n) of all x that a layer is given."""
    parts = (x.flatten(0, 1).double() for x in classifier.layer_inputs(index, images))
    return torch.linalg.eigh(sum(x.T @ x for x in parts))


def projected(request: Request, removed: Callable[[int], Tensor]) -> nn.Module:
    """The classifier with W (I - P) in the place of every W, P (n, n) = removed(number of the layer)."""
    classifier = request.classifier
    for index, weight in enumerate(classifier.weights):
        matrix = weight.flatten(1).double()
        weight.copy_((matrix - matrix @ removed(index)).view_as(weight))
    return classifier


def with_representation(request: Request, projection: Tensor) -> nn.Module:
    """The classifier whose last layer is given Q z in the place of the representation z; Q (n, n), symmetric."""
    classifier = request.classifier
    last = output_layer(classifier)
    projection = projection.to(last.weight)
    # Not in its weight, where the class would stay in the representation; ESC's code projects in the forward pass, too.
    last.register_forward_pre_hook(lambda layer, inputs: (inputs[0] @ projection,))
    return classifier


def separability(own: Tensor, others: Tensor, ridge: float) -> Tensor:
    """2 accuracy - 1, at least 0, of a linear probe between samples (samples, n) of two kinds, on the half held out."""
    x = torch.cat([own, others])
    sign = torch.cat([own.new_ones(len(own)), -own.new_ones(len(others))])
    known, held_out = standardised(x[::2], x[1::2])
    coefficients = ridge_regression(known, sign[::2, None], ridge)
    is_right = (held_out @ coefficients)[:, 0] * sign[1::2] > 0
    return (2 * is_right.double().mean() - 1).clamp_min(0)


@further("damp", paper="Hatami et al. 2026, arXiv:2604.15166")
@torch.no_grad()
def damp(request: Request, *, samples: Count, ridge: Positive, row: NonNegative) -> nn.Module:
    """DAMP: every layer loses the direction of the class's mean input that no other means span, the deeper the more;
    then, with `row` 0, the class's output row goes.

    W' = W (I - a q q^T), q = r / |r|, r = mu_d - R R^+ mu_d, the columns of R the means of the other classes;
    a = max(0, 2 acc - 1) l / L, acc the accuracy on held-out samples of a linear probe (here a ridge regression) of the
    class against as many others, l / L from 0 for the first layer, which is given pixels, to 1 for the last; the
    output row is multiplied by `row`. A stage of the paper is a layer here. After summaries of the paper, not its text.
    """
    d = request.forget_class
    last = len(request.original.names) - 1
    chosen = some_of_every_class(request.train, samples, "damp", request.seed, d)
    is_own = chosen.labels == d

    def removed(index: int) -> Tensor:
        x = request.original.mean_inputs(index, chosen.images).double()
        direction = class_direction(x, chosen.labels, d)
        others = x[~is_own][:: len(chosen.labels.unique()) - 1]
        alpha = separability(x[is_own], others, ridge) * (index / last if last else 1.0)
        return alpha * torch.outer(direction, direction)

    classifier = projected(request, removed)
    classifier.weights[-1][d] *= row
    return classifier


@further("svd", paper="Kodge et al. 2023, arXiv:2312.00761")
@torch.no_grad()
def svd(request: Request, *, samples: Count, retain_alpha: Positive, forget_alpha: Positive) -> nn.Module:
    """Every layer loses the space of the class's inputs less what it shares with that of the others' inputs.

    W' = W (I - P)^T, P = P_f (I - P_r); P_f, P_r = U diag(a s / ((a - 1) s + 1)) U^T, U the left singular vectors of
    what the layer is given of samples of the class, or of as many of all others together, s the squares of the singular
    values as shares of their sum. Of a convolution's patches the published code takes some at random, this all.
    """
    d = request.forget_class
    each = max(1, samples // (request.graphs.num_classes - 1))
    forget = some_of_every_class(request.forget, samples, "svd", request.seed, d)
    retain = some_of_every_class(request.retain, each, "svd", request.seed, d)

    def space(images: Tensor, index: int, alpha: float) -> Tensor:
        values, vectors = moments(request.original, images, index)
        shares = values.clamp_min(0) / values.sum().clamp_min(1e-30)
        return vectors * (alpha * shares / ((alpha - 1) * shares + 1)) @ vectors.T

    def removed(index: int) -> Tensor:
        of_forget = space(forget.images, index, forget_alpha)
        return (of_forget - of_forget @ space(retain.images, index, retain_alpha)).T

    return projected(request, removed)


@further("esc", paper="Lee et al. 2025, arXiv:2504.02199", touches="the representation", needs="forget set")
@torch.no_grad()
def esc(request: Request, *, share: Share) -> nn.Module:
    """ESC: the representation loses the share of its directions that is largest on the forget set.

    z' = U U^T z, U the left singular vectors of the forget set's z (not centred) but for the first, one at least.
    """
    _, vectors = moments(request.original, request.forget.images, -1)
    kept = vectors[:, : len(vectors) - max(1, int(share * len(vectors)))]
    return with_representation(request, kept @ kept.T)


@further("esc_t", paper="Lee et al. 2025, arXiv:2504.02199", touches="the representation", needs="forget set")
def esc_t(request: Request, *, config: FineTuning, threshold: Share) -> nn.Module:
    """ESC-T: the representation loses the entries of its directions on the forget set that a trained mask names.

    z' = V V^T z, V = U o [M > threshold], U all left singular vectors of ESC; M, ones at first and kept in [0, 1],
    descends (SGD) along log p(label), the mean of the samples that U o M still leaves classified as their class.
    """
    representation = request.original.mean_inputs(-1, request.forget.images)
    vectors = moments(request.original, request.forget.images, -1)[1].to(representation)
    mask = torch.ones_like(vectors, requires_grad=True)
    optimizer = torch.optim.SGD([mask], config.learning_rate)
    optimizer.register_step_post_hook(lambda *_: mask.data.clamp_(0, 1))
    logits_of = output_layer(request.classifier)

    def log_p_where_right(z: Tensor, labels: Tensor) -> Tensor:
        logits = logits_of(z @ (vectors * mask) @ (vectors * mask).T)
        is_right = logits.argmax(1) == labels
        return -F.cross_entropy(logits[is_right], labels[is_right], reduction="sum") / is_right.sum().clamp_min(1)

    given = {"optimizer": optimizer, "loss": log_p_where_right}
    config.train(logits_of, Split(representation, request.forget.labels), draws(request, "esc_t"), **given)
    kept = vectors * (mask.detach() > threshold)
    return with_representation(request, kept @ kept.T)


@further("pour", paper="Le et al. 2025, arXiv:2511.19339", touches="the representation", needs="nothing")
@torch.no_grad()
def pour(request: Request) -> nn.Module:
    """POUR-P: the representation loses the direction of the class's row of the output layer.

    z' = (I - w w^T / |w|^2) z, w the row: its logit is always 0 (or the bias). After a summary of the paper.
    """
    row = request.original.weights[-1][request.forget_class].double()
    projection = torch.eye(len(row)).to(row) - torch.outer(row, row) / row.square().sum().clamp_min(1e-30)
    return with_representation(request, projection)
