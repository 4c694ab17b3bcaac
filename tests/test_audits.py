"""The audits on cases whose answer is known: identical models, planted leaks, and references written out by hand."""

import copy
import math
from dataclasses import replace
from itertools import repeat
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import IN_FEATURES, NUM_CLASSES, random_classifier, random_split, trainer_config

from mimu.audits import Audit, AuditConfig, weights_changed
from mimu.audits.predictions import entropy_attack, jensen_shannon, look_at, loss_attack
from mimu.audits.probes import linear, neighbours, prototype_recall, two_layer
from mimu.audits.relearning import made_permanent, relearn
from mimu.data import ImageData, Split, seeded, seeded_initialisation, some_of_every_class
from mimu.methods.controls import logit_removed
from mimu.model import HookedMNISTClassifier, Mask, WeightGraph
from mimu.trainer import Trainer

FORGET = 1
CONFIG = AuditConfig(
    enabled=True, probes=(), probe_penalty=0.0, probe_steps=300, probe_epochs=30, probe_batch_size=32, probe_rate=0.05,
    probe_units=8, probe_neighbours=5, probe_neighbours_of=150, relearn_steps=40, relearn_batch_size=10,
    relearn_rate=0.1, relearn_from=(), relearn_from_rate=0.1,
)  # fmt: skip


@pytest.fixture(scope="module")
def data() -> ImageData:
    return ImageData(random_split(100), random_split(60, seed=3))


def classifier_of(split: Split) -> HookedMNISTClassifier:
    return Trainer(trainer_config((6, 5), 30), 0).train(split, NUM_CLASSES)


@pytest.fixture(scope="module")
def trained(data):
    return classifier_of(data.train)


@pytest.fixture(scope="module")
def retrained(data):
    return classifier_of(data.train.retain(FORGET))


@pytest.fixture(scope="module")
def audit(data, trained, retrained) -> Audit:
    return Audit(CONFIG, data, FORGET, 0, trained, retrained)


def without_logit(classifier):
    return logit_removed(SimpleNamespace(classifier=copy.deepcopy(classifier), forget_class=FORGET))


def masked(classifier, vertices=(0, 7, 29)):
    model = copy.deepcopy(classifier)
    Mask.zeroing(WeightGraph.of(classifier, -2), torch.tensor(vertices)).apply(model)
    return model


def test_what_is_seen_are_logits_losses_and_the_inputs_of_every_layer_after_the_first():
    classifier, split = random_classifier(), random_split(10)
    looked = look_at(torch.nn.Sequential(classifier), split)
    expected = split.images
    for layer, hidden in zip(classifier.layers[:-1], looked.hidden, strict=True):
        expected = layer(expected).relu()
        assert torch.equal(hidden, expected)
    logits = classifier(split.images)
    assert torch.equal(looked.logits, logits)
    assert looked.loss[3] == pytest.approx(-logits.double().log_softmax(1)[3, split.labels[3]].item())
    assert looked.correct.tolist() == [float(label == row.argmax()) for label, row in zip(split.labels, logits)]
    assert not any(layer._forward_pre_hooks for layer in classifier.layers)
    (hidden,) = look_at(HookedMNISTClassifier((), IN_FEATURES, NUM_CLASSES), split).hidden
    assert torch.equal(hidden, split.images)  # which a classifier of one layer represents by themselves


def test_the_divergence_is_that_of_its_definition():
    logits, others = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    expected = 0.0
    for p, q in zip(logits.double().softmax(1).tolist(), others.double().softmax(1).tolist()):
        for a, b in zip(p, q):
            expected += (a * math.log2(2 * a / (a + b)) + b * math.log2(2 * b / (a + b))) / 2 / 5
    assert jensen_shannon(logits, others) == pytest.approx(expected, rel=1e-12)
    assert jensen_shannon(others, logits) == pytest.approx(expected, rel=1e-12)
    surely = torch.tensor([[0.0, -torch.inf]])
    assert jensen_shannon(surely, surely) == 0.0 and jensen_shannon(surely, surely.flip(1)) == pytest.approx(1.0)


def test_the_loss_attack_counts_pairs():
    members, others = torch.tensor([0.1, 0.4, 0.4, torch.inf]), torch.tensor([0.4, 0.2, 3.0])
    pairs = [(m < o) + (m == o) / 2 for m in members.tolist() for o in others.tolist()]
    assert loss_attack(members, others) == pytest.approx(sum(pairs) / len(pairs))
    endless = torch.full((5,), torch.inf)
    assert math.isnan(loss_attack(endless, endless)) and loss_attack(torch.zeros(5), endless) == 1.0


def converged(parameters: list[torch.Tensor], loss) -> None:
    """Minimises a loss of parameters in double precision."""
    optimizer = torch.optim.LBFGS(parameters, max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)


def test_the_entropy_attack_finds_the_optimum_of_its_loss():
    """By gradient descent on the same balanced loss, in place of Newton's method."""
    retain, test, forget = (
        torch.randn(count, 3, generator=seeded(count)) + torch.tensor([confidence, 0.0, 0.0])
        for confidence, count in ((4.0, 300), (2.0, 100), (3.0, 500))
    )
    entropies = [torch.special.entr(x.double().softmax(1)).sum(1) for x in (retain, test, forget)]
    x = torch.cat(entropies[:2])
    y = torch.cat([torch.ones(300), torch.zeros(100)]).double()
    weight = torch.cat([torch.full((300,), 400 / 600), torch.full((100,), 400 / 200)]).double()
    solution = torch.zeros(2, dtype=torch.double, requires_grad=True)

    def loss():
        logits = solution[0] * x + solution[1]
        return F.binary_cross_entropy_with_logits(logits, y, weight, reduction="sum") + solution[0] ** 2 / 2

    converged([solution], loss)
    passing = 100 * (solution[0] * entropies[2] + solution[1] > 0).double().mean().item()
    assert 5 < passing < 95 and entropy_attack(retain, test, forget) == pytest.approx(passing, abs=0.3)
    sure = torch.tensor([[0.0, -torch.inf]]).repeat(9, 1)
    assert math.isnan(entropy_attack(sure, sure, sure))


def standardised(train: torch.Tensor, test: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mean, deviation = train.mean(0), train.std(0, correction=0) + 0.001
    return (train - mean) / deviation, (test - mean) / deviation


def test_prototypes_are_means_of_a_few_samples_and_the_nearest_one_names_a_sample(data, trained):
    train, test = (look_at(trained, split) for split in (data.train, data.test))
    own = test.hidden[-1][test.labels == FORGET]
    for count in (1, 1000):
        order, means = torch.randperm(len(train.labels), generator=seeded("prototypes", 5)).tolist(), []
        for label in range(NUM_CLASSES):
            chosen = [index for index in order if train.labels[index] == label][:count]
            means.append(sum(train.hidden[-1][index].double() for index in chosen) / len(chosen))
        named = [min(range(NUM_CLASSES), key=lambda c: (x.double() - means[c]).norm().item()) for x in own]
        expected = 100 * sum(label == FORGET for label in named) / len(named)
        assert prototype_recall(train, test, FORGET, count, 5) == pytest.approx(expected)


@pytest.mark.parametrize("dead", [0, 2])
def test_the_linear_probe_is_trained_to_convergence(dead):
    """The optimum of softmax regression, here without whitening and in double precision, and features that are 0."""
    train, test = random_split(150), random_split(500, seed=9)
    noise = torch.randn(1500, IN_FEATURES, generator=torch.Generator().manual_seed(2))
    features = [each.images + 2 * noise[: len(each.images)] for each in (train, test)]
    x, x_test = standardised(*(each.double() for each in features))
    weight = torch.zeros(IN_FEATURES, NUM_CLASSES, dtype=torch.double, requires_grad=True)
    bias = torch.zeros(NUM_CLASSES, dtype=torch.double, requires_grad=True)
    converged([weight, bias], lambda: F.cross_entropy(x @ weight + bias, train.labels))
    expected = (x_test @ weight + bias).argmax(1)
    found = linear(F.pad(features[0], (0, dead)), train.labels, F.pad(features[1], (0, dead)), CONFIG, 0)
    assert (found == expected).double().mean() > 0.995
    ridged = linear(features[0], train.labels, features[1], replace(CONFIG, probe_penalty=0.3), 0)
    assert 0.9 < (ridged == expected).double().mean() < 0.995


def test_the_perceptron_is_trained_by_adam_on_standardised_features():
    train, test = random_split(30), random_split(20, seed=9)
    config = replace(CONFIG, probe_epochs=2)
    x, x_test = standardised(train.images, test.images)
    with seeded_initialisation(3):
        layers = [torch.nn.Linear(IN_FEATURES, 8), torch.nn.ReLU(), torch.nn.Linear(8, NUM_CLASSES)]
    probe = torch.nn.Sequential(*layers)
    optimizer, generator = torch.optim.Adam(probe.parameters(), config.probe_rate), seeded("probe", 3)
    for _ in range(2):
        order = torch.randperm(90, generator=generator)
        for start in range(0, 90, config.probe_batch_size):
            batch = order[start : start + config.probe_batch_size]
            optimizer.zero_grad()
            F.cross_entropy(probe(x[batch]), train.labels[batch]).backward()
            optimizer.step()
    assert torch.equal(two_layer(train.images, train.labels, test.images, config, 3), probe(x_test).argmax(1))


@pytest.mark.parametrize("count, among", [(7, 80), (7, 30), (30, 30)])
def test_the_nearest_neighbours_by_brute_force(count, among):
    """More samples than are looked at in one go; where classes are equally frequent, any of them."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([1.0, 100.0, 0.1])
    train, test = torch.randn(80, 3, generator=generator) * scales, torch.randn(1100, 3, generator=generator) * scales
    labels = torch.randint(4, (80,), generator=generator)
    config = replace(CONFIG, probe_neighbours=count, probe_neighbours_of=among)
    found = neighbours(train, labels, test, config, 5)
    chosen = torch.randperm(80, generator=seeded("neighbours", 5))[:among]
    distances = torch.cdist(*reversed(standardised(train[chosen].double(), test.double())))
    for row, label in zip(distances, found.tolist(), strict=True):
        votes = labels[chosen][row.argsort()[:count]].bincount(minlength=4)
        assert votes[label] == votes.max()
    assert len(set(found.tolist())) == (4 if count < among else 1)


def test_a_mask_made_permanent_answers_alike_and_leaves_the_model_as_it_was(trained, data):
    model = masked(trained)
    permanent = made_permanent(model)
    assert torch.equal(permanent(data.test.images), model(data.test.images))
    permanent.layers[1].weight.data.fill_(1.0)
    assert torch.equal(model(data.test.images), masked(trained)(data.test.images))
    assert weights_changed(model, trained) == 3 and weights_changed(trained, trained) == 0


def by_hand(model, samples, test: Split, goal: float, rate: float, frozen=()) -> list[float]:
    """The score before every step of SGD, until the goal; the weights `frozen` of the middle layer stay 0."""
    scores = []
    for batch in samples:
        scores.append(100 * (model(test.images).argmax(1) == FORGET).double().mean().item())
        if scores[-1] >= goal:
            return scores
        loss = F.cross_entropy(model(batch.images), batch.labels)
        for parameter, gradient in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters()))):
            parameter.data -= rate * gradient
        model.layers[1].weight.data.view(-1)[list(frozen)] = 0


def test_relearning_counts_the_steps_of_sgd_on_random_batches_of_the_class(retrained, trained, data):
    forget, test = data.train.forget(FORGET), data.test.forget(FORGET)
    before = copy.deepcopy(retrained.state_dict())
    steps, scores = relearn(retrained, test, 80.0, 40, 0.2, forget.batches(10, seeded(3)))
    order = torch.randperm(len(forget.labels), generator=seeded(3))
    samples = [Split(forget.images[batch], forget.labels[batch]) for batch in order.split(10)]
    assert scores == pytest.approx(by_hand(copy.deepcopy(retrained), samples, test, 80.0, 0.2))
    assert scores[0] == 0.0 and steps == len(scores) - 1 > 1
    assert all(torch.equal(value, before[name]) for name, value in retrained.state_dict().items())
    steps, scores = relearn(retrained, test, 101.0, 25, 0.2, forget.batches(10, seeded(0)))
    assert steps == 25 and len(scores) == 26  # more than one epoch
    assert relearn(trained, test, 40.0, 25, 0.2, forget.batches(10, seeded(0)))[0] == 0
    assert relearn(without_logit(trained), test, 60.0, 5, 0.1, repeat(forget)) == (None, [0.0])


def test_relearning_frees_the_weights_of_a_mask(retrained, data):
    samples, test = repeat(some_of_every_class(data.train, 10, "relearn from", 0)), data.test.forget(FORGET)
    zeroed = range(0, 30, 2)
    _, scores = relearn(masked(retrained, zeroed), test, 60.0, 200, 0.1, samples)
    free, frozen = copy.deepcopy(retrained), copy.deepcopy(retrained)
    for model in (free, frozen):
        model.layers[1].weight.data.view(-1)[list(zeroed)] = 0
    assert scores == pytest.approx(by_hand(free, samples, test, 60.0, 0.1))
    assert len(scores) != len(by_hand(frozen, samples, test, 60.0, 0.1, zeroed))


def test_the_retrained_classifier_is_at_no_distance_from_itself(trained, retrained, audit):
    of_retrained, of_original = audit(retrained), audit(trained)
    assert of_retrained["js_forget"] == of_retrained["js_retain"] == 0.0
    assert of_original["js_forget"] > 0.5 > of_original["js_retain"]
    assert of_original["weights_changed"] == 0 and of_original["relearn_steps"] == 0 and of_original["came_back"]
    assert of_retrained["relearn_steps"] == len(of_retrained["relearn_scores"]) - 1 > 0
    assert of_retrained["loss_attack"] == pytest.approx(0.5, abs=0.1)  # it never saw the class
    removed = audit(without_logit(trained))
    assert removed["relearn_steps"] is None and not removed["came_back"]
    assert removed["probe_recall"] == of_original["probe_recall"]
    never = replace(audit, config=replace(CONFIG, relearn_steps=1, relearn_rate=1e-6))(retrained)
    assert never["relearn_steps"] == 1 and not never["came_back"]


def test_every_audit_is_that_of_its_samples_and_of_what_was_asked_for(trained, retrained, audit, data):
    few = {"probe_neighbours": 3, "probe_neighbours_of": 3}  # all neighbours are the same
    config = replace(CONFIG, probes=("hidden", "neighbours", "two_layer"), relearn_from=(1, 2), probe_epochs=2, **few)
    model, state = masked(retrained), torch.get_rng_state()
    before = copy.deepcopy(model.state_dict())
    found = replace(audit, config=config, seed=4)(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)

    train, test, logits = look_at(model, data.train), look_at(model, data.test), retrained(data.test.images)
    forget, member = test.labels == FORGET, train.labels == FORGET
    goal = 50 * (trained(data.test.images).argmax(1)[forget] == FORGET).double().mean().item()
    forget_set, split = data.test.forget(FORGET), data.train.forget(FORGET)
    steps, scores = relearn(model, forget_set, goal, 40, 0.1, split.batches(10, seeded("relearn", 4)))
    every, of_class = (test.hidden, test.labels), ([hidden[forget] for hidden in test.hidden], test.labels[forget])
    right = {
        name: (probe(train.hidden[layer], train.labels, hidden[layer], config, 4) == labels).double()
        for name, probe, layer, (hidden, labels) in (
            ("linear", linear, 1, every), ("hidden_0", linear, 0, of_class),
            ("neighbours", neighbours, 1, of_class), ("two_layer", two_layer, 1, of_class),
        )
    }  # fmt: skip
    recalls = {name: each[forget] if name == "linear" else each for name, each in right.items()}
    assert list(found["probe_recall"]) == list(recalls)
    of_few = {}
    for count in (1, 2):
        samples = repeat(some_of_every_class(data.train, count, "relearn from", 4), 40)
        by_steps = by_hand(made_permanent(model), samples, forget_set, goal, 0.1)
        of_few[str(count)] = 40 if by_steps is None else len(by_steps) - 1
    assert found == {
        "js_forget": jensen_shannon(test.logits[forget], logits[forget]),
        "js_retain": jensen_shannon(test.logits[~forget], logits[~forget]),
        "loss_attack": loss_attack(train.loss[member], test.loss[forget]),
        "entropy_attack": entropy_attack(train.logits[~member], test.logits, train.logits[member]),
        "probe_recall": {name: pytest.approx(100 * each.mean().item()) for name, each in recalls.items()},
        "probe_retain": pytest.approx(100 * right["linear"][~forget].mean().item()),
        "prototype_recall": {str(count): prototype_recall(train, test, FORGET, count, 4) for count in (1, 2)},
        "relearn_steps": steps,
        "came_back": scores[-1] >= goal,
        "relearn_scores": scores,
        "relearn_from": of_few,
        "weights_changed": weights_changed(model, trained),
    }


def test_what_cannot_be_audited_is_null(trained, audit):
    beside, broken = audit(trained), copy.deepcopy(trained)
    broken.layers[0].weight.data[0, 0] = torch.nan
    of_broken = audit(broken)
    assert set(of_broken) == set(beside)
    assert of_broken.pop("weights_changed") == 1 and set(of_broken.values()) == {None}
    assert look_at(broken, audit.data.test).correct.sum() == 0
    assert None not in beside.values()
    assert replace(audit, retrained=None)(trained) == beside | {"js_forget": None, "js_retain": None}


def test_more_neighbours_than_there_are_is_refused():
    with pytest.raises(ValueError, match="probe_neighbours must be at most probe_neighbours_of, 150, not 151"):
        replace(CONFIG, probe_neighbours=151)
