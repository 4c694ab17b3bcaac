"""The top-k sampler, the terms of the loss, gradients through the masked classifier, and the order of zeroing."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    NUM_CLASSES,
    carried,
    graph_config,
    graph_generator,
    random_classifier,
    random_split,
    representation,
    ridge_recalls,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import artifacts
from artifacts import ArtifactError
from config import load_config
from data import GraphGenerator, Split, seeded
from erasure import explained_variance
from model import Mask, MaskingGCN, WeightGraph
from trainer import (
    GCNLoss,
    GCNRanking,
    GCNTrainer,
    MaskingConfig,
    SaliencyRanking,
    TrainedGCN,
    Trainer,
    TrainerConfig,
    TrainingError,
    UnlearningSFT,
    UnlearningSFTConfig,
    ZeroingOrder,
    check_weights,
    contrast,
    gumbel_noise,
    masked_logits,
    prior_divergence,
    ranked,
    set_difference,
    top_k_mask,
    top_k_masks,
)

TERMS = ("sufficiency", "prior", "necessity_forget", "necessity_retain")
NOTHING = torch.empty(0, dtype=torch.long)
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
    settings = {
        "step": 4,
        "momentum": 0.0,
        "ranking": "damage",
        "group_size": 8,
        "draws": 1,
        "target": 1.25,
        "erasure": 0.0,
        "erasure_target": None,
        "max_kappa": 20,
    }
    return MaskingConfig(**settings | changes)


def zeroing_order(graphs, forget_class=0, seed=0, top_k=6, **changes):
    config = masking_config(**changes)
    torch.manual_seed(3)
    gcn = MaskingGCN(graphs.config.num_features, hidden=8, rounds=2)
    return ZeroingOrder(config, graphs, GCNRanking(config, gcn, graphs, forget_class, top_k, seed))


@settings(deadline=None)
@given(st.lists(st.lists(finite, min_size=6, max_size=6), min_size=1, max_size=4), st.integers(1, 6))
def test_the_top_k_mask_has_exactly_k_ones_on_the_largest(rows, k):
    logits = torch.tensor(rows)
    mask = top_k_mask(logits, k, 0.5)
    assert set(mask.unique().tolist()) <= {0.0, 1.0} and (mask.sum(-1) == k).all()
    for row, kept in zip(logits, mask):
        assert k == 6 or row[kept == 1].min() >= row[kept == 0].max()


LAYERS = WeightGraph([(6, 7), (5, 6), (3, 5)])


def layers_of(vertices, graph=LAYERS) -> list[list[int]]:
    """The vertices of every layer, in the order in which they are given."""
    starts = [sum(graph.sizes[:index]) for index in range(len(graph.sizes) + 1)]
    return [[v for v in vertices if start <= v < end] for start, end in itertools.pairwise(starts)]


def largest_free(scores, vertices, gone, count) -> list[int]:
    """Of `vertices` those of the largest scores that are not among `gone`, one after another."""
    return sorted(set(vertices) - set(gone), key=lambda v: -scores[v])[:count]


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 80), st.integers(1, 100))
def test_global_ranks_are_those_of_the_scores(seed, gone, count):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(LAYERS.num_vertices, generator=generator)
    zeroed = torch.randperm(LAYERS.num_vertices, generator=generator)[:gone]
    expected = largest_free(scores.tolist(), range(LAYERS.num_vertices), zeroed.tolist(), count)
    assert ranked(scores, LAYERS, "global", zeroed, count).tolist() == expected


@settings(deadline=None)
@given(st.lists(st.integers(1, 25), min_size=1, max_size=10), st.integers(0, 10**6))
def test_layerwise_every_layer_gives_its_share_at_any_time_and_its_largest_scores_first(steps, seed):
    generator = torch.Generator().manual_seed(seed)
    zeroed = NOTHING
    for count in steps:
        scores = torch.randn(LAYERS.num_vertices, generator=generator)
        new = ranked(scores, LAYERS, "layerwise", zeroed, count)
        assert len(new) == min(count, LAYERS.num_vertices - len(zeroed))
        for of_layer, everything in zip(layers_of(new.tolist()), layers_of(range(LAYERS.num_vertices))):
            assert of_layer == largest_free(scores.tolist(), everything, zeroed.tolist(), len(of_layer))
        zeroed = torch.cat([zeroed, new])
        for of_layer, size in zip(layers_of(zeroed.tolist()), LAYERS.sizes):
            assert abs(len(of_layer) - len(zeroed) * size / LAYERS.num_vertices) <= 1
    assert len(set(zeroed.tolist())) == len(zeroed)


def test_layerwise_and_global_are_the_same_on_one_layer():
    graph, scores = WeightGraph([(5, 6)]), torch.randn(30, generator=seeded("test"))
    zeroed = torch.tensor([4, 9, 20])
    assert torch.equal(ranked(scores, graph, "layerwise", zeroed, 8), ranked(scores, graph, "global", zeroed, 8))


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(0, 40))
def test_layerwise_masks_have_their_share_of_ones_in_every_layer(seed, k, gone):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, LAYERS.num_vertices, generator=generator)
    order = ranked(torch.randn(LAYERS.num_vertices, generator=generator), LAYERS, "layerwise", NOTHING, gone)
    zeroed = set(order.tolist())
    masks = top_k_masks(scores, LAYERS, "layerwise", order, k, 0.5)
    for of_scores, mask in zip(scores.tolist(), masks):
        ones = set((mask == 1).nonzero()[:, 0].tolist())
        assert zeroed <= ones and set(mask.unique().tolist()) <= {0.0, 1.0}
        for everything, size in zip(layers_of(range(LAYERS.num_vertices)), LAYERS.sizes):
            share = max(1, round(k * size / LAYERS.num_vertices))
            assert ones & set(everything) - zeroed == set(largest_free(of_scores, everything, zeroed, share))


def test_global_masks_are_one_top_k_over_all_layers():
    scores = torch.randn(2, LAYERS.num_vertices, dtype=torch.float64, generator=seeded("test")).requires_grad_()
    zeroed, weighting = torch.tensor([1, 50, 80]), torch.randn(2, LAYERS.num_vertices, generator=seeded("weighting"))
    masks = top_k_masks(scores, LAYERS, "global", zeroed, 9, 0.5)
    free = (scores / scores.std(1, keepdim=True)).index_fill(1, zeroed, -torch.inf)
    expected = top_k_mask(free, 9, 0.5).index_fill(1, zeroed, 1.0)
    assert torch.equal(masks, expected) and masks.sum(1).tolist() == [12, 12]
    gradients = [torch.autograd.grad((each * weighting).sum(), scores)[0] for each in (masks, expected)]
    assert torch.equal(*gradients) and gradients[0].abs().sum() > 0


def test_a_layer_without_a_free_weight_adds_none_to_a_mask():
    scores = torch.randn(2, LAYERS.num_vertices, generator=seeded("test"))
    masks = top_k_masks(scores, LAYERS, "layerwise", torch.arange(72, 87), 20, 0.5)
    assert [len(of_layer) for of_layer in layers_of((masks[0] == 1).nonzero()[:, 0].tolist())] == [10, 7, 15]


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


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mask_layer", [0, -2, -1, [0, 2], None])
def test_many_masks_at_once_are_one_mask_after_another(mask_layer, bias):
    graphs = graph_generator(mask_layer, bias=bias)
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
    config = gcn_config(partly_masked=None, **{name: float(name == term) for name in TERMS})
    gcn = MaskingGCN(graphs.config.num_features, 8, 3)
    terms, _ = GCNLoss(config, graphs, 6)(gcn, torch.arange(0), seeded("test"))
    terms[term].backward()
    for name, parameter in gcn.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0, name
    assert all(parameter.grad is None for parameter in graphs.classifier.parameters())


@pytest.mark.parametrize("erasure", [None, (1.0, 9.0)])
def test_the_loss_is_the_weighted_sum_of_its_terms(monkeypatch, erasure):
    graphs = graph_generator(erasure=erasure is not None)
    config = gcn_config(sufficiency=0.3, prior=0.2, necessity_forget=2.0, necessity_retain=0.5, partly_masked=None)
    config = dataclasses.replace(config, steps=1, learning_rate=1e-9, erasure=erasure)
    gradients = []
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, _: gradients.extend(
        parameter.grad.clone() for parameter in parameters
    ))  # fmt: skip
    trainer = GCNTrainer(config, [graphs], 6, 0)
    gcn = trainer.train()
    generator = seeded("gcn", 0, 6)
    torch.randint(1, (), generator=generator)  # which classifier
    terms, _ = trainer.losses[0](gcn, torch.arange(0), generator)
    assert set(terms) == {*TERMS, *(["erasure"] if erasure else [])}
    loss = sum(getattr(config, name) * terms[name] for name in TERMS) + terms.get("erasure", 0)
    expected = torch.autograd.grad(loss, list(gcn.parameters()))
    assert all(torch.allclose(g, e, rtol=1e-3, atol=1e-6) for g, e in zip(gradients, expected))


def test_the_loss_works_on_the_masked_classifier():
    graphs = graph_generator()
    gcn = MaskingGCN(graphs.config.num_features, 8, 2)
    zeroed = torch.tensor([1, 4, 9, 20])
    config = gcn_config(prior=0.5)
    terms, scores = GCNLoss(config, graphs, 6)(gcn, zeroed, seeded("test"))
    x, damage = graphs.class_graphs(graphs.draw(8, seeded("test")), Mask.zeroing(graphs.graph, zeroed))
    importance = gcn(x, graphs.graph)
    assert torch.allclose(scores, contrast(importance, damage), atol=1e-5)
    assert not torch.allclose(scores, contrast(importance), atol=1e-5)
    assert "sufficiency" not in terms, "the top-K weights are those of the whole classifier"
    weights = graphs.classifier.layers[1].weight.detach().flatten()
    assert torch.allclose(terms["prior"], prior_divergence(importance, weights).mean(), rtol=1e-4)


def test_the_sufficiency_term_by_hand():
    graphs = graph_generator()
    loss = GCNLoss(gcn_config(gumbel=0.7), graphs, 6)
    importance = torch.randn(NUM_CLASSES, 30)
    samples = graphs.draw(10, seeded("test"))
    term = loss._sufficiency(importance, samples, seeded("noise"))
    noise = gumbel_noise(importance.shape, seeded("noise"))
    losses = []
    for c in range(NUM_CLASSES):
        kept = (importance[c] / importance[c].std() + 0.7 * noise[c]).topk(6).indices
        with Mask.keeping(graphs.graph, kept).applied_to(graphs.classifier):
            logits = graphs.classifier(graphs.samples.images[samples[c]])
        losses.append(F.cross_entropy(logits, torch.full((10,), c)))
    assert torch.allclose(term, torch.stack(losses).mean(), rtol=1e-4)


def test_every_second_step_after_the_warmup_is_partly_masked(monkeypatch):
    graphs = graph_generator()
    sizes = []
    call = GCNLoss.__call__

    def spy(self, gcn, zeroed, generator):
        sizes.append(len(zeroed))
        return call(self, gcn, zeroed, generator)

    monkeypatch.setattr(GCNLoss, "__call__", spy)
    GCNTrainer(gcn_config(steps=12, warmup=4, partly_masked=(2, 8)), [graphs], 6, 0).train()
    assert sizes[:4] == [0] * 4 and all(2 <= size <= 8 for size in sizes[4::2]) and not any(sizes[5::2])
    sizes.clear()
    GCNTrainer(gcn_config(steps=6, partly_masked=None), [graphs], 6, 0).train()
    assert sizes == [0] * 6


def test_training_that_diverges_says_so(split):
    endless = Split(split.images * torch.inf, split.labels)
    with pytest.raises(TrainingError, match="loss of the classifier is nan .* see classifier.learning_rate"):
        Trainer(TrainerConfig((6, 5), False, 5, 16, 0.01), 0).train(endless, NUM_CLASSES)


def test_a_classifier_whose_loss_is_no_number_stops_with_the_step(split):
    images = split.images.clone()
    images[0] = torch.inf
    with pytest.raises(TrainingError, match="loss of the classifier is (nan|inf) at step 0: .* see classifier.learn"):
        Trainer(TrainerConfig((6, 5), False, 1, len(split.labels), 0.01), 0).train(
            Split(images, split.labels), NUM_CLASSES
        )


@pytest.mark.parametrize("term", ["sufficiency", "prior", "necessity_forget", "necessity_retain"])
def test_a_term_of_the_gcn_that_is_no_number_stops_with_its_name_and_the_step(graphs, monkeypatch, term):
    terms = GCNLoss.__call__
    steps = itertools.count()

    def broken(self, gcn, zeroed, generator):
        values, scores = terms(self, gcn, zeroed, generator)
        return values | ({term: values[term] * torch.inf} if next(steps) == 2 else {}), scores

    monkeypatch.setattr(GCNLoss, "__call__", broken)
    config = gcn_config(steps=5, partly_masked=None, sufficiency=1.0, prior=1.0)
    expected = f"{term} is -?(inf|nan) at step 2: training diverged, see gcn.learning_rate and the weight of the term"
    with pytest.raises(TrainingError, match=expected):
        GCNTrainer(config, [graphs], 6, 0).train()


def test_random_labels_that_diverge_stop_with_the_step(split, classifier):
    forget = Split(split.images[:20] * torch.inf, torch.ones(20, dtype=torch.long))
    with pytest.raises(TrainingError, match="loss is nan at step 0: training diverged, see eval.hyperparameters.sft"):
        UnlearningSFT(UnlearningSFTConfig(1, 5, 0.1), 0).unlearn(classifier, forget, (1,))


def test_weights_that_are_no_numbers_are_seen(classifier):
    check_weights(classifier, "classifier", "the setting")
    classifier.layers[1].weight.data[0, 0] = torch.nan
    with pytest.raises(TrainingError, match="a weight of the classifier is not a finite number.*see the setting"):
        check_weights(classifier, "classifier", "the setting")


def test_the_necessity_terms_by_hand():
    graphs = graph_generator()
    loss = GCNLoss(gcn_config(), graphs, 6)
    scores = torch.randn(NUM_CLASSES, 30)
    zeroed = torch.tensor([2, 7])
    samples = graphs.draw(10, seeded("test"))
    terms = loss._necessity(scores, zeroed, 5, samples, 0.0)
    assert set(terms) == {"necessity_forget", "necessity_retain"}
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


@pytest.mark.parametrize("rivals", [1, 2])
@pytest.mark.parametrize("scope", ["global", "layerwise"])
@pytest.mark.parametrize("mask_layer", [-2, -1, [0, 2], None])
def test_the_erasure_term_by_hand(mask_layer, scope, rivals):
    graphs = graph_generator(mask_layer, erasure=True, rivals=rivals, scope=scope)
    size = graphs.graph.num_vertices
    scores, zeroed = torch.randn(NUM_CLASSES, size, generator=seeded("scores")), torch.tensor([2, 7])
    samples = graphs.draw(10, seeded("test"))
    terms = GCNLoss(gcn_config(), graphs, 6)._necessity(scores, zeroed, 9, samples, 3.0)
    values = []
    for d, of_class in enumerate(scores.tolist()):
        layers = layers_of(range(size), graphs.graph) if scope == "layerwise" else [list(range(size))]
        removed = [v for layer in layers for v in largest_free(of_class, layer, [2, 7], round(9 * len(layer) / size))]
        with Mask.zeroing(graphs.graph, torch.tensor([2, 7, *removed])).applied_to(graphs.classifier):
            values.append(carried(graphs, graphs.classifier, samples, d))
    assert terms["erasure"].item() == pytest.approx(3.0 * sum(values) / NUM_CLASSES, rel=1e-3)


def test_the_erasure_term_reaches_every_parameter_of_the_gcn():
    graphs = graph_generator(None, erasure=True)
    gcn = MaskingGCN(graphs.config.num_features, 8, 3)
    terms, _ = GCNLoss(gcn_config(erasure=(2.0, 2.0)), graphs, 6)(gcn, torch.arange(0), seeded("test"))
    terms["erasure"].backward()
    for name, parameter in gcn.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0, name
    assert all(parameter.grad is None for parameter in graphs.classifier.parameters())


def test_the_erasure_is_asked_for_without_the_other_terms_of_necessity():
    graphs = graph_generator(None, erasure=True)
    config = gcn_config(prior=1.0, necessity_forget=0.0, necessity_retain=0.0, erasure=(2.0, 2.0))
    gcn = MaskingGCN(graphs.config.num_features, 8, 2)
    assert "erasure" in GCNLoss(config, graphs, 6)(gcn, NOTHING, seeded("test"))[0]


@pytest.mark.parametrize("span", [(1.0, 3.0), None])
def test_the_gcn_is_told_the_weight_of_the_erasure_that_it_is_asked_for(monkeypatch, span):
    graphs = graph_generator(None, erasure=True)
    told, asked = [], []
    class_graphs, necessity = GraphGenerator.class_graphs, GCNLoss._necessity

    def spy_on_graphs(*arguments):
        x, damage = class_graphs(*arguments)
        told.extend(x[..., 8].std(1).unique(dim=0).tolist()[:1])
        return x, damage

    def spy_on_loss(*arguments):
        asked.append(arguments[-1])
        return necessity(*arguments)

    monkeypatch.setattr(GraphGenerator, "class_graphs", spy_on_graphs)
    monkeypatch.setattr(GCNLoss, "_necessity", spy_on_loss)
    trainer = GCNTrainer(gcn_config(steps=40, erasure=span), [graphs], 6, 0)
    trainer.train()
    assert told == pytest.approx(asked, rel=1e-3) and len(asked) == 40
    if span is None:
        assert set(asked) == {0.0} and not any("erasure" in terms for terms in trainer.history)
    else:
        assert 1.0 <= min(asked) < 1.3 and 2.7 < max(asked) <= 3.0
        assert all(0 <= terms["erasure"] <= weight for terms, weight in zip(trainer.history, asked))


@pytest.mark.parametrize("weight", [0.0, 4.0])
def test_a_request_tells_the_gcn_the_weight_that_it_asks_for(weight):
    graphs = graph_generator(None, erasure=True)
    ranking = zeroing_order(graphs, erasure=weight).ranking
    x, _ = graphs.class_graphs(graphs.draw(8, seeded("request", 0, 0, 0, 0)), None, weight)
    assert torch.equal(ranking.importance(0, NOTHING)[0], ranking.gcn(x, graphs.graph))


@pytest.fixture(scope="module")
def forgetting():
    """A small problem, and a GCN that was trained on it."""
    split = random_split(200)
    classifier = Trainer(TrainerConfig((16, 12), False, 30, 32, 0.01), 0).train(split, NUM_CLASSES)
    graphs = GraphGenerator(classifier, split, graph_generator().config, 0)
    ranges = {"kappa": (10, 64), "partly_masked": (5, 48)}
    config = gcn_config(hidden=16, steps=300, learning_rate=0.02, samples=90, sufficiency=0.0, prior=0.0, **ranges)
    return split, graphs, GCNTrainer(config, [graphs], 48, 0).train()


def scores(graphs, split, order, kappa):
    """Forget and retain score, from 0 to 1, of the classifier under the mask at kappa."""
    forget_class = order.ranking.forget_class
    with Mask.zeroing(graphs.graph, order.first(kappa)).applied_to(graphs.classifier):
        return [
            (graphs.classifier(samples.images).argmax(1) == samples.labels).float().mean().item()
            for samples in (split.forget(forget_class), split.retain(forget_class))
        ]


def test_a_trained_gcn_forgets_every_class_and_keeps_the_others(forgetting):
    split, graphs, trained = forgetting

    def succeeds(gcn, forget_class):
        config = masking_config(step=5, group_size=15)
        order = ZeroingOrder(config, graphs, GCNRanking(config, gcn, graphs, forget_class, 48, 0))
        forget, retain = scores(graphs, split, order, 64)
        return forget < 0.1 and retain > 0.9

    assert all(succeeds(trained, forget_class) for forget_class in range(NUM_CLASSES))
    untrained = MaskingGCN(graphs.config.num_features, 16, 2)
    assert not all(succeeds(untrained, forget_class) for forget_class in range(NUM_CLASSES))


def test_one_gcn_learns_from_several_classifiers(monkeypatch):
    graphs = [graph_generator(), graph_generator(mask_layer=-1), graph_generator(bias=True)]
    seen = []
    call = GCNLoss.__call__

    def spy(self, gcn, zeroed, generator):
        seen.append((graphs.index(self.graphs), len(zeroed)))
        return call(self, gcn, zeroed, generator)

    monkeypatch.setattr(GCNLoss, "__call__", spy)
    shares = {"kappa": (0.1, 0.3), "partly_masked": (0.1, 0.3)}
    gcn = GCNTrainer(gcn_config(steps=40, **shares), graphs, 0.25, 0).train()
    assert {index for index, _ in seen} == {0, 1, 2}
    for (before, _), (index, zeroed) in zip(seen, seen[1:]):
        assert not zeroed or index == before, "a mask is for the classifier that it was made for"
    assert {zeroed for index, zeroed in seen if zeroed and index == 1} <= {2, 3, 4}, "of 15 weights"
    assert all(gcn(each.class_graphs(each.draw(4, seeded("t")))[0], each.graph).isfinite().all() for each in graphs)


def test_classifiers_to_learn_from_need_the_same_features():
    for change in ({"other_classes": False}, {"erasure": True}):
        with pytest.raises(TrainingError, match="of the graphs must be the same"):
            GCNTrainer(gcn_config(), [graph_generator(), graph_generator(**change)], 6, 0)


def saved(path, graphs, gcn, **changes):
    config = {
        "graphs": dataclasses.asdict(graphs.config),
        "eval": dataclasses.asdict(masking_config(step=0.1)) | {"visualize": False},
        "gcn": {"hidden": 8, "rounds": 2, "message_passing": True, "steps": 3},
    }
    artifacts.save(path, {"state_dict": gcn.state_dict(), "config": config, "seed": 0, "top_k": 0.25} | changes)


def test_a_trained_gcn_comes_back_with_its_features_and_settings(tmp_path):
    graphs = graph_generator()
    gcn = MaskingGCN(graphs.config.num_features, 8, 2)
    saved(tmp_path / "gcn.pt", graphs, gcn)
    loaded = TrainedGCN.load(tmp_path / "gcn.pt")
    x, _ = graphs.class_graphs(graphs.draw(5, seeded("test")))
    assert torch.equal(loaded.gcn(x, graphs.graph), gcn(x, graphs.graph))
    assert loaded.graphs == graphs.config and loaded.masking == masking_config(step=0.1) and loaded.top_k == 0.25
    loaded.check(graphs.config)
    with pytest.raises(ArtifactError, match="graphs.features must be .*, which the trained GCN reads, not"):
        loaded.check(dataclasses.replace(graphs.config, features=("weight", "margin")))
    with pytest.raises(ArtifactError, match="graphs.other_classes must be True"):
        loaded.check(dataclasses.replace(graphs.config, other_classes=False))
    with pytest.raises(ArtifactError, match="graphs.erasure must be False, which the trained GCN reads, not True"):
        loaded.check(dataclasses.replace(graphs.config, erasure=True))


def test_a_file_that_is_no_trained_gcn_is_named(tmp_path):
    graphs = graph_generator()
    path = tmp_path / "gcn.pt"
    with pytest.raises(ArtifactError, match="gcn.pt: cannot be read"):
        TrainedGCN.load(path)
    saved(path, graphs, MaskingGCN(3, 8, 2))
    with pytest.raises(ArtifactError, match="gcn.pt: is not the checkpoint of a masking GCN .*size mismatch"):
        TrainedGCN.load(path)
    saved(path, graphs, MaskingGCN(graphs.config.num_features, 8, 2), config={})
    with pytest.raises(ArtifactError, match="gcn.pt: is not the checkpoint"):
        TrainedGCN.load(path)
    whole = path.read_bytes()
    for content in (b"", b"no checkpoint", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(ArtifactError, match="gcn.pt: is damaged or something else"):
            TrainedGCN.load(path)


def test_the_tracked_gcn_reads_the_default_features():
    TrainedGCN.load().check(load_config().graphs)


def test_a_step_may_be_a_share_of_the_layer():
    graphs = graph_generator()
    assert torch.equal(zeroing_order(graphs, step=4 / 30).first(12), zeroing_order(graphs, step=4).first(12))


def test_auto_works_on_weights_ranked_once(forgetting):
    split, graphs, trained = forgetting
    config = masking_config(step=None, group_size=15, target=20.0, max_kappa=150)
    order = ZeroingOrder(config, graphs, GCNRanking(config, trained, graphs, 0, 48, 0))
    kappa = order.forgotten_at(split.forget(0))
    reached = [100 * scores(graphs, split, order, smaller)[0] < 20 for smaller in range(1, 150)]
    assert kappa == 1 + reached.index(True)
    ranked = order.ranking(0, NOTHING).argsort(descending=True)
    assert torch.equal(order.first(kappa), ranked[:kappa]) and order.seconds(kappa) > 0


@pytest.mark.parametrize("target", [1.25, 20.0])
def test_auto_is_the_smallest_kappa_of_whole_steps_that_forgets(forgetting, target):
    split, graphs, trained = forgetting
    for forget_class in range(NUM_CLASSES):
        config = masking_config(step=5, group_size=15, target=target, max_kappa=100)
        order = ZeroingOrder(config, graphs, GCNRanking(config, trained, graphs, forget_class, 48, 0))
        kappa = order.forgotten_at(split.forget(forget_class))
        reached = [100 * scores(graphs, split, order, smaller)[0] < target for smaller in range(5, 100, 5)]
        assert kappa == 5 * (1 + reached.index(True)) < 100
    assert not torch.nn.utils.parametrize.is_parametrized(graphs.classifier.layers[1])


def test_training_is_the_same_with_the_same_seed_alone():
    graphs = graph_generator()
    first, again, other = (GCNTrainer(gcn_config(), [graphs], 6, seed).train().state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_the_classifier_trained_is_the_same_with_the_same_seed_alone(split):
    config = TrainerConfig((6, 5), bias=False, epochs=2, batch_size=16, learning_rate=0.01)
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
        scores = contrast(order.ranking.gcn(x, graphs.graph), damage)[2]
        free = [v for v in scores.argsort(descending=True).tolist() if v not in zeroed]
        zeroed += free[:4]
    assert order.first(12).tolist() == zeroed


def test_steps_follow_the_running_mean_of_their_scores():
    graphs = graph_generator()
    order = zeroing_order(graphs, momentum=0.6)
    zeroed: list[int] = []
    mean = None
    for step in range(3):
        scores = order.ranking(step, torch.tensor(zeroed, dtype=torch.long))
        scores = scores / scores.std()
        mean = scores if mean is None else 0.6 * mean + 0.4 * scores
        zeroed += [v for v in mean.argsort(descending=True).tolist() if v not in zeroed][:4]
    assert order.first(12).tolist() == zeroed != zeroing_order(graphs).first(12).tolist()


def test_no_more_is_zeroed_than_there_is():
    order = zeroing_order(graph_generator(), max_kappa=500)
    assert order.first(99).sort().values.tolist() == list(range(30)) and order.max_kappa == 30


def test_the_time_of_a_request_grows_with_kappa():
    order = zeroing_order(graph_generator())
    order.first(20)
    assert 0 < order.seconds(4) < order.seconds(5) < order.seconds(20) == order.seconds(18)


def test_the_search_for_kappa_gives_up_at_the_largest():
    graphs = graph_generator()
    order = zeroing_order(graphs, target=1e-9, max_kappa=10)
    everything = type(graphs.samples)(graphs.samples.images, graphs.classifier(graphs.samples.images).argmax(1))
    assert order.forgotten_at(everything) == 10


def test_most_needed_are_those_of_the_whole_classifier_at_any_time():
    order = zeroing_order(graph_generator())
    before = order.ranking.most_needed()
    order.first(20)
    assert torch.equal(order.ranking.most_needed(), before)


def test_the_set_difference_is_what_the_order_follows():
    order = zeroing_order(graph_generator(), ranking="set_difference", step=None)
    ranked = set_difference(order.ranking.importance(0, NOTHING)[0], 6)[0].argsort(descending=True)
    assert torch.equal(order.first(30), ranked)


@pytest.mark.parametrize("erasure_weight", [0.0, 3.0])
@pytest.mark.parametrize("zeroed", [[], [3, 8, 21]])
def test_the_saliency_by_hand(zeroed, erasure_weight):
    graphs = graph_generator()
    ranking = SaliencyRanking(masking_config(), graphs, 1, 0, retain_weight=5.0, erasure_weight=erasure_weight)
    scores = ranking(2, torch.tensor(zeroed, dtype=torch.long))
    samples = graphs.draw(8, seeded("request", 0, 1, 2, 0))
    classifier = random_classifier()
    classifier.layers[1].weight.data.view(-1)[zeroed] = 0
    w = classifier.layers[1].weight.detach()

    def gradients(index, of):
        classifier.zero_grad()
        logits, label = classifier(graphs.samples.images[index : index + 1]), graphs.labels[index]
        (F.cross_entropy(logits, label[None]) if of == "loss" else logits[0, label] - logits.mean()).backward()
        return classifier.layers[1].weight.grad.clone()

    margin = w * torch.stack([gradients(index, "margin") for index in samples[1]]).mean(0)
    fall, v = [], []
    for c in (0, 2):
        g = torch.stack([gradients(index, "loss") for index in samples[c]])
        fall.append(w * g.mean(0) - w**2 * (g**2).mean(0) / 2)
        logits = classifier(graphs.samples.images[samples[c]])
        v.append((F.cross_entropy(logits, graphs.labels[samples[c]]) + 0.02).sqrt().detach())
    expected = margin + 5.0 * (v[0] * fall[0] + v[1] * fall[1]) / (v[0] + v[1])
    if erasure_weight:
        rows = torch.cat([samples[1], samples[graphs.rivals[1, 0]]])
        classifier.zero_grad()
        features = classifier.layers[1](classifier.layers[0](graphs.samples.images[rows]).relu()).relu()
        explained_variance(features, graphs.labels[rows] == 1, graphs.config.ridge).backward()
        fall = erasure_weight * w * classifier.layers[1].weight.grad
        assert fall.abs().max() > 0.1
        expected = expected + fall
    assert torch.allclose(scores, expected.flatten(), rtol=1e-3, atol=1e-5)


@pytest.fixture(scope="module")
def erasing():
    """A small problem, and an order of all its weights for every class, as (graphs, split, order of a class)."""
    split = random_split(60)
    classifier = Trainer(TrainerConfig((8, 6), False, 10, 16, 0.02), 0).train(split, NUM_CLASSES)
    graphs = GraphGenerator(classifier, split, graph_config(None, scope="layerwise", samples_per_class=50), 0)

    def order(forget_class, **changes):
        config = masking_config(step=3, group_size=40, target=60.0, max_kappa=120, **changes)
        return ZeroingOrder(config, graphs, SaliencyRanking(config, graphs, forget_class, 0, 1.0, 20.0))

    return graphs, split, order


def test_layerwise_orders_and_partial_masks_take_their_share_of_every_layer(erasing):
    graphs, _, order = erasing
    partly = GCNLoss(gcn_config(partly_masked=(50, 50)), graphs, 6)
    scores = torch.randn(NUM_CLASSES, graphs.graph.num_vertices, generator=seeded("scores"))
    for zeroed in (order(1).first(50), partly.partial_mask(scores, seeded("test"))):
        for of_layer, size in zip(layers_of(zeroed.tolist(), graphs.graph), graphs.graph.sizes, strict=True):
            assert abs(len(of_layer) - 50 * size / graphs.graph.num_vertices) <= 1


def test_auto_goes_on_until_the_class_is_found_no_better_than_in_the_pixels(erasing):
    graphs, split, order = erasing
    of_pixels = ridge_recalls(split.images, split.labels, graphs.config.ridge)
    found = []
    for forget_class, target in itertools.product(range(NUM_CLASSES), (None, 30.0, 0.0, -15.0)):
        by_hand = []
        for kappa in range(3, 120, 3):
            zeroed = order(forget_class).first(kappa)
            with Mask.zeroing(graphs.graph, zeroed).applied_to(graphs.classifier):
                forget = split.forget(forget_class)
                score = 100 * (graphs.classifier(forget.images).argmax(1) == forget_class).float().mean().item()
                features = representation(graphs.classifier, graphs.samples.images)
            recall = ridge_recalls(features, graphs.labels, graphs.config.ridge)[forget_class]
            is_erased = target is None or recall - of_pixels[forget_class] < target
            by_hand.append(score < 60 and is_erased)
            if by_hand[-1]:
                break
        expected = 3 * len(by_hand) if by_hand[-1] else 120
        assert order(forget_class, erasure_target=target).forgotten_at(split.forget(forget_class)) == expected
        found.append(expected)
    by_class = [found[start : start + 4] for start in range(0, len(found), 4)]
    assert all(kappas == sorted(kappas) for kappas in by_class) and any(len(set(kappas)) > 2 for kappas in by_class)


@pytest.mark.parametrize("span", [(), (8.0,), (0.0, 1.0, 2.0), (3.0, 1.0), (-1.0, 2.0), (0.0, 2e9)])
def test_a_span_of_the_erasure_that_is_none_is_refused(span):
    with pytest.raises(ValueError, match=r"erasure must be null or \[low, high\], weights from 0, not \["):
        gcn_config(erasure=span)
    assert gcn_config(erasure=(2.0, 2.0)).erasure == (2.0, 2.0)


@pytest.mark.parametrize("change", [{"erasure": -0.1}, {"erasure": 2e9}, {"erasure_target": 2e9}])
def test_impossible_settings_of_the_erasure_are_refused(change):
    with pytest.raises(ValueError, match=f"{next(iter(change))} must be at"):
        masking_config(**change)
    assert masking_config(erasure_target=-3.0).erasure_target == -3.0


def test_random_labels_are_of_all_other_classes(split, monkeypatch):
    labels = []
    cross_entropy = F.cross_entropy
    monkeypatch.setattr(
        F, "cross_entropy", lambda logits, y, **_: labels.extend(y.tolist()) or cross_entropy(logits, y)
    )
    config = UnlearningSFTConfig(epochs=1, batch_size=10, learning_rate=0.1)
    UnlearningSFT(config, 0).unlearn(random_classifier(), split.forget(1), (1,))
    assert len(labels) == 20 and set(labels) == {0, 2}


def test_draws_are_averaged():
    graphs = graph_generator()
    one, three = zeroing_order(graphs), zeroing_order(graphs, draws=3)
    parts = []
    for draw in range(3):
        x, _ = graphs.class_graphs(graphs.draw(8, seeded("request", 0, 0, 0, draw)))
        parts.append(one.ranking.gcn(x, graphs.graph))
    assert torch.allclose(three.ranking.importance(0, NOTHING)[0], sum(parts) / 3, atol=1e-6)
    assert torch.equal(one.ranking.importance(0, NOTHING)[0], parts[0])
    assert torch.equal(three.ranking.most_needed(), (sum(parts) / 3)[0].topk(6).indices)


def test_sft_changes_the_masked_layer_only_and_learns_no_label_of_the_class(split):
    classifier = Trainer(TrainerConfig((6, 5), False, 20, 16, 0.01), 0).train(split, NUM_CLASSES)
    before = [layer.weight.detach().clone() for layer in classifier.layers]
    forget = split.forget(1)
    config = UnlearningSFTConfig(epochs=40, batch_size=10, learning_rate=0.1)
    score = (classifier(forget.images).argmax(1) == 1).float().mean()
    unlearned = UnlearningSFT(config, 0).unlearn(classifier, forget, (1,))
    assert (unlearned(forget.images).argmax(1) == 1).float().mean() < score / 2
    assert torch.equal(unlearned.layers[0].weight, before[0]) and torch.equal(unlearned.layers[2].weight, before[2])
    assert not torch.equal(unlearned.layers[1].weight, before[1])
