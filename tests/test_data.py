"""Splits, the sealed test split, per-sample gradients, and vertex features against autograd one sample at a time."""

import copy
import gzip
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import (
    NUM_CLASSES,
    as_matrix,
    carried,
    graph_config,
    graph_generator,
    random_classifier,
    random_split,
    representation,
    ridge_recalls,
)

import artifacts
import data
from data import (
    FEATURES,
    DataError,
    GraphGenerator,
    ImageData,
    Split,
    load_image_data,
    number_of_weights,
    seeded,
)
from model import Mask, WeightGraph


def test_mnist_is_the_original(tmp_path):
    images = load_image_data("MNIST")
    assert images.train.images.shape == (60000, 784) and images.test.images.shape == (10000, 784)
    assert torch.bincount(images.test.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert abs(images.train.images.mean()) < 1e-3 and abs(images.train.images.std() - 1) < 1e-3
    assert images.test.images.min() == images.train.images.min(), "both are standardised by the training split"


def test_held_out_samples_are_training_samples_in_the_place_of_the_test_split():
    whole, held_out = load_image_data("MNIST"), load_image_data("MNIST", held_out=10_000)
    deviation, mean = torch.std_mean(whole.train.images[:50_000])
    standardised = (whole.train.images - mean) / deviation
    assert torch.allclose(held_out.train.images, standardised[:50_000], atol=1e-4)
    assert torch.allclose(held_out.test.images, standardised[50_000:], atol=1e-4)
    assert torch.equal(torch.cat([held_out.train.labels, held_out.test.labels]), whole.train.labels)


@pytest.mark.parametrize("amount, expected", [(7, 7), (0.25, 250), (0.0018, 2), (0.0001, 1)])
def test_amounts_are_numbers_of_weights_or_shares_of_them(amount, expected):
    assert number_of_weights(amount, 1000) == expected


@pytest.mark.parametrize("name", ["FashionMNIST", "KMNIST"])
def test_other_data_sets_are_read_by_the_same_interface(tmp_path, name):
    raw = tmp_path / name / "raw"
    raw.mkdir(parents=True)
    for packed in (data.DATASET_ROOT / "MNIST" / "raw").glob("*.gz"):
        with gzip.open(packed) as source, open(raw / packed.stem, "wb") as target:
            shutil.copyfileobj(source, target)
    assert torch.equal(load_image_data(name, tmp_path).train.labels, load_image_data("MNIST").train.labels)


def test_missing_files_are_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", ["file:///nowhere/"])
    with pytest.raises(DataError, match=r"dataset MNIST in .*: train-images-idx3-ubyte.gz, .* cannot be downloaded"):
        load_image_data("MNIST", tmp_path)


def write_data_set(folder, images: torch.Tensor, labels: torch.Tensor, test_labels: torch.Tensor) -> None:
    """A data set of ones own, in the format of MNIST."""
    raw = folder / "KMNIST" / "raw"
    raw.mkdir(parents=True)
    for part, of_part in (("train", labels), ("t10k", test_labels)):
        pictures = images[: len(of_part)].to(torch.uint8)
        header = b"".join(number.to_bytes(4, "big") for number in (0x803, *pictures.shape))
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + pictures.numpy().tobytes())
        header = b"".join(number.to_bytes(4, "big") for number in (0x801, len(of_part)))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(header + of_part.to(torch.uint8).numpy().tobytes())


IMAGES, LABELS = torch.arange(30 * 784).view(30, 28, 28) % 256, torch.arange(30) % 10


def test_a_data_set_of_ones_own_is_read(tmp_path):
    write_data_set(tmp_path, IMAGES, LABELS, LABELS[:10])
    own = load_image_data("KMNIST", tmp_path)
    assert torch.equal(own.train.labels, LABELS) and own.test.images.shape == (10, 784)
    assert len(data.checksums("KMNIST", tmp_path)) == 4 and data.checksums("FashionMNIST", tmp_path) == {}


@pytest.mark.parametrize(
    "images, labels, test_labels, message",
    [
        (IMAGES, LABELS.clamp(max=8), LABELS[:10], "class 9 has no training sample"),
        (IMAGES, LABELS, LABELS[:9], "class 9 has no test sample"),
        (IMAGES, LABELS + 1, LABELS, "has labels from 1 to 10, not from 0 to 9"),
        (IMAGES[:, :20], LABELS, LABELS, r"holds images of shape \(30, 20, 28\) with 30 labels, not 28 x 28"),
        (IMAGES[:20], LABELS, LABELS, r"holds images of shape \(20, 28, 28\) with 30 labels, not 28 x 28"),
    ],
)
def test_a_data_set_that_cannot_work_is_refused(tmp_path, images, labels, test_labels, message):
    write_data_set(tmp_path, images, labels, test_labels)
    with pytest.raises(DataError, match=message):
        load_image_data("KMNIST", tmp_path)


def test_unpacked_files_that_cannot_be_read_are_named(tmp_path):
    write_data_set(tmp_path, IMAGES, LABELS, LABELS)
    (tmp_path / "KMNIST" / "raw" / "t10k-images-idx3-ubyte").write_bytes(b"nothing")
    with pytest.raises(DataError, match="dataset KMNIST in .*: its files cannot be read"):
        load_image_data("KMNIST", tmp_path)


def test_an_unknown_data_set_is_refused():
    with pytest.raises(ValueError, match="'CIFAR10' is not known: valid are MNIST"):
        load_image_data("CIFAR10")


def test_forget_and_retain_split_the_samples(split):
    forget, retain = split.forget(1), split.retain(1)
    assert set(forget.labels.tolist()) == {1} and set(retain.labels.tolist()) == {0, 2}
    assert len(forget.labels) + len(retain.labels) == len(split.labels)
    assert torch.equal(split.images[split.labels == 1], forget.images)


def test_a_loader_gives_every_sample_once_in_order(split):
    batches = list(split.loader(7))
    assert [len(labels) for _, labels in batches] == [7] * 8 + [4]
    assert torch.equal(torch.cat([images for images, _ in batches]), split.images)
    assert len(split.loader(7).dataset) == 60


def test_the_sealed_test_split_cannot_be_read(split):
    images = ImageData(split, split)
    with images.sealed(), images.sealed():
        assert images.train is split
        with pytest.raises(PermissionError, match="sealed"):
            _ = images.test
    assert images.test is split


def test_seeds_depend_on_their_whole_key():
    draws = [torch.rand(3, generator=seeded(*key)).tolist() for key in (("a", 1), ("a", 1), ("a", 2), ("b", 1))]
    assert draws[0] == draws[1] and len({tuple(draw) for draw in draws}) == 3


def one_sample_gradient(classifier, image, label, of):
    classifier.zero_grad()
    logits = classifier(image[None])
    value = F.cross_entropy(logits, label[None]) if of == "loss" else logits[0, label] - logits.mean()
    value.backward()
    return [layer.weight.grad.clone() for layer in classifier.layers]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mask_layer", [0, -2, -1, [0, 2], None])
def test_recorded_gradients_are_those_of_autograd_one_sample_at_a_time(mask_layer, bias):
    graphs = graph_generator(mask_layer, torch.float64, bias)
    for index in range(0, len(graphs), 4):
        image, label = graphs.samples.images[index], graphs.samples.labels[index]
        for of in ("loss", "margin"):
            expected = one_sample_gradient(graphs.classifier, image, label, of)
            for layer, record in zip(graphs.graph.layers, graphs.records):
                gradient = torch.outer(getattr(record, f"{of}_gradient")[index], record.inputs[index])
                assert torch.allclose(gradient, expected[layer], rtol=0, atol=1e-12)


def features_by_hand(graphs, samples, masked=None):
    """The features of one group in one masked layer by their definitions, a sample at a time, not standardised."""
    layer = graphs.graph.layers[0]
    classifier = random_classifier(dtype=torch.float64)
    if masked is not None:
        classifier.layers[layer].weight.data.view(-1)[masked] = 0
    w = classifier.layers[layer].weight.detach()
    sums = {name: torch.zeros_like(w) for name in ("a", "h", "g", "g2", "margin", "co")}
    for index in samples.tolist():
        image, label = graphs.samples.images[index], graphs.samples.labels[index]
        a = (classifier.layers[0].weight @ image).relu()
        z = w @ a
        sums["a"] += a.expand_as(w)
        sums["h"] += z.relu()[:, None].expand_as(w)
        sums["co"] += (z > 0).double()[:, None] * a
        gradient = one_sample_gradient(classifier, image, label, "loss")[layer]
        sums["g"] += gradient
        sums["g2"] += gradient**2
        sums["margin"] += one_sample_gradient(classifier, image, label, "margin")[layer]
    mean = {name: (total / len(samples)).detach() for name, total in sums.items()}
    return {
        "input_activation": mean["a"],
        "output_activation": mean["h"],
        "weight": w,
        "gradient": mean["g"],
        "effect": w * mean["g"],
        "fisher": w.abs() * mean["g2"].sqrt(),
        "margin": w * mean["margin"],
        "coactivation": w.abs() * mean["co"],
    }


def standardised(x):
    return (x - x.mean()) / x.std() if x.std() > 0 else torch.zeros_like(x)


@pytest.mark.parametrize("masked", [None, [0, 3, 17]])
def test_class_graphs_are_the_features_by_their_definitions(masked):
    graphs = graph_generator(-2, torch.float64)
    samples = graphs.draw(5, seeded("test"))
    mask = None if masked is None else Mask.zeroing(graphs.graph, torch.tensor(masked))
    x, loss = graphs.class_graphs(samples, mask)
    by_hand = [features_by_hand(graphs, group, masked) for group in samples]
    assert x.shape == (NUM_CLASSES, 30, 15)
    for label in range(NUM_CLASSES):
        for column, name in enumerate(FEATURES):
            expected = standardised(by_hand[label][name].flatten())
            assert torch.allclose(x[label, :, column], expected, atol=1e-9), name
        for column, name in enumerate((name for name in FEATURES if name != "weight"), start=8):
            others = sum(by_hand[other][name] for other in range(NUM_CLASSES) if other != label) / (NUM_CLASSES - 1)
            assert torch.allclose(x[label, :, column], standardised(others.flatten()), atol=1e-9), f"others: {name}"
    classifier = random_classifier(dtype=torch.float64)
    if masked is not None:
        classifier.layers[1].weight.data.view(-1)[masked] = 0
    logits = classifier(graphs.samples.images[samples.flatten()])
    losses = F.cross_entropy(logits, graphs.samples.labels[samples.flatten()], reduction="none")
    assert torch.allclose(loss, losses.view(NUM_CLASSES, 5).mean(1), atol=1e-12)


def test_features_can_be_chosen():
    graphs = graph_generator(features=("weight", "margin"), other_classes=False)
    x, _ = graphs.class_graphs(graphs.draw(5, seeded("test")))
    full, _ = graph_generator().class_graphs(graphs.draw(5, seeded("test")))
    assert graphs.config.num_features == x.shape[-1] == 2
    assert torch.equal(x, full[..., [2, 6]])


@pytest.mark.parametrize("mask_layer", [-1, None])
def test_the_output_layer_counts_as_always_active(mask_layer):
    graphs = graph_generator(mask_layer)
    logits = graphs.classifier(graphs.samples.images)
    assert torch.equal(graphs.records[-1].outputs, logits) and (logits < 0).any()
    assert graphs.records[-1].active.min() == 1
    if mask_layer is None:
        assert set(graphs.records[0].active.unique().tolist()) == {0.0, 1.0}


def test_a_masked_pass_with_nothing_masked_changes_nothing():
    for mask_layer in (-2, None):
        graphs = graph_generator(mask_layer)
        samples = graphs.draw(5, seeded("test"))
        unmasked = graphs.class_graphs(samples)
        whole = graphs.class_graphs(samples, Mask.zeroing(graphs.graph, torch.arange(0)))
        assert torch.allclose(unmasked[0], whole[0], atol=1e-4) and torch.allclose(unmasked[1], whole[1], atol=1e-5)


def test_get_data_is_the_graph_of_one_sample():
    graphs = graph_generator(-2, torch.float64)
    sample = graphs.get_data(20)
    by_hand = features_by_hand(graphs, torch.tensor([20]))
    for column, name in enumerate(FEATURES):
        assert torch.allclose(sample.x[:, column], standardised(by_hand[name].flatten()), atol=1e-9), name
    assert torch.equal(sample.edge_index, graphs.graph.edge_index())
    assert sample.y.tolist() == [1] and sample.validate()
    with pytest.raises(IndexError, match="valid are 0 to 44"):
        graphs.get_data(45)


def test_draws_take_samples_of_their_class_without_repetition(graphs):
    samples = graphs.draw(10, seeded("test"))
    assert samples.shape == (NUM_CLASSES, 10)
    assert torch.equal(graphs.labels[samples], torch.arange(NUM_CLASSES)[:, None].expand(-1, 10))
    assert all(len(set(group.tolist())) == 10 for group in samples)


def test_recorded_samples_are_training_samples_of_their_class(split):
    graphs = GraphGenerator(random_classifier(), split, graph_config(samples_per_class=1000), 0)
    assert len(graphs) == 60 and graphs.samples_per_class == 20
    rows = {tuple(image.tolist()) for image in split.images}
    assert all(tuple(image.tolist()) in rows for image in graphs.samples.images)


def test_a_class_without_samples_is_refused():
    only_two = random_split().retain(2)
    with pytest.raises(ValueError, match="class 2 has no training sample"):
        GraphGenerator(random_classifier(), only_two, graph_config(), 0)


def test_saved_graphs_hold_what_was_recorded(graphs, tmp_path):
    artifacts.save(tmp_path / "graphs.pt", graphs.recorded())
    saved = torch.load(tmp_path / "graphs.pt", weights_only=True)
    assert saved["layers"] == [1] and torch.equal(saved["labels"], graphs.labels)
    assert torch.equal(saved["records"][0]["loss_gradient"], graphs.records[0].loss_gradient)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"features": ("weigth",)}, "'weigth' is not known: valid are input_activation"),
        ({"features": ()}, "at least one"),
        ({"features": ("weight", "weight")}, "twice"),
        ({"samples_per_class": 0}, "samples_per_class must be at least 1"),
        ({"rivals": 0}, "rivals must be at least 1"),
        ({"ridge": 0.0}, "ridge must be above 0"),
        ({"ridge": -0.1}, "ridge must be above 0"),
    ],
)
def test_impossible_graph_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        graph_config(**change)


def test_rivals_are_the_nearest_classes_in_the_representation():
    graphs = graph_generator(dtype=torch.float64)
    x, y = as_matrix(representation(graphs.classifier, graphs.samples.images)), graphs.labels.numpy()
    means = [x[y == label].mean(0) for label in range(NUM_CLASSES)]
    for label, (rival,) in enumerate(graphs.rivals.tolist()):
        others = [other for other in range(NUM_CLASSES) if other != label]
        assert rival == min(others, key=lambda other: np.linalg.norm(means[other] - means[label]))
    assert graph_generator(rivals=9).rivals.sort().values.tolist() == [[1, 2], [0, 2], [0, 1]]


def test_rivals_are_those_of_the_whole_classifier_at_any_time():
    graphs, masked = graph_generator(None, erasure=True), graph_generator(None, erasure=True)
    masked.erasure(masked.draw(5, seeded("test")), [0], Mask.zeroing(masked.graph, torch.arange(30)))
    assert torch.equal(masked.rivals, graphs.rivals)


@pytest.mark.parametrize("rivals", [1, 2])
def test_its_own_samples_come_first_and_then_those_of_its_rivals(rivals):
    graphs = graph_generator(rivals=rivals)
    chosen = graphs.against_rivals(graphs.by_class(), [2, 0])
    for label, rows in zip((2, 0), chosen):
        labels = [label, *graphs.rivals[label].tolist()]
        assert graphs.labels[rows].tolist() == [each for each in labels for _ in range(15)]
    features = torch.randn(NUM_CLASSES, 15, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(graphs.against_rivals(features, [2, 0]), features.flatten(0, 1)[chosen])


def carried_with(graphs, samples, label, factors):
    """R^2 of the class where weights, by (layer, position), are multiplied with factors."""
    classifier = copy.deepcopy(graphs.classifier)
    for (layer, position), factor in factors.items():
        classifier.layers[layer].weight.data.view(-1)[position] *= factor
    return carried(graphs, classifier, samples, label)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("masked", [[], [0, 3, 11, 29]])
@pytest.mark.parametrize("mask_layer", [-2, [0, 2], None])
def test_erasure_is_what_scaling_a_weight_does_to_the_class(mask_layer, masked, bias):
    """Central differences of R^2 in the factor of one weight."""
    graphs = graph_generator(mask_layer, torch.float64, bias, erasure=True)
    samples = graphs.draw(12, seeded("test"))
    places = [(layer, i) for layer, size in zip(graphs.graph.layers, graphs.graph.sizes) for i in range(size)]
    gone = {places[vertex]: 0.0 for vertex in masked}
    falls = graphs.erasure(samples, [2, 0], Mask.zeroing(graphs.graph, torch.tensor(masked)) if masked else None)
    assert falls.shape == (2, len(places)) and (falls[:, masked] == 0).all()
    generator, step, seen = torch.Generator().manual_seed(0), 1e-5, 0
    for label, fall in zip((2, 0), falls.tolist()):
        for layer in graphs.graph.layers:
            of_layer = [vertex for vertex, place in enumerate(places) if place[0] == layer]
            for index in torch.randperm(len(of_layer), generator=generator)[:6].tolist():
                vertex = of_layer[index]
                up, down = (
                    carried_with(graphs, samples, label, {places[vertex]: 1 + sign * step} | gone) for sign in (1, -1)
                )
                assert fall[vertex] == pytest.approx((up - down) / (2 * step), rel=1e-4, abs=1e-8)
                assert layer < 2 or fall[vertex] == 0
                seen += abs(fall[vertex]) > 1e-4
    assert seen > 3


def test_the_output_layer_carries_nothing_into_the_representation():
    graphs = graph_generator(-1, erasure=True)
    assert (graphs.erasure(graphs.draw(5, seeded("test")), range(NUM_CLASSES)) == 0).all()


@pytest.mark.parametrize("bias", [False, True])
def test_a_unit_without_weights_leaves_the_erasure_of_the_others_finite(bias):
    graphs = graph_generator(None, bias=bias, erasure=True)
    unit = 42 + torch.arange(6)  # all that leads to the first unit of layer 1
    if bias:
        graphs.classifier.layers[1].bias.data[0] = 0.5
    falls = graphs.erasure(graphs.draw(12, seeded("test")), range(NUM_CLASSES), Mask.zeroing(graphs.graph, unit))
    assert falls.isfinite().all() and (falls[:, unit] == 0).all() and (falls[:, 48:72] != 0).any()


@pytest.mark.parametrize("other_classes", [True, False])
@pytest.mark.parametrize("masked", [None, [0, 3, 17]])
def test_the_erasure_is_one_more_feature(masked, other_classes):
    plain, graphs = (graph_generator(None, erasure=erasure, other_classes=other_classes) for erasure in (False, True))
    samples = graphs.draw(5, seeded("test"))
    mask = None if masked is None else Mask.zeroing(graphs.graph, torch.tensor(masked))
    expected, loss = plain.class_graphs(samples, mask)
    erasure = graphs.erasure(samples, range(NUM_CLASSES), mask)
    for weight in (0.0, 2.5):
        x, damage = graphs.class_graphs(samples, mask, weight)
        assert x.shape[-1] == graphs.config.num_features == plain.config.num_features + 1
        assert torch.equal(x[..., :8], expected[..., :8]) and torch.equal(x[..., 9:], expected[..., 8:])
        assert torch.equal(damage, loss)
        for found, of_class in zip(x[..., 8], erasure):
            assert torch.allclose(found, weight * standardised(of_class), atol=1e-4)


def test_the_recall_of_the_pixels_is_that_of_a_regression_on_all_training_samples():
    split = random_split(40)
    split.images.add_(5 * torch.randn(split.images.shape, generator=torch.Generator().manual_seed(2)))
    graphs = GraphGenerator(random_classifier(), split, graph_config(), 0)
    expected = ridge_recalls(split.images, split.labels, graphs.config.ridge)
    assert graphs.pixel_recall.tolist() == pytest.approx(expected)
    assert expected != ridge_recalls(graphs.samples.images, graphs.labels, graphs.config.ridge)


@pytest.mark.parametrize("mask_layer", [-1, -2, None])
def test_the_recall_under_a_mask_is_that_of_a_regression_on_the_recorded_samples(mask_layer):
    graphs = graph_generator(mask_layer)
    vertices = torch.arange(0, graphs.graph.num_vertices, 2)
    with Mask.zeroing(graphs.graph, vertices).applied_to(graphs.classifier):
        features = representation(graphs.classifier, graphs.samples.images)
    expected = ridge_recalls(features, graphs.labels, graphs.config.ridge)
    whole = ridge_recalls(representation(graphs.classifier, graphs.samples.images), graphs.labels, graphs.config.ridge)
    assert graphs.probe_recall(Mask.zeroing(graphs.graph, vertices)).tolist() == pytest.approx(expected)
    assert (expected == whole) == (mask_layer == -1)


def test_split_holds_what_it_is_given():
    split = Split(torch.eye(3), torch.arange(3))
    assert torch.equal(split.retain(0).images, torch.eye(3)[1:])


def test_an_edge_list_that_would_not_fit_is_refused_with_its_size():
    graphs = graph_generator(mask_layer=None)
    edges = graphs.graph.num_edges
    assert graphs.get_data(0, max_edges=edges).edge_index.shape == (2, edges)
    with pytest.raises(ValueError, match=f"max_edges is {edges - 1:,}, and the graph has {edges:,} edges: a list of"):
        graphs.get_data(0, max_edges=edges - 1)
    whole = WeightGraph([(128, 784), (64, 128), (10, 64)])
    # A clique for every neuron: 128 weights at each input, 784 + 64 and 128 + 10 at the hidden ones, 64 at an output.
    cliques = [(784, 128), (128, 784 + 64), (64, 128 + 10), (10, 64)]
    assert whole.num_edges == sum(neurons * size * (size - 1) for neurons, size in cliques) > 50_000_000
