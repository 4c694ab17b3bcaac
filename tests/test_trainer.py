"""Scores of weights, the loss and the training of the GCN, and the order of zeroing until a class is forgotten."""

import copy
from dataclasses import asdict, replace
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import NUM_CLASSES, graph_generator, pruning_config, random_split, trainer_config, untrained_gcn
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from torch import Tensor
from torch.autograd import grad
from torch.nn.utils import parametrize

import trainer
from data import GraphGenerator
from experiment.files import Artifact
from mimu import tracing as hooked
from mimu.errors import ArtifactError, InputError, TrainingError
from mimu.files import save
from mimu.graph import MaskingGCN
from mimu.masks import Mask
from mimu.pretrained import TrainedGCN
from mimu.pruning import Pruning, PruningConfig, SaliencyScorer
from mimu.saliency import FORGETTING_TEMPERATURE as T
from mimu.saliency import TERMS, ranked, saliency
from mimu.samples import Split, is_correct
from mimu.seeds import seeded
from mimu.tracing import HookedClassifier
from trainer import GCNLoss, GCNTrainer, GCNTrainerConfig, Trainer, UnlearningSFT

NECESSITY = ("necessity_forget", "necessity_retain")
RETAIN_WEIGHT = 5.0


SMALL = {"pretrained": False, "hidden": 8, "rounds": 2, "message_passing": True, "steps": 20, "learning_rate": 0.01,
         "group_size": 8, "samples": 30, "temperature": 0.25, "necessity_forget": 1.0, "necessity_retain": 1.0,
         "kappa": (3, 10), "partly_masked": (2, 8), "snapshots": 1}  # fmt: skip


def gcn_config(**changes) -> GCNTrainerConfig:
    return GCNTrainerConfig(**SMALL | changes)


def adapted_gcn(graphs: GraphGenerator, rounds: int = 2) -> MaskingGCN:
    gcn = untrained_gcn(graphs.config.num_features, rounds)
    gcn.readout.weight.data.normal_(generator=seeded("readout"))
    return gcn


def zeroing_order(graphs, class_index=0, gcn=None, zeroed=None, **changes) -> Pruning:
    config = pruning_config(**changes)
    return Pruning(config, graphs, class_index, SaliencyScorer(config, graphs, class_index, 0, gcn), zeroed)


def vertices_of(numbers) -> Tensor:
    return torch.tensor(list(numbers), dtype=torch.long)


def largest_free(scores, vertices, gone, count) -> list[int]:
    """Of `vertices` those of the largest scores that are not among `gone`, one after another."""
    return sorted(set(vertices) - set(gone), key=lambda v: -scores[v])[:count]


@settings(deadline=None, max_examples=50)
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
    (found,) = grad((mask * weighting).sum(), scores, retain_graph=True)
    assert torch.allclose(found, expected, atol=1e-12)
    assert (trainer.top_k_mask(torch.zeros(2, size), k, 0.5).sum(-1) == k).all(), "of ties, too"


@pytest.mark.parametrize("mask_layer", [-2, None])
@pytest.mark.parametrize("zeroed", [[], [1, 4, 9]])
def test_the_gcn_weighs_the_terms_of_the_formula_and_is_the_formula_before_its_training(mask_layer, zeroed):
    graphs, row = graph_generator(mask_layer), 2
    names = (*TERMS, *graphs.config.features)
    snapshot = graphs.snapshot(graphs.by_class(), names, graphs.mask_of(vertices_of(zeroed)), row)
    formula, gcn = saliency(snapshot, row, RETAIN_WEIGHT), adapted_gcn(graphs)
    assert torch.equal(saliency(snapshot, row, RETAIN_WEIGHT, untrained_gcn(graphs.config.num_features)), formula)
    of_forget, of_retain = gcn(snapshot.class_graph(row), graphs.graph)[0].T
    forgetting = snapshot.feature("forgetting")[row]
    expected = of_forget * forgetting + of_retain * (formula - forgetting)
    assert torch.allclose(saliency(snapshot, row, RETAIN_WEIGHT, gcn), expected, rtol=1e-4, atol=1e-6)


def test_the_others_weigh_less_only_where_the_class_stalls_and_is_not_forgotten(monkeypatch):
    graphs, penalty = graph_generator(), 1.0
    snapshot = graphs.snapshot(graphs.by_class(), TERMS, None, 0)
    ranking = SaliencyScorer(pruning_config(penalty_growth=2.0, target=10.0), graphs, 0, 0)
    # What is left of the class, -log(1 - p), at one step after the other; where it stalls, it has not halved.
    for left, stalls in ((4, False), (1.9, False), (1.5, True), (1.6, True), (0.05, False), (0.09, False), (0.2, True)):
        of_step = replace(snapshot, log_odds=torch.full_like(snapshot.log_odds, np.log(np.expm1(left))))
        monkeypatch.setattr(SaliencyScorer, "_taken", lambda *_, of_step=of_step: of_step)
        penalty /= 2 if stalls else 1
        expected = saliency(of_step, 0, penalty * RETAIN_WEIGHT)
        assert torch.allclose(ranking(0, vertices_of([])), expected, rtol=1e-5, atol=1e-7), left
    assert penalty == 1 / 8


@pytest.mark.parametrize("mask_layer", [-2, None])
@pytest.mark.parametrize("term", NECESSITY)
def test_every_term_reaches_every_parameter_of_the_gcn_also_alone(term, mask_layer):
    graphs = graph_generator(mask_layer)
    alone = {name: float(name == term) for name in NECESSITY}
    loss = GCNLoss(gcn_config(**alone), graphs, RETAIN_WEIGHT)
    gcn = untrained_gcn(graphs.config.num_features, rounds=3)
    optimizer = torch.optim.SGD(gcn.parameters(), 0.1)
    for reached in ({"readout.weight"}, set(dict(gcn.named_parameters()))):
        optimizer.zero_grad(set_to_none=False)
        terms, _ = loss(gcn, vertices_of([]), 1, seeded("test"))
        terms[term].backward()
        gradients = {name: parameter.grad for name, parameter in gcn.named_parameters()}
        assert all(gradient.isfinite().all() for gradient in gradients.values())
        assert {name for name, gradient in gradients.items() if gradient.any()} == reached
        optimizer.step()  # takes the readout away from zero
    assert all(parameter.grad is None for parameter in graphs.classifier.parameters())


@pytest.mark.parametrize("mask_layer", [-2, -1, [0, 2], None])
@pytest.mark.parametrize("zeroed", [[], [1, 4, 9]])
def test_the_loss_is_that_of_the_classifier_under_the_mask_of_the_scores(mask_layer, zeroed):
    graphs, row, gone = graph_generator(mask_layer), 1, vertices_of(zeroed)
    graph, gcn = graphs.graph, adapted_gcn(graphs)
    config = gcn_config(necessity_forget=2.0, necessity_retain=0.5)
    terms, found = GCNLoss(config, graphs, RETAIN_WEIGHT)(gcn, gone, row, seeded("test"))
    generator = seeded("test")
    names = (*TERMS, *graphs.config.features)
    snapshot = graphs.snapshot(graphs.draw(8, generator), names, graphs.mask_of(gone), row)
    assert torch.equal(found, saliency(snapshot, row, RETAIN_WEIGHT, gcn).detach())
    kappa = trainer.log_uniform((3, 10), graph.num_vertices, generator)
    removed = [*zeroed, *largest_free(found.tolist(), range(graph.num_vertices), zeroed, kappa)]
    samples, original = graphs.draw(10, generator), graphs.classifier(graphs.samples.images)
    with graph.zeroing(torch.tensor(removed)).applied_to(graphs.classifier):
        masked = graphs.classifier(graphs.samples.images).softmax(1)
    p = masked[samples[row], row]
    forget = T * (1 + (p / (1 - p)) ** (1 / T)).log().mean()
    others = samples[[0, 2]].flatten()
    target = original[others].index_fill(1, torch.tensor([row]), -torch.inf).softmax(1)
    retain = -(target * masked[others].log()).sum(1).mean()
    assert torch.allclose(terms["necessity_forget"], 2.0 * forget / RETAIN_WEIGHT, rtol=1e-4)
    assert torch.allclose(terms["necessity_retain"], 0.5 * retain, rtol=1e-4) and len(terms) == 2
    drawn = [trainer.log_uniform((3, 10), 30, generator) for _ in range(500)]
    assert set(drawn) == set(range(3, 11)) and drawn.count(3) > drawn.count(9)


def test_one_gcn_learns_along_requests_on_several_classifiers(monkeypatch):
    graphs, seen, call = [graph_generator(), graph_generator(None)], [], GCNLoss.__call__

    def spy(self, gcn, zeroed, class_index, generator):
        terms, scores = call(self, gcn, zeroed, class_index, generator)
        seen.append((self.graphs, class_index, zeroed, scores))
        gradients = [parameter.grad for parameter in gcn.parameters() if parameter.grad is not None]  # of the last step
        assert torch.cat([torch.zeros(1), *(g.flatten() for g in gradients)]).norm() < 1.001, "it is clipped"
        return terms, scores

    monkeypatch.setattr(GCNLoss, "__call__", spy)
    amounts = {"kappa": (0.1, 0.3), "partly_masked": (0.1, 0.3), "snapshots": 2}
    config = gcn_config(steps=60, necessity_retain=1000.0, **amounts)
    GCNTrainer(config, graphs, RETAIN_WEIGHT, 0).train()
    assert {graphs.index(each) for each, *_ in seen} == {0, 1} and {row for _, row, *_ in seen} == {0, 1, 2}
    for step, (of_classifier, row, zeroed, _) in enumerate(seen):
        graphs_before, row_before, had, scores = seen[step - 1]
        size, count = graphs_before.graph.num_vertices, len(zeroed) - len(had)
        if len(zeroed) == 0:
            assert step % 3 == 0 or 2 * (len(had) + round(0.3 * size)) > size, "a whole classifier"
            continue
        assert step % 3 > 0 and of_classifier is graphs_before and row == row_before, "a request goes on"
        assert 0.1 <= round(count / size, 2) <= 0.3
        assert torch.equal(zeroed, torch.cat([had, ranked(scores, had, count)]))
    for other in (graph_generator(other_classes=False), graph_generator(features=("weight",))):
        with pytest.raises(TrainingError, match="must be those of all classifiers"):
            GCNTrainer(config, [graphs[0], other], RETAIN_WEIGHT, 0)


def test_learning_is_descent_on_batches(classifier, split):
    by_hand = copy.deepcopy(classifier)
    order = torch.randperm(60, generator=seeded("test"))
    for batch, rate in zip(order.split(40), (0.1, 0.05)):
        gradients = grad(3 * by_hand(split.images[batch]).square().sum(), list(by_hand.parameters()))
        for weight, gradient in zip(by_hand.parameters(), gradients):
            weight.data -= rate * gradient
    optimizer = torch.optim.SGD(classifier.parameters(), 0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 2)
    optimizer.register_step_post_hook(lambda *_: schedule.step())
    loss = lambda images, labels: 3 * classifier(images).square().sum()  # noqa: E731
    trainer.learn(classifier, split, 1, 40, optimizer, seeded("test"), loss)
    for weight, expected in zip(classifier.parameters(), by_hand.parameters()):
        assert torch.allclose(weight, expected, atol=1e-5)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_training_that_diverges_stops_with_the_step_and_what_to_look_at(split, classifier, value):
    images = split.images.index_fill(0, torch.tensor(0), value)
    broken = Split(images, split.labels)
    with pytest.raises(TrainingError, match="loss is (nan|inf) at step 0: .* see classifier.learning_rate"):
        Trainer(trainer_config((6, 5), 1, len(images)), 0).train(broken, NUM_CLASSES)
    with pytest.raises(TrainingError, match="loss is (nan|inf) at step 0: .*diverged, see eval.hyperparameters"):
        UnlearningSFT(trainer.UnlearningSFTConfig(1, len(images), 0.1), 0).unlearn(classifier, broken, (1,))
    for term in NECESSITY:
        diverges = GCNTrainer(gcn_config(**{term: torch.inf}), [graph_generator()], RETAIN_WEIGHT, 0)
        with pytest.raises(TrainingError, match=f"{term} is inf at step 0: training diverged, see gcn.learning_rate"):
            diverges.train()


def test_training_is_the_same_with_the_same_seed_alone(split):
    graphs, trained = graph_generator(), []
    for seed in (0, 0, 1):
        torch.manual_seed(len(trained))
        classifier = Trainer(trainer_config((6, 5), 2), seed).train(split, NUM_CLASSES)
        gcn = GCNTrainer(gcn_config(), [graphs], RETAIN_WEIGHT, seed).train()
        trained.append([*classifier.parameters(), *gcn.parameters()])
    first, again, other = trained
    assert all(torch.equal(one, two) for one, two in zip(first, again))
    assert not any(torch.equal(one, two) for one, two in zip(first, other))


def test_augmented_images_are_cuts_of_the_padded_one_or_of_its_mirror_image_and_each_of_them_comes():
    images = torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5)
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (2, 2), (2, 2)), "edge")
    expected = [set(), set()]
    for image, (y, x), mirrored in product(range(2), product(range(5), repeat=2), (False, True)):
        cut = padded[image, :, y : y + 4, x : x + 5]
        expected[image].add((cut[..., ::-1] if mirrored else cut).tobytes())
    generator, found = seeded("augmented"), [set(), set()]
    for _ in range(1000):
        for image, augmented in enumerate(trainer.augmented(images, 2, True, generator)):
            found[image].add(augmented.numpy().tobytes())
    assert found == expected
    assert torch.equal(trainer.augmented(images, 0, False, generator), images)


def test_a_recipe_is_sgd_with_nesterov_momentum_and_weight_decay_on_smoothed_labels_of_augmented_images(split):
    recipe = {"momentum": 0.5, "weight_decay": 0.1, "label_smoothing": 0.2, "learning_rate": 0.3}
    steps, exact = 3, replace(split, images=split.images.double())
    by_recipe = Trainer(trainer_config((6, 5), steps, len(split.labels), **recipe), 0, (1, 7))
    found = by_recipe.train(split, NUM_CLASSES)
    expected = by_recipe.initial(split.images, NUM_CLASSES).double()
    target = 0.8 * F.one_hot(split.labels, NUM_CLASSES) + 0.2 / NUM_CLASSES
    velocity = [0.0 for _ in expected.weights]
    for step in range(steps):
        loss = -(target * expected(exact.images).log_softmax(1)).sum(1).mean()
        for place, (weight, gradient) in enumerate(zip(expected.weights, grad(loss, expected.weights))):
            gradient = gradient + 0.1 * weight.detach()
            velocity[place] = 0.5 * velocity[place] + gradient
            weight.data -= 0.3 * (1 - step / steps) * (gradient + 0.5 * velocity[place])
    for one, other in zip(found.weights, expected.weights, strict=True):
        assert torch.allclose(one.double(), other, atol=1e-5)
    shifted = replace(by_recipe, config=replace(by_recipe.config, shift=1)).train(split, NUM_CLASSES)
    assert not torch.allclose(shifted.weights[0], found.weights[0], atol=1e-3)
    with pytest.raises(TrainingError, match="classifier.warm_up must be 0 or above 0.33, one of 3 steps"):
        replace(by_recipe, config=replace(by_recipe.config, warm_up=0.33)).train(split, NUM_CLASSES)


def test_the_rate_of_a_training_with_a_warm_up_rises_and_falls_to_zero_linearly(split, monkeypatch):
    rates, losses, descend = [], [], trainer.descend

    def seen(optimizer, of_step, *others) -> None:
        rates.append(optimizer.param_groups[0]["lr"])
        losses.append(of_step["loss"].item())
        descend(optimizer, of_step, *others)

    monkeypatch.setattr(trainer, "descend", seen)
    recipe = {"momentum": 0.9, "weight_decay": 0.001, "warm_up": 0.25, "label_smoothing": 0.5, "learning_rate": 0.1}
    classifier = Trainer(trainer_config((6, 5), 10, **recipe), 0).train(split, NUM_CLASSES)
    top = rates.index(max(rates))
    assert max(rates) == pytest.approx(0.1, rel=0.05) and top / len(rates) == pytest.approx(0.25, abs=0.03)
    assert rates == sorted(rates[:top]) + sorted(rates[top:], reverse=True) and rates[-1] < 0.005
    for part in (rates[: top + 1], rates[top + 1 :]):
        steps = np.diff(part)
        assert np.allclose(steps, steps[0], rtol=0.05)
    smoothed = F.cross_entropy(classifier(split.images), split.labels, label_smoothing=0.5)
    assert losses[-1] == pytest.approx(smoothed.item(), rel=0.3)
    assert is_correct(classifier(split.images), split.labels).double().mean() > 0.9


def test_mixed_precision_is_of_trainings_alone_and_changes_little(split, monkeypatch):
    monkeypatch.setattr(hooked, "has_bfloat16", lambda device: True)
    exact, mixed = (Trainer(trainer_config((6, 5), 3, bfloat16=given), 0) for given in (False, True))
    assert torch.equal(exact.initial(split.images, 3)(split.images), mixed.initial(split.images, 3)(split.images))
    models = [each.train(split, NUM_CLASSES) for each in (exact, mixed)]
    one, other = (torch.cat([weight.flatten() for weight in model.weights]) for model in models)
    assert 0 < (one - other).norm() < 0.05 * one.norm()
    logits = mixed.initial(split.images, 3).train()(split.images)
    assert logits.dtype == torch.float32 and torch.equal(logits, logits.bfloat16().float())


@pytest.mark.parametrize("kind", ["classifier", "classifier by a recipe", "gcn", "gcn that soon zeroes half"])
def test_an_interrupted_training_goes_on_to_the_same_weights_but_not_from_another_ones_file(
    kind, split, tmp_path, monkeypatch
):
    monkeypatch.setattr(trainer, "SAVED_EVERY", 0.0)
    check, steps = trainer.check_finite, []

    def interrupted(losses, step, setting) -> None:
        steps.append(step)
        if len(steps) == 10:
            raise KeyboardInterrupt
        check(losses, step, setting)

    def train(file: Artifact | None) -> list[Tensor]:
        if "classifier" in kind:
            recipe = {"momentum": 0.9, "warm_up": 0.2, "shift": 1, "flip": True} if "recipe" in kind else {}
            model = Trainer(trainer_config((6, 5), 4, **recipe), 0, (1, 7)).trained(split, NUM_CLASSES, file).model
        else:
            soon = {"snapshots": 5, "partly_masked": (0.4, 0.45)} if "half" in kind else {}
            config = gcn_config(steps=16, **soon)
            model = GCNTrainer(config, [graph_generator(), graph_generator(None)], 5.0, 0).train(file)
        return list(model.parameters())

    expected, file = train(None), Artifact(tmp_path / "made.pt", {"seed": "these"})
    monkeypatch.setattr("mimu.training.check_finite", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(file)
    assert file.path.exists() and not file.is_current
    for provenance, goes_on in (({"seed": "others"}, range(16)), (file.provenance, range(8, 16))):
        steps[:] = [-1] * 10
        copied = Artifact(tmp_path / f"{provenance['seed']}.pt", provenance)
        copied.path.write_bytes(file.path.read_bytes())
        assert all(torch.equal(one, other) for one, other in zip(train(copied), expected, strict=True))
        assert steps[10:] == list(goes_on)


def kept_and_left(graphs: GraphGenerator, row: int, masking: PruningConfig, gcn: MaskingGCN | None) -> float:
    """What the mask of a request keeps of the other classes, less what it leaves of the class."""
    order = Pruning(masking, graphs, row, SaliencyScorer(masking, graphs, row, 0, gcn))
    vertices = order.answer("auto", graphs.train.forget(row)).vertices
    is_correct = masked_logits(graphs, graphs.samples, vertices).argmax(1) == graphs.labels
    return (is_correct[graphs.labels != row].double().mean() - is_correct[graphs.labels == row].double().mean()).item()


def test_how_far_a_gcn_is_behind_the_formula_is_what_their_masks_keep_and_leave():
    train = random_split(40, num_classes=6)
    classifier = Trainer(trainer_config((6, 5), 10), 0).train(train, 6)
    graphs, masking = GraphGenerator(classifier, train, graph_generator().config, 0), pruning_config(step=2)
    trained, behind = GCNTrainer(gcn_config(), [graphs], RETAIN_WEIGHT, 0), []
    for scale in (0.0, 30.0):
        gcn = trained.initial()
        gcn.readout.weight.data.normal_(std=scale, generator=seeded("far"))
        falls = []
        for row in range(6):
            of_formula, of_gcn = (kept_and_left(graphs, row, masking, ranks) for ranks in (None, gcn))
            falls.append(100 * (of_formula - of_gcn))
        behind.append(trained.points_behind(gcn, masking))
        assert behind[-1] == pytest.approx(max(falls)) or max(behind[-1], *falls) <= 1
    assert behind[0] == 0 and behind[1] > 1


@pytest.fixture(scope="module")
def problem() -> tuple[Split, GraphGenerator]:
    split = random_split(60)
    classifier = Trainer(trainer_config((16, 12), 20, 32), 0).train(split, NUM_CLASSES)
    return split, GraphGenerator(classifier, split, graph_generator().config, 0)


def test_training_lowers_both_terms_of_the_loss():
    graphs, config = graph_generator(None), gcn_config(steps=200, learning_rate=0.03, samples=180, kappa=(5, 10))
    loss, means = GCNLoss(config, graphs, 1.0), []
    for gcn in (config.network(graphs.config.num_features), GCNTrainer(config, [graphs], 1.0, 0).train()):
        draws = product(range(NUM_CLASSES), range(10))
        terms = [loss(gcn, vertices_of([]), row, seeded(draw))[0] for row, draw in draws]
        means.append({name: sum(of_draw[name].item() for of_draw in terms) / len(terms) for name in NECESSITY})
    before, after = means
    assert all(after[name] < before[name] - 0.01 for name in NECESSITY)


def masked_logits(graphs: GraphGenerator, samples: Split, vertices: Tensor) -> Tensor:
    with graphs.graph.zeroing(vertices).applied_to(graphs.classifier), torch.no_grad():
        return graphs.classifier(samples.images).double()


def left_of(graphs: GraphGenerator, samples: Split, vertices: Tensor, target: float) -> float:
    """The percentage of a class under a mask; of few samples not less than a normal distribution of margins leaves."""
    logits, label, count = masked_logits(graphs, samples, vertices).numpy(), int(samples.labels[0]), len(samples.labels)
    left, margins = 100 * (logits.argmax(1) == label).mean(), logits[:, label] - np.delete(logits, label, 1).max(1)
    if count < 100 / target:
        rows = zip(graphs.predictions.numpy(), graphs.labels.tolist())
        spread = np.std([row[own] - np.delete(row, own).max() for row, own in rows], ddof=1)
        squares = [*np.square(margins - margins.mean()), *[spread**2] * 4]
        left = max(left, 100 * norm.sf(0, margins.mean(), np.sqrt(sum(squares) / (count + 3) * (1 + 1 / count))))
    return left


SEARCHES = [(5, 1.7, 60), (5, 20.0, 60), (None, 20.0, 60), (3, 4.1, 24), (3, 45.0, 1)]


@pytest.mark.parametrize("step, target, samples", SEARCHES)
@pytest.mark.parametrize("class_index", range(NUM_CLASSES))
def test_auto_is_the_smallest_kappa_of_whole_steps_that_forgets(problem, step, target, samples, class_index):
    (split, graphs), stride = problem, step or 1
    forget, retain = split.forget(class_index)[:samples], split.retain(class_index)
    order = zeroing_order(graphs, class_index, step=step, group_size=15, target=target, max_kappa=150)
    found, kappas = order.answer("auto", forget), range(stride, 150, stride)
    kappa = next(k for k in kappas if left_of(graphs, forget, order.first(k).vertices, target) < target)
    assert len(found.vertices) == kappa and found.left == ""
    again = order.answer(kappa, forget)
    assert torch.equal(found.vertices, again.vertices) and found.seconds > again.seconds > 0 and again.left is None
    assert order.answer("auto", forget) is found, "it is searched for once"
    correct = masked_logits(graphs, retain, found.vertices).argmax(1) == retain.labels
    assert step is None or correct.double().mean() > 0.9
    at_once = order.ranking(0, vertices_of([])).argsort(descending=True)[:kappa]
    assert torch.equal(found.vertices, at_once) or step is not None
    assert not any(map(parametrize.is_parametrized, graphs.classifier.modules()))


ENDINGS = [(0, 101, 99, 4, True), (0, 1e-9, 99, 20, False), (0, 1e-9, 8, 8, False), (5, 1e-9, 99, 25, False),
           (28, 1e-9, 99, 30, False), (30, 101, 99, 30, False)]  # fmt: skip


@pytest.mark.parametrize("gone, target, stops_at, kappa, is_forgotten", ENDINGS)
def test_auto_stops_where_it_forgets_where_it_is_too_much_or_gives_up(gone, target, stops_at, kappa, is_forgotten):
    graphs = graph_generator()
    images = graphs.samples.images
    forget = Split(images, graphs.classifier(images).argmax(1)).forget(0)
    order = zeroing_order(graphs, zeroed=torch.arange(gone), target=target)
    found = order.answer("auto", forget, lambda zeroed: len(zeroed) >= stops_at)
    assert found.vertices[:gone].tolist() == list(range(gone)) and len(found.vertices) == kappa
    left = f"{left_of(graphs, forget, found.vertices, target):.1f} % of class 0 are left"
    assert found.left == ("" if is_forgotten else left)


@pytest.mark.parametrize("mask_layer", [-2, None])
@pytest.mark.parametrize("is_adapted, changes", [(False, {}), (True, {"step": 0.1}), (True, {"momentum": 0.6})])
def test_a_step_takes_the_largest_mean_scores_on_the_classifier_masked_so_far(mask_layer, is_adapted, changes):
    graphs, config, row = graph_generator(mask_layer), pruning_config(**changes), 2
    gcn, names = adapted_gcn(graphs) if is_adapted else None, (*TERMS, *graphs.config.features)
    size, zeroed, mean = graphs.graph.num_vertices, vertices_of([]), None
    order, stride = zeroing_order(graphs, row, gcn, **changes), round(0.1 * size) if "step" in changes else 4
    for step in range(3):
        samples = graphs.draw(8, seeded("request", 0, row, step))
        snapshot = graphs.snapshot(samples, names, graphs.mask_of(zeroed), row)
        scores = saliency(snapshot, row, RETAIN_WEIGHT, gcn).detach()
        if step == 0:
            assert torch.equal(SaliencyScorer(config, graphs, row, 0, gcn)(0, graphs.nothing), scores)
        scores = scores / scores.std()
        mean = scores if mean is None else config.momentum * mean + (1 - config.momentum) * scores
        zeroed = torch.cat([zeroed, ranked(mean, zeroed, stride)])
    assert torch.equal(order.first(2 * stride + 1).vertices, zeroed[: 2 * stride + 1])
    assert torch.equal(order.first(3 * stride).vertices, zeroed)
    assert sorted(order.first(999).vertices.tolist()) == list(range(size)), "no more is zeroed than there is"
    seconds = [order.first(kappa).seconds for kappa in (stride, stride + 1, 2 * stride, 3 * stride, 999)]
    assert seconds == sorted(seconds) and len(set(seconds)) == 4, "of all steps up to there"
    with pytest.raises(InputError, match="scores of weights are not finite: look at the inputs, the weights and"):
        Pruning(config, graphs, 2, lambda *_: torch.full((size,), torch.nan)).first(1)


@pytest.mark.parametrize("every, taken", [(None, [0]), (1, [0, 4, 8, 12, 16]), (2, [0, 8, 16])])
def test_between_two_snapshots_no_sample_is_run_and_first_order_updates_say_what_zeros_do(monkeypatch, every, taken):
    graphs, passes, record = graph_generator(), [], HookedClassifier.record

    def recorded(classifier, *given):
        mask = Mask.on(classifier)
        passes.append(mask.num_zeroed if mask else 0)
        return record(classifier, *given)

    monkeypatch.setattr(HookedClassifier, "record", recorded)
    zeroed = zeroing_order(graphs, 2, snapshot_every=every).first(20).vertices
    assert passes == taken
    last = taken[-1]
    samples, mask = graphs.draw(8, seeded("request", 0, 2, last // 4)), graphs.mask_of(zeroed[:last])
    snapshot = graphs.snapshot(samples, TERMS, mask, 2).first_order_update(zeroed[last:16])
    expected = largest_free(saliency(snapshot, 2, RETAIN_WEIGHT).tolist(), range(30), zeroed[:16].tolist(), 4)
    assert zeroed[16:].tolist() == expected


def test_measured_steps_zero_what_the_class_loses_most_by_for_what_the_others_lose():
    graphs, row, zeroed = graph_generator([0, 1], scope="measured"), 2, []
    order, few = zeroing_order(graphs, row, step=6, group_size=10), graphs.samples[graphs.by_class()[:, :10].flatten()]
    is_forget = few.labels == row

    def losses(zeroed: list[int]) -> tuple[float, float]:
        logits = masked_logits(graphs, few, vertices_of(zeroed))
        kept = F.cross_entropy(logits[~is_forget], few.labels[~is_forget])
        return -(1 - logits.softmax(1)[is_forget, row]).log().mean().item(), kept.item()

    for step in range(9):
        of_vertices, before, tried = order.ranking(step, vertices_of(zeroed)).tolist(), losses(zeroed), []
        for layer, share in ((range(42), 4), (range(42, 72), 2)):  # of 6, in proportion to their sizes
            new = largest_free(of_vertices, layer, zeroed, share)
            forget, retain = (now - then for now, then in zip(losses(zeroed + new), before))
            tried.append(((forget < 0, -forget / max(retain, 1e-3) if forget < 0 else -retain), new))
        zeroed += max(tried)[1]
        assert order.first(len(zeroed)).vertices.tolist() == zeroed


def test_a_trained_gcn_comes_back_with_its_features_and_settings_and_another_file_is_named(tmp_path, trained_gcn):
    path, gcn, described, masking = tmp_path / "gcn.pt", trained_gcn.gcn, trained_gcn.graphs, trained_gcn.masking
    broken = copy.deepcopy(gcn)
    broken.readout.weight.data[0] = torch.nan
    config = {"graphs": asdict(described), "eval": asdict(masking) | {"visualize": False}}
    config["gcn"] = {"hidden": 8, "rounds": 2, "message_passing": True, "steps": 3}
    wrong = "is not the checkpoint of a masking GCN "
    size, nan = f"{wrong}.*size mismatch", f"{wrong}.*a weight is not a finite number"
    for made, of_file, message in (
        (None, None, "cannot be read"), (MaskingGCN(17, 7, 2), config, size), (broken, config, nan), (gcn, {}, wrong),
    ):  # fmt: skip
        if made:
            save(path, {"state_dict": made.state_dict(), "config": of_file, "seed": 0})
        with pytest.raises(ArtifactError, match=f"gcn.pt: {message}"):
            TrainedGCN.load(path)
    save(path, {"state_dict": gcn.state_dict(), "config": config, "seed": 0})
    loaded = TrainedGCN.load(path)
    assert all(torch.equal(loaded.gcn.state_dict()[name], weight) for name, weight in gcn.state_dict().items())
    assert loaded.graphs == described and loaded.masking == masking
    taken = TrainedGCN.of(trained_gcn, torch.device("cpu"))
    assert taken.graphs == described and taken.gcn is not gcn
    others = (replace(trained_gcn, gcn=broken), "not a finite number"), (MaskingGCN(18, 8, 2), "not 18"), (3, "not 3")
    for wrong, message in others:
        with pytest.raises(InputError, match=message):
            TrainedGCN.of(wrong, torch.device("cpu"))


@pytest.mark.parametrize("forget_class", range(NUM_CLASSES))
def test_learning_random_labels_changes_the_masked_layer_only_and_forgets(problem, monkeypatch, forget_class):
    split, graphs = problem
    classifier, forget, labels = copy.deepcopy(graphs.classifier), split.forget(forget_class), []
    entropy, config = F.cross_entropy, trainer.UnlearningSFTConfig(epochs=10, batch_size=10, learning_rate=0.1)
    monkeypatch.setattr(F, "cross_entropy", lambda logits, y, **_: labels.extend(y.tolist()) or entropy(logits, y))
    UnlearningSFT(config, 0).unlearn(classifier, forget, (1,))
    assert len(labels) == 10 * 60 and set(labels) == {0, 1, 2} - {forget_class}
    assert (classifier(forget.images).argmax(1) == forget_class).float().mean() < 0.5
    assert list(map(torch.equal, classifier.weights, graphs.classifier.weights)) == [True, False, True]
