"""The published objective: its terms by brute force, their gradients, and a GCN that is trained once."""

from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from conftest import graph_config, small_request

from mimu.data import seeded
from mimu.eval import METHODS, Request, answer
from mimu.methods import published
from mimu.methods.published import FEATURES, Published, ScoringGCN, importance, mean_importance, set_difference
from mimu.trainer import TrainingError

FORGET, TOP_K = 1, 8
CONFIG = Published(hidden=8, rounds=3, steps=5, learning_rate=0.01, samples=30, temperature=0.25, gumbel=0.2,
                   sufficiency=1.0, prior=0.1, draws=3)  # fmt: skip


@pytest.fixture
def request_to_forget() -> Request:
    return small_request(methods=("mimu", "published"), hyperparameters={"published": asdict(CONFIG)})


def test_the_set_difference_ranks_by_brute_force():
    scores = torch.randn(4, 30, generator=seeded("test"))
    top = [set(row.topk(8).indices.tolist()) for row in scores]
    order = set_difference(scores, 8).argsort(1, descending=True)
    for d in range(4):
        others = [c for c in range(4) if c != d]
        only_here = top[d].difference(*(top[c] for c in others))
        contrast = scores[d] - scores[others].mean(0)
        first = sorted(only_here, key=lambda v: -scores[d, v])
        assert order[d].tolist() == first + sorted(set(range(30)) - only_here, key=lambda v: -contrast[v])


def test_both_terms_reach_the_gcn_and_sufficiency_is_of_the_kept_weights(request_to_forget):
    graphs, gcn = request_to_forget.graphs, ScoringGCN(len(FEATURES), 8, 3)
    single = graphs.draw(1, seeded("test"))
    logits = importance(gcn, graphs, single)
    for row, sample in enumerate(single.flatten().tolist()):
        snapshot = graphs.snapshot(torch.tensor([[sample]]), FEATURES)
        of_graph = replace(snapshot, config=graph_config(features=FEATURES, other_classes=False)).class_graph(0)
        assert torch.allclose(logits[row], gcn(of_graph, graphs.graph)[0], atol=1e-5)
    term = published.insufficiency(logits, graphs, CONFIG, TOP_K, seeded("noise"))
    weights = list(gcn.parameters())
    w = graphs.weights()[0].flatten()
    p, prior = (w.abs() + 1e-12) / (w.abs() + 1e-12).sum(), published.prior_divergence(logits, w).mean()
    by_hand = F.kl_div(p.log().expand_as(logits), logits.log_softmax(1), reduction="batchmean", log_target=True)
    assert torch.allclose(prior, by_hand, rtol=1e-5)
    for value in (term, prior):
        for gradient in torch.autograd.grad(value, weights, retain_graph=True):
            assert gradient.isfinite().all() and gradient.any()
    generator, losses = seeded("noise"), []
    gumbel = -torch.empty(logits.shape).exponential_(generator=generator).log()
    for label, samples in enumerate(graphs.draw(10, generator)):
        kept = (logits[label] / logits[label].std() + 0.2 * gumbel[label]).topk(TOP_K).indices
        with graphs.graph.keeping(kept).applied_to(graphs.classifier):
            masked = graphs.classifier(graphs.samples.images[samples])
        losses.append(F.cross_entropy(masked, torch.full((10,), label)))
    assert torch.allclose(term, torch.stack(losses).mean(), rtol=1e-4)


@pytest.mark.parametrize("asked", [9, "auto"])
def test_the_gcn_is_trained_once_for_a_classifier_and_taken_from_its_checkpoint(request_to_forget, asked):
    asked_for, files = [], {}

    def checkpoint(name, settings, make):
        asked_for.append((name, settings))
        if name not in files:
            files[name] = make()
        return files[name]

    first = replace(request_to_forget, asked=asked, checkpoint=checkpoint)
    found = answer(first, "published").mask
    assert asked_for == [("published", asdict(CONFIG) | {"top_k": TOP_K})]
    scores = mean_importance(first, CONFIG)
    order = set_difference(scores, TOP_K)[FORGET].argsort(descending=True)[: found.num_zeroed]
    assert set(order.tolist()) == set(found.vertices().tolist())
    needed = METHODS["published"].most_needed(first)
    assert needed.tolist() == scores[FORGET].topk(TOP_K).indices.tolist() and len(asked_for) == 1
    files["published"]["state_dict"] = {name: 2 * weight for name, weight in first.kept["published"].items()}
    assert not torch.allclose(mean_importance(replace(first, kept={}), CONFIG), scores), "what the file holds"
    with pytest.raises(TrainingError, match="loss is (nan|inf) at step 0: .* see eval.hyperparameters.published"):
        mean_importance(replace(request_to_forget, kept={}), replace(CONFIG, prior=float("inf")))
