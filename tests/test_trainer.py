"""The top-k sampler, the terms of the loss, gradients through the masked classifier, and the order of zeroing."""

import copy
import dataclasses
import itertools
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    NUM_CLASSES,
    class_graphs,
    graph_config,
    graph_generator,
    random_classifier,
    random_split,
    scores,
    trainer_config,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from mimu.data import GraphGenerator, Split, seeded
from mimu.masking.order import ZeroingOrder
from mimu.masking.rankings import GCNRanking, MaskingConfig, TrainedGCN, contrast, ranked, set_difference
from mimu.model import Mask, MaskingGCN, WeightGraph
from mimu.networks.hooked import HookedClassifier
from mimu.runs.files import ArtifactError, save
from mimu.trainer import (
    GCNLoss,
    GCNTrainer,
    GCNTrainerConfig,
    Trainer,
    TrainingError,
    UnlearningSFT,
    UnlearningSFTConfig,
    learn,
    log_uniform,
    prior_divergence,
    top_k_mask,
    top_k_masks,
)

TERMS = ("sufficiency", "prior", "necessity_forget", "necessity_retain")
NOTHING = torch.empty(0, dtype=torch.long)
finite = st.floats(-50, 50, width=32)
scopes = st.sampled_from(["global", "layerwise"])


def gcn_config(**changes) -> GCNTrainerConfig:
    small = {
        "pretrained": False, "hidden": 8, "rounds": 2, "message_passing": True, "steps": 20, "learning_rate": 0.01,
        "gradient_norm": 1.0, "group_size": 8, "samples": 30, "contrast": "damage", "temperature": 0.25, "gumbel": 1.0,
        "sufficiency": 0.2, "prior": 0.0, "necessity_forget": 1.0, "necessity_retain": 1.0, "kappa": (3, 10),
        "partly_masked": (2, 8), "looks": 1, "classes": None, "weighs": None, "warmup": 4,
    }  # fmt: skip
    return GCNTrainerConfig(**small | changes)


def masking_config(**changes) -> MaskingConfig:
    small = {"step": 4, "momentum": 0.0, "ranking": "damage", "group_size": 8, "draws": 1, "target": 1.25}
    return MaskingConfig(**small | {"max_kappa": 20, "patience": 0, "penalty_growth": 1.0, "look_every": 1} | changes)


def small_gcn(graphs, rounds=2) -> MaskingGCN:
    torch.manual_seed(5)
    return MaskingGCN(graphs.config.num_features, 8, rounds)


def zeroing_order(graphs, forget_class=0, gcn=None, top_k=6, **changes) -> ZeroingOrder:
    config = masking_config(**changes)
    return ZeroingOrder(
        config, graphs, forget_class, GCNRanking(config, graphs, forget_class, 0, gcn or small_gcn(graphs), top_k)
    )


LAYERS = WeightGraph.of(random_classifier(), None)


def competing(scope, graph=LAYERS) -> list[range]:
    """The vertices that compete with one another: all of them, or those of every layer."""
    ends = itertools.accumulate(graph.sizes if scope == "layerwise" else [graph.num_vertices], initial=0)
    return [range(*pair) for pair in itertools.pairwise(ends)]


def largest_free(scores, vertices, gone, count) -> list[int]:
    """Of `vertices` those of the largest scores that are not among `gone`, one after another."""
    return sorted(set(vertices) - set(gone), key=lambda v: -scores[v])[:count]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 25), min_size=1, max_size=10), st.integers(0, 10**6), scopes)
def test_the_next_to_go_are_of_the_largest_scores_and_layerwise_of_every_layer_in_its_share(steps, seed, scope):
    generator, zeroed = torch.Generator().manual_seed(seed), []
    for count in steps:
        scores = torch.randn(LAYERS.num_vertices, generator=generator)
        new = ranked(scores, LAYERS, scope, torch.tensor(zeroed, dtype=torch.long), count).tolist()
        assert len(new) == min(count, LAYERS.num_vertices - len(zeroed))
        for part in competing(scope):
            own = [v for v in new if v in part]
            assert own == largest_free(scores.tolist(), part, zeroed, len(own))
            share = (len(zeroed) + len(new)) * len(part) / LAYERS.num_vertices
            assert abs(len(set(part) & {*zeroed, *new}) - share) <= 1
        zeroed += new
    assert len(set(zeroed)) == len(zeroed)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(0, 40), scopes)
def test_masks_are_the_top_k_of_what_is_free_in_all_layers_or_in_every_layer(seed, k, gone, scope):
    size, generator = LAYERS.num_vertices, torch.Generator().manual_seed(seed)
    scores = torch.randn(2, size, dtype=torch.float64, generator=generator).requires_grad_()
    zeroed, weighting = list(range(size - gone, size)), torch.randn(size, generator=generator)
    masks = top_k_masks(scores, LAYERS, scope, torch.tensor(zeroed, dtype=torch.long), k, 0.5)
    assert set(masks.unique().tolist()) <= {0.0, 1.0}
    for row, mask in zip(scores, masks):
        ones, soft = set(zeroed), 0.0
        for part in competing(scope):
            chosen = largest_free(row.tolist(), part, zeroed, max(1, round(k * len(part) / size)))
            ones |= set(chosen)
            if chosen:
                standard = row / row[list(part)].std()
                around = ((standard - standard[chosen[-1]].detach()) / 0.5).sigmoid() * weighting
                soft = soft + around[[v for v in part if v not in zeroed]].sum()
        assert set(mask.nonzero()[:, 0].tolist()) == ones
        gradients = [torch.autograd.grad(y, scores, retain_graph=True)[0] for y in (soft, (mask * weighting).sum())]
        assert torch.allclose(*gradients, atol=1e-12)
    assert (top_k_mask(torch.zeros(2, size), k, 0.5).sum(-1) == k).all(), "of ties, too"


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(finite, finite), min_size=2, max_size=20))
def test_the_prior_term_is_a_divergence(pairs):
    logits, weights = torch.tensor(pairs, dtype=torch.float64).T
    divergence = prior_divergence(logits[None], weights)
    p = (weights.abs() + 1e-12) / (weights.abs() + 1e-12).sum()
    expected = F.kl_div(p.log(), logits.log_softmax(0), reduction="sum", log_target=True)
    assert torch.allclose(divergence, expected[None], rtol=1e-6, atol=1e-9)


def test_the_contrast_by_hand():
    importance, damage = torch.randn(4, 9, dtype=torch.float64), torch.tensor([0.1, 0.5, 0.0, 2.0], dtype=torch.float64)
    for d in range(4):
        others = [c for c in range(4) if c != d]
        plain = importance[d] - importance[others].mean(0)
        assert torch.allclose(contrast(importance)[d], plain, atol=1e-12)
        v = (damage[others] + 0.02) ** 0.5
        weighted = importance[d] - sum(v_c / v.sum() * importance[c] for c, v_c in zip(others, v))
        assert torch.allclose(contrast(importance, damage)[d], weighted, atol=1e-12)


def test_the_set_difference_ranks_by_brute_force():
    importance = torch.randn(4, 30)
    top = [set(row.topk(8).indices.tolist()) for row in importance]
    order = set_difference(importance, 8).argsort(1, descending=True)
    for d in range(4):
        only_here = top[d] - set().union(*(top[c] for c in range(4) if c != d))
        first = sorted(only_here, key=lambda v: -importance[d, v])
        rest = sorted(set(range(30)) - only_here, key=lambda v: -contrast(importance)[d, v])
        assert order[d].tolist() == first + rest


@pytest.mark.parametrize("mask_layer", [-2, None])
@pytest.mark.parametrize("term", TERMS)
def test_every_term_reaches_every_parameter_of_the_gcn_also_alone(term, mask_layer):
    graphs = graph_generator(mask_layer)
    alone = {name: float(name == term) for name in TERMS}
    gcn = small_gcn(graphs, rounds=3)
    terms, *_ = GCNLoss(gcn_config(partly_masked=None, **alone), graphs, 6)(gcn, NOTHING, seeded("test"))
    terms[term].backward()
    for name, parameter in gcn.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0, name
    assert all(parameter.grad is None for parameter in graphs.classifier.parameters())


def test_training_follows_the_gradient_of_the_weighted_sum_of_the_terms(monkeypatch):
    graphs, gradients = graph_generator(), []
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, _: gradients.extend(
        parameter.grad.clone() for parameter in parameters
    ))  # fmt: skip
    weights = {"sufficiency": 0.3, "prior": 0.2, "necessity_forget": 2.0, "necessity_retain": 0.5}
    gcn = GCNTrainer(gcn_config(steps=1, learning_rate=1e-9, **weights), [graphs], 6, 0).train()
    generator = seeded("gcn", 0, 6)
    torch.randint(1, (), generator=generator)  # which classifier
    terms, *_ = GCNLoss(gcn_config(**dict.fromkeys(TERMS, 1.0)), graphs, 6)(gcn, NOTHING, generator)
    loss = sum(weights[name] * terms[name] for name in TERMS)
    expected = torch.autograd.grad(loss, list(gcn.parameters()))
    assert all(torch.allclose(g, e, rtol=1e-3, atol=1e-6) for g, e in zip(gradients, expected, strict=True))


def test_the_loss_works_on_the_masked_classifier():
    graphs, zeroed = graph_generator(None, scope="layerwise"), torch.tensor([1, 4, 9, 20])
    generator = seeded("test")
    gcn, loss = small_gcn(graphs), GCNLoss(gcn_config(prior=0.5), graphs, 6)
    terms, scores, _ = loss(gcn, zeroed, seeded("test"))
    x, damage = class_graphs(graphs, graphs.draw(8, generator), Mask.zeroing(graphs.graph, zeroed))
    importance = gcn(x, graphs.graph)
    assert torch.allclose(scores, contrast(importance, damage), atol=1e-5)
    assert not torch.allclose(scores, contrast(importance), atol=1e-5)
    assert "sufficiency" not in terms, "the top-K weights are those of the whole classifier"
    weights = torch.cat([layer.weight.flatten() for layer in graphs.classifier.layers])
    prior = 0.5 * prior_divergence(importance, weights).mean()
    samples, kappa = graphs.draw(10, generator), log_uniform((3, 10), 87, generator)
    removed = top_k_masks(scores, graphs.graph, "layerwise", zeroed, kappa, 0.25)
    expected = {"prior": prior} | loss._necessity(removed, torch.arange(NUM_CLASSES), samples)
    assert torch.stack(list(terms.values())).tolist() == pytest.approx([expected[name].item() for name in terms])
    spans = [log_uniform((3, 10), 30, generator) for _ in range(500)]
    assert set(spans) == set(range(3, 11)) and spans.count(3) > spans.count(9)


def test_the_sufficiency_term_by_hand():
    graphs = graph_generator()
    loss = GCNLoss(gcn_config(gumbel=0.7), graphs, 6)
    importance = torch.randn(NUM_CLASSES, 30)
    samples = graphs.draw(10, seeded("test"))
    term = loss._sufficiency(importance, samples, seeded("noise"))
    gumbel = -torch.empty(importance.shape).exponential_(generator=seeded("noise")).log()
    losses = []
    for c in range(NUM_CLASSES):
        kept = (importance[c] / importance[c].std() + 0.7 * gumbel[c]).topk(6).indices
        with Mask.keeping(graphs.graph, kept).applied_to(graphs.classifier):
            logits = graphs.classifier(graphs.samples.images[samples[c]])
        losses.append(F.cross_entropy(logits, torch.full((10,), c)))
    assert torch.allclose(term, torch.stack(losses).mean(), rtol=1e-4)


@pytest.mark.parametrize("tried", [[0, 1, 2], [2, 0]])
@pytest.mark.parametrize("mask_layer", [-2, -1, [0, 2], None])
def test_the_terms_of_necessity_by_hand(mask_layer, tried):
    graphs = graph_generator(mask_layer)
    removed = (torch.rand(len(tried), graphs.graph.num_vertices, generator=seeded("masks")) < 0.3).float()
    samples = graphs.draw(10, seeded("test"))
    loss, of_classes = GCNLoss(gcn_config(), graphs, 6), torch.tensor(tried)
    terms = loss._necessity(removed, of_classes, samples)
    forget, retain = [], []
    original = graphs.classifier(graphs.samples.images)
    for d, mask in zip(tried, removed):
        with Mask.zeroing(graphs.graph, mask.nonzero()[:, 0]).applied_to(graphs.classifier):
            masked = graphs.classifier(graphs.samples.images).softmax(1)
        forget += [-(1 - masked[sample, d]).log() for sample in samples[d]]
        for sample in torch.cat([samples[label] for label in range(NUM_CLASSES) if label != d]):
            target = original[sample].index_fill(0, torch.tensor([d]), -torch.inf).softmax(0)
            retain.append(-(target * masked[sample].log()).sum())
    for name, expected in (("necessity_forget", forget), ("necessity_retain", retain)):
        assert torch.allclose(terms[name], torch.stack(expected).mean(), rtol=1e-4), name
    assert set(terms) == set(TERMS[2:])


def test_one_gcn_learns_from_several_classifiers_and_after_each_step_on_a_whole_one_from_looks(monkeypatch):
    graphs = [graph_generator(), graph_generator(mask_layer=-1), graph_generator(bias=True)]
    seen, tried, call, try_some = [], [], GCNLoss.__call__, GCNLoss._tried

    def spy(self, gcn, zeroed, generator, forget_class=None):
        terms, scores, of = call(self, gcn, zeroed, generator, forget_class)
        by_class = dict(zip(of.tolist(), scores.tolist()))
        seen.append((graphs.index(self.graphs), zeroed.tolist(), forget_class, by_class))
        return terms, scores, of

    monkeypatch.setattr(GCNLoss, "__call__", spy)
    monkeypatch.setattr(GCNLoss, "_tried", lambda *given: tried.append(try_some(*given)) or tried[-1])
    for steps, partly_masked, looks, classes in ((30, (0.1, 0.3), 1, None), (16, (0.1, 0.3), 2, 2), (6, None, 1, None)):
        about = {"partly_masked": partly_masked, "looks": looks, "classes": classes}
        GCNTrainer(gcn_config(steps=steps, kappa=(0.1, 0.3), **about), graphs, 0.25, 0).train()
    assert {index for index, *_ in seen} == {0, 1, 2}
    whole = [False] * 4
    expected = whole + [True, False] * 13 + whole + [True, True, False] * 4 + [False] * 6
    assert [len(zeroed) > 0 for _, zeroed, *_ in seen] == expected
    for (before, had, forgot, of_classes), (index, zeroed, forget_class, _) in zip(seen, seen[1:]):
        if not zeroed:
            assert forget_class is None
            continue
        assert index == before, "a mask is for the classifier that it was made for"
        assert zeroed[: len(had)] == had and (forgot is None or forget_class == forgot), "a request goes on"
        new = zeroed[len(had) :]
        assert 2 <= len(new) <= 4 if index == 1 else 3 <= len(new) <= 9, "of 15 and of 30 weights"
        vertices = range(graphs[index].graph.num_vertices)
        assert new == largest_free(of_classes[forget_class], vertices, had, len(new))
    tried = [tuple(some.tolist()) for some in tried]
    of_two = list(zip(seen[30:46], tried[30:46]))
    assert all(len(set(some)) == 2 and (each[2] is None or each[2] == some[0]) for each, some in of_two)
    assert tried[0] == tried[-1] == (0, 1, 2) and {some for _, some in of_two} > {(0, 1), (1, 0)}
    for other in (graph_generator(other_classes=False), graph_generator(features=("weight",))):
        with pytest.raises(TrainingError, match="must be those of all classifiers"):
            GCNTrainer(gcn_config(), [graphs[0], other], 6, 0)


def test_learning_is_descent_on_batches_where_weights_may_change(classifier, split):
    before = [weight.detach().clone() for weight in classifier.parameters()]
    trainable = [(torch.rand(weight.shape, generator=seeded("mask")) < 0.5).float() for weight in before]
    by_hand = random_classifier()
    order = torch.randperm(60, generator=seeded("test"))
    for batch, rate in zip(order.split(40), (0.1, 0.05)):
        gradients = torch.autograd.grad(3 * by_hand(split.images[batch]).square().sum(), list(by_hand.parameters()))
        for weight, gradient, mask in zip(by_hand.parameters(), gradients, trainable):
            weight.data -= rate * gradient * mask
    optimizer = torch.optim.SGD(classifier.parameters(), 0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 2)
    loss = lambda images, labels: 3 * classifier(images).square().sum()  # noqa: E731
    optimizer.register_step_post_hook(lambda *_: schedule.step())
    learn(classifier, split, 1, 40, optimizer, seeded("test"), loss, trainable)
    for weight, expected, old, mask in zip(classifier.parameters(), by_hand.parameters(), before, trainable):
        assert torch.allclose(weight, expected, atol=1e-5)
        assert torch.equal(weight[mask == 0], old[mask == 0]) and not torch.equal(weight, old)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_training_that_diverges_stops_with_the_step_and_what_to_look_at(split, classifier, value):
    images = split.images.clone()
    images[0] = value
    broken = Split(images, split.labels)
    with pytest.raises(TrainingError, match="loss is (nan|inf) at step 0: .* see classifier.learning_rate"):
        Trainer(trainer_config((6, 5), 1, len(images)), 0).train(broken, NUM_CLASSES)
    with pytest.raises(TrainingError, match="loss is (nan|inf) at step 0: .*diverged, see eval.hyperparameters"):
        UnlearningSFT(UnlearningSFTConfig(1, len(images), 0.1), 0).unlearn(classifier, broken, (1,))


@pytest.mark.parametrize("term", TERMS)
def test_a_term_of_the_gcn_that_is_no_number_stops_with_its_name_and_the_step(term):
    trainer = GCNTrainer(gcn_config(**{term: torch.inf}), [graph_generator()], 6, 0)
    with pytest.raises(TrainingError, match=f"{term} is inf at step 0: training diverged, see gcn.learning_rate and"):
        trainer.train()


def test_a_gcn_that_died_comes_back(monkeypatch):
    graphs, died = graph_generator(), []
    made = GCNTrainerConfig.network

    def dead(config, num_features):
        gcn = made(config, num_features)
        for weight in (gcn.convs[-1].lin_l.weight, gcn.convs[-1].lin_r.weight):
            weight.data.abs_().neg_()  # of what is at least 0, behind the ReLU before
        x, _ = class_graphs(graphs, graphs.by_class())
        died.append(gcn(x, graphs.graph).abs().max().item())
        return gcn

    monkeypatch.setattr(GCNTrainerConfig, "network", dead)
    gcn = GCNTrainer(gcn_config(rounds=3, steps=60, learning_rate=0.03), [graphs], 6, 0).train()
    assert died == [0] and gcn(class_graphs(graphs, graphs.by_class())[0], graphs.graph).std() > 1e-3


def test_training_is_the_same_with_the_same_seed_alone(split):
    graphs = graph_generator()
    config = trainer_config((6, 5), 2)
    trained = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(trained))
        models = Trainer(config, seed).train(split, NUM_CLASSES), GCNTrainer(gcn_config(), [graphs], 6, seed).train()
        trained.append([weight for model in models for weight in model.parameters()])
    first, again, other = trained
    assert all(torch.equal(one, two) for one, two in zip(first, again))
    assert not any(torch.equal(one, two) for one, two in zip(first, other))


@pytest.fixture(scope="module")
def forgetting():
    """A small problem, and a GCN that was trained on it."""
    split = random_split(60)
    classifier = Trainer(trainer_config((16, 12), 20, 32), 0).train(split, NUM_CLASSES)
    graphs = GraphGenerator(classifier, split, graph_config(), 0)
    ranges = {"kappa": (10, 64), "partly_masked": (5, 48)}
    config = gcn_config(steps=100, learning_rate=0.03, samples=60, sufficiency=0.0, **ranges)
    return split, graphs, GCNTrainer(config, [graphs], 48, 0).train()


def scores_at(graphs, split, order, kappa) -> tuple[float, float]:
    """Forget and retain score of the classifier under the mask at kappa."""
    with Mask.zeroing(graphs.graph, order.first(kappa).vertices).applied_to(graphs.classifier):
        return scores(graphs.classifier, split, order.ranking.forget_class)


@pytest.mark.parametrize("step, target, max_kappa", [(5, 1.7, 100), (5, 20.0, 100), (None, 20.0, 150)])
def test_auto_is_the_smallest_kappa_of_whole_steps_that_forgets(forgetting, step, target, max_kappa):
    split, graphs, trained = forgetting
    stride = step or max_kappa // 100
    for forget_class in range(NUM_CLASSES):
        changes = {"step": step, "group_size": 15, "target": target, "max_kappa": max_kappa}
        order = zeroing_order(graphs, forget_class, trained, 48, **changes)
        found = order.until_forgotten(split.forget(forget_class))
        kappas = range(stride, max_kappa, stride)
        kappa = next(kappa for kappa in kappas if scores_at(graphs, split, order, kappa)[0] < target)
        assert len(found.vertices) == kappa and found.left == ""
        assert scores_at(graphs, split, order, kappa)[1] > 90, "but not after a GCN that has not been trained"
        again = order.first(kappa)
        assert torch.equal(found.vertices, again.vertices) and found.seconds > again.seconds > 0
        if step is None:
            assert torch.equal(found.vertices, order.ranking(0, NOTHING).argsort(descending=True)[:kappa])
    assert not torch.nn.utils.parametrize.is_parametrized(graphs.classifier.layers[1])


@pytest.mark.parametrize("target", [1.0, 4.0])
def test_of_few_samples_auto_asks_what_a_normal_distribution_of_their_margins_leaves(forgetting, target):
    _, graphs, trained = forgetting
    few, counts = random_split(24, seed=3).forget(1), []
    for samples in (few, few[:1]):
        order = zeroing_order(graphs, 1, trained, 48, step=3, group_size=15, target=target, max_kappa=150)
        found = order.until_forgotten(samples)
        for kappa in range(3, 150, 3):
            mask = Mask.zeroing(graphs.graph, order.first(kappa).vertices)
            with mask.applied_to(graphs.classifier), torch.no_grad():
                logits = graphs.classifier(samples.images).double().numpy()
            margins = logits[:, 1] - np.delete(logits, 1, 1).max(1)
            left = 0.0 if len(margins) == 1 else norm.sf(0, margins.mean(), margins.std(ddof=1))
            if margins.max() < 0 and left < target / 100:
                break
        assert len(found.vertices) == kappa and found.left == ""
        counts.append(kappa)
    assert counts[1] < counts[0] < 147, "one sample says nothing of others"


@pytest.mark.parametrize("patience", [1, 3, 99])
def test_auto_with_patience_takes_the_step_after_which_the_others_lose_least(patience):
    graphs = graph_generator()
    everything = Split(graphs.samples.images, graphs.classifier(graphs.samples.images).argmax(1))
    order = zeroing_order(graphs, step=1, target=101, patience=patience)
    best, waited = None, 0
    for kappa in range(1, 21):
        zeroed, waited = order.first(kappa).vertices, waited + 1
        with Mask.zeroing(graphs.graph, zeroed).applied_to(graphs.classifier):
            logits = graphs.classifier(graphs.samples.images)
        loss = F.cross_entropy(logits[graphs.labels != 0], graphs.labels[graphs.labels != 0]).item()
        best, waited = ((loss, kappa), 0) if best is None or loss < best[0] else (best, waited)
        if waited >= patience:
            break
    assert len(order.until_forgotten(everything.forget(0)).vertices) == best[1]


def test_a_gcn_that_weighs_begins_as_the_formula_and_learns_what_each_weight_stands():
    graphs, zeroed = graph_generator(None), torch.tensor([1, 4, 9])
    mask = Mask.zeroing(graphs.graph, zeroed)
    gcn = MaskingGCN(graphs.config.num_features, 8, 2, weighs=(2.0, 3.0))
    drawn = [graphs.draw(8, seeded("request", 0, 2, 5, draw)) for draw in range(2)]
    own, others = 0, 0
    for samples in drawn:
        look = graphs.look(samples, ("retention", "curvature", "forgetting"), mask, 2)
        fall, v = look.feature("retention") - look.feature("curvature") ** 2 / 2, (look.loss + 0.02).sqrt()
        own += look.feature("forgetting")[2] / 2
        others += (v[0] * fall[0] + v[1] * fall[1]) / (v[0] + v[1]) / 2
    ranking = GCNRanking(masking_config(draws=2), graphs, 2, 0, gcn, 6)
    assert torch.allclose(ranking(5, zeroed), 2 * own + 3 * others, rtol=1e-4, atol=1e-6)
    insists = GCNRanking(masking_config(draws=2, penalty_growth=1.5), graphs, 2, 0, gcn, 6)
    assert torch.allclose(insists(5, zeroed), 2 * own + 1.5**-5 * 3 * others, rtol=1e-4, atol=1e-6)
    assert torch.equal(ranking.most_needed(), ranking(0, NOTHING).topk(6).indices)
    before = gcn(class_graphs(graphs, drawn[0])[0], graphs.graph)
    assert before.shape == (NUM_CLASSES, 87, 2) and torch.allclose(before, torch.tensor([2.0, 3.0]).expand_as(before))
    config = gcn_config(weighs=(2.0, 3.0), sufficiency=0.0, classes=2, looks=3, steps=12)
    learned = GCNTrainer(config, [graphs], 6, 0).train()(class_graphs(graphs, drawn[0])[0], graphs.graph)
    assert (learned > 0).all() and (learned.std(1) > 1e-3).all(), "not the same for all weights"
    with pytest.raises(ValueError, match="sufficiency and prior must be 0 of a GCN that weighs"):
        gcn_config(weighs=(1.0, 1.0))


@pytest.mark.parametrize(
    "target, kappa, left",
    [
        (101, 4, "^$"),
        (1e-9, 20, r"\d+\.\d % of class 0 are left"),
    ],
)
def test_auto_stops_where_the_class_is_forgotten_or_gives_up(target, kappa, left):
    graphs = graph_generator()
    everything = Split(graphs.samples.images, graphs.classifier(graphs.samples.images).argmax(1))
    found = zeroing_order(graphs, target=target).until_forgotten(everything)
    assert len(found.vertices) == kappa and re.match(left, found.left)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"step": 4 / 30, "draws": 3},
        {"momentum": 0.6, "ranking": "mean"},
        {"ranking": "set_difference"},
        {"ranking": "set_difference", "step": None},
    ],
)
def test_a_step_takes_the_largest_mean_scores_on_graphs_of_the_masked_classifier(changes):
    graphs, config = graph_generator(), masking_config(**changes)
    order = zeroing_order(graphs, forget_class=2, **changes)
    first, zeroed, mean = order.first(6).vertices.tolist(), [], 0
    for step in range(3 if config.step else 1):
        mask = Mask.zeroing(graphs.graph, torch.tensor(zeroed)) if zeroed else None
        groups = [graphs.draw(8, seeded("request", 0, 2, step, draw)) for draw in range(config.draws)]
        drawn, losses = zip(*(class_graphs(graphs, group, mask) for group in groups))
        importance = sum(order.ranking.gcn(x, graphs.graph) for x in drawn) / config.draws
        if step == 0:
            assert torch.equal(order.ranking.most_needed(), importance[2].topk(6).indices)
        of_step = contrast(importance, sum(losses) / config.draws if config.ranking == "damage" else None)[2]
        if config.ranking == "set_difference":
            of_step = set_difference(importance, 6)[2]
        of_step = of_step / of_step.std()
        mean = config.momentum * mean + (1 - config.momentum) * of_step if step else of_step
        zeroed += largest_free(mean.tolist(), range(30), zeroed, 4 if config.step else 30)
    assert first == zeroed[:6] and order.first(12).vertices.tolist() == zeroed[:12]
    assert sorted(order.first(99).vertices.tolist()) == list(range(30)), "no more is zeroed than there is"
    seconds = [order.first(kappa).seconds for kappa in (4, 5, 8, 12, 99)]
    assert seconds == sorted(seconds) and len(set(seconds)) == (4 if config.step else 1), "of all steps up to there"


@pytest.mark.parametrize("look_every, looks", [(None, [0]), (1, [0, 4, 8, 12, 16]), (2, [0, 8, 16])])
def test_between_two_looks_the_classifier_is_run_on_no_sample_and_what_zeros_do_is_foreseen(
    monkeypatch, look_every, looks
):
    graphs, passes, record = graph_generator(), [], HookedClassifier.record
    graphs.recorded()

    def recorded(classifier, *given):
        passes.append(Mask.on(classifier).num_zeroed)
        return record(classifier, *given)

    monkeypatch.setattr(HookedClassifier, "record", recorded)
    order = zeroing_order(graphs, forget_class=2, look_every=look_every)
    zeroed = order.first(20).vertices
    assert passes == looks[1:], "at first what is recorded serves"
    samples = graphs.draw(8, seeded("request", 0, 2, looks[-1] // 4, 0))
    mask = Mask.zeroing(graphs.graph, zeroed[: looks[-1]]) if looks[-1] else None
    look = graphs.look(samples, graphs.config.features, mask).without(zeroed[looks[-1] : 16])
    expected = contrast(order.ranking.gcn(torch.cat(list(look.class_graphs())), graphs.graph), look.loss)[2]
    assert zeroed[16:].tolist() == largest_free(expected.tolist(), range(30), zeroed[:16].tolist(), 4)


def test_layerwise_orders_and_partial_masks_take_their_share_of_every_layer():
    graphs = graph_generator(None, scope="layerwise")
    partly = GCNLoss(gcn_config(partly_masked=(50, 50)), graphs, 6)
    of_classes = torch.randn(NUM_CLASSES, graphs.graph.num_vertices, generator=seeded("scores"))
    looked, _ = partly.look(of_classes, torch.arange(NUM_CLASSES), NOTHING, None, seeded("test"))
    for zeroed in (zeroing_order(graphs).first(50).vertices, looked):
        for layer in competing("layerwise", graphs.graph):
            assert abs(len(set(layer) & set(zeroed.tolist())) - 50 * len(layer) / graphs.graph.num_vertices) <= 1


def saved(path, graphs, gcn, **changes) -> None:
    saliency = {"saliency": {"retain_weight": 70.0, "forgetting_weight": 0.0}}
    config = {
        "graphs": dataclasses.asdict(graphs.config),
        "eval": dataclasses.asdict(masking_config(step=0.1)) | {"visualize": False, "hyperparameters": saliency},
        "gcn": {"hidden": 8, "rounds": 2, "message_passing": True, "weighs": None, "steps": 3},
    }
    save(path, {"state_dict": gcn.state_dict(), "config": config, "seed": 0, "top_k": 0.25} | changes)


def test_a_trained_gcn_comes_back_with_its_features_and_settings_and_another_file_is_named(tmp_path):
    graphs, path = graph_generator(), tmp_path / "gcn.pt"
    gcn, described = small_gcn(graphs), graphs.config
    with pytest.raises(ArtifactError, match="gcn.pt: cannot be read"):
        TrainedGCN.load(path)
    saved(path, graphs, gcn)
    loaded = TrainedGCN.load(path)
    x, _ = class_graphs(graphs, graphs.draw(5, seeded("test")))
    assert torch.equal(loaded.gcn(x, graphs.graph), gcn(x, graphs.graph))
    assert loaded.graphs == described and loaded.masking == masking_config(step=0.1)
    assert loaded.top_k == 0.25 and loaded.saliency == 70
    loaded.check(described)
    for other, number in (({"features": ("weight",)}, 17), ({"other_classes": False}, 17), ({}, 18)):
        reads = dataclasses.replace(loaded, gcn=MaskingGCN(number, 8, 2))
        with pytest.raises(ArtifactError, match="graphs.features, other_classes, .* must be .* not"):
            reads.check(dataclasses.replace(described, **other))
    broken = copy.deepcopy(gcn)
    broken.readout.weight.data[0] = torch.nan
    for made, changes, message in (
        (MaskingGCN(17, 7, 2), {}, ".*size mismatch"),
        (broken, {}, ".*a weight is not a finite number"),
        (gcn, {"config": {}}, ""),
    ):
        saved(path, graphs, made, **changes)
        with pytest.raises(ArtifactError, match=f"gcn.pt: is not the checkpoint of a masking GCN {message}"):
            TrainedGCN.load(path)


@pytest.mark.parametrize("forget_class", range(NUM_CLASSES))
def test_learning_random_labels_changes_the_masked_layer_only_and_forgets(forgetting, monkeypatch, forget_class):
    split, graphs, _ = forgetting
    classifier, forget, labels = copy.deepcopy(graphs.classifier), split.forget(forget_class), []
    cross_entropy = F.cross_entropy
    monkeypatch.setattr(
        F, "cross_entropy", lambda logits, y, **_: labels.extend(y.tolist()) or cross_entropy(logits, y)
    )
    UnlearningSFT(UnlearningSFTConfig(epochs=10, batch_size=10, learning_rate=0.1), 0).unlearn(classifier, forget, (1,))
    assert len(labels) == 10 * 60 and set(labels) == {0, 1, 2} - {forget_class}
    assert (classifier(forget.images).argmax(1) == forget_class).float().mean() < 0.5
    pairs = zip(classifier.layers, graphs.classifier.layers)
    assert [torch.equal(layer.weight, before.weight) for layer, before in pairs] == [True, False, True]
