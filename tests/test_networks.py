"""Networks against autograd and brute force: their weight graphs, the GCN on these, records, masks and tracing."""

import copy
import functools
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import NUM_CLASSES, Group, assert_by_hand, graph_config, log_odds, random_classifier, trainer_config
from torch import Tensor, nn
from torch.func import functional_call

from data import GraphGenerator
from eval import METHODS, Request, run_method
from experiment.config import Config, load_config
from experiment.settings import ConfigError
from methods.fine_tuning import fisher_information
from mimu.graph import LARGEST_CHANGE, AffineReLU, MaskingGCN, WeightGraph
from mimu.hooked import HookedClassifier
from mimu.layers import PositionRecord
from mimu.pruning import prune
from mimu.saliency import FEATURES
from mimu.samples import Split
from mimu.seeds import seeded
from mimu.tracing import Trace
from model import HookedMNISTClassifier, mlp
from trainer import GCNTrainer, Trainer, masked_weights

SIZE = (2, 8, 8)


class Joined(nn.Module):
    """A convolution added to what it is given, channels of two side by side, each read alone; all in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.same = nn.Conv2d(2, 3, 3, padding=1, bias=False), nn.Conv2d(3, 3, 1)
        self.conv2, self.conv3 = nn.Conv2d(2, 2, 1), nn.Conv2d(10, 4, 3)
        self.depthwise = nn.Conv2d(5, 10, (1, 3), padding=(0, 1), groups=5)
        self.rectify, self.linear = nn.ReLU(inplace=True), nn.Linear(16, NUM_CLASSES)
        self.gain = nn.Parameter(torch.tensor([0.5, 2.0, -1.0]).view(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        one = F.relu(self.conv1(x), inplace=True)
        two = self.same(one)
        two += one
        both = torch.cat([two.relu_() * self.gain, self.conv2(x).relu_()], 1)
        both = self.depthwise(both)
        both = F.max_pool2d(self.rectify(self.conv3(both)), 3)
        return self.linear(both.view(both.size(0), -1))


class Varied(nn.Module):
    """Every kind of convolution that a kernel can be masked in."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(2, 4, 3, 2, 1, padding_mode="reflect"), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, (3, 2), dilation=2, padding="same"), nn.BatchNorm2d(4)
        self.conv3 = nn.Conv2d(4, 3, (2, 3), (1, 2), (0, 1), bias=False)
        self.grouped, self.linear = nn.Conv2d(4, 4, 1, groups=2), nn.Linear(18, NUM_CLASSES)

    def hidden(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        one = self.bn1(self.conv1(x)).relu()
        two = (self.bn2(self.conv2(one)) + one).relu()
        return one, two, F.gelu(self.conv3(self.grouped(two)))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.flatten(self.hidden(x)[2], 1))


class Windows(nn.Module):
    """Four windows of four tokens, which pass for samples, then a gate of all channels."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm = nn.Conv2d(2, 4, 2, 2), nn.LayerNorm(4)
        self.expand, self.reduce = nn.Linear(4, 5, bias=False), nn.Linear(5, 4)
        self.gate, self.head = nn.Linear(4, 1), nn.Linear(4, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).permute(0, 2, 3, 1)
        windows = x.view(-1, 2, 2, 2, 2, 4).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 4)
        windows = windows + self.reduce(F.gelu(self.expand(self.norm(windows))))
        x = windows.view(-1, 2, 2, 2, 2, 4).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, 4)
        return self.head((x * self.gate(x).sigmoid()).mean(1))


class Spaced(nn.Module):
    """Convolutions of one dimension, channel by channel, and of three."""

    def __init__(self) -> None:
        super().__init__()
        self.row, self.volume = nn.Conv1d(2, 6, 5, 3, 1, dilation=2, groups=2), nn.Conv3d(1, 3, (2, 3, 3), (1, 2, 3))
        self.joined, self.head = nn.Conv1d(9, 4, 1), nn.Linear(4, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        row, volume = self.row(x.flatten(2)).relu(), self.volume(x[:, None]).relu()
        return self.head(self.joined(torch.cat([row[..., :6], volume.flatten(2)], 1)).relu().amax(2))


class Functional(nn.Module):
    """A parameter of its own that F.linear reads, constants, and values that change in place, views of them too."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.conv = nn.Parameter(torch.randn(6, 16)), nn.Conv2d(2, 4, 4, 4)
        self.head = nn.Linear(6, NUM_CLASSES)
        self.register_buffer("scale", torch.tensor([1.0, -2.0, 0.5, 3.0]).view(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x) * self.scale + torch.tensor([0.5], dtype=x.dtype)
        x[:, 1:3].mul_(2)
        x.flatten(2)[..., ::2] += 1
        rows = F.linear(x.relu_().flatten(1), self.weight)
        rows[:, 0] = 0.25
        return self.head(rows.clamp_(min=0))


def grouped() -> nn.Sequential:
    depthwise, grouped = nn.Conv2d(4, 8, 3, 1, 1, groups=4), nn.Conv2d(8, 6, 3, 1, 1, groups=2, bias=False)
    begin = nn.Conv2d(2, 4, 3, 1, 1), nn.ReLU(), depthwise, nn.ReLU(), nn.MaxPool2d(2)
    return nn.Sequential(*begin, grouped, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(24, NUM_CLASSES))


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.forward = function


def tokens() -> nn.Sequential:
    begin = nn.Conv2d(2, 4, 4, 4), nn.Flatten(2), Apply(lambda x: x.mT), nn.Linear(4, 5), nn.ReLU()
    return nn.Sequential(*begin, nn.Linear(5, 4, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(16, NUM_CLASSES))


def encoder() -> nn.Sequential:
    """Patches as tokens in two encoder layers, samples behind the tokens, and the mean of the tokens."""
    begin = nn.Conv2d(2, 4, 4, 4), Apply(lambda x: x.flatten(2).permute(2, 0, 1))
    layers = (nn.TransformerEncoderLayer(4, 2, 6, norm_first=True) for _ in range(2))
    return nn.Sequential(*begin, *layers, Apply(lambda x: x.mean(0)), nn.Linear(4, NUM_CLASSES))


def network_of(architecture: str, **changes) -> nn.Module:
    config = trainer_config((5,), 1, architecture=architecture, channels=(3, 4), bias=True, **changes)
    return config.network(SIZE, NUM_CLASSES)


# Each has a function that makes it; the neurons of the columns and of the rows of every layer, by hand: `a3*9-b4` has
# nine columns of each a and a row of each b, `a4*9-b4/2` is two groups, each with its own columns and rows; and the
# shape of the value at which a network begins midway, by layers.
NETWORKS = {
    "mlp": (lambda: nn.Sequential(nn.AvgPool2d(4), *mlp([8, 6, 5, NUM_CLASSES], True)), "i8-a6 a6-b5 b5-o3",
            {1: (6,), 2: (5,)}),
    "cnn": (lambda: network_of("cnn"), "i2*9-a3 a3*9-b4 b4*4-c5 c5-o3",
            {0: (2, 8, 8), 1: (3, 4, 4), 2: (16,), 3: (5,)}),
    "airbench": (lambda: network_of("airbench", blocks=2),
                 "i2*4-a16 a16*9-b3 b3*9-c3 c3*9-d4 d4*9-e4 e4-f5 f5-o3",
                 {1: (16, 7, 7), 3: (3, 3, 3), 5: (4,), 6: (5,)}),
    "resnet": (lambda: network_of("resnet"), "i2*9-a3 a3*9-b3 b3*9-a3 a3-d4 a3*9-c4 c4*9-d4 d4-o3",
               {1: (3, 8, 8), 2: (3, 8, 8), 3: (3, 8, 8), 5: (3, 8, 8), 6: (4,)}),
    "joined": (Joined, "i2*9-a3 a3-a3 i2-b2 d10*9-c4 x5*3-d10/5 c4*4-o3", {1: (2, 8, 8), 4: (5, 8, 8), 5: (16,)}),
    "varied": (Varied, "i2*9-a4 a4*6-a4 g4*6-b3 a4-g4/2 b3*6-o3", {1: (4, 4, 4), 4: (18,)}),
    "grouped": (grouped, "i2*9-a4 a4*9-b8/4 b8*9-c6/2 c6*4-o3", {1: (4, 8, 8), 2: (8, 4, 4), 3: (24,)}),
    "encoder": (encoder, "i2*16-a4 t4-q12 v4-w4 s4-h6 h6-r4 r4-p12 u4-x4 r4-g6 g6-r4 z4-o3", {1: (4, 4), 5: (4, 4)}),
    "windows": (Windows, "i2*4-a4 s4-h5 h5-r4 x4-g1 y4-o3", {1: (2, 2, 2, 2, 4), 3: (16, 4), 4: (4,)}),
    "spaced": (Spaced, "i2*5-a6/2 j1*18-b3 x9-c4 c4-o3", {1: (2, 8, 8), 2: (9, 6), 3: (4,)}),
    "functional": (Functional, "x16-r6 i2*16-a4 y6-o3", {0: (16,), 1: (2, 8, 8), 2: (6,)}),
    "tokens": (tokens, "i2*16-a4 x4-b5 b5-c4 y16-o3", {1: (4, 4), 2: (4, 5), 3: (16,)}),
}  # fmt: skip
ENDS = {name: ends for name, (_, ends, _) in NETWORKS.items()}
COUNTS = {name: len(ends.split()) for name, ends in ENDS.items()}
some_layers = pytest.mark.parametrize(
    "name, layers", [("mlp", [1]), ("resnet", [1]), *((name, each) for name in NETWORKS for each in ([2, 0], None))]
)


@functools.cache
def trace_of(name: str) -> Trace:
    """The trace of another network of the same architecture."""
    return HookedClassifier(NETWORKS[name][0]().double(), images(2)).trace


def classifier_of(name: str) -> HookedClassifier:
    trace = trace_of(name)
    torch.manual_seed(0)
    network = NETWORKS[name][0]().double()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.running_mean, module.bias.data):
                values.normal_(0, 0.3)
            for values in (module.running_var, module.weight.data):
                values.uniform_(0.5, 2)
    return HookedClassifier(network, trace)


def images(count: int = 6) -> Tensor:
    return torch.randn(count, *SIZE, generator=seeded("images"), dtype=torch.float64)


def labelled(per_class: int = 6) -> Split:
    return Split(images(NUM_CLASSES * per_class), torch.arange(NUM_CLASSES).repeat(per_class))


def incidence(ends: str, layers: list[int] | None) -> Tensor:
    """(vertices, neurons): how many ends each weight has at each neuron."""
    pairs: list[tuple[str, str]] = []
    for index, layer in enumerate(ends.split()):
        sides, _, groups = layer.partition("/")
        neurons = []
        for side in sides.split("-"):
            letter, count, times = re.fullmatch(r"(.)(\d+)\*?(\d*)", side).groups()
            neurons.append(np.repeat([f"{letter}{number}" for number in range(int(count))], int(times or 1)))
        if layers is None or index in layers:
            for columns, rows in zip(*(np.split(each, int(groups or 1)) for each in neurons)):
                pairs += [(column, row) for row, column in product(rows, columns)]
    names = sorted({neuron for pair in pairs for neuron in pair})
    return torch.tensor([[float(pair.count(name)) for name in names] for pair in pairs], dtype=torch.float64)


@pytest.mark.parametrize("mask_layer", [-2, [2, 0], None])
def test_the_weight_graph_is_the_line_graph_of_the_network(mask_layer):
    from torch_geometric.data import Data
    from torch_geometric.transforms import LineGraph

    sizes, network = (7, 6, 5, 3), []
    graph = WeightGraph(HookedMNISTClassifier(sizes[1:-1], sizes[0], sizes[-1]).trace.layers, mask_layer)
    for layer in graph.layers:
        network += [((layer, c), (layer + 1, r)) for r, c in product(range(sizes[layer + 1]), range(sizes[layer]))]
    neurons = sorted({neuron for pair in network for neuron in pair})
    numbered = [tuple(map(neurons.index, pair)) for pair in network]
    both_ways = torch.tensor([*numbered, *((b, a) for a, b in numbered)]).T
    line = LineGraph()(Data(edge_index=both_ways, num_nodes=len(neurons))).edge_index
    names = [numbered.index(pair) for pair in sorted(numbered)]  # PyG numbers the weights in sorted order
    expected = sorted({(names[u], names[v]) for u, v in line.T.tolist() if u != v})
    assert list(map(tuple, graph.edge_index().T.tolist())) == expected and graph.num_edges == len(expected)


@some_layers
def test_the_weight_graph_and_the_gcn_are_those_of_the_network_by_brute_force(name, layers):
    from torch_geometric.nn import SAGEConv  # takes seconds, which other tests on these networks need not

    rounds = 1 if layers == [1] else 3
    graph = WeightGraph(classifier_of(name).trace.layers, layers)
    ends = incidence(ENDS[name], layers)
    neighbours = ends @ ends.T - 2 * torch.eye(len(ends), dtype=torch.float64)
    degrees = neighbours.sum(1)
    of_layers = graph.matrices(torch.zeros(graph.num_vertices))
    found = torch.cat([(x + degree).flatten() for x, degree in zip(of_layers, graph.degrees)])
    assert torch.equal(found, degrees.float()) and graph.num_edges == degrees.sum()
    edges = torch.zeros_like(neighbours).index_put_(tuple(graph.edge_index()), degrees.new_tensor(1), accumulate=True)
    assert torch.equal(edges, neighbours)
    gcn = MaskingGCN(4, 6, rounds).double()
    convs = nn.ModuleList(SAGEConv(n, 6, bias=False) for n in (4, 6, 6)[:rounds]).double()
    convs.load_state_dict(gcn.convs.state_dict())
    nn.init.normal_(gcn.readout.weight)
    features = torch.randn(2, 4, len(ends), dtype=torch.float64, requires_grad=True)
    weighting, x = torch.randn(2, len(ends), 2, dtype=torch.float64), features.mT  # not contiguous
    y = x
    for index, conv in enumerate(convs):
        y = conv(y, graph.edge_index())
        y = y if index == 0 < rounds - 1 else y.relu()
    logarithms = y @ gcn.readout.weight.T
    logarithms = logarithms - logarithms.mean(1, keepdim=True)
    output, expected = gcn(x, graph), (LARGEST_CHANGE * (logarithms / LARGEST_CHANGE).tanh()).exp()
    assert torch.allclose(output, expected, rtol=0, atol=1e-10)
    by_edges = torch.autograd.grad((expected * weighting).sum(), [features, *convs.parameters(), gcn.readout.weight])
    gradients = torch.autograd.grad((output * weighting).sum(), [features, *gcn.parameters()])
    for gradient, of_edges in zip(gradients, by_edges, strict=True):
        assert torch.allclose(gradient, of_edges, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", NETWORKS)
def test_recorded_gradients_of_kernels_are_those_of_autograd_one_sample_at_a_time(name):
    classifier, split = classifier_of(name), labelled(2)
    record = classifier.record(split.images, split.labels, range(COUNTS[name]))
    pairs = zip(split.images, split.labels.tolist())
    odds = torch.stack([log_odds(classifier.network, x, label, [0, 1, 2]) for x, label in pairs])
    by_sample = [torch.autograd.grad(value, classifier.weights, retain_graph=True) for value in odds]
    singles = [torch.stack(of_layer) for of_layer in zip(*by_sample)]
    assert torch.allclose(record.log_odds, odds) and torch.equal(record.kept_log_odds, record.log_odds)
    for single, layer in zip(singles, record.layers, strict=True):
        if isinstance(layer, PositionRecord):
            gradients = layer.weight_gradient
        else:
            gradients = layer.log_odds_gradient[:, :, None] * layer.inputs[:, None]
        assert torch.allclose(gradients.view_as(single), single, rtol=0, atol=1e-12)
    q = 1 - odds.sigmoid()
    for squares, single in zip(fisher_information(classifier, split), singles):
        expected = (q.square() @ single.flatten(1).square() / len(q)).view_as(squares)
        assert torch.allclose(squares, expected, rtol=1e-9, atol=1e-12)


def test_recorded_activations_stand_behind_normalisation_addition_and_relu():
    classifier = classifier_of("varied")
    records = classifier.record(images(), torch.zeros(6).long(), [0, 1, 2, 4]).layers
    hidden = *classifier.network.hidden(images()), classifier.network(images())
    for record, expected, is_rectified in zip(records, hidden, (True, True, False, False)):
        h, active = expected.view_as(record.outputs), record.active
        assert torch.allclose(record.outputs, h, atol=1e-12)
        assert torch.equal(active, (h > 0).double().clamp_min(1 - is_rectified))
    assert torch.allclose(records[3].inputs, hidden[2].flatten(1), atol=1e-12) and (records[2].outputs < 0).any()


@pytest.mark.parametrize(
    "mask_layer, numbers, is_updated", [(0, 2**26, True), ([1, -1], 1, False), ([-2, -1], 1, True)]
)
def test_requests_take_a_snapshot_before_every_step_where_gradients_by_kernels_are_too_many_to_be_kept(
    mask_layer, numbers, is_updated, monkeypatch
):
    monkeypatch.setattr("mimu.hooked.NUMBERS_AT_ONCE", numbers)
    graphs = GraphGenerator(classifier_of("cnn"), labelled(), graph_config(mask_layer), 0)
    zeroed = []
    for every in (1, None):
        config = replace(load_config().eval, step=9, snapshot_every=every)
        zeroed.append(next(step.vertices for step in prune(graphs, 1, config, 0) if len(step.vertices) >= 45))
    assert torch.equal(*zeroed) == (not is_updated)


MASKED = [
    ("cnn", [1, -2], 1), ("cnn", None, 2), ("cnn", [-2, -1], 0), ("cnn", [-2, -1], None),
    ("grouped", [1, 2], 1), ("tokens", [1, 2, 3], None),
]  # fmt: skip


@pytest.mark.parametrize("numbers", [1, 2**26])
@pytest.mark.parametrize("name, mask_layer, forget", MASKED)
def test_features_of_kernels_are_those_of_their_definitions(monkeypatch, name, mask_layer, forget, numbers):
    monkeypatch.setattr("mimu.hooked.NUMBERS_AT_ONCE", numbers)
    graphs = GraphGenerator(classifier_of(name), labelled(), graph_config(mask_layer), 0)
    assert bool(graphs.recorded()["records"]) == (mask_layer == [-2, -1])
    graphs.at_once = min(9, graphs.at_once)  # of 12
    samples = graphs.draw(4, seeded("test"))
    for zeroed in (graphs.nothing, torch.arange(0, graphs.graph.num_vertices, 7)):
        snapshot = graphs.snapshot(samples, forget or 0, zeroed, tuple(FEATURES), forgets=forget is not None)
        among = {forget: [0, 1, 2]}
        others = [label for label in range(NUM_CLASSES) if label != forget]
        by_hand = [Group(graphs, zeroed, rows, among.get(label, others)) for label, rows in enumerate(samples)]
        assert_by_hand(snapshot, by_hand.pop(forget or 0), by_hand)


@some_layers
def test_a_network_with_other_weights_is_the_masked_one_and_gradients_reach_these_alone(name, layers):
    classifier, x = classifier_of(name), images(3)
    graph = WeightGraph(classifier.trace.layers, layers)
    zeroed = torch.randperm(graph.num_vertices)[: graph.num_vertices // 3]
    mask = graph.zeroing(zeroed)
    vector = torch.cat([part.flatten() for part in mask.keep])
    assert torch.equal(vector, torch.ones(graph.num_vertices).index_fill(0, zeroed, 0))
    assert torch.equal(graph.keeping(zeroed).as_tensor().flatten(), 1 - vector) and mask.layers == tuple(graph.names)
    keep = vector.double().requires_grad_()
    weights = masked_weights(classifier, graph, keep)
    inputs = classifier.prefix_activations(graph.layers, x)
    features, logits = classifier.suffix_from(graph.layers).outputs(inputs, weights)
    assert list(weights) == [classifier.names[layer] for layer in graph.layers] == graph.names
    weighting = torch.randn(logits.shape, dtype=torch.float64)
    by_hand = functional_call(classifier.network, weights, x)
    (gradient,) = torch.autograd.grad((logits * weighting).sum(), keep, retain_graph=True)
    (expected,) = torch.autograd.grad((by_hand * weighting).sum(), keep, retain_graph=True)
    assert torch.allclose(gradient, expected, atol=1e-12) and gradient.abs().sum() > 0
    logits.sum().backward()
    assert all(weight.grad is None and weight.requires_grad for weight in classifier.parameters())
    with mask.applied_to(classifier):
        assert torch.allclose(logits, classifier(x), atol=1e-12)
        assert torch.allclose(features, classifier.outputs(x)[0], atol=1e-12)


def test_classifiers_of_one_config_share_a_trace_and_making_one_draws_its_own_weights_alone(split):
    config = configured("mlp")
    one, other = (Trainer(config.classifier, seed).initial(split.images, NUM_CLASSES) for seed in (0, 1))
    assert one.trace is other.trace and not torch.equal(one.weights[0], other.weights[0])
    states = []
    for _ in range(2):  # the first of which is traced
        torch.manual_seed(0)
        HookedMNISTClassifier((9, 4), 11)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_begins_midway_at_the_last_single_value_before_the_layers(name):
    classifier, x = classifier_of(name), images(4)
    count, expected = COUNTS[name], classifier.network(x)
    assert len(classifier.names) == count
    for layers in ([0], [1], [2], [2, 1], [count - 1, 2], list(range(count))):
        logits = classifier.suffix_from(layers)(classifier.prefix_activations(layers, x))
        assert torch.allclose(logits, expected, rtol=1e-4, atol=1e-5)
    begins = NETWORKS[name][2]
    assert {layer: tuple(classifier.prefix_activations([layer], x).shape[1:]) for layer in begins} == begins


@pytest.mark.parametrize("at_once", [1, 2**26])
@pytest.mark.parametrize("name", ["mlp", "resnet", "varied", "grouped", "windows", "spaced"])
def test_the_mean_input_of_a_layer_makes_its_mean_output(name, at_once, monkeypatch):
    monkeypatch.setattr("mimu.hooked.NUMBERS_AT_ONCE", at_once)
    classifier, x = classifier_of(name), images(3)
    outputs: dict[nn.Module, Tensor] = {}
    layers = [classifier.network.get_submodule(name.removesuffix(".weight")) for name in classifier.names]
    for layer in layers:
        layer.register_forward_hook(lambda layer, inputs, output: outputs.update({layer: output}))
    classifier.network(x)
    for index, layer in enumerate(layers):
        output = outputs[layer] if isinstance(layer, nn.Linear) else outputs[layer].movedim(1, -1)
        weight = torch.block_diag(*layer.weight.flatten(1).chunk(getattr(layer, "groups", 1)))
        mean = classifier.mean_inputs(index, x) @ weight.T + (0 if layer.bias is None else layer.bias)
        assert torch.allclose(mean, output.reshape(len(x), -1, output.shape[-1]).mean(1))


CHANGES = (
    "gcn.kappa=[3, 20]", "gcn.partly_masked=[3, 20]", "gcn.hidden=4", "gcn.steps=6", "eval.step=3",
    "graphs.samples_per_class=8", "sweep.kappa=[9]", "eval.max_kappa=20",
    "classifier.channels=[3, 4]", "classifier.hidden_sizes=[5]", "classifier.batch_size=8", "classifier.epochs=2",
    "graphs.mask_layer=null",
)  # fmt: skip
TINY = {"epochs": 1, "batch_size": 8, "steps": 3, "samples": 12}
TINY_VIT = "classifier.channels=[4]", "classifier.hidden_sizes=[5]", "classifier.heads=2", "classifier.patch=4"


def configured(architecture: str, *changes: str) -> Config:
    return load_config(overrides=[*CHANGES, f"classifier.architecture={architecture}", *changes])


@pytest.mark.parametrize("architecture, mask_layer", [("resnet", None), ("vit", (1, 4))])
def test_every_method_answers_and_leaves_weights_statistics_and_modes_of_the_original(architecture, mask_layer):
    config = configured(architecture, *(TINY_VIT if architecture == "vit" else ()))
    split = Split(torch.randn(36, 3 * 8 * 8, generator=seeded("pixels")), torch.arange(NUM_CLASSES).repeat(12))
    trainer = Trainer(config.classifier, 0, (3, 8, 8))
    classifier = trainer.train(split, NUM_CLASSES)
    assert not any(module.training for module in classifier.modules())
    classifier.train()  # as somebody else may hand it over
    before = copy.deepcopy(classifier.state_dict())
    described = replace(config.graphs, mask_layer=mask_layer)
    graphs = GraphGenerator(classifier, split, described, 0)
    gcn = GCNTrainer(config.gcn, [graphs], 5.0, 0).train()
    assert all(torch.equal(value, before[key]) for key, value in classifier.state_dict().items())
    own = {}
    for name, values in config.eval.hyperparameters.items():
        own[name] = {key: min(value, TINY.get(key, value)) for key, value in values.items()}
    tiny = replace(config.eval, hyperparameters=own)
    request = Request(
        tiny, classifier, trainer, split, graphs, gcn, forget_class=1, top_k=20, seed=0, requested_kappa=9
    )
    for requested_kappa, name in [*((9, name) for name in METHODS), ("auto", "mimu"), ("auto", "saliency")]:
        unlearned = run_method(replace(request, requested_kappa=requested_kappa), name)
        logits = unlearned.model(split.images)
        assert logits.shape == (36, NUM_CLASSES) and (logits.isfinite() | (logits == -torch.inf)).all(), name
        assert requested_kappa == "auto" or not METHODS[name].uses_kappa or unlearned.mask.num_zeroed == 9
        for key, module in (*unlearned.model.named_modules(), *request.original.named_modules()):
            assert "parametrizations" in key or not module.training, name
        assert all(torch.equal(value, before[key]) for key, value in request.original.state_dict().items()), name
        after = unlearned.model.state_dict()
        same = [torch.equal(value, after.get(key, value)) for key, value in before.items() if "running" in key]
        assert all(same) or METHODS[name].touches not in ("nothing", "a mask", "the output"), name
        assert name not in ("fine_tune", "scrub") or not any(same), "training follows the statistics"


class Unmaskable(nn.Module):
    """Layers called twice, tied, computed, in a list, of no sample, and of samples in no order that can be undone."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.twice = nn.Conv2d(2, 4, 2, 2), nn.Conv2d(4, 4, 1, bias=False)
        self.of_no_sample, self.scale = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 4))
        self.one, self.tied = nn.Linear(4, 4), nn.Linear(4, 4)
        self.computed, self.split = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(8, 4))
        self.listed, self.head = nn.ParameterList([torch.randn(4, 4)]), nn.Linear(4, NUM_CLASSES)
        self.mingled = nn.Linear(4, 4)
        self.tied.weight, self.second_name = self.one.weight, self.patches  # the latter does no harm

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(self.patches(x)).relu())
        halves = x.unflatten(2, (2, -1)).permute(2, 0, 3, 4, 1)  # samples neither in front nor last
        x = self.mingled(halves.reshape(-1, 4)).unflatten(0, halves.shape[:-1]).mean((0, 2, 3))
        x = self.tied(self.one(x)) + self.of_no_sample(self.scale).sum(0)
        x = F.linear(x, self.computed / 2) + F.linear(x, self.split[:4])
        return self.head(F.linear(x, self.listed[0]))


def test_what_masks_cannot_be_put_on_is_not_among_the_layers():
    classifier = HookedClassifier(Unmaskable().double(), images(2))
    assert classifier.names == ["patches.weight", "head.weight"]
    assert torch.allclose(classifier.outputs(images())[1], classifier.network(images()), atol=1e-12)


VIT = "classifier.channels=[12]", "classifier.hidden_sizes=[20]", "classifier.heads=3", "classifier.patch=9"
SMALL = "classifier.channels=[4, 6]", "classifier.hidden_sizes=[9]", "classifier.blocks=2"
# What is configured, its name, the layers that can be masked and the weights in those that are.
CONFIGURED = [
    ("resnet", ("graphs.mask_layer=1", *SMALL), "ResNet-10", 11, 4 * 4 * 9),
    ("vit", ("graphs.mask_layer=[7, 8]", *VIT, "classifier.blocks=2"), "ViT/9 12-20, blocks: 2", 10, 2 * 12 * 20),
    ("cnn", (*SMALL, "classifier.bias=true"), "cnn 1-4-6-9-10 with biases", 4, 36 + 216 + 9 * 294 + 90),
    ("airbench", SMALL, "airbench 1-8-4-4-6-6-9-10", 7, 32 + 288 + 144 + 216 + 324 + 54 + 90),
]


@pytest.mark.parametrize("architecture, changes, name, layers, vertices", CONFIGURED)
def test_networks_are_those_of_the_config(architecture, changes, name, layers, vertices):
    config, x = configured(architecture, *changes), torch.rand(2, 784)
    network = config.classifier.network((28, 28), 10).eval()
    classifier = HookedClassifier(network, x)
    assert network(x).shape == (2, 10) and torch.allclose(network(x.view(2, 28, 28)), network(x)), "pixels as one row"
    assert config.architecture == name and config.num_vertices == vertices
    assert config.shapes == classifier.shapes and len(config.shapes) == layers
    if architecture == "vit":
        assert classifier.names[7:9] == ["blocks.1.linear1.weight", "blocks.1.linear2.weight"]
        moved = torch.cat([x.view(2, 28, 28)[:, each] for each in (slice(9, 18), slice(9), slice(18, 28))], 1)
        assert not torch.allclose(network(moved), network(x), atol=1e-4), "positions count"


def test_airbench_starts_with_kernels_that_whiten_patches_of_its_training_images():
    torch.manual_seed(0)
    images = 9 * torch.randn(1000, 28, 28).cumsum(1) + torch.randn(1000, 28, 28)  # rows that are alike
    first = Trainer(configured("airbench").classifier, 0, (28, 28)).initial(images.flatten(1), 10).network[2]
    read = F.conv2d(images[:, None], first.weight).movedim(1, 3).flatten(0, 2).double()
    assert torch.allclose(read[:, :4].T @ read[:, :4] / len(read), torch.eye(4).double(), atol=0.01)
    assert torch.equal(first.weight[4:], -first.weight[:4])


@pytest.mark.parametrize(
    "architecture, setting, message",
    [
        ("cnn", "channels=[1, 1, 1, 1, 1]", "channels must be fewer than 5: nothing is left"),
        ("cnn", "channels=[]", "channels must name one at least for"),
        ("airbench", "channels=[1, 1, 1, 1, 1]", "channels must be fewer than 5: nothing is left of 27 x 27"),
        ("vit", "channels=[4, 6]", "channels and hidden_sizes must each be one number for vit, not [4, 6, 20]"),
        ("vit", "heads=5", "heads must divide the width, channels of [12], not 5"),
        ("vit", "patch=29", "patch must be at most 28, not 29: there is none in (28, 28) pixels"),
    ],
)
def test_networks_that_cannot_be_are_named(architecture, setting, message):
    with pytest.raises(ConfigError, match=rf"^[^\n]*: {re.escape(message)}[^\n]*$"):
        configured(architecture, *(VIT if architecture == "vit" else ()), f"classifier.{setting}")


@pytest.mark.parametrize("message_passing", [True, False])
def test_factors_are_1_before_the_training_and_do_not_depend_on_the_graphs_seen_together(message_passing):
    torch.manual_seed(0)
    graph = WeightGraph(HookedMNISTClassifier((64,), 128).trace.layers, None)
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
    assert torch.allclose(gcn(x, WeightGraph(classifier.trace.layers, -2)), expected, rtol=1e-5)


def test_where_nothing_of_a_graph_is_above_zero_the_gradient_passes_as_if_all_were():
    torch.manual_seed(0)
    x, matrix = torch.rand(2, 2, 3, 5, 4).double(), torch.rand(4, 6).double().requires_grad_()
    source, target = (-torch.rand(2, 2, size, 6).double().requires_grad_() for size in (5, 3))
    signs = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1, 1)
    y = (x * signs) @ matrix + source[:, :, None] + target[..., None, :]
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
    w0, w1, w2 = (weight.detach() for weight in classifier.weights)
    b0, b1, b2 = (classifier.network[index].bias if bias else 0 for index in (1, 3, 5))
    first = (split.images @ w0.T + b0).clamp(min=0)
    representation = (first @ w1.T + b1).clamp(min=0)
    expected = representation @ w2.T + b2
    for features, logits in (classifier.outputs(split.images), classifier.suffix_from([1]).outputs(first)):
        assert torch.allclose(features, representation, atol=1e-6) and torch.allclose(logits, expected, atol=1e-6)
    assert torch.allclose(classifier(split.images.view(-1, 1, 7)), expected, atol=1e-6), "images are flattened"
    assert classifier.shapes == [(6, 7), (5, 6), (3, 5)]


def test_looking_into_a_classifier_leaves_no_gradient_behind_and_its_weights_free_after_errors_too(classifier, split):
    classifier.weights[0].requires_grad_(False)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied|size"):
        classifier.outputs(split.images, {classifier.names[1]: torch.zeros(5, 9)})
    with pytest.raises((IndexError, RuntimeError)):
        classifier.record(split.images, torch.full_like(split.labels, 99), [1])
    record = classifier.record(split.images, split.labels, [1, 2])
    assert not any(x.requires_grad for x in (*record.layers[0], *record.layers[1], record.log_odds))
    assert [weight.requires_grad for weight in classifier.parameters()] == [False, True, True]
    assert all(weight.grad is None for weight in classifier.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in classifier.modules())
