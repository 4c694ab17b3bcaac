"""Masks: the weights of a classifier that are zeroed and the directions that are removed, apart from any classifier."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mimu.errors import ArtifactError, in_one_line, shortened
from mimu.files import load, save
from mimu.wrapping import COLLECTIONS, unwrapped

SAMPLE_SIZE = 256  # numbers of a weight that are kept to recognise it
TOLERANCE = 0.004  # relative difference of weights that count as equal: bfloat16 rounds by at most 0.002 each


class LayerMask(NamedTuple):
    """The mask of one layer, which turns its weight W into (W - U V^T) * keep.

    Args:
        keep: 1 for every weight that is kept and 0 for every one that is zeroed, in the shape of W.
        u: (m, rank), where W is flattened to a matrix (m, n), and a vector of biases to (m, 1).
        v: (n, rank). Each column of U and V removes one direction; with rank 0 none is removed.
    """

    keep: Tensor
    u: Tensor
    v: Tensor

    @staticmethod
    def of(keep: Tensor) -> "LayerMask":
        """Returns the mask that zeroes weights and removes no direction."""
        m, n = keep.reshape(len(keep), -1).shape
        return LayerMask(keep, keep.new_zeros(m, 0), keep.new_zeros(n, 0))

    @property
    def rank(self) -> int:
        """The number of directions that the mask removes."""
        return self.u.shape[1]

    @property
    def num_zeroed(self) -> int:
        """The number of weights that the mask zeroes."""
        return int((self.keep == 0).sum())

    def to(self, like: Tensor) -> "LayerMask":
        """Returns the mask on the device and in the precision of a tensor."""
        return LayerMask(self.keep.to(like), self.u.to(like), self.v.to(like))

    def applied(self, weight: Tensor) -> Tensor:
        """Returns (W - U V^T) * keep, in the shape of W."""
        if self.rank:
            weight = weight - (self.u @ self.v.T).view_as(weight)
        return weight * self.keep

    def __and__(self, other: "LayerMask") -> "LayerMask":
        """Combines two masks of a layer. A direction that both remove, in whatever precision, is removed once."""
        other = other.to(self.keep)
        ours, theirs = (torch.cat([mask.u, mask.v]).T.float() for mask in (self, other))
        is_new = (torch.cdist(ours, theirs) > TOLERANCE * theirs.norm(dim=1)).all(0)
        u, v = torch.cat([self.u, other.u[:, is_new]], 1), torch.cat([self.v, other.v[:, is_new]], 1)
        return LayerMask(self.keep * other.keep, u, v)

    def includes(self, other: "LayerMask") -> bool:
        """Tells whether the other mask would add nothing to this one: no zero, and no direction."""
        both = self & other
        return (both.num_zeroed, both.rank) == (self.num_zeroed, self.rank)

    def check(self) -> None:
        """Raises ValueError where a part has the wrong type, shape or values."""
        if not all(isinstance(part, Tensor) and part.is_floating_point() and part.isfinite().all() for part in self):
            raise ValueError("a mask must have tensors of finite floating-point numbers alone")
        m, n = self.keep.reshape(len(self.keep), -1).shape
        rank = self.u.shape[-1]
        has_shapes = self.u.shape == (m, rank) and self.v.shape == (n, rank)
        if not has_shapes or not ((self.keep == 0) | (self.keep == 1)).all():
            raise ValueError("a mask must have 0 and 1 in the weight's shape, and matrices (m, rank) and (n, rank)")


class WeightMask(nn.Module):
    """The parametrization that applies a `LayerMask` to a weight.

    Args:
        mask: The mask of the layer.
        forgets: The classes that the mask was made to forget.
        order: The names of the owner's parameters, in the order that they had without the mask.
    """

    def __init__(self, mask: LayerMask, forgets: tuple[int, ...], order: list[str]) -> None:
        super().__init__()
        # State dicts of masked models have these names.
        self.keep, self.left, self.right = (nn.Buffer(part.clone() if part.is_inference() else part) for part in mask)
        self.forgets, self.order = forgets, order

    @property
    def mask(self) -> LayerMask:
        """The mask, on the device of the weight."""
        return LayerMask(self.keep, self.left, self.right)

    def forward(self, weight: Tensor) -> Tensor:
        return self.mask.applied(weight)


class Weight(NamedTuple):
    """A parameter of a model.

    Args:
        owner: The module that has the parameter.
        name: The name of the parameter in that module.
        original: The parameter without a mask.
        carried: The mask on the parameter; None where there is none.
    """

    owner: nn.Module
    name: str
    original: nn.Parameter
    carried: WeightMask | None

    def sample(self) -> Tensor:
        """Returns evenly spread numbers of the weight without its mask, (SAMPLE_SIZE)."""
        weight = self.original.detach()
        places = torch.arange(SAMPLE_SIZE, device=weight.device) * (weight.numel() - 1) // (SAMPLE_SIZE - 1)
        return weight.take(places).float().cpu()

    def remove_mask(self) -> None:
        """Removes the mask, where there is one."""
        owner = self.owner
        if parametrize.is_parametrized(owner):
            # PyTorch changes the owner's class, which copies of the owner share. This one gets a class of its own.
            own = {name: value for name, value in vars(type(owner)).items() if name not in ("__dict__", "__weakref__")}
            owner.__class__ = type(type(owner).__name__, type(owner).__bases__, own)
        if self.carried is None:
            return
        parametrize.remove_parametrizations(owner, self.name, leave_parametrized=False)
        # PyTorch appends the parameter at the end, and the state of an optimizer depends on the order of parameters.
        known = [name for name in self.carried.order if name in owner._parameters]
        owner._parameters.update({name: owner._parameters.pop(name) for name in known})


@dataclass(frozen=True, eq=False, repr=False)
class Mask:
    """The masks of some layers of a classifier.

    Args:
        by_layer: A mask for every layer, by the name of its weight as `named_parameters` of a model without masks
            gives it ("3.weight", "blocks.0.attn.in_proj_weight").
        forgets: The classes that the mask was made to forget.
        origins: Some numbers of all weights of the model that the mask was made on (`Weight.sample`), by name.
        about: A description of how the mask was made.
        method: The method of `unlearn` that made the mask, "hide", "mask" or "erase"; "" where another one did.

    Raises:
        ValueError: A layer, a class or the mask of a layer is not valid.
    """

    by_layer: Mapping[str, LayerMask]
    forgets: tuple[int, ...] = ()
    origins: Mapping[str, Tensor] = field(default_factory=dict)
    about: str = ""
    method: str = ""

    def __post_init__(self) -> None:
        if {*map(type, self.by_layer)} != {str} or not {*map(type, self.forgets)} <= {int}:
            values = shortened(f"layers {list(self.by_layer)}, classes {list(self.forgets)}")
            raise ValueError(f"a mask must have layers by the names of their weights, classes by labels, not {values}")
        for mask in self.by_layer.values():
            mask.check()

    @staticmethod
    def on(model: nn.Module) -> "Mask | None":
        """Returns the mask that a model carries; None where it carries none."""
        masked = {name: weight for name, weight in weights_in(model).items() if weight.carried is not None}
        if not masked:
            return None
        forgets = set().union(*(weight.carried.forgets for weight in masked.values()))
        by_layer = {name: weight.carried.mask for name, weight in masked.items()}
        origins = {name: weight.sample() for name, weight in masked.items()}
        return Mask(by_layer, tuple(sorted(forgets)), origins)

    def with_origins_of(self, model: nn.Module) -> "Mask":
        """Returns the mask as one made on the weights of this model. Raises ValueError as `matched` does."""
        mask, weights = self.matched(model)
        return replace(mask, origins={name: weight.sample() for name, weight in weights.items()})

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the masked weights."""
        return tuple(self.by_layer)

    @property
    def keep(self) -> tuple[Tensor, ...]:
        """A tensor for every masked layer: 1 for every weight that is kept, 0 for every one that is zeroed."""
        return tuple(mask.keep for mask in self.by_layer.values())

    @property
    def num_zeroed(self) -> int:
        """The number of weights that the mask zeroes, kappa."""
        return sum(mask.num_zeroed for mask in self.by_layer.values())

    def __repr__(self) -> str:
        masks = {layer: mask for layer, mask in self.by_layer.items() if mask.keep.ndim > 1}  # without biases
        counts = [f"layer {layer}: {mask.num_zeroed} of {mask.keep.numel()}" for layer, mask in masks.items()]
        ranks = [f"layer {layer}: {mask.rank}" for layer, mask in masks.items() if mask.rank]
        edits = f"; directions removed: {', '.join(ranks)}" if ranks else ""
        return f"Mask({', '.join(counts)} weights zeroed{edits}{self.about and '; '}{self.about})"

    def __and__(self, other: "Mask") -> "Mask":
        """Returns the mask that does what either does: its zeros, its removed directions, its forgotten classes."""
        combined = dict(self.by_layer)
        for layer, theirs in other.by_layer.items():
            ours = combined.get(layer, theirs)
            if ours.keep.shape != theirs.keep.shape:
                shapes = f"{tuple(ours.keep.shape)} and {tuple(theirs.keep.shape)}"
                raise ValueError(f"masks of one classifier combine: of layer {layer!r} these have {shapes}")
            one, two = self.origins.get(layer), other.origins.get(layer)
            if one is not None and two is not None and not are_equal(one, two):
                raise ValueError(f"masks of one classifier combine: these were made on other weights of {layer!r}")
            combined[layer] = ours & theirs if layer in combined else theirs
        forgets = tuple(sorted({*self.forgets, *other.forgets}))
        return Mask(combined, forgets, {**other.origins, **self.origins}, self.about, self.method)

    def as_tensor(self) -> Tensor:
        """Returns `keep`: of one masked layer in its shape (m, n), of several flat in vertex order (vertices)."""
        return self.keep[0] if len(self.keep) == 1 else torch.cat([keep.flatten() for keep in self.keep])

    def vertices(self) -> Tensor:
        """Returns the indices of the zeroed weights in the weight graph of the layers."""
        return (self.as_tensor().flatten() == 0).nonzero()[:, 0]

    def includes(self, other: "Mask") -> bool:
        """Tells whether the other mask would add nothing to this one: no layer, no zero, and no direction."""
        ours = self.by_layer
        return all(layer in ours and ours[layer].includes(theirs) for layer, theirs in other.by_layer.items())

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """Returns the weights that the masked layers of an unmasked model would have under this mask, by name."""
        mask, weights = self.matched(model)
        return {name: part.applied(weights[name].original.detach()) for name, part in mask.by_layer.items()}

    def matched(self, model: nn.Module) -> tuple["Mask", dict[str, Weight]]:
        """Returns the mask by the names of a model's weights and in their order, and all weights of the model.

        A mask of a module around the model has one prefix before all names, such as "model.", which is left out.

        Raises:
            ValueError: A weight does not exist, has another shape, belongs to several modules, or cannot be masked.
        """
        weights = weights_in(model)
        path = next(iter(self.by_layer)).split(".")
        prefixes = ["".join(f"{part}." for part in path[:depth]) for depth in range(len(path))]
        prefix = next((each for each in prefixes if self.by_layer.keys() <= {each + name for name in weights}), "")
        parts = {layer.removeprefix(prefix): part for layer, part in self.by_layer.items()}
        origins = {layer.removeprefix(prefix): origin for layer, origin in self.origins.items()}
        for name, part in parts.items():
            weight, shape = weights.get(name), tuple(part.keep.shape)
            if weight is None or isinstance(weight.owner, COLLECTIONS):
                must = f"must be a parameter {shape} of a module, and no entry of a list of them"
                remedy = "prune.remove, remove_parametrizations or their like make one of what torch.nn.utils computes"
                raise ValueError(f"layer {name!r} {must}: {remedy}")
            if weight.original.shape != shape:
                raise ValueError(f"layer {name!r} is {tuple(weight.original.shape)}, its mask {shape}")
            tied = [other for other, each in weights.items() if each.original is weight.original]
            if len(tied) > 1:
                raise ValueError(f"layers {tied} share one weight, which can have no mask: give each its own")
        by_layer = {name: parts[name] for name in weights if name in parts}
        return replace(self, by_layer=by_layer, origins=origins), weights

    def other_weight(self, weights: Mapping[str, Weight]) -> str | None:
        """Returns the first of a model's weights that differs from the one before the mask by more than rounding."""
        for name, origin in self.origins.items():
            if name in weights and not are_equal(origin, weights[name].sample()):
                return name
        return None

    def apply(self, model: nn.Module, permanent: bool = False, other_weights: bool = False) -> None:
        """Masks all layers or, where an error is raised, none. A mask that the model carries is replaced.

        The mask is kept beside the weights, so that `remove` can take it off: the state dict still holds the weights
        from before, as `parametrizations.weight.original`, and with them the class.

        Args:
            model: The classifier, which is changed in place.
            permanent: Writes the mask into the weights, for those who must delete: the state dict then holds nothing
                of what was removed, and its keys are plain. (The momentum of an optimizer from before would bring
                something back: use a new one.)
            other_weights: Allows weights that differ from those that the mask was made on by more than rounding.

        Raises:
            ValueError: The model carries a mask that this one does not include, it has other weights than the mask was
                made on, or `matched` raises.
        """
        mask, weights = self.matched(model)
        if not other_weights and (name := mask.other_weight(weights)):
            remedy = "apply it to that network, make one for this, or say other_weights=True"
            raise ValueError(f"layer {name!r} has other weights than the mask was made on: {remedy}")
        if (carried := Mask.on(model)) is not None and not mask.includes(carried):
            raise ValueError(f"the model carries {carried}: take it off first, or apply mask & Mask.on(model)")
        masked = [weights[name] for name in mask.by_layer]
        with torch.inference_mode(any(weight.original.is_inference() for weight in masked)):
            parts = [part.to(weight.original) for weight, part in zip(masked, mask.by_layer.values())]
            for weight in masked:
                weight.remove_mask()
            orders = [list(weight.owner._parameters) for weight in masked]
            for weight, part, order in zip(masked, parts, orders):
                if permanent:
                    numbers = weight.original.data
                    numbers.copy_(part.applied(numbers)).masked_fill_(part.keep == 0, 0)
                else:
                    on_weight = WeightMask(part, self.forgets, order)
                    parametrize.register_parametrization(weight.owner, weight.name, on_weight)

    def remove(self, model: nn.Module) -> None:
        """Takes the mask off: the weights are those from before, bit for bit in their order, or as trained since.

        Warns if weights differ from those that the mask was made on, as after training under the mask: what it zeroed
        then comes back beside trained weights.

        Raises:
            ValueError: The model does not carry this mask.
        """
        mask, weights = self.matched(model)
        for name, part in mask.by_layer.items():
            carried = weights[name].carried
            if carried is None or not (carried.mask.includes(part) and part.includes(carried.mask)):
                has = "no" if carried is None else "another"
                raise ValueError(f"layer {name!r} carries {has} mask: {self} is not on")
        for name in mask.by_layer:
            weights[name].remove_mask()
        if name := mask.other_weight(weights):
            result = "what it removed comes back beside weights that were trained without it"
            warnings.warn(f"layer {name!r} has other weights than the mask was made on: {result}", stacklevel=2)

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[nn.Module]:
        """Masks the model within the context, which then restores the mask from before, if any."""
        carried = Mask.on(model)
        self.apply(model)
        try:
            yield model
        finally:
            self.remove(model)
            if carried is not None:
                carried.apply(model, other_weights=True)

    def saved(self) -> dict[str, Any]:
        """Returns the content of the file that `save` writes. `edits` holds the pair U, V of every layer."""
        masks = self.by_layer.values()
        return {
            "layers": list(self.layers),
            "keep": [mask.keep.bool().cpu() for mask in masks],
            "forgets": list(self.forgets),
            "edits": [[mask.u.cpu(), mask.v.cpu()] for mask in masks],
            "made_on": {layer: [layer, weights] for layer, weights in self.origins.items()},
            "about": self.about,
            "method": self.method,
        }

    def save(self, path: Path | str) -> None:
        """Writes the mask to a file. Raises ArtifactError where this is not possible."""
        if Path(path).suffix == ".json":
            raise ArtifactError(f"{path}: a mask is not JSON, name it otherwise, such as mask.pt")
        save(Path(path), self.saved())

    @staticmethod
    def load(path: Path | str) -> "Mask":
        """Reads a mask from a file. Raises ArtifactError where the file is not a mask."""
        saved = load(Path(path))
        with in_one_line(ArtifactError, f"{path}: is not a mask"):
            by_layer = {}
            for layer, keep, (u, v) in zip(saved["layers"], saved["keep"], saved["edits"], strict=True):
                by_layer[layer] = LayerMask(keep.float(), u, v)
            origins = {layer: weights.float().view(SAMPLE_SIZE) for layer, (_, weights) in saved["made_on"].items()}
            return Mask(by_layer, tuple(saved["forgets"]), origins, saved["about"], saved.get("method", ""))


def are_equal(one: Tensor, other: Tensor) -> bool:
    """Tells whether weights are equal, in any precision. Zeros are ignored: a mask may have put them there."""
    are_both = (one != 0) & (other != 0)
    if not are_both.any():
        return torch.equal(one, other)
    one, other = one[are_both], other[are_both]
    return bool((one - other).norm() <= TOLERANCE * other.norm())


def weights_in(model: nn.Module) -> dict[str, Weight]:
    """Returns the parameters of a model, by the names that they have in it without masks.

    What something else computes, as `torch.nn.utils.prune` does, is not among them.
    """
    weights = {}
    for path, owner in unwrapped(model).named_modules():
        if isinstance(owner, parametrize.ParametrizationList) and isinstance(owner[0], WeightMask):
            continue  # its parameter is listed under the masked module
        for name, parameter in owner.named_parameters(recurse=False):
            weights[f"{path}.{name}".lstrip(".")] = Weight(owner, name, parameter, None)
        for name, on_weight in owner._modules.get("parametrizations", {}).items():
            if len(on_weight) == 1 and isinstance(on_weight[0], WeightMask):
                weights[f"{path}.{name}".lstrip(".")] = Weight(owner, name, on_weight.original, on_weight[0])
    return weights
