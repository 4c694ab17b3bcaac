"""Requests to forget a class, five methods that unlearn it, and the metrics that score all methods."""

import copy
import json
import math
import time
from collections.abc import Callable, Hashable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from statistics import fmean
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import ImageData
from experiment.files import Artifact
from experiment.registry import METHODS, unlearning_method
from mimu.errors import TrainingError
from mimu.graph import MaskingGCN
from mimu.hooked import HookedClassifier
from mimu.masks import Mask
from mimu.pruning import Pruning, PruningConfig, PruningResult, Ranking, RemainingCounter, prune
from mimu.saliency import ActivationGraphs
from mimu.samples import Split, is_correct
from mimu.seeds import seeded
from mimu.training import check_weights
from trainer import Trained, Trainer, UnlearningSFT, UnlearningSFTConfig

RANDOM_MASKS = 20  # random keep masks that the control of the mask efficacy averages


@dataclass(frozen=True)
class EvalConfig(PruningConfig):
    """The settings of the masks, of the methods and of the plots.

    methods: names of the methods to score; `all`: all but those that run by name alone; None: those of the default run
    hyperparameters: those of every method that has some, by the name of the method
    """

    methods: tuple[str, ...] | Literal["all"] | None
    visualize: bool
    hyperparameters: dict[str, dict[str, int | float]]

    def __post_init__(self) -> None:
        names = self.method_names
        if set(names) - set(METHODS) or "mimu" not in names or len(set(names)) < len(names):
            raise ValueError(f"methods must name mimu and others of {', '.join(METHODS)} once, not {list(names)}")

    @property
    def method_names(self) -> tuple[str, ...]:
        """The names of the methods to score."""
        if isinstance(self.methods, tuple):
            return self.methods
        return tuple(name for name, method in METHODS.items() if method.runs_with in ("default", self.methods))

    def decisive(self) -> dict[str, Any]:
        """Returns the settings that the metrics depend on, without those of plots and of methods that do not run."""
        hyperparameters = {name: self.hyperparameters.get(name, {}) for name in self.method_names}
        return asdict(self) | {"methods": self.method_names, "visualize": None, "hyperparameters": hyperparameters}


@dataclass(frozen=True)
class Request:
    """One request to forget a class, and everything that a method may use: of the data only the training split.

    original, trainer: the classifier, which methods must not change, and the trainer that trained it
    graphs, gcn: the activation graphs of the original, and the masking GCN that was trained on them
    forget_class: the label of the class to forget
    top_k: the number of weights that a keep mask keeps
    requested_kappa: the number of weights to zero; `auto`: as few as forget the class; None: no method depends on it
    prunings: the steps of every method by its name, kept from one kappa to the next
    kept: what methods keep from one request to the next on the same classifier, by names of their own
    retrain: from a seed to a classifier trained without the class; None: `trainer` trains it on the samples of `train`
    """

    config: EvalConfig
    original: HookedClassifier
    trainer: Trainer
    train: Split
    graphs: ActivationGraphs
    gcn: MaskingGCN
    forget_class: int
    top_k: int
    seed: int
    requested_kappa: int | Literal["auto"] | None = None
    prunings: dict[str, Pruning] = field(default_factory=dict)
    kept: dict[str, Any] = field(default_factory=dict)
    retrain: Callable[[int], Trained] | None = None

    @property
    def classifier(self) -> HookedClassifier:
        """A new copy of the original classifier, which a method may change."""
        return copy.deepcopy(self.original)

    @property
    def forget(self) -> Split:
        """The training samples of the forget class."""
        return self.train.forget(self.forget_class)

    @property
    def retain(self) -> Split:
        """The training samples of the retained classes."""
        return self.train.retain(self.forget_class)

    def retrained(self, seed: int) -> Trained:
        """Returns a classifier that was trained from scratch as the original was, but without the forget class."""
        if self.retrain is not None:
            return self.retrain(seed)
        return replace(self.trainer, seed=seed).trained(self.retain, self.graphs.num_classes)

    @property
    def kappa(self) -> int:
        """The number of weights to zero; for `auto` it is the number that mimu zeroes.

        Raises ValueError if the method was not registered with uses_kappa=True.
        """
        if self.requested_kappa is None:
            raise ValueError("this method reads request.kappa: register it with uses_kappa=True")
        return len(mimu(self).vertices) if self.requested_kappa == "auto" else self.requested_kappa

    @property
    def class_index(self) -> int:
        """The index of the forget class where tensors of the graphs stand class after class."""
        return self.graphs.classes.index(self.forget_class)

    def in_steps(
        self, name: str, ranking: Ranking | None = None, gcn: MaskingGCN | None = None, all_at_once: bool = False
    ) -> PruningResult:
        """Zeroes the highest-scoring weights up to kappa, with `auto` up to the smallest kappa that forgets the class.

        Args:
            name: of the method
            ranking: from the number of a step and the vertices zeroed before it to scores (vertices); None: saliency
            gcn: rescales the saliency; None: the formula as it is
            all_at_once: scores the weights once, instead of anew after every `eval.step` weights
        """
        if name not in self.prunings:
            config = replace(self.config, step=None) if all_at_once else self.config
            counter = RemainingCounter(self.graphs, self.class_index, self.forget, config.target)
            steps = prune(self.graphs, self.class_index, config, self.seed, gcn, ranking, counter=counter)
            self.prunings[name] = Pruning(steps, counter, config)
        pruning = self.prunings[name]
        return pruning.chosen() if self.requested_kappa == "auto" else pruning.at(self.requested_kappa)


def every_vertex(request: Request) -> Tensor:
    return torch.arange(request.graphs.graph.num_vertices)


@unlearning_method("original", most_needed=every_vertex, touches="nothing", needs="nothing")
def original(request: Request) -> nn.Module:
    """The classifier as it is: nothing is forgotten. As a keep mask it keeps every weight."""
    return request.classifier


def most_needed(request: Request) -> Tensor:
    first_step = next(prune(request.graphs, request.class_index, request.config, request.seed, request.gcn))
    return first_step.scores.topk(request.top_k).indices


@unlearning_method("mimu", uses_kappa=True, most_needed=most_needed, touches="a mask")
def mimu(request: Request) -> PruningResult:
    """The kappa weights that the masking GCN zeroes first."""
    return request.in_steps("mimu", gcn=request.gcn)


def random_vertices(request: Request, count: int, draw: int = 0) -> Tensor:
    generator = seeded("random", request.seed, request.forget_class, draw)
    return torch.randperm(request.graphs.graph.num_vertices, generator=generator)[:count]


def random_choices(request: Request) -> Tensor:
    """Draws several keep masks (masks, K), since a single one may keep a class or lose it by chance."""
    return torch.stack([random_vertices(request, request.top_k, draw) for draw in range(RANDOM_MASKS)])


@unlearning_method("random", uses_kappa=True, most_needed=random_choices, touches="a mask", needs="nothing")
def random(request: Request) -> Mask:
    """The control: kappa random weights of the same layers."""
    return request.graphs.graph.zeroing(random_vertices(request, request.kappa))


@unlearning_method("sft", paper="after Graves et al. 2021, arXiv:2010.10981", touches="one layer", needs="forget set")
def sft(request: Request, *, config: UnlearningSFTConfig) -> nn.Module:
    """Fine-tuning of the masked layers on random labels for the forget class's training samples."""
    return UnlearningSFT(config, request.seed).unlearn(request.classifier, request.forget, request.graphs.graph.layers)


@unlearning_method("retrain", needs="retain set")
def retrain(request: Request) -> Trained:
    """The gold standard: trained from scratch on the retain set alone, from the original's own initial weights."""
    return request.retrained(request.trainer.seed)


class Unlearned(NamedTuple):
    """An unlearned classifier; its mask, if it is the masked original; seconds and message as in `PruningResult`."""

    model: nn.Module
    mask: Mask | None
    seconds: float
    message: str | None


def run_method(request: Request, name: str) -> Unlearned:
    """Runs a method. Raises TrainingError if it diverges, ValueError if it does what a method must not."""
    before, method = copy.deepcopy(request.original.state_dict()), METHODS[name]
    arguments = method.arguments(request.config.hyperparameters.get(name, {}))
    if method.uses_kappa:
        mimu(request)  # its search for kappa is not this method's: the clock starts later
    started = time.perf_counter()
    try:
        output = method.unlearn(request, **arguments)
        seconds, mask, message = time.perf_counter() - started, None, None
        if isinstance(output, PruningResult):
            # The clock does not know the steps that were made before for a smaller kappa.
            output, seconds, message = request.graphs.graph.zeroing(output.vertices), output.seconds, output.message
        if isinstance(output, Trained):
            output, seconds = output  # an earlier run may have trained it
        if isinstance(output, Mask):
            output, mask = request.classifier, output.with_origins_of(request.original)  # by the names of its weights
            mask.apply(output)
        check_weights(output, "classifier", f"eval.hyperparameters.{name}")
    except TrainingError as error:
        raise TrainingError(f"method {name}, class {request.forget_class}: {error}") from None
    after = request.original.state_dict()
    if changed := [key for key in before if key not in after or not torch.equal(before[key], after[key])]:
        raise ValueError(f"method {name!r} changed the original's {changed[0]}: change request.classifier, a copy")
    return Unlearned(output, mask, seconds, message)


@dataclass
class Eval:
    """Scores every method on one request with the five metrics, and writes the JSON of the experiment.

    metrics, mask: the files to write
    about: what the JSON says besides, such as the id, the config and the seconds of earlier stages
    shared: results that do not depend on kappa, kept from one kappa of a request to the next
    audit: from the original and the retrained classifier (None if there is none) to an `audits.Audit` of classifiers
    draw: draws the plots of the experiment from its JSON
    """

    request: Request
    data: ImageData
    metrics: Artifact
    mask: Artifact
    about: dict[str, Any]
    shared: dict[Hashable, Any]
    audit: Callable[[nn.Module, nn.Module | None], Any] | None = None
    draw: Callable[[], None] | None = None
    _kappa_results: dict[Hashable, Any] = field(default_factory=dict, init=False)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the methods to score."""
        return self.request.config.method_names

    def unlearned(self, name: str) -> Unlearned:
        """Returns the classifier that a method unlearned. The method runs once."""
        request = self.request if METHODS[name].uses_kappa else replace(self.request, requested_kappa=None)
        return self._once((name, "unlearned"), partial(run_method, request, name), METHODS[name].uses_kappa)

    def get_model_mask(self) -> Tensor:
        """Returns the mask for the forget digit, 1 = keep: (m, n) for one masked layer, (vertices) for several."""
        return self.unlearned("mimu").mask.as_tensor()

    def mnist_forget_set(self) -> DataLoader:
        """Returns the samples of the forget digit in the test split."""
        return self.data.test.forget(self.request.forget_class).loader()

    def mnist_retain_set(self) -> DataLoader:
        """Returns the samples of all other digits in the test split."""
        return self.data.test.retain(self.request.forget_class).loader()

    @torch.no_grad()
    def inference(
        self, model: nn.Module, data_loader: DataLoader, is_forget_set: bool, description: str
    ) -> dict[str, float]:
        """Scores a classifier: sums over samples in double precision, divided by the number of samples.

        Returns `loss` (cross entropy, nats), `score` (percent classified correctly) and on the forget set `probability`
        (of the forget class, mean over the samples).
        """
        model.eval()
        loss = correct = probability = 0.0
        for images, labels in tqdm(data_loader, description, delay=2, leave=False, disable=None):
            logits, labels = model(images).cpu().double(), labels.cpu()
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            correct += is_correct(logits, labels).sum().item()
            probability += logits.softmax(1)[:, self.request.forget_class].sum().item()
        count = len(data_loader.dataset)
        metrics = {"loss": loss / count, "score": 100 * correct / count}
        return metrics | {"probability": probability / count} if is_forget_set else metrics

    def eval_unlearning(self) -> dict[str, dict[str, float]]:
        """Scores every method on the forget set: loss, score and probability of the forget class."""
        forget_set = self.mnist_forget_set()
        metrics = self._every_method("forget set", lambda model: self.inference(model, forget_set, True, "forget set"))
        return metrics

    def eval_performance_degradation(self) -> dict[str, dict[str, float]]:
        """Scores every method on the retain set: loss and score."""
        retain_set = self.mnist_retain_set()
        metrics = self._every_method("retain set", lambda model: self.inference(model, retain_set, False, "retain set"))
        return metrics

    def eval_mask_efficacy(self) -> dict[str, dict[str, float]]:
        """Scores the keep masks of K weights on the forget set: do the masked layers still classify the class?"""
        names = [name for name in self.names if METHODS[name].most_needed is not None]
        return {name: self._once(("mask efficacy", name), partial(self._mask_efficacy, name)) for name in names}

    def eval_audits(self) -> dict[str, dict[str, Any]]:
        """Audits what every method's classifier still knows of the class, and its distance to the retrained one."""
        return {} if self.audit is None else self._every_method("audit", self._audit())

    def eval(self) -> dict[str, Any]:
        """Runs all evaluations, saves the mask, writes the JSON, and draws the plots if there are any."""
        started = time.perf_counter()
        request, graph = self.request, self.request.graphs.graph
        unlearned = {name: self.unlearned(name) for name in self.names}
        zeroed = mimu(request).vertices.tolist()
        results = {
            **self.about,
            "seed": request.seed,
            "forget_digit": request.forget_class,
            "top_k": request.top_k,
            "kappa": len(zeroed),
            "kappa_choice": "auto" if request.requested_kappa == "auto" else "fixed",
            "num_weights": sum(map(math.prod, request.original.shapes)),
            "mask_shapes": graph.shapes,
            "num_graph_vertices": graph.num_vertices,
            "num_graph_edges": graph.num_edges,
            "zeroed": zeroed,
            "unlearning_metrics": self.eval_unlearning(),
            "performance_degradation_metrics": self.eval_performance_degradation(),
            "mask_efficacy_metrics": self.eval_mask_efficacy(),
            "audit_metrics": self.eval_audits(),
            "audits": {} if self.audit is None else self._audit().columns(),
            "methods": {name: METHODS[name].about() for name in self.names},
            "num_zeroed": {name: each.mask and each.mask.num_zeroed for name, each in unlearned.items()},
            "gave_up": {name: each.message != "" for name, each in unlearned.items() if each.message is not None},
            "class_probabilities": self._every_method("probabilities", self._class_probabilities),
            "weight_histograms": self._weight_histograms(),
        }
        seconds = {name: each.seconds for name, each in unlearned.items()}
        results["seconds"] = self.about["seconds"] | seconds | {"experiment": time.perf_counter() - started}
        self.mask.save(unlearned["mimu"].mask.saved())
        self.metrics.save(json.loads(json.dumps(results), parse_constant=lambda name: None))  # JSON has no infinity
        self.draw_visualization()
        return results

    def draw_visualization(self) -> None:
        """Draws the plots of the experiment from its JSON: bar charts, class probabilities, weight histograms."""
        if self.draw is not None:
            self.draw()

    def _every_method(self, evaluation: str, evaluate: Callable[[nn.Module], Any]) -> dict[str, Any]:
        """Evaluates every method's classifier, once for all kappas if the method does not depend on kappa."""
        results = {}
        for name in self.names:
            compute = partial(evaluate, self.unlearned(name).model)
            results[name] = self._once((evaluation, name), compute, METHODS[name].uses_kappa)
        return results

    def _once(self, key: Hashable, compute: Callable[[], Any], is_kappa_results: bool = False) -> Any:
        results = self._kappa_results if is_kappa_results else self.shared
        if key not in results:
            results[key] = compute()
        return results[key]

    def _mask_efficacy(self, name: str) -> dict[str, float]:
        choices = METHODS[name].most_needed(replace(self.request, requested_kappa=None))
        scores = []
        for vertices in choices.reshape(-1, choices.shape[-1]):
            with self.request.graphs.graph.keeping(vertices).applied_to(self.request.classifier) as model:
                scores.append(self.inference(model, self.mnist_forget_set(), True, f"{name}, kept"))
        return {metric: fmean(metrics[metric] for metrics in scores) for metric in scores[0]}

    def _audit(self) -> Any:
        retrained = self.unlearned("retrain").model if "retrain" in self.names else None
        return self._once("audit", lambda: self.audit(self.request.classifier, retrained))

    @torch.no_grad()
    def _class_probabilities(self, model: nn.Module) -> list[float]:
        probabilities = torch.cat([model(images).softmax(1) for images, _ in self.mnist_forget_set()])
        return probabilities.cpu().double().mean(0).tolist()

    def _weight_histograms(self) -> list[dict[str, Any]]:
        """Counts the weights of every masked layer, and those that the mask zeroes, between `edges`."""
        histograms, graphs, mask = [], self.request.graphs, self.unlearned("mimu").mask
        for layer, weight, keep in zip(graphs.graph.layers, graphs.weights(), mask.keep):
            weight, is_zeroed = weight.cpu(), keep.cpu() == 0
            edges = torch.linspace(float(weight.min()), float(weight.max()), 61)
            every, zeroed = (part.histogram(edges)[0].long().tolist() for part in (weight, weight[is_zeroed]))
            histogram = {"layer": layer, "shape": list(weight.shape), "edges": edges.tolist()}
            histograms.append(histogram | {"all": every, "zeroed": zeroed})
        return histograms
