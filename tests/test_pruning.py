"""The generator that answers a request, where it stops, and the checkpoint of a masking GCN."""

from dataclasses import asdict, replace
from itertools import islice

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import NUM_CLASSES, graph_generator, pruning_config, random_split, trainer_config, untrained_gcn
from scipy.stats import norm
from torch import Tensor
from torch.nn.utils import parametrize

from data import GraphGenerator
from mimu.errors import ArtifactError, InputError
from mimu.files import save
from mimu.hooked import HookedClassifier
from mimu.pretrained import TrainedGCN
from mimu.pruning import Pruning, RemainingCounter, choose_kappa, prune
from mimu.saliency import ActivationGraphs, Snapshot, ranked, saliency
from mimu.samples import Split
from mimu.seeds import seeded
from trainer import Trainer

RETAIN_WEIGHT = 5.0


def masked_logits(graphs: ActivationGraphs, samples: Split, vertices: Tensor) -> Tensor:
    with graphs.graph.zeroing(vertices).applied_to(graphs.classifier), torch.no_grad():
        return graphs.classifier(samples.images).double()


def percent_remaining(graphs: ActivationGraphs, samples: Split, vertices: Tensor, target: float) -> float:
    """By hand: with few samples, at least what a normal distribution of margins gives."""
    logits, label, count = masked_logits(graphs, samples, vertices).numpy(), int(samples.labels[0]), len(samples.labels)
    percent, margins = 100 * (logits.argmax(1) == label).mean(), logits[:, label] - np.delete(logits, label, 1).max(1)
    if count < 100 / target:
        rows = zip(graphs.predictions.numpy(), graphs.labels.tolist())
        spread = np.std([row[own] - np.delete(row, own).max() for row, own in rows], ddof=1)
        squares, prior = np.square(margins - margins.mean()).sum(), 4 if count < 100 else 0
        variance = (squares + prior * spread**2) / (count - 1 + prior) * (1 + (prior > 0) / count)
        percent = max(percent, 100 * norm.sf(0, margins.mean(), np.sqrt(variance)))
    return percent


@pytest.fixture(scope="module")
def problem() -> tuple[Split, GraphGenerator]:
    split = random_split(110)
    classifier = Trainer(trainer_config((16, 12), 15, 32), 0).train(split, NUM_CLASSES)
    return split, GraphGenerator(classifier, split, graph_generator().config, 0)


@pytest.mark.parametrize("mask_layer", [-2, None])
@pytest.mark.parametrize("is_adapted, changes", [(False, {}), (True, {"step": 0.1}), (True, {"momentum": 0.6})])
def test_a_step_takes_the_highest_mean_scores_on_the_classifier_masked_so_far(mask_layer, is_adapted, changes):
    graphs, config = graph_generator(mask_layer), pruning_config(**changes)
    gcn = untrained_gcn(graphs.config.num_features) if is_adapted else None
    if is_adapted:
        gcn.readout.weight.data.normal_(generator=seeded("readout"))
    size, zeroed, mean = graphs.graph.num_vertices, graphs.nothing, None
    stride = round(0.1 * size) if "step" in changes else 4
    features = graphs.config.features if is_adapted else ()
    for number, step in enumerate(islice(prune(graphs, 2, config, 0, gcn), 3)):
        samples = graphs.draw(8, seeded("request", 0, 2, number))
        scores = saliency(graphs.snapshot(samples, 2, zeroed, features), RETAIN_WEIGHT, gcn).detach()
        assert torch.equal(step.scores, scores)
        scores = scores / scores.std()
        mean = scores if mean is None else config.momentum * mean + (1 - config.momentum) * scores
        zeroed = torch.cat([zeroed, ranked(mean, zeroed, stride)])
        assert torch.equal(step.vertices, zeroed)
    steps = [*prune(graphs, 2, config, 0, gcn)]
    assert sorted(steps[-1].vertices.tolist()) == list(range(size)), "it ends when all is zeroed"
    seconds = [step.seconds for step in steps]
    assert seconds == sorted(set(seconds)), "of all steps up to there"
    with pytest.raises(InputError, match="scores of weights are not finite: look at the inputs, the weights and"):
        next(prune(graphs, 2, config, 0, ranking=lambda *_: torch.full((size,), torch.nan)))


@pytest.mark.parametrize("every, taken", [(None, [0]), (1, [0, 4, 8, 12, 16]), (2, [0, 8, 16])])
def test_between_two_snapshots_no_sample_is_run_and_first_order_updates_say_what_zeros_do(monkeypatch, every, taken):
    graphs, passes, record = graph_generator(), [], HookedClassifier.record

    def recorded(classifier, images, labels, layers, excluded, weights):
        passes.append(int((weights[classifier.names[layers[0]]] == 0).sum()))
        return record(classifier, images, labels, layers, excluded, weights)

    monkeypatch.setattr(HookedClassifier, "record", recorded)
    zeroed = [*islice(prune(graphs, 2, pruning_config(snapshot_every=every), 0), 5)][-1].vertices
    assert passes[::2] == passes[1::2] == taken, "the class, and the others"
    last = taken[-1]
    samples, mask = graphs.draw(8, seeded("request", 0, 2, last // 4)), zeroed[:last]
    snapshot = graphs.snapshot(samples, 2, mask).first_order_update(zeroed[last:16])
    assert torch.equal(zeroed[16:], ranked(saliency(snapshot, RETAIN_WEIGHT), zeroed[:16], 4))


def test_the_damage_penalty_falls_only_if_the_class_stalls_and_is_not_forgotten(monkeypatch):
    graphs, penalty = graph_generator(), 1.0
    snapshot = graphs.snapshot(graphs.by_class, 0)
    # The class's mean -log(1 - p) from step to step; forgetting stalls if it has not halved.
    course = ((4, False), (1.9, False), (1.5, True), (1.6, True), (0.05, False), (0.09, False), (0.2, True))
    losses = iter(course)

    def first_order_update(*_) -> Snapshot:
        log_odds = np.log(np.expm1(next(losses)[0]))
        return replace(snapshot, log_odds=(torch.full_like(snapshot.log_odds[0], log_odds), snapshot.log_odds[1]))

    monkeypatch.setattr(ActivationGraphs, "snapshot", first_order_update)
    monkeypatch.setattr(Snapshot, "first_order_update", first_order_update)
    steps = prune(graphs, 0, pruning_config(penalty_growth=2.0, target=10.0, step=1), 0)
    for (loss, is_stalled), step in zip(course, steps):
        penalty /= 2 if is_stalled else 1
        expected = saliency(snapshot, penalty * RETAIN_WEIGHT)
        assert torch.allclose(step.scores, expected, rtol=1e-5, atol=1e-7), loss
    assert penalty == 1 / 8


def test_measured_steps_zero_what_the_class_loses_most_by_for_what_the_retained_classes_lose():
    graphs, zeroed = graph_generator([0, 1], scope="measured"), []
    few = graphs.samples[graphs.by_class[:, :10].flatten()]
    is_forget = few.labels == 2

    def losses(zeroed: list[int]) -> tuple[float, float]:
        logits = masked_logits(graphs, few, torch.tensor(zeroed, dtype=torch.long))
        retain = F.cross_entropy(logits[~is_forget], few.labels[~is_forget])
        return -(1 - logits.softmax(1)[is_forget, 2]).log().mean().item(), retain.item()

    for step in islice(prune(graphs, 2, pruning_config(step=6, group_size=10), 0), 9):
        before, tried = losses(zeroed), []
        for layer, share in ((range(42), 4), (range(42, 72), 2)):  # of 6, in proportion to their sizes
            free = [v for v in layer if v not in zeroed]
            new = sorted(free, key=lambda v: -step.scores[v])[:share]
            forget, retain = (now - then for now, then in zip(losses(zeroed + new), before))
            tried.append(((forget < 0, -forget / max(retain, 1e-3) if forget < 0 else -retain), new))
        zeroed += max(tried)[1]
        assert step.vertices.tolist() == zeroed


@pytest.mark.parametrize("step, target, samples", [(5, 0.9, 110), (None, 20.0, 60), (3, 4.1, 24), (3, 45.0, 1)])
@pytest.mark.parametrize("class_index", range(NUM_CLASSES))
def test_auto_is_the_smallest_kappa_of_whole_steps_that_forgets(problem, step, target, samples, class_index):
    (split, graphs), stride = problem, step or 1
    forget, retain = split.forget(class_index)[:samples], split.retain(class_index)
    config = pruning_config(step=step, group_size=15, target=target, max_kappa=150)
    counter = RemainingCounter(graphs, class_index, forget, target)
    request = Pruning(prune(graphs, class_index, config, 0, counter=counter), counter, config)
    result = request.chosen()
    kappas = (kappa for kappa in range(stride, 150, stride))
    kappa = next(k for k in kappas if percent_remaining(graphs, forget, request.at(k).vertices, target) < target)
    assert len(result.vertices) == kappa and result.message == ""
    again = request.at(kappa)
    assert torch.equal(result.vertices, again.vertices) and result.seconds > again.seconds > 0 and again.message is None
    assert request.chosen() is result, "it is searched for once"
    correct = masked_logits(graphs, retain, result.vertices).argmax(1) == retain.labels
    assert step is None or correct.double().mean() > 0.9
    at_once = next(request.steps()).scores.argsort(descending=True)[:kappa]
    assert torch.equal(result.vertices, at_once) or step is not None
    assert not any(map(parametrize.is_parametrized, graphs.classifier.modules()))


def test_classes_taken_for_one_have_one_probability_and_each_sample_is_counted_by_its_own_label(problem):
    split, graphs = problem
    together = replace(split, labels=split.labels.masked_fill(split.labels == 2, 0))
    merged = ActivationGraphs(graphs.classifier.merging([0, 2]), together, graphs.config, 0)
    p = masked_logits(graphs, merged.samples, graphs.nothing).softmax(1)
    p = torch.stack([p[:, 0] + p[:, 2], p[:, 1], torch.zeros(len(p))], 1)
    assert torch.allclose(merged.predictions.softmax(1).double(), p, atol=1e-6)
    odds = merged.snapshot(merged.by_class, 0).log_odds[0].double()
    assert torch.allclose(odds, (p[:, 0] / p[:, 1]).log()[merged.by_class[0]], atol=1e-4)
    own, few = split.retain(1), torch.arange(100)
    remaining = masked_logits(graphs, own, few).argmax(1) == own.labels
    percent = RemainingCounter(merged, 0, own, 1.0).percent_remaining(few)
    assert percent == pytest.approx(100 * remaining.double().mean().item()) and 0 < percent < 100


@pytest.mark.parametrize("num_zeroed, target, kappa", [(0, 101, 4), (0, 1e-9, 20), (5, 1e-9, 25), (28, 1e-9, 30)])
def test_auto_ends_where_the_class_is_forgotten_or_at_the_largest_kappa(num_zeroed, target, kappa):
    graphs, config = graph_generator(), pruning_config(target=target)
    images = graphs.samples.images
    forget = Split(images, graphs.classifier(images).argmax(1)).forget(0)
    counter = RemainingCounter(graphs, 0, forget, target)
    steps = prune(graphs, 0, config, 0, zeroed=torch.arange(num_zeroed), counter=counter)
    *results, last = choose_kappa(steps, counter, config, num_zeroed)
    assert last.vertices[:num_zeroed].tolist() == list(range(num_zeroed)) and len(last.vertices) == kappa
    percent = percent_remaining(graphs, forget, last.vertices, target)
    assert last.message == ("" if target > 100 else f"{percent:.1f} % of class 0 remains")
    assert {result.message for result in results} <= {None}


def test_a_trained_gcn_comes_back_with_its_features_and_settings_and_another_file_is_named(tmp_path, trained_gcn):
    path, weights = tmp_path / "gcn.pt", trained_gcn.gcn.state_dict()
    config = {"graphs": asdict(trained_gcn.graphs), "eval": asdict(trained_gcn.pruning) | {"visualize": False}}
    config["gcn"] = {"hidden": 8, "rounds": 2, "message_passing": True, "steps": 3}
    smaller = config | {"gcn": config["gcn"] | {"hidden": 7}}
    with pytest.raises(ArtifactError, match="gcn.pt: cannot be read"):
        TrainedGCN.load(path)
    refused = (weights, smaller, "size mismatch"), (weights, {}, "")
    for state, settings, why in refused:
        save(path, {"state_dict": state, "config": settings, "seed": 0})
        with pytest.raises(ArtifactError, match=f"gcn.pt: is not the checkpoint of a masking GCN .*{why}"):
            TrainedGCN.load(path)
    save(path, {"state_dict": weights, "config": config, "seed": 0})
    loaded = TrainedGCN.load(path)
    assert all(torch.equal(loaded.gcn.state_dict()[name], weight) for name, weight in weights.items())
    assert loaded.graphs == trained_gcn.graphs and loaded.pruning == trained_gcn.pruning
