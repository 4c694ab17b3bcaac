"""How fast a class comes back when the classifier is trained on it again."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from mimu.audits.predictions import look_at
from mimu.data import Split
from mimu.networks.masks import Mask


def made_permanent(model: nn.Module) -> nn.Module:
    """A copy in which the zeros of a mask are the weights themselves, free to change again."""
    model = copy.deepcopy(model)
    if mask := Mask.on(model):
        mask.apply(model, permanent=True)
    return model


def relearn(
    model: nn.Module, test: Split, goal: float, max_steps: int, rate: float, samples: Iterator[Split]
) -> tuple[int | None, list[float]]:
    """Relearn time, Golatkar et al. 2020, arXiv:1911.04933: SGD on the cross entropy, all weights free.

    test: of the class, on which the score must reach the goal, percent; samples: a batch for every step
    Returns the number of steps (`max_steps` where the class does not come back, None where the loss is not finite), and
    the score before every step and after the last.
    """
    model = made_permanent(model).requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), rate)
    scores: list[float] = []
    for batch in samples:
        scores.append(100 * look_at(model, test).correct.mean().item())
        if scores[-1] >= goal or len(scores) > max_steps:
            break
        loss = F.cross_entropy(model(batch.images), batch.labels)
        if not loss.isfinite():
            return None, scores
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return len(scores) - 1, scores
