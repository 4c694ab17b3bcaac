"""What an unlearned classifier still knows of a class, beyond its predictions, and how far it is from retraining."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import Any

from torch import nn

from audits.erasure import Erasure
from audits.predictions import entropy_attack, jensen_shannon, look_at, loss_attack
from audits.probes import AuditConfig, predicted
from audits.relearning import batches, relearn
from data import ImageData, some_of_every_class
from model import linear_layers

AUDITS = (
    "js_forget", "js_retain", "loss_attack", "entropy_attack", "probe_recall", "probe_retain", "ridge_recall",
    "relearn_steps", "came_back", "relearn_scores", "relearn_from", "weights_changed",
)  # fmt: skip


def weights_changed(model: nn.Module, original: nn.Module) -> int:
    """How many weights differ from the original's."""
    pairs = zip(linear_layers(model), linear_layers(original))
    return sum(int((one.weight != other.weight).sum()) for one, other in pairs)


@dataclass
class Audit:
    """The audits of the methods that answer one request.

    erasure: of the activation graphs, where it is asked for
    original, retrained: the classifier before, and the one trained from scratch without the class, if it is there
    """

    config: AuditConfig
    data: ImageData
    forget_class: int
    seed: int
    erasure: Erasure | None
    original: nn.Module
    retrained: nn.Module | None

    def __post_init__(self) -> None:
        before = look_at(self.original, self.data.test)
        self.goal = 50 * before.correct[before.labels == self.forget_class].mean().item()
        self.reference = None if self.retrained is None else look_at(self.retrained, self.data.test)

    def __call__(self, model: nn.Module) -> dict[str, Any]:
        """The audits of one classifier.

        js_forget, js_retain: Jensen-Shannon divergence from the retrained classifier on the test split, bits; null
            without one
        loss_attack: area under the curve, the forget class's training samples against its test samples
        entropy_attack: percent of the forget class's training samples that pass for members
        probe_recall: percent of the forget class's test samples that each probe finds, by the name of the probe
        probe_retain: percent of the other classes' test samples that the linear probe classifies correctly
        ridge_recall: percent of the class that the regression of the erasure finds, in the `representation` and in the
            `pixels`; null without erasure
        relearn_steps: until the class's score is half of the original's, or those of the config where it does not come
            back; null where the loss is infinite, so that there is nothing to learn from
        came_back: whether the score has become half of the original's
        relearn_scores: the score before every step and after the last
        relearn_from: steps until the class is back from so many samples of every class, by their number
        weights_changed: how many differ from the original's

        All but the last are null for a classifier that has diverged, whose outputs are not numbers.
        """
        config, data, label = self.config, self.data, self.forget_class
        train, test = look_at(model, data.train), look_at(model, data.test)
        changed = weights_changed(model, self.original)
        if train.has_diverged or test.has_diverged:
            return dict.fromkeys(AUDITS) | {"weights_changed": changed}
        is_member, is_forget = train.labels == label, test.labels == label
        divergences = {
            name: self.reference and jensen_shannon(test.logits[part], self.reference.logits[part])
            for name, part in (("js_forget", is_forget), ("js_retain", ~is_forget))
        }
        probes = predicted(train, test, config, self.seed)
        correct = {name: (found == test.labels).double() for name, found in probes.items()}
        again = partial(relearn, model, data.test.forget(label), self.goal, config.relearn_steps)
        of_class = batches(data.train.forget(label), config.relearn_batch_size, self.seed)
        steps, scores = again(config.relearn_rate, of_class)
        relearn_from = {}
        for count in config.relearn_from:
            samples = some_of_every_class(data.train, count, "relearn from", self.seed)
            relearn_from[str(count)], _ = again(config.relearn_from_rate, repeat(samples))
        return divergences | {
            "loss_attack": loss_attack(train.loss[is_member], test.loss[is_forget]),
            "entropy_attack": entropy_attack(train.logits[~is_member], test.logits, train.logits[is_member]),
            "probe_recall": {name: 100 * found[is_forget].mean().item() for name, found in correct.items()},
            "probe_retain": 100 * correct["linear"][~is_forget].mean().item(),
            "ridge_recall": self.erasure and self.erasure.recalls(model, label),
            "relearn_steps": steps,
            "came_back": scores[-1] >= self.goal,
            "relearn_scores": scores,
            "relearn_from": relearn_from,
            "weights_changed": changed,
        }
