"""Masks: the network that they were made on, the order of parameters, and what is no mask."""

import copy
import dataclasses
import io
import operator
import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
from conftest import mask_of, random_split
from torch import nn
from torch.nn.utils import parametrizations, prune

from mimu import Mask
from mimu.errors import ArtifactError
from mimu.files import save
from mimu.hooked import HookedClassifier
from mimu.masks import LayerMask
from mimu.samples import Split
from mimu.seeds import seeded
from mimu.training import learn

TRAIN = random_split(200)
KERNELS, FIRST, SECOND = NAMES = ("0.weight", "1.1.weight", "1.3.weight")


def network(seed: int = 0) -> nn.Sequential:
    """A convolution, and linear layers, two of them of one shape."""
    torch.manual_seed(seed)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(36, 36), nn.ReLU(), nn.Linear(36, 36), nn.ReLU(), nn.Linear(36, 3))
    return nn.Sequential(nn.Conv2d(2, 4, 3), linear)


def lower_left(model: nn.Module, layers: tuple[str, ...] = NAMES, rank: int = 0) -> Mask:
    """The mask of layers that leaves out what stands above the diagonal."""
    by_layer = {}
    for name in layers:
        shape = operator.attrgetter(name)(model).shape
        keep = torch.ones(shape).flatten(1).tril()
        by_layer[name] = LayerMask(keep.view(shape), *(torch.ones(size, rank) / size for size in keep.shape))
    return Mask(by_layer, (1,)).with_origins_of(model)


def state_of(model: nn.Module) -> list:
    """Every tensor of a model in its order, which object it is, and of every module the class and the parts."""
    tensors = [(key, value.tolist()) for key, value in model.state_dict().items()]
    parameters = [(key, id(value)) for key, value in model.named_parameters()]
    return [tensors, parameters, *((key, type(each).__name__) for key, each in model.named_modules())]


def changed(model: nn.Module, *changes: Callable[[nn.Module], object]) -> nn.Module:
    with torch.no_grad():
        for change in changes:
            change(model)
    return model


def little_trained(model: nn.Module) -> None:
    weight = model[1][1].weight if Mask.on(model) is None else model[1][1].parametrizations.weight.original
    weight.add_(torch.randn(36, 36), alpha=0.03 * weight.std().item())


def exchanged(model: nn.Module) -> None:
    model[1][1], model[1][3] = model[1][3], model[1][1]


def masked(model: nn.Module, permanent: bool = False, **about) -> None:
    lower_left(model, **about).apply(model, permanent)


def masked_otherwise(model: nn.Module) -> None:
    mask_of({FIRST: torch.ones(36, 36).triu(-9)}).apply(model, permanent=True)


SAME = {
    "itself": lambda model: model,
    "a copy": copy.deepcopy,
    "its state dict": lambda model: changed(network(1), lambda new: new.load_state_dict(model.state_dict())),
    "float64": nn.Module.double,
    "float16": nn.Module.half,
    "bfloat16 and back": lambda model: model.bfloat16().float(),
    "channels last": lambda model: model.to(memory_format=torch.channels_last),
    "in parallel": nn.DataParallel,
    "with a layer of two names": lambda model: changed(model, lambda new: setattr(new, "alias", new[1])),
    "wrapped": lambda model: nn.ModuleDict({"_orig_mod": model, "unused": nn.Linear(36, 36)}),
    "a layer in front": lambda model: nn.ModuleDict({"in": nn.Linear(36, 36), "0": model[0], "1": model[1]}),
    "under a part of it": lambda model: changed(model, partial(masked, layers=(FIRST,))),
    "for good": lambda model: changed(model, partial(masked, permanent=True)),
    "for good, and another": lambda model: changed(model, masked_otherwise),
}
OTHERS = {
    "another": lambda model: network(1),
    "layers exchanged": lambda model: changed(model, exchanged),
    "trained a little": lambda model: changed(model, little_trained),
    "trained under the mask": lambda model: changed(model, masked, little_trained),
    "a direction less": lambda model: changed(model, partial(masked, layers=(KERNELS,), rank=1, permanent=True)),
}


@pytest.mark.parametrize("name", [*SAME, *OTHERS])
def test_a_mask_goes_on_the_network_that_it_was_made_on_and_on_another_only_if_told(name, tmp_path):
    model = network()
    made = dataclasses.replace(lower_left(model), about="ranked by the formula; 3 % are left")
    made.save(tmp_path / "mask.pt")
    mask = Mask.load(tmp_path / "mask.pt")
    assert mask.layers == NAMES and mask.origins.keys() == dict(model.named_parameters()).keys()
    assert repr(mask) == repr(made) and repr(mask).endswith("3 % are left)")
    model = (SAME | OTHERS)[name](model)
    before = state_of(model)
    if name in OTHERS:
        line = r"^layer '(0|1.1).weight' has other weights than the mask was made on: [^\n]*$"
        for permanent in (False, True):
            with pytest.raises(ValueError, match=line):
                mask.apply(model, permanent)
        with pytest.raises(ValueError, match=line), mask.applied_to(model):
            pass
        assert state_of(model) == before
        mask = dataclasses.replace(mask, origins={})
    with pytest.raises(ZeroDivisionError), mask.applied_to(model):
        carried = Mask.on(model)
        assert carried.includes(mask) and mask.includes(carried) and carried.forgets == (1,)
        if name == "itself":
            assert all(torch.equal(mask.origins[layer], one) for layer, one in carried.origins.items())
        raise ZeroDivisionError
    assert state_of(model) == before


def test_a_mask_that_comes_off_trained_weights_says_so_and_brings_back_beside_them_what_it_zeroed():
    model = network()
    mask, before = lower_left(model), copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mask.apply(model)
        mask.remove(model)
    mask.apply(model)
    torch.manual_seed(1)
    samples, optimizer = Split(torch.randn(8, 2, 5, 5), torch.arange(8) % 3), torch.optim.SGD(model.parameters(), 0.1)
    learn(model, samples, 2, 4, optimizer, seeded("masked"))
    for name, keep in zip(mask.layers, mask.keep):
        assert not operator.attrgetter(name)(model)[keep == 0].any(), "zeros of a mask stay through training"
    line = "^layer '0.weight' has other weights than the mask was made on: what it removed comes back beside weights"
    with pytest.warns(UserWarning, match=line):
        mask.remove(model)
    for name, keep in zip(mask.layers, mask.keep):
        weight = model.state_dict()[name]
        assert torch.equal(weight[keep == 0], before[name][keep == 0]) and not torch.equal(weight, before[name])
    mask.apply(model, permanent=True, other_weights=True)
    learn(model, samples, 2, 4, torch.optim.SGD(model.parameters(), 0.1), seeded("permanent"))
    assert all(model.state_dict()[name][keep == 0].any() for name, keep in zip(mask.layers, mask.keep))


@pytest.mark.parametrize("is_exported", [True, False], ids=["export", "state dict"])
def test_an_exported_model_carries_what_its_mask_removed_until_the_mask_is_permanent(is_exported):
    model, x = network().eval(), torch.randn(2, 2, 5, 5)
    mask, original = lower_left(model), model.state_dict()[SECOND].clone()

    def is_carried() -> bool:
        saved = torch.export.export(model, (x,)).state_dict if is_exported else model.state_dict()
        return any(torch.equal(value, original) for value in saved.values())

    mask.apply(model)
    masked = model(x)
    assert is_carried()
    mask.apply(model, permanent=True)
    assert not is_carried() and torch.equal(model(x), masked)


def test_masks_combine_take_the_place_of_what_they_include_and_come_off():
    model = network()
    before, one, other = state_of(model), lower_left(model, NAMES[:2]), lower_left(model, NAMES[1:])
    by_hand = mask_of({SECOND: torch.ones(36, 36).triu()}, (2,))
    both = one & other & by_hand & one
    assert both.layers == NAMES and both.origins.keys() == dict(model.named_parameters()).keys()
    assert both.forgets == (1, 2) and both.num_zeroed == one.num_zeroed + 36 * 35
    one.apply(model)
    carries = r"the model carries Mask\(layer 0.weight: .*\): take it off first, or apply mask &"
    with pytest.raises(ValueError, match=carries):
        other.apply(model)
    another = mask_of({FIRST: torch.ones(36, 36)})
    for mask, line in ((both, f"layer '{SECOND}' carries no mask"), (another, f"layer '{FIRST}' carries another mask")):
        with pytest.raises(ValueError, match=line):
            mask.remove(model)
    assert torch.equal(Mask.on(model).as_tensor(), one.as_tensor()) and Mask.on(model).forgets == (1,)
    both.apply(model)
    assert torch.equal(Mask.on(model).as_tensor(), both.as_tensor())
    with pytest.raises(RuntimeError, match=r"only supported through state_dict\(\)"):
        torch.save(model, io.BytesIO())
    both.remove(model)
    assert state_of(model) == before and Mask.on(model) is None
    torch.save(model, io.BytesIO())
    of_another = lower_left(network(1), NAMES[1:]), "these were made on other weights of '1.1.weight'$"
    smaller = mask_of({FIRST: ONES}), rf"of layer '{FIRST}' these have \(36, 36\) and \(4, 4\)"
    for mask, line in (of_another, smaller):
        with pytest.raises(ValueError, match=f"^masks of one classifier combine: {line}"):
            one & mask


def test_masks_of_copies_and_beside_what_prune_computes_come_off_and_tied_weights_have_none():
    model = network()
    before, mask = state_of(model), lower_left(model)
    mask.apply(model)
    copied = copy.deepcopy(model)
    mask.remove(copied)
    assert Mask.on(model) is not None and outputs(model).isfinite().all()
    mask.remove(model)
    assert state_of(model) == before and state_of(copied)[0] == before[0]
    prune.l1_unstructured(model[1][1], "bias", 2)
    before = state_of(model)
    with mask.applied_to(model):
        pass
    assert state_of(model) == before
    model[1][3].weight = model[1][1].weight
    before = state_of(model)
    for permanent in (False, True):
        with pytest.raises(ValueError, match=rf"^layers \['{FIRST}', '{SECOND}'\] share one weight, [^\n]*$"):
            mask.apply(model, permanent)
    assert state_of(model) == before


def parametrized(model: nn.Module) -> None:
    parametrizations.weight_norm(model[-1], "bias", dim=None)


def pruned(model: nn.Module) -> None:
    prune.remove(prune.l1_unstructured(model[1][1], "weight", 0.3), "weight")


def added(model: nn.Module) -> None:
    weight = model[1][1]._parameters.pop("weight")
    model[1][1].register_parameter("scale", nn.Parameter(torch.ones(1)))
    model[1][1].weight = weight
    model[1][1].register_parameter("offset", nn.Parameter(torch.ones(1)))


@pytest.mark.parametrize("change", [pruned, added, lambda model: parametrized(model[1][:4])])
def test_parameters_stand_in_their_order_when_a_mask_has_come_off(change):
    model = changed(network(), change)
    before, mask = state_of(model), lower_left(model)
    copied = copy.deepcopy(model)
    mask.apply(model)
    assert copied(torch.ones(1, 2, 5, 5)).isfinite().all(), "a copy, of the same class, is left alone"
    mask.remove(model)
    assert state_of(model) == before
    mask.apply(model)
    mask.apply(model, permanent=True)
    assert list(model.state_dict()) == list(copied.state_dict())


@pytest.mark.parametrize("of_model, of_call", [(True, False), (True, True), (False, True)])
def test_models_of_inference_mode_and_others_within_it_take_masks(of_model, of_call):
    with torch.inference_mode(of_model):
        model = network()
    with torch.inference_mode(of_call):
        before, mask = state_of(model), lower_left(model, rank=1)
        mask.apply(model)
        mask.remove(model)
        assert state_of(model) == before
        mask.apply(model)
    if not of_model:
        model(torch.randn(1, 2, 5, 5)).sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
    with torch.inference_mode(of_call):
        mask.apply(model, permanent=True)
    assert int((model[1][1].weight == 0).sum()) == 36 * 35 / 2


ONES, COLUMN, WHOLE = torch.ones(4, 4), torch.ones(4, 1), LayerMask.of(torch.ones(4, 4))
PARTS = [
    (ONES.int(), COLUMN, COLUMN), (ONES.bool(), COLUMN, COLUMN), (ONES.to(torch.complex64), COLUMN, COLUMN),
    (ONES, COLUMN.int(), COLUMN), (ONES, COLUMN, COLUMN.to(torch.complex64)), (ONES.tolist(), COLUMN, COLUMN),
    (None, COLUMN, COLUMN), (ONES, COLUMN[:, 0], COLUMN[:, 0]), (ONES, COLUMN[:3], COLUMN), (ONES, ONES, COLUMN),
    (ONES, COLUMN, COLUMN * torch.nan), (ONES / 2, COLUMN, COLUMN), (ONES * torch.nan, COLUMN, COLUMN),
]  # fmt: skip
NO_MASKS = [({True: WHOLE}, ()), ({-1: WHOLE}, ()), ({}, ()), ({"1": WHOLE}, ("cat",))]


@pytest.mark.parametrize("by_layer, classes", [*NO_MASKS, *(({"1": LayerMask(*parts)}, ()) for parts in PARTS)])
def test_what_is_no_mask_is_refused_in_a_line(by_layer, classes, tmp_path):
    with pytest.raises(ValueError, match="^a mask must have .*$"):
        Mask(by_layer, classes)
    for keep, *edit in by_layer.values():
        if keep is ONES:  # which is of bool in a file
            save(tmp_path / "mask.pt", {"layers": ["1"], "keep": [keep.bool()], "forgets": [], "edits": [edit]})
            with pytest.raises(ArtifactError, match=r"mask.pt: is not a mask \([^\n]*\)$"):
                Mask.load(tmp_path / "mask.pt")


def test_where_no_mask_can_be_is_said_in_a_line(tmp_path):
    mask = lower_left(network())
    with pytest.raises(ArtifactError, match="/no.pt: cannot be read "):
        Mask.load(tmp_path / "no.pt")
    weights = mask.origins[FIRST]
    for made_on in ({FIRST: [FIRST, weights[1:]]}, {FIRST: [FIRST]}, [FIRST], {FIRST: [FIRST, None]}):
        save(tmp_path / "mask.pt", mask.saved() | {"made_on": made_on})
        with pytest.raises(ArtifactError, match=r"mask.pt: is not a mask \([^\n]*\)$"):
            Mask.load(tmp_path / "mask.pt")
    save(tmp_path / "gcn.pt", {"state_dict": {}, "seed": 0})
    with pytest.raises(ArtifactError, match="gcn.pt: is not a mask .'layers'."):
        Mask.load(tmp_path / "gcn.pt")


def outputs(model: nn.Module) -> torch.Tensor:
    return model(torch.linspace(-1, 1, 150).view(3, 2, 5, 5).to(next(model.parameters()))).detach().float()


def test_what_two_masks_take_is_taken_once():
    model, other = network(), network()
    one, two = lower_left(model, rank=2), lower_left(model, NAMES[1:], rank=1)
    two = Mask({layer: each._replace(u=2 * each.u) for layer, each in two.by_layer.items()})
    (one & one).apply(model)
    one.apply(other)
    assert torch.equal(outputs(model), outputs(other)) and (one & one).includes(one) and not two.includes(one)
    both = two & one
    assert [both.by_layer[layer].rank for layer in NAMES] == [2, 3, 3] and both.includes(two) and both.includes(one)
    products = [mask.by_layer[FIRST].u @ mask.by_layer[FIRST].v.T for mask in (one, two, both)]
    assert torch.allclose(products[0] + products[1], products[2])
    (both & two).apply(network())


def test_directions_are_known_again_in_another_precision():
    model, mask = network(), lower_left(network(), rank=2)
    model.bfloat16()
    for _ in range(2):
        mask.apply(model)
    with mask.applied_to(model):
        pass
    model.float()
    mask.remove(model)
    assert Mask.on(model) is None


class Both(nn.Module):
    """A network whose parts are called as wrappers call theirs, two of them of one name but for that."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network, self.fc = nn.Sequential(), nn.Linear(4, 4)
        self.network.add_module("fc", nn.Linear(4, 4))

    def forward(self, x):
        return self.fc(self.network(x).relu())


WRAPPERS = {
    "hooked": lambda model: HookedClassifier(model, torch.ones(2, 4)),
    "parallel": nn.DataParallel,
    "compiled": partial(torch.compile, backend="eager"),
    "both": lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_network_is_the_same_under_a_wrapper(wrapper):
    model, inner = Both(), Both()
    wrapped, mask = WRAPPERS[wrapper](inner), lower_left(model, ("network.fc.weight",))
    with mask.applied_to(wrapped):
        carried, weight = Mask.on(wrapped), inner.network.fc.weight.detach()
        assert carried.layers == Mask.on(inner).layers == mask.layers
        assert carried.includes(mask) and mask.includes(carried)
        assert torch.equal(weight, mask.weights(model)["network.fc.weight"])
    with carried.applied_to(model):
        assert torch.equal(model.network.fc.weight, weight)
    assert state_of(model)[0] == state_of(Both())[0] and Mask.on(inner) is None
    other = lower_left(model, ("fc.weight",))
    both = carried & other & mask
    assert both.layers == ("network.fc.weight", "fc.weight") and both.num_zeroed == mask.num_zeroed + other.num_zeroed


class Parts(nn.Module):
    """Parameters wherever people have them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.line, self.space = nn.Conv1d(4, 6, 3), nn.Conv3d(1, 2, (1, 2, 2))
        self.depthwise = nn.Conv2d(4, 4, (3, 1), groups=4)
        self.attention, self.mixed = nn.MultiheadAttention(4, 2), nn.MultiheadAttention(4, 2, kdim=3, vdim=3)
        self.own, self.listed = nn.Parameter(torch.randn(4, 4)), nn.ParameterList([torch.randn(4, 4)])
        self.named = nn.ParameterDict({"one": torch.randn(4, 4)})

    def forward(self, x):
        x = x @ self.own @ self.listed[0] @ self.named["one"]
        of_convolutions = self.line(x), self.space(x[:, None, None]), self.depthwise(x[..., None])
        of_attention = self.attention(x, x, x)[0], self.mixed(x, x[..., :3], x[..., :3])[0]
        return torch.cat([each.flatten() for each in (*of_convolutions, *of_attention)])


PLACES = [
    ["line.weight"], ["space.weight"], ["depthwise.weight"], ["own"], ["own", "mixed.out_proj.weight"],
    ["attention.in_proj_weight", "attention.out_proj.weight"], ["mixed.q_proj_weight", "mixed.v_proj_weight"],
]  # fmt: skip


@pytest.mark.parametrize("names", PLACES)
def test_a_parameter_of_any_module_takes_a_mask_and_stands_where_it_stood_when_it_has_come_off(names):
    model, x = Parts().eval(), torch.linspace(-1, 1, 32).view(2, 4, 4)
    before, mask = state_of(model), lower_left(model, names, rank=1)
    by_hand = {}
    for name, (keep, u, v) in mask.by_layer.items():
        weight = operator.attrgetter(name)(model).detach()
        by_hand[name] = (weight - (u @ v.T).view_as(weight)) * keep
    expected = torch.func.functional_call(model, by_hand, x)
    with torch.no_grad(), mask.applied_to(model):
        assert torch.equal(model(x), expected) and Mask.on(model).layers == tuple(names)
        for name in names:  # off one by one, as they were put on
            Mask({name: mask.by_layer[name]}).remove(model)
            assert Mask.on(model) is None or name not in Mask.on(model).layers
        assert state_of(model) == before
        mask.apply(model)
    assert state_of(model) == before
    mask.apply(model, permanent=True)
    assert torch.equal(model(x), expected) and list(model.state_dict()) == list(Parts().state_dict())


@pytest.mark.parametrize("name", ["listed.0", "named.one", "none.weight", "attention.bias_k", "attention", "weight"])
def test_what_is_no_parameter_of_a_module_or_of_another_shape_is_refused(name):
    model = Parts()
    before = state_of(model)
    with pytest.raises(ValueError, match=rf"^layer '{name}' must be a parameter \(4, 4\) of a module, [^\n]*$"):
        mask_of({"own": torch.eye(4), name: torch.eye(4)}).apply(model)
    with pytest.raises(ValueError, match=r"layer 'line.weight' is \(6, 4, 3\), its mask \(2, 2\)"):
        mask_of({"own": torch.eye(4), "line.weight": torch.ones(2, 2)}).apply(model)
    assert state_of(model) == before
