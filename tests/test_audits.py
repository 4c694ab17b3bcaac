"""The audits on cases whose answer is known: identical models, planted leaks, and references written out by hand."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from conftest import IN_FEATURES, NUM_CLASSES, random_classifier, random_split

from audits import (
    PROBES,
    Audit,
    AuditConfig,
    Seen,
    entropy_attack,
    jensen_shannon,
    linear_probe,
    look_at,
    loss_attack,
    made_permanent,
    neighbours_probe,
    relearn,
    relearn_from,
    trained_probe,
    weights_changed,
)
from data import ImageData, Split, seeded, seeded_initialisation, some_of_every_class
from methods import WithoutLogit
from model import HookedMNISTClassifier, Mask, WeightGraph
from trainer import Trainer, TrainerConfig

FORGET = 1
CONFIG = AuditConfig(
    enabled=True, probe_penalty=0.0, probe_steps=200, probes=(), probe_epochs=30, probe_batch_size=32, probe_rate=0.05,
    probe_units=8, probe_neighbours=5, probe_neighbours_of=150, relearn_steps=40, relearn_batch_size=10,
    relearn_rate=0.1, relearn_from=(), relearn_from_rate=0.1,
)  # fmt: skip


@pytest.fixture(scope="module")
def data() -> ImageData:
    return ImageData(random_split(100), random_split(60, seed=3))


@pytest.fixture(scope="module")
def trained(data):
    return Trainer(TrainerConfig((6, 5), False, 30, 16, 0.01), 0).train(data.train, NUM_CLASSES)


@pytest.fixture(scope="module")
def retrained(data):
    return Trainer(TrainerConfig((6, 5), False, 30, 16, 0.01), 0).train(data.train.retain(FORGET), NUM_CLASSES)


def test_the_divergence_is_that_of_its_definition():
    generator = torch.Generator().manual_seed(0)
    logits, others = torch.randn(2, 5, 4, generator=generator)
    expected = 0.0
    for p, q in zip(logits.double().softmax(1).tolist(), others.double().softmax(1).tolist()):
        for a, b in zip(p, q):
            expected += (a * math.log2(2 * a / (a + b)) + b * math.log2(2 * b / (a + b))) / 2 / 5
    assert jensen_shannon(logits, others) == pytest.approx(expected, rel=1e-12)
    assert jensen_shannon(others, logits) == pytest.approx(expected, rel=1e-12)


def test_the_divergence_is_0_for_the_same_and_1_for_the_opposite():
    logits = torch.tensor([[3.0, 1.0], [-torch.inf, 2.0]])
    assert jensen_shannon(logits, logits) == 0.0
    assert jensen_shannon(logits, logits + 7) == pytest.approx(0.0, abs=1e-7)
    surely = torch.tensor([[0.0, -torch.inf]])
    assert jensen_shannon(surely, surely.flip(1)) == pytest.approx(1.0)


def test_the_loss_attack_counts_pairs():
    members, others = torch.tensor([0.1, 0.4, 0.4, torch.inf]), torch.tensor([0.4, 0.2, 3.0])
    pairs = [(m < o) + (m == o) / 2 for m in members.tolist() for o in others.tolist()]
    assert loss_attack(members, others) == pytest.approx(sum(pairs) / len(pairs))


def test_the_loss_attack_finds_a_planted_leak_and_nothing_without_one():
    losses = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    assert loss_attack(losses, losses) == pytest.approx(0.5)
    assert loss_attack(losses / 1000, losses + 1) == 1.0
    assert loss_attack(losses + 1, losses / 1000) == 0.0


def test_attacks_on_what_does_not_vary_are_undefined():
    endless = torch.full((5,), torch.inf)
    assert math.isnan(loss_attack(endless, endless)) and loss_attack(torch.zeros(5), endless) == 1.0
    sure = torch.tensor([[0.0, -torch.inf]]).repeat(9, 1)
    assert math.isnan(entropy_attack(sure, sure, sure))


def logits_of(confidence: float, count: int, seed: int) -> torch.Tensor:
    noise = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))
    noise[:, 0] += confidence
    return noise


def test_the_entropy_attack_finds_a_planted_leak():
    retain, test = logits_of(9.0, 600, 0), logits_of(1.0, 200, 1)
    assert entropy_attack(retain, test, logits_of(9.0, 300, 2)) > 97  # as sure of the class as of its members
    assert entropy_attack(retain, test, logits_of(0.0, 300, 3)) < 10


def test_the_entropy_attack_finds_the_optimum_of_its_loss():
    """By gradient descent on the same balanced loss, in place of Newton's method."""
    retain, test, forget = logits_of(4.0, 300, 0), logits_of(2.0, 100, 1), logits_of(3.0, 500, 2)
    entropies = [torch.special.entr(x.double().softmax(1)).sum(1) for x in (retain, test, forget)]
    x = torch.cat(entropies[:2])
    y = torch.cat([torch.ones(300), torch.zeros(100)]).double()
    weight = torch.cat([torch.full((300,), 400 / 600), torch.full((100,), 400 / 200)]).double()
    solution = torch.zeros(2, dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS([solution], max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        logits = solution[0] * x + solution[1]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, y, weight, reduction="sum")
        (loss + solution[0] ** 2 / 2).backward()
        return loss + solution[0] ** 2 / 2

    optimizer.step(closure)
    passing = 100 * (solution[0] * entropies[2] + solution[1] > 0).double().mean().item()
    assert 5 < passing < 95 and entropy_attack(retain, test, forget) == pytest.approx(passing, abs=0.3)


def seen(features: torch.Tensor, labels: torch.Tensor) -> Seen:
    return Seen(torch.zeros(len(labels), int(labels.max()) + 1), (features,), labels)


def test_the_probe_finds_a_class_that_the_features_hold_and_none_that_they_do_not():
    train, test = random_split(200), random_split(100, seed=9)
    blind = [seen(torch.randn(len(each.labels), 4, generator=torch.Generator().manual_seed(1)), each.labels)
             for each in (train, test)]  # fmt: skip
    found = linear_probe(*blind, penalty=0.0, steps=200) == test.labels
    assert found.double().mean() < 0.5
    sighted = [
        seen(torch.cat([each.features, (each.labels == FORGET)[:, None].float()], 1), each.labels) for each in blind
    ]
    found = linear_probe(*sighted, penalty=1e-6, steps=200) == test.labels
    assert found[test.labels == FORGET].all()


def test_the_probe_is_trained_to_convergence():
    """The optimum of softmax regression on standardised features, here without whitening and in double precision."""
    train, test = random_split(150), random_split(500, seed=9)
    noise = torch.randn(1500, IN_FEATURES, generator=torch.Generator().manual_seed(2))
    noisy = [seen(each.images + 2 * noise[: len(each.images)], each.labels)
             for each in (train, test)]  # fmt: skip
    deviation, mean = torch.std_mean(noisy[0].features.double(), 0)
    x, x_test = ((each.features.double() - mean) / deviation for each in noisy)
    weight = torch.zeros(IN_FEATURES, NUM_CLASSES, dtype=torch.double, requires_grad=True)
    bias = torch.zeros(NUM_CLASSES, dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(x @ weight + bias, train.labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    expected = (x_test @ weight + bias).argmax(1)
    agreement = (linear_probe(*noisy, penalty=0.0, steps=300) == expected).double().mean()
    assert agreement > 0.995


def test_the_probe_survives_features_that_never_change():
    train, test = random_split(100), random_split(50, seed=9)
    with_dead = [
        seen(torch.cat([each.images, torch.zeros(len(each.labels), 2)], 1), each.labels) for each in (train, test)
    ]
    alone = [seen(each.images, each.labels) for each in (train, test)]
    assert torch.equal(linear_probe(*with_dead, 1e-4, 200), linear_probe(*alone, 1e-4, 200))


def masked(classifier, vertices=(0, 7, 29)):
    model = copy.deepcopy(classifier)
    graph = WeightGraph(classifier.shapes, -2)
    Mask.zeroing(graph, torch.tensor(vertices)).apply(model)
    return model


def test_a_mask_made_permanent_answers_alike_and_leaves_the_model_as_it_was(trained, data):
    model = masked(trained)
    permanent = made_permanent(model)
    assert torch.equal(permanent(data.test.images), model(data.test.images))
    permanent.layers[1].weight.data.fill_(1.0)
    assert torch.equal(model(data.test.images), masked(trained)(data.test.images))
    assert weights_changed(model, trained) == 3 and weights_changed(trained, trained) == 0


def test_relearning_takes_no_step_for_a_class_that_is_there(trained, data):
    forget, test = data.train.forget(FORGET), data.test.forget(FORGET)
    scores = relearn(trained, forget, test, 40.0, CONFIG, 0)
    assert len(scores) == 1 and scores[0] > 90


def test_relearning_counts_the_steps_of_sgd(retrained, data):
    forget, test = data.train.forget(FORGET), data.test.forget(FORGET)
    config = replace(CONFIG, relearn_rate=0.2)
    scores = relearn(retrained, forget, test, 90.0, config, 0)
    model, by_hand = copy.deepcopy(retrained), []
    order = torch.randperm(len(forget.labels), generator=seeded("relearn", 0))
    for batch in order.split(config.relearn_batch_size):
        by_hand.append(100 * (model(test.images).argmax(1) == FORGET).double().mean().item())
        if by_hand[-1] >= 90:
            break
        loss = torch.nn.functional.cross_entropy(model(forget.images[batch]), forget.labels[batch])
        for parameter, gradient in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters()))):
            parameter.data -= config.relearn_rate * gradient
    assert scores[0] == 0.0 and 1 < len(scores) <= 11 and scores == pytest.approx(by_hand)
    assert len(relearn(retrained, forget, test, 101.0, config, 0)) == config.relearn_steps + 1


def test_a_model_that_never_saw_the_class_betrays_no_member(trained, retrained, data):
    audit = Audit(CONFIG, data, FORGET, trained, retrained, 0)
    assert audit(retrained)["loss_attack"] == pytest.approx(0.5, abs=0.1)


def test_relearning_ends_where_there_is_nothing_to_learn_from(trained, data):
    model = WithoutLogit(copy.deepcopy(trained), FORGET)
    assert relearn(model, data.train.forget(FORGET), data.test.forget(FORGET), 50.0, CONFIG, 0) == [0.0]


def test_the_retrained_classifier_is_at_no_distance_from_itself(trained, retrained, data):
    audit = Audit(CONFIG, data, FORGET, trained, retrained, 0)
    of_retrained, of_original = audit(retrained), audit(trained)
    assert of_retrained["js_forget"] == of_retrained["js_retain"] == 0.0
    assert of_original["js_forget"] > 0.5 > of_original["js_retain"]
    assert of_original["weights_changed"] == 0 and of_original["relearn_steps"] == 0
    assert of_retrained["relearn_steps"] == len(of_retrained["relearn_scores"]) - 1 > 0
    without_logit = audit(WithoutLogit(trained, FORGET))
    assert without_logit["relearn_steps"] is None and not without_logit["came_back"]
    never = Audit(replace(CONFIG, relearn_steps=1, relearn_rate=1e-6), data, FORGET, trained, retrained, 0)(retrained)
    assert never["relearn_steps"] == 1 and not never["came_back"]


def test_a_diverged_classifier_has_no_audits(trained, retrained, data):
    broken = copy.deepcopy(trained)
    broken.layers[0].weight.data[0, 0] = torch.nan
    of_broken = Audit(CONFIG, data, FORGET, trained, retrained, 0)(broken)
    assert of_broken.pop("weights_changed") == 1 and set(of_broken.values()) == {None}
    assert set(of_broken) | {"weights_changed"} == set(Audit(CONFIG, data, FORGET, trained, retrained, 0)(trained))
    assert look_at(broken, data.test).correct.sum() == 0


def test_a_removed_logit_leaves_the_representation_as_it_was(trained, retrained, data):
    audit = Audit(CONFIG, data, FORGET, trained, retrained, 0)
    assert audit(WithoutLogit(trained, FORGET))["probe_recall"] == audit(trained)["probe_recall"] > 90


def test_audits_leave_the_classifier_and_the_global_generator_alone(trained, retrained, data):
    model, state = masked(trained), torch.get_rng_state()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    Audit(CONFIG, data, FORGET, trained, retrained, 0)(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_features_are_the_input_of_the_last_layer_and_hidden_those_of_every_layer_after_the_first():
    classifier, split = random_classifier(), random_split(10)
    looked = look_at(torch.nn.Sequential(classifier), Split(split.images, split.labels))
    expected = split.images
    for layer, hidden in zip(classifier.layers[:-1], looked.hidden, strict=True):
        expected = layer(expected).relu()
        assert torch.equal(hidden, expected)
    chosen = looked.of(looked.labels == FORGET)
    assert all(torch.equal(x, y[split.labels == FORGET]) for x, y in zip(chosen.hidden, looked.hidden, strict=True))
    assert torch.equal(looked.features, expected) and torch.equal(looked.logits, classifier(split.images))
    assert looked.loss[3] == pytest.approx(-classifier(split.images).double().log_softmax(1)[3, split.labels[3]].item())


def test_a_classifier_of_one_layer_represents_the_images_by_themselves():
    classifier, split = HookedMNISTClassifier((), IN_FEATURES, NUM_CLASSES), random_split(10)
    assert torch.equal(look_at(classifier, split).features, split.images)
    assert len(look_at(classifier, split).hidden) == 1


def two_classes_apart(samples: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of many scales, the class in the sign of one of them."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (samples,), generator=generator)
    features = torch.randn(samples, 4, generator=generator)
    features[:, 2] += 8.0 * labels
    return features * torch.tensor([1.0, 100.0, 0.01, 10.0]) + 5, labels


def exclusive_or(samples: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, (samples, 2), generator=generator)
    return 2.0 * signs - 1 + 0.1 * torch.randn(samples, 2, generator=generator), signs.sum(1) % 2


@pytest.mark.parametrize("hidden", [(), (8,)])
def test_a_trained_probe_finds_a_class_that_is_linearly_there_and_none_that_is_not(hidden):
    (train, labels), (test, expected) = two_classes_apart(400, 0), two_classes_apart(300, 1)
    state = torch.get_rng_state()
    found = trained_probe(train, labels, test, hidden, CONFIG, 0)
    assert (found == expected).double().mean() > 0.99
    blind = trained_probe(train[:, [0, 1, 3]], labels, test[:, [0, 1, 3]], hidden, CONFIG, 0)
    assert 0.35 < (blind == expected).double().mean() < 0.65
    assert torch.equal(trained_probe(train, labels, test, hidden, CONFIG, 0), found)
    assert torch.equal(torch.get_rng_state(), state)


def test_two_layers_find_what_no_line_can_part():
    (train, labels), (test, expected) = exclusive_or(400, 0), exclusive_or(300, 1)
    linear, two_layer = (trained_probe(train, labels, test, hidden, CONFIG, 0) == expected for hidden in ((), (8,)))
    assert linear.double().mean() < 0.8 and two_layer.double().mean() > 0.99


def test_a_trained_probe_is_adam_on_standardised_features():
    train, test = random_split(30), random_split(20, seed=9)
    config = replace(CONFIG, probe_epochs=2)
    found = trained_probe(train.images, train.labels, test.images, (), config, 3)
    mean, deviation = train.images.mean(0), train.images.std(0)
    with seeded_initialisation(3):
        layer = torch.nn.Linear(IN_FEATURES, NUM_CLASSES)
    optimizer, generator = torch.optim.Adam(layer.parameters(), config.probe_rate), seeded("probe", 3)
    for _ in range(2):
        order = torch.randperm(90, generator=generator)
        for start in range(0, 90, config.probe_batch_size):
            batch = order[start : start + config.probe_batch_size]
            logits = layer((train.images[batch] - mean) / deviation)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(logits, train.labels[batch]).backward()
            optimizer.step()
    assert torch.equal(found, layer((test.images - mean) / deviation).argmax(1))


def test_the_nearest_neighbours_by_brute_force():
    """More samples than are looked at in one go; where classes are equally frequent, any of them."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([1.0, 100.0, 0.01])
    train, test = torch.randn(80, 3, generator=generator) * scales, torch.randn(1100, 3, generator=generator) * scales
    labels = torch.randint(4, (80,), generator=generator)
    found = neighbours_probe(train, labels, test, 7)
    mean, deviation = train.double().mean(0), train.double().std(0)
    distances = torch.cdist((test.double() - mean) / deviation, (train.double() - mean) / deviation)
    for row, label in zip(distances, found.tolist(), strict=True):
        votes = labels[row.argsort()[:7]].bincount(minlength=4)
        assert votes[label] == votes.max()
    assert set(found.tolist()) == {0, 1, 2, 3}


def test_neighbours_are_no_more_than_there_are_samples():
    train, test = random_split(2), random_split(3, seed=9)
    assert neighbours_probe(train.images, train.labels, test.images, 20).tolist() == [0] * 9


def test_some_samples_of_every_class_are_the_same_for_every_classifier():
    split = random_split(9)
    few = Split(split.images[split.labels != 2], split.labels[split.labels != 2])
    one = split.forget(2)
    uneven = Split(torch.cat([few.images, one.images[:3]]), torch.cat([few.labels, one.labels[:3]]))
    chosen = some_of_every_class(uneven, 5, "relearn from", 0)
    assert chosen.labels.bincount().tolist() == [5, 5, 3]
    rows = {tuple(image): label for image, label in zip(uneven.images.tolist(), uneven.labels.tolist())}
    assert [rows[tuple(image)] for image in chosen.images.tolist()] == chosen.labels.tolist()
    assert len({tuple(image) for image in chosen.images.tolist()}) == 13
    again, other = some_of_every_class(uneven, 5, "relearn from", 0), some_of_every_class(uneven, 5, "relearn from", 1)
    assert torch.equal(again.images, chosen.images) and not torch.equal(other.images, chosen.images)


def steps_of_sgd(model, samples: Split, test: Split, goal: float, frozen=()) -> int:
    """Steps at a rate of 0.1 until the goal; the weights `frozen` of the middle layer stay 0."""
    steps = 0
    while 100 * (model(test.images).argmax(1) == FORGET).double().mean() < goal:
        loss = torch.nn.functional.cross_entropy(model(samples.images), samples.labels)
        for parameter, gradient in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters()))):
            parameter.data -= 0.1 * gradient
        model.layers[1].weight.data.view(-1)[list(frozen)] = 0
        steps += 1
    return steps


def test_relearning_from_few_samples_counts_the_steps_of_sgd(retrained, data):
    samples, test = some_of_every_class(data.train, 10, "relearn from", 0), data.test.forget(FORGET)
    before = {name: value.clone() for name, value in retrained.state_dict().items()}
    steps = relearn_from(retrained, samples, test, 60.0, 0.1, 200)
    assert steps == steps_of_sgd(copy.deepcopy(retrained), samples, test, 60.0) > 1
    assert relearn_from(retrained, samples, test, 60.0, 0.1, steps - 1) == steps - 1
    assert all(torch.equal(value, before[name]) for name, value in retrained.state_dict().items())


def test_relearning_from_few_samples_frees_the_weights_of_a_mask(retrained, trained, data):
    samples, test = some_of_every_class(data.train, 10, "relearn from", 0), data.test.forget(FORGET)
    zeroed = range(0, 30, 2)
    steps = relearn_from(masked(retrained, zeroed), samples, test, 60.0, 0.1, 200)
    free, frozen = copy.deepcopy(retrained), copy.deepcopy(retrained)
    for model in (free, frozen):
        model.layers[1].weight.data.view(-1)[list(zeroed)] = 0
    assert steps == steps_of_sgd(free, samples, test, 60.0) != steps_of_sgd(frozen, samples, test, 60.0, zeroed)
    assert relearn_from(trained, samples, test, 60.0, 0.1, 200) == 0


def test_relearning_from_few_samples_tells_what_does_not_come_back_from_what_cannot(trained, retrained, data):
    samples, test = some_of_every_class(data.train, 2, "relearn from", 0), data.test.forget(FORGET)
    assert relearn_from(retrained, samples, test, 60.0, 1e-6, 5) == 5
    assert relearn_from(WithoutLogit(copy.deepcopy(trained), FORGET), samples, test, 60.0, 0.1, 5) is None


def recall(found: torch.Tensor) -> float:
    return 100 * (found == FORGET).double().mean().item()


def test_the_further_probes_and_relearnings_are_those_that_were_asked_for(trained, retrained, data):
    few = {"probe_neighbours": 3, "probe_neighbours_of": 3}  # all neighbours are the same
    config = replace(CONFIG, probes=PROBES, relearn_from=(1, 5), probe_epochs=2, **few)
    found = Audit(config, data, FORGET, trained, retrained, 4)(retrained)
    train, test = data.train, data.test.forget(FORGET)
    first = [retrained.layers[0](split.images).relu().detach() for split in (train, test)]
    last = [retrained.layers[1](x).relu().detach() for x in first]
    order = torch.randperm(300, generator=seeded("neighbours", 4))[:3]
    assert found["probes"] == {
        "softmax": recall(trained_probe(last[0], train.labels, last[1], (), config, 4)),
        "two_layer": recall(trained_probe(last[0], train.labels, last[1], (8,), config, 4)),
        "neighbours": recall(neighbours_probe(last[0][order], train.labels[order], last[1], 3)),
        "hidden_0": recall(trained_probe(first[0], train.labels, first[1], (), config, 4)),
    }
    original = 50 * (trained(test.images).argmax(1) == FORGET).double().mean().item()
    assert found["relearn_from"] == {
        str(count): relearn_from(
            retrained, some_of_every_class(train, count, "relearn from", 4), test, original, 0.1, 40
        )
        for count in (1, 5)
    }


@pytest.mark.parametrize("name", PROBES)
def test_every_further_probe_stands_alone(name, trained, data):
    config = replace(CONFIG, probes=(name,), probe_epochs=1, relearn_steps=1)
    found = Audit(config, data, FORGET, trained, None, 0)(trained)
    assert list(found["probes"]) == ["hidden_0" if name == "hidden" else name] and found["relearn_from"] == {}
    assert found["probes"].popitem()[1] > 50


def test_without_a_retrained_classifier_only_the_divergences_are_missing(trained, retrained, data):
    alone, beside = (Audit(CONFIG, data, FORGET, trained, other, 0)(trained) for other in (None, retrained))
    assert alone["js_forget"] is None and alone["js_retain"] is None
    assert alone == beside | {"js_forget": None, "js_retain": None} and None not in beside.values()
    assert beside["probes"] == beside["relearn_from"] == {}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"probes": ("softmax", "sofmax")}, "probes: 'sofmax' is not known: valid are softmax, two_layer, neighb"),
        ({"relearn_from": (5, 0)}, "relearn_from must be at least 1, not 0"),
        ({"probe_neighbours": 9, "probe_neighbours_of": 8}, "probe_neighbours must be at most probe_neighbours_of, 8"),
        *(({name: 0}, f"{name} must be at least 1, not 0") for name in (
            "probe_steps", "probe_epochs", "probe_batch_size", "probe_units", "probe_neighbours", "probe_neighbours_of",
            "relearn_steps", "relearn_batch_size",
        )),
        *(({name: 0.0}, f"{name} must be above 0") for name in ("probe_rate", "relearn_rate", "relearn_from_rate")),
        ({"probe_penalty": -1.0}, "probe_penalty must be at least 0"),
    ],
)  # fmt: skip
def test_impossible_settings_of_the_audits_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)
