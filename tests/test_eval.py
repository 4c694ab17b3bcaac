"""Metrics against sums by hand, methods that cannot see the test split, the JSON and the registry."""

import json
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from conftest import NUM_CLASSES, random_split, scores, small_request, trained_problem
from torch import nn

from data import ImageData
from eval import METHODS, Eval, random_choices, random_vertices, unlearning_method
from experiment.files import Artifact
from methods import controls
from mimu.masks import Mask
from mimu.samples import Split

FORGET, KAPPA, TOP_K = 1, 9, 8
CORE = ("original", "mimu", "random", "sft", "retrain")


@pytest.fixture(autouse=True)
def registry():
    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)


def make_eval(folder, requested_kappa=KAPPA, mask_layer=-2, audit=None, draw=None, methods=CORE, **changes) -> Eval:
    request = small_request(requested_kappa, mask_layer, methods=methods, **changes)
    provenance = {"settings": {"kappa": requested_kappa}}
    metrics, mask = (Artifact(folder / name, provenance) for name in ("metrics.json", "mask.pt"))
    data = ImageData(request.train, random_split(13, seed=5))
    return Eval(request, data, metrics, mask, {"id": "metrics", "seconds": {"gcn": 1.5}}, {}, audit, draw)


def test_metrics_are_sums_over_the_test_samples_divided_by_their_number(tmp_path):
    scored = make_eval(tmp_path)
    model, test = scored.request.classifier, scored.data.test
    for loader, is_forget in ((scored.mnist_forget_set(), True), (scored.mnist_retain_set(), False)):
        samples, chosen = Split(*loader.dataset.tensors), (test.labels == FORGET) == is_forget
        assert torch.equal(samples.images, test.images[chosen]) and torch.equal(samples.labels, test.labels[chosen])
        assert [len(batch) for batch, _ in samples.loader(7)][-1] == len(samples.labels) % 7 > 0
        p = torch.stack([model(image[None]).double().softmax(1)[0] for image in samples.images])
        correct = [float(row.argmax() == label) for row, label in zip(p, samples.labels)]
        dropout = nn.Sequential(nn.Dropout(0.9), model).train()  # scored in evaluation mode
        metrics = scored.inference(dropout, samples.loader(7), is_forget, "by hand")
        loss = -p.log().gather(1, samples.labels[:, None]).mean().item()
        by_hand = {"loss": loss, "score": 100 * sum(correct) / len(correct)}
        by_hand |= {"probability": p[:, FORGET].mean().item()} if is_forget else {}
        assert metrics == pytest.approx(by_hand, rel=1e-5)
    model.weights[0].data.fill_(torch.nan)
    assert scored.inference(model, test.forget(0).loader(), False, "broken")["score"] == 0, "nan is not correct"


@pytest.mark.parametrize("mask_layer", [-2, None])
def test_the_mask_is_that_of_the_zeroed_weights(tmp_path, mask_layer):
    scored = make_eval(tmp_path, mask_layer=mask_layer)
    results, mask, graph = scored.eval(), scored.get_model_mask(), scored.request.graphs.graph
    assert mask.shape == ((5, 6) if mask_layer == -2 else (42 + 30 + 15,))
    assert (mask.flatten() == 0).nonzero()[:, 0].tolist() == sorted(results["zeroed"])
    assert len(results["zeroed"]) == KAPPA == results["kappa"] == results["num_zeroed"]["mimu"]
    loaded, histograms = Mask.load(tmp_path / "mask.pt"), results["weight_histograms"]
    assert torch.equal(loaded.as_tensor(), mask) and loaded.layers == tuple(graph.names)
    assert [sum(histogram["all"]) for histogram in histograms] == graph.sizes
    assert sum(sum(histogram["zeroed"]) for histogram in histograms) == KAPPA


def test_every_method_stands_in_every_evaluation_and_the_json_is_valid(tmp_path):
    @unlearning_method("logit removed", touches="the output")
    def logit_removed(request):
        """Gives the class
        no chance.

        In one line.
        """
        return controls.logit_removed(request)

    written, names = [], [*CORE, "logit removed"]
    draw = lambda: written.append(json.loads((tmp_path / "metrics.json").read_text(), parse_constant=pytest.fail))  # noqa: E731
    scored = make_eval(tmp_path, methods=tuple(names), draw=draw)
    results = scored.eval()
    every = "unlearning_metrics", "performance_degradation_metrics", "methods"
    assert all(list(results[evaluation]) == names for evaluation in every)
    assert list(results["mask_efficacy_metrics"]) == ["original", "mimu", "random"]
    assert results["unlearning_metrics"]["original"] == results["mask_efficacy_metrics"]["original"]
    assert list(results["seconds"]) == ["gcn", *names, "experiment"] and results["seconds"]["retrain"] > 0
    about = {"does": "Gives the class no chance.", "paper": "", "touches": "the output", "needs": "both sets"}
    assert results["methods"]["logit removed"] == about and results["audits"] == {}
    for name in names:
        p = scored.unlearned(name).model(scored.data.test.forget(FORGET).images).double().softmax(1).mean(0)
        assert results["class_probabilities"][name] == pytest.approx(p.tolist(), rel=1e-5)
    assert results["unlearning_metrics"]["logit removed"] == {"loss": float("inf"), "score": 0.0, "probability": 0.0}
    (json_of,) = written
    assert json_of.pop("checksum") and json_of.pop("made_by") == scored.metrics.provenance
    assert json_of["unlearning_metrics"]["logit removed"]["loss"] is None
    assert json_of == json.loads(json.dumps(results), parse_constant=lambda _: None)
    assert json_of["id"] == "metrics" and json_of["kappa_choice"] == "fixed" and json_of["gave_up"] == {}


def filled(model, value):
    model.weights[0].data.fill_(value)
    return model


BROKEN = [
    (lambda request: filled(request.classifier, torch.nan), "method broken, class 1: a weight of the"),
    (lambda request: filled(request.original, 0), "'broken' changed the original's network.1.weight"),
    (lambda request: request.graphs.graph.zeroing(torch.arange(request.kappa)), "register it with uses_kappa=True"),
]


@pytest.mark.parametrize("unlearn, message", BROKEN)
def test_a_method_that_does_what_it_must_not_is_named(tmp_path, unlearn, message):
    unlearning_method("broken")(unlearn)
    with pytest.raises(ValueError, match=message):
        make_eval(tmp_path, methods=("mimu", "broken")).eval()
    assert not list(tmp_path.iterdir())


def test_the_methods_are_what_they_say(tmp_path):
    scored = make_eval(tmp_path, methods=(*CORE, "saliency"))
    request, original = scored.request, trained_problem()[2].weights
    request.classifier.weights[0].data.zero_()  # a copy
    weights = {name: scored.unlearned(name).model.weights for name in scored.names}
    alone = request.trainer.train(request.train.retain(FORGET), NUM_CLASSES).weights
    same = [("original", original), ("retrain", alone), ("saliency", weights["mimu"])]  # the GCN is untrained
    for name, expected in same:
        assert all(torch.equal(w, v) for w, v in zip(weights[name], expected, strict=True))
    for name in ("mimu", "random", "sft"):
        first, masked, last = weights[name]
        changed = masked != original[1]
        assert torch.equal(first, original[0]) and torch.equal(last, original[2]) and changed.any()
        assert name == "sft" or (changed.sum() == KAPPA and (masked[changed] == 0).all())
    few, many = (random_vertices(request, count) for count in (KAPPA, 12))
    assert torch.equal(few.sort().values, (weights["random"][1].flatten() == 0).nonzero()[:, 0])
    assert torch.equal(many[:KAPPA], few) and len(set(many.tolist())) == 12
    assert not torch.equal(random_vertices(replace(request, seed=1), KAPPA), few)


def test_with_kappa_auto_each_order_stops_where_it_forgets(tmp_path):
    calls = []

    def by_curvature(step, zeroed):
        calls.append((step, len(zeroed)))
        return curvature

    unlearning_method("in order", uses_kappa=True)(lambda request: request.in_steps("in order", by_curvature))
    at_once = lambda request: request.in_steps("at once", by_curvature, all_at_once=True)  # noqa: E731
    unlearning_method("at once", uses_kappa=True)(at_once)
    names = ("random", "mimu", "in order", "at once", "sft")
    scored = make_eval(tmp_path, requested_kappa="auto", target=50.0, methods=names)
    request = scored.request
    snapshot = request.graphs.snapshot(request.graphs.by_class, FORGET, features=["curvature"], forgets=False)
    curvature = snapshot.feature("curvature", snapshot.own)
    results, ranked, kappas = scored.eval(), curvature.argsort(descending=True), []
    for order, step in ((torch.tensor(results["zeroed"]), 4), (ranked, 4), (ranked, 1)):
        for kappa in range(step, 30, step):
            with request.graphs.graph.zeroing(order[:kappa]).applied_to(request.classifier) as model:
                if scores(model, request.train, FORGET)[0] < 50:
                    break
        kappas.append(kappa)
    assert results["seconds"]["random"] < results["seconds"]["mimu"], "without the search that finds its kappa"
    zeroed = dict(zip(names, (kappas[0], *kappas, None)))
    assert results["num_zeroed"] == zeroed and len(set(kappas)) == 3 and results["kappa_choice"] == "auto"
    assert results["gave_up"] == dict.fromkeys(["mimu", "in order", "at once"], False)
    assert calls == [(k // 4, k) for k in range(0, kappas[1], 4)] + [(0, 0)]


def test_what_does_not_depend_on_kappa_is_computed_once_and_pruning_continues(tmp_path):
    calls = []
    for name in ("counted", "counted with kappa"):
        count = lambda request, name=name: calls.append((name, request.requested_kappa)) or request.classifier  # noqa: E731
        unlearning_method(name, uses_kappa="kappa" in name)(count)
    first = make_eval(tmp_path, requested_kappa=3, methods=("mimu", "counted", "counted with kappa"))
    second = replace(first, request=replace(first.request, requested_kappa=20))
    few, many = (scored.eval() for scored in (first, second))
    assert calls == [("counted", None), ("counted with kappa", 3), ("counted with kappa", 20)]
    assert many["zeroed"][:3] == few["zeroed"] and len(many["zeroed"]) == 20
    assert many["seconds"]["mimu"] > few["seconds"]["mimu"], "steps that were made before count, too"


@pytest.mark.parametrize("name", ["mimu", "", "$x$", "a\nb", "experiment", "gcn"])
def test_a_method_has_a_name_of_its_own_that_can_be_printed(name):
    with pytest.raises(ValueError, match="must have a name of its own, of printable characters without"):
        unlearning_method(name)(lambda request: request.classifier)


def test_several_keep_masks_are_averaged(tmp_path):
    scored = make_eval(tmp_path, methods=("mimu", "random"))
    choices, by_hand = random_choices(scored.request), []
    assert choices.shape == (20, TOP_K) and len({tuple(choice.sort().values.tolist()) for choice in choices}) == 20
    for vertices in choices:
        model = scored.request.classifier
        model.weights[1].data *= torch.zeros(30).index_fill(0, vertices, 1.0).view(5, 6)
        by_hand.append(scores(model, scored.data.test, FORGET)[0])
    assert scored.eval_mask_efficacy()["random"]["score"] == pytest.approx(sum(by_hand) / 20)


class SumAudit(NamedTuple):
    """An audit that adds the weights, and knows between which classifiers it stands."""

    original: nn.Module
    retrained: nn.Module | None

    def __call__(self, model):
        return {"sum": sum(weight.sum().item() for weight in model.weights), "far": float("inf")}

    def columns(self):
        return {"sum": {"title": "sum", "spec": ".2f"}}


@pytest.mark.parametrize("methods", [("mimu", "original", "retrain"), ("original", "mimu")])
def test_every_method_is_audited_beside_the_original_and_the_retrained_classifier(tmp_path, methods):
    audits = []
    scored = make_eval(tmp_path, methods=methods, audit=lambda *about: audits.append(SumAudit(*about)) or audits[0])
    results, (audit,) = scored.eval(), audits
    assert results["audit_metrics"] == {name: audit(scored.unlearned(name).model) for name in methods}
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written["audit_metrics"]["mimu"]["far"] is None and written["audits"] == audit.columns()
    assert torch.equal(audit.original.weights[1], scored.request.original.weights[1])
    assert audit.retrained is (scored.unlearned("retrain").model if "retrain" in methods else None)


def test_a_method_runs_where_it_says_with_its_hyperparameters_and_metrics_depend_on_what_runs(tmp_path):
    strengths = []

    @unlearning_method("tunable", runs_with="all")
    def tunable(request, *, strength: float):
        strengths.append(strength)
        return request.classifier

    METHODS["by name"] = replace(METHODS["tunable"], runs_with="name")
    default, every = (set(small_request(methods=each).config.method_names) for each in (None, "all"))
    assert set(CORE) <= default and every >= default | {"tunable"} and not {"tunable", "by name"} & default
    assert "by name" not in every
    scored = make_eval(tmp_path, methods=("mimu", "tunable"), hyperparameters={"tunable": {"strength": 0.5}})
    scored.eval_unlearning()
    usual, tuned = scored.request.config, {"strength": 0.5}
    same = replace(usual, hyperparameters={"tunable": tuned, "scrub": {"epochs": 3}})
    other, less = replace(usual, hyperparameters={"tunable": {"strength": 0.6}}), replace(usual, methods=("mimu",))
    assert strengths == [0.5] and same.decisive() == usual.decisive()
    assert usual.decisive() not in (other.decisive(), less.decisive())
