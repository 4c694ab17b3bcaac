"""Masks: which weights of a classifier are switched off, and what is taken from them, apart from any classifier."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mimu.errors import ArtifactError, one_line
from mimu.files import load, save

SAMPLED = 256  # weights of a layer by which it is known again
PRECISION = 0.01  # of their norm, by which they may differ then: bfloat16 rounds by 0.002 at most


class Wrapper(nn.Module):
    """A module that runs another one, `network`. Masks go onto that one, under its own names."""

    network: nn.Module


class LayerMask(NamedTuple):
    """What a mask does to the weight W of one layer: (W - u v^T) * keep.

    It switches weights off, and takes directions from what the layer reads; of rank 0, u and v have no column.
    """

    keep: Tensor  # 1 or 0, in the shape of W
    u: Tensor  # (m, rank), W as a matrix (m, n)
    v: Tensor  # (n, rank)

    @staticmethod
    def of(keep: Tensor) -> LayerMask:
        """One that takes no direction."""
        m, n = keep.flatten(1).shape
        return LayerMask(keep, keep.new_zeros(m, 0), keep.new_zeros(n, 0))

    @property
    def rank(self) -> int:
        """How many directions it takes."""
        return self.u.shape[1]

    @property
    def num_zeroed(self) -> int:
        """How many weights it switches off."""
        return int((self.keep == 0).sum())

    def to(self, like: Tensor) -> LayerMask:
        """The same on the device and in the precision of a tensor."""
        return LayerMask(*(part.to(like) for part in self))

    def applied(self, weight: Tensor) -> Tensor:
        """(W - u v^T) * keep, in the shape of W."""
        if self.rank:
            weight = weight - (self.u @ self.v.T).view_as(weight)
        return weight * self.keep

    def takes(self, other: LayerMask) -> Tensor:
        """Which of the other's directions it takes, (rank of the other), in whatever precision."""
        own, its = (torch.cat([each.u, each.v]).T.float() for each in (self, other.to(self.keep)))
        return (torch.cdist(own, its) <= PRECISION * its.norm(dim=1)).any(0)

    def __and__(self, other: LayerMask) -> LayerMask:
        """What both do; what both take is taken once."""
        other, is_new = other.to(self.keep), ~self.takes(other)
        u = torch.cat([self.u, other.u[:, is_new]], 1)
        v = torch.cat([self.v, other.v[:, is_new]], 1)
        return LayerMask(self.keep * other.keep, u, v)

    def includes(self, other: LayerMask) -> bool:
        """Whether it switches off all that the other does, and takes each of its directions."""
        is_zeroed = bool((self.keep <= other.keep.to(self.keep)).all())
        return is_zeroed and (not other.rank or bool(self.takes(other).all()))

    def check(self) -> None:
        """Raises ValueError where the parts are not what they must be."""
        keep = self.keep
        if not all(isinstance(part, Tensor) and part.is_floating_point() for part in self):
            raise ValueError("a mask must have tensors of floating-point numbers alone")
        if not 2 <= keep.ndim <= 5 or not keep.numel() or not ((keep == 0) | (keep == 1)).all():
            raise ValueError("a mask must have matrices of 0 and 1 alone")
        m, n = keep.flatten(1).shape
        shapes, ranks = [tuple(self.u.shape), tuple(self.v.shape)], self.u.shape[1:]
        is_finite = self.u.isfinite().all() and self.v.isfinite().all()
        if shapes != [(m, *ranks), (n, *ranks)] or len(ranks) != 1 or not is_finite:
            raise ValueError(f"edits must be pairs of matrices (m, rank), (n, rank) of finite numbers, not {shapes}")


class WeightMask(nn.Module):
    """The parametrization of a weight by what a `LayerMask` does to it; order: of its owner's parameters before."""

    def __init__(self, mask: LayerMask, forgets: tuple[int, ...], order: list[str]) -> None:
        super().__init__()
        for name, part in mask._asdict().items():
            self.register_buffer(name, part.clone() if part.is_inference() else part)
        self.forgets, self.order = forgets, order

    @property
    def mask(self) -> LayerMask:
        return LayerMask(self.keep, self.u, self.v)

    def forward(self, weight: Tensor) -> Tensor:
        return self.mask.applied(weight)


class Weight(NamedTuple):
    """A parameter of a model: the module that owns it, and its name there.

    original: the parameter itself, without a mask; None where something else computes the weight
    carried: what is on it, if it is a mask and nothing else
    """

    owner: nn.Module
    name: str
    original: nn.Parameter | None
    carried: WeightMask | None

    def sampled(self) -> Tensor:
        """Some of its numbers, evenly spread, under no mask, (SAMPLED)."""
        weight = self.original.detach()
        places = torch.arange(SAMPLED, device=weight.device) * (weight.numel() - 1) // (SAMPLED - 1)
        return weight.take(places).float().cpu()

    def take_off(self) -> None:
        """Takes a mask off, where there is one."""
        owner = self.owner
        if parametrize.is_parametrized(owner):
            # PyTorch changes its class, which copies of the owner share: now this one has its own.
            own = {name: value for name, value in vars(type(owner)).items() if name not in ("__dict__", "__weakref__")}
            owner.__class__ = type(type(owner).__name__, type(owner).__bases__, own)
        if self.carried is None:
            return
        parametrize.remove_parametrizations(owner, self.name, leave_parametrized=False)
        # PyTorch puts the weight back behind the others; an optimizer's state goes by the order of parameters.
        in_front = self.carried.order[: self.carried.order.index(self.name)]
        for name in [name for name in owner._parameters if name not in (self.name, *in_front)]:
            owner._parameters[name] = owner._parameters.pop(name)


@dataclass(frozen=True, eq=False, repr=False)
class Mask:
    """What is done to some layers of a classifier, apart from any: weights switched off, directions taken.

    by_layer: by the names of parameters, as `named_parameters` of a model without masks gives them ("3.weight",
        "blocks.0.attn.in_proj_weight"); of an old file all by the index among the layers that had one (`indexed_in`)
    forgets: the classes that it was made to forget
    origins: some numbers of the weights that it was made on (`Weight.sampled`), by layer, where they are known
    about: how it was made, in words
    Raises ValueError where these are not what they must be.
    """

    by_layer: Mapping[str, LayerMask]
    forgets: tuple[int, ...] = ()
    origins: Mapping[str, Tensor] = field(default_factory=dict)
    about: str = ""

    def __post_init__(self) -> None:
        kinds = {*map(type, self.by_layer)}
        numbers = [*self.forgets] if kinds == {str} else [*self.by_layer, *self.forgets]
        if len(kinds) != 1 or not all(type(each) is int and 0 <= each < 2**31 for each in numbers):
            has = f"layers {[*self.by_layer]}, classes {[*self.forgets]}"[:200]
            raise ValueError(f"a mask must have layers by the names of their weights, classes by labels, not {has}")
        for mask in self.by_layer.values():
            mask.check()

    @staticmethod
    def on(model: nn.Module) -> Mask | None:
        """The mask that a model carries; None where it carries none."""
        carried = carried_by(weights_in(model))
        return None if carried is None else carried.made_on(model)

    def made_on(self, model: nn.Module) -> Mask:
        """The same, with the weights of a model as those that it was made on. Raises ValueError as `check` does."""
        parts, weights = self.check(model)
        return replace(self, by_layer=parts, origins={name: weights[name].sampled() for name in parts})

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the masked weights."""
        return tuple(self.by_layer)

    @property
    def keep(self) -> tuple[Tensor, ...]:
        """1 for every weight that is kept and 0 for every one that is switched off, of each masked layer."""
        return tuple(mask.keep for mask in self.by_layer.values())

    @property
    def num_zeroed(self) -> int:
        """How many weights it switches off, kappa."""
        return sum(mask.num_zeroed for mask in self.by_layer.values())

    def __repr__(self) -> str:
        counts = [f"layer {layer}: {mask.num_zeroed} of {mask.keep.numel()}" for layer, mask in self.by_layer.items()]
        taken = [f"layer {layer}: {mask.rank}" for layer, mask in self.by_layer.items() if mask.rank]
        edited = f"; directions taken: {', '.join(taken)}" if taken else ""
        return f"Mask({', '.join(counts)} weights zeroed{edited}{self.about and '; '}{self.about})"

    def __and__(self, other: Mask) -> Mask:
        """The mask that keeps what both keep, takes what either takes, and forgets what either forgets."""
        found = dict(self.by_layer)
        for layer, mask in other.by_layer.items():
            own = found.get(layer)
            if own is not None and own.keep.shape != mask.keep.shape:
                shapes = f"{tuple(own.keep.shape)} and {tuple(mask.keep.shape)}"
                raise ValueError(f"masks of one classifier combine: of layer {layer!r} these have {shapes}")
            found[layer] = mask if own is None else own & mask
            one, two = self.origins.get(layer), other.origins.get(layer)
            if one is not None and two is not None and not are_same(one, two):
                raise ValueError(f"masks of one classifier combine: these were made on other weights of {layer!r}")
        forgets = {*self.forgets, *other.forgets}
        return Mask(found, tuple(sorted(forgets)), {**other.origins, **self.origins}, self.about)

    def as_tensor(self) -> Tensor:
        """The layer's shape (m, n) for one masked layer, flat in vertex order (vertices) for several."""
        return self.keep[0] if len(self.keep) == 1 else torch.cat([keep.flatten() for keep in self.keep])

    def vertices(self) -> Tensor:
        """The vertices that it switches off, in the weight graph of its layers."""
        return (self.as_tensor().flatten() == 0).nonzero()[:, 0]

    def includes(self, other: Mask) -> bool:
        """Whether it switches off all that the other does, and takes what that takes."""
        own = self.by_layer
        return all(layer in own and own[layer].includes(mask) for layer, mask in other.by_layer.items())

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """The masked weights of a model without a mask, by their names there, as they are under this one."""
        parts, weights = self.check(model)
        return {name: part.applied(weights[name].original.detach()) for name, part in parts.items()}

    def check(self, model: nn.Module, other_weights: bool = True) -> tuple[dict[str, LayerMask], dict[str, Weight]]:
        """What it does to each weight, by the names of a model and in its order, and all weights of the model.

        Raises ValueError where a weight is not there, has another shape, belongs to several modules, or is none to put
        a mask on; and without `other_weights`, where it is another than the mask was made on, but for its precision.
        """
        weights, names, found = weights_in(model), indexed_in(model), {}
        for layer, part in self.by_layer.items():
            name, shape = names.get(layer, layer), tuple(part.keep.shape)
            weight = weights.get(name)
            if weight is None or weight.original is None or isinstance(weight.owner, COLLECTIONS):
                ways = "what torch.nn.utils computes becomes one by prune.remove, remove_parametrizations or their like"
                must = f"must be a parameter {shape} of a module, and no entry of a list of them"
                raise ValueError(f"layer {layer!r} {must}: {ways}")
            if weight.original.shape != shape:
                raise ValueError(f"layer {name!r} is {tuple(weight.original.shape)}, its mask {shape}")
            tied = [other for other, each in weights.items() if each.original is weight.original]
            if len(tied) > 1:
                raise ValueError(f"layers {tied} share one weight, which can have no mask: give each its own")
            if not other_weights and layer in self.origins and not are_same(self.origins[layer], weight.sampled()):
                ways = "apply it to that network, make one for this, or say other_weights=True"
                raise ValueError(f"layer {name!r} has other weights than the mask was made on: {ways}")
            found[name] = part
        return {name: found[name] for name in weights if name in found}, weights

    def apply(self, model: nn.Module, permanent: bool = False, other_weights: bool = False) -> None:
        """Switches the weights off, and takes the directions; of all layers or, where anything is raised, of none.

        The zeros stand beside the weights, for `remove` to take them off again: the state dict still holds the weights
        from before, as `parametrizations.weight.original`, and with them the class. permanent: the zeros are written
        into the weights, for those who must delete: the state dict holds nothing of them, and its keys are plain. (The
        momentum of an optimizer from before would bring something back: take a new one.)
        other_weights: whether the model may have others than those that it was made on, but for their precision
        It takes the place of a mask that the model carries, which it must include.
        Raises ValueError where it carries another one, a layer has another shape, other weights, or none of its own.
        """
        parts, weights = self.check(model, other_weights)
        masked, carried = [weights[name] for name in parts], carried_by(weights)
        if carried is not None and not replace(self, by_layer=parts).includes(carried):
            raise ValueError(f"the model carries {carried}: take it off first, or apply mask & Mask.on(model)")
        in_inference = any(weight.original.is_inference() for weight in masked)
        with torch.inference_mode(in_inference), undoing(masked, permanent) as undo:
            for weight in masked:
                weight.take_off()
            orders = [list(weight.owner._parameters) for weight in masked]
            for weight, part, order in zip(masked, parts.values(), orders):
                part = part.to(weight.original)
                if permanent:
                    numbers = weight.original.data
                    numbers.copy_(part.applied(numbers)).masked_fill_(part.keep == 0, 0)
                else:
                    on_weight = WeightMask(part, self.forgets, order)
                    parametrize.register_parametrization(weight.owner, weight.name, on_weight)
            undo.pop_all()

    def remove(self, model: nn.Module) -> None:
        """Takes the mask off again: the weights are those from before, bit for bit, and in the same order.

        If they were trained meanwhile, they are as trained. Raises ValueError where the model does not carry this mask.
        """
        parts, weights = self.check(model)
        for name, part in parts.items():
            found = weights[name].carried
            if found is None or not (found.mask.includes(part) and part.includes(found.mask)):
                has = "no" if found is None else "another"
                raise ValueError(f"layer {name!r} carries {has} mask: {self} is not on")
        with undoing([weights[name] for name in parts]) as undo:
            for name in parts:
                weights[name].take_off()
            undo.pop_all()

    @contextmanager
    def applied_to(self, model: nn.Module, other_weights: bool = False) -> Iterator[nn.Module]:
        """The masked model for as long as the context is open; then it carries what it did before, if anything."""
        carried = carried_by(weights_in(model))
        self.apply(model, other_weights=other_weights)
        try:
            yield model
        finally:
            self.remove(model)
            if carried is not None:
                carried.apply(model, other_weights=True)

    def saved(self) -> dict[str, list]:
        """As `save` writes it: `layers`; `keep` (bool) and `edits` (pairs) of each; `forgets`; `made_on`, by layer."""
        masks = self.by_layer.values()
        keep = [mask.keep.bool().cpu() for mask in masks]
        edits = [[mask.u.cpu(), mask.v.cpu()] for mask in masks]
        made_on = {layer: [layer, weights] for layer, weights in self.origins.items()}
        saved = {"layers": list(self.layers), "keep": keep, "forgets": list(self.forgets), "edits": edits}
        return saved | {"made_on": made_on, "about": self.about}

    def save(self, path: Path | str) -> None:
        """Raises ArtifactError where it cannot be written so."""
        save(Path(path), self.saved())

    @staticmethod
    def load(path: Path | str) -> Mask:
        """Raises ArtifactError where the file is not a mask."""
        try:
            saved, found, origins = load(Path(path)), {}, {}
            for layer, (_, weights) in saved.get("made_on", {}).items():  # not in old files
                origins[layer] = weights.float().view(SAMPLED)
            for layer, keep, (u, v) in zip(saved["layers"], saved["keep"], saved["edits"], strict=True):
                found[layer] = LayerMask(keep.float(), u, v)
            return Mask(found, tuple(saved["forgets"]), origins, saved.get("about", ""))
        except ArtifactError:
            raise
        except (LookupError, TypeError, AttributeError, ValueError, RuntimeError, NotImplementedError) as error:
            raise ArtifactError(f"{path}: is not a mask ({one_line(error)})") from None


def are_same(one: Tensor, other: Tensor) -> bool:
    """Whether weights are the same, in any precision. Zeros say nothing: a mask may have put them there."""
    are_both = (one != 0) & (other != 0)
    one, other = one[are_both], other[are_both]
    return not (one - other).norm() > PRECISION * other.norm()


def unwrapped(model: nn.Module) -> nn.Module:
    """The network itself, that a Wrapper, torch.compile, DataParallel or DistributedDataParallel holds."""
    if isinstance(model, Wrapper):
        return unwrapped(model.network)
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return unwrapped(model.module)
    return unwrapped(model._orig_mod) if hasattr(model, "_orig_mod") else model


def weights_in(model: nn.Module) -> dict[str, Weight]:
    """The parameters of a model by their names in it without masks."""
    found = {}
    for path, owner in unwrapped(model).named_modules():
        if isinstance(owner, parametrize.ParametrizationList) and isinstance(owner[0], WeightMask):
            continue  # its parameter is its owner's
        for name, parameter in owner._parameters.items():
            found[f"{path}.{name}".lstrip(".")] = Weight(owner, name, parameter, None)
        for name, on_weight in owner._modules.get("parametrizations", {}).items():
            is_mask = len(on_weight) == 1 and isinstance(on_weight[0], WeightMask)
            original, carried = (on_weight.original, on_weight[0]) if is_mask else (None, None)
            found[f"{path}.{name}".lstrip(".")] = Weight(owner, name, original, carried)
    return found


def carried_by(weights: Mapping[str, Weight]) -> Mask | None:
    """The mask that weights carry, by their names; None where they carry none."""
    found = {name: weight.carried for name, weight in weights.items() if weight.carried is not None}
    forgets = set(chain.from_iterable(each.forgets for each in found.values()))
    return Mask({name: each.mask for name, each in found.items()}, tuple(sorted(forgets))) if found else None


def indexed_in(model: nn.Module) -> dict[int, str]:
    """The names of weights by what stood for them in old files: linear ones and 2-D convolutions without groups."""
    found = {}
    for path, module in unwrapped(model).named_modules():
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1):
            found[len(found)] = f"{path}.weight".lstrip(".")
    return found


def undoing(weights: Collection[Weight], permanent: bool = False) -> ExitStack:
    """A context that gives weights and owners back as they are now, numbers too with `permanent`; but for `pop_all`."""
    undo = ExitStack()
    for weight in weights:
        undo.callback(setattr, weight.owner, "__class__", type(weight.owner))
        for module in weight.owner.modules():  # what is on its parameters among them
            for place in (module._parameters, module._modules):
                undo.callback(place.update, dict(place))
                undo.callback(place.clear)
        if permanent:
            undo.callback(weight.original.data.copy_, weight.original.data.clone())
    return undo


COLLECTIONS = (nn.ParameterList, nn.ParameterDict, parametrize.ParametrizationList)  # which their owners read
