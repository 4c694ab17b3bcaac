"""The settings of a run, read from `configs/` and checked before any work starts, and the files that they decide."""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, make_dataclass, replace
from functools import cached_property, reduce
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

import methods  # noqa: F401  # registers what is not in eval.py
from data import DATASET_ROOT, DataSet, checksum, data_set
from eval import METHODS, EvalConfig
from experiment import settings
from experiment.audits import AuditConfig
from experiment.files import ROOT, Artifact, code_of, slug, without_docstrings
from mimu.files import digest
from mimu.graph import resolve_mask_layer
from mimu.pretrained import PRETRAINED, TrainedGCN
from mimu.saliency import GraphConfig
from mimu.settings import Amount, Bounds, Count, library_settings, number_of_weights
from model import ARCHITECTURES
from reporter import ReporterConfig
from trainer import GCNTrainerConfig, Trainer, TrainerConfig

CONFIG = ROOT / "configs" / "config.yaml"
NO_NUMBERS = ("experiment", "reporter", "tables")  # packages and modules on which no number of a run depends
Seed = Annotated[int, Bounds(ge=0, le=2**63 - 1)]
NOT_EMPTY = Field(min_length=1)
RequestedKappa = int | Literal["auto"]  # the number of weights to zero; auto: the smallest that forgets


@dataclass(frozen=True)
class SweepConfig:
    """The experiments: one for every seed, forget digit and kappa.

    Args:
        forget_digits: the names of classes, or their labels where no class has such a name
        top_k: a number or a share of the masked weights
        kappa: numbers or shares of the masked weights, and `auto` for the smallest number that forgets
        seeds: None for the one seed of the config
    """

    forget_digits: Annotated[tuple[Annotated[int, Bounds(ge=0)] | str, ...], NOT_EMPTY]
    top_k: Amount
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
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?|mps)$")]
    threads: Annotated[int, Bounds(ge=1, le=1024)]
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
        self.forget_digits  # noqa: B018  # raises
        vertices, ranges = self.num_vertices, (self.gcn.kappa, self.gcn.partly_masked)
        for name, number, limit in (
            ("sweep.top_k", self.top_k, vertices),
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

        Raises ValueError where the architecture cannot have these settings.
        """
        with torch.device("meta"):
            network = self.classifier.network(self.source.size, len(self.source.class_names))
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
    def top_k(self) -> int:
        """The number of weights that a keep mask keeps."""
        return number_of_weights(self.sweep.top_k, self.num_vertices)

    @property
    def kappas(self) -> list[RequestedKappa]:
        """Every kappa: the numbers of weights from small to large, and `auto` at the end."""
        fixed = {number_of_weights(kappa, self.num_vertices) for kappa in self.sweep.kappa if kappa != "auto"}
        return sorted(fixed) + ["auto"] * ("auto" in self.sweep.kappa)

    def torch_device(self) -> torch.device:
        """The device of the run: `auto` takes CUDA, else the CPU."""
        best = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.device(best if self.device == "auto" else self.device)


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


@dataclass(frozen=True)
class Training:
    """The training that requests share: of a classifier, and of the masking GCN on the graphs of its activations."""

    variant: str
    config: Config
    seed: int

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
        experiments |= {"variant": self.variant, "top_k": config.top_k}
        return {"classifier": classifier, "graphs": graphs, "gcn": gcn, "experiments": experiments}


class Files:
    """The files of a run: where they are, and what decides their content.

    Two configs share the files that both would make alike, and no others: the names of files end in a digest of the
    settings that they depend on. After a change of the code, the data set or PyTorch a file is made again in its place.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        training_code = code_of(ROOT, ["main"], (*NO_NUMBERS, "eval", "methods"))
        self._code = dict.fromkeys(("classifier", "graphs", "gcn"), training_code)
        audits = without_docstrings((ROOT / "experiment" / "audits.py").read_bytes())
        self._code["experiments"] = digest([code_of(ROOT, ["main", "methods", "mimu.auditing"], NO_NUMBERS), audits])
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
        name = f"seed_{training.seed}_digit_{label}_top_k_{training.config.top_k}"
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
    """Yields the trainings of all configs: one for every seed."""
    for variant, config in configs.items():
        for seed in config.seeds:
            yield Training(variant, config, seed)
