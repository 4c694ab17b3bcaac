"""The methods beyond the published system against their definitions, on a small problem."""

from dataclasses import asdict, dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import NUM_CLASSES, graph_config, pruning_config, random_split, scores, small_request, trainer_config
from running import PROJECT

import data
from data import GraphGenerator
from eval import METHODS, EvalConfig, Method, Request, answer
from experiment.config import load_config
from experiment.settings import ConfigError, converted
from methods import fine_tuning, projections, published
from methods.published import FEATURES, Published, importance, mean_importance, set_difference
from mimu.errors import TrainingError
from mimu.graph import MaskingGCN
from mimu.masks import Mask
from mimu.pruning import PruningResult
from mimu.samples import Split, some_of_every_class
from mimu.settings import Count, NonNegative, Positive
from mimu.training import descend
from model import HookedMNISTClassifier
from trainer import Trained, Trainer

FORGET = 1
PUBLISHED = "methods.fine_tuning", "methods.projections"
# What they take on so small a problem.
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


def make_request(mask_layer=-2, requested_kappa: int | None = None) -> Request:
    train = random_split(60)
    trainer = Trainer(trainer_config((12, 8), 4), 0)
    classifier = trainer.train(train, NUM_CLASSES)
    described = graph_config(mask_layer, features=("weight", "forgetting"), samples_per_class=40)
    graphs = GraphGenerator(classifier, train, described, 0)
    masking = asdict(pruning_config(group_size=20, max_kappa=0.9))
    config = EvalConfig(**masking, methods=None, visualize=False, hyperparameters={})
    return Request(config, classifier, trainer, train, graphs, None, FORGET, 24, 0, requested_kappa)


@pytest.fixture(scope="module")
def request_to_forget() -> Request:
    return make_request()


def answered_by(name: str, request: Request, **changes) -> torch.nn.Module:
    method = METHODS[name]
    found = method.unlearn(request, **method.arguments(HYPERPARAMETERS.get(name, {}) | changes))
    found = request.graphs.graph.zeroing(found.vertices) if isinstance(found, PruningResult) else found
    if not isinstance(found, Mask):
        return found.model if isinstance(found, Trained) else found
    model = request.classifier
    found.apply(model)
    return model


def test_every_method_says_what_it_is_and_has_its_hyperparameters_in_the_config():
    written = yaml.safe_load((PROJECT / "configs" / "methods.yaml").read_text())["eval"]["hyperparameters"]
    further = {name: each for name, each in METHODS.items() if each.unlearn.__module__.startswith("methods.")}
    tunable = {name for name, each in further.items() if each.hyperparameters}
    assert set(written) | {"erase"} == tunable == {*HYPERPARAMETERS, "published"}
    for name, values in written.items():
        parameters = further[name].hyperparameters
        assert list(values) == list(parameters)
        assert values == {key: converted(value, parameters[key].annotation) for key, value in values.items()}
    assert [name for name in further if further[name].runs_with == "default"] == ["saliency", "magnitude"]
    for name, method in METHODS.items():
        about = method.about()
        assert about["does"].endswith(".") and "\n" not in about["does"], name
        assert about["needs"] in ("nothing", "forget set", "retain set", "both sets")
        assert "arXiv" in about["paper"] or method.unlearn.__module__ not in PUBLISHED


@dataclass(frozen=True)
class Fading:
    rate: Positive
    rounds: Count


def test_fields_of_a_dataclass_and_keywords_are_hyperparameters(request_to_forget, monkeypatch):
    given = []

    def fading(request: Request, *, config: Fading, scale: NonNegative) -> torch.nn.Module:
        given.append((config, scale))
        return request.classifier

    monkeypatch.setitem(METHODS, "fading", Method(fading))
    hints = {name: each.annotation for name, each in METHODS["fading"].hyperparameters.items()}
    assert hints == {"rate": Positive, "rounds": Count, "scale": NonNegative}
    setting = "eval.hyperparameters.fading"
    values = {"rate": 0.1, "scale": 2.0, "rounds": 7}
    config = load_config(overrides=["eval.methods=[mimu, fading]", f"{setting}={values}"]).eval
    answer(replace(request_to_forget, config=config), "fading")
    assert given == [(Fading(0.1, 7), 2.0)]
    for values, message in (
        ({"rate": 0.1, "scale": 2.0, "step": 1}, " must have values of .*, not of rate, scale, step$"),
        ({"rate": 0.1, "scale": 2.0, "rounds": 0}, ".rounds must be an integer, at least 1, not 0$"),
    ):
        with pytest.raises(ConfigError, match=f": {setting}{message}"):
            load_config(overrides=["eval.methods=[mimu, fading]", f"{setting}={values}"])


@pytest.mark.parametrize("name", [*HYPERPARAMETERS, "retrain", "retrain_again"])
def test_a_method_forgets_and_is_the_same_again_on_the_samples_that_it_declares(name, request_to_forget):
    """Samples of the set that a method does not need may be anything."""
    request, state, needs = replace(request_to_forget, requested_kappa=40), torch.get_rng_state(), METHODS[name].needs
    unused = request.train.labels == FORGET if needs == "retain set" else request.train.labels != FORGET
    spoiled = request.train.images.masked_fill(unused[:, None], torch.nan)
    again = request if needs == "both sets" else replace(request, train=Split(spoiled, request.train.labels))
    model = answered_by(name, request)
    forget, retain = scores(model, request.train, FORGET)
    before_forget, before_retain = scores(request.classifier, request.train, FORGET)
    assert forget < before_forget - 60
    # One takes the rest along here, one starts where more epochs are needed.
    assert retain > before_retain - 12 or name in ("ssd", "retrain_again")
    images = random_split(20, seed=4).images
    assert torch.equal(model(images), answered_by(name, again)(images))
    assert torch.equal(torch.get_rng_state(), state)


def gradients(classifier: HookedMNISTClassifier, samples: Split) -> list[torch.Tensor]:
    loss = F.cross_entropy(classifier(samples.images), samples.labels)
    return list(torch.autograd.grad(loss, classifier.weights))


def test_ssd_dampens_the_weights_that_it_selects(request_to_forget):
    classifier = request_to_forget.classifier
    model = answered_by("ssd", request_to_forget, selection=2.0, dampening=2.5)
    splits = (request_to_forget.forget, request_to_forget.train)
    information = [fine_tuning.fisher_information(classifier, split) for split in splits]
    for before, after, f, e in zip(classifier.weights, model.weights, *information):
        selected, factor = f > 2 * e, 2.5 * e / f
        dampened = before * torch.where(selected, factor.clamp(max=1), 1.0)
        assert torch.allclose(after, dampened, rtol=1e-5)
        assert 0 < (selected & (factor > 1)).sum() < selected.sum() < f.numel(), "some would grow, and stay"


def test_salun_changes_its_share_of_the_weights(request_to_forget):
    model, classifier = answered_by("salun", request_to_forget, share=0.25), request_to_forget.classifier
    saliency = torch.cat([each.abs().flatten() for each in gradients(classifier, request_to_forget.forget)])
    changed = torch.cat([(a != b).flatten() for a, b in zip(model.weights, classifier.weights)])
    assert int(changed.sum()) == pytest.approx(0.25 * len(saliency), abs=2)
    assert saliency[changed].min() > saliency[~changed].max() * 0.999


def test_the_divergence_is_that_of_two_softmaxes():
    student, teacher = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    p, q = teacher.softmax(1), student.softmax(1)
    expected = (p * (p / q).log()).sum(1).mean().item()
    assert fine_tuning.divergence(student, teacher) == pytest.approx(expected, rel=1e-5)


def test_the_contrastive_loss_draws_samples_of_a_class_together():
    z, labels, expected = torch.randn(6, 3, generator=data.seeded("test")).double(), [0, 0, 1, 0, 1, 2], 0.0
    for i, own in enumerate(labels):
        others = [j for j in range(6) if j != i]
        log_p = (F.cosine_similarity(z[i], z[others]) / 0.2).log_softmax(0)
        alike = [-each.item() for j, each in zip(others, log_p) if labels[j] == own]
        expected += sum(alike) / max(1, len(alike)) / 6
    assert fine_tuning.contrastive_loss(z, torch.tensor(labels), 0.2).item() == pytest.approx(expected)


LAST = [("mlp", (4,), 1, "3."), ("resnet", (4, 6), 1, "9."), ("vit", (8,), 2, "blocks.0.linear2. norm. head.")]


@pytest.mark.parametrize("architecture, channels, layers, trained", LAST)
def test_the_last_layers_are_trained_from_fresh_weights(request_to_forget, architecture, channels, layers, trained):
    trainer = Trainer(trainer_config((6,), 1, architecture=architecture, channels=channels, patch=4), 0, (8, 8))
    train = Split(torch.randn(180, 64, generator=data.seeded("test")), request_to_forget.train.labels)
    request = replace(request_to_forget, trainer=trainer, train=train, original=trainer.train(train, NUM_CLASSES))
    before, after = (
        request.original.network.state_dict(),
        answered_by("eu_k", request, layers=layers).network.state_dict(),
    )
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == [name for name in before if name.startswith(tuple(trained.split()))]
    config, draws = fine_tuning.FineTuning(10, 16, 0.02), fine_tuning.draws(request, "eu_k")
    fresh = config.train(trainer.initial(train.images, NUM_CLASSES), request.retain, draws, torch.optim.Adam)
    assert torch.equal(answered_by("eu_k", request, layers=99)(train.images), fresh(train.images))


def test_a_step_of_delete_is_towards_the_originals_predictions_without_the_class(request_to_forget):
    classifier, forget = request_to_forget.classifier, request_to_forget.forget
    model = answered_by("delete", request_to_forget, epochs=1, batch_size=1000, learning_rate=0.3)
    logits = classifier(forget.images)
    p = logits.detach().softmax(1)
    p[:, FORGET] = 0
    (-(p / p.sum(1, keepdim=True) * logits.log_softmax(1)).sum(1).mean()).backward()
    for before, after in zip(classifier.weights, model.weights):
        assert torch.allclose(after, before - 0.3 * before.grad, atol=1e-6)


def inputs_of_layers(classifier: HookedMNISTClassifier, images: torch.Tensor) -> list[np.ndarray]:
    ends = 1, 3, 5
    return [classifier.network[:end](images).detach().double().numpy() for end in ends]


def weights_of(model: HookedMNISTClassifier) -> list[np.ndarray]:
    return [weight.detach().double().numpy() for weight in model.weights]


def test_damp_takes_what_no_other_mean_has_of_the_mean_more_in_deep_layers(request_to_forget):
    classifier = request_to_forget.classifier
    chosen = some_of_every_class(request_to_forget.train, 40, "damp", request_to_forget.seed, FORGET)
    changed, kept = (weights_of(answered_by("damp", request_to_forget, row=row)) for row in (0.25, 1.0))
    assert np.array_equal(changed[2][FORGET], np.float32(0.25) * kept[2][FORGET].astype("f4"))
    changed[2][FORGET] = kept[2][FORGET]
    inputs = inputs_of_layers(classifier, chosen.images)
    for index, (x, w, after) in enumerate(zip(inputs, weights_of(classifier), kept)):
        own, *others = (x[chosen.labels.numpy() == label].mean(0) for label in (FORGET, 0, 2))
        others = np.stack(others, 1)
        r = own - others @ np.linalg.lstsq(others, own, rcond=None)[0]
        q = r / np.linalg.norm(r)
        halves = [torch.tensor(x[chosen.labels.numpy() == label]) for label in (FORGET, 0, 2)]
        found = projections.separability(halves[0], torch.cat(halves[1:])[::2], 0.01).item()
        assert 0.5 < found <= 1
        assert np.allclose(after, w - index / 2 * found * np.outer(w @ q, q), atol=1e-6)
        assert np.array_equal(after, changed[index]) and np.array_equal(after, w) == (index == 0)


def test_the_probe_of_damp_scores_what_is_held_out_and_means_of_others_that_span_everything_leave_no_direction():
    own = torch.ones(20, 3, dtype=torch.float64)
    others = -own.clone()
    assert projections.separability(own, others, 0.01) == 1 and projections.separability(own, own, 0.01) == 0
    own[[1, 5, 9]] *= -1  # every second sample is held out: 4 of the 20 are on the wrong side
    others[7] *= -1
    assert projections.separability(own, others, 0.01) == pytest.approx(2 * 16 / 20 - 1)
    split = random_split(60)
    found = [projections.class_direction(split.images[:, :n], split.labels, FORGET) for n in (2, 3)]
    assert not found[0].any() and found[1].norm() == pytest.approx(1), "of two numbers nothing is left but rounding"


def test_the_optimised_mask_is_a_mask_and_its_sparsity_counts(request_to_forget):
    whole = request_to_forget.classifier.weights[1]
    models = (answered_by("optimised_mask", request_to_forget, sparsity=sparsity) for sparsity in (0.1, 3.0))
    dense, sparse = (model.weights[1] for model in models)
    assert torch.equal(dense[dense != 0], whole[dense != 0])
    assert 0 <= (sparse == 0).sum() < (dense == 0).sum() < whole.numel()


def test_the_largest_weights_are_zeroed_or_kept():
    request = make_request(requested_kappa=9)
    by_size = request.original.weights[1].detach().abs().flatten()
    zeroed = (answered_by("magnitude", request).weights[1].flatten() == 0).nonzero()[:, 0]
    assert set(zeroed.tolist()) == set(by_size.topk(9).indices.tolist())
    kept = METHODS["magnitude"].most_needed(request)
    assert set(kept.tolist()) == set(by_size.topk(24).indices.tolist())


def test_the_trivial_ways_take_the_logit_or_the_output_row_and_the_control_other_initial_weights(request_to_forget):
    request, images = request_to_forget, request_to_forget.train.images
    without_row = answered_by("output_row", request)
    logits, before = without_row(images), request.classifier(images)
    others = [label for label in range(NUM_CLASSES) if label != FORGET]
    assert (logits[:, FORGET] == 0).all() and torch.equal(logits[:, others], before[:, others])
    assert [int((weight == 0).sum()) for weight in without_row.weights] == [0, 0, 8]
    p = answered_by("logit_removed", request)(images).softmax(1)
    assert (p[:, FORGET] == 0).all() and torch.allclose(p.sum(1), torch.ones(len(p)))
    retrained = [answered_by(name, request).weights[0] for name in ("retrain", "retrain_again")]
    assert not torch.equal(*retrained)


DIVERGING = [("fine_tune", "learning_rate"), ("scrub", "learning_rate"), ("optimised_mask", "sparsity")]


@pytest.mark.parametrize("name, rate", DIVERGING)
def test_a_method_that_diverges_stops_with_its_loss_and_step(request_to_forget, name, rate):
    with pytest.raises(TrainingError, match=r"loss.* is -?(nan|inf) at step \d+: training diverged, see eval.hyperp"):
        answered_by(name, request_to_forget, **{rate: 1e39 if rate == "sparsity" else 1e30})


TOP_K = 8
CONFIG = Published(hidden=8, rounds=3, steps=5, learning_rate=0.01, samples=30, temperature=0.25, gumbel=0.2,
                   sufficiency=1.0, prior=0.1, draws=3)  # fmt: skip


@pytest.fixture
def to_publish() -> Request:
    return small_request(methods=("mimu", "published"), hyperparameters={"published": asdict(CONFIG)})


def test_the_set_difference_ranks_by_brute_force():
    scores = torch.randn(4, 30, generator=data.seeded("test"))
    top = [set(row.topk(8).indices.tolist()) for row in scores]
    order = set_difference(scores, 8).argsort(1, descending=True)
    for d in range(4):
        others = [c for c in range(4) if c != d]
        only_here = top[d].difference(*(top[c] for c in others))
        contrast = scores[d] - scores[others].mean(0)
        first = sorted(only_here, key=lambda v: -scores[d, v])
        assert order[d].tolist() == first + sorted(set(range(30)) - only_here, key=lambda v: -contrast[v])


def test_both_terms_reach_the_gcn_and_sufficiency_is_of_the_kept_weights(to_publish):
    graphs, gcn = to_publish.graphs, MaskingGCN(len(FEATURES), 8, 3)
    gcn.readout = torch.nn.Linear(8, 1, bias=False)
    single = graphs.draw(1, data.seeded("test"))
    logits = importance(gcn, graphs, single)
    for row, sample in enumerate(single.flatten().tolist()):
        snapshot = graphs.snapshot(torch.tensor([[sample]]), FEATURES)
        of_graph = replace(snapshot, config=graph_config(features=FEATURES, other_classes=False)).class_graph(0)
        own = torch.cat([gcn.readout(part)[0].flatten() for part in gcn.hidden(of_graph, graphs.graph)])
        assert torch.allclose(logits[row], own, atol=1e-5)
    term = published.insufficiency(logits, graphs, CONFIG, TOP_K, data.seeded("noise"))
    weights = list(gcn.parameters())
    w = graphs.weights()[0].flatten()
    p, prior = (w.abs() + 1e-12) / (w.abs() + 1e-12).sum(), published.prior_divergence(logits, w).mean()
    by_hand = F.kl_div(p.log().expand_as(logits), logits.log_softmax(1), reduction="batchmean", log_target=True)
    assert torch.allclose(prior, by_hand, rtol=1e-5)
    for value in (term, prior):
        for gradient in torch.autograd.grad(value, weights, retain_graph=True):
            assert gradient.isfinite().all() and gradient.any()
    generator, losses = data.seeded("noise"), []
    gumbel = -torch.empty(logits.shape).exponential_(generator=generator).log()
    for label, samples in enumerate(graphs.draw(10, generator)):
        kept = (logits[label] / logits[label].std() + 0.2 * gumbel[label]).topk(TOP_K).indices
        with graphs.graph.keeping(kept).applied_to(graphs.classifier):
            masked = graphs.classifier(graphs.samples.images[samples])
        losses.append(F.cross_entropy(masked, torch.full((10,), label)))
    assert torch.allclose(term, torch.stack(losses).mean(), rtol=1e-4)


@pytest.mark.parametrize("asked", [9, "auto"])
def test_the_gcn_is_trained_once_for_a_classifier(to_publish, asked, monkeypatch):
    steps = []
    monkeypatch.setattr(published, "descend", lambda *given: steps.append(given) or descend(*given))
    first = replace(to_publish, requested_kappa=asked, kept={})
    found = answer(first, "published").mask
    scores = mean_importance(first, CONFIG)
    order = set_difference(scores, TOP_K)[FORGET].argsort(descending=True)[: found.num_zeroed]
    assert set(order.tolist()) == set(found.vertices().tolist())
    needed = METHODS["published"].most_needed(first)
    assert needed.tolist() == scores[FORGET].topk(TOP_K).indices.tolist() and len(steps) == CONFIG.steps
    with pytest.raises(TrainingError, match="loss is (nan|inf) at step 0: .* see eval.hyperparameters.published"):
        mean_importance(replace(to_publish, kept={}), replace(CONFIG, prior=float("inf")))
