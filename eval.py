"""Requests to forget a class, the registry of the methods that answer them, and the metrics that score the answers."""

from __future__ import annotations

import copy
import inspect
import itertools
import json
import math
import time
from collections.abc import Callable, Hashable
from dataclasses import asdict, dataclass, field, is_dataclass, replace
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
from mimu.errors import TrainingError
from mimu.graph import MaskingGCN
from mimu.masks import Mask
from mimu.pruning import Pruning, PruningConfig, PruningResult, Ranking, RemainingCounter, prune
from mimu.saliency import ActivationGraphs
from mimu.samples import Split, is_correct
from mimu.seeds import seeded
from mimu.tracing import HookedClassifier
from mimu.training import check_weights
from trainer import Trained, Trainer, UnlearningSFT, UnlearningSFTConfig

RANDOM_MASKS = 20  # random keep masks that the control of the mask efficacy averages


@dataclass(frozen=True)
class EvalConfig(PruningConfig):
    """How requests are answered and scored: the settings of the masks, of the methods and of the plots.

    methods: which to score; `all` but those that run by name alone, or None: those of the default run
    hyperparameters: of every method that has some, by its name
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
        """The methods to score."""
        if isinstance(self.methods, tuple):
            return self.methods
        runs_with = ("default", "all") if self.methods == "all" else ("default",)
        return tuple(name for name, method in METHODS.items() if method.runs_with in runs_with)

    def decisive(self) -> dict[str, Any]:
        """The settings that the metrics depend on: without those of the plots and of what does not run."""
        hyperparameters = {name: self.hyperparameters.get(name, {}) for name in self.method_names}
        return asdict(self) | {"methods": self.method_names, "visualize": None, "hyperparameters": hyperparameters}


@dataclass(frozen=True)
class Request:
    """One request to forget a class, and all that a method may use to answer it: of the data the training split only.

    original: the classifier, not to be changed; trainer: trains another one as it was trained
    train: the training split; graphs, gcn: the activation graphs of the original and the masking GCN trained on them
    forget_class: the class to forget; top_k: how many weights a keep mask keeps; seed: of all random draws
    requested_kappa: how many weights to zero; `auto`: as few as forget; None where the answer does not depend on it
    resolved_kappa: the number of weights to zero, see `kappa`
    prunings: the steps of every method by its name, kept from one kappa to the next
    kept: what methods keep from one request to the next on the same classifier, by names of theirs
    trained_on: what the original was trained on, where a request has fewer samples; for retraining alone
    retrain: trains a classifier on samples, or takes one that was trained so before; None: trains it in any case
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
    resolved_kappa: int | None = None
    prunings: dict[str, Pruning] = field(default_factory=dict)
    kept: dict[str, Any] = field(default_factory=dict)
    trained_on: Split | None = None
    retrain: Callable[[Trainer, Split], Trained] | None = None

    @property
    def classifier(self) -> HookedClassifier:
        """A copy of the original classifier, free to be changed."""
        return copy.deepcopy(self.original)

    @property
    def forget(self) -> Split:
        """The training samples of the forget class."""
        return self.train.forget(self.forget_class)

    @property
    def retain(self) -> Split:
        """The training samples of all other classes."""
        return self.train.retain(self.forget_class)

    def retrained(self, seed: int) -> Trained:
        """A classifier trained from scratch as the original was, on all its samples but those of the forget class."""
        samples = (self.trained_on or self.train).retain(self.forget_class)
        trainer = replace(self.trainer, seed=seed)
        return self.retrain(trainer, samples) if self.retrain else trainer.trained(samples, self.graphs.num_classes)

    @property
    def kappa(self) -> int:
        """The number of weights to zero; for `auto` it is the number that mimu zeroes.

        Raises ValueError if the method was not registered with uses_kappa=True.
        """
        if self.resolved_kappa is None:
            raise ValueError("this method reads request.kappa: register it with uses_kappa=True")
        return self.resolved_kappa

    def with_kappa(self) -> Request:
        """Returns the request with its number of weights to zero; for `auto`, mimu's search decides it."""
        kappa = self.requested_kappa
        return replace(self, resolved_kappa=len(self.zeroed_by_mimu()) if kappa == "auto" else kappa)

    def zeroed_by_mimu(self) -> Tensor:
        """The vertices that the masking GCN zeroes, in their order."""
        return self.in_steps("mimu", gcn=self.gcn).vertices

    @property
    def class_index(self) -> int:
        """The index of the forget class where tensors of the graphs stand class after class."""
        return self.graphs.class_index_of(self.forget_class)

    def pruning(
        self, name: str, ranking: Ranking | None = None, gcn: MaskingGCN | None = None, all_at_once: bool = False
    ) -> Pruning:
        """The steps of a method, kept from one kappa to the next. See `in_steps`."""
        if name not in self.prunings:
            config = replace(self.config, step=None) if all_at_once else self.config
            counter = RemainingCounter(self.graphs, self.class_index, self.forget.images, config.target)
            steps = prune(self.graphs, self.class_index, config, self.seed, gcn, ranking)
            self.prunings[name] = Pruning(steps, counter, config)
        return self.prunings[name]

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
        pruning = self.pruning(name, ranking, gcn, all_at_once)
        return pruning.until_forgotten() if self.requested_kappa == "auto" else pruning.at(self.requested_kappa)


# From a request, and the hyperparameters as keywords, to an unlearned classifier or what to zero in the original.
Unlearning = Callable[..., nn.Module | Trained | Mask | PruningResult]


@dataclass(frozen=True)
class Method:
    """A way to forget, and what tables say of it.

    unlearn: what answers a request. Its keyword-only parameters are hyperparameters, and where one is annotated with a
        dataclass, the fields of that; `eval.hyperparameters.<name>` has their values. The first paragraph of its
        docstring says in the tables what it does.
    uses_kappa: whether the answer depends on `request.kappa`; if not, it is computed once for all kappas
    most_needed: gives the K = `request.top_k` vertices that the class needs, for the mask efficacy; or (choices, K),
        whose metrics are averaged; None where the method cannot say
    paper, needs: the source, and which training samples the method needs
    touches: nothing, a mask, the output, the representation, one layer, the last layers, or all weights
    runs_with: where it runs: with the default run, whose config names no methods; with `all`; or by its name alone
    """

    unlearn: Unlearning
    uses_kappa: bool = False
    most_needed: Callable[[Request], Tensor] | None = None
    paper: str = ""
    touches: str = "all weights"
    needs: Literal["nothing", "forget set", "retain set", "both sets"] = "both sets"
    runs_with: Literal["default", "all", "name"] = "default"

    @property
    def keywords(self) -> dict[str, inspect.Parameter]:
        """The keyword-only parameters, by name."""
        parameters = inspect.signature(self.unlearn, eval_str=True).parameters
        return {name: each for name, each in parameters.items() if each.kind is each.KEYWORD_ONLY}

    @property
    def hyperparameters(self) -> dict[str, inspect.Parameter]:
        """The hyperparameters, by name: the keyword-only parameters, and in the place of a dataclass its fields."""
        found: dict[str, inspect.Parameter] = {}
        for name, each in self.keywords.items():
            kind = each.annotation
            found |= inspect.signature(kind, eval_str=True).parameters if is_dataclass(kind) else {name: each}
        return found

    def arguments(self, values: dict[str, Any]) -> dict[str, Any]:
        """The keyword arguments of `unlearn`, for values of hyperparameters by name: dataclasses made of fields."""
        arguments = dict(values)
        for name, each in self.keywords.items():
            if is_dataclass(kind := each.annotation):
                fields = inspect.signature(kind).parameters
                arguments[name] = kind(**{field: arguments.pop(field) for field in fields if field in arguments})
        return arguments

    def about(self) -> dict[str, Any]:
        """What tables say of it, as JSON holds it."""
        says = (inspect.getdoc(self.unlearn) or "").partition("\n\n")[0].replace("\n", " ")
        return {"does": says, "paper": self.paper, "touches": self.touches, "needs": self.needs}


METHODS: dict[str, Method] = {}


def unlearning_method(name: str, **about: Any) -> Callable[[Unlearning], Unlearning]:
    """Registers a function as a `Method`, of which `about` are the further fields, for every plot and table."""
    # The last two stand beside the methods in the JSON's seconds.
    if name in (*METHODS, "gcn", "experiment") or not name.isprintable() or not name or "$" in name:
        raise ValueError(f"method {name!a} must have a name of its own, of printable characters without $")

    def register(unlearn: Unlearning) -> Unlearning:
        METHODS[name] = Method(unlearn, **about)
        return unlearn

    return register


def every_vertex(request: Request) -> Tensor:
    return torch.arange(request.graphs.graph.num_vertices)


@unlearning_method("original", most_needed=every_vertex, touches="nothing", needs="nothing")
def original(request: Request) -> nn.Module:
    """The classifier as it is: nothing is forgotten. As a keep mask it keeps every weight."""
    return request.classifier


def most_needed(request: Request) -> Tensor:
    first_step = next(request.pruning("mimu", gcn=request.gcn).steps())
    return first_step.scores.topk(request.top_k).indices


@unlearning_method("mimu", uses_kappa=True, most_needed=most_needed, touches="a mask")
def mimu(request: Request) -> PruningResult:
    """The kappa weights that the masking GCN zeroes first."""
    return request.in_steps("mimu", gcn=request.gcn)


def random_vertices(request: Request, count: int, draw: int = 0) -> Tensor:
    generator = seeded("random", request.seed, request.forget_class, draw)
    return torch.randperm(request.graphs.graph.num_vertices, generator=generator)[:count]


def random_choices(request: Request) -> Tensor:
    """Several random keep masks (masks, K), since a single one may keep a class or lose it by chance."""
    return torch.stack([random_vertices(request, request.top_k, draw) for draw in range(RANDOM_MASKS)])


@unlearning_method("random", uses_kappa=True, most_needed=random_choices, touches="a mask", needs="nothing")
def random(request: Request) -> Mask:
    """The control: kappa random weights of the same layers."""
    return request.graphs.graph.zeroing(random_vertices(request, request.kappa))


@unlearning_method("sft", paper="after Graves et al. 2021, arXiv:2010.10981", touches="one layer", needs="forget set")
def sft(request: Request, *, config: UnlearningSFTConfig) -> nn.Module:
    """Fine-tuning of the masked layers on random labels for the forget class's training samples."""
    unlearning = UnlearningSFT(config, request.seed)
    return unlearning.unlearn(request.classifier, request.forget, request.graphs.graph.layers)


@unlearning_method("retrain", needs="retain set")
def retrain(request: Request) -> Trained:
    """The gold standard: trained from scratch on the retain set alone, from the original's own initial weights."""
    return request.retrained(request.trainer.seed)


class Answer(NamedTuple):
    """An unlearned model; its mask, if it is the masked original; seconds and message as in `PruningResult`."""

    model: nn.Module
    mask: Mask | None
    seconds: float
    message: str | None


def answer(request: Request, name: str) -> Answer:
    """A method's answer. Raises TrainingError where it diverges, ValueError where it changes the original."""
    before = copy.deepcopy(request.original.state_dict())
    method = METHODS[name]
    arguments = method.arguments(request.config.hyperparameters.get(name, {}))
    if method.uses_kappa:
        request = request.with_kappa()  # before the clock starts: mimu's search is not this method's
    started = time.perf_counter()
    try:
        made = method.unlearn(request, **arguments)
        seconds, message = time.perf_counter() - started, None
        if isinstance(made, PruningResult):
            # Steps that were made before, for a smaller kappa, count as spent: of them the clock knows nothing.
            made, seconds, message = request.graphs.graph.zeroing(made.vertices), made.seconds, made.message
        if isinstance(made, Trained):
            made, seconds = made  # an earlier run may have trained it
        model, mask = (request.classifier, made) if isinstance(made, Mask) else (made, None)
        if mask is not None:
            mask.apply(model)
            mask = mask.with_origins_of(request.original)  # by the names of its weights
        check_weights(model, "classifier", f"eval.hyperparameters.{name}")
    except TrainingError as error:
        raise TrainingError(f"method {name}, class {request.forget_class}: {error}") from None
    after = request.original.state_dict()
    for key, weight in before.items():
        if key not in after or not torch.equal(weight, after[key]):
            raise ValueError(f"method {name!r} changed the original's {key}: change request.classifier, a copy")
    return Answer(model, mask, seconds, message)


@dataclass
class Eval:
    """Scores every method on one request with the five metrics, and writes them as JSON.

    metrics, mask: the files to write; about: what else the JSON says, such as the id, the config and earlier seconds
    shared: results that do not depend on kappa, kept from one kappa of a request to the next
    audit: from the original and the retrained classifier (None without one) to what audits a classifier
    draw: draws the plots from the JSON
    """

    request: Request
    data: ImageData
    metrics: Artifact
    mask: Artifact
    about: dict[str, Any]
    shared: dict[Hashable, Any]
    audit: Callable[[nn.Module, nn.Module | None], Callable[[nn.Module], dict[str, Any]]] | None = None
    draw: Callable[[], None] | None = None
    own: dict[Hashable, Any] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """The methods to score."""
        return self.request.config.method_names

    def get_model_mask(self) -> Tensor:
        """The mask for the forget digit, 1 = keep: (m, n) for one masked layer, (vertices) for several."""
        return self._answer("mimu").mask.as_tensor()

    def mnist_forget_set(self) -> DataLoader:
        """The test split's samples of the forget digit."""
        return self.data.test.forget(self.request.forget_class).loader()

    def mnist_retain_set(self) -> DataLoader:
        """The test split's samples of all other digits."""
        return self.data.test.retain(self.request.forget_class).loader()

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
            probability += logits.softmax(1)[:, self.request.forget_class].sum().item()
        count = len(data_loader.dataset)
        metrics = {"loss": loss / count, "score": 100 * correct / count}
        return metrics | {"probability": probability / count} if is_forget_set else metrics

    def eval_unlearning(self) -> dict[str, dict[str, float]]:
        """Every method on the forget set: loss, score and probability of the forget class."""
        metrics = {name: self._scored(name, "test", self.mnist_forget_set(), True) for name in self.names}
        return metrics

    def eval_performance_degradation(self) -> dict[str, dict[str, float]]:
        """Every method on the retain set: loss and score."""
        metrics = {name: self._scored(name, "test", self.mnist_retain_set(), False) for name in self.names}
        return metrics

    def eval_mask_efficacy(self) -> dict[str, dict[str, float]]:
        """Every keep mask on the forget set: with K weights of the masked layers, is the class still classified?"""
        able = [name for name in self.names if METHODS[name].most_needed is not None]
        return {name: self._once((name, "efficacy"), partial(self._efficacy, name)) for name in able}

    def eval_training_split(self) -> dict[str, dict[str, dict[str, float]]]:
        """Every method on training samples: for choices, as of a kappa to report, that the test split must not make."""
        samples, forget_class = self.request.graphs.samples, self.request.forget_class
        sets = {"forget": samples.forget(forget_class).loader(), "retain": samples.retain(forget_class).loader()}
        found: dict[str, dict[str, dict[str, float]]] = {name: {} for name in self.names}
        for name, (part, loader) in itertools.product(self.names, sets.items()):
            found[name][part] = self._scored(name, "training", loader, part == "forget")
        return found

    def eval_audits(self) -> dict[str, dict[str, Any]]:
        """What every method's classifier still knows of the class, and how far it is from the retrained one."""
        if self.audit is None:
            return {}
        models = {name: self._answer(name).model for name in self.names}
        audit = self._once("audit", lambda: self.audit(self.request.classifier, models.get("retrain")))
        return {name: self._once((name, "audit"), partial(audit, model), name) for name, model in models.items()}

    def eval(self) -> dict[str, Any]:
        """Runs all evaluations, saves the mask, writes the JSON and, where the config says so, draws the plots."""
        started = time.perf_counter()
        request, graph = self.request, self.request.graphs.graph
        answers = {name: self._answer(name) for name in self.names}
        masks = {name: each.mask for name, each in answers.items()}
        zeroed = request.zeroed_by_mimu().tolist()
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
            "training_split_metrics": self.eval_training_split(),
            "audit_metrics": self.eval_audits(),
            "methods": {name: METHODS[name].about() for name in self.names},
            "num_zeroed": {name: mask and mask.num_zeroed for name, mask in masks.items()},
            "gave_up": {name: each.message != "" for name, each in answers.items() if each.message is not None},
            "class_probabilities": {name: self._class_probabilities(each.model) for name, each in answers.items()},
            "weight_histograms": self._weight_histograms(),
        }
        seconds = {name: each.seconds for name, each in answers.items()}
        results["seconds"] = self.about["seconds"] | seconds | {"experiment": time.perf_counter() - started}
        self.mask.save(masks["mimu"].saved())
        valid = json.loads(json.dumps(results), parse_constant=lambda name: None)  # JSON has no infinity
        self.metrics.save(valid)
        if self.draw is not None:
            self.draw_visualization()
        return results

    def draw_visualization(self) -> None:
        """Draws bar charts of each evaluation, where the forget set goes, and which weights are zeroed."""
        self.draw()

    def _answer(self, name: str) -> Answer:
        request = self.request if METHODS[name].uses_kappa else replace(self.request, requested_kappa=None)
        return self._once((name, "answer"), self.data.sealed()(partial(answer, request, name)), name)

    def _scored(self, name: str, split: str, loader: DataLoader, is_forget_set: bool) -> dict[str, float]:
        key = (name, split, is_forget_set)
        return self._once(key, lambda: self.inference(self._answer(name).model, loader, is_forget_set, name), name)

    def _efficacy(self, name: str) -> dict[str, float]:
        with self.data.sealed():
            choices = METHODS[name].most_needed(replace(self.request, requested_kappa=None))
        scored = []
        for vertices in choices.reshape(-1, choices.shape[-1]):
            with self.request.graphs.graph.keeping(vertices).applied_to(self.request.classifier) as model:
                scored.append(self.inference(model, self.mnist_forget_set(), True, f"{name}, kept"))
        return {metric: fmean(metrics[metric] for metrics in scored) for metric in scored[0]}

    @torch.no_grad()
    def _class_probabilities(self, model: nn.Module) -> list[float]:
        probabilities = torch.cat([model(images).softmax(1) for images, _ in self.mnist_forget_set()])
        return probabilities.cpu().double().mean(0).tolist()

    def _weight_histograms(self) -> list[dict[str, Any]]:
        """Of every masked layer: how many weights there are between `edges`, and how many of them the mask zeroes."""
        histograms, graphs, mask = [], self.request.graphs, self._answer("mimu").mask
        for layer, weight, keep in zip(graphs.graph.layers, graphs.weights(), mask.keep):
            weight, is_zeroed = weight.cpu(), keep.cpu() == 0
            edges = torch.linspace(float(weight.min()), float(weight.max()), 61)
            everything, zeroed = (part.histogram(edges)[0].long().tolist() for part in (weight, weight[is_zeroed]))
            of_layer = {"layer": layer, "shape": list(weight.shape), "edges": edges.tolist()}
            histograms.append(of_layer | {"all": everything, "zeroed": zeroed})
        return histograms

    def _once(self, key: Hashable, compute: Callable[[], Any], method: str | None = None) -> Any:
        """Computes a result once: for all kappas of the request, or for this one where the method depends on it."""
        results = self.own if method is not None and METHODS[method].uses_kappa else self.shared
        if key not in results:
            results[key] = compute()
        return results[key]
