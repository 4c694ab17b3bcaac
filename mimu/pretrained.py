"""The masking GCN of a checkpoint, with the settings of its requests."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from mimu.errors import ArtifactError, InputError, one_line
from mimu.files import load
from mimu.graph import MaskingGCN
from mimu.pruning import PruningConfig
from mimu.saliency import GraphConfig
from mimu.settings import library_settings
from mimu.training import is_finite

PRETRAINED = Path(__file__).with_name("gcn.pt")


@dataclass(frozen=True)
class TrainedGCN:
    """A masking GCN, the features that it reads, and the settings of its requests: what its checkpoint holds."""

    gcn: MaskingGCN
    graphs: GraphConfig
    masking: PruningConfig

    @staticmethod
    def load(path: Path | str = PRETRAINED) -> TrainedGCN:
        """Reads what a run left in `checkpoints/`, or a tracked GCN. Raises ArtifactError."""
        checkpoint = load(Path(path))
        try:
            config, weights = checkpoint["config"], checkpoint["state_dict"]
            graphs = GraphConfig(**{each.name: config["graphs"][each.name] for each in fields(GraphConfig)})
            masking = PruningConfig(**{each.name: config["eval"][each.name] for each in fields(PruningConfig)})
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
        """The same with the settings of kernels; where no kernel reads several places, with its updates alone."""
        settings = library_settings()["kernels"]
        if all(math.prod(shape[2:]) == 1 for shape in shapes):
            settings = {"snapshot_every": settings["snapshot_every"]}
        return replace(self, masking=replace(self.masking, **settings))
