"""What ranks weights for a request to forget a class: the saliency of each weight, which a trained GCN can adapt."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from mimu import data
from mimu.data import Amount, Count, GraphConfig, GraphGenerator, Positive, Snapshot
from mimu.model import MaskingGCN
from mimu.networks.hooked import is_finite
from mimu.runs.files import PACKAGE, ArtifactError, InputError, load, one_line

PRETRAINED = PACKAGE / "checkpoints" / "pretrained" / "gcn.pt"
KERNELS = PACKAGE / "configs" / "kernels.yaml"
TERMS = ("forgetting", "retention", "curvature")  # the features that the saliency is made of


def retain_saliency(snapshot: Snapshot, forget_row: int) -> Tensor:
    """By how much removing a weight lowers the other classes' loss K, to second order, (vertices).

    K is least where their samples' odds are those of the original without the forget class (`retention`, `curvature` of
    FEATURES). The mean is over the other classes, each weighted by (its cross entropy + 0.02)^0.5: the more the more
    the mask so far has hurt it.
    """
    weighting = (F.softplus(-snapshot.log_odds).mean(1) + 0.02).sqrt()
    weighting[forget_row] = 0
    falls = snapshot.feature("retention") - snapshot.feature("curvature") ** 2 / 2
    return weighting @ falls / weighting.sum()


def saliency(snapshot: Snapshot, forget_row: int, retain_weight: float, gcn: MaskingGCN | None = None) -> Tensor:
    """How much a weight is to be zeroed to forget a class, (vertices); the largest go first.

        a_v w E_d[dF/dw] + retain_weight b_v retain_saliency

    E_d[dF/dw], `forgetting` of FEATURES, is the gradient of -log(1 - p_d) on the class's samples (first-order saliency
    as in SNIP, Lee et al. 2019, arXiv:1810.02340, of what forgetting asks for).

    snapshot: for that class (`GraphGenerator.snapshot`), of which the TERMS, and what the GCN reads, were asked for
    gcn: gives the factors a_v and b_v from the class graph; without it, or before its training, they are 1
    """
    forget, retain = snapshot.feature("forgetting")[forget_row], retain_saliency(snapshot, forget_row)
    if gcn is not None:
        of_forget, of_retain = gcn(snapshot.class_graph(forget_row), snapshot.graph)[0].unbind(-1)
        forget, retain = of_forget * forget, of_retain * retain
    return forget + retain_weight * retain


def ranked(scores: Tensor, zeroed: Tensor, count: int) -> Tensor:
    """The vertices to zero next, (count): those of the largest scores (vertices) that are not among `zeroed`."""
    count = min(count, len(scores) - len(zeroed))
    return scores.index_fill(0, zeroed, float("-inf")).topk(count).indices


@dataclass(frozen=True)
class MaskingConfig:
    """How a request is answered: the snapshots that it takes, and how their scores rank the weights."""

    step: Amount | None
    snapshot_every: Count | None
    momentum: Annotated[float, "at least 0, below 1"]
    group_size: Count
    retain_weight: Positive
    penalty_growth: Annotated[float, "at least 1"]
    target: Positive
    max_kappa: Amount


@dataclass(eq=False)
class Ranking:
    """The saliency of every weight on the classifier masked so far, by the formula or with a trained GCN.

    gcn: None for the formula
    """

    config: MaskingConfig
    graphs: GraphGenerator
    forget_row: int
    seed: int
    gcn: MaskingGCN | None = None
    _snapshot: Snapshot | None = field(default=None, init=False)
    _zeroed: int = field(default=0, init=False)  # how many vertices were zeroed in that snapshot
    _left: float = field(default=float("inf"), init=False)  # the class's mean -log(1 - p) there
    _penalty: float = field(default=1.0, init=False)

    @torch.no_grad()
    def __call__(self, step: int, zeroed: Tensor) -> Tensor:
        """Scores (vertices), largest first to go, for the step that follows after the vertices `zeroed`."""
        snapshot = self._taken(step, zeroed)
        self._schedule(snapshot)
        return saliency(snapshot, self.forget_row, self._penalty * self.config.retain_weight, self.gcn)

    def _taken(self, step: int, zeroed: Tensor) -> Snapshot:
        """The snapshot for a step, after every `config.snapshot_every` steps anew.

        Between, it is the last one's first-order update; of kernels too large for a record to be kept, a new one.
        """
        every, last = self.config.snapshot_every, self._snapshot
        goes_on = last is not None and bool(last.records) and (step % every if every else step)
        if goes_on:
            self._snapshot = last.first_order_update(zeroed[self._zeroed :])
        else:
            self._snapshot = last = None  # not two at a time in memory
            names = [*TERMS] if self.gcn is None else [*TERMS, *self.graphs.config.features]
            generator = data.seeded("request", self.seed, self.graphs.classes[self.forget_row], step)
            samples = self.graphs.draw(self.config.group_size, generator)
            self._snapshot = self.graphs.snapshot(samples, names, self.graphs.mask_of(zeroed), self.forget_row)
        self._zeroed = len(zeroed)
        return self._snapshot

    def _schedule(self, snapshot: Snapshot) -> None:
        """Lowers what the others weigh where the class stalls: where -log(1 - p) has not fallen enough since last time.

        As in penalty methods, where a constraint (nothing is left of the class) that a constant weight only balances
        against the objective is enforced by one that grows (Nocedal and Wright 2006, Numerical Optimization, ch. 17).
        """
        before, self._left = self._left, F.softplus(snapshot.log_odds[self.forget_row]).mean().item()
        growth = self.config.penalty_growth
        if self._left > self.config.target / 100 and self._left > before / growth:
            self._penalty /= growth


@dataclass(frozen=True)
class TrainedGCN:
    """A masking GCN, the features that it reads, and the settings of its requests: what its checkpoint holds."""

    gcn: MaskingGCN
    graphs: GraphConfig
    masking: MaskingConfig

    @staticmethod
    def load(path: Path | str = PRETRAINED) -> TrainedGCN:
        """Reads what a run left in `checkpoints/`, or a tracked GCN. Raises ArtifactError."""
        checkpoint = load(Path(path))
        try:
            config, weights = checkpoint["config"], checkpoint["state_dict"]
            graphs = GraphConfig(**{each.name: config["graphs"][each.name] for each in fields(GraphConfig)})
            masking = MaskingConfig(**{each.name: config["eval"][each.name] for each in fields(MaskingConfig)})
            sizes = {name: config["gcn"][name] for name in ("hidden", "rounds", "message_passing")}
            gcn = MaskingGCN(graphs.num_features, **sizes, device="meta")  # without drawing weights
            gcn.load_state_dict(weights, assign=True)
            if not is_finite(gcn):
                raise ValueError("a weight is not a finite number")
            return TrainedGCN(gcn, graphs, masking)
        except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(f"{path}: is not the checkpoint of a masking GCN ({one_line(error)})") from None

    @staticmethod
    def of(gcn: MaskingGCN | TrainedGCN | None, device: torch.device) -> TrainedGCN:
        """A copy of a GCN in float32; the tracked one where it is None, whose settings a bare MaskingGCN takes."""
        if gcn is not None and not isinstance(gcn, MaskingGCN | TrainedGCN):
            raise InputError(f"gcn must be a MaskingGCN, a TrainedGCN or None, not {gcn!r}")
        trained = gcn if isinstance(gcn, TrainedGCN) else TrainedGCN.load()
        ranks = copy.deepcopy(gcn if isinstance(gcn, MaskingGCN) else trained.gcn).float().to(device)
        if not is_finite(ranks):
            raise InputError("gcn: a weight is not a finite number")
        if ranks.num_features != trained.graphs.num_features:
            must = f"read {trained.graphs.num_features} features, those of graphs.features and other_classes"
            raise InputError(f"gcn must {must}, not {ranks.num_features}")
        return replace(trained, gcn=ranks)

    def for_kernels(self, shapes: Iterable[tuple[int, ...]]) -> TrainedGCN:
        """The same with the settings of KERNELS; where no kernel reads several places, with its updates alone."""
        settings = yaml.safe_load(KERNELS.read_text())["eval"]
        if all(math.prod(shape[2:]) == 1 for shape in shapes):
            settings = {"snapshot_every": settings["snapshot_every"]}
        return replace(self, masking=replace(self.masking, **settings))
