"""What an unlearned classifier still knows of a class, beyond its predictions, and how far it is from retraining."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audits.predictions import entropy_attack, jensen_shannon, loss_attack, predictions_of
from audits.probes import found_by_probes, prototype_recall
from data import ImageData
from mimu.masks import Mask
from mimu.samples import Split, some_of_every_class
from mimu.seeds import seeded
from mimu.settings import Count

BATCH_SIZE = 128  # of the forget class's training samples, from which it is relearned by SGD
LEARNING_RATE = 0.0003
LEARNING_RATE_FROM_FEW = 0.003  # where all samples are in each step
AUDITS = (
    "js_forget", "js_retain", "loss_attack", "entropy_attack", "probe_recall", "usable_bits",
    "prototype_recall", "relearn_steps", "came_back", "relearn_scores", "relearn_from", "weights_changed",
)  # fmt: skip


@dataclass(frozen=True)
class AuditConfig:
    """Whether audits are made, and which."""

    enabled: bool
    # Beside the linear ones, which always run; `hidden`: at the layers before the last, too.
    probes: tuple[Literal["two_layer", "neighbours", "hidden"], ...]
    samples: Count | None
    relearn_steps: Count  # at most
    relearn_from: tuple[Count, ...]  # so few samples of every class, too


def relearn(
    model: nn.Module, test: Split, goal: float, max_steps: int, rate: float, samples: Iterator[Split]
) -> tuple[int | None, list[float]]:
    """Relearn time, Golatkar et al. 2020, arXiv:1911.04933: SGD on the cross entropy, all weights free.

    test: of the class, on which the score must reach the goal, percent; samples: a batch for every step
    Returns the steps (None where the loss is not finite), and the score before every one and after the last.
    """
    model = copy.deepcopy(model)
    if mask := Mask.on(model):
        mask.apply(model, permanent=True)
    model.requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), rate)
    scores: list[float] = []
    for batch in samples:
        scores.append(100 * predictions_of(model, test).correct.mean().item())
        if scores[-1] >= goal or len(scores) > max_steps:
            break
        loss = F.cross_entropy(model(batch.images), batch.labels)
        if not loss.isfinite():
            return None, scores
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return len(scores) - 1, scores


@dataclass
class Audit:
    """The audits of the classifiers that answer one request, beside the original and, if it is there, the retrained."""

    config: AuditConfig
    data: ImageData
    forget_class: int
    seed: int
    original: nn.Module
    retrained: nn.Module | None

    def __post_init__(self) -> None:
        self.train, count = self.data.train, self.config.samples
        if count is not None:
            self.train = some_of_every_class(self.train, count, "audit", self.seed)
        before = predictions_of(self.original, self.data.test)
        self.goal = 50 * before.correct[before.labels == self.forget_class].mean().item()
        self.reference = None if self.retrained is None else predictions_of(self.retrained, self.data.test)

    def __call__(self, model: nn.Module) -> dict[str, Any]:
        """All AUDITS of one classifier; where it has diverged, null but for `weights_changed`.

        The divergence is from the retrained classifier, on the test split, null without one. Relearning goes on until
        the class's score is half of the original's; of a loss that is infinite there is nothing to learn: null.
        """
        label, seed, data = self.forget_class, self.seed, self.data
        train = predictions_of(model, self.train)
        test = predictions_of(model, data.test)
        changed = sum(int((one != other).sum()) for one, other in zip(model.weights, self.original.weights))
        if train.has_diverged or test.has_diverged:
            return dict.fromkeys(AUDITS) | {"weights_changed": changed}
        is_member = train.labels == label
        is_forget = test.labels == label

        def from_retrained(chosen: Tensor) -> float | None:
            return self.reference and jensen_shannon(test.logits[chosen], self.reference.logits[chosen])

        again = partial(relearn, model, data.test.forget(label), self.goal, self.config.relearn_steps)
        of_class = data.train.forget(label).batches(BATCH_SIZE, seeded("relearn", seed))
        steps, scores = again(LEARNING_RATE, of_class)
        recovered, steps_from_few = {}, {}
        for count in self.config.relearn_from:
            recovered[str(count)] = prototype_recall(train, test, label, count, seed)
            few = some_of_every_class(data.train, count, "relearn from", seed)
            steps_from_few[str(count)], _ = again(LEARNING_RATE_FROM_FEW, repeat(few))
        return {
            "js_forget": from_retrained(is_forget),
            "js_retain": from_retrained(~is_forget),
            "loss_attack": loss_attack(train.loss[is_member], test.loss[is_forget]),
            "entropy_attack": entropy_attack(train.logits[~is_member], test.logits, train.logits[is_member]),
            **found_by_probes(train, test, label, seed, self.config.probes),
            "prototype_recall": recovered,  # by the number of samples of every class
            "relearn_steps": steps,
            "came_back": scores[-1] >= self.goal,
            "relearn_scores": scores,  # before every step and after the last
            "relearn_from": steps_from_few,  # by the number of samples of every class
            "weights_changed": changed,
        }
