"""The audits on cases whose answer is known: identical models, planted leaks, and references written out by hand."""

import copy
import math
from dataclasses import replace
from functools import partial
from itertools import product, repeat
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import IN_FEATURES, NUM_CLASSES, random_classifier, random_split, trainer_config
from scipy.spatial.distance import jensenshannon
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from sklearn.pipeline import make_pipeline

from data import ImageData
from experiment import audits
from experiment.audits import Audit, AuditConfig, Predictions, predictions_of, probe_metrics
from methods.controls import logit_removed
from mimu import probes
from mimu.auditing import jensen_shannon, loss_attack
from mimu.graph import WeightGraph
from mimu.samples import Split, some_of_every_class
from mimu.seeds import seeded
from model import HookedMNISTClassifier, VisionTransformer
from trainer import Trainer

FORGET = 1
CONFIG = AuditConfig(enabled=True, probes=(), samples=None, relearn_steps=40, relearn_from=())
PROBES = {"PENALTY": 0.0, "UNITS": 8, "EPOCHS": 2, "BATCH_SIZE": 32, "LEARNING_RATE": 0.05, "NEIGHBOURS": 5}
RELEARNING = {"BATCH_SIZE": 10, "LEARNING_RATE": 0.1, "LEARNING_RATE_FROM_FEW": 0.1}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for module, constants in ((probes, PROBES), (audits, RELEARNING)):
        for name, value in constants.items():
            monkeypatch.setattr(module, name, value)


@pytest.fixture(scope="module")
def data() -> ImageData:
    return ImageData(random_split(100), random_split(60, seed=3))


@pytest.fixture(scope="module")
def trained(data):
    return Trainer(trainer_config((6, 5), 20), 0).train(data.train, NUM_CLASSES)


@pytest.fixture(scope="module")
def retrained(data):
    return Trainer(trainer_config((6, 5), 20), 0).train(data.train.retain(FORGET), NUM_CLASSES)


@pytest.fixture(scope="module")
def audit(data, trained, retrained) -> Audit:
    return Audit(CONFIG, data, FORGET, 0, trained, retrained)


def without_logit(classifier):
    return logit_removed(SimpleNamespace(classifier=copy.deepcopy(classifier), forget_class=FORGET))


def masked(classifier, vertices=(0, 7, 29)):
    model = copy.deepcopy(classifier)
    WeightGraph(classifier.trace.layers, -2).zeroing(torch.tensor(vertices)).apply(model)
    return model


def relearned(audit: Audit, model, goal: float, most: int, rate: float, samples) -> tuple[int | None, list[float]]:
    audit = replace(audit, config=replace(CONFIG, relearn_steps=most))
    audit.goal = goal
    return audit.relearned(model, rate, samples)


def test_predictions_are_logits_losses_and_the_inputs_of_every_layer_after_the_first():
    classifier, split = random_classifier(), random_split(10)
    predictions, logits = predictions_of(torch.nn.Sequential(classifier), split), classifier(split.images)
    for end, hidden in zip((3, 5), predictions.hidden, strict=True):
        assert torch.equal(hidden, classifier.network[:end](split.images))
    assert torch.equal(predictions.logits, logits)
    assert predictions.loss[3] == pytest.approx(-logits.double().log_softmax(1)[3, split.labels[3]].item())
    assert predictions.correct.tolist() == [float(label == row.argmax()) for label, row in zip(split.labels, logits)]
    assert not any(module._forward_pre_hooks for module in classifier.modules())
    (hidden,) = predictions_of(HookedMNISTClassifier((), IN_FEATURES, NUM_CLASSES), split).hidden
    assert torch.equal(hidden, split.images)  # which a classifier of one layer represents by themselves


def test_before_a_head_alone_stands_the_mean_of_what_the_last_layer_reads_of_tokens_or_pixels():
    split, inputs = Split(torch.randn(9, 16, generator=seeded(1)), torch.zeros(9, dtype=torch.long)), []
    tokens = VisionTransformer((1, 4, 4), 2, 4, 5, 2, 2, NUM_CLASSES).eval()
    settings = {"channels": (2, 3), "bias": True}
    residual = trainer_config((), 1, architecture="resnet", **settings).network((1, 4, 4), NUM_CLASSES).eval()
    plain = trainer_config((5,), 1, architecture="cnn", **settings).network((1, 4, 4), NUM_CLASSES)
    for layer in (tokens.blocks[-1].linear2, residual[-4].conv2, plain[-3]):
        layer.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    predictions = [predictions_of(network, split) for network in (tokens, residual, plain)]
    means = inputs[0].mean(1), inputs[1].mean((2, 3)), inputs[2]
    for each, head, mean in zip(predictions, (tokens.head, residual[-1], plain[-1]), means, strict=True):
        before, representation = each.hidden
        torch.testing.assert_close((before, head(representation)), (mean, each.logits))


def test_the_divergence_is_that_of_its_definition():
    one, other = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0)).double()
    expected = (jensenshannon(one.softmax(1), other.softmax(1), base=2, axis=1) ** 2).mean()
    assert jensen_shannon(one, other) == pytest.approx(expected, rel=1e-12) == jensen_shannon(other, one)
    surely = torch.tensor([[0.0, -torch.inf]])
    assert jensen_shannon(surely, surely) == 0.0 and jensen_shannon(surely, surely.flip(1)) == pytest.approx(1.0)


def test_the_loss_attack_counts_pairs():
    members, non_members = torch.tensor([0.1, 0.4, 0.4, torch.inf]), torch.tensor([0.4, 0.2, 3.0])
    pairs = [(m < o) + (m == o) / 2 for m, o in product(members.tolist(), non_members.tolist())]
    assert loss_attack(members, non_members) == pytest.approx(sum(pairs) / len(pairs))
    endless = torch.full((5,), torch.inf)
    assert math.isnan(loss_attack(endless, endless)) and loss_attack(torch.zeros(5), endless) == 1.0


def test_the_entropy_attack_is_a_balanced_logistic_regression():
    logits = torch.randn(900, 3, generator=seeded(0))
    logits[:, 0] += torch.tensor([4.0, 3.0, 2.0]).repeat_interleave(torch.tensor([300, 500, 100]))
    labels = torch.arange(900).clamp(299, 300) - 299
    train, test = Predictions(logits[:800], (), labels[:800]), Predictions(logits[800:], (), labels[800:])
    entropy = torch.special.entr(logits.double().softmax(1)).sum(1, keepdim=True)
    regression = LogisticRegression(class_weight="balanced", tol=1e-10)
    regression.fit(torch.cat([entropy[:300], entropy[800:]]), [1] * 300 + [0] * 100)
    percent = 100 * regression.predict(entropy[300:800]).mean()
    assert 5 < percent < 95 and audits.entropy_attack(train, test, train.labels == FORGET) == pytest.approx(percent)
    sure = Predictions(torch.tensor([[0.0, -torch.inf]]).repeat(900, 1), (), labels)
    assert math.isnan(audits.entropy_attack(sure, sure, labels == FORGET))


def standardised(train: torch.Tensor, test: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mean, deviation = train.mean(0), train.std(0, correction=0) + 0.001
    return (train - mean) / deviation, (test - mean) / deviation


@pytest.mark.parametrize("count", [2, 1000])
def test_prototypes_are_means_of_a_few_samples_and_the_nearest_one_names_a_sample(data, trained, count):
    train, test = (predictions_of(trained, split) for split in (data.train, data.test))
    order = torch.randperm(len(train.labels), generator=seeded("prototypes", 5))
    chosen = torch.cat([order[train.labels[order] == label][:count] for label in range(NUM_CLASSES)])
    nearest = NearestCentroid().fit(train.hidden[-1][chosen], train.labels[chosen])
    expected = 100 * (nearest.predict(test.hidden[-1][test.labels == FORGET]) == FORGET).mean()
    assert audits.prototype_recall(train, test, FORGET, 5, count) == pytest.approx(expected)


@pytest.mark.parametrize("dead, widest, cost", [(0, 256, None), (2, 256, None), (0, 4, None), (0, 4, 1.0)])
def test_the_linear_probe_is_converged_softmax_regression(monkeypatch, dead, widest, cost):
    """It is one on principal components, or with a cost the standard form on all features."""
    labels, noise = random_split(150).labels, torch.randn(1950, IN_FEATURES, generator=torch.Generator().manual_seed(2))
    features = torch.cat([random_split(150).images, random_split(500, seed=9).images]) + 2 * noise
    x, x_test = standardised(features[:450].double(), features[450:].double())
    components = PCA(min(widest, IN_FEATURES)) if cost is None else None
    regression = make_pipeline(components, LogisticRegression(C=cost or 1e9, tol=1e-10, max_iter=1000))
    expected = regression.fit(x, labels).predict_proba(x_test)
    features = F.pad(features, (0, dead))
    monkeypatch.setattr(probes, "WIDEST", widest)
    assert probes.linear(features[:450], labels, features[450:], 0, cost).numpy() == pytest.approx(expected, abs=0.01)
    monkeypatch.setattr(probes, "PENALTY", 0.3)
    ridged = probes.linear(features[:450], labels, features[450:], 0)
    assert 0.9 < (ridged.argmax(1).numpy() == expected.argmax(1)).mean() < 0.995


def test_usable_bits_are_the_entropy_less_the_log_loss():
    p, is_class = torch.rand(600, generator=seeded(0), dtype=torch.double), random_split(200).labels == FORGET
    entropy = math.log2(3) - 2 / 3
    assert probes.usable_bits(p, is_class) == pytest.approx(entropy - log_loss(is_class, p) / math.log(2))
    assert probes.usable_bits(~is_class, is_class) == pytest.approx(entropy - 100 / math.log(2)), "no infinity"


def test_probes_find_all_in_the_labels_and_nothing_in_noise(monkeypatch):
    monkeypatch.setattr(probes, "EPOCHS", 20)
    labels, noise = random_split(200).labels, torch.randn(600, 2, generator=seeded(1))
    leaks = Predictions(noise, (noise, 5 + 0.02 * F.one_hot(labels)), labels)  # which must be standardised
    names, settings = ["linear", "two_layer", "neighbours"], ("two_layer", "neighbours", "hidden")
    metrics, entropy = probe_metrics(leaks, leaks, FORGET, 0, settings), math.log2(3) - 2 / 3
    bits, test = metrics["usable_bits"], replace(leaks, hidden=(noise.flip(0),))
    assert metrics["probe_recall"] == dict.fromkeys(names, 100.0) and [*bits] == ["hidden_0", "representation"]
    assert bits["representation"] == pytest.approx(dict.fromkeys([*names, "two_class"], entropy), abs=0.2)
    blind = probe_metrics(replace(leaks, hidden=(noise,)), test, FORGET, 0, settings)["usable_bits"]
    assert max(blind["representation"].values()) < 0.01 < entropy


@pytest.mark.parametrize("count, among", [(7, 80), (7, 30), (30, 30)])
def test_the_nearest_neighbours_are_of_some_random_samples(monkeypatch, count, among):
    monkeypatch.setattr(probes, "NEIGHBOURS", count)
    monkeypatch.setattr(probes, "NEIGHBOURS_OF", among)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1180, 3, generator=generator) * torch.tensor([1.0, 100.0, 0.1])
    labels = torch.randint(4, (80,), generator=generator)
    chosen = torch.randperm(80, generator=seeded("neighbours", 5))[:among]
    x, x_test = standardised(features[chosen], features[80:])
    expected = (count * KNeighborsClassifier(count).fit(x, labels[chosen]).predict_proba(x_test) + 0.25) / (count + 1)
    assert probes.neighbours(features[:80], labels, features[80:], 5).numpy() == pytest.approx(expected)
    assert len(set(expected.argmax(1))) == (4 if count < among else 1)


def by_hand(model, samples, test: Split, goal: float, rate: float, zeroed: list[int]) -> list[float]:
    """The score before every step of SGD, until the goal; zeroed weights of the middle layer only start at 0."""
    model, scores = copy.deepcopy(model), []
    model.weights[1].data.view(-1)[zeroed] = 0
    for batch in samples:
        scores.append(100 * (model(test.images).argmax(1) == FORGET).double().mean().item())
        if scores[-1] >= goal:
            return scores
        loss = F.cross_entropy(model(batch.images), batch.labels)
        for parameter, gradient in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters()))):
            parameter.data -= rate * gradient


@pytest.mark.parametrize("zeroed", [[], [*range(0, 30, 2)]])
def test_relearning_counts_the_steps_of_sgd_and_frees_the_weights_of_a_mask(retrained, data, audit, zeroed):
    forget, test = data.train.forget(FORGET), data.test.forget(FORGET)
    model = masked(retrained, zeroed) if zeroed else retrained
    before = copy.deepcopy(model.state_dict())
    steps, scores = relearned(audit, model, 80.0, 40, 0.2, forget.batches(10, seeded(3)))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    generator = seeded(3)
    samples = [forget[batch] for _ in range(4) for batch in torch.randperm(100, generator=generator).split(10)]
    assert scores == pytest.approx(by_hand(retrained, samples, test, 80.0, 0.2, zeroed))
    assert scores[0] == 0.0 and steps == len(scores) - 1 > 1


def test_relearning_ends_at_its_most_steps_at_once_or_where_the_loss_is_infinite(retrained, trained, data, audit):
    forget = data.train.forget(FORGET)
    steps, scores = relearned(audit, retrained, 101.0, 25, 0.2, forget.batches(10, seeded(0)))
    assert steps == 25 and len(scores) == 26  # more than one epoch
    assert relearned(audit, trained, 40.0, 25, 0.2, repeat(forget))[0] == 0
    assert relearned(audit, without_logit(trained), 60.0, 5, 0.1, repeat(forget)) == (None, [0.0])


def test_every_audit_is_that_of_its_samples_and_of_its_settings(trained, retrained, audit, data):
    config = replace(CONFIG, probes=("hidden", "neighbours", "two_layer"), samples=40, relearn_from=(1, 2))
    model, state, audit = masked(retrained), torch.get_rng_state(), replace(audit, config=config, seed=4)
    metrics = audit(model)
    assert torch.equal(torch.get_rng_state(), state)

    some = some_of_every_class(data.train, 40, "audit", 4)
    train, test = (predictions_of(model, split) for split in (some, data.test))
    is_member, is_own = (each.labels == FORGET for each in (train, test))
    logits, after = test.logits, retrained(data.test.images)
    goal = 50 * (trained(data.test.images).argmax(1)[is_own] == FORGET).double().mean().item()
    again = partial(relearned, audit, model, goal, 40, 0.1)
    steps, scores = again(data.train.forget(FORGET).batches(10, seeded("relearn", 4)))
    few = {str(count): some_of_every_class(data.train, count, "relearn from", 4) for count in (1, 2)}
    assert metrics == {
        "js_forget": jensen_shannon(logits[is_own], after[is_own]),
        "js_retain": jensen_shannon(logits[~is_own], after[~is_own]),
        "loss_attack": loss_attack(train.loss[is_member], test.loss[is_own]),
        "entropy_attack": audits.entropy_attack(train, test, is_member),
        **probe_metrics(train, test, FORGET, 4, config.probes),
        "prototype_recall": {str(n): audits.prototype_recall(train, test, FORGET, 4, n) for n in (1, 2)},
        "relearn_steps": steps,
        "came_back": scores[-1] >= goal,
        "relearn_scores": scores,
        "relearn_from": {count: again(repeat(samples))[0] for count, samples in few.items()},
        "weights_changed": sum(int((a != b).sum()) for a, b in zip(model.weights, trained.weights)),
    }


def test_what_cannot_be_audited_is_null_and_what_does_not_come_back_is_told(trained, retrained, audit, monkeypatch):
    beside, broken = audit(trained), copy.deepcopy(trained)
    broken.weights[0].data[0, 0] = torch.nan
    assert audit(broken) == dict.fromkeys(beside) | {"weights_changed": 1} and None not in beside.values()
    assert predictions_of(broken, audit.data.test).correct.sum() == 0
    assert replace(audit, retrained=None)(trained) == beside | dict.fromkeys(["js_forget", "js_retain"])
    assert {*audit.columns()} == {name for name, value in beside.items() if type(value) in (int, float)}
    removed = audit(without_logit(trained))
    assert removed["relearn_steps"] is None and not removed["came_back"]
    monkeypatch.setattr(audits, "LEARNING_RATE", 1e-6)
    never = replace(audit, config=replace(CONFIG, relearn_steps=1))(retrained)
    assert never["relearn_steps"] == 1 and not never["came_back"] and never["js_forget"] == never["js_retain"] == 0
