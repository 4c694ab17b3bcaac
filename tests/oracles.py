"""The features of weights by their definitions, from the losses of one sample at a time by autograd."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import grad

from mimu.data import FEATURES, GraphGenerator, Snapshot
from mimu.data import FORGETTING_TEMPERATURE as T
from mimu.networks.masks import Mask


def log_odds(model: nn.Module, x: Tensor, label: int, among: list[int]) -> Tensor:
    """Of the label of a sample, by the softmax restricted to some classes."""
    p = model(x[None])[0, among].softmax(0)[among.index(label)]
    return (p / (1 - p)).log()


class Group:
    """Samples of one class on a masked classifier whose modules stand in a row, convolutions 3 x 3 in a border of 1."""

    def __init__(self, graphs: GraphGenerator, mask: Mask | None, samples: Tensor, among: list[int]) -> None:
        self.masked = copy.deepcopy(graphs.classifier)
        if mask:
            mask.apply(self.masked, permanent=True)
        self.layers = [self.masked.layers[layer] for layer in graphs.graph.layers]
        self.images, label = graphs.samples.images[samples], int(graphs.labels[samples[0]])
        self.log_odds = torch.stack([log_odds(self.masked, x, label, among) for x in self.images])
        self.p = self.log_odds.sigmoid()
        self.t = torch.stack([log_odds(graphs.classifier, x, label, among) for x in self.images]).sigmoid().detach()

    def gradients(self, values: Tensor) -> Tensor:
        """By the weights of all masked layers, (samples, vertices)."""
        rows = []
        for value in values:
            parts = grad(value, [layer.weight for layer in self.layers], retain_graph=True)
            rows.append(torch.cat([part.flatten() for part in parts]))
        return torch.stack(rows)

    def activations(self, layer: nn.Module) -> list[Tensor]:
        """For every weight, means of what it is given, what its target gives, and of both where that is active."""
        network = list(self.masked.network)
        begin = network.index(layer)
        relus = [index for index in range(begin, len(network)) if isinstance(network[index], nn.ReLU)]
        a, h = (self.masked.network[:end](self.images) for end in (begin, (relus or [begin])[0] + 1))
        if isinstance(layer, nn.Conv2d):
            a = F.pad(a, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1).flatten(4).movedim(-1, 2).flatten(1, 2)
        a, h = (each.reshape(*each.shape[:2], -1).detach() for each in (a, h))  # (samples, n, places)
        both = ((h > 0 if relus else torch.ones_like(h))[:, :, None] * a[:, None]).mean((0, 3))
        of_ends = a.mean((0, 2)).expand_as(both), h.mean((0, 2))[:, None].expand_as(both), both
        return [each.flatten() for each in of_ends]

    def features(self) -> dict[str, Tensor]:
        """(vertices) of each."""
        forgetting = T * F.softplus(self.log_odds / T)
        retention = -self.t * self.p.log() - (1 - self.t) * (1 - self.p).log()
        losses = [self.gradients(each).mean(0) for each in (-self.p.log(), forgetting, retention)]
        curvature = ((self.p * (1 - self.p))[:, None] * self.gradients(self.log_odds) ** 2).mean(0).sqrt().detach()
        w = torch.cat([layer.weight.detach().flatten() for layer in self.layers])
        a, h, both = map(torch.cat, zip(*map(self.activations, self.layers)))
        of_weights = a, h, w, losses[0], *(w * loss for loss in losses), w.abs() * curvature, w.abs() * both
        return dict(zip(FEATURES, of_weights, strict=True))


def assert_by_hand(snapshot: Snapshot, groups: list[Group]) -> None:
    """Whether a snapshot has the log-odds, the losses and the features of one group of each class."""
    for row, group in enumerate(groups):
        assert torch.allclose(snapshot.log_odds[row], group.log_odds, atol=1e-9)
        assert torch.allclose(snapshot.loss[row], -group.p.log().mean(), atol=1e-9)
        for name, expected in group.features().items():
            assert torch.allclose(snapshot.feature(name)[row], expected, rtol=1e-9, atol=1e-12), name
