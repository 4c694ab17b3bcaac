"""Erasure against least squares, finite differences and NumPy: regressions, edits of low rank, and what they leave."""

import copy
import importlib
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import random_split, scores, trained
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge
from torch import nn

from mimu.masking.regression import explained_variance
from mimu.methods.erasing import Erasing, erased, nearest, projections
from mimu.methods.projections import class_direction
from mimu.model import HookedMNISTClassifier
from mimu.networks.masks import LayerMask, Mask
from mimu.runs.files import PACKAGE, InputError
from mimu.unlearning import unlearn


def regressed(features: torch.Tensor, targets: np.ndarray, ridge: float) -> np.ndarray:
    """What scikit-learn's ridge regression says of the targets, from features standardised as the closed forms do."""
    x = features.detach().double().numpy()
    h = (x - x.mean(0)) / (x.std(0) + 1e-3)
    return Ridge(ridge * len(h)).fit(h, targets).predict(h)


def problem(samples=40, n=5, num_own=16, seed=0, *batch):
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
    for ridge in (1e-12, 0.01, 0.5):
        for x, value in zip(features, explained_variance(features, num_own, ridge).tolist(), strict=True):
            predicted = regressed(x, t, ridge)
            assert value == pytest.approx(np.cov(predicted, t, bias=True)[0, 1] / t.var(), rel=1e-6, abs=1e-9)
            assert ridge > 1e-9 or value == pytest.approx(1 - (t - predicted).var() / t.var(), abs=1e-6)


def test_the_gradient_is_that_of_finite_differences_and_what_never_changes_has_none():
    features, _ = problem(12, 3, 5, 0, 2)
    scaled = (features / features.std(-2, keepdim=True)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: explained_variance(x, 5, 0.01), scaled)
    features, _ = problem()
    dead = F.pad(features, (0, 1), value=1.5).requires_grad_()
    value = explained_variance(dead, 16, 0.01)
    assert value.item() == pytest.approx(explained_variance(features, 16, 0.01).item(), rel=1e-9)
    (gradient,) = torch.autograd.grad(value, dead)
    assert gradient.isfinite().all() and (gradient[:, -1] == 0).all() and gradient[:, 0].abs().sum() > 0


@pytest.mark.parametrize("apart", [1.5, 40.0])
def test_the_recall_is_that_of_a_ridge_regression_to_every_class(apart, monkeypatch):
    monkeypatch.syspath_prepend(str(PACKAGE / "docs"))
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (90,), generator=generator)
    features = apart * torch.eye(3, 4)[labels] + torch.randn(90, 4, generator=generator)
    is_right = regressed(features, np.eye(3)[labels], 0.01).argmax(1) == labels.numpy()
    expected = [100 * is_right[labels == label].mean() for label in range(3)]
    assert importlib.import_module("bar").ridge_recall(features, labels, 3, 0.01).tolist() == pytest.approx(expected)
    assert expected == [100.0] * 3 if apart > 2 else all(30 < recall < 100 for recall in expected)


SHAPES = (4, 2, 1, 3), (3, 12)
SETTINGS = replace(Erasing.configured(), samples=100, group_size=60, rivals=2, untrained=1 / 3)
TEST = random_split(100, seed=7)


def edited_mask(seed: int = 0) -> Mask:
    """A mask of a convolution and of a linear layer that zeroes some weights and takes one and two directions."""
    generator, by_layer = torch.Generator().manual_seed(seed), {}
    for rank, (name, shape) in enumerate(zip(("0.weight", "1.weight"), SHAPES, strict=True), 1):
        keep = torch.rand(shape, generator=generator) > 0.2
        left, right = (torch.randn(size, rank, generator=generator) for size in keep.flatten(1).shape)
        by_layer[name] = LayerMask(keep.float(), left, right)
    return Mask(by_layer, (seed,))


def ranks(mask: Mask) -> list[int]:
    return [each.rank for each in mask.by_layer.values()]


def test_edits_combine():
    one, other = edited_mask(0), edited_mask(1)
    both = one & other
    assert ranks(both) == [2, 4] and both.forgets == (0, 1)
    assert both.includes(one) and both.includes(other) and not one.includes(both) and not one.includes(other)
    for layer, mask in both.by_layer.items():
        masks = one.by_layer[layer], other.by_layer[layer]
        matrix = sum(each.left @ each.right.T for each in masks)
        assert torch.allclose(mask.left @ mask.right.T, matrix, atol=1e-5)
        assert torch.equal(mask.keep, masks[0].keep * masks[1].keep)


def test_what_is_no_edit_is_refused():
    nan = torch.full((4, 1), torch.nan)
    for changes in ({"right": torch.ones(5, 1)}, {"right": torch.ones(6, 2)}, {"left": nan}):
        with pytest.raises(ValueError, match="edits must be pairs of matrices"):
            Mask({"0.weight": edited_mask().by_layer["0.weight"]._replace(**changes)})


def test_the_nearest_classes_come_in_their_order():
    labels = torch.arange(4).repeat_interleave(50)
    centres = torch.tensor([[0.0, 0], [5, 0], [1, 0], [0, 3]])
    features = centres[labels] + 0.01 * torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    deviation = features.std(0, correction=0)
    by_hand = ((centres - centres[0]) / deviation).norm(dim=1).argsort().tolist()
    assert nearest(features, labels, 0, 2) == by_hand[:3] and nearest(features, labels, 0, 9) == by_hand


@pytest.fixture(scope="module")
def learned() -> HookedMNISTClassifier:
    torch.manual_seed(0)
    return trained(HookedMNISTClassifier((16, 12), 7, 3, bias=True), random_split(200))


def test_projections_take_the_mean_of_the_class_from_every_layer_on_what_those_before_it_then_give(learned):
    train = random_split(200)
    with torch.no_grad():
        edits, x = projections(learned, train, 1), train.images
        biases = [learned.network[index].bias for index in (1, 3)]
        for before, bias, edit in zip(learned.weights, biases, edits.values()):
            u = class_direction(x, train.labels, 1).float()
            assert torch.allclose(edit.right[:, 0], u, atol=1e-5)
            weight = edit.applied(before)
            assert torch.allclose(weight, before @ (torch.eye(len(u)) - torch.outer(u, u)), atol=1e-5)
            x = (x @ weight.T + bias).relu()
        without_row = learned.weights[2] * torch.tensor([1.0, 0, 1])[:, None]
        assert torch.allclose(edits[learned.names[2]].applied(learned.weights[2]), without_row, atol=1e-6)


def r_squared(features: torch.Tensor) -> float:
    """How well a ridge regression tells class 1 from the others in features of the test samples, R^2."""
    parts = [features[TEST.labels == each] for each in (1, 0, 2)]
    return explained_variance(torch.cat(parts), 100, 0.01).item()


def test_a_class_goes_from_the_representation_as_far_as_the_bar_and_what_was_zeroed_stays(learned):
    train = random_split(200)
    keep = (torch.rand(12, 16, generator=torch.Generator().manual_seed(0)) > 0.05).float()
    start = Mask({learned.names[1]: LayerMask.of(keep)})
    projected, unconcerned, learned_to, at_the_bar = (
        erased(learned, train, 1, replace(SETTINGS, steps=steps, erase_weight=weight), 0, start, bar=bar)
        for steps, weight, bar in ((0, 1.0, None), (60, 0.0, None), (60, 3.0, None), (60, 3.0, 1.0))
    )
    left = []
    for mask in (projected, unconcerned, learned_to):
        assert mask.includes(start) and ranks(mask) == [1, 1, 1] and mask.num_zeroed == start.num_zeroed
        left_of_last = mask.by_layer[learned.names[2]].left[:, 0]
        assert torch.equal(left_of_last, torch.tensor([0.0, 1, 0])), "no other row of the last layer"
        with mask.applied_to(learned), torch.no_grad():
            forget, retain = scores(learned, TEST, 1)
            left.append(r_squared(learned.outputs(TEST.images)[0]))
    assert forget == 0 and retain > 95 and left[2] < min(r_squared(learned.outputs(TEST.images)[0]), left[1]) - 0.1
    assert left[2] < r_squared(SETTINGS.untrained_features(TEST.images, 12, 0)) + 0.15
    for layer, mask in unconcerned.by_layer.items():
        assert mask.includes(at_the_bar.by_layer[layer]), "there is nothing to erase"


def test_models_of_the_users_own_are_erased_from_one_class_after_the_other(learned):
    train, model = random_split(200), copy.deepcopy(learned.network)
    about, before = {"erase": True, "max_fall": None, "max_class_fall": None}, copy.deepcopy(model.state_dict())
    first = unlearn(model, train.images, train.labels, 1, **about)
    assert first.forgets == (1,) and ranks(first) == [1, 1, 1] and first.num_zeroed == 0
    first.apply(model)
    second = unlearn(model, train.images, train.labels, 0, **about)
    assert second.includes(first) and second.forgets == (0, 1)
    second.apply(model)
    assert scores(model, TEST, 0)[0] < 2 and scores(model, TEST, 1)[0] < 2
    second.remove(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_cannot_be_erased_is_refused(learned):
    x, labels, alone = random_split(20).images, random_split(20).labels, trained(nn.Linear(7, 3), random_split(20))
    with pytest.raises(InputError, match="must be auto or None where classes are erased, not 1"):
        unlearn(learned.network, x, labels, 1, mask_layer=1, erase=True)
    with pytest.raises(InputError, match="a class is erased from what the last layer is given"):
        unlearn(alone, x, labels, 1, erase=True, max_fall=None, max_class_fall=None)
