"""The masking GCN of a checkpoint, with the settings of its requests."""

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from mimu.errors import ArtifactError, InputError, in_one_line
from mimu.files import load
from mimu.graph import MaskingGCN
from mimu.pruning import PruningConfig
from mimu.saliency import GraphConfig
from mimu.settings import library_settings
from mimu.training import is_finite

Settings = TypeVar("Settings")
PRETRAINED = Path(__file__).with_name("gcn.pt")


@dataclass(frozen=True)
class TrainedGCN:
    """A masking GCN, the features that it reads, and the settings of its requests: what its checkpoint holds.

    gcn: None: the formula ranks alone
    """

    gcn: MaskingGCN | None
    graphs: GraphConfig
    pruning: PruningConfig

    @staticmethod
    def load(path: Path | str = PRETRAINED) -> "TrainedGCN":
        """Reads a checkpoint: one that a run wrote to `checkpoints/`, or the pretrained one.

        Raises ArtifactError.
        """
        checkpoint = load(Path(path))
        with in_one_line(ArtifactError, f"{path}: is not the checkpoint of a masking GCN"):
            config = checkpoint["config"]
            graphs = section(GraphConfig, config["graphs"])
            pruning = section(PruningConfig, {"tolerance": None} | config["eval"])
            sizes = {name: config["gcn"][name] for name in ("hidden", "rounds", "message_passing")}
            with torch.device("meta"):  # without drawing weights
                gcn = MaskingGCN(graphs.num_features, **sizes)
            gcn.load_state_dict(checkpoint["state_dict"], assign=True)
            return TrainedGCN(gcn, graphs, pruning)

    @staticmethod
    def of(gcn: "MaskingGCN | TrainedGCN | None", device: torch.device) -> "TrainedGCN":
        """Copies a GCN in float32 to a device; None stands for the pretrained one.

        A bare MaskingGCN gets the settings of the pretrained one. Raises InputError if it is none, does not read the
        features of these settings, or has a weight that is not finite.
        """
        if gcn is not None and not isinstance(gcn, MaskingGCN | TrainedGCN):
            raise InputError(f"gcn must be a MaskingGCN, a TrainedGCN or None, not {gcn!r}")
        trained = gcn if isinstance(gcn, TrainedGCN) else TrainedGCN.load()
        network = copy.deepcopy(gcn if isinstance(gcn, MaskingGCN) else trained.gcn).float().to(device)
        if not is_finite(network):
            raise InputError("gcn: a weight is not a finite number")
        if network.num_features != trained.graphs.num_features:
            must = f"read {trained.graphs.num_features} features, those of graphs.features and other_classes"
            raise InputError(f"gcn must {must}, not {network.num_features}")
        return replace(trained, gcn=network)

    def for_kernels(self, shapes: Iterable[tuple[int, ...]]) -> "TrainedGCN":
        """Takes the settings of `kernels`; if no kernel reads several places, their `snapshot_every` alone."""
        settings = library_settings()["kernels"]
        if all(math.prod(shape[2:]) == 1 for shape in shapes):
            settings = {"snapshot_every": settings["snapshot_every"]}
        return replace(self, pruning=replace(self.pruning, **settings))


def section(kind: type[Settings], values: Mapping[str, Any]) -> Settings:
    """Makes a dataclass of the values that have the names of its fields."""
    return kind(**{field.name: values[field.name] for field in fields(kind)})
