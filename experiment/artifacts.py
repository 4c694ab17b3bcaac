"""The files of a run: where each one stands, and the settings, code and data that decide its content."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import torch

from data import checksum
from experiment.config import Config, RequestedKappa
from experiment.files import ROOT, Artifact, code_of, slug
from mimu.files import digest
from mimu.pretrained import PRETRAINED
from trainer import Trainer

NO_NUMBERS = ("experiment", "reporter", "tables")  # packages and modules on which no number of a run depends


@dataclass(frozen=True)
class Training:
    """The training that requests share: of a classifier, and of the masking GCN on the graphs of its activations."""

    variant: str
    config: Config
    seed: int
    top_k: int

    @property
    def name(self) -> str:
        """The name of the training in messages."""
        return f"{self.variant}, seed {self.seed}" if self.variant else f"seed {self.seed}"

    @property
    def trainer(self) -> Trainer:
        """The trainer of the classifier."""
        return Trainer(self.config.classifier, self.seed, self.config.source.size)

    @cached_property
    def settings(self) -> dict[str, dict[str, Any]]:
        """The settings that decide the content of files, by the stage that makes these, as JSON holds them."""
        config, every = self.config, asdict(self.config)
        classifier = {name: every[name] for name in ("threads", "dataset", "held_out", "classifier")}
        classifier |= {"seed": self.seed, "device": config.torch_device().type}
        graphs = classifier | {"graphs": every["graphs"], "samples": every["samples"]}
        gcn = graphs | {"gcn": every["gcn"], "retain_weight": config.eval.retain_weight}
        if config.gcn.pretrained:
            gcn["pretrained"] = hashlib.sha256(PRETRAINED.read_bytes()).hexdigest()
        experiments = gcn | {"eval": config.eval.decisive(), "audit": every["audit"] if config.audit.enabled else None}
        experiments |= {"variant": self.variant, "top_k": self.top_k}
        return {"classifier": classifier, "graphs": graphs, "gcn": gcn, "experiments": experiments}


class Files:
    """The files of a run: where they are, and what decides their content.

    Two configs share the files that both would make alike, and no others: the names of files end in a digest of the
    settings that they depend on. After a change of the code, the data set or PyTorch a file is made again in its place.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        training_code = code_of(ROOT, ["main"], (*NO_NUMBERS, "eval", "methods", "audits"))
        self._code = dict.fromkeys(("classifier", "graphs", "gcn"), training_code)
        self._code["experiments"] = code_of(ROOT, ["main", "methods"], NO_NUMBERS)
        self._checksums: dict[str, str] = {}

    def shared(self, training: Training) -> dict[str, Artifact]:
        """Returns the files that all requests of a training share, by the stage that makes them."""
        config, end = training.config, f"seed_{training.seed}.pt"
        paths = {"classifier": f"checkpoints/classifier_{end}"}
        paths |= {"graphs": f"datasets/Graphs/{end}"} if config.save_graphs else {}
        paths |= {} if config.gcn.pretrained else {"gcn": f"checkpoints/gcn_{end}"}
        return {stage: self._artifact(path, training, stage) for stage, path in paths.items()}

    def retrained(self, training: Training, forget_class: int, seed: int | str) -> Artifact:
        """Returns the file of a classifier that was trained without a class. With seed "*" its name is a pattern."""
        path = f"checkpoints/retrained_seed_{seed}_digit_{forget_class}.pt"
        return self._artifact(path, training, "classifier", forget_digit=forget_class)

    def metrics_and_mask(self, training: Training, label: int, kappa: RequestedKappa) -> tuple[Artifact, Artifact]:
        """Returns the files of an experiment: its JSON, whose name is the experiment's id, and its mask."""
        name = f"seed_{training.seed}_digit_{label}_top_k_{training.top_k}"
        name += "_kappa_auto" if kappa == "auto" else f"_kappa_{kappa}_fixed"
        name += f"_{slug(training.variant)}" if training.variant else ""
        request = {"forget_digit": label, "kappa": kappa}
        metrics = self._artifact(f"eval/Metrics and Plots/metrics/{name}.json", training, "experiments", **request)
        return metrics, self._artifact(f"eval/masks/{name}.pt", training, "experiments", **request)

    def every(self, training: Training, forget_class: int | None = None) -> list[Artifact]:
        """Returns the shared files, and the files of the experiments on one forget class or, without one, on all."""
        artifacts = list(self.shared(training).values())
        labels = training.config.forget_digits if forget_class is None else [forget_class]
        for label, kappa in product(labels, training.config.kappas):
            artifacts += self.metrics_and_mask(training, label, kappa)
        return artifacts

    def _artifact(self, path: str, training: Training, stage: str, **request: Any) -> Artifact:
        dataset, settings = training.config.dataset, digest(training.settings[stage] | request)
        if not self._checksums.get(dataset):  # the data set may be downloaded later
            self._checksums[dataset] = checksum(dataset, self.root / "datasets")
        provenance = digest([settings, self._code[stage], self._checksums[dataset], torch.__version__])
        return Artifact((self.root / path).with_stem(f"{Path(path).stem}_{settings[:8]}"), provenance)


def trainings_of(configs: Mapping[str, Config]) -> Iterator[Training]:
    """Yields the trainings of all configs: one for every seed and top_k."""
    for variant, config in configs.items():
        for seed, top_k in product(config.seeds, config.top_ks):
            yield Training(variant, config, seed, top_k)
