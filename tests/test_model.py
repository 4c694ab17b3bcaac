"""The closed form against PyTorch Geometric, the hooks, and masks that go on and come off."""

import pytest
import torch
from conftest import HIDDEN, IN_FEATURES, NUM_CLASSES
from torch.nn.utils import parametrize
from torch_geometric.data import Data
from torch_geometric.nn import SAGEConv
from torch_geometric.transforms import LineGraph

from model import (
    AffineFeatures,
    AffineReLU,
    HookedMNISTClassifier,
    Mask,
    MaskingGCN,
    WeightGraph,
    WeightGraphSAGE,
    resolve_mask_layer,
)

SHAPES = [(6, 7), (5, 6), (3, 5)]
CASES = [([(4, 3)], 0), ([(1, 6)], 0), ([(8, 2)], 0), (SHAPES, -2), (SHAPES, [0, 2]), (SHAPES, [1, 2]), (SHAPES, None)]


def line_graph_edges(shapes, mask_layer) -> set[tuple[int, int]]:
    """Edges between weights by PyG: LineGraph of the network of the masked weights, renamed to our vertex numbers."""
    layers = resolve_mask_layer(mask_layer, len(shapes))
    first_neuron = [0]
    for _, n in shapes:
        first_neuron.append(first_neuron[-1] + n)
    vertex_of, offset = {}, 0
    for layer in layers:
        m, n = shapes[layer]
        for r in range(m):
            for c in range(n):
                vertex_of[first_neuron[layer] + c, first_neuron[layer + 1] + r] = offset + r * n + c
        offset += m * n
    network = torch.tensor(sorted(vertex_of)).T
    num_neurons = first_neuron[-1] + shapes[-1][0]
    both_ways = torch.cat([network, network.flip(0)], 1)
    line = LineGraph()(Data(edge_index=both_ways, num_nodes=num_neurons)).edge_index
    # LineGraph numbers the undirected edges of the network in sorted order.
    names = [vertex_of[edge] for edge in sorted(vertex_of)]
    return {(names[u], names[v]) for u, v in line.T.tolist() if u != v}


@pytest.mark.parametrize("shapes, mask_layer", CASES)
def test_edges_are_those_of_the_line_graph(shapes, mask_layer):
    graph = WeightGraph(shapes, mask_layer)
    edges = [tuple(edge) for edge in graph.edge_index().T.tolist()]
    assert set(edges) == line_graph_edges(shapes, mask_layer)
    assert len(edges) == len(set(edges)) == graph.num_edges
    assert edges == sorted(edges)


def test_the_default_layer_has_the_edges_that_arithmetic_gives():
    graph = WeightGraph([(128, 784), (64, 128), (10, 64)], -2)
    assert graph.num_vertices == 64 * 128
    assert graph.num_edges == 64 * 128 * (64 + 128 - 2) == 1_556_480


@pytest.mark.parametrize("shapes, mask_layer", CASES)
def test_a_round_and_its_gradients_are_those_of_sage_conv(shapes, mask_layer):
    torch.manual_seed(0)
    graph = WeightGraph(shapes, mask_layer)
    ours, theirs = WeightGraphSAGE(4, 3).double(), SAGEConv(4, 3, bias=False).double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, graph.num_vertices, 4, dtype=torch.float64)
    weighting = torch.randn(2, graph.num_vertices, 3, dtype=torch.float64)
    x_ours, x_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    features = ours(AffineFeatures.of(graph, graph.split(x_ours, dim=1)))
    output = torch.cat([part.flatten(1, 2) for part in features.relu()], 1)
    expected = torch.stack([theirs(one, graph.edge_index()).relu() for one in x_theirs])
    assert torch.allclose(output, expected, rtol=0, atol=1e-10)
    (output * weighting).sum().backward()
    (expected * weighting).sum().backward()
    assert torch.allclose(x_ours.grad, x_theirs.grad, rtol=0, atol=1e-10)
    for (name, parameter), other in zip(ours.named_parameters(), theirs.parameters()):
        assert torch.allclose(parameter.grad, other.grad, rtol=0, atol=1e-10), name


@pytest.mark.parametrize("mask_layer", [-2, None])
def test_the_whole_gcn_is_the_same_network_on_edges(mask_layer):
    torch.manual_seed(0)
    graph = WeightGraph(SHAPES, mask_layer)
    gcn = MaskingGCN(num_features=4, hidden=6, rounds=3).double()
    x = torch.randn(2, graph.num_vertices, 4, dtype=torch.float64)
    rounds = [SAGEConv(n, 6, bias=False).double() for n in (4, 6, 6)]
    for conv, ours in zip(rounds, gcn.convs):
        conv.load_state_dict(ours.state_dict())
    edges = graph.edge_index()
    for one, logits in zip(x, gcn(x, graph)):
        y = rounds[0](one, edges)
        y = rounds[1](y, edges).relu()
        y = rounds[2](y, edges).relu()
        assert torch.allclose(logits, (y @ gcn.readout.weight.T)[:, 0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("message_passing", [True, False])
def test_graphs_scored_together_or_one_by_one_get_the_same_scores(monkeypatch, message_passing):
    torch.manual_seed(0)
    graph = WeightGraph(SHAPES, [0, 1])
    gcn = MaskingGCN(4, hidden=6, rounds=3, message_passing=message_passing).double()
    x = torch.randn(5, graph.num_vertices, 4, dtype=torch.float64)
    together = gcn(x, graph)
    for at_once in (1, 2 * graph.num_vertices, 10**9):
        monkeypatch.setattr("model.VERTICES_AT_ONCE", at_once)
        assert torch.allclose(gcn(x, graph), together, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mask_layer", [-2, None])
def test_the_gradients_of_the_gcn_are_those_of_finite_differences(mask_layer):
    torch.manual_seed(0)
    graph = WeightGraph([(4, 5), (3, 4), (2, 3)], mask_layer)
    gcn = MaskingGCN(2, hidden=3, rounds=3).double()
    x = torch.randn(2, graph.num_vertices, 2, dtype=torch.float64)
    names, parameters = zip(*gcn.named_parameters())

    def logits(x, *parameters):
        return torch.func.functional_call(gcn, dict(zip(names, parameters)), (x, graph))

    assert torch.autograd.gradcheck(logits, (x, *parameters))


def test_the_gcn_in_single_precision_is_that_in_double():
    torch.manual_seed(0)
    graph, gcn = WeightGraph([(64, 128)]), MaskingGCN(15)
    x = torch.randn(3, graph.num_vertices, 15)
    logits = gcn(x, graph)
    expected = gcn.double()(x.double(), graph)
    assert torch.allclose(logits.double(), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_the_gradients_of_the_step_on_all_vertices_are_those_of_finite_differences():
    torch.manual_seed(0)
    shapes = ((2, 4, 5, 3), (3, 6), (2, 5, 6), (2, 4, 6))  # x, matrix, source, target
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(AffineReLU.apply, inputs)
    permuted = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: AffineReLU.apply(x.transpose(1, 3), *inputs[1:]), [permuted])


@pytest.mark.parametrize(
    "mask_layer, layers", [(-2, (1,)), (0, (0,)), ([2, 0], (0, 2)), ([-1, 0], (0, 2)), (None, (0, 1, 2))]
)
def test_masked_layers_are_resolved(mask_layer, layers):
    assert resolve_mask_layer(mask_layer, 3) == layers


@pytest.mark.parametrize("mask_layer", [3, -4, [0, 7], [], [0, -3], [1, 1]])
def test_masked_layers_that_are_not_there_are_refused(mask_layer):
    with pytest.raises(ValueError, match="mask_layer"):
        resolve_mask_layer(mask_layer, 3)


def test_the_classifier_is_the_formula(classifier, split):
    w0, w1, w2 = (layer.weight for layer in classifier.layers)
    expected = ((split.images @ w0.T).clamp(min=0) @ w1.T).clamp(min=0) @ w2.T
    assert torch.allclose(classifier(split.images), expected, atol=1e-6)
    assert torch.allclose(classifier((split.images @ w0.T).relu(), first=1), expected, atol=1e-6)
    assert classifier.shapes == [(HIDDEN[0], IN_FEATURES), (HIDDEN[1], HIDDEN[0]), (NUM_CLASSES, HIDDEN[1])]


def test_images_of_any_shape_are_flattened():
    classifier = HookedMNISTClassifier((4,))
    images = torch.randn(2, 28, 28)
    assert torch.equal(classifier(images), classifier(images.flatten(1)))


def test_hooks_come_off_on_errors_too(classifier, split):
    with pytest.raises(RuntimeError, match="on purpose"):
        with classifier.hooks([0, 1]):
            assert all(layer._forward_hooks for layer in classifier.layers[:2])
            raise RuntimeError("on purpose")
    with pytest.raises(IndexError):
        classifier.record(split.images, torch.full_like(split.labels, 99), [1])
    assert not any(layer._forward_hooks for layer in classifier.layers)


def test_recording_leaves_no_gradient_behind(classifier, split):
    classifier.record(split.images, split.labels, [1, 2])
    assert all(parameter.grad is None for parameter in classifier.parameters())


@pytest.mark.parametrize("mask_layer", [-2, None])
def test_a_mask_zeroes_exactly_kappa_weights_and_comes_off_bit_for_bit(classifier, split, mask_layer):
    graph = WeightGraph(classifier.shapes, mask_layer)
    before = [layer.weight.detach().clone() for layer in classifier.layers]
    logits = classifier(split.images)
    zeroed = torch.randperm(graph.num_vertices)[:11]
    mask = Mask.zeroing(graph, zeroed)
    mask.apply(classifier)
    flat = torch.cat([classifier.layers[layer].weight.flatten() for layer in graph.layers])
    original = torch.cat([before[layer].flatten() for layer in graph.layers])
    assert int((flat == 0).sum()) == 11 and torch.equal((flat == 0).nonzero()[:, 0], zeroed.sort().values)
    assert torch.equal(flat[flat != 0], original[flat != 0])
    assert not torch.allclose(classifier(split.images), logits)
    mask.remove(classifier)
    assert not any(parametrize.is_parametrized(layer) for layer in classifier.layers)
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(classifier.layers, before))
    assert torch.equal(classifier(split.images), logits)


def test_a_mask_comes_off_when_its_context_fails(classifier):
    mask = Mask.zeroing(WeightGraph(classifier.shapes, -2), torch.arange(3))
    with pytest.raises(RuntimeError, match="on purpose"), mask.applied_to(classifier):
        raise RuntimeError("on purpose")
    assert not parametrize.is_parametrized(classifier.layers[1])


def test_keeping_is_the_complement_of_zeroing(classifier):
    graph = WeightGraph(classifier.shapes, None)
    vertices = torch.randperm(graph.num_vertices)[:20]
    kept, zeroed = Mask.keeping(graph, vertices), Mask.zeroing(graph, vertices)
    assert torch.equal(kept.as_tensor() + zeroed.as_tensor(), torch.ones(graph.num_vertices))
    assert kept.as_tensor().sum() == 20


def test_one_masked_layer_gives_a_mask_of_its_shape(classifier):
    assert Mask.zeroing(WeightGraph(classifier.shapes, -2), torch.arange(3)).as_tensor().shape == (5, 6)


def test_a_mask_is_saved_and_loaded(classifier, tmp_path):
    mask = Mask.zeroing(WeightGraph(classifier.shapes, [0, 1]), torch.arange(5, 25))
    mask.save(tmp_path / "masks" / "mask.pt")
    loaded = Mask.load(tmp_path / "masks" / "mask.pt")
    assert loaded.layers == (0, 1) and torch.equal(loaded.as_tensor(), mask.as_tensor())


def test_a_second_mask_and_one_of_another_shape_are_refused(classifier):
    mask = Mask.zeroing(WeightGraph(classifier.shapes, -2), torch.arange(3))
    with mask.applied_to(classifier), pytest.raises(ValueError, match="layer 1 carries a mask"):
        mask.apply(classifier)
    with pytest.raises(ValueError, match=r"layer 1 is \(5, 6\), its mask \(2, 2\)"):
        Mask((1,), (torch.ones(2, 2),)).apply(classifier)
    assert not parametrize.is_parametrized(classifier.layers[1])


class FunctionalReLU(torch.nn.Module):
    """A classifier as people write them: layers as attributes, the ReLU in forward."""

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(IN_FEATURES, 6)
        self.middle = torch.nn.Linear(6, 5, bias=False)
        self.head = torch.nn.Linear(5, NUM_CLASSES)

    def forward(self, x):
        return self.head(self.middle(self.inner(x).relu()).relu())


def sequential(activation=torch.nn.ReLU) -> torch.nn.Module:
    nn = torch.nn
    return nn.Sequential(
        nn.Flatten(), nn.Linear(IN_FEATURES, 6), activation(), nn.Dropout(0.5), nn.Linear(6, 5), activation(),
        nn.Linear(5, NUM_CLASSES),
    )  # fmt: skip


@pytest.mark.parametrize("make", [FunctionalReLU, sequential])
def test_the_layers_of_any_stack_are_shared(make, split):
    model = make()
    classifier = HookedMNISTClassifier.of(model, split.images)
    assert model.training, "the model is left in the mode that it was in"
    model.eval()
    assert torch.allclose(classifier(split.images), model(split.images), atol=1e-6)
    assert classifier.shapes == [(6, IN_FEATURES), (5, 6), (NUM_CLASSES, 5)]
    Mask.zeroing(WeightGraph(classifier.shapes, -2), torch.arange(9)).apply(model)
    assert torch.allclose(classifier(split.images), model(split.images), atol=1e-6)
    assert int((classifier.layers[1].weight == 0).sum()) == 9


@pytest.mark.parametrize("make", [FunctionalReLU, sequential])
def test_a_mask_on_a_model_of_the_users_own_comes_off_bit_for_bit(make, split):
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    mask = Mask.zeroing(WeightGraph([(6, IN_FEATURES), (5, 6), (NUM_CLASSES, 5)], [0, 2]), torch.arange(30, 50))
    mask.apply(model)
    mask.remove(model)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(
    "model, message",
    [
        (sequential(torch.nn.Tanh), "linear layers with ReLU between them and nothing else"),
        (torch.nn.Sequential(sequential(), torch.nn.LogSoftmax(1)), "linear layers with ReLU between them and nothing"),
        (torch.nn.Conv1d(1, 2, 3), "must be a stack of linear layers; it has none"),
        (torch.nn.ModuleList([torch.nn.Linear(7, 5), torch.nn.Linear(6, 3)]), "it has 7 to 5, 6 to 3"),
        (torch.nn.Linear(8, 3), "inputs have 7 features, the first layer of the model takes 8"),
    ],
)
def test_other_models_are_refused(model, message, split):
    with pytest.raises(ValueError, match=message):
        HookedMNISTClassifier.of(model, split.images)


def test_a_mask_for_a_deeper_model_is_refused(split):
    mask = Mask.zeroing(WeightGraph([(6, IN_FEATURES), (5, 6), (NUM_CLASSES, 5)], -1), torch.arange(3))
    with pytest.raises(ValueError, match="layer 2 is not there: the model has 1 linear layers"):
        mask.apply(torch.nn.Linear(IN_FEATURES, NUM_CLASSES))


def test_without_message_passing_a_weight_is_scored_by_its_own_features():
    torch.manual_seed(0)
    graph = WeightGraph(SHAPES, -2)
    x = torch.randn(1, graph.num_vertices, 4)
    changed = x.clone()
    changed[0, 1:] = torch.randn(graph.num_vertices - 1, 4)
    for message_passing in (False, True):
        gcn = MaskingGCN(4, hidden=6, rounds=3, message_passing=message_passing)
        scores, after = gcn(x, graph)[0], gcn(changed, graph)[0]
        assert torch.equal(scores[0], after[0]) != message_passing and not torch.equal(scores, after)
    alone = MaskingGCN(4, hidden=6, rounds=3, message_passing=False)
    w0, w1, w2 = (conv.weight for conv in alone.convs)
    expected = alone.readout((((x @ w0.T) @ w1.T).relu() @ w2.T).relu())
    assert torch.allclose(alone(x, graph), expected[..., 0], atol=1e-6)
