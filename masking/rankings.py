"""What ranks weights for a request to forget a class: a trained GCN, or a formula."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor

from mimu import data
from mimu.data import Amount, Count, GraphConfig, GraphGenerator, Look, Positive
from mimu.model import Mask, MaskingGCN, WeightGraph
from mimu.networks.hooked import is_finite
from mimu.runs.files import PACKAGE, ArtifactError, InputError, load, one_line

PRETRAINED = PACKAGE / "checkpoints" / "pretrained"


def pretrained_for(shapes: Sequence[tuple[int, ...]]) -> Path:
    """The tracked GCN for masked layers by the shapes of their weights: that for linear ones, or with kernels."""
    return PRETRAINED / ("kernels.pt" if any(len(shape) > 2 for shape in shapes) else "gcn.pt")


def sparing(damage: Tensor) -> Tensor:
    """What a class counts among the others, the more the more a mask has hurt it: (damage + 0.02)^0.5.

    damage: the cross entropy of each class under the mask (classes), nats
    """
    return (damage + 0.02).sqrt()


def contrast(importance: Tensor, damage: Tensor | None = None) -> Tensor:
    """How much more class d needs a weight than the others do: Q_d - sum(v_c Q_c, c != d) / sum(v_c, c != d).

    With `damage`, the cross entropy (classes) under the current mask, v_c is that of `sparing`; without it all v_c are
    equal.

    Shapes: importance Q (classes, vertices) to (classes, vertices), a row for every forget class d.
    """
    v = torch.ones_like(importance[:, 0]) if damage is None else sparing(damage)
    weighted = v[:, None] * importance
    return importance - (weighted.sum(0) - weighted) / (v.sum() - v)[:, None]


def set_difference(importance: Tensor, top_k: int) -> Tensor:
    """The published ranking: weights in the top-K of class d alone come first, by Q_d; the others follow by contrast.

    Shapes: importance Q (classes, vertices) to scores (classes, vertices), larger is zeroed earlier.
    """
    in_top_k = torch.zeros_like(importance).scatter_(1, importance.topk(top_k, 1).indices, 1.0)
    only_here = (in_top_k == 1) & (in_top_k.sum(0) == 1)
    rest = contrast(importance)
    lift = rest.amax(1, keepdim=True) - importance.amin(1, keepdim=True) + 1
    return torch.where(only_here, importance + lift, rest)


def fall_of_others(look: Look, forget_class: int) -> Tensor:
    """By how much removing a weight lowers the other classes' loss K, to second order, (vertices).

    K is least where their samples' odds are those of the original without the forget class (`retention`, `curvature` of
    FEATURES). The mean is over the other classes, weighted as in `contrast`.
    """
    v = sparing(look.loss)
    weighted = v[:, None] * (look.feature("retention") - look.feature("curvature") ** 2 / 2)
    weighted[forget_class] = 0
    return weighted.sum(0) / (v.sum() - v[forget_class])


WEIGHED = ("forgetting", "retention", "curvature")  # features that a GCN weighs


def weighed(gcn: MaskingGCN, look: Look, forget_class: int, relief: float = 1.0) -> Tensor:
    """Scores (vertices) by a GCN that weighs, on a look for that class.

    a_v w E_d[d(-log(1 - p_d))/dw] + relief b_v fall_of_others, with the weights a_v and b_v that the GCN gives to v.
    """
    own, others = gcn(next(look.class_graphs(forget_class)), look.graph)[0].unbind(-1)
    return own * look.feature("forgetting")[forget_class] + relief * others * fall_of_others(look, forget_class)


def ranked(scores: Tensor, graph: WeightGraph, scope: str, zeroed: Tensor, count: int) -> Tensor:
    """The vertices to zero next, (count): those of the largest scores (vertices) that are not among `zeroed`.

    With the scope layerwise, those of the first places within their layer: counted together with `zeroed`, every layer
    gives the same share.
    """
    if scope == "layerwise":
        layers = scores.index_fill(0, zeroed, float("inf")).split(graph.sizes)
        places = [part.argsort(descending=True, stable=True).argsort().to(part) + 0.5 for part in layers]
        scores = torch.cat([-place / len(place) for place in places])
    count = min(count, len(scores) - len(zeroed))
    return scores.index_fill(0, zeroed, float("-inf")).topk(count).indices


def mask_of(graphs: GraphGenerator, zeroed: Tensor) -> Mask | None:
    """The mask that switches off the vertices `zeroed`; None where there is none."""
    return Mask.zeroing(graphs.graph, zeroed) if len(zeroed) else None


@dataclass(frozen=True)
class MaskingConfig:
    """How a trained GCN answers a request: the class graphs it scores, and how their scores rank the weights."""

    step: Amount | None
    look_every: Count | None
    momentum: Annotated[float, "at least 0, below 1"]
    ranking: Literal["damage", "mean", "set_difference"]
    group_size: Count
    draws: Count
    target: Positive
    max_kappa: Amount
    patience: Annotated[int, "at least 0"]
    penalty_growth: Annotated[float, "at least 1"]

    def relief(self, step: int) -> float:
        """What the others weigh at a step of a request, beside forgetting, of what they do at its first one.

        As in penalty methods, where a constraint (nothing is left of the class) that a constant weight only balances
        against the objective is enforced by one that grows (Nocedal and Wright 2006, Numerical Optimization, ch. 17).
        """
        return self.penalty_growth**-step


@dataclass(eq=False)
class Ranking:
    """What ranks weights for a request, and its looks at the classifier: each is kept for the steps behind it."""

    config: MaskingConfig
    graphs: GraphGenerator
    forget_class: int
    seed: int

    def __post_init__(self) -> None:
        self._looks: list[Look] = []  # the last of every draw
        self._zeroed = self.graphs.nothing  # that they are of

    def looks(self, step: int, zeroed: Tensor, names: Sequence[str], forget_class: int | None) -> list[Look]:
        """What samples do on the classifier masked so far, a look for each of `config.draws`, to form features of.

        After every `config.look_every` steps the classifier is run on samples anew. Between, what zeros do is foreseen,
        but not of kernels.

        zeroed: the vertices that are zeroed before the step, in their order
        forget_class: as `GraphGenerator.look` takes it
        """
        every, seen = self.config.look_every, len(self._zeroed)
        goes_on = self._looks and self._looks[0].passes and torch.equal(zeroed[:seen], self._zeroed)
        if goes_on and (step % every if every else step):
            self._looks = [look.without(zeroed[seen:]) for look in self._looks]
        else:
            self._looks, mask = [], mask_of(self.graphs, zeroed)  # not two at a time in memory
            keys = (("request", self.seed, self.forget_class, step, draw) for draw in range(self.config.draws))
            samples = (self.graphs.draw(self.config.group_size, data.seeded(*key)) for key in keys)
            self._looks = [self.graphs.look(each, names, mask, forget_class) for each in samples]
        self._zeroed = zeroed
        return self._looks


@dataclass(eq=False)
class GCNRanking(Ranking):
    """How much a trained GCN wants each weight zeroed to forget a class, on the classifier masked so far."""

    gcn: MaskingGCN
    top_k: int

    @torch.no_grad()
    def __call__(self, step: int, zeroed: Tensor) -> Tensor:
        """Scores (vertices), largest first to go, for the step that follows after the vertices `zeroed`."""
        if self.gcn.weighs:
            return self._weighed(step, zeroed)
        importance, damage = self.importance(step, zeroed)
        if self.config.ranking == "set_difference":
            return set_difference(importance, self.top_k)[self.forget_class]
        return contrast(importance, damage if self.config.ranking == "damage" else None)[self.forget_class]

    @torch.no_grad()
    def importance(self, step: int, zeroed: Tensor) -> tuple[Tensor, Tensor]:
        """The GCN's mean logits Q (classes, vertices), and each class's cross entropy (classes), nats."""
        looks = self.looks(step, zeroed, self.graphs.config.features, None)
        importance = [torch.cat([self.gcn(part, look.graph) for part in look.class_graphs()]) for look in looks]
        return torch.stack(importance).mean(0), torch.stack([look.loss for look in looks]).mean(0)

    def _weighed(self, step: int, zeroed: Tensor) -> Tensor:
        names, relief = [*self.graphs.config.features, *WEIGHED], self.config.relief(step)
        looks = self.looks(step, zeroed, names, self.forget_class)
        return torch.stack([weighed(self.gcn, look, self.forget_class, relief) for look in looks]).mean(0)

    @torch.no_grad()
    def most_needed(self) -> Tensor:
        """The top-K weights of the forget class in the unmasked classifier, (K)."""
        nothing = self.graphs.nothing
        needed = self(0, nothing) if self.gcn.weighs else self.importance(0, nothing)[0][self.forget_class]
        return needed.topk(self.top_k).indices


@dataclass(eq=False)
class SaliencyRanking(Ranking):
    """What removing a weight does to the forget class's margin and to the other classes' loss, without a GCN.

        w E_d[d margin/dw] + forgetting_weight w E_d[d(-log(1 - p_d))/dw] + relief retain_weight fall_of_others

    The first terms are the first-order falls of the margin and of the forgetting loss, in which samples that are
    forgotten no longer count.
    """

    retain_weight: float
    forgetting_weight: float = 0.0

    def __call__(self, step: int, zeroed: Tensor) -> Tensor:
        """Scores (vertices), largest first to go, for the step that follows after the vertices `zeroed`."""
        names = ("margin", "retention", "curvature", *["forgetting"] * (self.forgetting_weight > 0))
        looks = self.looks(step, zeroed, names, self.forget_class)
        return torch.stack([self._scores(look, step) for look in looks]).mean(0)

    def _scores(self, look: Look, step: int) -> Tensor:
        label = self.forget_class
        scores = look.feature("margin")[label]
        if self.forgetting_weight:
            scores = scores + self.forgetting_weight * look.feature("forgetting")[label]
        return scores + self.config.relief(step) * self.retain_weight * fall_of_others(look, label)


@dataclass(frozen=True)
class TrainedGCN:
    """A masking GCN, the features that it reads, and the settings of its requests: what its checkpoint holds.

    saliency: `retain_weight` of the formula that may rank in its place
    """

    gcn: MaskingGCN
    graphs: GraphConfig
    masking: MaskingConfig
    top_k: Amount
    saliency: float

    @staticmethod
    def load(path: Path | str = PRETRAINED / "gcn.pt") -> TrainedGCN:
        """Reads what a run left in `checkpoints/`, or a tracked GCN. Raises ArtifactError."""
        checkpoint = load(Path(path))
        try:
            config, weights = checkpoint["config"], checkpoint["state_dict"]
            graphs, masking = (
                kind(**{field.name: config[section][field.name] for field in fields(kind)})
                for kind, section in ((GraphConfig, "graphs"), (MaskingConfig, "eval"))
            )
            num_features = next(weight for weight in weights.values() if weight.ndim == 2).shape[1]
            sizes = {name: config["gcn"][name] for name in ("hidden", "rounds", "message_passing", "weighs")}
            with data.seeded_initialisation(0):
                gcn = MaskingGCN(num_features, **sizes)
            gcn.load_state_dict(weights)
            if not is_finite(gcn):
                raise ValueError("a weight is not a finite number")
            saliency = config["eval"]["hyperparameters"]["saliency"]["retain_weight"]
            return TrainedGCN(gcn, graphs, masking, checkpoint["top_k"], saliency)
        except (RuntimeError, LookupError, TypeError, ValueError, AttributeError, StopIteration) as error:
            raise ArtifactError(f"{path}: is not the checkpoint of a masking GCN ({one_line(error)})") from None

    @staticmethod
    def of(
        gcn: MaskingGCN | TrainedGCN | None, device: torch.device, shapes: Sequence[tuple[int, ...]] = ()
    ) -> TrainedGCN:
        """A copy of a GCN in float32; that for `shapes` where it is None, whose settings a bare MaskingGCN takes."""
        if gcn is not None and not isinstance(gcn, MaskingGCN | TrainedGCN):
            raise InputError(f"gcn must be a MaskingGCN, a TrainedGCN or None, not {gcn!r}")
        trained = gcn if isinstance(gcn, TrainedGCN) else TrainedGCN.load(pretrained_for(shapes))
        ranks = copy.deepcopy(gcn if isinstance(gcn, MaskingGCN) else trained.gcn).float().to(device)
        if not is_finite(ranks):
            raise InputError("gcn: a weight is not a finite number")
        return replace(trained, gcn=ranks)

    def check(self, graphs: GraphConfig) -> None:
        """Raises ArtifactError where the features of graphs are not those that it reads."""
        reads = (self.graphs.features, self.graphs.other_classes, self.gcn.num_features)
        has = (graphs.features, graphs.other_classes, graphs.num_features)
        if reads != has:
            raise ArtifactError(f"graphs.features, other_classes, and how many there are, must be {reads}, not {has}")
