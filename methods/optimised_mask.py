"""A mask that is trained for one request, without a masking GCN."""

from __future__ import annotations

import torch

from data import Count, NonNegative, Positive, seeded
from eval import Request, unlearning_method
from model import Mask
from trainer import check_finite, forgetting_loss, masked_weights


@unlearning_method(
    "optimised_mask", paper="after Mallya et al. 2018, arXiv:1801.06519", touches="a mask", in_default_run=False
)
def optimised_mask(
    request: Request,
    *,
    steps: Count,
    samples: Count,
    learning_rate: Positive,
    forget_weight: NonNegative,
    sparsity: NonNegative,
    auxiliary_weight: NonNegative,
) -> Mask:
    """A mask of the same layers trained for this class alone: Adam on a real number per weight, kept where above 0.

    Backwards through the threshold as through a sigmoid. The loss is that of the masking GCN: without the class
    -log(1 - p(d)) on the forget set, the original's predictions without d on the retain set, and the auxiliary term
    where there is one; plus the share of the weights that go, weighted by sparsity.
    """
    graphs, classifier, d = request.graphs, request.classifier, request.forget_class
    first = graphs.graph.layers[0]
    generator = seeded("optimised_mask", request.seed, d)
    with torch.no_grad():
        predictions = classifier(graphs.inputs, first)
    without_class = predictions.index_fill(1, torch.tensor([d], device=predictions.device), float("-inf")).softmax(1)
    numbers = torch.ones(graphs.graph.num_vertices, device=graphs.labels.device, requires_grad=True)
    optimizer = torch.optim.Adam([numbers], learning_rate)
    for step in range(steps):
        soft = numbers.sigmoid()
        keep = (numbers > 0).float() + soft - soft.detach()
        chosen = graphs.draw(max(1, samples // graphs.num_classes), generator)
        flat = chosen.flatten()
        weights = masked_weights(classifier, graphs.graph, keep[None])
        features, logits = classifier.outputs(graphs.inputs[flat], first, weights)
        log_p = logits[0].log_softmax(1)
        is_forget = graphs.labels[flat] == d
        forget = forgetting_loss(log_p[is_forget, d].exp())
        retain = -(without_class[flat] * log_p).sum(1)[~is_forget].mean()
        loss = forget_weight * forget + retain + sparsity * (1 - keep).mean()
        if graphs.auxiliary and (weight := auxiliary_weight * graphs.auxiliary.weight):
            loss = loss + weight * graphs.auxiliary.loss(features.view(1, *chosen.shape, -1), [d])
        check_finite({"loss of the mask": loss.item()}, step, "eval.hyperparameters.optimised_mask")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return request.zeroing((numbers <= 0).nonzero()[:, 0])
