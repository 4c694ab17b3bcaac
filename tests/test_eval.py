"""Metrics against sums by hand, methods that cannot see the test split, the JSON and the registry."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import NUM_CLASSES, graph_config, random_split
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

import methods
from config import load_config
from data import GraphGenerator, ImageData, Split
from eval import Eval, Experiment, unlearn, valid_json
from methods import METHODS, Request, unlearning_method
from model import HookedMNISTClassifier, Mask, MaskingGCN
from reporter import method_styles
from trainer import TrainedGCN, Trainer, TrainerConfig, TrainingError
from visualization import Visualization

FORGET, KAPPA, TOP_K = 1, 9, 8


@pytest.fixture
def registry():
    """Methods registered in a test are gone after it."""
    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)


def make_eval(folder, test: Split | None = None, kappa: int = KAPPA, shared=None, mask_layer=-2, **changes) -> Eval:
    settings = {"step": 4, "group_size": 10, "visualize": False, "batch_size": 7} | changes
    config = replace(load_config().eval, **settings)
    train = random_split(40)
    trainer = Trainer(TrainerConfig((6, 5), False, 10, 16, 0.01), 0)
    classifier = trainer.train(train, NUM_CLASSES)
    described = graph_config(mask_layer, features=("weight", "margin"), samples_per_class=20)
    graphs = GraphGenerator(classifier, train, described, 0)
    torch.manual_seed(0)
    gcn = MaskingGCN(graphs.config.num_features, 8, 2)
    request = Request(config, classifier, trainer, train, graphs, gcn, FORGET, TOP_K, 0)
    experiment = Experiment(
        "", 0, FORGET, mask_layer, TOP_K, kappa, "fixed", 1.5, {"seed": 0}, {"settings": {"kappa": kappa}}
    )
    return Eval(config, experiment, request, ImageData(train, test or random_split(13, seed=5)), folder, shared)


def test_metrics_are_sums_over_samples_divided_by_their_number(tmp_path):
    scored = make_eval(tmp_path)
    model = scored.request.classifier
    for loader, is_forget in ((scored.mnist_forget_set(), True), (scored.mnist_retain_set(), False)):
        losses, correct, probability = [], [], []
        for image, label in loader.dataset:
            p = model(image[None]).double().softmax(1)[0]
            losses.append(-p[label].log().item())
            correct.append(float(p.argmax() == label))
            probability.append(p[FORGET].item())
        metrics = scored.inference(model, loader, is_forget, "by hand")
        assert metrics["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        assert metrics["score"] == pytest.approx(100 * sum(correct) / len(correct))
        assert ("probability" in metrics) == is_forget
        if is_forget:
            assert metrics["probability"] == pytest.approx(sum(probability) / len(probability), rel=1e-5)


def test_the_sets_are_those_of_the_test_split(tmp_path):
    scored = make_eval(tmp_path)
    forget, retain = scored.mnist_forget_set().dataset.tensors, scored.mnist_retain_set().dataset.tensors
    assert torch.equal(forget[0], scored.data.test.forget(FORGET).images) and len(forget[1]) == 13
    assert set(retain[1].tolist()) == {0, 2} and len(retain[1]) == 26


@pytest.mark.parametrize("mask_layer", [-2, None])
def test_the_mask_is_that_of_the_zeroed_weights(tmp_path, mask_layer):
    scored = make_eval(tmp_path, mask_layer=mask_layer)
    mask = scored.get_model_mask()
    zeroed = scored.eval()["zeroed"]
    assert mask.shape == ((5, 6) if mask_layer == -2 else (42 + 30 + 15,))
    assert (mask.flatten() == 0).nonzero()[:, 0].tolist() == sorted(zeroed) and len(zeroed) == KAPPA


def test_every_method_stands_in_every_evaluation(tmp_path):
    results = make_eval(tmp_path).eval()
    names = ["original", "mimu", "saliency", "random", "magnitude", "sft", "retrain"]
    assert list(results["unlearning_metrics"]) == list(results["performance_degradation_metrics"]) == names
    assert list(results["mask_efficacy_metrics"]) == ["original", "mimu", "random", "magnitude"]
    assert results["unlearning_metrics"]["original"] == results["mask_efficacy_metrics"]["original"]
    assert list(results["seconds"]) == ["gcn", *names, "experiment"] and results["seconds"]["retrain"] > 0


def test_the_json_is_valid_and_holds_what_was_returned(tmp_path):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    scored = make_eval(tmp_path)
    results = scored.eval()
    text = scored.metrics_path.read_text()
    written = json.loads(text, parse_constant=refuse)
    assert written.pop("checksum") and written.pop("made_by") == scored.experiment.made_by
    assert written == json.loads(json.dumps(results))
    assert scored.metrics_path.parent == tmp_path / "Metrics and Plots" / "metrics"
    saved = Mask.load(tmp_path / "masks" / f"{results['id']}.pt")
    assert torch.equal(saved.as_tensor(), scored.get_model_mask())


def test_an_infinite_loss_is_null_in_the_json(tmp_path, registry):
    @unlearning_method("logit removed")
    def logit_removed(request):
        class Removed(torch.nn.Module):
            def forward(self, images):
                return request._classifier(images).index_fill(1, torch.tensor([FORGET]), -torch.inf)

        return Removed()

    scored = make_eval(tmp_path)
    metrics = scored.eval()["unlearning_metrics"]["logit removed"]
    assert metrics == {"loss": float("inf"), "score": 0.0, "probability": 0.0}
    written = json.loads(scored.metrics_path.read_text(), parse_constant=pytest.fail)
    assert written["unlearning_metrics"]["logit removed"] == {"loss": None, "score": 0.0, "probability": 0.0}


def test_logits_that_are_not_numbers_are_no_right_answers(tmp_path):
    scored = make_eval(tmp_path)
    broken = scored.request.classifier
    broken.layers[0].weight.data.fill_(torch.nan)
    samples = scored.data.test.forget(0).loader(5)
    assert scored.inference(broken, samples, False, "broken")["score"] == 0


def test_models_are_scored_in_evaluation_mode(tmp_path):
    scored = make_eval(tmp_path)
    dropout = torch.nn.Sequential(torch.nn.Dropout(0.9), scored.request.classifier)
    by_hand = scored.inference(dropout, scored.mnist_retain_set(), False, "dropout")
    assert by_hand == scored.inference(scored.request.classifier, scored.mnist_retain_set(), False, "whole")


def test_infinite_numbers_are_null():
    assert valid_json({"a": [1.5, float("inf")], "b": (float("nan"), "text", None, 3)}) == {
        "a": [1.5, None],
        "b": [None, "text", None, 3],
    }


def answers(scored: Eval) -> dict[str, list[torch.Tensor]]:
    names = scored.config.method_names
    return {name: [layer.weight for layer in scored._answer(name).model.layers] for name in names}


def test_no_method_and_no_mask_depends_on_the_test_split(tmp_path):
    usual = make_eval(tmp_path)
    spoiled = random_split(13, seed=5)
    spoiled = make_eval(tmp_path, Split(torch.full_like(spoiled.images, torch.nan), spoiled.labels.flip(0)))
    assert torch.equal(usual.get_model_mask(), spoiled.get_model_mask())
    for name, weights in answers(usual).items():
        assert all(torch.equal(w, v) for w, v in zip(weights, answers(spoiled)[name])), name
    assert usual.eval_training_split() == spoiled.eval_training_split()


@pytest.mark.parametrize("loader", ["mnist_forget_set", "mnist_retain_set"])
def test_a_method_that_asks_for_the_test_split_fails(tmp_path, registry, loader):
    scored = make_eval(tmp_path, methods=("mimu", "original"))
    METHODS["original"] = replace(METHODS["original"], unlearn=lambda request: getattr(scored, loader)())
    with pytest.raises(PermissionError, match="test split is sealed"):
        scored.eval_unlearning()
    assert scored.data.test is not None


def test_a_keep_mask_that_asks_for_the_test_split_fails(tmp_path, registry):
    scored = make_eval(tmp_path, methods=("mimu", "original"))
    METHODS["original"] = replace(METHODS["original"], most_needed=lambda request: scored.data.test)
    with pytest.raises(PermissionError, match="test split is sealed"):
        scored.eval_mask_efficacy()


def test_a_method_that_diverges_is_named_with_the_digit(tmp_path, registry):
    @unlearning_method("broken")
    def broken(request):
        model = request.classifier
        model.layers[0].weight.data.fill_(torch.nan)
        return model

    expected = f"method broken, digit {FORGET}: a weight of the classifier is not a finite number: training diverged"
    with pytest.raises(TrainingError, match=expected):
        make_eval(tmp_path).eval()
    assert not list(tmp_path.rglob("*.json"))


def test_nothing_to_score_is_said(tmp_path):
    test = random_split(13, seed=5)
    scored = make_eval(tmp_path, test=test.retain(FORGET))
    with pytest.raises(ValueError, match="original: there is no sample to score"):
        scored.eval_unlearning()


def test_methods_get_copies_of_the_classifier(tmp_path):
    scored = make_eval(tmp_path)
    before = [layer.weight.clone() for layer in scored.request.classifier.layers]
    scored.request.classifier.layers[0].weight.data.zero_()
    scored.eval()
    assert all(torch.equal(w, layer.weight) for w, layer in zip(before, scored.request.classifier.layers))


def test_a_method_that_changes_the_original_is_named(tmp_path, registry):
    @unlearning_method("vandal")
    def vandal(request):
        request.graphs.classifier.layers[1].weight.data[0] = 0
        return request.classifier

    with pytest.raises(ValueError, match="method 'vandal' changed the original's layers.1.weight"):
        make_eval(tmp_path).eval_unlearning()


def test_the_methods_are_what_they_say(tmp_path):
    scored = make_eval(tmp_path)
    weights = answers(scored)
    original = weights["original"]
    for name in ("mimu", "saliency", "random"):
        assert torch.equal(weights[name][0], original[0]) and torch.equal(weights[name][2], original[2])
        changed = (weights[name][1] != original[1]).nonzero()
        assert len(changed) == KAPPA and (weights[name][1][weights[name][1] != original[1]] == 0).all()
    assert not torch.equal(weights["mimu"][1], weights["random"][1])
    assert torch.equal(weights["sft"][0], original[0]) and not torch.equal(weights["sft"][1], original[1])
    retain = scored.request.train.retain(FORGET)
    alone = Trainer(TrainerConfig((6, 5), False, 10, 16, 0.01), 0).train(retain, NUM_CLASSES)
    assert all(torch.equal(w, layer.weight) for w, layer in zip(weights["retrain"], alone.layers))


def test_with_kappa_auto_each_order_stops_where_it_forgets(tmp_path):
    scored = make_eval(tmp_path, target=60.0, max_kappa=29)
    request = scored.request
    forget = request.train.forget(FORGET)
    METHODS["saliency"].unlearn(request.at(1), retain_weight=20.0, erasure_weight=5.0)
    kappas = {
        name: order.forgotten_at(forget)
        for name, order in (("mimu", request.order), ("saliency", request._orders["saliency"]))
    }
    experiment = replace(scored.experiment, kappa=kappas["mimu"], kappa_choice="auto")
    results = Eval(scored.config, experiment, request, scored.data, tmp_path).eval()
    assert results["num_zeroed"] == {
        "original": None, "mimu": kappas["mimu"], "saliency": kappas["saliency"], "random": kappas["mimu"],
            "magnitude": kappas["mimu"],
        "sft": None, "retrain": None,
    }  # fmt: skip
    assert kappas["mimu"] != kappas["saliency"]


def test_random_masks_are_nested(tmp_path):
    request = make_eval(tmp_path).request
    few, many = (methods.random_vertices(request, count).tolist() for count in (5, 12))
    assert many[:5] == few and len(set(many)) == 12
    others = []
    for name, value in (("seed", 1), ("forget_class", 2)):
        other = request.at(None)
        setattr(other, name, value)
        others.append(methods.random_vertices(other, 12).tolist())
    assert many not in others


def test_what_does_not_depend_on_kappa_is_computed_once(tmp_path, registry):
    calls = []

    @unlearning_method("counted")
    def counted(request):
        calls.append("counted")
        return request.classifier

    @unlearning_method("counted with kappa", uses_kappa=True)
    def counted_with_kappa(request):
        calls.append(request.kappa)
        return request.classifier

    shared: dict = {}
    for kappa in (3, 6):
        make_eval(tmp_path, kappa=kappa, shared=shared).eval()
    assert calls == ["counted", 3, 6]


def test_a_method_that_reads_kappa_must_say_so(tmp_path, registry):
    @unlearning_method("forgetful")
    def forgetful(request):
        return request.zeroing(torch.arange(request.kappa))

    with pytest.raises(ValueError, match="register it with uses_kappa=True"):
        make_eval(tmp_path).eval_unlearning()


def test_a_method_has_its_colour_where_not_all_are_drawn(tmp_path, registry):
    unlearning_method("first")(lambda request: request.classifier)
    unlearning_method("second")(lambda request: request.classifier)
    scored = make_eval(tmp_path)
    figure = Figure()
    Visualization(scored.eval(), tmp_path)._draw_bars(figure, {"second": {"score": 50.0}})
    colour = method_styles(scored.config.method_names)["second"]["color"]
    assert to_hex(figure.axes[0].patches[0].get_facecolor()) == to_hex(colour)


def test_a_name_is_registered_once(registry):
    with pytest.raises(ValueError, match="'mimu' is registered already"):
        unlearning_method("mimu")(lambda request: request.classifier)
    for name in ("", "$x$", "a\nb", "experiment"):
        with pytest.raises(ValueError, match="must have a name of printable characters without|registered already"):
            unlearning_method(name)(lambda request: request.classifier)


def test_a_request_that_goes_on_counts_the_steps_before(tmp_path):
    scored = make_eval(tmp_path, kappa=4)
    first = scored._answer("mimu").seconds
    later = Eval(scored.config, replace(scored.experiment, kappa=20), scored.request, scored.data, tmp_path, {})
    assert later._answer("mimu").seconds >= scored.request.order.seconds(20) > first / 2


def test_the_plots_of_an_experiment_are_drawn(tmp_path):
    scored = make_eval(tmp_path, visualize=True)
    results = scored.eval()
    drawn = sorted((tmp_path / "Metrics and Plots" / "plots" / results["id"]).iterdir())
    names = ["class_probabilities", "mask_efficacy", "performance_degradation", "unlearning", "weights"]
    assert [path.stem for path in drawn] == names
    assert all(path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size > 3000 for path in drawn)


def test_several_keep_masks_are_averaged(tmp_path, registry):
    scored = make_eval(tmp_path)
    choices = methods.random_choices(scored.request)
    assert choices.shape == (20, TOP_K) and len({tuple(choice.sort().values.tolist()) for choice in choices}) == 20
    by_hand = []
    for vertices in choices:
        weight = scored.request.classifier.layers[1].weight.detach()
        keep = torch.zeros_like(weight).flatten().index_fill(0, vertices, 1.0).view_as(weight)
        model = scored.request.classifier
        model.layers[1].weight.data = weight * keep
        images, labels = scored.mnist_forget_set().dataset.tensors
        by_hand.append(100 * (model(images).argmax(1) == labels).double().mean())
    assert scored.eval_mask_efficacy()["random"]["score"] == pytest.approx(sum(by_hand).item() / 20)


def own_model() -> torch.nn.Module:
    """A classifier as people train theirs, with biases, on the samples of conftest."""
    nn, train = torch.nn, random_split(200)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(7, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(300):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(train.images), train.labels).backward()
        optimizer.step()
    return model


def patient_gcn() -> TrainedGCN:
    """The tracked GCN; the classes of so small a problem take more of its few weights than usual."""
    trained = TrainedGCN.load()
    return replace(trained, masking=replace(trained.masking, max_kappa=0.9, target=1.0))


def scores(model, forget_class: int) -> tuple[float, float]:
    test = random_split(200, seed=7)
    correct = (model(test.images).argmax(1) == test.labels).float()
    is_forget = test.labels == forget_class
    return correct[is_forget].mean().item(), correct[~is_forget].mean().item()


@pytest.mark.parametrize("forget_class", range(NUM_CLASSES))
def test_a_model_of_the_users_own_forgets_a_class_and_is_given_back(forget_class):
    model, train = own_model(), random_split(200)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    mask = unlearn(model, train.images, train.labels, forget_class, patient_gcn())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert mask.layers == (1,) and mask.as_tensor().shape == (12, 16)
    _, retain_before = scores(model, forget_class)
    mask.apply(model)
    forget, retain = scores(model, forget_class)
    assert forget < 0.05 and retain > retain_before - 0.1
    mask.remove(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(
        mask.as_tensor(), unlearn(model, train.images, train.labels, forget_class, patient_gcn()).as_tensor()
    )
    assert [name for name, _ in model.named_parameters()] == list(before)


def test_unlearning_leaves_the_global_generator_alone():
    model, train = own_model(), random_split(200)
    state = torch.get_rng_state()
    unlearn(model, train.images, train.labels, 0, patient_gcn())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_that_fails_is_left_in_its_mode():
    model, train = own_model(), random_split(200)
    with pytest.raises(RuntimeError):
        HookedMNISTClassifier.of(model.train(), train.images.double())
    assert all(module.training for module in model.modules())


def test_unlearning_takes_any_layer_and_a_gcn_of_ones_own():
    model, train = own_model(), random_split(200)
    images, labels, trained = train.images.view(-1, 1, 7), train.labels.int(), patient_gcn()
    mask = unlearn(model, images, labels, 1, trained, mask_layer=(1, 2))
    assert mask.layers == (1, 2) and mask.as_tensor().shape == (12 * 16 + 3 * 12,)
    mask.apply(model)
    assert scores(model, 1)[0] < 0.05
    mask.remove(model)
    in_thirties = replace(trained, masking=replace(trained.masking, step=30, target=50.0))
    assert int((unlearn(model, images, labels, 1, in_thirties).as_tensor() == 0).sum()) % 30 == 0
    ones_own = MaskingGCN(trained.graphs.num_features, 8, 1)
    masks = [unlearn(model, images, labels, 1, gcn) for gcn in (trained.gcn, ones_own)]
    assert not torch.equal(*(mask.as_tensor() for mask in masks))


def test_unlearning_says_when_the_class_is_not_forgotten():
    model, train = own_model(), random_split(200)
    pretrained = patient_gcn()
    short = replace(pretrained, masking=replace(pretrained.masking, max_kappa=2))
    with pytest.warns(UserWarning, match=r"\d+\.\d % of class 1 are left after 2 zeroed weights"):
        mask = unlearn(model, train.images, train.labels, 1, gcn=short)
    assert int((mask.as_tensor() == 0).sum()) == 2


def test_unlearning_says_when_the_class_is_still_represented(recwarn):
    model, train = own_model(), random_split(200)
    pretrained = patient_gcn()
    unlearn(model, train.images, train.labels, 1, gcn=pretrained)
    assert not recwarn.list
    asking = replace(pretrained, masking=replace(pretrained.masking, erasure_target=-1000.0, max_kappa=40))
    unlearn(model, train.images, train.labels, 1, gcn=asking)
    assert [str(each.message) for each in recwarn.list][-1] == "class 1 is still represented after 40 zeroed weights"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"forget_class": 3}, "forget_class must be from 0 to 2, not 3"),
        ({"labels": torch.zeros(4)}, r"labels must be integers of shape \(600,\), not torch.float32 of \(4,\)"),
        ({"inputs": torch.zeros(600, 7).double()}, "inputs must be float32"),
        ({"gcn": "gcn.pt"}, "gcn must be a MaskingGCN, a TrainedGCN or None, not 'gcn.pt'"),
        ({"labels": torch.full((600,), 5)}, "labels must be from 0 to 2, not 5 to 5"),
        ({"labels": torch.zeros(600, dtype=torch.long)}, "class 1 has no training sample"),
        ({"inputs": torch.zeros(600, 5)}, "inputs have 5 features, the first layer of the model takes 7"),
        ({"inputs": torch.zeros(0, 7), "labels": torch.zeros(0, dtype=torch.long)}, r"shape \(0,\)"),
        ({"mask_layer": 3}, "mask_layer 3 is not there: valid are -3 to 2"),
    ],
)
def test_unlearning_refuses_what_does_not_fit(change, message):
    train = random_split(200)
    arguments = {"inputs": train.images, "labels": train.labels, "forget_class": 1} | change
    with pytest.raises(ValueError, match=message):
        unlearn(own_model(), **arguments)


def test_zeroed_weights_are_counted_in_every_layer_and_the_output_row_apart(tmp_path):
    results = make_eval(tmp_path, mask_layer=None).eval()
    shapes = [(6, 7), (5, 6), (NUM_CLASSES, 5)]
    where = [(layer, r) for layer, (m, n) in enumerate(shapes) for r in range(m) for c in range(n)]
    zeroed = [where[vertex] for vertex in results["zeroed"]]
    row = sum(place == (2, FORGET) for place in zeroed)
    expected = {f"layer {layer}": sum(place[0] == layer for place in zeroed) for layer in range(3)}
    expected["layer 2"] -= row
    counts = results["zeroed_by_layer"]
    assert counts["mimu"] == expected | {"output row of the class": row} and sum(counts["mimu"].values()) == KAPPA
    assert counts["retrain"] is None
    hidden = make_eval(tmp_path).request
    assert hidden.count_by_layer(torch.tensor([0, 29]), hidden.graphs.graph) == {"layer 1": 2}
    output = make_eval(tmp_path, mask_layer=-1).request
    output = output.count_by_layer(torch.arange(5 * FORGET - 1, 5 * FORGET + 5), output.graphs.graph)
    assert output == {"layer 2": 1, "output row of the class": 5}


def test_audits_stand_in_the_json_of_every_method(tmp_path):
    audit = replace(load_config().eval.audit, enabled=True, relearn_steps=3)
    names = ("original", "mimu", "logit_removed", "retrain")
    scored = make_eval(tmp_path, methods=names, audit=audit)
    results = scored.eval()
    written = json.loads(scored.metrics_path.read_text(), parse_constant=pytest.fail)
    assert tuple(written["audit_metrics"]) == names == tuple(written["methods"])
    assert written["audit_metrics"]["retrain"]["js_forget"] == 0.0
    assert written["audit_metrics"]["mimu"]["weights_changed"] == KAPPA == results["num_zeroed"]["mimu"]
    assert written["audit_metrics"]["logit_removed"]["relearn_steps"] is None
    assert written["methods"]["mimu"]["touches"] == "a mask" and written["methods"]["retrain"]["needs"] == "retain set"
    assert make_eval(tmp_path).eval()["audit_metrics"] == {}


def test_audits_are_made_without_a_retrained_classifier(tmp_path):
    audit = replace(load_config().eval.audit, enabled=True, relearn_steps=3, probes=("softmax",), relearn_from=(2,))
    scored = make_eval(tmp_path, methods=("original", "mimu"), audit=audit)
    scored.eval()
    audits = json.loads(scored.metrics_path.read_text())["audit_metrics"]
    assert list(audits) == ["original", "mimu"]
    for of_method in audits.values():
        assert of_method["js_forget"] is None and of_method["js_retain"] is None
        assert 0 <= of_method["probes"]["softmax"] <= 100 and 0 <= of_method["relearn_from"]["2"] <= 3


def test_hyperparameters_reach_the_method_as_the_config_has_them(tmp_path, registry):
    given = []

    @unlearning_method("tunable", in_default_run=False)
    def tunable(request, *, strength: float, rounds: int):
        given.append((strength, rounds))
        return request.classifier

    def score(**values):
        hyperparameters = load_config().eval.hyperparameters | {"tunable": values}
        make_eval(tmp_path, methods=("mimu", "tunable"), hyperparameters=hyperparameters).eval_unlearning()

    score(strength=0.5, rounds=3)
    assert given == [(0.5, 3)]
    with pytest.raises(ValueError, match="hyperparameters.tunable.strength is missing: it must be a number"):
        score(rounds=3)
    with pytest.raises(ValueError, match="hyperparameters.tunable.rounds must be an integer, not 0.5"):
        score(strength=1, rounds=0.5)


def test_methods_out_of_the_default_run_are_asked_for_by_name_or_by_all(tmp_path):
    default = load_config().eval
    assert {"original", "mimu", "saliency", "random", "magnitude", "sft", "retrain"} <= set(default.method_names)
    assert not {"scrub", "logit_removed", "retrain_again"} & set(default.method_names)
    assert replace(default, methods="all").method_names == tuple(METHODS)
    assert replace(default, methods=("mimu", "scrub")).method_names == ("mimu", "scrub")
