"""Hiding classes: their output weights are set so that their logits are never the largest, and nothing else changes.

It takes no data and no time, and costs the retained classes nothing. The representation still holds the class.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimu.batches import batches_of
from mimu.errors import InputError, shortened
from mimu.inputs import check_model, copy_of, requested_classes, run_on_few
from mimu.masks import LayerMask, Mask
from mimu.wrapping import logits_of

HIDDEN_BIAS = -1e4  # of a hidden class, whose output weights are zeroed; float16 holds it, too


def head_of(model: nn.Module, mask_layer: Any, images: Tensor | None) -> str:
    """Finds the layer whose output is the logits, by its name in the model.

    Args:
        model: a copy, which hooks are left on
        mask_layer: the name of the layer or of its weight, or "auto"
        images: some samples, on which the model is run to find it; None: it must be named, or the only linear layer

    Raises:
        InputError: if there is no such layer, or several
    """
    kinds = nn.Linear if images is None and mask_layer == "auto" else nn.Linear | nn.Conv2d
    heads = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    names = shortened(", ".join(heads)) or "none"
    if mask_layer != "auto":
        heads = {name: module for name, module in heads.items() if mask_layer in (name, f"{name}.weight")}
    if images is not None:
        outputs: dict[nn.Module, Tensor] = {}
        for module in heads.values():
            module.register_forward_hook(lambda module, inputs, output: outputs.update({module: output}))
        logits = logits_of(model(images))
        is_head = {module: torch.equal(output.flatten(1), logits) for module, output in outputs.items()}
        heads = {name: module for name, module in heads.items() if is_head.get(module)}
    if len(heads) != 1:
        where = "the only linear layer, or named by mask_layer" if images is None else "one whose output is the logits"
        raise InputError(f"a class is hidden in the last layer, which must be {where}; linear layers are {names}")
    return next(iter(heads))


def hiding_mask(head: nn.Module, name: str, forget: Sequence[int]) -> Mask:
    """Makes the mask that hides classes in a layer whose outputs are the logits.

    With a bias, the output weights of a class become 0 and its bias `HIDDEN_BIAS`. Without one, its output weights
    become the mean of those of the retained classes: its logit is then the mean of theirs.

    Raises:
        InputError: if there is no class to retain, or one alone without a bias, whose logit the mean would equal
    """
    weight, bias = head.weight.detach(), head.bias
    retained = sorted(set(range(len(weight))) - set(forget))
    if not retained:
        raise InputError(f"there must be classes to retain beside {list(forget)}")
    if bias is None and len(retained) == 1:
        raise InputError(f"in a layer without biases two classes must be retained, not {retained[0]} alone: try 'mask'")
    rows = F.one_hot(torch.tensor(forget), len(weight)).T.to(weight)  # (classes, forget)
    keep = torch.ones_like(weight)
    if bias is None:
        v = weight[list(forget)].flatten(1) - weight[retained].flatten(1).mean(0)
        return Mask({f"{name}.weight": LayerMask(keep, rows, v.T)}, tuple(forget))
    keep[list(forget)] = 0
    shift = rows.sum(1) * (bias.detach() - HIDDEN_BIAS)
    on_bias = LayerMask(torch.ones_like(bias.detach()), shift[:, None], shift.new_ones(1, 1))
    return Mask({f"{name}.weight": LayerMask.of(keep), f"{name}.bias": on_bias}, tuple(forget))


def mask_that_hides(model: nn.Module, inputs: Any, labels: Any, forget: Any, mask_layer: Any, progress: bool) -> Mask:
    """The mask on the model that hides classes; see `unlearn`. Inputs, if there are some, show which layer is last.

    Raises:
        InputError: if the model has no such layer, or `forget` is none of its classes
    """
    check_model(model)
    network, carried, images = copy_of(model), Mask.on(model), None
    with torch.no_grad():
        if inputs is not None:
            _, images = run_on_few(network, next(batches_of(inputs, labels, progress)[1]))
        name = head_of(network, mask_layer, images)
    head = network.get_submodule(name)
    num_classes, forgotten = len(head.weight), carried.forgets if carried else ()
    requested = requested_classes(forget, torch.arange(num_classes), num_classes, forgotten)
    mask = hiding_mask(head, name, sorted(requested | set(forgotten)))
    mask = replace(mask, about="hidden: the representation still holds the class", method="hide")
    return (mask & carried if carried else mask).with_origins_of(model)
