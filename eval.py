"""The metrics that score the answers of every method to a request, and unlearning as a function."""

from __future__ import annotations

import json
import math
import operator
import re
import time
import warnings
from collections.abc import Callable, Hashable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import baselines as baselines  # registers the published methods
from artifacts import Artifact, short
from audits import Audit, AuditConfig, look_at
from data import GraphGenerator, ImageData, Split, check_range, is_correct, number_of_weights
from erasure import probe_recall
from methods import METHODS, Request, check_hyperparameter
from methods import unlearning_method as unlearning_method  # for the methods that are added here
from model import HookedMNISTClassifier, Mask, MaskingGCN
from trainer import GCNRanking, MaskingConfig, TrainedGCN, TrainingError, ZeroingOrder, check_weights
from visualization import Visualization


@dataclass(frozen=True)
class EvalConfig(MaskingConfig):
    """How requests are answered and scored: the settings of the masks, of the methods and of the audits.

    methods: which to score; `all` that are registered, or None: those of the default run
    hyperparameters: of every method that has some, by its name
    """

    methods: tuple[str, ...] | Literal["all"] | None
    batch_size: int
    visualize: bool
    random_masks: int
    hyperparameters: dict[str, dict[str, int | float]]
    audit: AuditConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.method_names:
            if name not in METHODS:
                raise ValueError(f"methods: {name!r} is not registered: valid are {', '.join(METHODS)}")
        if "mimu" not in self.method_names or len(set(self.method_names)) < len(self.method_names):
            raise ValueError(f"methods must name mimu, and each method once, not {list(self.method_names)}")
        check_range("batch_size", self.batch_size, at_least=1)
        check_range("random_masks", self.random_masks, at_least=1)
        for name in self.hyperparameters:
            if name not in METHODS or not METHODS[name].hyperparameters:
                valid = ", ".join(each for each in METHODS if METHODS[each].hyperparameters)
                raise ValueError(f"hyperparameters.{name} is not a method with hyperparameters: valid are {valid}")
        for name in self.method_names:
            self._check_hyperparameters(name)

    def _check_hyperparameters(self, method: str) -> None:
        given, expected = self.hyperparameters.get(method, {}), METHODS[method].hyperparameters
        for name in given:
            if name not in expected:
                raise ValueError(
                    f"hyperparameters.{method}.{name} is not a setting: valid are {', '.join(expected) or 'none'}"
                )
        for name, kind in expected.items():
            key = f"hyperparameters.{method}.{name}"
            if name not in given:
                raise ValueError(f"{key} is missing: it must be {'an integer' if kind is int else 'a number'}")
            check_hyperparameter(key, given[name], kind)

    @property
    def method_names(self) -> tuple[str, ...]:
        """The methods to score."""
        if self.methods is None:
            return tuple(name for name, method in METHODS.items() if method.in_default_run)
        return tuple(METHODS) if self.methods == "all" else self.methods

    def decisive(self) -> dict[str, Any]:
        """The settings that the metrics depend on: without those of the plots and of what does not run."""
        settings = asdict(self) | {"methods": self.method_names, "visualize": None}
        settings["hyperparameters"] = {name: self.hyperparameters.get(name, {}) for name in self.method_names}
        if not self.audit.enabled:
            settings["audit"] = None
        return settings


def slug(name: str) -> str:
    """The name in letters, digits and underscores, as it stands in the names of files."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


@dataclass(frozen=True)
class Experiment:
    """What sets one experiment apart from the others of a sweep, and what it shares with them.

    variant: the name of the config among those of the run, "" where there is one only
    kappa: None until auto has found it
    gcn_seconds: what training the masking GCN took, once for all requests; config: the whole config
    made_by: what the results depend on, as in `Artifact`; files: the checkpoints that it is about
    """

    variant: str
    seed: int
    forget_digit: int
    mask_layer: int | tuple[int, ...] | None
    top_k: int
    kappa: int | None
    kappa_choice: Literal["fixed", "auto"]
    gcn_seconds: float
    config: dict[str, Any]
    made_by: dict[str, Any]
    files: dict[str, str] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """Its name, as files have it; at the end what tells it from experiments with other settings."""
        layers = [self.mask_layer] if isinstance(self.mask_layer, int) else self.mask_layer
        masked = "all" if layers is None else "_".join(map(str, layers))
        kappa = "auto" if self.kappa_choice == "auto" else f"{self.kappa}_fixed"
        name = f"seed_{self.seed}_digit_{self.forget_digit}_layer_{masked[:60]}_top_k_{self.top_k}_kappa_{kappa}"
        variant = f"_{slug(self.variant)[:60]}" if self.variant else ""
        return f"{name}{variant}_{short(self.made_by['settings'])}"

    def metrics(self, folder: Path) -> Artifact:
        """Its JSON in the folder of an evaluation."""
        return Artifact(metrics_folder(folder) / f"{self.id}.json", self.made_by)

    def mask(self, folder: Path) -> Artifact:
        """Its mask in the folder of an evaluation."""
        return Artifact(folder / "masks" / f"{self.id}.pt", self.made_by)


def unlearn(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    forget_class: int,
    gcn: MaskingGCN | TrainedGCN | None = None,
    mask_layer: int | tuple[int, ...] | None = -2,
    seed: int = 0,
) -> Mask:
    """The mask that makes a classifier of the user's own forget a class; the classifier is left as it is.

    model: any stack of linear layers, with or without bias, and ReLU between them
    inputs: (samples, ...), training samples, some of every class; labels: (samples), from 0 to the number of logits - 1
    gcn: what ranks the weights; None: the pretrained one, whose settings a bare MaskingGCN takes too
    mask_layer: an index among the linear layers, several, or None for all
    seed: of the samples that are drawn

    Warns where the class is not forgotten when the largest kappa of the settings is reached, and says how many percent
    of its samples are still classified as it; and where settings that ask for erasure do not get it by then.
    Raises ValueError where the model is something else, where labels and inputs do not fit it, and where a class has no
    sample.
    """
    if gcn is not None and not isinstance(gcn, MaskingGCN | TrainedGCN):
        raise ValueError(f"gcn must be a MaskingGCN, a TrainedGCN or None, not {gcn!r}")
    if inputs.dtype != torch.float32:
        raise ValueError(f"inputs must be float32, as the model and the masking GCN are, not {inputs.dtype}")
    if len(inputs) == 0 or labels.shape != inputs.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"labels must be integers of shape ({len(inputs)},), not {labels.dtype} of {tuple(labels.shape)}"
        )
    classifier = HookedMNISTClassifier.of(model, inputs[:100])
    num_classes = classifier.shapes[-1][0]
    if not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ValueError(f"labels must be from 0 to {num_classes - 1}, not {int(labels.min())} to {int(labels.max())}")
    forget_class = operator.index(forget_class)  # a number of NumPy or PyTorch draws the same samples
    if not 0 <= forget_class < num_classes:
        raise ValueError(f"forget_class must be from 0 to {num_classes - 1}, not {forget_class}")
    trained = gcn if isinstance(gcn, TrainedGCN) else TrainedGCN.load()
    masking_gcn = gcn if isinstance(gcn, MaskingGCN) else trained.gcn
    train = Split(inputs.flatten(1), labels.long())
    graphs = GraphGenerator(classifier, train, replace(trained.graphs, mask_layer=mask_layer), seed)
    top_k = number_of_weights(trained.top_k, graphs.graph.num_vertices)
    ranking = GCNRanking(trained.masking, masking_gcn.to(inputs.device), graphs, forget_class, top_k, seed)
    order = ZeroingOrder(trained.masking, graphs, ranking)
    forget = train.forget(forget_class)
    kappa = order.forgotten_at(forget)
    mask = Mask.zeroing(graphs.graph, order.first(kappa))
    with torch.no_grad(), mask.applied_to(classifier):
        left = 100 * (classifier(forget.images).argmax(1) == forget_class).float().mean().item()
    if left >= trained.masking.target:
        warnings.warn(f"{left:.1f} % of class {forget_class} are left after {kappa} zeroed weights", stacklevel=2)
    if not order.is_erased(mask, forget_class):
        warnings.warn(f"class {forget_class} is still represented after {kappa} zeroed weights", stacklevel=2)
    return mask


@dataclass(frozen=True)
class Answer:
    """An unlearned classifier, what it took from the request to it, and if it is a mask, the weights that it zeroes.

    zeroed_by_layer: how many of them are in each masked layer, the output row of the forget class apart
    """

    model: nn.Module
    seconds: float
    zeroed_by_layer: dict[str, int] | None

    @property
    def num_zeroed(self) -> int | None:
        return None if self.zeroed_by_layer is None else sum(self.zeroed_by_layer.values())


def valid_json(value: Any) -> Any:
    """The value with every number that JSON cannot hold (infinite, not a number) replaced by None."""
    if isinstance(value, dict):
        return {key: valid_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [valid_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def metrics_folder(folder: Path) -> Path:
    """Where the JSON of the experiments stands in the folder of an evaluation."""
    return folder / "Metrics and Plots" / "metrics"


class Eval:
    """Scores every method on one experiment with the five metrics, writes them as JSON and draws them.

    shared: results that do not depend on kappa, kept from one experiment of a request to the next
    folder: where `masks/` and `Metrics and Plots/` go
    """

    def __init__(
        self,
        config: EvalConfig,
        experiment: Experiment,
        request: Request,
        data: ImageData,
        folder: Path,
        shared: dict[Hashable, Any] | None = None,
    ) -> None:
        self.config = config
        self.experiment = experiment
        self.request = request
        self.data = data
        self.folder = folder
        self.metrics_path = experiment.metrics(folder).path
        self.graph = request.graphs.graph
        self._shared = {} if shared is None else shared
        self._own: dict[Hashable, Any] = {}

    def get_model_mask(self) -> Tensor:
        """The mask for the forget digit, 1 = keep: (m, n) for one masked layer, (vertices) for several."""
        return self._mask().as_tensor()

    def mnist_forget_set(self) -> DataLoader:
        """The test split's samples of the forget digit."""
        return self.data.test.forget(self.experiment.forget_digit).loader(self.config.batch_size)

    def mnist_retain_set(self) -> DataLoader:
        """The test split's samples of all other digits."""
        return self.data.test.retain(self.experiment.forget_digit).loader(self.config.batch_size)

    def training_forget_set(self) -> DataLoader:
        """The training samples of the forget digit that the activation graphs are made of."""
        return self.request.graphs.samples.forget(self.experiment.forget_digit).loader(self.config.batch_size)

    def training_retain_set(self) -> DataLoader:
        """The training samples of all other digits that the activation graphs are made of."""
        return self.request.graphs.samples.retain(self.experiment.forget_digit).loader(self.config.batch_size)

    @torch.no_grad()
    def inference(
        self, model: nn.Module, data_loader: DataLoader, is_forget_set: bool, description: str
    ) -> dict[str, float]:
        """Scores a classifier: sums over samples in double precision, divided by the number of samples.

        Returns `loss` (cross entropy, nats), `score` (percent classified correctly) and on the forget set `probability`
        (of the forget class, mean over the samples). Raises ValueError where there is no sample.
        """
        if not len(data_loader.dataset):
            raise ValueError(f"{description}: there is no sample to score")
        model.eval()
        loss = correct = probability = 0.0
        for images, labels in tqdm(data_loader, description, delay=2, leave=False, disable=None):
            logits, labels = model(images).cpu().double(), labels.cpu()
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            correct += is_correct(logits, labels).sum().item()
            probability += logits.softmax(1)[:, self.experiment.forget_digit].sum().item()
        count = len(data_loader.dataset)
        metrics = {"loss": loss / count, "score": 100 * correct / count}
        return metrics | {"probability": probability / count} if is_forget_set else metrics

    def eval_unlearning(self) -> dict[str, dict[str, float]]:
        """Every method on the forget set: loss, score and probability of the forget class."""
        metrics = {}
        for name in self.config.method_names:
            metrics[name] = self._scored(name, self.mnist_forget_set, is_forget_set=True)
        return metrics

    def eval_performance_degradation(self) -> dict[str, dict[str, float]]:
        """Every method on the retain set: loss and score."""
        metrics = {}
        for name in self.config.method_names:
            metrics[name] = self._scored(name, self.mnist_retain_set, is_forget_set=False)
        return metrics

    def eval_mask_efficacy(self) -> dict[str, dict[str, float]]:
        """Every keep mask on the forget set: with K weights of the masked layers, is the class still classified?"""
        metrics = {}
        for name in self.config.method_names:
            if METHODS[name].most_needed is not None:
                metrics[name] = self._efficacy(name)
        return metrics

    def eval_training_split(self) -> dict[str, dict[str, dict[str, float]]]:
        """Every method on training samples: for choices, as of a kappa to report, that the test split must not make."""
        return {
            name: {
                "forget": self._scored(name, self.training_forget_set, is_forget_set=True),
                "retain": self._scored(name, self.training_retain_set, is_forget_set=False),
            }
            for name in self.config.method_names
        }

    def eval_representation(self) -> dict[str, float]:
        """Percent of the class that the regression of the stopping rule finds, by method, and in the pixels.

        On training samples; empty where the graphs have no erasure feature.
        """
        graphs = self.request.graphs
        if not graphs.config.erasure:
            return {}
        recalls = {name: self._training_recall(name) for name in self.config.method_names}
        return {"pixels": graphs.pixel_recall[self.experiment.forget_digit].item()} | recalls

    def eval_audits(self) -> dict[str, dict[str, Any]]:
        """What every method's classifier still knows of the class, and how far it is from the retrained one."""
        if not self.config.audit.enabled:
            return {}
        return {name: self._audit(name) for name in self.config.method_names}

    def eval(self) -> dict[str, Any]:
        """Runs all evaluations, saves the mask, writes the JSON and, where the config says so, the plots."""
        started = time.perf_counter()
        experiment = self.experiment
        results = {
            "id": experiment.id,
            "variant": experiment.variant,
            "seed": experiment.seed,
            "forget_digit": experiment.forget_digit,
            "mask_layer": experiment.mask_layer,
            "top_k": experiment.top_k,
            "kappa": experiment.kappa,
            "kappa_choice": experiment.kappa_choice,
            "num_weights": sum(m * n for m, n in self.request.graphs.classifier.shapes),
            "mask_shapes": self.graph.shapes,
            "num_graph_vertices": self.graph.num_vertices,
            "num_graph_edges": self.graph.num_edges,
            "zeroed": self.request.order.first(experiment.kappa).tolist(),
            "unlearning_metrics": self.eval_unlearning(),
            "performance_degradation_metrics": self.eval_performance_degradation(),
            "mask_efficacy_metrics": self.eval_mask_efficacy(),
            "training_split_metrics": self.eval_training_split(),
            "training_recall": self.eval_representation(),
            "audit_metrics": self.eval_audits(),
            "methods": {name: METHODS[name].about() for name in self.config.method_names},
            "num_zeroed": {name: self._answer(name).num_zeroed for name in self.config.method_names},
            "zeroed_by_layer": {name: self._answer(name).zeroed_by_layer for name in self.config.method_names},
            "class_probabilities": {name: self._class_probabilities(name) for name in self.config.method_names},
            "weight_histograms": self._weight_histograms(),
            "config": experiment.config,
            "files": experiment.files,
            "seconds": {"gcn": experiment.gcn_seconds}
            | {name: self._answer(name).seconds for name in self.config.method_names},
        }
        results["seconds"]["experiment"] = time.perf_counter() - started
        experiment.mask(self.folder).save(self._mask().saved())
        experiment.metrics(self.folder).save(valid_json(results))
        if self.config.visualize:
            self.draw_visualization(results)
        return results

    def draw_visualization(self, results: dict[str, Any]) -> None:
        """Draws bar charts of each evaluation, where the forget set goes, and which weights are zeroed."""
        read_again = json.loads(json.dumps(valid_json(results)))
        Visualization(read_again, self.folder, self._shared).draw()

    def _mask(self) -> Mask:
        return Mask.zeroing(self.graph, self.request.order.first(self.experiment.kappa))

    def _answer(self, name: str) -> Answer:
        return self._once((name, "answer"), lambda: self._timed_answer(name), METHODS[name].uses_kappa)

    def _timed_answer(self, name: str) -> Answer:
        kappa = self.experiment.kappa if METHODS[name].uses_kappa else None
        request = self.request.at(kappa, is_auto=self.experiment.kappa_choice == "auto")
        original = request.classifier.state_dict()
        with self.data.sealed():
            started = time.perf_counter()
            try:
                model = METHODS[name].unlearn(request, **self.config.hyperparameters.get(name, {}))
                check_weights(model, "classifier", "eval.hyperparameters")
            except TrainingError as error:
                raise TrainingError(f"method {name}, digit {self.experiment.forget_digit}: {error}") from None
            seconds = time.perf_counter() - started
        for key, weight in request.classifier.state_dict().items():
            if not torch.equal(weight, original.get(key, weight[:0])):
                raise ValueError(f"method {name!r} changed the original's {key}: change request.classifier, a copy")
        return Answer(model, seconds + request.reused_seconds, request.zeroed_by_layer)

    def _scored(self, name: str, loader: Callable[[], DataLoader], is_forget_set: bool) -> dict[str, float]:
        return self._once(
            (name, loader.__name__),
            lambda: self.inference(self._answer(name).model, loader(), is_forget_set, name),
            METHODS[name].uses_kappa,
        )

    def _efficacy(self, name: str) -> dict[str, float]:
        def score() -> dict[str, float]:
            with self.data.sealed():
                choices = METHODS[name].most_needed(self.request.at(None))
                models = [self.request.keeping(vertices) for vertices in choices.reshape(-1, choices.shape[-1])]
            scored = [self.inference(model, self.mnist_forget_set(), True, f"{name}, kept") for model in models]
            return {metric: sum(metrics[metric] for metrics in scored) / len(scored) for metric in scored[0]}

        return self._once((name, "efficacy"), score)

    def _training_recall(self, name: str) -> float:
        def recall() -> float:
            graphs = self.request.graphs
            seen = look_at(self._answer(name).model, graphs.samples)
            recalls = probe_recall(seen.features, seen.labels, graphs.num_classes, graphs.config.ridge)
            return recalls[self.experiment.forget_digit].item()

        return self._once((name, "training recall"), recall, METHODS[name].uses_kappa)

    def _audit(self, name: str) -> dict[str, Any]:
        def audits() -> Audit:
            experiment = self.experiment
            retrained = self._answer("retrain").model if "retrain" in self.config.method_names else None
            models = (self.request.classifier, retrained)
            return Audit(self.config.audit, self.data, experiment.forget_digit, *models, experiment.seed)

        audit = self._once("audits", audits)
        return self._once((name, "audit"), lambda: audit(self._answer(name).model), METHODS[name].uses_kappa)

    @torch.no_grad()
    def _class_probabilities(self, name: str) -> list[float]:
        model = self._answer(name).model
        probabilities = torch.cat([model(images).softmax(1) for images, _ in self.mnist_forget_set()])
        return probabilities.double().mean(0).tolist()

    def _weight_histograms(self) -> list[dict[str, Any]]:
        """Of every masked layer: how many weights there are between `edges`, and how many of them the mask zeroes."""
        keep = self.graph.split(torch.cat([part.flatten() for part in self._mask().keep]).cpu())
        histograms = []
        for layer, weight, kept in zip(self.graph.layers, self.request.graphs.weights(), keep):
            weight = weight.cpu()
            edges = torch.linspace(float(weight.min()), float(weight.max()), 61)
            counts = {
                name: values.flatten().histogram(edges)[0].long().tolist()
                for name, values in (("all", weight), ("zeroed", weight[kept == 0]))
            }
            histograms.append({"layer": layer, "shape": list(weight.shape), "edges": edges.tolist()} | counts)
        return histograms

    def _once(self, key: Hashable, compute: Callable[[], Any], uses_kappa: bool = False) -> Any:
        """Computes a result once: for this experiment, or for all kappas of the request."""
        results = self._own if uses_kappa else self._shared
        if key not in results:
            results[key] = compute()
        return results[key]
