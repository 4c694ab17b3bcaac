"""Erasure in closed form against least squares, finite differences and brute force."""

import itertools
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import NUM_CLASSES, graph_config, graph_generator, random_classifier, random_split, representation
from hypothesis import given, settings
from hypothesis import strategies as st

from audits.erasure import Erasure, ErasureConfig, explained_variance, ridge_recall
from data import GraphGenerator, seeded
from model import Mask
from trainer import masked_weights

CONFIG = ErasureConfig(trained=(1.0, 3.0), weight=0.0, target=None, rivals=1, ridge=0.01)


def erasing(mask_layer=-2, dtype=torch.float32, bias=False, **changes) -> GraphGenerator:
    return graph_generator(mask_layer, dtype, bias, auxiliary=partial(Erasure, replace(CONFIG, **changes)))


def as_matrix(features: torch.Tensor) -> np.ndarray:
    """Features in double precision, standardised as the closed forms have it."""
    x = features.detach().double().numpy()
    return (x - x.mean(0)) / (x.std(0) + 1e-3)


def r_squared(features: torch.Tensor, is_class: torch.Tensor, ridge: float) -> float:
    """R^2 of the ridge regression to the indicator of a class, by NumPy: features (samples, n), is_class (samples)."""
    h, t = as_matrix(features), is_class.double().numpy()
    b = h.T @ (t - t.mean()) / len(t)
    return b @ np.linalg.solve(h.T @ h / len(t) + ridge * np.eye(len(b)), b) / t.var()


def ridge_recalls(features: torch.Tensor, labels: torch.Tensor, ridge: float) -> list[float]:
    """Percent of each class that a ridge regression finds, by NumPy, one class at a time."""
    h, y = as_matrix(features), labels.numpy()
    correlation = h.T @ h / len(h) + ridge * np.eye(h.shape[1])
    scores = []
    for label in range(int(y.max()) + 1):
        t = (y == label).astype(float)
        scores.append(h @ np.linalg.solve(correlation, h.T @ (t - t.mean()) / len(t)) + t.mean())
    found = np.argmax(scores, 0)
    return [100 * float((found[y == label] == label).mean()) for label in range(len(scores))]


def problem(samples=40, n=5, num_own=16, seed=0, *batch):
    """Features of many scales that tell a little of the first samples."""
    generator = torch.Generator().manual_seed(seed)
    is_own = torch.arange(samples) < num_own
    features = torch.randn(*batch, samples, n, generator=generator, dtype=torch.float64)
    return 10.0 ** torch.arange(-2, n - 2) * (features + is_own[:, None] * torch.linspace(-0.5, 1, n)) + 3, is_own


@settings(deadline=None, max_examples=30)
@given(st.integers(8, 60), st.integers(1, 6), st.floats(0.1, 0.9), st.integers(0, 10**6))
def test_it_is_the_determination_of_ridge_regressions_and_without_a_ridge_of_least_squares(samples, n, share, seed):
    num_own = max(1, int(share * samples))
    features, is_own = problem(samples, n, num_own, seed, 2)
    t = is_own.numpy().astype(float)
    values = torch.stack([explained_variance(features, num_own, ridge) for ridge in (1e-12, 0.01, 0.5)])
    for x, bare, *ridged in zip(features, *values.tolist(), strict=True):
        assert ridged == pytest.approx([r_squared(x, is_own, ridge) for ridge in (0.01, 0.5)], rel=1e-9, abs=1e-12)
        with_offset = np.column_stack([x.numpy(), np.ones(samples)])
        left = t - with_offset @ np.linalg.lstsq(with_offset, t, rcond=None)[0]
        assert bare == pytest.approx(1 - (left @ left) / ((t - t.mean()) @ (t - t.mean())), abs=1e-6)


def test_the_gradient_is_that_of_finite_differences():
    features, _ = problem(12, 3, 5, 0, 2)
    scaled = (features / features.std(-2, keepdim=True)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: explained_variance(x, 5, 0.01), scaled)


@pytest.mark.parametrize("constant", [0.0, 1.5])
def test_a_feature_that_never_changes_says_nothing_and_has_no_gradient(constant):
    features, _ = problem()
    dead = torch.cat([features, torch.full((40, 1), constant, dtype=torch.float64)], 1).requires_grad_()
    value = explained_variance(dead, 16, 0.01)
    assert value.item() == pytest.approx(explained_variance(features, 16, 0.01).item(), rel=1e-9)
    (gradient,) = torch.autograd.grad(value, dead)
    assert gradient.isfinite().all() and (gradient[:, -1] == 0).all() and gradient[:, 0].abs().sum() > 0


@pytest.mark.parametrize("apart", [1.5, 40.0])
def test_the_recall_is_that_of_the_normal_equations(apart):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (90,), generator=generator)
    features = apart * torch.eye(3, 4)[labels] + torch.randn(90, 4, generator=generator)
    expected = ridge_recalls(features, labels, 0.01)
    assert ridge_recall(features, labels, 3, 0.01).tolist() == pytest.approx(expected)
    assert expected == [100.0] * 3 if apart > 2 else all(30 < recall < 100 for recall in expected)


@pytest.mark.parametrize("rivals", [1, 2])
def test_rivals_are_the_nearest_classes_in_the_representation_of_the_whole_classifier(rivals):
    graphs = erasing(None, torch.float64, rivals=rivals)
    masked = Mask.zeroing(graphs.graph, torch.arange(30))
    graphs.auxiliary.feature(graphs.draw(5, seeded("test")), [0], masked)  # the first that asks for them
    x, y = as_matrix(representation(graphs.classifier, graphs.samples.images)), graphs.labels.numpy()
    means = [x[y == label].mean(0) for label in range(NUM_CLASSES)]
    for label, found in enumerate(graphs.auxiliary.with_rivals.tolist()):
        others = [other for other in range(NUM_CLASSES) if other != label]
        nearest = sorted(others, key=lambda other: np.linalg.norm(means[other] - means[label]))[:rivals]
        assert found == [label, *nearest]
    assert erasing(rivals=9).auxiliary.with_rivals.shape == (NUM_CLASSES, NUM_CLASSES)


def test_what_carries_nothing_leaves_the_feature_of_the_others_finite():
    """The output layer, and a unit without weights."""
    graphs = erasing(-1)
    assert (graphs.auxiliary.feature(graphs.draw(5, seeded("test")), range(NUM_CLASSES)) == 0).all()
    graphs = erasing(None, bias=True)
    unit = 42 + torch.arange(6)  # all that leads to the first unit of layer 1
    graphs.classifier.layers[1].bias.data[0] = 0.5
    falls = graphs.auxiliary.feature(
        graphs.draw(12, seeded("test")), range(NUM_CLASSES), Mask.zeroing(graphs.graph, unit)
    )
    assert falls.isfinite().all() and (falls[:, unit] == 0).all() and (falls[:, 48:72] != 0).any()


@pytest.mark.parametrize("rivals", [1, 2])
@pytest.mark.parametrize("mask_layer", [-2, -1, [0, 2], None])
def test_the_term_is_what_each_class_is_carried_under_its_own_mask(mask_layer, rivals):
    graphs = erasing(mask_layer, rivals=rivals)
    samples, size = graphs.draw(10, seeded("test")), graphs.graph.num_vertices
    zeroed = {label: torch.randperm(size, generator=seeded(label))[:9] for label in (2, 0)}
    keep = torch.stack([torch.ones(size).index_fill(0, vertices, 0) for vertices in zeroed.values()]).requires_grad_()
    weights = masked_weights(graphs.classifier, graphs.graph, keep)
    features = graphs.classifier.outputs(graphs.inputs[samples.flatten()], graphs.graph.layers, weights)[0]
    found = graphs.auxiliary.loss(features.expand(2, -1, -1).unflatten(1, samples.shape), [2, 0])
    if mask_layer != -1:  # whose mask does not touch the representation
        (gradient,) = torch.autograd.grad(found, keep)
        assert gradient.isfinite().all() and (gradient.abs().sum(1) > 0).all()
    values = []
    for label, vertices in zeroed.items():
        rows = torch.cat([samples[each] for each in graphs.auxiliary.with_rivals[label].tolist()])
        with Mask.zeroing(graphs.graph, vertices).applied_to(graphs.classifier):
            features = representation(graphs.classifier, graphs.samples.images[rows])
        values.append(r_squared(features, graphs.labels[rows] == label, CONFIG.ridge))
    assert found.item() == pytest.approx(sum(values) / 2, rel=1e-3)


def test_a_step_of_training_draws_its_weight_from_the_range_which_must_not_fall():
    erasure, generator = erasing(weight=2.5).auxiliary, seeded("test")
    drawn = [erasure.draw_weight(generator) for _ in range(200)]
    assert 1.0 <= min(drawn) < 1.05 and 2.95 < max(drawn) < 3.0 and erasure.weight == 2.5
    assert erasing(trained=(2.0, 2.0)).auxiliary.draw_weight(generator) == 2.0
    with pytest.raises(ValueError, match=r"trained must be null or \[low, high\], not \[3.0, 1.0\]"):
        replace(CONFIG, trained=(3.0, 1.0))


@pytest.mark.parametrize("mask_layer", [-1, -2, None])
def test_recalls_are_those_of_regressions_on_the_recorded_samples_and_on_the_pixels_of_all(mask_layer):
    split = random_split(40)
    split.images.add_(5 * torch.randn(split.images.shape, generator=torch.Generator().manual_seed(2)))
    config = graph_config(mask_layer)
    graphs = GraphGenerator(random_classifier(), split, config, 0, partial(Erasure, CONFIG))
    mask = Mask.zeroing(graphs.graph, torch.arange(0, graphs.graph.num_vertices, 2))
    pixels = ridge_recalls(split.images, split.labels, 0.01)
    assert pixels != ridge_recalls(graphs.samples.images, graphs.labels, 0.01)
    whole = ridge_recalls(representation(graphs.classifier, graphs.samples.images), graphs.labels, 0.01)
    with mask.applied_to(graphs.classifier):
        expected = ridge_recalls(representation(graphs.classifier, graphs.samples.images), graphs.labels, 0.01)
        found = [graphs.auxiliary.recalls(graphs.classifier, label) for label in range(NUM_CLASSES)]
    assert [each["representation"] for each in found] == pytest.approx(expected)
    assert [each["pixels"] for each in found] == pytest.approx(pixels)
    assert (expected == whole) == (mask_layer == -1)
    for label, target in itertools.product(range(NUM_CLASSES), (None, -50.0, -5.0, 0.0, 5.0, 50.0)):
        is_reached = Erasure(replace(CONFIG, target=target), graphs).is_reached(mask, label)
        assert is_reached == (target is None or expected[label] - pixels[label] < target)
