"""What the settings of the YAML files beside this one are read into, and what is checked of them before any work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

import torch

import methods  # noqa: F401  # registers what is not in eval.py
from audits import AuditConfig
from data import DATASET_ROOT, DataSet, data_set
from eval import METHODS, EvalConfig
from experiment import settings
from experiment.files import ROOT
from mimu.graph import resolve_mask_layer
from mimu.pretrained import TrainedGCN
from mimu.saliency import GraphConfig
from mimu.settings import Amount, Count, number_of_weights
from reporter import ReporterConfig
from trainer import GCNTrainerConfig, TrainerConfig

CONFIG = ROOT / "configs" / "config.yaml"
BASES = (CONFIG, CONFIG.with_name("methods.yaml"))
Seed = Annotated[int, f"at least 0, at most {2**63 - 1}"]
RequestedKappa = int | Literal["auto"]  # how many weights to zero; auto: as few as forget


@dataclass(frozen=True)
class SweepConfig:
    """The experiments: one for every seed, top_k, forget digit and kappa.

    forget_digits: names of classes, or their labels where no class has such a name
    top_k: numbers or shares of the masked weights; kappa: the same, and `auto` for the smallest that forgets
    seeds None: the one seed of the config
    """

    forget_digits: tuple[Annotated[int, "at least 0"] | str, ...]
    top_k: tuple[Amount, ...]
    kappa: tuple[Amount | Literal["auto"], ...]
    seeds: tuple[Seed, ...] | None

    def __post_init__(self) -> None:
        for each in fields(self):
            values = getattr(self, each.name)
            if values is not None and (not values or len(set(values)) < len(values)):
                raise ValueError(f"{each.name} must name at least one value, and each once, not {list(values)}")


@dataclass(frozen=True)
class Config:
    """A whole run.

    samples: how many training samples of every class graphs and requests have; None: all
    save_graphs: whether the activation graphs are also written to `datasets/Graphs/`
    held_out: how many training samples are scored in the place of the test split; 0: the test split
    """

    seed: Seed
    device: str
    threads: Annotated[int, "at least 1, at most 1024"] | None
    dataset: str
    samples: Count | None
    save_graphs: bool
    held_out: Annotated[int, "at least 0"]
    classifier: TrainerConfig
    graphs: GraphConfig
    gcn: GCNTrainerConfig
    sweep: SweepConfig
    eval: EvalConfig
    audit: AuditConfig
    report: ReporterConfig

    def __post_init__(self) -> None:
        self.torch_device()
        self.forget_digits  # noqa: B018  # raises
        for section, needed in (("classifier", "shapes"), ("graphs", "num_vertices")):
            try:
                vertices = getattr(self, needed)
            except ValueError as error:
                raise ValueError(f"{section}.{error}") from None
        if self.gcn.pretrained:
            reads = TrainedGCN.load().graphs
            graphs = replace(self.graphs, features=reads.features, other_classes=reads.other_classes)
            object.__setattr__(self, "graphs", graphs)
        for name, kappas in (("sweep.kappa", self.sweep.kappa), ("eval.max_kappa", [self.eval.max_kappa])):
            for kappa in kappas:
                if kappa != "auto" and number_of_weights(kappa, vertices) >= vertices:
                    raise ValueError(f"{name} must be from 1 to {vertices - 1} (masked weights less one), not {kappa}")
        if max(self.top_ks) > vertices:
            raise ValueError(f"sweep.top_k must be from 1 to {vertices} (masked weights), not {max(self.top_ks)}")
        largest = sum(number_of_weights(high, vertices) for _, high in (self.gcn.kappa, self.gcn.partly_masked))
        if largest >= vertices:
            raise ValueError(f"gcn.kappa and partly_masked reach {largest} weights together, of {vertices} masked ones")
        self._check_hyperparameters()

    def _check_hyperparameters(self) -> None:
        """Raises ValueError where a method lacks a hyperparameter, has one that is not its own or out of range."""
        given = self.eval.hyperparameters
        if odd := [name for name in given if name not in METHODS]:
            raise ValueError(f"eval.hyperparameters.{odd[0]} is not a method: valid are {', '.join(METHODS)}")
        for name in self.eval.method_names:
            key, method = f"eval.hyperparameters.{name}", METHODS[name]
            values = given.get(name, {})
            parameters = method.hyperparameters
            needed = {each for each, parameter in parameters.items() if parameter.default is parameter.empty}
            if not needed <= set(values) <= set(parameters):
                must, has = (", ".join(names) or "none" for names in (parameters, values))
                raise ValueError(f"{key} must have values of {must}, not of {has}")
            for each, value in values.items():
                hint = parameters[each].annotation
                try:
                    settings.converted(value, hint)
                except TypeError:
                    raise ValueError(f"{key}.{each} must be {settings.refusal(value, hint)}") from None

    @cached_property
    def source(self) -> DataSet:
        """What is known of the data set before it is read. Raises DataError where it cannot be one."""
        return data_set(self.dataset, DATASET_ROOT)

    @cached_property
    def forget_digits(self) -> list[int]:
        """The labels of the classes to forget. Raises ValueError where one is not there."""
        names = self.source.class_names
        labels = {str(label): label for label in range(len(names))}
        labels |= {name: label for label, name in enumerate(names)}
        given = [str(each) for each in self.sweep.forget_digits]
        if odd := [each for each in given if each not in labels]:
            valid = f"from 0 to {len(names) - 1} or of {settings.shown(names)}"
            raise ValueError(f"sweep.forget_digits must be {valid}, not {odd[0]}")
        return list(dict.fromkeys(labels[each] for each in given))

    @cached_property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shape of every weight of the classifier: (out, in), or that of kernels."""
        with torch.device("meta"):
            network = self.classifier.network(self.source.size, len(self.source.class_names))
        weights = [weight for name, weight in network.named_parameters() if name.endswith("weight")]
        return [tuple(weight.shape) for weight in weights if weight.ndim > 1]  # those of normalisations are vectors

    @property
    def architecture(self) -> str:
        """The sizes of the classifier's layers, in words."""
        of, shapes = self.classifier, self.shapes
        if of.architecture == "resnet":
            return f"ResNet-{2 + 2 * len(of.channels) * of.blocks}"
        if of.architecture == "vit":
            return f"ViT/{of.patch} {of.channels[0]}-{of.hidden_sizes[0]}, blocks: {of.blocks}"
        sizes = "-".join(map(str, [shapes[0][1], *(shape[0] for shape in shapes)]))
        return ("" if of.architecture == "mlp" else of.architecture + " ") + sizes + " with biases" * of.bias

    @property
    def split(self) -> str:
        """What is scored, in words."""
        return f"{self.held_out} held-out training samples" if self.held_out else "the test split"

    @property
    def num_vertices(self) -> int:
        """The number of masked weights. Raises ValueError where mask_layer is not there."""
        masked = resolve_mask_layer(self.graphs.mask_layer, len(self.shapes))
        return sum(math.prod(self.shapes[layer]) for layer in masked)

    @property
    def seeds(self) -> tuple[int, ...]:
        return (self.seed,) if self.sweep.seeds is None else self.sweep.seeds

    @property
    def top_ks(self) -> list[int]:
        """Every K as a number of weights."""
        return list(dict.fromkeys(number_of_weights(top_k, self.num_vertices) for top_k in self.sweep.top_k))

    @property
    def kappas(self) -> list[RequestedKappa]:
        """Every kappa: numbers of weights from small to large, auto at the end."""
        fixed = {number_of_weights(kappa, self.num_vertices) for kappa in self.sweep.kappa if kappa != "auto"}
        return sorted(fixed) + ["auto"] * ("auto" in self.sweep.kappa)

    def torch_device(self) -> torch.device:
        """The device to run on: `auto` takes CUDA, else the CPU. Raises ValueError where it is not there."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            torch.zeros(1, device=self.device).item()  # which "meta" has not
        except (RuntimeError, AssertionError, NotImplementedError, ImportError):
            raise ValueError(f"device must be auto, cpu, or cuda or mps that is there, not {self.device!r}") from None
        return torch.device(self.device)


def load_variants(path: Path = CONFIG, overrides: Sequence[str] = ()) -> dict[str, Config]:
    """The configs of a file by the names of its variants; where it has none, one named "". Raises ConfigError."""
    return settings.load_variants(Config, BASES, path, overrides)


def load_config(overrides: Sequence[str] = ()) -> Config:
    """The config of the default run with what overrides change. Raises ConfigError."""
    return load_variants(overrides=overrides)[""]
