"""Scores of weights, and the trainings of the classifier, of the GCN and on random labels."""

import copy
from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import NUM_CLASSES, graph_generator, pruning_config, random_split, trainer_config, untrained_gcn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import grad

import trainer
from data import GraphGenerator
from experiment.files import Artifact
from mimu import training
from mimu.errors import TrainingError
from mimu.pruning import Pruning, RemainingCounter, prune
from mimu.saliency import FORGETTING_TEMPERATURE as T
from mimu.saliency import ranked, saliency
from mimu.samples import Split, is_correct
from mimu.seeds import seeded
from trainer import GCNTrainer, GCNTrainerConfig, Trainer, UnlearningSFT

NECESSITY = ("necessity_forget", "necessity_retain")
RETAIN_WEIGHT = 5.0
SMALL = {"pretrained": False, "hidden": 8, "rounds": 2, "message_passing": True, "steps": 20, "learning_rate": 0.01,
         "group_size": 8, "samples": 30, "temperature": 0.25, "necessity_forget": 1.0, "necessity_retain": 1.0,
         "kappa": (3, 10), "partly_masked": (2, 8), "snapshots": 1}  # fmt: skip


def gcn_trainer(*graphs: GraphGenerator, seed: int = 0, retain_weight: float = RETAIN_WEIGHT, **changes) -> GCNTrainer:
    return GCNTrainer(GCNTrainerConfig(**SMALL | changes), graphs or [graph_generator()], retain_weight, seed)


def vertices_of(numbers) -> Tensor:
    return torch.tensor(list(numbers), dtype=torch.long)


def masked_logits(graphs: GraphGenerator, samples: Split, vertices: Tensor) -> Tensor:
    with graphs.graph.zeroing(vertices).applied_to(graphs.classifier), torch.no_grad():
        return graphs.classifier(samples.images).double()


def largest_free(scores, vertices, gone, count) -> list[int]:
    """Of `vertices` those of the largest scores that are not among `gone`, one after another."""
    return sorted(set(vertices) - set(gone), key=lambda v: -scores[v])[:count]


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(0, 40))
def test_the_next_to_go_and_masks_are_the_top_k_of_what_is_free(seed, k, gone):
    size, generator = 42 + 30 + 15, torch.Generator().manual_seed(seed)
    scores = torch.randn(size, dtype=torch.float64, generator=generator).requires_grad_()
    zeroed, weighting = list(range(size - gone, size)), torch.randn(size, generator=generator)
    mask = trainer.kappa_mask(scores, vertices_of(zeroed), k, 0.5)
    chosen = largest_free(scores.tolist(), range(size), zeroed, k)
    assert ranked(scores, vertices_of(zeroed), k).tolist() == chosen
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    assert set(mask.nonzero()[:, 0].tolist()) == {*zeroed, *chosen}
    standard = scores / scores.std()
    around = ((standard - standard[chosen[-1]].detach()) / 0.5).sigmoid() * weighting
    (expected,) = grad(around[: size - gone].sum(), scores, retain_graph=True)
    assert torch.allclose(*grad((mask * weighting).sum(), scores, retain_graph=True), expected, atol=1e-12)
    assert (trainer.top_k_mask(torch.zeros(2, size), k, 0.5).sum(-1) == k).all(), "of ties, too"


@pytest.mark.parametrize("mask_layer", [-2, None])
@pytest.mark.parametrize("term", NECESSITY)
def test_every_term_reaches_every_parameter_of_the_gcn_also_alone(term, mask_layer):
    graphs = graph_generator(mask_layer)
    trains = gcn_trainer(graphs, **{name: float(name == term) for name in NECESSITY})
    gcn = untrained_gcn(graphs.config.num_features, rounds=3)
    optimizer = torch.optim.SGD(gcn.parameters(), 0.1)
    for reached in ({"readout.weight"}, set(dict(gcn.named_parameters()))):
        optimizer.zero_grad(set_to_none=False)
        terms, _ = trains.necessity(gcn, graphs, vertices_of([]), 1, seeded("test"))
        terms[term].backward()
        gradients = {name: parameter.grad for name, parameter in gcn.named_parameters()}
        assert all(gradient.isfinite().all() for gradient in gradients.values())
        assert {name for name, gradient in gradients.items() if gradient.any()} == reached
        optimizer.step()  # takes the readout away from zero
    assert all(parameter.grad is None for parameter in graphs.classifier.parameters())


@pytest.mark.parametrize("mask_layer, zeroed", [(-1, []), ([0, 2], [1, 4, 9])])
def test_the_loss_is_of_the_classifier_under_the_mask_of_the_scores_which_weigh_the_terms_of_the_formula(
    mask_layer, zeroed
):
    graphs, row, gone = graph_generator(mask_layer), 1, vertices_of(zeroed)
    graph, gcn, generator = graphs.graph, untrained_gcn(graphs.config.num_features), seeded("test")
    gcn.readout.weight.data.normal_(generator=seeded("readout"))
    trains = gcn_trainer(graphs, necessity_forget=2.0, necessity_retain=0.5)
    terms, scores = trains.necessity(gcn, graphs, gone, row, seeded("test"))
    snapshot = graphs.snapshot(graphs.draw(8, generator), row, gone, graphs.config.features)
    formula, forgetting = saliency(snapshot, RETAIN_WEIGHT), snapshot.feature("forgetting", snapshot.own)
    forget_factors, retain_factors = gcn(snapshot.class_graph(), graph)[0].T
    expected = forget_factors * forgetting + retain_factors * (formula - forgetting)
    assert torch.allclose(scores, expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(saliency(snapshot, RETAIN_WEIGHT, trains.initial()), formula), "before the training"
    kappa = trainer.log_uniform((3, 10), graph.num_vertices, generator)
    removed = [*zeroed, *largest_free(scores.tolist(), range(graph.num_vertices), zeroed, kappa)]
    samples, original = graphs.draw(10, generator), graphs.classifier(graphs.samples.images)
    masked = masked_logits(graphs, graphs.samples, vertices_of(removed)).softmax(1)
    p = masked[samples[row], row]
    forget = T * (1 + (p / (1 - p)) ** (1 / T)).log().mean()
    retained = samples[[0, 2]].flatten()
    target = original[retained].index_fill(1, torch.tensor([row]), -torch.inf).softmax(1)
    retain = -(target * masked[retained].log()).sum(1).mean()
    assert terms["necessity_forget"].item() == pytest.approx(2.0 * forget.item() / RETAIN_WEIGHT, rel=1e-4)
    assert terms["necessity_retain"].item() == pytest.approx(0.5 * retain.item(), rel=1e-4) and len(terms) == 2
    drawn = [trainer.log_uniform((3, 10), 30, generator) for _ in range(500)]
    assert set(drawn) == set(range(3, 11)) and drawn.count(3) > drawn.count(9)


def test_one_gcn_learns_along_requests_on_several_classifiers(monkeypatch):
    graphs, calls, necessity = [graph_generator(), graph_generator(None)], [], GCNTrainer.necessity

    def spy(self, gcn, of_classifier, zeroed, class_index, generator):
        gradients = [parameter.grad for parameter in gcn.parameters() if parameter.grad is not None]  # of the last step
        assert torch.cat([torch.zeros(1), *(g.flatten() for g in gradients)]).norm() < 1.001, "it is clipped"
        terms, scores = necessity(self, gcn, of_classifier, zeroed, class_index, generator)
        calls.append((graphs.index(of_classifier), class_index, zeroed, scores))
        return terms, scores

    monkeypatch.setattr(GCNTrainer, "necessity", spy)
    amounts = {"kappa": (0.1, 0.3), "partly_masked": (0.1, 0.3), "snapshots": 2}
    gcn_trainer(*graphs, steps=24, necessity_retain=1000.0, **amounts).train()
    assert len(calls) == 24 and {call[0] for call in calls} == {0, 1} and {call[1] for call in calls} == {0, 1, 2}
    for step, (before, (place, row, zeroed, _)) in enumerate(pairwise(calls), 1):
        size, count = graphs[before[0]].graph.num_vertices, len(zeroed) - len(before[2])
        if len(zeroed) == 0:
            assert step % 3 == 0 or 2 * (len(before[2]) + round(0.3 * size)) > size, "a whole classifier"
            continue
        assert step % 3 > 0 and before[:2] == (place, row), "a request continues"
        assert 0.1 <= round(count / size, 2) <= 0.3
        assert torch.equal(zeroed, torch.cat([before[2], ranked(before[3], before[2], count)]))
    for other in (graph_generator(other_classes=False), graph_generator(features=("weight",))):
        with pytest.raises(TrainingError, match="must be those of all classifiers"):
            gcn_trainer(graphs[0], other)


def test_a_training_that_diverges_stops_with_the_step_and_what_to_look_at(split, classifier):
    broken, size = Split(split.images.index_fill(0, torch.tensor(0), torch.nan), split.labels), len(split.labels)
    sft = UnlearningSFT(trainer.UnlearningSFTConfig(1, size, 0.1), 0)
    with pytest.raises(TrainingError, match="loss is (nan|inf) at step 0: .*diverged, see classifier.learning_rate"):
        Trainer(trainer_config((6, 5), 1, size), 0).train(broken, NUM_CLASSES)
    with pytest.raises(TrainingError, match="loss is (nan|inf) at step 0: .*diverged, see eval.hyperparameters"):
        sft.unlearn(classifier, broken, (1,))
    for term in NECESSITY:
        with pytest.raises(TrainingError, match=f"{term} is inf at step 0: .*diverged, see gcn.learning_rate"):
            gcn_trainer(**{term: torch.inf}).train()


def test_augmented_images_are_cuts_of_the_padded_one_or_of_its_mirror_image_and_each_of_them_comes():
    images = torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5)
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (2, 2), (2, 2)), "edge")
    expected, drawn, generator = [set(), set()], [set(), set()], seeded("augmented")
    for image, (y, x), mirrored in product(range(2), product(range(5), repeat=2), (False, True)):
        cut = padded[image, :, y : y + 4, x : x + 5]
        expected[image].add((cut[..., ::-1] if mirrored else cut).tobytes())
    for _ in range(1000):
        for image, augmented in enumerate(trainer.augmented(images, 2, True, generator)):
            drawn[image].add(augmented.numpy().tobytes())
    assert drawn == expected
    assert torch.equal(trainer.augmented(images, 0, False, generator), images)


def test_a_recipe_is_sgd_with_nesterov_momentum_and_weight_decay_on_smoothed_labels_of_augmented_images(split):
    recipe = {"momentum": 0.5, "weight_decay": 0.1, "label_smoothing": 0.2, "learning_rate": 0.3}
    steps, exact = 3, replace(split, images=split.images.double())
    by_recipe = Trainer(trainer_config((6, 5), steps, len(split.labels), **recipe), 0, (1, 7))
    trained = by_recipe.train(split, NUM_CLASSES)
    expected = by_recipe.initial(split.images, NUM_CLASSES).double()
    target = 0.8 * F.one_hot(split.labels, NUM_CLASSES) + 0.2 / NUM_CLASSES
    velocity = [0.0 for _ in expected.weights]
    for step in range(steps):
        loss = -(target * expected(exact.images).log_softmax(1)).sum(1).mean()
        for place, (weight, gradient) in enumerate(zip(expected.weights, grad(loss, expected.weights))):
            gradient = gradient + 0.1 * weight.detach()
            velocity[place] = 0.5 * velocity[place] + gradient
            weight.data -= 0.3 * (1 - step / steps) * (gradient + 0.5 * velocity[place])
    for one, other in zip(trained.weights, expected.weights, strict=True):
        assert torch.allclose(one.double(), other, atol=1e-5)
    shifted = replace(by_recipe, config=replace(by_recipe.config, shift=1)).train(split, NUM_CLASSES)
    assert not torch.allclose(shifted.weights[0], trained.weights[0], atol=1e-3)
    with pytest.raises(TrainingError, match="classifier.warm_up must be 0 or above 0.33, one of 3 steps"):
        replace(by_recipe, config=replace(by_recipe.config, warm_up=0.33)).train(split, NUM_CLASSES)


def test_the_rate_of_a_training_with_a_warm_up_rises_and_falls_to_zero_linearly(split, monkeypatch):
    rates, losses, descend = [], [], trainer.descend

    def spy(optimizer, terms, *about) -> None:
        rates.append(optimizer.param_groups[0]["lr"])
        losses.append(terms["loss"].item())
        descend(optimizer, terms, *about)

    monkeypatch.setattr(trainer, "descend", spy)
    recipe = {"momentum": 0.9, "weight_decay": 0.001, "warm_up": 0.25, "label_smoothing": 0.5, "learning_rate": 0.1}
    classifier = Trainer(trainer_config((6, 5), 10, **recipe), 0).train(split, NUM_CLASSES)
    # From a 25th of the learning rate up to it, and down to almost zero.
    assert np.allclose(rates, np.interp(range(40), [0, 9, 39], [0.1 / 25, 0.1, 0]), atol=1e-6)
    smoothed = F.cross_entropy(classifier(split.images), split.labels, label_smoothing=0.5)
    assert losses[-1] == pytest.approx(smoothed.item(), rel=0.3)
    assert is_correct(classifier(split.images), split.labels).double().mean() > 0.9


def test_mixed_precision_is_of_trainings_alone_and_changes_little(split, monkeypatch):
    monkeypatch.setattr("mimu.hooked.has_bfloat16", lambda device: True)
    exact, mixed = (Trainer(trainer_config((6, 5), 3, bfloat16=is_mixed), 0) for is_mixed in (False, True))
    assert torch.equal(exact.initial(split.images, 3)(split.images), mixed.initial(split.images, 3)(split.images))
    models = [each.train(split, NUM_CLASSES) for each in (exact, mixed)]
    one, other = (torch.cat([weight.flatten() for weight in model.weights]) for model in models)
    assert 0 < (one - other).norm() < 0.05 * one.norm()
    logits = mixed.initial(split.images, 3).train()(split.images)
    assert logits.dtype == torch.float32 and torch.equal(logits, logits.bfloat16().float())


def train_again(kind: str, split: Split, file: Artifact | None) -> list[Tensor]:
    """The weights of a model after a training, which is resumed from a file."""
    if kind == "classifier":
        recipe = {"momentum": 0.9, "warm_up": 0.2, "shift": 1, "flip": True}
        model = Trainer(trainer_config((6, 5), 4, **recipe), 0, (1, 7)).trained(split, NUM_CLASSES, file).model
    else:
        soon_half = {"snapshots": 5, "partly_masked": (0.4, 0.45)}
        model = gcn_trainer(graph_generator(), graph_generator(None), steps=16, **soon_half).train(file)
    return list(model.parameters())


@pytest.mark.parametrize("kind", ["classifier", "gcn"])
def test_an_interrupted_training_is_resumed_to_the_same_weights_but_not_from_another_ones_file(
    kind, split, tmp_path, monkeypatch
):
    monkeypatch.setattr(trainer, "SAVED_EVERY", 0.0)
    check, steps = training.check_finite, []

    def interrupted(losses, step, setting) -> None:
        steps.append(step)
        if len(steps) == 10:
            raise KeyboardInterrupt
        check(losses, step, setting)

    expected, file = train_again(kind, split, None), Artifact(tmp_path / "made.pt", "these")
    monkeypatch.setattr(training, "check_finite", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_again(kind, split, file)
    assert file.path.exists() and not file.is_current
    for provenance, remaining in (("others", range(16)), ("these", range(8, 16))):
        steps[:] = [-1] * 10
        copied = Artifact(tmp_path / f"{provenance}.pt", provenance)
        copied.path.write_bytes(file.path.read_bytes())
        assert all(map(torch.equal, train_again(kind, split, copied), expected))
        assert steps[10:] == list(remaining)


def test_how_far_a_gcn_is_behind_the_formula_is_what_their_masks_keep_and_leave():
    train, config, points = random_split(40, num_classes=4), pruning_config(step=2), []
    graphs = GraphGenerator(Trainer(trainer_config((6, 5), 10), 0).train(train, 4), train, graph_generator().config, 0)
    gcn = gcn_trainer(graphs).initial()
    assert gcn_trainer(graphs).points_behind(gcn, config) == 0
    gcn.readout.weight.data.normal_(std=30, generator=seeded("far"))
    for row in range(4):
        kept_less_remaining = []
        for scorer in (None, gcn):
            counter = RemainingCounter(graphs, row, graphs.samples.forget(row), config.target)
            steps = prune(graphs, row, config, 0, scorer, counter=counter)
            vertices = Pruning(steps, counter, config).chosen().vertices
            correct = (masked_logits(graphs, graphs.samples, vertices).argmax(1) == graphs.labels).double()
            kept_less_remaining.append(correct[graphs.labels != row].mean() - correct[graphs.labels == row].mean())
        points.append(100 * (kept_less_remaining[0] - kept_less_remaining[1]).item())
    assert gcn_trainer(graphs).points_behind(gcn, config) == pytest.approx(max(points)) and max(points) > 1


def test_training_lowers_both_terms_of_the_loss():
    graphs, means = graph_generator(None), []
    trains = gcn_trainer(graphs, steps=60, learning_rate=0.03, samples=180, kappa=(5, 10), retain_weight=1.0)
    for gcn in (trains.initial(), trains.train()):
        draws = product(range(NUM_CLASSES), range(5))
        terms = [trains.necessity(gcn, graphs, vertices_of([]), row, seeded(draw))[0] for row, draw in draws]
        means.append({name: np.mean([drawn[name].item() for drawn in terms]) for name in NECESSITY})
    before, after = means
    assert all(after[name] < before[name] - 0.01 for name in NECESSITY)


@pytest.mark.parametrize("forget_class", range(NUM_CLASSES))
def test_learning_random_labels_changes_the_masked_layer_only_and_forgets(monkeypatch, forget_class):
    split = random_split(60)
    original = Trainer(trainer_config((16, 12), 20, 32), 0).train(split, NUM_CLASSES)
    classifier, forget, labels = copy.deepcopy(original), split.forget(forget_class), []
    entropy, config = F.cross_entropy, trainer.UnlearningSFTConfig(epochs=10, batch_size=10, learning_rate=0.1)
    monkeypatch.setattr(F, "cross_entropy", lambda logits, y, **_: labels.extend(y.tolist()) or entropy(logits, y))
    UnlearningSFT(config, 0).unlearn(classifier, forget, (1,))
    assert len(labels) == 10 * 60 and set(labels) == {0, 1, 2} - {forget_class}
    assert (classifier(forget.images).argmax(1) == forget_class).float().mean() < 0.5
    assert list(map(torch.equal, classifier.weights, original.weights)) == [True, False, True]
