"""The weight graph against PyTorch Geometric, the classifier by its formula, and masks that do not fit."""

from itertools import product

import pytest
import torch
from conftest import HIDDEN, IN_FEATURES, NUM_CLASSES, mask_of, random_classifier
from torch import nn
from torch.nn.utils import parametrize
from torch_geometric.data import Data
from torch_geometric.nn import SAGEConv
from torch_geometric.transforms import LineGraph

from mimu.model import (
    LARGEST_CHANGE,
    AffineFeatures,
    AffineReLU,
    HookedMNISTClassifier,
    MaskingGCN,
    WeightGraph,
    WeightGraphSAGE,
)
from mimu.networks.masks import Mask
from mimu.runs.files import ArtifactError, save

SIZES = (7, 6, 5, 3)


@pytest.mark.parametrize(
    "sizes, mask_layer, layers",
    [
        ((6, 1), 0, (0,)), ((2, 8), -1, (0,)), (SIZES, -2, (1,)),
        (SIZES, [2, 0], (0, 2)), (SIZES, [-2, 2], (1, 2)), (SIZES, None, (0, 1, 2)),
    ],
)  # fmt: skip
def test_the_weight_graph_and_a_round_on_it_are_those_of_pyg(sizes, mask_layer, layers):
    graph = WeightGraph.of(HookedMNISTClassifier(sizes[1:-1], sizes[0], sizes[-1]), mask_layer)
    sizes = [(layer, range(sizes[layer + 1]), range(sizes[layer])) for layer in layers]
    ends = [((layer, c), (layer + 1, r)) for layer, rows, columns in sizes for r, c in product(rows, columns)]
    neurons = sorted({neuron for pair in ends for neuron in pair})
    network = [tuple(map(neurons.index, pair)) for pair in ends]
    both_ways = torch.tensor([*network, *((b, a) for a, b in network)]).T
    line = LineGraph()(Data(edge_index=both_ways, num_nodes=len(neurons))).edge_index
    names = [network.index(pair) for pair in sorted(network)]  # PyG numbers the weights in sorted order
    expected = sorted({(names[u], names[v]) for u, v in line.T.tolist() if u != v})
    assert list(map(tuple, graph.edge_index().T.tolist())) == expected
    assert (graph.layers, graph.num_vertices, graph.num_edges) == (layers, len(ends), len(expected))
    own, of_pyg = WeightGraphSAGE(4, 6).double(), SAGEConv(4, 6, bias=False).double()
    of_pyg.load_state_dict(own.state_dict())
    x = torch.randn(2, graph.num_vertices, 4).double()
    round_of = own([AffineFeatures.of(part) for part in graph.matrices(x, dim=1)], graph)
    found = torch.cat([part.formed().flatten(1, 2) for part in round_of], 1)
    assert torch.allclose(found, of_pyg(x, torch.tensor(expected).T), atol=1e-12)


@pytest.mark.parametrize("mask_layer", [3, -4, [0, 7], [], [0, -3], [1, 1]])
def test_masked_layers_that_are_not_there_are_refused(classifier, mask_layer):
    with pytest.raises(ValueError, match="mask_layer"):
        WeightGraph.of(classifier, mask_layer)


@pytest.mark.parametrize("message_passing", [True, False])
def test_factors_depend_neither_on_the_graphs_seen_together_nor_on_the_precision(message_passing):
    torch.manual_seed(0)
    graph = WeightGraph.of(HookedMNISTClassifier((64,), 128), None)
    gcn = MaskingGCN(15, message_passing=message_passing).double()
    x = torch.randn(5, graph.num_vertices, 15, dtype=torch.float64)
    assert (gcn(x, graph) == 1).all() and gcn(x, graph).shape == (5, graph.num_vertices, 2), "before its training"
    gcn.readout.weight.data.normal_()
    together = gcn(x, graph)
    for at_once in (1, 2):
        parts = torch.cat([gcn(part, graph) for part in x.split(at_once)])
        assert torch.allclose(parts, together, rtol=1e-12)
    single = gcn.float()(x.float(), graph).double()
    assert torch.allclose(single, together, rtol=1e-4) and together.log().abs().max() < LARGEST_CHANGE


def test_without_message_passing_a_weight_has_its_factors_by_its_own_features(classifier):
    torch.manual_seed(0)
    x, gcn = torch.randn(1, 30, 4), MaskingGCN(4, hidden=6, rounds=3, message_passing=False)
    gcn.readout.weight.data.normal_()
    w0, w1, w2 = (conv.weight for conv in gcn.convs)
    found = gcn.readout((((x @ w0.T) @ w1.T).relu() @ w2.T).relu())
    expected = (found - found.mean(1, keepdim=True)).tanh().exp()
    assert torch.allclose(gcn(x, WeightGraph.of(classifier, -2)), expected, rtol=1e-5)


def test_where_nothing_of_a_graph_is_above_zero_the_gradient_passes_as_if_all_were():
    torch.manual_seed(0)
    x, matrix = torch.rand(2, 3, 5, 4).double(), torch.rand(4, 6).double().requires_grad_()
    source, target = (-torch.rand(2, size, 6).double().requires_grad_() for size in (5, 3))
    signs = torch.tensor([-1.0, 1.0])[:, None, None, None]
    y = (x * signs) @ matrix + source[:, None] + target[:, :, None]
    output = AffineReLU.apply(x * signs, matrix, source, target)
    assert not output[0].any() and torch.equal(output, y.relu())
    expected = torch.stack([y[0], y[1].relu()])
    inputs, weighting = [matrix, source, target], torch.randn_like(y)
    gradients = torch.autograd.grad((output * weighting).sum(), inputs)
    for gradient, of_linear in zip(gradients, torch.autograd.grad((expected * weighting).sum(), inputs)):
        assert torch.allclose(gradient, of_linear, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
def test_the_classifier_is_the_formula(split, bias):
    classifier = random_classifier(bias=bias)
    w0, w1, w2 = (layer.weight for layer in classifier.layers)
    b0, b1, b2 = (layer.bias if bias else 0 for layer in classifier.layers)
    first = (split.images @ w0.T + b0).clamp(min=0)
    representation = (first @ w1.T + b1).clamp(min=0)
    expected = representation @ w2.T + b2
    own = {1: w1.detach()[None], 2: w2.detach()[None]}
    assert torch.allclose(classifier.prefix_activations([2, 1], split.images), first, atol=1e-6)
    for features, logits in (
        classifier.outputs(split.images),
        classifier.outputs(first, [1]),
        classifier.outputs(first, [1], own),
    ):
        assert torch.allclose(features, representation, atol=1e-6) and torch.allclose(logits, expected, atol=1e-6)
    assert torch.allclose(classifier.features(first, [1]), representation, atol=1e-6)
    assert torch.allclose(classifier(split.images.view(-1, 1, 7)), expected, atol=1e-6), "images are flattened"
    assert torch.allclose(classifier(first, first=[1, 2]), expected, atol=1e-6)
    assert classifier.shapes == [(HIDDEN[0], IN_FEATURES), (HIDDEN[1], HIDDEN[0]), (NUM_CLASSES, HIDDEN[1])]


def test_looking_into_a_classifier_leaves_no_gradient_behind_and_its_weights_free_after_errors_too(classifier, split):
    classifier.layers[0].weight.requires_grad_(False)
    for fails in (
        lambda: classifier.record(split.images[:, 1:], split.labels, [0, 1]),
        lambda: classifier.outputs(split.images, None, {1: torch.zeros(2, 5, 9)}),
    ):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied|size"):
            fails()
    with pytest.raises((IndexError, RuntimeError)):
        classifier.record(split.images, torch.full_like(split.labels, 99), [1])
    record = classifier.record(split.images, split.labels, [1, 2])
    assert not any(x.requires_grad for x in (*record.layers[0], *record.layers[1], record.log_odds))
    assert [weight.requires_grad for weight in classifier.parameters()] == [False, True, True]
    assert all(weight.grad is None for weight in classifier.parameters())
    hooked = (module for module in classifier.modules() if module._forward_hooks or module._forward_pre_hooks)
    assert not list(hooked)


def test_a_mask_that_does_not_fit_and_a_file_that_is_no_mask_are_refused(classifier, tmp_path):
    mask = WeightGraph.of(classifier, -2).zeroing(torch.arange(3))
    with pytest.raises(ZeroDivisionError), mask.applied_to(classifier):
        raise ZeroDivisionError
    assert not parametrize.is_parametrized(classifier.layers[1]), "the mask comes off when its context fails"
    with pytest.raises(ValueError, match=r"layer 1 is \(5, 6\), its mask \(2, 2\)"):
        mask_of({0: torch.ones(6, 7), 1: torch.ones(2, 2)}).apply(classifier)
    assert not any(parametrize.is_parametrized(layer) for layer in classifier.layers)
    with pytest.raises(ValueError, match=r"layer 1 is not there, its mask \(5, 6\)"):
        mask.apply(nn.Linear(IN_FEATURES, NUM_CLASSES))
    save(tmp_path / "gcn.pt", {"state_dict": {}, "seed": 0})
    with pytest.raises(ArtifactError, match="gcn.pt: is not a mask .'layers'."):
        Mask.load(tmp_path / "gcn.pt")
