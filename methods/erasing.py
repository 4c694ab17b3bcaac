"""Erasure: a class is taken from the representation, not only from the output, by one direction of a few late layers.

Attackers say what is left: each is a ridge regression from random features, in closed form, and a new one is drawn
at every step, so that what is learned fools none of them. The bar is a classifier that never saw the class. It tells
the class from others all the same: what attackers find in the inputs themselves says how well.
"""

from __future__ import annotations

from eval import Request, unlearning_method
from mimu.erasing import Erasing, erased
from mimu.masks import Mask


@unlearning_method("erase", runs_with="all", paper="after Hatami et al. 2026, arXiv:2604.15166", touches="a mask")
def erase(request: Request, *, config: Erasing) -> Mask:
    """Late layers read less of the class's direction, by shares learned against attackers, and its output row."""
    mask, _ = erased(request.classifier, request.train, request.forget_class, config, request.seed)
    return mask
