"""Custom models and samples: what is taken as it comes, what is refused, and what masks keep."""

import copy
import io
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest
import torch
from conftest import NUM_CLASSES, mask_of, random_split, scores, trained
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from mimu import Mask, RetainScoreError, pruning, unlearn
from mimu.graph import MaskingGCN
from mimu.hooked import HookedClassifier
from mimu.inputs import layers_to_mask
from mimu.judgement import Judgement
from mimu.pretrained import TrainedGCN
from mimu.samples import Split, held_out

TRAIN, TEST = random_split(200), random_split(200, seed=7)
SMALLEST = {"step": 4, "max_kappa": 0.9, "target": 1.0, "tolerance": None}
FREE = {"max_fall": None, "max_class_fall": None}


def stack() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(7, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))


@cache
def learned(make: Callable) -> nn.Module:
    torch.manual_seed(0)
    return trained(make(), TRAIN)


@pytest.fixture
def model() -> nn.Module:
    return copy.deepcopy(learned(stack))


def patient_gcn(**changes) -> TrainedGCN:
    """The pretrained GCN; to forget a class of so small a problem takes more of its few weights than usual."""
    trained = TrainedGCN.load()
    return replace(trained, pruning=replace(trained.pruning, **SMALLEST | changes))


def request(model: nn.Module, forget_class=1, samples: Split = TRAIN, **changes) -> Mask:
    return unlearn(model, samples.images, samples.labels, forget_class, **FREE | {"gcn": patient_gcn()} | changes)


def state_of(model: nn.Module) -> tuple:
    """All that a request must leave as it was, every bit of it."""
    tensors = [(name, value.flatten().view(torch.uint8).tolist()) for name, value in model.state_dict().items()]
    modules = [(type(each), each.training, getattr(each, "inplace", None)) for each in model.modules()]
    hooks = [len(each._forward_hooks) + len(each._forward_pre_hooks) for each in model.modules()]
    needs_gradient = [each.requires_grad for each in model.parameters()]
    return tensors, modules, hooks, needs_gradient, torch.get_rng_state().tolist()


def forgets(model: nn.Module, mask: Mask, retain_before: float = 0.0, label: int = 1) -> bool:
    """Whether a masked model classifies hardly any sample of a class, and the others about as before."""
    with mask.applied_to(model):
        forget, retain = scores(model.float().eval(), TEST, label)
    return forget < 5 and retain > retain_before - 10


def test_a_custom_model_forgets_a_class_and_is_given_back(model):
    before, (_, retain_before) = state_of(model), scores(model, TEST, 0)
    smallest, mask = request(model, 0), request(model, 0, gcn=patient_gcn(tolerance=0.003))
    assert mask.layers == ("3.weight",) and mask.as_tensor().shape == (12, 16) and mask.forgets == (0,)
    needed, zeroed = smallest.num_zeroed, mask.num_zeroed
    more = f"{needed} weights forget, {zeroed - needed} more cost the retained classes nothing"
    by = f"ranked by the GCN in 1 of 3 layers that can be masked; {more}"
    assert mask.includes(smallest) and zeroed > needed
    assert repr(mask) == f"Mask(layer 3.weight: {mask.num_zeroed} of 192 weights zeroed; {by})"
    assert forgets(model, mask, retain_before, 0) and state_of(model) == before
    with pytest.raises(ValueError, match="say other_weights=True$"):
        mask.apply(stack())


class Ahead(nn.Module):
    """A network as people write them: more than linear layers, attributes in any order, one that nothing calls."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.unused = nn.Linear(12, NUM_CLASSES), nn.Linear(5, 5)
        self.norm, self.convolution = nn.BatchNorm1d(4), parametrizations.spectral_norm(nn.Conv1d(1, 4, 3, padding=1))
        self.inner, self.dropout = nn.Linear(28, 12), nn.Dropout(0.5)

    def forward(self, x):
        x = self.norm(self.convolution(x.view(-1, 1, 7))).tanh().flatten(1)
        return self.head(self.dropout(self.inner(x).relu()))


def convolved(*end: nn.Module) -> nn.Sequential:
    """Convolutions, one of them grouped; the end is a linear layer, or something else."""
    relu, end = nn.ReLU(inplace=True), end or (nn.Flatten(), nn.Linear(56, NUM_CLASSES))
    first, grouped = nn.Conv2d(1, 8, (3, 1), padding=(1, 0)), nn.Conv2d(8, 8, 1, groups=2)
    inner = nn.Conv2d(8, 8, (3, 1), padding=(1, 0), bias=False)
    return nn.Sequential(nn.Unflatten(1, (1, 7, 1)), first, nn.BatchNorm2d(8), relu, grouped, inner, relu, *end)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Attending(nn.Module):
    """Attention behind what nobody trains, and the mean of what a recurrent layer gives."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.attention = nn.Linear(1, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.recurrent, self.last = nn.GRU(8, 8, batch_first=True), nn.Linear(8, NUM_CLASSES)

    def forward(self, x):
        with torch.no_grad():
            x = self.first(x.view(-1, 7, 1))
        x = self.attention(x, x, x, need_weights=False)[0]
        return self.last(self.recurrent(x)[0].mean(1))


def pooled() -> nn.Sequential:
    return convolved(nn.Conv2d(8, NUM_CLASSES, (7, 1)), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def called_twice() -> nn.Sequential:
    twice = nn.Conv2d(8, 8, 1)
    return convolved(twice, nn.ReLU(), twice, nn.Flatten(), nn.Linear(56, 3))


def with_layer(model: nn.Module, name: str, change: Callable) -> nn.Module:
    setattr(model, name, change(getattr(model, name)))
    return model


def pruned(layer: nn.Module) -> nn.Module:
    return prune.l1_unstructured(layer, "weight", 0.3)


def masked(model: nn.Module) -> nn.Module:
    inner = (torch.arange(192) > 9).float().view(8, 8, 3, 1)
    mask_of({"1.weight": torch.ones(8, 1, 3, 1), "5.weight": inner}).apply(model)
    return model


# What makes a model to train, or changes a trained one of convolutions; what is asked for; the layers of the answer.
AS_THEY_ARE = [
    (Ahead, None, None, "head inner"), (pooled, None, "auto", "7"), (called_twice, None, None, "1 4 5 11"),
    (lambda: nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 3)), None, "auto", "4"),
    (lambda: nn.Sequential(nn.Linear(7, 9), nn.BatchNorm1d(9), nn.ReLU(True), nn.Linear(9, 3)), None, "auto", "3"),
    (Attending, None, None, "attention.in_proj attention.out_proj last"),
    (None, lambda model: model[5].requires_grad_(False) and model.train(), [2, "1"], "1 5"),
    (None, masked, ["5", "8"], "1 5 8"), (None, nn.Module.bfloat16, 2, "5"), (None, nn.Module.train, "[45]", "4 5"),
    (None, lambda model: model.to(memory_format=torch.channels_last), 2, "5"),
    (None, lambda model: torch.compile(nn.DataParallel(model), backend="eager"), "auto", "8"),
    (None, lambda model: HookedClassifier(model, TRAIN.images), None, "1 4 5 8"),
    (lambda: convolved(nn.Flatten(), Doubled(56, 8), nn.ReLU(), Doubled(8, 3)), None, [3, 4], "8 10"),
    (lambda: with_layer(convolved(), "1", parametrizations.spectral_norm), None, [-2, -1], "5 8"),
]  # fmt: skip


@pytest.mark.parametrize("make, change, mask_layer, layers", AS_THEY_ARE)
def test_models_are_taken_as_they_are(make, change, mask_layer, layers):
    torch.manual_seed(0)
    model = trained(make(), TRAIN).train() if make else change(copy.deepcopy(learned(convolved)))
    before, carried = state_of(model), Mask.on(model)
    retain_before = scores(copy.deepcopy(model).float().eval(), TEST, 1)[1]
    mask = request(model, gcn=patient_gcn(step=4, group_size=60), mask_layer=mask_layer)
    assert state_of(model) == before
    names = [f"{name}.weight".replace("in_proj.", "in_proj_") for name in layers.split()]
    assert [name for name in mask.layers if name in names] == names and len(mask.layers) == len(names)
    assert (carried is None or mask.includes(carried)) and forgets(model, mask, retain_before)


# What is given for the samples of class 1 in tensors (images, labels), and the mode of PyTorch.
SAMPLES = {
    "lists of tensors": (lambda x, y: (list(x), y.tolist(), 1), torch.inference_mode),
    "arrays": (lambda x, y: (x[:, None].double().numpy(), y.numpy().astype(">i2"), torch.tensor(1)), torch.no_grad),
    "pairs": (lambda x, y: ([(a.numpy(), int(b)) for a, b in zip(x, y)], None, np.int64(1)), nullcontext),
    "loader": (lambda x, y: (DataLoader(TensorDataset(x, y.short()), 32), 1), lambda: torch.autocast("cpu")),
    "shuffled": (lambda x, y: (DataLoader(TensorDataset(x, y.short()), 32, shuffle=True), 1), nullcontext),
}  # fmt: skip


@cache
def by_few() -> torch.Tensor:
    """The zeros of a request that draws few samples, so that their order matters."""
    return request(learned(stack), gcn=patient_gcn(group_size=3)).as_tensor()


@pytest.mark.parametrize("case", SAMPLES)
def test_samples_and_types_and_modes_are_taken_as_people_have_them(model, case):
    expected, state, gcn = by_few(), torch.get_rng_state(), patient_gcn(group_size=3)
    make, mode = SAMPLES[case]
    if case == "pairs":
        model.double()
        gcn.gcn.double()
    with mode():
        mask = unlearn(model, *make(TRAIN.images.clone(), TRAIN.labels.clone()), gcn=gcn, **FREE)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(mask.as_tensor(), expected) == (case != "shuffled") and forgets(model, mask)


class Wrapped(nn.Module):
    """A model with something before and after, that changes itself when it runs."""

    def __init__(self, model: nn.Module, before: Callable | None = None, after: Callable | None = None) -> None:
        super().__init__()
        self.model, self.before, self.after, self.calls = model, before, after, 0

    def forward(self, x):
        self.calls += 1
        found = self.model(self.before(x) if self.before else x)
        return self.after(found) if self.after else found


def then(change: Callable) -> Callable:
    return lambda model: Wrapped(model, None, change)


def test_inputs_are_given_as_they_are_and_the_model_is_not_run_itself(model):
    as_bytes = replace(TRAIN, images=(TRAIN.images * 20 + 128).clamp(0, 255).byte())
    of_bytes = Wrapped(model, lambda x: x.float() if x.is_floating_point() else (x.float() - 128) / 20).train()
    before = state_of(of_bytes)
    mask = request(of_bytes, samples=as_bytes)
    assert state_of(of_bytes) == before and of_bytes.calls == 0 and forgets(of_bytes, mask)
    with pytest.warns(UserWarning, match="inputs are torch.uint8, from 0 to 255, but the model takes torch.float32"):
        request(model, samples=as_bytes)


# What requests ask for other than class 1 of all samples, ranked by the GCN in large steps.
REQUESTS = [
    {"mask_layer": None, "forget_class": 0, "samples": TRAIN[:60]},
    {"method": "erase"},
    {"scorer": "saliency", "mask_layer": 0, "samples": Split(TRAIN.images.tolist(), TRAIN.labels)},
]


def ask(changes: dict) -> Mask:
    return request(learned(stack), **{"gcn": patient_gcn(step=20)} | changes)


@pytest.mark.filterwarnings("ignore:.* of class")
def test_requests_leave_other_threads_alone_and_one_another_and_the_default_type_changes_nothing():
    other, drawn, dtypes, stop = stack(), [], set(), threading.Event()
    one_thread = {"initializer": torch.set_num_threads, "initargs": (1,)}
    with ThreadPoolExecutor(1, **one_thread) as alone:
        expected = list(alone.map(ask, REQUESTS))

    def predict() -> None:
        while not stop.is_set() or not drawn:
            other(TRAIN.images[:2])
            drawn.append(torch.rand(1).item())
            dtypes.add(torch.get_default_dtype())

    torch.set_default_dtype(torch.bfloat16)
    torch.manual_seed(11)
    try:
        with ThreadPoolExecutor(1 + len(REQUESTS), **one_thread) as threads:
            predicting = threads.submit(predict)
            try:
                masks = list(threads.map(ask, REQUESTS))
            finally:
                stop.set()
            predicting.result()
        torch.manual_seed(11)
        assert drawn == [torch.rand(1).item() for _ in drawn] and dtypes == {torch.bfloat16}
    finally:
        torch.set_default_dtype(torch.float32)
    for mask, alone in zip(masks, expected, strict=True):
        assert mask.includes(alone) and alone.includes(mask) and repr(mask) == repr(alone)


@pytest.mark.parametrize("progress", [True, False])
def test_a_long_request_shows_how_long_it_takes_at_most_and_every_tenth_step_sees_what_the_kept_classes_lose(
    model, progress, monkeypatch
):
    judged, is_ruined = [], Judgement.is_ruined
    monkeypatch.setattr(Judgement, "is_ruined", lambda *given: judged.append(is_ruined(*given)) or judged[-1])
    monkeypatch.setattr("mimu.attempts.tqdm", lambda **given: tqdm(**given | {"delay": 0, "mininterval": 0}))
    monkeypatch.setattr("sys.stderr", terminal := io.StringIO())
    terminal.isatty = lambda: True
    zeroed = request(model, gcn=patient_gcn(step=2), scorer="saliency", progress=progress).num_zeroed
    shown = re.findall(r"class 1, at most:[^\r]* (\d+)/173 \[[^\r]*<\d", terminal.getvalue())
    assert {*map(int, shown)} == ({*range(2, zeroed + 1, 2)} if progress else set()), "of 172.8 weights"
    assert len(judged) == 1 + zeroed // 20 > 2, "before the first, too"
    judged.clear()
    spoiled = patient_gcn(step=2)
    spoiled.gcn.readout.weight.data.normal_(std=30, generator=torch.Generator().manual_seed(0))
    ask = partial(request, model, gcn=spoiled, mask_layer=0, progress=progress)
    of_formula = ask(scorer="saliency").num_zeroed // 20
    judged.clear()
    with pytest.raises(RetainScoreError):
        ask(max_fall=1e-9)
    by_formula = [False] * of_formula + [True]
    assert judged == [False, True, *by_formula], "the GCN's ends at the tenth step, then the formula's begins"


def test_any_scorer_gcn_and_step_are_taken(model):
    assert request(model, gcn=patient_gcn(step=30, target=50.0)).num_zeroed % 30 == 0
    tracked = TrainedGCN.load()
    untrained = MaskingGCN(tracked.gcn.num_features, 8, 1)
    choices = {"gcn": None}, {"gcn": tracked.gcn}, {"gcn": untrained}, {"gcn": None, "scorer": "saliency"}
    choices = [{"method": "mask"} | each for each in choices]
    same, ranked, other, formula = (request(model, 0, **each).as_tensor() for each in choices)
    assert torch.equal(same, ranked) and torch.equal(other, formula) and not torch.equal(ranked, formula)


@pytest.mark.parametrize("num_classes, layer", [(29, 1), (30, 2)])
def test_with_many_classes_the_last_layer_is_masked(num_classes, layer):
    names = ["1.weight", "3.weight", "5.weight"]
    assert layers_to_mask("auto", names, names, num_classes) == (layer,)


def test_a_step_in_the_last_layer_is_a_small_part_of_the_weights_of_a_class(model):
    one_by_one, at_once = (request(model, gcn=patient_gcn(step=step), mask_layer=-1) for step in (1, 30))
    assert at_once.num_zeroed > 0 and torch.equal(at_once.vertices(), one_by_one.vertices())


def test_what_is_left_of_a_class_is_said_and_the_mask_names_those_alone_that_are_forgotten(model, recwarn):
    request(model)
    assert not recwarn.list
    mask = request(model, [0, 2], gcn=patient_gcn(max_kappa=2))
    assert mask.num_zeroed == 2 and mask.forgets == ()
    line = r"(.*) % of class 0 remains, (.*) % of class 2 remains after 2 zeroed weights \(mask_layer=-1 or .*\)"
    left = re.fullmatch(line, str(recwarn.pop().message))
    assert min(map(float, left.groups())) > 1 and left[0].partition(" (")[0] in repr(mask)


def test_classes_and_samples_that_the_model_does_not_know_are_told_of(model):
    model[5].bias.data[1] -= 100
    with pytest.warns(UserWarning, match="class 1 is not classified in the first place: there is no mask"):
        mask = request(model)
    assert mask.num_zeroed == 0 and mask.forgets == (1,)
    torch.manual_seed(0)
    with pytest.warns(
        UserWarning, match=r"the model classifies .* % of the samples correctly: are the inputs"
    ) as warned:
        request(stack())
    assert warned[0].filename == __file__


def test_what_the_others_lose_is_measured_and_too_much_of_it_is_an_error_with_the_best_mask_within(model):
    before = state_of(model)
    ask = partial(request, model, gcn=patient_gcn(step=60), mask_layer=0)
    with pytest.warns(UserWarning, match="% of class 1 remains"):
        free = ask()
    line = r"the retained classes lose .*max_fall 1.0\), one retained class loses"
    with pytest.raises(RetainScoreError, match=line) as error:
        ask(max_fall=1.0)
    assert state_of(model) == before

    error, found = error.value, []
    unseen = TRAIN[held_out(TRAIN.labels)]
    for mask in (mask_of({"1.weight": torch.ones(16, 7)}), free, error.mask):
        with mask.applied_to(model):
            found.append({label: scores(model, unseen, label)[0] for label in range(NUM_CLASSES)})
    losses = [(found[0][0] + found[0][2] - now[0] - now[2]) / 2 for now in found]
    assert error.before == pytest.approx(found[0]) and error.after == pytest.approx(found[1])
    assert losses[2] <= 1 < losses[1]
    assert error.mask.num_zeroed < free.num_zeroed and free.includes(error.mask)


@pytest.mark.parametrize("steps, permanent", [([3, 0], False), ([[0, 3]], False), ([0, 3], True)])
def test_several_classes_are_forgotten_together_or_in_a_row(steps, permanent, monkeypatch):
    torch.manual_seed(1)
    split, test = random_split(200, num_classes=5), random_split(100, seed=1, num_classes=5)
    model = nn.Sequential(nn.Linear(7, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 5))
    model, searches = trained(model, split), []

    def searched(graphs, *each, **named):
        searches.append(graphs.classifier.merged)
        return pruning.prune(graphs, *each, **named)

    monkeypatch.setattr("mimu.attempts.prune", searched)
    for classes in steps:
        mask = request(model, classes, split, gcn=patient_gcn(step=4))
        mask.apply(model, permanent)
    assert searches[0] == np.atleast_1d(steps[0]).tolist(), "one search for all classes that are asked for together"
    after = [scores(model, test, label)[0] for label in range(5)]
    assert max(after[0], after[3]) < 3 and np.mean([after[1], after[2], after[4]]) > 95
    if not permanent:
        assert mask.forgets == (0, 3)
        kept = split[(split.labels != 0) & (split.labels != 3)]
        again = request(model, 0, kept, gcn=patient_gcn(step=4))
        assert torch.equal(again.as_tensor(), mask.as_tensor()), "nothing is left to be done, and no sample needed"


def refusal(model: nn.Module, inputs, labels, **arguments) -> str:
    """What a request that cannot work says, in one line; it leaves the model as it was."""
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    is_plain = parameters and not any(map(nn.parameter.is_lazy, parameters))
    before = state_of(model) if is_plain else None
    with pytest.raises(ValueError) as raised:
        unlearn(model, inputs, labels, **{"forget_class": 1} | arguments)
    assert before is None or state_of(model) == before
    assert "\n" not in str(raised.value)
    return str(raised.value)


GCN_OF_NAN = MaskingGCN(15, 8, 1)
GCN_OF_NAN.readout.weight.data[0, 3] = torch.nan
# Values of an argument that cannot work, and the line that says so of each.
WRONG_ARGUMENTS = [
    ("forget_class", [3, -1], r"must be from 0 to 2, not 0 to 2 and \[{}\]"),
    ("forget_class", [1.5, None, [[1]]], "forget_class must be a class, from 0 to 2, .*, not {}"),
    ("forget_class", ["cat"], "forget_class must be a tensor, an array or a list, not str"),
    ("forget_class", [[0, 1, 2]], "there must be classes to retain beside {}"),
    ("mask_layer", [3, [1, 1], [], "last", True], "must be auto, None, or some of 1.weight, .*; not {}"),
    ("gcn", ["gcn.pt"], "gcn must be a MaskingGCN, a TrainedGCN or None, not {}"),
    ("gcn", [MaskingGCN(9, 8, 1)], r"gcn must read .* features, .*, not 9"),
    ("gcn", [GCN_OF_NAN], "gcn: a weight is not a finite number"),
    ("scorer", ["random"], "scorer must be gcn or saliency, not {}"),
    ("max_fall", [-1], "max_fall must be a number of points above 0, or None, not {}"),
    ("max_class_fall", ["5"], "max_class_fall must be a number of points above 0, or None, not {}"),
]


@pytest.mark.parametrize("argument, values, line", WRONG_ARGUMENTS)
def test_what_cannot_be_asked_for_is_one_line(model, argument, values, line):
    for value in values:
        said = refusal(model, TRAIN.images, TRAIN.labels, **{argument: value})
        assert re.search(line.format(re.escape(repr(value))), said)


def with_number(value: float, row: int) -> Callable:
    return lambda x, y: (x.index_put((torch.tensor(row), torch.tensor(3)), torch.tensor(value)), y)


# What is given for tensors (images, labels), and the line.
WRONG_SAMPLES = {
    "float labels": (lambda x, y: (x, y.float()), r"labels must be integers of shape \(600,\), .*float32 of"),
    "labels one-hot": (lambda x, y: (x, torch.eye(3)[y].int()), r"labels must be .* not torch.int32 of \(600, 3\)"),
    "labels from 1": (lambda x, y: (x, y + 1), r"must be from 0 to 2, not 1 to 3"),
    "a single class": (lambda x, y: (x, y * 0 + 1), r"samples of every class, not none of \[0, 2\]"),
    "no samples": (lambda x, y: (x[:0], y[:0]), r"inputs must be samples, .* not of shape \(0, 7\)"),
    "one number": (lambda x, y: (3.0, y), r"inputs must be samples, \(samples, ...\), not of shape \(\)"),
    "text": (lambda x, y: ("images", y), "inputs must be a tensor, an array or a list, not str"),
    "complex": (lambda x, y: (x + 1j, y), "inputs must be real numbers in a dense .* not torch.complex64"),
    "nested": (lambda x, y: (torch.nested.nested_tensor([*x]), y), "inputs must be real numbers in a dense tensor"),
    "several": (lambda x, y: ((x, x), y), r"model: fails on inputs {0: \(\(7,\), .*, 1: .*positional arguments but 3"),
    "no labels": (lambda x, y: (x, None), "inputs must be a DataLoader or a data set of pairs"),
    "no pairs": (lambda x, y: (TensorDataset(x), None), "must be a DataLoader or a data set of pairs"),
    "nan": (with_number(torch.nan, 3), r"inputs\[3\] is not finite"),
    "1e30": (with_number(1e30, 350), r"inputs\[350\] is not finite, or too large to be squared"),
    "another size": (lambda x, y: (x[:, :5], y), r"model: fails on inputs of shape \(16, 5\)"),
}


@pytest.mark.parametrize("change, line", WRONG_SAMPLES.values(), ids=WRONG_SAMPLES)
def test_samples_that_cannot_work_are_one_line(model, change, line):
    assert re.search(line, refusal(model, *change(TRAIN.images, TRAIN.labels)))


NAN = nn.Linear(12, 3)
NAN.bias.data[1] = torch.nan
NOT_ABLE = "must be auto, None, or some of 1.weight, 5.weight, .*; not '3"
# What makes a model of one that is trained, the line, and what is asked for.
WRONG_MODELS = {
    "bias nan": (lambda model: nn.Sequential(*model[:5], NAN), "model: 5.bias has numbers that are not finite"),
    "no module": (lambda model: model.forward, "model must be a torch.nn.Module, not method"),
    "no linear": (lambda model: nn.ReLU(), "must have weights to mask, .*: ReLU has none"),
    "softmax": (lambda model: nn.Sequential(*model, nn.Softmax(1)), "ends in a softmax: give it without"),
    "computed": (then(lambda x: x.softmax(1)), "ends in a softmax: give it without"),
    "a tuple": (then(lambda x: (x, x)), "model must return logits, .*, not tuple"),
    "one column": (then(lambda x: x[:, 0]), r"must return logits, .*, not a tensor \(16,\)"),
    "nan logits": (then(lambda x: x / 0 * 0), r"logits\[0\] is not finite, .*, though inputs"),
    "lazy": (lambda model: with_layer(model, "3", lambda _: nn.LazyLinear(12)), "model: 3.weight has .* none yet"),
    "pruned": (lambda model: with_layer(model, "3", pruned), NOT_ABLE, "3.weight"),
    "called twice": (lambda model: called_twice(), "1.weight, 4.weight, 5.weight, 11.weight, .*; not '8.*'", "8.*"),
    "of some number": (then(lambda x: x / x.shape[0] ** 0.5), "torch.export cannot take it for any number of samples"),
    "of some values": (then(lambda x: x if x.sum() < 9 else x * 2), "torch.export cannot take it for any number of"),
    "nothing but sums": (lambda model: then(lambda x: x.cumsum(1))(nn.Embedding(9, 3)), "model: fails on inputs"),
}


@pytest.mark.parametrize("case", WRONG_MODELS)
@pytest.mark.filterwarnings("ignore:.*LazyLinear|.*Lazy modules")
def test_models_that_cannot_work_are_one_line(model, case):
    change, line, *asked = WRONG_MODELS[case]
    mask_layer = asked[0] if asked else "auto"
    assert re.search(line, refusal(change(model), TRAIN.images, TRAIN.labels, mask_layer=mask_layer))


def test_a_module_of_itself_is_refused_in_one_line(model):
    model.train()._modules["itself"] = model
    with pytest.raises(ValueError, match=r"model: cannot be copied \(maximum recursion depth"):
        unlearn(model, TRAIN.images, TRAIN.labels, 1)
    assert model.training and model[0].training


@pytest.mark.parametrize("lost, to, is_ruined", [(39, 2, False), (41, 2, True), (1000, 1, False)])
def test_on_the_way_retained_classes_are_classified_among_themselves(lost, to, is_ruined):
    labels = torch.arange(3).repeat_interleave(1000)
    logits = torch.eye(3)[labels]
    judgement = Judgement(labels, logits, retained=[0, 2], bounds=(1.0, 5.0), target=1.0, erase=False)
    logits = logits.clone()
    logits[:lost, to] = 2  # one class of two loses up to 4 points: twice 1.0 are allowed
    assert judgement.is_ruined(logits) == is_ruined
