"""Masks: which weights of a classifier are switched off, and what is taken from them, apart from any classifier."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mimu.networks.hooked import shape_of, weight_layers
from mimu.runs import files

SAMPLED = 256  # weights of a layer by which it is known again
PRECISION = 0.01  # of their norm, by which they may differ then: bfloat16 rounds by 0.002 at most


class LayerMask(NamedTuple):
    """What a mask does to the weight W of one layer: (W - left right^T) * keep.

    It switches weights off, and takes directions from what the layer reads; of rank 0, left and right have no column.
    """

    keep: Tensor  # 1 or 0, in the shape of W
    left: Tensor  # (m, rank), W as a matrix (m, n)
    right: Tensor  # (n, rank)

    @staticmethod
    def of(keep: Tensor) -> LayerMask:
        """One that takes no direction."""
        m, n = keep.flatten(1).shape
        return LayerMask(keep, keep.new_zeros(m, 0), keep.new_zeros(n, 0))

    @property
    def rank(self) -> int:
        """How many directions it takes."""
        return self.left.shape[1]

    @property
    def num_zeroed(self) -> int:
        """How many weights it switches off."""
        return int((self.keep == 0).sum())

    def to(self, like: Tensor) -> LayerMask:
        """The same on the device and in the precision of a tensor."""
        return LayerMask(*(part.to(like) for part in self))

    def applied(self, weight: Tensor) -> Tensor:
        """(W - left right^T) * keep, in the shape of W."""
        if self.rank:
            weight = weight - (self.left @ self.right.T).view_as(weight)
        return weight * self.keep

    def takes(self, other: LayerMask) -> Tensor:
        """Which of the other's directions it takes, (rank of the other), in whatever precision."""
        own, its = (torch.cat([each.left, each.right]).T.float() for each in (self, other.to(self.keep)))
        return (torch.cdist(own, its) <= PRECISION * its.norm(dim=1)).any(0)

    def __and__(self, other: LayerMask) -> LayerMask:
        """What both do; what both take is taken once."""
        other, is_new = other.to(self.keep), ~self.takes(other)
        left = torch.cat([self.left, other.left[:, is_new]], 1)
        right = torch.cat([self.right, other.right[:, is_new]], 1)
        return LayerMask(self.keep * other.keep, left, right)

    def includes(self, other: LayerMask) -> bool:
        """Whether it switches off all that the other does, and takes each of its directions."""
        return bool((self.keep <= other.keep.to(self.keep)).all() and self.takes(other).all())

    def check(self) -> None:
        """Raises ValueError where the parts are not what they must be."""
        keep = self.keep
        if not all(isinstance(part, Tensor) and part.is_floating_point() for part in self):
            raise ValueError("a mask must have tensors of floating-point numbers alone")
        if keep.ndim not in (2, 4) or not keep.numel() or not ((keep == 0) | (keep == 1)).all():
            raise ValueError("a mask must have matrices of 0 and 1 alone")
        m, n = keep.flatten(1).shape
        shapes, ranks = [tuple(self.left.shape), tuple(self.right.shape)], self.left.shape[1:]
        is_finite = self.left.isfinite().all() and self.right.isfinite().all()
        if shapes != [(m, *ranks), (n, *ranks)] or len(ranks) != 1 or not is_finite:
            raise ValueError(f"edits must be pairs of matrices (m, rank), (n, rank) of finite numbers, not {shapes}")


class Origin(NamedTuple):
    """The weight that a layer's mask was made on."""

    name: str  # of the parameter, in its model
    weights: Tensor  # (SAMPLED), some of its numbers, evenly spread, under no mask

    def fits(self, other: Origin) -> bool:
        """Whether it is the same weight, in any precision. Zeros say nothing: a mask may have put them there."""
        are_both = (self.weights != 0) & (other.weights != 0)
        one, two = self.weights[are_both], other.weights[are_both]
        return not (one - two).norm() > PRECISION * two.norm()


class WeightMask(nn.Module):
    """The parametrization of a weight by what a `LayerMask` does to it; order: of the layer's parameters before."""

    def __init__(self, mask: LayerMask, forgets: tuple[int, ...], order: list[str]) -> None:
        super().__init__()
        for name, part in mask._asdict().items():
            self.register_buffer(name, part.clone() if part.is_inference() else part)
        self.forgets, self.order = forgets, order

    @property
    def mask(self) -> LayerMask:
        return LayerMask(self.keep, self.left, self.right)

    def forward(self, weight: Tensor) -> Tensor:
        return self.mask.applied(weight)


@dataclass(frozen=True, eq=False, repr=False)
class Mask:
    """What is done to some layers of a classifier, apart from any: weights switched off, directions taken.

    by_layer: by the index among the weight layers of a model; forgets: the classes that it was made to forget
    origins: the weights that it was made on, by the index of their layer, where they are known
    about: how it was made, in words
    Raises ValueError where these are not what they must be.
    """

    by_layer: Mapping[int, LayerMask]
    forgets: tuple[int, ...] = ()
    origins: Mapping[int, Origin] = field(default_factory=dict)
    about: str = ""

    def __post_init__(self) -> None:
        numbers = [*self.by_layer, *self.forgets]
        if not self.by_layer or not all(type(each) is int and 0 <= each < 2**31 for each in numbers):
            has = f"layers {[*self.by_layer]}, classes {[*self.forgets]}"[:200]
            raise ValueError(f"a mask must have layers by their indices, and classes by their labels, not {has}")
        for mask in self.by_layer.values():
            mask.check()

    @staticmethod
    def on(model: nn.Module) -> Mask | None:
        """The mask that a model carries; None where it carries none."""
        found, forgets = {}, set()
        for index, layer in enumerate(weight_layers(model)):
            if (on_weight := weight_mask(layer)) is not None:
                found[index] = on_weight.mask
                forgets.update(on_weight.forgets)
        return Mask(found, tuple(sorted(forgets)), origins_in(model, found)) if found else None

    def made_on(self, model: nn.Module) -> Mask:
        """The same, with the weights of a model as those that it was made on. Raises ValueError as `check` does."""
        self.check(model)
        return replace(self, origins=origins_in(model, self.by_layer))

    @property
    def layers(self) -> tuple[int, ...]:
        """The indices of the masked layers."""
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
                raise ValueError(f"masks of one classifier combine: of layer {layer} these have {shapes}")
            found[layer] = mask if own is None else own & mask
            if layer in self.origins and not self.origins[layer].fits(other.origins.get(layer, self.origins[layer])):
                raise ValueError(f"masks of one classifier combine: these were made on other weights of layer {layer}")
        forgets = {*self.forgets, *other.forgets}
        return Mask(dict(sorted(found.items())), tuple(sorted(forgets)), {**other.origins, **self.origins}, self.about)

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

    def weights(self, model: nn.Module) -> dict[int, Tensor]:
        """The weights of the masked layers of a model without one, by their indices, as they are under the mask."""
        layers = weight_layers(model)
        return {index: mask.applied(layers[index].weight.detach()) for index, mask in self.by_layer.items()}

    def check(self, model: nn.Module) -> list[nn.Module]:
        """The masked layers of a model. Raises ValueError where one has another shape or no weight to put a mask on."""
        layers = weight_layers(model)
        for index, mask in self.by_layer.items():
            shape = shape_of(layers[index]) if index < len(layers) else "not there"
            if shape != tuple(mask.keep.shape):
                raise ValueError(f"layer {index} is {shape}, its mask {tuple(mask.keep.shape)}")
            if "weight" not in layers[index]._parameters and weight_mask(layers[index]) is None:
                ways = "make it one first, by prune.remove, remove_parametrizations or their like"
                raise ValueError(f"layer {index} has no plain weight, but what torch.nn.utils computes: {ways}")
        return [layers[index] for index in self.by_layer]

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
        layers, carried = self.check(model), Mask.on(model)
        for index, origin in origins_in(model, () if other_weights else self.origins).items():
            if not self.origins[index].fits(origin):
                has = f"layer {index} ({origin.name!r}) has other weights than the mask was made on"
                ways = "apply it to that network, make one for this, or say other_weights=True"
                raise ValueError(f"{has} ({self.origins[index].name!r}): {ways}")
        if carried is not None and not self.includes(carried):
            raise ValueError(f"the model carries {carried}: take it off first, or apply mask & Mask.on(model)")
        if permanent:
            holders = Counter(chain.from_iterable(each._parameters.values() for each in model.modules()))
            shared = [
                index for index, layer in zip(self.layers, layers) if max(map(holders.get, layer.parameters())) > 1
            ]
            if shared:
                raise ValueError(f"layers {shared} share their weights with others: zeros would be theirs, too")
        in_inference = any(layer.weight.is_inference() for layer in layers)
        with torch.inference_mode(in_inference), undoing(layers, permanent) as undo:
            for layer, mask in zip(layers, self.by_layer.values()):
                take_off(layer)
                mask = mask.to(layer.weight)
                if permanent:
                    layer.weight.data.copy_(mask.applied(layer.weight.data)).masked_fill_(mask.keep == 0, 0)
                else:
                    on_weight = WeightMask(mask, self.forgets, list(layer._parameters))
                    parametrize.register_parametrization(layer, "weight", on_weight)
            undo.pop_all()

    def remove(self, model: nn.Module) -> None:
        """Takes the mask off again: the weights are those from before, bit for bit, and in the same order.

        If they were trained meanwhile, they are as trained. Raises ValueError where the model does not carry this mask.
        """
        layers = self.check(model)
        for layer, (index, mask) in zip(layers, self.by_layer.items()):
            found = weight_mask(layer)
            if found is None or not (found.mask.includes(mask) and mask.includes(found.mask)):
                raise ValueError(f"layer {index} carries {'no' if found is None else 'another'} mask: {self} is not on")
        with undoing(layers) as undo:
            for layer in layers:
                take_off(layer)
            undo.pop_all()

    @contextmanager
    def applied_to(self, model: nn.Module, other_weights: bool = False) -> Iterator[nn.Module]:
        """The masked model for as long as the context is open; then it carries what it did before, if anything."""
        carried = Mask.on(model)
        self.apply(model, other_weights=other_weights)
        try:
            yield model
        finally:
            self.remove(model)
            if carried is not None:
                carried.apply(model, other_weights=True)

    def saved(self) -> dict[str, list]:
        """As `save` writes it: `layers`; `keep` (bool) and `edits` (pairs) of each; `forgets`; by layer, `made_on`."""
        masks = self.by_layer.values()
        keep = [mask.keep.bool().cpu() for mask in masks]
        edits = [[mask.left.cpu(), mask.right.cpu()] for mask in masks]
        made_on = {layer: list(origin) for layer, origin in self.origins.items()}
        saved = {"layers": list(self.layers), "keep": keep, "forgets": list(self.forgets), "edits": edits}
        return saved | {"made_on": made_on, "about": self.about}

    def save(self, path: Path | str) -> None:
        """Raises ArtifactError where it cannot be written so."""
        if Path(path).suffix == ".json":
            raise files.ArtifactError(f"{path}: JSON holds no tensors: save a mask as .pt")
        files.save(Path(path), self.saved())

    @staticmethod
    def load(path: Path | str) -> Mask:
        """Raises ArtifactError where the file is not a mask."""
        try:
            saved, found, origins = files.load(Path(path)), {}, {}
            for layer, keep, (left, right) in zip(saved["layers"], saved["keep"], saved["edits"], strict=True):
                found[layer] = LayerMask(keep.float(), left, right)
            for layer, (name, weights) in saved.get("made_on", {}).items():  # a file from before has none
                origins[layer] = Origin(name, weights.float().view(SAMPLED))
            return Mask(found, tuple(saved["forgets"]), origins, saved.get("about", ""))
        except files.ArtifactError:
            raise
        except (LookupError, TypeError, AttributeError, ValueError, RuntimeError, NotImplementedError) as error:
            raise files.ArtifactError(f"{path}: is not a mask ({files.one_line(error)})") from None


def weight_mask(layer: nn.Module) -> WeightMask | None:
    """What is on the layer's weight, if it is a mask and nothing else."""
    found = layer.parametrizations["weight"] if parametrize.is_parametrized(layer, "weight") else ()
    return found[0] if len(found) == 1 and isinstance(found[0], WeightMask) else None


def origins_in(model: nn.Module, layers: Iterable[int]) -> dict[int, Origin]:
    """What masks of layers of a model, by their indices, would be made on."""
    names, modules, found = {each: name for name, each in model.named_modules()}, weight_layers(model), {}
    for index in layers:
        layer = modules[index]
        weight = layer.weight if weight_mask(layer) is None else layer.parametrizations["weight"].original
        places = torch.arange(SAMPLED, device=weight.device) * (weight.numel() - 1) // (SAMPLED - 1)
        found[index] = Origin(f"{names[layer]}.weight".lstrip("."), weight.detach().take(places).float().cpu())
    return found


def take_off(layer: nn.Module) -> None:
    """Takes a mask off, where there is one."""
    if parametrize.is_parametrized(layer):
        # PyTorch changes its class, which copies of the layer share: now this one has its own.
        own = {name: value for name, value in vars(type(layer)).items() if name not in ("__dict__", "__weakref__")}
        layer.__class__ = type(type(layer).__name__, type(layer).__bases__, own)
    if (on_weight := weight_mask(layer)) is None:
        return
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    # PyTorch puts the weight back behind the others; an optimizer's state goes by the order of parameters.
    in_front = on_weight.order[: on_weight.order.index("weight")]
    for name in [name for name in layer._parameters if name not in ("weight", *in_front)]:
        layer._parameters[name] = layer._parameters.pop(name)


def undoing(layers: list[nn.Module], permanent: bool = False) -> ExitStack:
    """A context that gives layers back as they are now, and their weights with `permanent`; but for its `pop_all`."""
    undo = ExitStack()
    for layer in layers:
        undo.callback(setattr, layer, "__class__", type(layer))
        for module in layer.modules():  # what is on its parameters among them
            for place in (module._parameters, module._modules):
                undo.callback(place.update, dict(place))
                undo.callback(place.clear)
        for parameter in layer.parameters() if permanent else ():
            undo.callback(parameter.data.copy_, parameter.data.clone())
    return undo
