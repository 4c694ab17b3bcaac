"""The weight graph against PyTorch Geometric, the classifier by its formula, and masks that do not fit."""

from itertools import product

import pytest
import torch
from conftest import HIDDEN, IN_FEATURES, NUM_CLASSES, mask_of, random_classifier
from torch import nn
from torch.nn.utils import parametrize
from torch_geometric.data import Data
from torch_geometric.transforms import LineGraph

from mimu.model import AffineReLU, HookedMNISTClassifier, MaskingGCN, WeightGraph
from mimu.networks.masks import Mask
from mimu.runs.files import ArtifactError, save

SIZES = (7, 6, 5, 3)


GRAPHS = [((6, 1), 0, (0,)), ((2, 8), -1, (0,)), (SIZES, -2, (1,)),
          (SIZES, [2, 0], (0, 2)), (SIZES, [-2, 2], (1, 2)), (SIZES, None, (0, 1, 2))]  # fmt: skip


@pytest.mark.parametrize("sizes, mask_layer, layers", GRAPHS)
def test_the_weight_graph_is_the_line_graph_of_the_network(sizes, mask_layer, layers):
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


@pytest.mark.parametrize("message_passing", [True, False])
def test_factors_are_1_before_the_training_and_do_not_depend_on_the_graphs_seen_together(message_passing):
    torch.manual_seed(0)
    graph = WeightGraph.of(HookedMNISTClassifier((64,), 128), None)
    x, gcn = torch.randn(5, graph.num_vertices, 15), MaskingGCN(15, message_passing=message_passing)
    assert gcn(x, graph).shape == (5, graph.num_vertices, 2) and (gcn(x, graph) == 1).all()
    gcn.readout.weight.data.normal_()
    together, exact = gcn(x, graph), gcn.double()(x.double(), graph)
    for at_once in (1, 2):
        parts = torch.cat([gcn.float()(part, graph) for part in x.split(at_once)])
        assert torch.allclose(parts, together) and torch.allclose(parts.double(), exact, rtol=1e-4)


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
    w0, w1, w2 = (layer.weight.detach() for layer in classifier.layers)
    b0, b1, b2 = (layer.bias if bias else 0 for layer in classifier.layers)
    first = (split.images @ w0.T + b0).clamp(min=0)
    representation = (first @ w1.T + b1).clamp(min=0)
    expected, own = representation @ w2.T + b2, {1: w1, 2: w2}
    assert torch.allclose(classifier.prefix_activations([2, 1], split.images), first, atol=1e-6)
    found = classifier.outputs(split.images), classifier.outputs(first, [1]), classifier.outputs(first, [1], own)
    for features, logits in found:
        assert torch.allclose(features, representation, atol=1e-6) and torch.allclose(logits, expected, atol=1e-6)
    assert torch.allclose(classifier(split.images.view(-1, 1, 7)), expected, atol=1e-6), "images are flattened"
    assert classifier.shapes == [(HIDDEN[0], IN_FEATURES), (HIDDEN[1], HIDDEN[0]), (NUM_CLASSES, HIDDEN[1])]


def test_looking_into_a_classifier_leaves_no_gradient_behind_and_its_weights_free_after_errors_too(classifier, split):
    classifier.layers[0].weight.requires_grad_(False)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied|size"):
        classifier.outputs(split.images, None, {1: torch.zeros(5, 9)})
    with pytest.raises((IndexError, RuntimeError)):
        classifier.record(split.images, torch.full_like(split.labels, 99), [1])
    record = classifier.record(split.images, split.labels, [1, 2])
    assert not any(x.requires_grad for x in (*record.layers[0], *record.layers[1], record.log_odds))
    assert [weight.requires_grad for weight in classifier.parameters()] == [False, True, True]
    assert all(weight.grad is None for weight in classifier.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in classifier.modules())


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
