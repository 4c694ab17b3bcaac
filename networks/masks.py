"""Masks: which weights of a classifier are switched off, and what is taken from them, apart from any classifier."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mimu.networks.hooked import shape_of, weight_layers
from mimu.runs import files


class LowRank(NamedTuple):
    """What is taken from a weight W as a matrix (m, n), left right^T: of every input x, what it has in some directions.

    Of rank 0, which takes nothing, both have no column.
    """

    left: Tensor  # (m, rank)
    right: Tensor  # (n, rank)

    @staticmethod
    def nothing(weight: Tensor) -> LowRank:
        """That of rank 0 for a weight."""
        return LowRank(*(weight.new_zeros(size, 0) for size in weight.flatten(1).shape))

    def to(self, like: Tensor) -> LowRank:
        """The same on the device and in the precision of a tensor."""
        return LowRank(*(part.to(like) for part in self))

    def __and__(self, other: LowRank) -> LowRank:
        """What both take, one after the other."""
        return LowRank(*(torch.cat([own, part.to(own)], 1) for own, part in zip(self, other)))

    def includes(self, other: LowRank) -> bool:
        """Whether it takes each direction that the other does."""
        own, of_other = torch.cat(self).T, torch.cat(other.to(self.left)).T
        return bool((own == of_other[:, None]).all(-1).any(1).all())

    def taken_from(self, weight: Tensor) -> Tensor:
        """W - left right^T, in the shape of the weight."""
        return weight - (self.left @ self.right.T).view_as(weight) if self.left.shape[1] else weight


class WeightMask(nn.Module):
    """The parametrization of a weight by what `Mask` says of it: (W - left right^T) * keep."""

    def __init__(self, keep: Tensor, edit: LowRank, forgets: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.register_buffer("keep", keep)
        self.register_buffer("left", edit.left)
        self.register_buffer("right", edit.right)
        self.forgets = forgets

    @property
    def edit(self) -> LowRank:
        return LowRank(self.left, self.right)

    def forward(self, weight: Tensor) -> Tensor:
        return self.edit.taken_from(weight) * self.keep


def refuse_pickling(layer: nn.Module) -> None:
    raise RuntimeError(
        "a masked model is not saved whole: save model.state_dict(), and the mask by mask.save(path); or write its "
        "zeros into the weights first, by mask.apply(model, permanent=True)"
    )


@dataclass(frozen=True, eq=False, repr=False)
class Mask:
    """Which weights of the masked layers are kept (1) and which are switched off (0), apart from any classifier.

    It may also take directions from what the layers read: a weight becomes (W - left right^T) * keep.
    """

    layers: tuple[int, ...]  # indices among the weight layers of a model
    keep: tuple[Tensor, ...]  # (m, n) of each masked layer
    forgets: tuple[int, ...] = ()  # the classes that it was made to forget
    edits: tuple[LowRank, ...] = ()  # of each masked layer; made of rank 0 where none are given

    @staticmethod
    def on(model: nn.Module) -> Mask | None:
        """The mask that a model carries; None where it carries none."""
        masks = {index: mask for index, layer in enumerate(weight_layers(model)) if (mask := weight_mask(layer))}
        forgets = sorted({label for mask in masks.values() for label in mask.forgets})
        if not masks:
            return None
        keep, edits = zip(*((mask.keep, mask.edit) for mask in masks.values()))
        return Mask(tuple(masks), keep, tuple(forgets), edits)

    def __post_init__(self) -> None:
        is_right = len(self.layers) == len(self.keep) == len(set(self.layers)) > 0
        if not is_right or not all(type(each) is int and 0 <= each < 2**31 for each in (*self.layers, *self.forgets)):
            has = f"{len(self.keep)} masks for layers {self.layers}, classes {self.forgets}"[:200]
            raise ValueError(
                f"a mask must have indices of layers, each once, a matrix for each, and classes, not {has}"
            )
        if not all(keep.ndim in (2, 4) and keep.numel() and ((keep == 0) | (keep == 1)).all() for keep in self.keep):
            raise ValueError("a mask must have matrices of 0 and 1 alone")
        if not self.edits:
            object.__setattr__(self, "edits", tuple(map(LowRank.nothing, self.keep)))
        shapes = [[tuple(part.shape) for part in edit] for edit in self.edits]
        fits = len(self.edits) == len(self.keep) and all(
            part.shape == (size, *edit.left.shape[-1:])
            for keep, edit in zip(self.keep, self.edits)
            for part, size in zip(edit, keep.flatten(1).shape)
        )
        if not fits or not all(part.isfinite().all() for edit in self.edits for part in edit):
            raise ValueError(f"edits must be pairs of matrices (m, rank), (n, rank) of finite numbers, not {shapes}")

    @property
    def by_layer(self) -> dict[int, tuple[Tensor, LowRank]]:
        """What of every masked layer is kept, and what is taken from it."""
        return dict(zip(self.layers, zip(self.keep, self.edits)))

    @property
    def ranks(self) -> tuple[int, ...]:
        """How many directions it takes from each layer."""
        return tuple(edit.left.shape[1] for edit in self.edits)

    def __repr__(self) -> str:
        counts = (f"layer {layer}: {int((k == 0).sum())} of {k.numel()}" for layer, k in zip(self.layers, self.keep))
        taken = [f"layer {layer}: {rank}" for layer, rank in zip(self.layers, self.ranks) if rank]
        edited = f"; directions taken: {', '.join(taken)}" if taken else ""
        return f"Mask({', '.join(counts)} weights zeroed{edited})"

    def __and__(self, other: Mask) -> Mask:
        """The mask that keeps what both keep, takes what either takes, and forgets what either forgets."""
        found = self.by_layer
        for layer, (keep, edit) in other.by_layer.items():
            if layer not in found:
                found[layer] = keep, edit
                continue
            own, of_own = found[layer]
            if own.shape != keep.shape:
                shapes = f"{tuple(own.shape)} and {tuple(keep.shape)}"
                raise ValueError(f"masks of one classifier combine: of layer {layer} these have {shapes}")
            found[layer] = own * keep.to(own), of_own & edit
        layers = tuple(sorted(found))
        keep, edits = zip(*map(found.get, layers))
        return Mask(layers, keep, tuple(sorted({*self.forgets, *other.forgets})), edits)

    @property
    def num_zeroed(self) -> int:
        """How many weights it switches off, kappa."""
        return sum(int((keep == 0).sum()) for keep in self.keep)

    def as_tensor(self) -> Tensor:
        """The layer's shape (m, n) for one masked layer, flat in vertex order (vertices) for several."""
        return self.keep[0] if len(self.keep) == 1 else torch.cat([keep.flatten() for keep in self.keep])

    def vertices(self) -> Tensor:
        """The vertices that it switches off, in the weight graph of its layers."""
        return (torch.cat([keep.flatten() for keep in self.keep]) == 0).nonzero()[:, 0]

    def includes(self, other: Mask) -> bool:
        """Whether it switches off all that the other does, and takes what that takes."""
        own = self.by_layer
        return all(
            layer in own and bool((own[layer][0] <= keep.to(own[layer][0])).all()) and own[layer][1].includes(edit)
            for layer, (keep, edit) in other.by_layer.items()
        )

    def weights(self, model: nn.Module) -> dict[int, Tensor]:
        """The weights of the masked layers of a model without one, by their indices, as they are under the mask."""
        layers = weight_layers(model)
        pairs = self.by_layer.items()
        return {index: edit.taken_from(layers[index].weight.detach()) * keep for index, (keep, edit) in pairs}

    def check(self, model: nn.Module) -> list[nn.Module]:
        """The masked layers of a model. Raises ValueError where one has another shape or no weight to put a mask on."""
        layers = weight_layers(model)
        for index, keep in zip(self.layers, self.keep):
            shape = shape_of(layers[index]) if index < len(layers) else "not there"
            if shape != tuple(keep.shape):
                raise ValueError(f"layer {index} is {shape}, its mask {tuple(keep.shape)}")
            if "weight" not in layers[index]._parameters and weight_mask(layers[index]) is None:
                raise ValueError(
                    f"layer {index} has no plain weight, but what torch.nn.utils (prune, weight_norm, spectral_norm, "
                    "parametrize) computes: make it one first, by prune.remove, remove_parametrizations or their like"
                )
        return [layers[index] for index in self.layers]

    def apply(self, model: nn.Module, permanent: bool = False) -> None:
        """Switches the weights off, or where it raises, leaves the model as it was.

        The zeros stand beside the weights, for `remove` to take them off again: the state dict still holds the weights
        from before, as `parametrizations.weight.original`, and with them the class. permanent: the zeros are written
        into the weights, for those who must delete: the state dict holds nothing of them, and its keys are plain. (The
        momentum of an optimizer from before would bring something back: take a new one.)
        It takes the place of a mask that the model carries, which it must include.
        Raises ValueError where it carries another one, a layer has another shape, or no weight of its own.
        """
        layers, carried = self.check(model), Mask.on(model)
        if carried is not None and not self.includes(carried):
            raise ValueError(f"the model carries {carried}: take it off first, or apply mask & Mask.on(model)")
        if permanent:
            names = Counter(map(id, dict(model.named_parameters(remove_duplicate=False)).values()))
            if shared := [index for index, layer in zip(self.layers, layers) if names[id(original_weight(layer))] > 1]:
                raise ValueError(
                    f"layers {shared} share their weights with others: permanent zeros would be theirs, too"
                )
        with all_or_none(layers):
            for layer, keep, edit in zip(layers, self.keep, self.edits):
                take_off(layer)
                keep, edit = keep.to(layer.weight), edit.to(layer.weight)
                if permanent:
                    layer.weight.data.copy_(edit.taken_from(layer.weight.data)).masked_fill_(keep == 0, 0)
                else:
                    put_on(layer, WeightMask(keep, edit, self.forgets))

    def remove(self, model: nn.Module) -> None:
        """Takes the mask off again: the weights are those from before, bit for bit, and in the same order.

        If they were trained meanwhile, they are as trained. Raises ValueError where the model does not carry this mask.
        """
        layers = self.check(model)
        for index, layer, keep, edit in zip(self.layers, layers, self.keep, self.edits):
            found, own = weight_mask(layer), (keep, *edit)
            if found is None or not all(map(torch.equal, found.buffers(), [part.to(found.keep) for part in own])):
                raise ValueError(f"layer {index} carries {'no' if found is None else 'another'} mask: {self} is not on")
        with all_or_none(layers):
            for layer in layers:
                take_off(layer)

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[nn.Module]:
        """The masked model for as long as the context is open."""
        self.apply(model)
        try:
            yield model
        finally:
            self.remove(model)

    def saved(self) -> dict[str, list]:
        """The mask as `save` writes it: `layers`, `keep`, a tensor of bool for each, `forgets`, and `edits`, pairs."""
        keep, edits = [keep.bool().cpu() for keep in self.keep], [[part.cpu() for part in edit] for edit in self.edits]
        return {"layers": list(self.layers), "keep": keep, "forgets": list(self.forgets), "edits": edits}

    def save(self, path: Path | str) -> None:
        files.save(Path(path), self.saved())

    @staticmethod
    def load(path: Path | str) -> Mask:
        """Raises ArtifactError where the file is not a mask."""
        saved = files.load(Path(path))
        try:
            layers, keep, forgets = (saved[key] for key in ("layers", "keep", "forgets"))
            if not all(each.dtype == torch.bool for each in keep):
                raise ValueError("keep must be of bool")
            edits = tuple(LowRank(*edit) for edit in saved.get("edits", ()))  # a file from before has none
            return Mask(tuple(layers), tuple(each.float() for each in keep), tuple(forgets), edits)
        except (LookupError, TypeError, AttributeError, ValueError, RuntimeError, NotImplementedError) as error:
            raise files.ArtifactError(f"{path}: is not a mask ({files.one_line(error)})") from None


def weight_mask(layer: nn.Module) -> WeightMask | None:
    """What is on the layer's weight, if it is a mask and nothing else."""
    found = layer.parametrizations["weight"] if parametrize.is_parametrized(layer, "weight") else ()
    return found[0] if len(found) == 1 and isinstance(found[0], WeightMask) else None


def original_weight(layer: nn.Module) -> Tensor:
    """The weight under a mask, or without one."""
    return layer.weight if weight_mask(layer) is None else layer.parametrizations["weight"].original


def put_on(layer: nn.Module, mask: WeightMask) -> None:
    parametrize.register_parametrization(layer, "weight", mask)
    type(layer).__getstate__ = refuse_pickling  # of a class that the layer has for itself


def take_off(layer: nn.Module) -> None:
    """Takes a mask off, where there is one."""
    if weight_mask(layer) is None:
        return
    # PyTorch takes the weight off its class, which copies of the layer share: now this one has its own.
    own = {name: value for name, value in vars(type(layer)).items() if name not in ("__dict__", "__weakref__")}
    layer.__class__ = type(type(layer).__name__, type(layer).__bases__, own)
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    # PyTorch puts the weight back behind the others; an optimizer's state goes by the order of parameters.
    for name in [name for name in layer._parameters if name != "weight"]:
        layer._parameters[name] = layer._parameters.pop(name)


@contextmanager
def all_or_none(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Gives layers back the masks and the weights that they had, where the context raises."""
    before = [(layer, weight_mask(layer), original_weight(layer).detach().clone()) for layer in layers]
    try:
        yield
    except BaseException:
        for layer, mask, weight in before:
            take_off(layer)
            layer.weight.data.copy_(weight)
            if mask is not None:
                put_on(layer, mask)
        raise
