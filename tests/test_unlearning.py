"""Classifiers and samples of the user's own: what is taken as it comes, what is refused, and what masks keep."""

import copy
import functools
import io
import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import NUM_CLASSES, random_split, scores, trained
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.data import DataLoader, TensorDataset

from mimu.data import Split
from mimu.masking.rankings import TrainedGCN
from mimu.model import Mask, MaskingGCN
from mimu.unlearning import RetainScoreError, unlearn
from mimu.unlearning.custom_model import CustomModel, plain_torch

TEST = random_split(200, seed=7)
FREE = {"max_fall": None, "max_class_fall": None}


def stack() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(7, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))


@pytest.fixture(scope="module")
def train() -> Split:
    return random_split(200)


@pytest.fixture(scope="module")
def learned(train) -> nn.Module:
    """A classifier as people train theirs, with biases."""
    torch.manual_seed(0)
    return trained(stack(), train)


@pytest.fixture
def model(learned) -> nn.Module:
    return copy.deepcopy(learned)


def patient_gcn(**changes) -> TrainedGCN:
    """The tracked GCN; the classes of so small a problem take more of its few weights than usual."""
    found = TrainedGCN.load()
    return replace(found, masking=replace(found.masking, **{"max_kappa": 0.9, "target": 1.0} | changes))


def state_of(model: nn.Module) -> tuple:
    """All that a request must leave as it was."""
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    modules = [(type(each), each.training, getattr(each, "inplace", None)) for each in model.modules()]
    hooks = [len(each._forward_hooks) + len(each._forward_pre_hooks) for each in model.modules()]
    return tensors, modules, hooks, [each.requires_grad for each in model.parameters()], torch.get_rng_state()


def is_as_it_was(before: tuple, model: nn.Module) -> bool:
    tensors, *others, state = before
    now, *of_now, state_now = state_of(model)
    same = all(torch.equal(now[name].nan_to_num(9.0), tensors[name].nan_to_num(9.0)) for name in tensors)
    return list(now) == list(tensors) and same and others == of_now and torch.equal(state, state_now)


@pytest.mark.parametrize("forget_class", range(NUM_CLASSES))
def test_a_model_of_the_users_own_forgets_a_class_and_is_given_back(model, train, forget_class):
    before, (_, retain_before) = state_of(model), scores(model, TEST, forget_class)
    mask = unlearn(model, train.images, train.labels, forget_class, patient_gcn(), **FREE)
    assert is_as_it_was(before, model)
    assert mask.layers == (1,) and mask.as_tensor().shape == (12, 16) and mask.forgets == (forget_class,)
    assert repr(mask) == f"Mask(layer 1: {mask.num_zeroed} of 192 weights zeroed)"
    with mask.applied_to(model):
        forget, retain = scores(model, TEST, forget_class)
    assert forget < 5 and retain > retain_before - 10
    assert is_as_it_was(before, model)


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


@pytest.mark.parametrize(
    "make, layers, mask_layer",
    [
        (stack, (0, 1, 2), 1),
        (Ahead, (2, 0), 0),
        (lambda: nn.Sequential(nn.Linear(7, 9), nn.ReLU(True), nn.Linear(9, 3)), (0, 1), 1),
        (lambda: nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 3)), (1, 2), 2),
        (lambda: nn.Sequential(nn.Linear(7, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 3)), (1,), 1),
        (lambda: nn.Linear(7, 3), (0,), 0),
    ],
)
def test_the_classifier_is_what_stands_in_a_row_at_the_end(make, layers, mask_layer, train):
    model = make()
    before = state_of(model)
    with plain_torch():
        own = CustomModel.of(model, train.images)
    assert own.layers == layers and [layers[each] for each in own.masked] == [mask_layer]
    assert is_as_it_was(before, model), "buffers of the normalisations are, too"
    assert torch.allclose(own.classifier(own.inputs), model.eval()(train.images), atol=1e-5)


class Convolved(nn.Module):
    """Convolutions as people write them, one of them grouped; the end is a linear layer, or another one."""

    def __init__(self, *end: nn.Module) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 8, (3, 1), padding=(1, 0)), nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 1, groups=2)
        self.inner = nn.Conv2d(8, 8, (3, 1), padding=(1, 0), bias=False)
        self.end, self.relu = nn.Sequential(*end or (nn.Flatten(), nn.Linear(56, NUM_CLASSES))), nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.relu(self.norm(self.first(x.view(-1, 1, 7, 1))))
        return self.end(self.relu(self.inner(self.grouped(x))))


class Untraceable(Convolved):
    def forward(self, x):
        return super().forward(x) if x.sum() < 1e9 else None


@pytest.fixture(scope="module")
def convolved(train) -> nn.Module:
    torch.manual_seed(0)
    return trained(Convolved(), train)


def ending_in_pooling():
    return Convolved(nn.Conv2d(8, NUM_CLASSES, (7, 1)), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def forgets(model: nn.Module, mask: Mask, retain_before: float, label: int = 1) -> bool:
    """Whether a masked model classifies hardly any sample of a class, and the others about as before."""
    with mask.applied_to(model):
        forget, retain = scores(model.float().eval(), TEST, label)
    return forget < 5 and retain > retain_before - 10


def frozen(model, _):
    model.inner.weight.requires_grad_(False)
    return model.train()


def ahead(_, train):
    return trained(Ahead(), train).train()


def masked(model, _):
    Mask((0, 1), (torch.ones(8, 1, 3, 1), (torch.arange(192) > 9).float().view(8, 8, 3, 1))).apply(model)
    return model


# The model, of a convolutional one that is trained and the samples, what is asked for, and the layers of the answer.
AS_THEY_ARE = {
    "linear ones at the end, auto": (ahead, "auto", (0,)), "linear ones at the end, all": (ahead, None, (0, 2)),
    "the first of them": (ahead, 0, (0,)), "both of them": (ahead, [2, 0], (0, 2)),
    "auto": (frozen, "auto", (2,)), "all": (frozen, None, (0, 1, 2)), "kernels": (frozen, [1, 0], (0, 1)),
    "both kinds": (frozen, [1, 2], (1, 2)), "the last": (frozen, -1, (2,)), "masked": (masked, [1, 2], (0, 1, 2)),
    "bfloat16": (lambda model, _: model.bfloat16(), 1, (1,)),
    "channels last": (lambda model, _: model.to(memory_format=torch.channels_last), 1, (1,)),
    "pooling": (lambda _, train: trained(ending_in_pooling(), train), None, (0, 1, 2)),
    "pooling, auto": (lambda _, train: trained(ending_in_pooling(), train), "auto", (2,)),
    "spectral_norm": (
        lambda model, train: parametrizations.spectral_norm(model.first) and trained(model, train), [1, 2], (1, 2),
    ),
    "called twice": (
        lambda model, train: trained(Convolved(twice := nn.Conv2d(8, 8, 1), nn.ReLU(), twice, *model.end), train),
        None, (0, 1, 3),
    ),
    "of a class of its own": (
        lambda _, train: trained(Convolved(nn.Flatten(), Doubled(56, 8), nn.ReLU(), nn.Linear(8, 3)), train),
        None, (0, 1, 3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("make, mask_layer, layers", AS_THEY_ARE.values(), ids=AS_THEY_ARE)
def test_models_are_taken_as_they_are(convolved, train, make, mask_layer, layers):
    torch.manual_seed(0)
    model = make(copy.deepcopy(convolved), train)
    before, carried = state_of(model), Mask.on(model)
    retain_before = scores(copy.deepcopy(model).float().eval(), TEST, 1)[1]
    mask = unlearn(model, train.images, train.labels, 1, patient_gcn(step=8), mask_layer=mask_layer, **FREE)
    assert is_as_it_was(before, model)
    assert tuple(sorted(mask.layers)) == layers and (carried is None or mask.includes(carried))
    assert forgets(model, mask, retain_before)


@pytest.mark.parametrize("mask_layer", ["auto", None, -1])
def test_of_a_model_that_cannot_be_traced_the_last_linear_layers_are_masked(convolved, train, mask_layer, recwarn):
    model = Untraceable()
    model.load_state_dict(convolved.state_dict())
    mask = unlearn(model, train.images, train.labels, 1, patient_gcn(), mask_layer=mask_layer, **FREE)
    assert mask.layers == (2,) and forgets(model, mask, scores(model, TEST, 1)[1])
    line = f"mask_layer {mask_layer}: of layers [2] alone, as it cannot be run node by node: torch.fx cannot trace it"
    said = [str(each.message) for each in recwarn.list]
    assert len(said) == (mask_layer is None) and all(each.startswith(line) for each in said)
    assert all(each.filename == __file__ for each in recwarn.list)


@pytest.mark.parametrize("every, says", [(20, "another mask_layer, of fewer weights,"), (1, "fewer samples")])
def test_a_request_that_takes_much_memory_says_so(convolved, train, every, says, monkeypatch):
    monkeypatch.setattr("mimu.unlearning.forgetting.MEMORY", 5e-5)
    gcn, some = patient_gcn(step=8), train[torch.arange(0, len(train.labels), every)]
    with pytest.warns(UserWarning, match=rf"the request takes about \S+ GB of memory: {says} would take less"):
        unlearn(convolved, some.images, some.labels, 1, gcn, mask_layer=1, **FREE)


# What is given for the samples of class 1 in tensors (images, labels).
SAMPLES = {
    "lists": lambda x, y: (x.tolist(), y.tolist(), 1),
    "lists of tensors": lambda x, y: (list(x), [label.item() for label in y], 1),
    "arrays": lambda x, y: (x.view(-1, 1, 7).numpy(), y.numpy().astype("uint8"), np.int64(1)),
    "other arrays": lambda x, y: (x.numpy().astype("float64"), y.numpy().astype(">i2"), torch.tensor(1)),
    "data set": lambda x, y: (TensorDataset(x, y), None, 1),
    "pairs": lambda x, y: ([(image.numpy(), int(label)) for image, label in zip(x, y)], None, 1),
    "loader": lambda x, y: (DataLoader(TensorDataset(x, y.short()), 32), 1),
    "shuffled": lambda x, y: (DataLoader(TensorDataset(x, y.short()), 32, shuffle=True), 1),
}


@pytest.mark.parametrize("case", SAMPLES)
def test_samples_are_taken_as_people_have_them(model, train, case):
    gcn = patient_gcn(group_size=3)  # so that the draw matters
    plain = unlearn(model, train.images, train.labels, 1, gcn, **FREE)
    given, state = SAMPLES[case](train.images, train.labels), torch.get_rng_state()
    mask = unlearn(model, *given, gcn=gcn, **FREE)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(mask.as_tensor(), plain.as_tensor()) == (case != "shuffled")
    with mask.applied_to(model):
        assert scores(model, TEST, 1)[0] < 5


def test_a_class_that_is_not_classified_in_the_first_place_is_said_and_needs_no_mask(model, train):
    weak = copy.deepcopy(model)
    [each for each in weak.modules() if isinstance(each, nn.Linear)][-1].bias.data[1] -= 100
    with pytest.warns(UserWarning, match="class 1 is not classified in the first place: there is no mask"):
        mask = unlearn(weak, train.images, train.labels, 1, patient_gcn(), **FREE)
    assert mask.num_zeroed == 0 and mask.forgets == (1,)


TYPES = {"float64": torch.float64, "bfloat16": torch.bfloat16}
MODES = {"inference": torch.inference_mode, "no_grad": torch.no_grad, "autocast": lambda: torch.autocast("cpu")}


@pytest.mark.parametrize("case", [*TYPES, *MODES, "default", "gcn"])
def test_types_and_modes_of_pytorch_are_taken_as_they_are(model, train, case):
    plain = unlearn(model, train.images, train.labels, 1, patient_gcn(), **FREE).as_tensor()
    dtype, gcn = TYPES.get(case, torch.float32), patient_gcn()
    model = model.to(dtype)
    if case == "gcn":
        gcn.gcn.double()
    default = torch.float64 if case == "default" else torch.float32
    torch.set_default_dtype(default)
    try:
        with MODES.get(case, torch.enable_grad)():
            mask = unlearn(model, train.images.clone(), train.labels.clone(), 1, gcn, **FREE)
        assert torch.get_default_dtype() == default
    finally:
        torch.set_default_dtype(torch.float32)
    assert case == "bfloat16" or torch.equal(mask.as_tensor(), plain)
    with mask.applied_to(model):
        correct = model(TEST.images.to(dtype)).argmax(1) == TEST.labels
    assert correct[TEST.labels == 1].float().mean() < 0.05


def test_unlearning_takes_any_layer_scorer_and_gcn_of_ones_own(model, train):
    in_thirties = patient_gcn(step=30, target=50.0)
    assert unlearn(model, train.images, train.labels, 1, in_thirties, **FREE).num_zeroed % 30 == 0
    gcns = None, TrainedGCN.load().gcn, MaskingGCN(15, 8, 1)
    ask = functools.partial(unlearn, model, train.images, train.labels, 1, mask_layer=0, **FREE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        masks = [ask(gcn).as_tensor() for gcn in gcns] + [ask(scorer="saliency").as_tensor()]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[1], masks[2]) and not torch.equal(masks[1], masks[3])


def test_unlearning_says_when_the_class_is_not_forgotten(model, train, recwarn):
    ask = functools.partial(unlearn, model, train.images, train.labels, 1, **FREE)
    ask(patient_gcn())
    assert not recwarn.list
    assert ask(patient_gcn(max_kappa=2)).num_zeroed == 2
    (said,) = (str(each.message) for each in recwarn.list)
    assert said.endswith(" % of class 1 are left after 2 zeroed weights") and float(said.split()[0]) > 1


def test_what_the_others_lose_is_measured_and_too_much_of_it_is_an_error_with_the_best_mask_within(model, train):
    before = state_of(model)
    ask = functools.partial(unlearn, model, train.images, train.labels, 1, patient_gcn(step=60), mask_layer=0)
    free = ask(**FREE)
    with pytest.raises(
        RetainScoreError, match=r"the classes to keep lose .* \(max_fall 1.0\), one of them .*"
    ) as raised:
        ask(max_fall=1.0)
    assert is_as_it_was(before, model)

    def by_class(mask: Mask | None) -> dict[int, float]:
        changed = copy.deepcopy(model)
        if mask is not None:
            mask.apply(changed)
        return {label: scores(changed, train, label)[0] for label in range(NUM_CLASSES)}

    error = raised.value
    assert error.before == pytest.approx(by_class(None)) and error.after == pytest.approx(by_class(free))
    lost = np.mean([error.before[c] - by_class(error.mask)[c] for c in (0, 2)])
    assert lost <= 1 < np.mean([error.before[c] - error.after[c] for c in (0, 2)])
    assert error.mask.num_zeroed < free.num_zeroed and free.includes(error.mask)


@pytest.mark.parametrize("permanent", [False, True])
@pytest.mark.parametrize("order", [(0, 3), (3, 0), None])
def test_several_classes_are_forgotten_together_or_in_a_row(train, order, permanent):
    torch.manual_seed(1)
    split = random_split(200, num_classes=5)
    model = nn.Sequential(nn.Linear(7, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 5))
    model, test = trained(model, split), random_split(100, seed=1, num_classes=5)
    ask = functools.partial(unlearn, model, gcn=patient_gcn(step=4), **FREE)
    steps = [order] if order is None else order
    for step in steps:
        mask = ask(split.images, split.labels, [0, 3] if step is None else step)
        mask.apply(model, permanent)
    assert set(mask.forgets) == {0, 3} or permanent
    assert all(scores(model, test, label)[0] < 3 for label in (0, 3))
    assert np.mean([scores(model, test, label)[0] for label in (1, 2, 4)]) > 95
    if not permanent:
        kept = split[(split.labels != 0) & (split.labels != 3)]
        again = ask(kept.images, kept.labels, 0)
        assert torch.equal(again.as_tensor(), mask.as_tensor()), "nothing is left to be done, and no sample needed"


def test_masks_combine_take_the_place_of_what_they_include_and_come_off(model):
    before = state_of(model)
    one, other = (Mask((layer,), (torch.ones(shape).triu(k),), (label,)) for layer, shape, k, label in
                  ((1, (12, 16), 1, 0), (2, (3, 12), 0, 2)))  # fmt: skip
    both = one & other & one
    assert both.layers == (1, 2) and both.forgets == (0, 2) and both.num_zeroed == one.num_zeroed + other.num_zeroed
    one.apply(model)
    with pytest.raises(ValueError, match=r"the model carries Mask\(layer 1: .*\): take it off first, or apply mask &"):
        other.apply(model)
    with pytest.raises(ValueError, match="layer 2 carries no mask"):
        both.remove(model)
    with pytest.raises(ValueError, match="layer 1 carries another mask"):
        Mask((1,), (torch.ones(12, 16),)).remove(model)
    assert torch.equal(Mask.on(model).as_tensor(), one.as_tensor()) and Mask.on(model).forgets == (0,)
    both.apply(model)
    assert torch.equal(Mask.on(model).as_tensor(), both.as_tensor())
    with pytest.raises(RuntimeError, match=r"save model.state_dict\(\), and the mask by mask.save"):
        torch.save(model, io.BytesIO())
    both.remove(model)
    assert is_as_it_was(before, model) and Mask.on(model) is None
    torch.save(model, io.BytesIO())
    with pytest.raises(ValueError, match=r"of layer 1 these have \(12, 16\) and \(2, 2\)"):
        one & Mask((1,), (torch.ones(2, 2),))


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("does", ["apply", "permanent", "remove"])
def test_a_mask_goes_on_and_comes_off_whole_or_not_at_all(model, does, at, monkeypatch):
    mask = Mask((0, 1, 2), (torch.zeros(16, 7), torch.zeros(12, 16), torch.zeros(3, 12)))
    carried = mask if does == "remove" else Mask((1,), (torch.zeros(12, 16),))
    carried.apply(model)
    name = {"apply": "register_parametrization", "remove": "remove_parametrizations"}.get(does)
    place = "torch.Tensor.masked_fill_" if name is None else f"torch.nn.utils.parametrize.{name}"
    does_it = torch.Tensor.masked_fill_ if name is None else getattr(torch.nn.utils.parametrize, name)
    before, calls = state_of(model), []

    def fails(*arguments, **named):
        calls.append(arguments)
        if len(calls) == at + 1:
            raise KeyboardInterrupt
        return does_it(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(place, fails)
        with pytest.raises(KeyboardInterrupt):
            mask.remove(model) if does == "remove" else mask.apply(model, does == "permanent")
    now = state_of(model)
    assert all(torch.equal(now[0][each], before[0][each]) for each in before[0]) and len(now[0]) == len(before[0])
    assert Mask.on(model).layers == carried.layers
    carried.remove(model)
    assert Mask.on(model) is None and [type(each) for each in model[1::2]] == [nn.Linear] * 3


def test_masks_of_copies_tied_weights_and_layers_with_more_than_weights(model, train):
    mask = Mask((1,), (torch.ones(12, 16).tril(),))
    before = state_of(model)
    mask.apply(model)
    copied = copy.deepcopy(model)
    mask.remove(copied)
    assert Mask.on(model) is not None and torch.isfinite(model(train.images)).all()
    mask.remove(model)
    assert is_as_it_was(before, model) and is_as_it_was(before, copied)
    prune.l1_unstructured(model[3], "bias", 2)
    before = state_of(model)
    with mask.applied_to(model):
        pass
    assert is_as_it_was(before, model)
    both = tied(None)
    both[0].weight = both[2].weight
    mask = Mask((1,), (torch.ones(7, 7).tril(),))
    with pytest.raises(ValueError, match=r"layers \[1\] share their weights"):
        mask.apply(both, permanent=True)
    mask.apply(both)


ONES = torch.ones(2, 2)


@pytest.mark.parametrize(
    "made_of",
    [
        ((1, 1), (ONES, ONES)), ((True,), (ONES,)), ((-1,), (ONES,)), ((), ()), ((1,), ()), ((1,), (ONES,), ("cat",)),
        ((1,), (ONES / 2,)), ((1,), (ONES * torch.nan,)), ((1,), (torch.ones(4),)), ((1,), (torch.ones(0, 4),)),
    ],
)  # fmt: skip
def test_what_is_no_mask_is_refused(made_of):
    with pytest.raises(ValueError, match="a mask must have"):
        Mask(*made_of)


class OfBytes(nn.Module):
    """A model that is given the numbers from 0 to 255 as bytes, and changes itself when it runs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.calls = model, 0
        self.register_buffer("mean", torch.zeros(7))

    def forward(self, x):
        self.calls += 1
        self.mean = self.mean + x.float().mean(0)
        scaled = x.float() if x.is_floating_point() else (x.float() - 128) / 20
        return self.model(scaled)


def test_inputs_are_given_as_they_are_and_the_model_is_not_run_itself(model, train):
    images = (train.images * 20 + 128).clamp(0, 255).byte()
    of_bytes = OfBytes(model).train()
    before = state_of(of_bytes)
    mask = unlearn(of_bytes, images.numpy(), train.labels, 1, patient_gcn(), **FREE)
    assert is_as_it_was(before, of_bytes) and of_bytes.calls == 0
    with mask.applied_to(model):
        assert scores(model, TEST, 1)[0] < 8


def test_samples_that_the_model_does_not_know_are_told_of(train):
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=r"the model classifies .* % of the samples correctly as it is") as warned:
        unlearn(stack(), train.images, train.labels, 1, patient_gcn(), **FREE)
    assert warned[0].filename == __file__


def test_a_mask_says_of_the_classes_that_it_forgets_those_alone_that_are_forgotten(model, train):
    with pytest.warns(UserWarning, match="of class 0 are left, .* of class 2 are left after 2 zeroed"):
        mask = unlearn(model, train.images, train.labels, [0, 2], patient_gcn(max_kappa=2), **FREE)
    assert mask.forgets == ()


def with_weight(value: float, name: str = "3.weight"):
    def change(model):
        model.get_parameter(name).data.view(-1)[5] = value

    return change


def with_input(value: float, row: int):
    return lambda images, labels: (images.index_put((torch.tensor(row), torch.tensor(3)), torch.tensor(value)), labels)


def extended(*layers: nn.Module):
    return lambda model: nn.Sequential(*model, *layers)


class Returning(nn.Module):
    def __init__(self, model: nn.Module, change) -> None:
        super().__init__()
        self.model, self.change = model, change

    def forward(self, x):
        return self.change(self.model(x))


def returning(change):
    return lambda model: Returning(model, change)


def tied(model):
    return nn.Sequential(nn.Linear(7, 7), nn.ReLU(), (twice := nn.Linear(7, 7)), nn.ReLU(), twice)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def replaced(index: int, make):
    def change(model):
        model[index] = make(model[index])
        return model

    return change


def pruned(layer):
    return prune.random_unstructured(layer, "weight", 0.3)


class Failing(nn.Module):
    def forward(self, x):
        self.train()
        raise KeyError("inside")


GCN_OF_NAN = MaskingGCN(15, 8, 1)
GCN_OF_NAN.readout.weight.data[0, 3] = torch.nan


def wrong(argument: str, values: list, line: str) -> dict:
    """Values of an argument that cannot work, and the line that says of each so."""
    texts = {repr(value): value for value in values}
    return {f"{argument} {text}": (None, None, {argument: texts[text]}, line.format(re.escape(text))) for text in texts}


# What is changed of (model, samples, further arguments), and the line.
WRONG = {
    **wrong("forget_class", [3, -1], r"must be from 0 to 2, not 0 to 2 and \[{}\]"),
    **wrong("forget_class", [1.5, None, "cat", []], "forget_class must be a class, from 0 to 2, .*, not {}"),
    **wrong("forget_class", [[0, 1, 2]], "there must be classes to keep beside {}"),
    **wrong(
        "mask_layer",
        [3, -4, [1, 1], [], "last", True, 1.0],
        r"mask_layer must be auto, None, or some of 0 \('1'\), .*; not {}",
    ),
    **wrong("gcn", ["gcn.pt"], "gcn must be a MaskingGCN, a TrainedGCN or None, not {}"),
    "gcn features": (None, None, {"gcn": MaskingGCN(9, 8, 1)}, "how many there are, must be .* 9.*, not .*, 15"),
    "gcn nan": (None, None, {"gcn": GCN_OF_NAN}, "gcn: a weight is not a finite number"),
    **wrong("scorer", ["random"], "scorer must be gcn or saliency, not {}"),
    **wrong("max_fall", [-1], "max_fall must be a number of points above 0, or None, not {}"),
    **wrong("max_class_fall", ["5"], "max_class_fall must be a number of points above 0, or None, not {}"),
    "float labels": (None, lambda x, y: (x, y.float()), {}, r"labels must be integers of shape \(600,\), .*float32 of"),
    "bool labels": (None, lambda x, y: (x, y > 0), {}, "labels must be integers .* not torch.bool"),
    "labels too few": (None, lambda x, y: (x, y[:-1]), {}, r"labels must be integers of shape \(600,\), .* \(599,\)"),
    "one-hot": (None, lambda x, y: (x, torch.eye(3)[y].int()), {}, r"labels must be .* not torch.int32 of \(600, 3\)"),
    "labels from 1": (None, lambda x, y: (x, y + 1), {}, r"must be from 0 to 2, not 1 to 3"),
    "labels negative": (None, lambda x, y: (x, y - 1), {}, r"must be from 0 to 2, not -1 to 1"),
    "a single class": (None, lambda x, y: (x, y * 0 + 1), {}, r"samples of every class, not none of \[0, 2\]"),
    "a class missing": (None, lambda x, y: (x[y > 0], y[y > 0]), {}, r"samples of every class, not none of \[0\]"),
    "no samples": (None, lambda x, y: (x[:0], y[:0]), {}, r"inputs must be samples, .* not of shape \(0, 7\)"),
    "one number": (None, lambda x, y: (3.0, y), {}, r"inputs must be samples, \(samples, ...\), not of shape \(\)"),
    "inputs text": (None, lambda x, y: ("images", y), {}, "inputs must be a tensor, an array or a list, not str"),
    "inputs None": (None, lambda x, y: (None, y), {}, "inputs must be a tensor, an array or a list, not NoneType"),
    "ragged": (None, lambda x, y: ([[1.0], [1.0, 2.0]], [0, 1]), {}, "inputs must be a tensor, an array or a list"),
    "complex": (None, lambda x, y: (x + 1j, y), {}, "inputs must be real numbers in a dense .* not torch.complex64"),
    "no labels": (None, lambda x, y: (x, None), {}, "inputs must be a DataLoader or a data set of pairs"),
    "no pairs": (None, lambda x, y: (TensorDataset(x, y, y), None), {}, "must be a DataLoader or a data set of pairs"),
    "iterator": (None, lambda x, y: (iter([1]), None), {}, "must be a DataLoader or a data set of pairs"),
    "nan early": (None, with_input(torch.nan, 3), {}, r"inputs\[3\] is not finite"),
    "nan late": (None, with_input(torch.nan, 350), {}, r"inputs\[350\] is not finite"),
    "infinite": (None, with_input(torch.inf, 350), {}, r"inputs\[350\] is not finite"),
    "1e30": (None, with_input(1e30, 350), {}, r"inputs\[350\] is not finite, or too large to be squared"),
    "wrong width": (None, lambda x, y: (x[:, :5], y), {}, r"model: fails on inputs of shape \(64, 5\)"),
    "weight nan": (with_weight(torch.nan), None, {}, "model: 3.weight has numbers that are not finite"),
    "bias infinite": (with_weight(torch.inf, "3.bias"), None, {}, "model: 3.bias has numbers"),
    "no module": (lambda model: model.forward, None, {}, "model must be a torch.nn.Module, not method"),
    "no linear": (lambda model: nn.Conv1d(1, 2, 3), None, {}, "must have layers of torch.nn.Linear, .*Conv1d has none"),
    "softmax": (extended(nn.Softmax(1)), None, {}, "but ends in layer '6': Softmax: give it without"),
    "log-softmax": (extended(nn.LogSoftmax(1)), None, {}, "but ends in layer '6': LogSoftmax"),
    "functional softmax": (returning(lambda x: x.softmax(1)), None, {}, "ends in a computation outside of its modules"),
    "a tuple": (returning(lambda x: (x, x)), None, {}, "model must return logits, .*, not tuple"),
    "a dict": (returning(lambda x: {"logits": x}), None, {}, "model must return logits, .*, not dict"),
    "one column": (returning(lambda x: x[:, 0]), None, {}, r"must return logits, .*, not a tensor \(64,\)"),
    "nan logits": (returning(lambda x: x / 0 * 0), None, {}, r"logits\[0\] is not finite, .*, though inputs"),
    "fails": (lambda model: nn.Sequential(Failing(), *model), None, {}, "model: fails on inputs .*inside"),
    "tied": (tied, None, {}, "layer '2' is called 2 times"),
    "not linear": (replaced(5, lambda layer: Doubled(12, 3)), None, {}, "do more than linear layers do"),
    "lazy": (replaced(3, lambda layer: nn.LazyLinear(12)), None, {}, "model: 3.weight has no numbers yet"),
    "meta": (replaced(3, lambda layer: nn.Linear(16, 12, device="meta")), None, {}, "3.weight has no numbers"),
    "weight_norm": (replaced(3, parametrizations.weight_norm), None, {}, "layer 1 has no plain weight, but what torch"),
    "spectral_norm": (replaced(3, parametrizations.spectral_norm), None, {}, "layer 1 has no plain weight"),
    "pruned": (replaced(3, pruned), None, {}, "layer 1 has no plain weight"),
    "pruned, all": (
        replaced(5, pruned), None, {"mask_layer": None},
        "layer 2 has no plain weight, .* by prune.remove",
    ),
    "untraceable": (
        lambda model: Untraceable(), None, {"mask_layer": 0},
        r"some of 2 \('end.1'\), the linear layers in a row that .* ends in \(it cannot be run .*\); not 0",
    ),
    "grouped": (lambda model: Convolved(), None, {"mask_layer": 3}, "1 .'inner'., 2 .'end.1'., each once; not 3"),
    "called twice": (
        lambda model: Convolved(twice := nn.Conv2d(8, 8, 1), twice, nn.Flatten(), nn.Linear(56, 3)), None,
        {"mask_layer": 2}, r"0 \('first'\), 1 \('inner'\), 3 \('end.3'\), each once; not 2",
    ),
    "softmax of kernels": (
        lambda model: nn.Sequential(ending_in_pooling(), nn.Softmax(1)), None, {}, "but ends in layer '1': Softmax",
    ),
    "kernel weight_norm": (
        lambda model: parametrizations.weight_norm((own := Convolved()).inner) and own, None,
        {"mask_layer": 1, "gcn": TrainedGCN.load()}, "layer 1 has no plain weight",
    ),
    "kernel pruned": (
        lambda model: pruned((own := Convolved()).inner) and own, None, {"mask_layer": 1, "gcn": TrainedGCN.load()},
        "layer 1 has no plain weight",
    ),
    "another size": (lambda model: Convolved(), lambda x, y: (x[:, :5], y), {}, r"fails on inputs of .*\(64, 5\)"),
}  # fmt: skip


@pytest.mark.parametrize("change, made_of, arguments, line", WRONG.values(), ids=WRONG)
@pytest.mark.filterwarnings("ignore:.*LazyLinear|.*Lazy modules")
def test_what_cannot_work_is_one_line_and_leaves_the_model_as_it_was(model, train, change, made_of, arguments, line):
    model = (change and change(model)) or model
    inputs, labels = (made_of or (lambda x, y: (x, y)))(train.images, train.labels)
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    is_plain = parameters and not any(nn.parameter.is_lazy(each) or each.is_meta for each in parameters)
    before = state_of(model) if is_plain else None
    with pytest.raises(ValueError, match=line) as raised:
        unlearn(model, inputs, labels, **{"forget_class": 1} | arguments)
    assert "\n" not in str(raised.value)
    assert before is None or is_as_it_was(before, model)


def test_layers_that_carry_something_else_may_stand_beside_masked_ones(model, train):
    pruned(model[5])
    parametrizations.weight_norm(model[1])
    before = state_of(model)
    mask = unlearn(model, train.images, train.labels, 1, patient_gcn(), **FREE)
    assert mask.layers == (1,) and is_as_it_was(before, model)
    with mask.applied_to(model):
        assert scores(model, TEST, 1)[0] < 5
