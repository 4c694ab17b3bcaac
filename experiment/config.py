"""The settings of a run, read from `configs/`, and the checks that need several of them, before any work starts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, make_dataclass, replace
from functools import cached_property, reduce
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field

import methods  # noqa: F401  # registers what is not in eval.py
from audits import AuditConfig
from data import DATASET_ROOT, DataSet, data_set
from eval import METHODS, EvalConfig
from experiment import settings
from experiment.files import ROOT
from mimu.graph import resolve_mask_layer
from mimu.pretrained import TrainedGCN
from mimu.saliency import GraphConfig
from mimu.settings import LIMIT, Amount, Bounds, Count, library_settings, number_of_weights
from model import ARCHITECTURES
from reporter import ReporterConfig
from trainer import GCNTrainerConfig, TrainerConfig

CONFIG = ROOT / "configs" / "config.yaml"
Seed = Annotated[int, Bounds(ge=0, le=2**63 - 1)]
NOT_EMPTY = Field(min_length=1)
RequestedKappa = int | Literal["auto"]  # the number of weights to zero; auto: the smallest that forgets


@dataclass(frozen=True)
class SweepConfig:
    """The experiments: one for every seed, top_k, forget digit and kappa.

    Args:
        forget_digits: the names of classes, or their labels where no class has such a name
        top_k: numbers or shares of the masked weights
        kappa: numbers or shares of the masked weights, and `auto` for the smallest number that forgets
        seeds: None for the one seed of the config
    """

    forget_digits: Annotated[tuple[Annotated[int, Bounds(ge=0)] | str, ...], NOT_EMPTY]
    top_k: Annotated[tuple[Amount, ...], NOT_EMPTY]
    kappa: Annotated[tuple[Amount | Literal["auto"], ...], NOT_EMPTY]
    seeds: Annotated[tuple[Seed, ...], NOT_EMPTY] | None


@dataclass(frozen=True)
class Config:
    """The settings of a whole run.

    Args:
        samples: training samples of every class for graphs and requests; None for all
        held_out: training samples that are scored in the place of the test split; 0 to score the test split
        save_graphs: writes the activation graphs to `datasets/Graphs/`, too
    """

    __pydantic_config__ = settings.STRICT

    seed: Seed
    device: str
    threads: Annotated[int, Bounds(ge=1, le=1024)] | None
    dataset: str
    samples: Count | None
    held_out: Annotated[int, Bounds(ge=0)]
    save_graphs: bool
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
        vertices, ranges = self.num_vertices, (self.gcn.kappa, self.gcn.partly_masked)
        for name, number, limit in (
            ("sweep.top_k", max(self.top_ks), vertices),
            ("sweep.kappa", max((kappa for kappa in self.kappas if kappa != "auto"), default=1), vertices - 1),
            ("eval.max_kappa", number_of_weights(self.eval.max_kappa, vertices), vertices - 1),
            ("gcn.kappa and partly_masked", sum(number_of_weights(high, vertices) for _, high in ranges), vertices - 1),
        ):
            if number > limit:
                raise ValueError(f"{name} must be at most {limit}, of {vertices} masked weights, not {number}")
        if odd := [name for name in self.eval.hyperparameters if name not in METHODS]:
            raise ValueError(f"eval.hyperparameters.{odd[0]} is not a method: valid are {', '.join(METHODS)}")
        for name in self.eval.method_names:
            strict = {"__pydantic_config__": settings.STRICT}
            kind = make_dataclass("Hyperparameters", METHODS[name].hyperparameters.items(), namespace=strict)
            settings.checked(kind, self.eval.hyperparameters.get(name, {}), f"eval.hyperparameters.{name}.")

    @cached_property
    def source(self) -> DataSet:
        """The data set's classes and the size of its images, before it is read. Raises DataError."""
        return data_set(self.dataset, DATASET_ROOT)

    @cached_property
    def forget_digits(self) -> list[int]:
        """The labels of the classes to forget. Raises ValueError for a class that the data set does not have."""
        names = self.source.class_names
        labels = {str(label): label for label in range(len(names))}
        labels |= {name: label for label, name in enumerate(names)}
        try:
            return list(dict.fromkeys(labels[str(each)] for each in self.sweep.forget_digits))
        except KeyError as error:
            valid = f"from 0 to {len(names) - 1} or of {settings.shown(names)}"
            raise ValueError(f"sweep.forget_digits must be {valid}, not {error}") from None

    @cached_property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shape of every weight of the classifier: (out, in), or that of kernels.

        Raises ValueError where the architecture cannot have these settings, or has too many weights.
        """
        with torch.device("meta"):
            network = self.classifier.network(self.source.size, len(self.source.class_names))
        if (count := sum(weight.numel() for weight in network.parameters())) > LIMIT:
            raise ValueError(f"hidden_sizes, channels and blocks must make at most {LIMIT} weights, not {count}")
        weights = [weight for name, weight in network.named_parameters() if name.endswith("weight")]
        return [tuple(weight.shape) for weight in weights if weight.ndim > 1]  # those of normalisations are vectors

    @property
    def architecture(self) -> str:
        """The sizes of the classifier's layers, in words."""
        return ARCHITECTURES[self.classifier.architecture].describe(self.classifier, self.shapes)

    @property
    def split(self) -> str:
        """The name of the samples that are scored."""
        return f"{self.held_out} held-out training samples" if self.held_out else "the test split"

    @property
    def num_vertices(self) -> int:
        """The number of masked weights. Raises ValueError for a mask_layer that is not there."""
        masked = resolve_mask_layer(self.graphs.mask_layer, len(self.shapes))
        return sum(math.prod(self.shapes[layer]) for layer in masked)

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(self.sweep.seeds or (self.seed,)))

    @property
    def top_ks(self) -> list[int]:
        """Every K, as a number of weights."""
        return list(dict.fromkeys(number_of_weights(top_k, self.num_vertices) for top_k in self.sweep.top_k))

    @property
    def kappas(self) -> list[RequestedKappa]:
        """Every kappa: the numbers of weights from small to large, and `auto` at the end."""
        fixed = {number_of_weights(kappa, self.num_vertices) for kappa in self.sweep.kappa if kappa != "auto"}
        return sorted(fixed) + ["auto"] * ("auto" in self.sweep.kappa)

    def torch_device(self) -> torch.device:
        """The device of the run: `auto` takes CUDA, else the CPU. Raises ValueError if it is not there."""
        device = self.device.replace("auto", "cuda" if torch.cuda.is_available() else "cpu")
        try:
            torch.zeros(1, device=device).item()  # which "meta" has not
        except (RuntimeError, AssertionError, NotImplementedError, ImportError):
            raise ValueError(f"device must be auto, cpu, or cuda or mps that is there, not {self.device!r}") from None
        return torch.device(device)


def load_variants(path: Path = CONFIG, overrides: Sequence[str] = ()) -> dict[str, Config]:
    """Reads the configs of a file by the names of its variants; the only name is "" if it has none.

    Later settings go over earlier ones: the library's, configs/config.yaml and configs/methods.yaml, the file that
    `path` extends, `path`, its variant, the overrides.

    Args:
        overrides: `section.key=value`, with the value in YAML

    Raises:
        ConfigError: a setting cannot work.
        ArtifactError: a file cannot be read.
    """
    layers = [settings.read(each) for each in dict.fromkeys((CONFIG, CONFIG.with_name("methods.yaml"), path))]
    layers.insert(0, {"eval.hyperparameters.erase": library_settings()["erase"]})
    variants = layers[-1].pop("variants", None)
    if variants is not None:
        settings.check_variants(path, variants)
    if "extends" in layers[-1]:
        below = settings.read(path.parent / str(layers[-1].pop("extends")))
        below.pop("variants", None)
        layers.insert(-1, below)
    over = [settings.parse_override(override) for override in overrides]
    configs = {}
    for name, changes in (variants or {"": None}).items():
        origin = [f"{path}, variant {name}" if name else str(path), *overrides]
        try:
            config = settings.checked(Config, reduce(settings.merge, [*layers, changes or {}, *over], {}))
        except ValueError as error:
            raise settings.ConfigError(" ".join(f"{' '.join(origin)}: {error}".split())) from None
        if config.gcn.pretrained:
            reads = TrainedGCN.load().graphs
            graphs = replace(config.graphs, features=reads.features, other_classes=reads.other_classes)
            config = replace(config, graphs=graphs)
        configs[name] = config
    return configs


def load_config(overrides: Sequence[str] = ()) -> Config:
    """Reads the config of the default run, with overrides. Raises ConfigError."""
    return load_variants(overrides=overrides)[""]
