"""The method `erase`: a class is taken from the representation, too, by edits of late layers."""

from __future__ import annotations

from eval import Request, unlearning_method
from mimu.erasing import ErasingConfig, erase_class
from mimu.masks import Mask


@unlearning_method("erase", runs_with="all", paper="after Hatami et al. 2026, arXiv:2604.15166", touches="a mask")
def erase(request: Request, *, config: ErasingConfig) -> Mask:
    """Late layers lose the direction of the class, and the last its output weights, trained against attackers."""
    mask, _ = erase_class(request.classifier, request.train, request.forget_class, config, request.seed)
    return mask
