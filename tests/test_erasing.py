"""Erasure against brute force and scikit-learn: regressions, edits of low rank run from midway, what they leave."""

import copy
import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import mask_of, random_split, scores, trained
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import balanced_accuracy_score
from sklearn.neural_network import MLPClassifier
from test_networks import classifier_of, labelled
from torch import nn

from mimu.erasing import (
    Edit,
    ErasingConfig,
    RecoveredInformation,
    class_directions,
    directions_to_erase,
    erase_classes,
    late_layers,
)
from mimu.errors import InputError
from mimu.hooked import HookedClassifier
from mimu.masks import LayerMask, Mask
from mimu.probes import held_out_variance
from mimu.samples import Split
from mimu.seeds import seeded
from mimu.training import learn
from mimu.unlearning import RetainScoreError, unlearn
from model import HookedMNISTClassifier, mlp

CONFIG = replace(ErasingConfig.configured(), samples=100, group_size=60, others_ratio=2, steps=60, units=32)
TEST = random_split(100, seed=7)


@pytest.mark.parametrize("samples, n, share", [(8, 6, 0.9), (20, 1, 0.5), (30, 4, 0.1)])
def test_it_is_what_ridge_regressions_say_of_each_sample_that_they_have_not_seen(samples, n, share):
    is_own = torch.arange(samples) < max(1, int(share * samples))
    features = torch.randn(samples, n, generator=seeded("ridge"), dtype=torch.float64) + is_own[:, None]
    features = 10.0 ** torch.arange(-2, n - 2) * features + 3
    x, t = features.numpy(), is_own.numpy().astype(float)
    h = (x - x.mean(0)) / (x.std(0) + 1e-3)
    targets = torch.stack([is_own, torch.arange(samples) % 2 == 0], 1).double()
    for ridge, weight in ((0.01, None), (0.5, torch.where(is_own, 3.0, 1.0).double())):
        w = np.ones(samples) if weight is None else weight.numpy()
        h = (x - np.average(x, 0, w)) / (np.sqrt(np.average(np.square(x - np.average(x, 0, w)), 0, w)) + 1e-3)
        found = held_out_variance(features, targets, ridge, weight)
        without = [np.delete(np.arange(samples), each) for each in range(samples)]
        for t, value in zip(targets.numpy().T, found, strict=True):
            fitted = [Ridge(ridge * w.sum()).fit(h[rows], t[rows], w[rows]) for rows in without]
            predicted = np.array([each.predict(row[None])[0] for each, row in zip(fitted, h, strict=True)])
            means = predicted, np.average(t, weights=w)
            error, spread = (np.average(np.square(t - each), weights=w) for each in means)
            assert value.item() == pytest.approx(1 - error / spread, rel=1e-6, abs=1e-9)
    scaled = (features / features.std(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: held_out_variance(x, targets, 0.01), scaled)
    dead = F.pad(scaled.detach(), (0, 1), value=1.5).requires_grad_()
    value = held_out_variance(dead, targets[:, :1], 0.01)
    (gradient,) = torch.autograd.grad(value, dead)
    assert value.item() == pytest.approx(held_out_variance(scaled, targets[:, :1], 0.01).item(), rel=1e-9)
    assert gradient.isfinite().all() and gradient[:, -1].abs().max() < 1e-9, "what never changes has none"


def test_random_attackers_find_what_no_line_tells_apart_and_nothing_in_noise():
    noise, is_own = torch.randn(400, 2, generator=seeded("noise")), torch.arange(400) < 100
    ring = F.normalize(noise) * (1 + 2 * is_own[:, None])
    ids, is_own = torch.stack([is_own, noise[:, 0] > 0], 1)[:, None].long(), is_own[:, None]
    assert held_out_variance(ring, is_own.float(), 0.02) <= 0 < 0.8 < CONFIG.mean_r_squared(ring, is_own, 0)
    assert CONFIG.mean_r_squared(noise, is_own, 0) < 0.02
    assert 0.97 < CONFIG.mean_r_squared(ids, is_own, 0) <= 1
    draws = seeded("draws")
    one, other, again = (CONFIG.attacker_r_squared(noise, is_own, each) for each in (draws, draws, seeded("draws")))
    assert one == again != other


def ranks(mask: Mask) -> list[int]:
    return [each.rank for each in mask.by_layer.values()]


@pytest.mark.parametrize("zeros, rank", [(0, 0), (0.2, 0), (0, 1)])
@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet", "tokens", "encoder", "grouped"])
def test_an_edit_run_from_midway_gives_what_the_network_gives_under_its_mask(name, zeros, rank):
    classifier, samples, chosen = classifier_of(name), labelled(20), torch.tensor([3, 17, 29, 4])
    network, layers, representations, by_layer = classifier.network, late_layers(classifier), [], {}
    for layer in layers:
        keep = (torch.rand(classifier.shapes[layer]) >= zeros).double()
        edit = (0.3 * torch.randn(size, rank, dtype=torch.float64) for size in keep.flatten(1).shape)
        by_layer[classifier.names[layer]] = LayerMask(keep, *edit)
    start = Mask(by_layer)
    last = network.get_submodule(classifier.names[layers[-1]].removesuffix(".weight"))
    for count in range(1, len(layers)):
        with start.applied_to(classifier), torch.no_grad():
            cached = Split(classifier.prefix_activations(layers, samples.images), samples.labels)
            edit = Edit(classifier.suffix_from(layers), layers[-1 - count :], cached, 60, [1, 2])
            assert len(edit.trained) == 1 + count
            for each in edit.trained:
                each += 0.3 * torch.randn_like(each)
            features, logits = edit.outputs(chosen)
            mask = start & edit.mask()
        watch = last.register_forward_pre_hook(lambda _, inputs: representations.append(inputs[0]))
        with mask.applied_to(network), torch.no_grad():
            expected = network(samples.images[chosen])
        watch.remove()
        assert torch.allclose(logits, expected) and torch.allclose(features, representations[-1])
        assert (edit.read is None) == (zeros > 0 or name == "encoder"), "its tokens are in front, not samples"


@pytest.fixture(scope="module")
def learned() -> HookedMNISTClassifier:
    torch.manual_seed(0)
    return trained(HookedMNISTClassifier((16, 12), 7, 3, bias=True), random_split(200))


def hidden_classes(count: int, seed: int) -> Split:
    """Four classes by the signs of two products of inputs, which no line tells apart."""
    x = torch.randn(count, 12, generator=torch.Generator().manual_seed(seed))
    signs = (x[:, 0:4:2] * x[:, 1:4:2] > 0).long()
    x[:, :4] += 0.5 * x[:, :4].sign()
    return Split(x, 2 * signs[:, 0] + signs[:, 1])


def recall_of(probe, classifier: HookedClassifier, mask: Mask) -> float:
    """Percent, the mean of two kinds, of samples that a probe tells to be of class 1 or not from the representation."""
    train, test = hidden_classes(3000, 0), hidden_classes(2000, 1)
    with mask.applied_to(classifier), torch.no_grad():
        x, x_test = (classifier.outputs(each.images)[0].numpy() for each in (train, test))
    return 100 * balanced_accuracy_score(test.labels == 1, probe.fit(x, train.labels == 1).predict(x_test))


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_a_class_goes_from_output_and_representation_and_what_was_zeroed_stays():
    torch.manual_seed(0)
    model, train = HookedMNISTClassifier((64, 24), 12, 4, bias=True), hidden_classes(3000, 0)
    learn(model, train, 10, 60, torch.optim.Adam(model.parameters(), 0.01), seeded("hidden"))
    start = Mask({model.names[1]: LayerMask.of((torch.rand(24, 64) > 0.05).float())})
    config = replace(CONFIG, samples=600, group_size=100, others_ratio=3, steps=60, units=64, share=0.0)
    erase = partial(erase_classes, model, train, [1], seed=0, start=start)
    (without, spared), (erased, found) = (erase(replace(config, erase_weight=weight)) for weight in (0.0, 3.0))
    for mask in (without, erased):
        assert mask.includes(start) and ranks(mask) == [1, 1, 1] and mask.num_zeroed == start.num_zeroed
        assert mask.by_layer[model.names[2]].u[:, 0].tolist() == [0, 1, 0, 0], "no output weights of another class"
        with mask.applied_to(model):
            forget, retain = scores(model, hidden_classes(2000, 1), 1)
        assert forget < 1 and retain > 88
    (one, _), (again, _) = (erase(replace(config, steps=3)) for _ in range(2))
    assert all(torch.equal(part.u, again.by_layer[layer].u) for layer, part in one.by_layer.items())
    assert found[1].after < min(found[1].before, spared[1].after) - 0.1 and not found[1].is_at_target
    for probe in (LogisticRegression(), MLPClassifier(16, max_iter=8, random_state=0)):
        *before, after = (recall_of(probe, model, mask) for mask in (start, without, erased))
        assert after < min(before) - 8


@pytest.mark.parametrize("after, count", [([0.22], 2), ([0.9, 0.2], 3), ([0.9, 0.5, 0.6], 3), ([0.5, 0.8, 0.9], 2)])
def test_layers_are_added_until_the_target_is_reached_or_else_those_where_least_is_found(after, count, monkeypatch):
    train, network, tried = random_split(), mlp([7, 6, 6, 5, 5, 3], True), []

    def train_edit(edit: Edit, *_) -> torch.Tensor:
        tried.append(len(edit.masks) - 1)
        return torch.tensor([after[len(tried) - 1]])

    monkeypatch.setattr(Edit, "train", train_edit)
    monkeypatch.setattr(ErasingConfig, "mean_r_squared", lambda *_: torch.tensor([0.95]))
    monkeypatch.setattr(ErasingConfig, "target_r_squared", lambda *_: torch.tensor([0.2]))
    mask, found = erase_classes(HookedClassifier(network, train.images), train, [1], CONFIG, 0)
    assert tried == [2, 3, 4][: len(after)] and found[1].after == pytest.approx(min(after))
    assert found[1].is_at_target == (min(after) < 0.3)
    assert [*mask.by_layer] == [f"{index}.weight" for index in range(1, 10, 2)][-1 - count :]


def test_what_is_found_does_not_depend_on_how_many_others_there_are(learned):
    train, config, before = random_split(10000), replace(CONFIG, samples=10000, others_ratio=1, steps=1, units=16), []
    train = Split(train.images + 3 * torch.randn(train.images.shape, generator=seeded("noise")), train.labels)
    for count in (1000, 20000):
        is_own, is_other = train.labels == 1, train.labels != 1
        is_current = is_own & (is_own.cumsum(0) <= 1000) | is_other & (is_other.cumsum(0) <= count)
        before.append(erase_classes(learned, train[is_current], [1], config, 0)[1][1].before)
    assert before[0] == pytest.approx(before[1], abs=0.05) and before[0] > 0.4


def test_models_of_users_are_erased_from_what_is_hidden_and_one_class_after_the_other(learned, monkeypatch):
    quick = replace(ErasingConfig.configured(), steps=100)
    monkeypatch.setattr(ErasingConfig, "configured", lambda: quick)
    monkeypatch.setattr(ErasingConfig, "target_r_squared", lambda *_: torch.tensor([0.3]))
    train, model = random_split(200), copy.deepcopy(learned.network)
    request = partial(unlearn, model, train.images, train.labels, max_fall=None, max_class_fall=None)
    before = copy.deepcopy(model.state_dict())
    mask_of({"3.weight": torch.ones(12, 16).index_fill(1, torch.arange(2), 0)}).apply(model)
    first = request(1, method="erase")
    assert first.forgets == (1,) and ranks(first) == [1, 1, 1] and first.num_zeroed == 24
    assert re.search(r"class 1 (not )?erased: attackers find R\^2 0\.\d\d, before 0\.\d\d, target 0\.\d\d", repr(first))
    first.apply(model)
    second = request(0, method="erase")
    assert second.includes(first) and second.forgets == (0, 1)
    second.apply(model)
    assert scores(model, TEST, 0)[0] < 2 and scores(model, TEST, 1)[0] < 2
    second.remove(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_others_that_lose_too_much_in_samples_held_out_are_told_of(learned, monkeypatch):
    train, calm = random_split(600), ErasingConfig.configured()
    monkeypatch.setattr(ErasingConfig, "configured", lambda: replace(calm, learning_rate=30.0, steps=10))
    with pytest.raises(RetainScoreError, match=r"lose \d+.* \(more samples may do better\)"):
        unlearn(learned.network, train.images, train.labels, 1, method="erase")


def test_where_the_retained_classes_span_everything_the_direction_is_the_difference_of_means():
    x, labels = torch.randn(60, 3, generator=seeded("spanned")), torch.arange(6).repeat(10)
    means = torch.stack([x[labels == label].mean(0) for label in (0, 1)])
    expected = F.normalize(means - x[labels > 1].mean(0), dim=1).T
    assert not class_directions(x, labels, [0]).any()
    assert torch.allclose(directions_to_erase(x, labels, [0, 1]).float(), expected, atol=1e-5)
    expected = class_directions(x[:, :2], labels % 2, [0])
    assert torch.equal(directions_to_erase(x[:, :2], labels % 2, [0]), expected)


def test_the_target_is_between_inputs_and_original_and_nearer_to_it_the_more_classes_are_known():
    config, values = replace(CONFIG, share=0.5), torch.tensor([[0.2, 0.9], [0.6, 0.7]])
    targets = [config.target_r_squared(*values, num_classes) for num_classes in (2, 10, 1000)]
    assert torch.allclose(targets[1], torch.tensor([0.4, 0.7])), "no more than what is found before"
    assert targets[0][0] == pytest.approx(0.2) and targets[2][0] == pytest.approx(0.58)


def test_an_erasure_is_done_or_not_or_cannot_be_judged():
    after = [(0.8, 0.51, 0.5, 50), (0.8, 0.6, 0.5, 50), (0.8, 0.5, 0.5, 9), (0.05, 0.0, 0.0, 50)]
    words = [str(RecoveredInformation(*each)).partition(":")[0].partition(" (")[0] for each in after]
    cannot = "cannot be judged by 9 samples", "cannot be judged by 50 samples"
    assert words == ["erased", "not erased", *cannot]


def test_an_edit_that_takes_too_much_is_weakened_to_the_target(learned, monkeypatch):
    train, seen = random_split(300), []

    def r_squared(config: ErasingConfig, features: torch.Tensor, *_) -> torch.Tensor:
        seen.append(features)
        return torch.tensor([(0.9, 0.9, 0.1, 0.3, 0.44, 0.5)[len(seen) - 1]])

    monkeypatch.setattr(ErasingConfig, "mean_r_squared", r_squared)
    monkeypatch.setattr(ErasingConfig, "target_r_squared", lambda *_: torch.tensor([0.45]))
    mask, found = erase_classes(learned, train, [1], replace(CONFIG, steps=3), 0)
    distances = [(each - seen[0]).norm() for each in seen[2:]]
    assert found[1].after == pytest.approx(0.44) and distances == sorted(distances, reverse=True)
    with mask.applied_to(learned), torch.no_grad():
        distances = torch.cdist(seen[4], learned.outputs(train.images)[0], compute_mode="donot_use_mm_for_euclid_dist")
    assert len(seen) == 6 and distances.amin(1).max() < 1e-3, "the mask is half of the edit"


def test_classes_that_attackers_find_no_more_than_expected_lose_their_output_weights_alone(learned, monkeypatch):
    train = random_split(300)
    monkeypatch.setattr(ErasingConfig, "target_r_squared", lambda _, inputs, original, count: original)
    mask, found = erase_classes(learned, train, [1], CONFIG, 0)
    assert [*mask.by_layer] == [learned.names[-1]] and found[1].is_at_target
    with mask.applied_to(learned):
        assert scores(learned, TEST, 1)[0] < 2


def test_several_classes_are_erased_by_one_edit(learned):
    train = random_split(300)
    mask, found = erase_classes(learned, train, [0, 1], replace(CONFIG, share=0.0), 0)
    assert set(ranks(mask)) == {2} and [*found] == [0, 1]
    with mask.applied_to(learned):
        assert max(scores(learned, TEST, label)[0] for label in (0, 1)) < 2


def test_what_cannot_be_erased_is_refused(learned):
    x, labels, alone = random_split(20).images, random_split(20).labels, trained(nn.Linear(7, 3), random_split(20))
    with pytest.raises(InputError, match="must be auto or None where classes are erased, not 1"):
        unlearn(learned.network, x, labels, 1, mask_layer=1, method="erase")
    with pytest.raises(InputError, match="a class is erased from what the last layer is given"):
        unlearn(alone, x, labels, 1, method="erase", max_fall=None, max_class_fall=None)
