"""The closed forms of what a representation carries of a class, against least squares and by brute force."""

import numpy as np
import pytest
import torch
from conftest import as_matrix, r_squared, ridge_recalls
from hypothesis import given, settings
from hypothesis import strategies as st

from erasure import explained_variance, nearest_classes, probe_recall


def problem(samples=40, n=5, seed=0, *batch):
    """Features of many scales that tell a little of the class."""
    generator = torch.Generator().manual_seed(seed)
    is_class = torch.rand(*batch, samples, generator=generator) < 0.4
    features = torch.randn(*batch, samples, n, generator=generator, dtype=torch.float64)
    features = 10.0 ** torch.arange(-2, n - 2) * (features + is_class[..., None] * torch.linspace(-0.5, 1, n)) + 3
    return features, is_class


@settings(deadline=None, max_examples=30)
@given(st.integers(8, 60), st.integers(1, 6), st.integers(0, 10**6))
def test_without_a_ridge_it_is_the_determination_of_least_squares(samples, n, seed):
    features, is_class = problem(samples, n, seed)
    if is_class.all() or not is_class.any():
        return
    x, t = np.column_stack([features.numpy(), np.ones(samples)]), is_class.numpy().astype(float)
    left = t - x @ np.linalg.lstsq(x, t, rcond=None)[0]
    expected = 1 - (left @ left) / ((t - t.mean()) @ (t - t.mean()))
    assert explained_variance(features, is_class, 1e-12).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("ridge", [0.01, 0.5])
def test_the_ridge_stands_where_the_formula_has_it(ridge):
    features, is_class = problem()
    value = explained_variance(features, is_class, ridge).item()
    assert value == pytest.approx(r_squared(features, is_class, ridge), rel=1e-9)
    assert value < explained_variance(features, is_class, 1e-12).item() - 1e-3


def test_a_batch_is_one_problem_after_another():
    features, is_class = problem(30, 4, 0, 2, 3)
    values = explained_variance(features, is_class, 0.01)
    assert values.shape == (2, 3) and len(set(values.flatten().tolist())) == 6
    for i in range(2):
        for j in range(3):
            assert values[i, j].item() == pytest.approx(r_squared(features[i, j], is_class[i, j], 0.01), rel=1e-9)


def test_noise_carries_nothing_of_a_class_and_its_indicator_all():
    is_class = torch.arange(4000) % 4 == 0
    noise = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0))
    assert 0 <= explained_variance(noise, is_class, 0.01) < 0.01
    told = torch.cat([noise, is_class[:, None].float()], 1)
    assert 0.97 < explained_variance(told, is_class, 0.01) <= 1


def test_the_gradient_is_that_of_finite_differences():
    features, is_class = problem(12, 3, 0, 2)
    scaled = (features / features.std(-2, keepdim=True)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: explained_variance(x, is_class, 0.01), scaled)


@pytest.mark.parametrize("constant", [0.0, 1.5])
def test_a_feature_that_never_changes_says_nothing_and_has_no_gradient(constant):
    features, is_class = problem()
    dead = torch.cat([features, torch.full((40, 1), constant, dtype=torch.float64)], 1).requires_grad_()
    value = explained_variance(dead, is_class, 0.01)
    assert value.item() == pytest.approx(explained_variance(features, is_class, 0.01).item(), rel=1e-9)
    (gradient,) = torch.autograd.grad(value, dead)
    assert gradient.isfinite().all() and (gradient[:, -1] == 0).all() and gradient[:, 0].abs().sum() > 0


def three_classes(apart: float, samples: int = 90):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (samples,), generator=generator)
    return apart * torch.eye(3, 4)[labels] + torch.randn(samples, 4, generator=generator), labels


def test_the_recall_is_that_of_the_normal_equations():
    features, labels = three_classes(1.5)
    expected = ridge_recalls(features, labels, 0.01)
    assert probe_recall(features, labels, 3, 0.01).tolist() == pytest.approx(expected)
    assert all(30 < recall < 100 for recall in expected)


def test_classes_that_are_apart_are_all_found():
    features, labels = three_classes(40.0)
    assert probe_recall(features, labels, 3, 0.01).tolist() == [100.0] * 3


@pytest.mark.parametrize("count", [1, 3])
def test_the_nearest_classes_by_brute_force(count):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(5).repeat(8)
    # The scale of a feature must not count.
    centres = torch.randn(5, 3, generator=generator) * torch.tensor([1.0, 100.0, 0.1])
    features = centres[labels] + 0.01 * torch.randn(40, 3, generator=generator)
    x, y = as_matrix(features), labels.numpy()
    for label, found in enumerate(nearest_classes(features, labels, 5, count).tolist()):
        others = [other for other in range(5) if other != label]
        means = {each: x[y == each].mean(0) for each in range(5)}
        assert found == sorted(others, key=lambda each: np.linalg.norm(means[each] - means[label]))[:count]
