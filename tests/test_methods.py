"""The unlearning methods beyond those of eval.py against their definitions, on a small problem."""

import os
import re
import subprocess
import sys
from dataclasses import asdict, dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import NUM_CLASSES, TRACKED, copy_to, graph_config, random_split, scores, small_request, trainer_config
from running import PROJECT

from data import GraphGenerator
from eval import METHODS, Request, run_method
from experiment.config import load_config
from experiment.registry import Method
from methods import fine_tuning, projections, published
from methods.published import FEATURES, Published, importance, mean_importance, set_difference
from mimu.errors import InputError, TrainingError
from mimu.graph import MaskingGCN
from mimu.samples import Split, some_of_every_class
from mimu.seeds import seeded
from mimu.settings import Count, NonNegative, Positive
from mimu.training import descend
from trainer import Trainer

FORGET = 1
HYPERPARAMETERS = yaml.safe_load("""
  fine_tune: {epochs: 15, batch_size: 16, learning_rate: 0.1}
  neg_grad_plus: {epochs: 5, batch_size: 16, learning_rate: 0.01, retain_weight: 0.8}
  ssd: {selection: 1.2, dampening: 0.3}
  salun: {epochs: 10, batch_size: 16, learning_rate: 0.05, share: 0.5}
  scrub: {epochs: 6, batch_size: 16, learning_rate: 0.01, max_epochs: 3, divergence_weight: 0.5, label_weight: 0.99}
  cola: {epochs: 5, batch_size: 16, learning_rate: 0.03, temperature: 0.1, align_epochs: 5}
  eu_k: {epochs: 10, batch_size: 16, learning_rate: 0.02, layers: 2}
  optimised_mask: {steps: 70, samples: 60, learning_rate: 0.1, forget_weight: 1.0, sparsity: 0.1}
  delete: {epochs: 20, batch_size: 16, learning_rate: 0.003}
  damp: {samples: 40, ridge: 0.01, row: 1.0}
  erase: {samples: 60, group_size: 20, others_ratio: 2, steps: 30, learning_rate: 0.05, forget_weight: 1.0,
    erase_weight: 0.1, units: 16, ridge: 0.01, share: 0.5}
""")
CONFIG = Published(hidden=8, rounds=3, steps=5, learning_rate=0.01, samples=30, temperature=0.25, gumbel=0.2,
                   sufficiency=1.0, prior=0.1, draws=3)  # fmt: skip
TOP_K = 8


@pytest.fixture(scope="module")
def request_to_forget() -> Request:
    train, trainer = random_split(60), Trainer(trainer_config((12, 8), 4), 0)
    classifier = trainer.train(train, NUM_CLASSES)
    config = graph_config(features=("weight", "forgetting"), samples_per_class=40)
    graphs = GraphGenerator(classifier, train, config, 0)
    request = small_request(40, group_size=20, hyperparameters={"published": asdict(CONFIG)})
    return replace(request, original=classifier, trainer=trainer, train=train, graphs=graphs, top_k=TOP_K)


def unlearned(name: str, request: Request, **changes) -> torch.nn.Module:
    """The model of a method with its HYPERPARAMETERS, some of them changed."""
    values = HYPERPARAMETERS.get(name, {}) | changes
    return run_method(replace(request, config=replace(request.config, hyperparameters={name: values})), name).model


def test_every_method_is_described_and_configured():
    config = load_config(overrides=[f"eval.methods=[{', '.join(METHODS)}]"]).eval
    for name, method in METHODS.items():
        about, module = method.about(), method.unlearn.__module__
        assert set(config.hyperparameters.get(name, {})) == set(method.hyperparameters), name
        assert about["does"].endswith(".") and "\n" not in about["does"], name
        assert about["needs"] in ("nothing", "forget set", "retain set", "both sets")
        if module in ("methods.fine_tuning", "methods.projections"):
            assert "arXiv" in about["paper"] and method.runs_with == "all"


def test_the_baseline_that_the_readme_adds_is_described_and_configured(tmp_path):
    copy, readme = copy_to(tmp_path / "mimu", *TRACKED, "tests/*.py"), (PROJECT / "README.md").read_text()
    for path, example, indent, below in (
        ("eval.py", r"```python\n(@unlearning_method.*?\n)```", "", "@dataclass\nclass Eval:"),
        ("configs/config.yaml", r"`(noisy_magnitude: .*?)`", "    ", "    sft: {epochs"),
    ):
        text, lines = (copy / path).read_text(), f"{indent}{re.search(example, readme, re.DOTALL)[1].strip()}\n"
        assert text.count(below) == 1
        if lines not in text:  # a reader may have left it there
            (copy / path).write_text(text.replace(below, lines + below))
    command = "from test_methods import *; METHODS['noisy_magnitude']; test_every_method_is_described_and_configured()"
    paths = os.environ | {"PYTHONPATH": f"{copy}:{copy / 'tests'}"}
    done = subprocess.run([sys.executable, "-c", command], cwd=copy, env=paths, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@dataclass(frozen=True)
class Fading:
    rate: Positive
    rounds: Count


def test_fields_of_a_dataclass_and_keywords_are_hyperparameters(request_to_forget, monkeypatch):
    received = []

    def fading(request: Request, *, config: Fading, scale: NonNegative) -> torch.nn.Module:
        received.append((config, scale))
        return request.classifier

    monkeypatch.setitem(METHODS, "fading", Method(fading))
    assert METHODS["fading"].hyperparameters == {"rate": Positive, "rounds": Count, "scale": NonNegative}
    setting = "eval.hyperparameters.fading"
    values = {"rate": 0.1, "scale": 2.0, "rounds": 7}
    config = load_config(overrides=["eval.methods=[mimu, fading]", f"{setting}={values}"]).eval
    run_method(replace(request_to_forget, config=config), "fading")
    assert received == [(Fading(0.1, 7), 2.0)]
    for changes, message in (({"step": 1}, ".*step"), ({"rounds": 0}, ".rounds: .* or equal to 1, not 0$")):
        with pytest.raises(InputError, match=f": {setting}{message}"):
            load_config(overrides=["eval.methods=[mimu, fading]", f"{setting}={values | changes}"])


@pytest.mark.parametrize("name", [*HYPERPARAMETERS, "retrain", "retrain_again"])
def test_a_method_forgets_and_is_the_same_again_on_the_samples_that_it_declares(name, request_to_forget):
    """Samples of the set that a method does not need may be anything."""
    request, state, needs = request_to_forget, torch.get_rng_state(), METHODS[name].needs
    unused = request.train.labels == FORGET if needs == "retain set" else request.train.labels != FORGET
    spoiled = request.train.images.masked_fill(unused[:, None], torch.nan)
    again = request if needs == "both sets" else replace(request, train=Split(spoiled, request.train.labels))
    model = unlearned(name, request)
    forget, retain = scores(model, request.train, FORGET)
    before_forget, before_retain = scores(request.classifier, request.train, FORGET)
    assert forget < before_forget - 60
    # SSD costs the retained classes here, and other initial weights would take more epochs.
    assert retain > before_retain - 12 or name in ("ssd", "retrain_again")
    images = random_split(20, seed=4).images
    assert torch.equal(model(images), unlearned(name, again)(images))
    assert torch.equal(torch.get_rng_state(), state)


def test_ssd_dampens_the_weights_that_it_selects(request_to_forget):
    classifier = request_to_forget.classifier
    model = unlearned("ssd", request_to_forget, selection=2.0, dampening=2.5)
    splits = (request_to_forget.forget, request_to_forget.train)
    information = [fine_tuning.fisher_information(classifier, split) for split in splits]
    for before, after, on_forget, on_all in zip(classifier.weights, model.weights, *information):
        selected, factor = on_forget > 2 * on_all, 2.5 * on_all / on_forget
        assert torch.allclose(after, before * torch.where(selected, factor.clamp(max=1), 1.0), rtol=1e-5)
        assert 0 < (selected & (factor > 1)).sum() < selected.sum() < selected.numel(), "some would grow, and stay"


def test_salun_changes_its_share_of_the_weights(request_to_forget):
    classifier, forget = request_to_forget.classifier, request_to_forget.forget
    model = unlearned("salun", request_to_forget, share=0.25)
    loss = F.cross_entropy(classifier(forget.images), forget.labels)
    saliency = torch.cat([each.abs().flatten() for each in torch.autograd.grad(loss, classifier.weights)])
    changed = torch.cat([(a != b).flatten() for a, b in zip(model.weights, classifier.weights)])
    assert int(changed.sum()) == pytest.approx(0.25 * len(saliency), abs=2)
    assert saliency[changed].min() > saliency[~changed].max() * 0.999


def test_losses_are_those_of_their_definitions():
    student, teacher = torch.randn(2, 6, 4, generator=seeded("test"))
    p, q = teacher.softmax(1), student.softmax(1)
    assert fine_tuning.divergence(student, teacher) == pytest.approx((p * (p / q).log()).sum(1).mean().item(), rel=1e-5)
    z, labels, contrastive = torch.randn(6, 3, generator=seeded("test")).double(), [0, 0, 1, 0, 1, 2], 0.0
    for i, label in enumerate(labels):
        indices = [j for j in range(6) if j != i]
        log_p = (F.cosine_similarity(z[i], z[indices]) / 0.2).log_softmax(0)
        alike = [-each.item() for j, each in zip(indices, log_p) if labels[j] == label]
        contrastive += sum(alike) / max(1, len(alike)) / 6
    assert fine_tuning.contrastive_loss(z, torch.tensor(labels), 0.2).item() == pytest.approx(contrastive)


@pytest.mark.parametrize(
    "architecture, layers, trained", [("mlp", 1, "3."), ("vit", 2, "blocks.0.linear2. norm. head.")]
)
def test_eu_k_trains_the_last_layers_from_fresh_weights(request_to_forget, architecture, layers, trained):
    trainer = Trainer(trainer_config((6,), 1, architecture=architecture, channels=(8,), patch=4), 0, (8, 8))
    labels = request_to_forget.train.labels
    train = Split(torch.randn(len(labels), 64, generator=seeded("test")), labels)
    request = replace(request_to_forget, trainer=trainer, train=train, original=trainer.train(train, NUM_CLASSES))
    before = request.original.network.state_dict()
    after = unlearned("eu_k", request, layers=layers).network.state_dict()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == [name for name in before if name.startswith(tuple(trained.split()))]
    config, generator = fine_tuning.FineTuning(10, 16, 0.02), seeded("eu_k", request.seed, FORGET)
    fresh = trainer.initial(train.images, NUM_CLASSES)
    config.train(fresh, request.retain, generator, optimizer=torch.optim.Adam)
    assert torch.equal(unlearned("eu_k", request, layers=99)(train.images), fresh(train.images))


def test_a_step_of_delete_is_towards_the_originals_predictions_without_the_class(request_to_forget):
    classifier, forget = request_to_forget.classifier, request_to_forget.forget
    model = unlearned("delete", request_to_forget, epochs=1, batch_size=1000, learning_rate=0.3)
    logits = classifier(forget.images)
    p = logits.detach().softmax(1)
    p[:, FORGET] = 0
    (-(p / p.sum(1, keepdim=True) * logits.log_softmax(1)).sum(1).mean()).backward()
    for before, after in zip(classifier.weights, model.weights):
        assert torch.allclose(after, before - 0.3 * before.grad, atol=1e-6)


def test_damp_removes_what_no_retained_mean_spans_more_in_deeper_layers(request_to_forget):
    request, network = request_to_forget, request_to_forget.classifier.network
    chosen = some_of_every_class(request.train, 40, "damp", request.seed, FORGET)
    models = request.original, *(unlearned("damp", request, row=row) for row in (0.5, 1.0))
    before, halved_row, whole_row = ([w.detach().double().numpy() for w in model.weights] for model in models)
    assert np.array_equal(halved_row[2][FORGET], 0.5 * whole_row[2][FORGET])
    halved_row[2][FORGET] = whole_row[2][FORGET]
    for index, (w, after) in enumerate(zip(before, whole_row)):
        inputs = network[: 2 * index + 1](chosen.images).detach().double()
        forget, *retained = (inputs[chosen.labels == label] for label in (FORGET, 0, 2))
        mean, means = forget.mean(0).numpy(), np.stack([each.mean(0).numpy() for each in retained], 1)
        r = mean - means @ np.linalg.lstsq(means, mean, rcond=None)[0]
        q = r / np.linalg.norm(r)
        alpha = projections.separability(forget, torch.cat(retained)[::2], 0.01).item()
        assert 0.5 < alpha <= 1
        assert np.allclose(after, w - index / 2 * alpha * np.outer(w @ q, q), atol=1e-6)
        assert np.array_equal(after, halved_row[index]) and np.array_equal(after, w) == (index == 0)


def test_the_probe_of_damp_scores_held_out_samples():
    forget = torch.ones(20, 3, dtype=torch.float64)
    retained = -forget.clone()
    assert projections.separability(forget, retained, 0.01) == 1 and projections.separability(forget, forget, 0.01) == 0
    forget[[1, 5, 9]] *= -1  # every second sample is held out: 4 of the 20 are on the wrong side
    retained[7] *= -1
    assert projections.separability(forget, retained, 0.01) == pytest.approx(2 * 16 / 20 - 1)


def test_the_optimised_mask_is_a_mask_and_its_sparsity_counts(request_to_forget):
    whole = request_to_forget.classifier.weights[1]
    models = (unlearned("optimised_mask", request_to_forget, sparsity=sparsity) for sparsity in (0.1, 3.0))
    dense, sparse = (model.weights[1] for model in models)
    assert torch.equal(dense[dense != 0], whole[dense != 0])
    assert 0 <= (sparse == 0).sum() < (dense == 0).sum() < whole.numel()


def test_controls_do_what_they_say(request_to_forget):
    request, images = request_to_forget, request_to_forget.train.images
    by_size = request.original.weights[1].detach().abs().flatten()
    zeroed = (unlearned("magnitude", request).weights[1].flatten() == 0).nonzero()[:, 0]
    assert set(zeroed.tolist()) == set(by_size.topk(40).indices.tolist())
    kept = METHODS["magnitude"].most_needed(request)
    assert set(kept.tolist()) == set(by_size.topk(TOP_K).indices.tolist())
    without_row = unlearned("output_row", request)
    logits, before = without_row(images), request.classifier(images)
    assert (logits[:, FORGET] == 0).all() and torch.equal(logits[:, [0, 2]], before[:, [0, 2]])
    assert [int((weight == 0).sum()) for weight in without_row.weights] == [0, 0, 8]
    p = unlearned("logit_removed", request)(images).softmax(1)
    assert (p[:, FORGET] == 0).all() and torch.allclose(p.sum(1), torch.ones(len(p)))
    assert not torch.equal(*(unlearned(name, request).weights[0] for name in ("retrain", "retrain_again")))


@pytest.mark.parametrize("name, setting", [("scrub", {"learning_rate": 1e30}), ("optimised_mask", {"sparsity": 1e39})])
def test_a_method_that_diverges_stops_with_its_loss_and_step(request_to_forget, name, setting):
    with pytest.raises(TrainingError, match=r"loss.* is -?(nan|inf) at step \d+: training diverged, see eval.hyperp"):
        unlearned(name, request_to_forget, **setting)


def test_the_set_difference_ranks_by_brute_force():
    logits = torch.randn(4, 30, generator=seeded("test"))
    top = [set(row.topk(8).indices.tolist()) for row in logits]
    order = set_difference(logits, 8).argsort(1, descending=True)
    for label in range(4):
        retained = [each for each in range(4) if each != label]
        exclusive = top[label].difference(*(top[each] for each in retained))
        contrast = logits[label] - logits[retained].mean(0)
        first = sorted(exclusive, key=lambda v: -logits[label, v])
        assert order[label].tolist() == first + sorted(set(range(30)) - exclusive, key=lambda v: -contrast[v])


def test_both_published_terms_reach_the_gcn_and_sufficiency_keeps_the_top_weights(request_to_forget):
    graphs, gcn = request_to_forget.graphs, MaskingGCN(len(FEATURES), 8, 3)
    gcn.readout = torch.nn.Linear(8, 1, bias=False)
    single = graphs.draw(1, seeded("test"))
    logits = importance(gcn, graphs, single)
    for row, sample in enumerate(single.flatten().tolist()):
        snapshot = graphs.snapshot(torch.tensor([[sample]]), 0, features=FEATURES, forgets=False)
        x = replace(snapshot, config=graph_config(features=FEATURES, other_classes=False)).class_graph()
        by_itself = torch.cat([gcn.readout(part)[0].flatten() for part in gcn.hidden(x, graphs.graph)])
        assert torch.allclose(logits[row], by_itself, atol=1e-5)
    w = graphs.weights()[0].flatten()
    p, prior = (w.abs() + 1e-12) / (w.abs() + 1e-12).sum(), published.prior_divergence(logits, w).mean()
    by_hand = F.kl_div(p.log().expand_as(logits), logits.log_softmax(1), reduction="batchmean", log_target=True)
    assert torch.allclose(prior, by_hand, rtol=1e-5)
    sufficiency = published.insufficiency(logits, request_to_forget, CONFIG, seeded("noise"))
    for term in (sufficiency, prior):
        for gradient in torch.autograd.grad(term, list(gcn.parameters()), retain_graph=True):
            assert gradient.isfinite().all() and gradient.any()
    generator, losses = seeded("noise"), []
    gumbel = -torch.empty(logits.shape).exponential_(generator=generator).log()
    for label, samples in enumerate(graphs.draw(10, generator)):
        kept = (logits[label] / logits[label].std() + 0.2 * gumbel[label]).topk(TOP_K).indices
        with graphs.graph.keeping(kept).applied_to(graphs.classifier):
            masked = graphs.classifier(graphs.samples.images[samples])
        losses.append(F.cross_entropy(masked, torch.full((10,), label)))
    assert torch.allclose(sufficiency, torch.stack(losses).mean(), rtol=1e-4)


def test_the_published_gcn_is_trained_once_for_a_classifier(request_to_forget, monkeypatch):
    steps = []
    monkeypatch.setattr(published, "descend", lambda *arguments: steps.append(arguments) or descend(*arguments))
    request = replace(request_to_forget, requested_kappa="auto", kept={}, prunings={})
    mask = run_method(request, "published").mask
    logits = mean_importance(request, CONFIG)
    order = set_difference(logits, TOP_K)[FORGET].argsort(descending=True)[: mask.num_zeroed]
    assert set(order.tolist()) == set(mask.vertices().tolist())
    needed = METHODS["published"].most_needed(request)
    assert needed.tolist() == logits[FORGET].topk(TOP_K).indices.tolist() and len(steps) == CONFIG.steps
    with pytest.raises(TrainingError, match="prior is (nan|inf) at step 0: .* see eval.hyperparameters.published"):
        mean_importance(replace(request, kept={}), replace(CONFIG, prior=float("inf")))
