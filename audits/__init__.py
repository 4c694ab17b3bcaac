"""What an unlearned classifier still knows of a class, beyond its predictions, and how far it is from retraining."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import Any

from torch import nn

from mimu.audits.predictions import entropy_attack, jensen_shannon, look_at, loss_attack
from mimu.audits.probes import AuditConfig, probe_scores, prototype_recall
from mimu.audits.relearning import relearn
from mimu.data import ImageData, seeded, some_of_every_class
from mimu.networks.hooked import weight_layers

AUDITS = (
    "js_forget", "js_retain", "loss_attack", "entropy_attack", "probe_recall", "probe_retain",
    "prototype_recall", "relearn_steps", "came_back", "relearn_scores", "relearn_from", "weights_changed",
)  # fmt: skip


def weights_changed(model: nn.Module, original: nn.Module) -> int:
    """How many weights differ from the original's."""
    pairs = zip(weight_layers(model), weight_layers(original))
    return sum(int((one.weight != other.weight).sum()) for one, other in pairs)


@dataclass
class Audit:
    """The audits of the classifiers that answer one request.

    original, retrained: the classifier before, and the one trained from scratch without the class, if it is there
    """

    config: AuditConfig
    data: ImageData
    forget_class: int
    seed: int
    original: nn.Module
    retrained: nn.Module | None

    def __post_init__(self) -> None:
        before = look_at(self.original, self.data.test)
        self.goal = 50 * before.correct[before.labels == self.forget_class].mean().item()
        self.reference = None if self.retrained is None else look_at(self.retrained, self.data.test)

    def __call__(self, model: nn.Module) -> dict[str, Any]:
        """The audits of one classifier; all but `weights_changed` are null where it has diverged.

        js_forget, js_retain: bits from the retrained classifier on the test split; null without one
        loss_attack, entropy_attack: of the forget class's training samples
        probe_recall: by the name of the probe; probe_retain: of the linear one
        prototype_recall: by the numbers of samples of every class in relearn_from
        relearn_steps: until the class's score is half of the original's, or those of the config where it does not come
            back, which came_back says; null where the loss is infinite, so that there is nothing to learn from
        relearn_scores: before every step and after the last
        relearn_from: steps from so many samples of every class, by their number
        """
        config, data, label = self.config, self.data, self.forget_class
        train, test = look_at(model, data.train), look_at(model, data.test)
        changed = weights_changed(model, self.original)
        if train.has_diverged or test.has_diverged:
            return dict.fromkeys(AUDITS) | {"weights_changed": changed}
        is_member, is_forget = train.labels == label, test.labels == label
        from_retrained = {
            name: self.reference and jensen_shannon(test.logits[part], self.reference.logits[part])
            for name, part in (("js_forget", is_forget), ("js_retain", ~is_forget))
        }
        probe_recall, probe_retain = probe_scores(train, test, label, config, self.seed)
        again = partial(relearn, model, data.test.forget(label), self.goal, config.relearn_steps)
        of_class = data.train.forget(label).batches(config.relearn_batch_size, seeded("relearn", self.seed))
        steps, scores = again(config.relearn_rate, of_class)
        relearn_from, recovered = {}, {}
        for count in config.relearn_from:
            recovered[str(count)] = prototype_recall(train, test, label, count, self.seed)
            samples = some_of_every_class(data.train, count, "relearn from", self.seed)
            relearn_from[str(count)], _ = again(config.relearn_from_rate, repeat(samples))
        return from_retrained | {
            "loss_attack": loss_attack(train.loss[is_member], test.loss[is_forget]),
            "entropy_attack": entropy_attack(train.logits[~is_member], test.logits, train.logits[is_member]),
            "probe_recall": probe_recall,
            "probe_retain": probe_retain,
            "prototype_recall": recovered,
            "relearn_steps": steps,
            "came_back": scores[-1] >= self.goal,
            "relearn_scores": scores,
            "relearn_from": relearn_from,
            "weights_changed": changed,
        }
