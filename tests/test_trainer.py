"""The top-k sampler, the terms of the loss, gradients through the masked classifier, and the order of zeroing."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import NUM_CLASSES, graph_generator, random_split
from hypothesis import given, settings
from hypothesis import strategies as st

from config import load_config
from data import GraphGenerator, seeded
from model import Mask, MaskingGCN
from trainer import (
    GCNTrainer,
    MaskingConfig,
    Trainer,
    TrainerConfig,
    UnlearningSFT,
    UnlearningSFTConfig,
    ZeroingOrder,
    contrast,
    gumbel_noise,
    masked_logits,
    prior_divergence,
    set_difference,
    top_k_mask,
)

TERMS = ("sufficiency", "prior", "necessity_forget", "necessity_retain")
finite = st.floats(-50, 50, width=32)


def gcn_config(**changes):
    small = {
        "hidden": 8,
        "rounds": 2,
        "steps": 20,
        "warmup": 4,
        "partly_masked": (2, 8),
        "group_size": 8,
        "samples": 30,
    }
    return dataclasses.replace(load_config().gcn, **small | {"kappa": (3, 10)} | changes)


def masking_config(**changes):
    settings = {"step": 4, "ranking": "damage", "group_size": 8, "draws": 1, "target": 1.25, "max_kappa": 20}
    return MaskingConfig(**settings | changes)


def zeroing_order(graphs, forget_class=0, seed=0, top_k=6, **changes):
    config = masking_config(**changes)
    torch.manual_seed(3)
    gcn = MaskingGCN(graphs.config.num_features, hidden=8, rounds=2)
    return ZeroingOrder(config, gcn, graphs, forget_class, top_k, seed)


@settings(deadline=None)
@given(st.lists(st.lists(finite, min_size=6, max_size=6), min_size=1, max_size=4), st.integers(1, 6))
def test_the_top_k_mask_has_exactly_k_ones_on_the_largest(rows, k):
    logits = torch.tensor(rows)
    mask = top_k_mask(logits, k, 0.5)
    assert set(mask.unique().tolist()) <= {0.0, 1.0} and (mask.sum(-1) == k).all()
    for row, kept in zip(logits, mask):
        assert k == 6 or row[kept == 1].min() >= row[kept == 0].max()


def test_ties_do_not_change_the_number_of_ones():
    assert top_k_mask(torch.zeros(2, 9), 4, 0.5).sum(-1).tolist() == [4, 4]


def test_the_gradient_of_the_top_k_mask_is_that_of_a_sigmoid_around_the_kth():
    logits = torch.tensor([3.0, -1.0, 0.5, 2.0], dtype=torch.float64, requires_grad=True)
    weighting = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    (top_k_mask(logits, 2, 0.7) * weighting).sum().backward()
    p = ((logits.detach() - 2.0) / 0.7).sigmoid()
    assert torch.allclose(logits.grad, weighting * p * (1 - p) / 0.7, atol=1e-12)


def test_gumbel_noise_has_the_moments_of_its_distribution():
    noise = gumbel_noise(torch.Size([200_000]), seeded("test"))
    assert abs(noise.mean() - 0.5772) < 0.01 and abs(noise.var() - torch.pi**2 / 6) < 0.03


@settings(deadline=None)
@given(st.lists(st.tuples(finite, finite), min_size=2, max_size=20))
def test_the_prior_term_is_a_divergence(pairs):
    logits, weights = torch.tensor(pairs, dtype=torch.float64).T
    divergence = prior_divergence(logits[None], weights)
    assert divergence.shape == (1,) and divergence >= -1e-9
    p = (weights.abs() + 1e-12) / (weights.abs() + 1e-12).sum()
    assert torch.allclose(prior_divergence(p.log()[None], weights), torch.zeros(1, dtype=torch.float64), atol=1e-9)
    expected = F.kl_div(p.log(), logits.log_softmax(0), reduction="sum", log_target=True)
    assert torch.allclose(divergence, expected, rtol=1e-6, atol=1e-9)


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
    ranked = set_difference(importance, 8).argsort(1, descending=True)
    for d in range(4):
        only_here = top[d] - set().union(*(top[c] for c in range(4) if c != d))
        first = sorted(only_here, key=lambda v: -importance[d, v])
        rest = sorted(set(range(30)) - only_here, key=lambda v: -contrast(importance)[d, v])
        assert ranked[d].tolist() == first + rest


@pytest.mark.parametrize("mask_layer", [0, -2, -1, [0, 2], None])
def test_many_masks_at_once_are_one_mask_after_another(mask_layer):
    graphs = graph_generator(mask_layer)
    zeroed = [torch.randperm(graphs.graph.num_vertices)[:9] for _ in range(3)]
    keep = torch.stack([torch.cat([k.flatten() for k in Mask.zeroing(graphs.graph, z).keep]) for z in zeroed])
    for inputs in (graphs.inputs, graphs.inputs.unflatten(0, (3, 15))):
        logits = masked_logits(graphs.classifier, graphs.graph, keep, inputs)
        for index, vertices in enumerate(zeroed):
            images = graphs.samples.images if inputs.dim() == 2 else graphs.samples.images.unflatten(0, (3, 15))[index]
            with Mask.zeroing(graphs.graph, vertices).applied_to(graphs.classifier):
                assert torch.allclose(logits[index], graphs.classifier(images), atol=1e-5)


@pytest.mark.parametrize("mask_layer", [-2, None])
@pytest.mark.parametrize("term", TERMS)
def test_every_term_reaches_every_parameter_of_the_gcn(term, mask_layer):
    graphs = graph_generator(mask_layer)
    config = gcn_config(**{name: float(name == term) for name in TERMS})
    gcn = MaskingGCN(graphs.config.num_features, 8, 3)
    terms, _ = GCNTrainer(config, graphs, 6, 0).loss(gcn, torch.arange(0), seeded("test"))
    terms[term].backward()
    for name, parameter in gcn.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0, name
    assert all(parameter.grad is None for parameter in graphs.classifier.parameters())


def test_the_necessity_terms_by_hand():
    graphs = graph_generator()
    trainer = GCNTrainer(gcn_config(), graphs, 6, 0)
    scores = torch.randn(NUM_CLASSES, 30)
    zeroed = torch.tensor([2, 7])
    samples = graphs.draw(10, seeded("test"))
    terms = trainer._necessity(scores, zeroed, 5, samples)
    forget, retain = [], []
    for d in range(NUM_CLASSES):
        free = [v for v in scores[d].argsort(descending=True).tolist() if v not in (2, 7)]
        with Mask.zeroing(graphs.graph, torch.tensor([2, 7, *free[:5]])).applied_to(graphs.classifier):
            masked = graphs.classifier(graphs.samples.images).softmax(1)
        original = graphs.classifier(graphs.samples.images)
        for label, index in itertools.product(range(NUM_CLASSES), range(10)):
            sample = samples[label, index]
            if label == d:
                forget.append(-(1 - masked[sample, d]).log())
            else:
                target = original[sample].clone()
                target[d] = -torch.inf
                retain.append(-(target.softmax(0) * masked[sample].log()).sum())
    assert torch.allclose(terms["necessity_forget"], torch.stack(forget).mean(), rtol=1e-4)
    assert torch.allclose(terms["necessity_retain"], torch.stack(retain).mean(), rtol=1e-4)


def test_a_trained_gcn_forgets_every_class_and_keeps_the_others():
    split = random_split(200)
    classifier = Trainer(TrainerConfig((16, 12), 30, 32, 0.01), 0).train(split, NUM_CLASSES)
    graphs = GraphGenerator(classifier, split, graph_generator().config, 0)
    config = gcn_config(hidden=16, steps=150, kappa=(10, 60), partly_masked=(5, 40), learning_rate=0.02, samples=45)
    trainer = GCNTrainer(config, graphs, 48, 0)
    gcn = trainer.train()
    early, late = (
        sum(step["necessity_forget"] for step in part) for part in (trainer.history[:20], trainer.history[-20:])
    )
    assert late < early / 2

    def correct(samples):
        return (classifier(samples.images).argmax(1) == samples.labels).float().mean()

    for forget_class in range(NUM_CLASSES):
        order = ZeroingOrder(masking_config(step=5, group_size=15, max_kappa=60), gcn, graphs, forget_class, 48, 0)
        with Mask.zeroing(graphs.graph, order.first(40)).applied_to(classifier):
            assert correct(split.forget(forget_class)) < 0.1
            assert correct(split.retain(forget_class)) > 0.9
        forget = split.forget(forget_class)
        kappa = order.forgotten_at(forget)
        assert kappa % 5 == 0 and kappa <= 40
        with Mask.zeroing(graphs.graph, order.first(kappa)).applied_to(classifier):
            assert correct(forget) < 0.0125
        with Mask.zeroing(graphs.graph, order.first(kappa - 5)).applied_to(classifier):
            assert correct(forget) > 0.0125


def test_training_is_the_same_with_the_same_seed_alone():
    graphs = graph_generator()
    first, again, other = (GCNTrainer(gcn_config(), graphs, 6, seed).train().state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_the_classifier_trained_is_the_same_with_the_same_seed_alone(split):
    config = TrainerConfig((6, 5), epochs=2, batch_size=16, learning_rate=0.01)
    torch.manual_seed(1)
    first = Trainer(config, 0).train(split, NUM_CLASSES)
    torch.manual_seed(2)
    again, other = (Trainer(config, seed).train(split, NUM_CLASSES) for seed in (0, 1))
    assert torch.equal(first.layers[0].weight, again.layers[0].weight)
    assert not torch.equal(first.layers[0].weight, other.layers[0].weight)


@pytest.mark.parametrize("ranking", ["damage", "mean", "set_difference"])
@pytest.mark.parametrize("step", [4, None])
def test_masks_of_growing_kappa_are_nested_and_do_not_depend_on_what_was_asked_before(ranking, step):
    graphs = graph_generator()
    order = zeroing_order(graphs, ranking=ranking, step=step)
    small, large = order.first(6), order.first(17)
    assert len(small) == 6 and len(large) == 17 == len(set(large.tolist()))
    assert torch.equal(large[:6], small)
    assert torch.equal(zeroing_order(graphs, ranking=ranking, step=step).first(17), large)
    assert not torch.equal(zeroing_order(graphs, 1, ranking=ranking, step=step).first(17), large)


def test_every_weight_can_be_zeroed():
    assert sorted(zeroing_order(graph_generator()).first(30).tolist()) == list(range(30))


def test_a_step_takes_the_largest_contrast_on_graphs_of_the_masked_classifier():
    graphs = graph_generator()
    order = zeroing_order(graphs, forget_class=2)
    zeroed: list[int] = []
    for step in range(3):
        samples = graphs.draw(8, seeded("request", 0, 2, step, 0))
        mask = Mask.zeroing(graphs.graph, torch.tensor(zeroed)) if zeroed else None
        x, damage = graphs.class_graphs(samples, mask)
        scores = contrast(order.gcn(x, graphs.graph), damage)[2]
        free = [v for v in scores.argsort(descending=True).tolist() if v not in zeroed]
        zeroed += free[:4]
    assert order.first(12).tolist() == zeroed


def test_the_time_of_a_request_grows_with_kappa():
    order = zeroing_order(graph_generator())
    order.first(20)
    assert 0 < order.seconds(4) < order.seconds(5) < order.seconds(20) == order.seconds(18)


def test_the_search_for_kappa_gives_up_at_the_largest():
    graphs = graph_generator()
    order = zeroing_order(graphs, target=1e-9, max_kappa=10)
    everything = type(graphs.samples)(graphs.samples.images, graphs.classifier(graphs.samples.images).argmax(1))
    assert order.forgotten_at(everything) == 10


def test_draws_are_averaged():
    graphs = graph_generator()
    one, three = zeroing_order(graphs), zeroing_order(graphs, draws=3)
    parts = []
    for draw in range(3):
        x, _ = graphs.class_graphs(graphs.draw(8, seeded("request", 0, 0, 0, draw)))
        parts.append(one.gcn(x, graphs.graph))
    assert torch.allclose(three.importance()[0], sum(parts) / 3, atol=1e-6)
    assert torch.equal(one.importance()[0], parts[0])
    assert torch.equal(three.most_needed(), (sum(parts) / 3)[0].topk(6).indices)


def test_sft_changes_the_masked_layer_only_and_learns_no_label_of_the_class(split):
    classifier = Trainer(TrainerConfig((6, 5), 20, 16, 0.01), 0).train(split, NUM_CLASSES)
    before = [layer.weight.detach().clone() for layer in classifier.layers]
    forget = split.forget(1)
    config = UnlearningSFTConfig(epochs=40, batch_size=10, learning_rate=0.1)
    score = (classifier(forget.images).argmax(1) == 1).float().mean()
    unlearned = UnlearningSFT(config, 0).unlearn(classifier, forget, (1,))
    assert (unlearned(forget.images).argmax(1) == 1).float().mean() < score / 2
    assert torch.equal(unlearned.layers[0].weight, before[0]) and torch.equal(unlearned.layers[2].weight, before[2])
    assert not torch.equal(unlearned.layers[1].weight, before[1])
