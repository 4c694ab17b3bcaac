"""Requests to forget a class, the registry of the methods that answer them, and the methods that need no training."""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from torch import Tensor, nn

from data import GraphGenerator, Split, check_range, seeded
from model import HookedMNISTClassifier, Mask, MaskingGCN, WeightGraph
from trainer import GCNRanking, SaliencyRanking, Trainer, UnlearningSFT, UnlearningSFTConfig, ZeroingOrder, contrast

if TYPE_CHECKING:
    from eval import EvalConfig


class Request:
    """One request to forget a class, and all that a method may use to answer it: of the data the training split only.

    classifier: a fresh copy of the original, free to be changed; trainer: trains another one as it was trained
    train: the training split; forget_class: the class to forget; seed: of all random draws
    kappa: how many weights to zero; top_k: how many weights a keep mask keeps
    graphs, gcn: the activation graphs of the original and the masking GCN trained on them
    """

    def __init__(
        self,
        config: EvalConfig,
        classifier: HookedMNISTClassifier,
        trainer: Trainer,
        train: Split,
        graphs: GraphGenerator,
        gcn: MaskingGCN,
        forget_class: int,
        top_k: int,
        seed: int,
    ) -> None:
        self._classifier = classifier
        self.config = config
        self.trainer = trainer
        self.train = train
        self.graphs = graphs
        self.gcn = gcn
        self.forget_class = forget_class
        self.top_k = top_k
        self.seed = seed
        self.ranking = GCNRanking(config, gcn, graphs, forget_class, top_k, seed)
        self.reused_seconds = 0.0
        self.zeroed_by_layer: dict[str, int] | None = None
        self._orders: dict[str, ZeroingOrder] = {}
        self._kappa: int | None = None
        self._is_auto = False

    def at(self, kappa: int | None, is_auto: bool = False) -> Request:
        """The same request with this kappa; the orders of weights found so far are shared."""
        request = copy.copy(self)
        request._kappa = kappa
        request._is_auto = is_auto
        return request

    @property
    def kappa(self) -> int:
        if self._kappa is None:
            raise ValueError("this method reads request.kappa: register it with uses_kappa=True")
        return self._kappa

    @property
    def classifier(self) -> HookedMNISTClassifier:
        """A copy of the original classifier, free to be changed."""
        return copy.deepcopy(self._classifier)

    @cached_property
    def forget(self) -> Split:
        """The training samples of the forget class."""
        return self.train.forget(self.forget_class)

    @cached_property
    def retain(self) -> Split:
        """The training samples of all other classes."""
        return self.train.retain(self.forget_class)

    @property
    def other_seed(self) -> int:
        """A seed whose initial weights are not those of the original."""
        return self.trainer.seed + 1_000_000

    @property
    def order(self) -> ZeroingOrder:
        """The order in which the masking GCN zeroes weights."""
        return self.order_of("mimu", self.ranking)

    def order_of(self, name: str, ranking: Callable[[int, Tensor], Tensor], all_at_once: bool = False) -> ZeroingOrder:
        """The order in which a ranking zeroes weights, kept by its name from one kappa to the next.

        ranking: from the number of the step and the vertices zeroed before it to scores (vertices), largest first to go
        all_at_once: ranks on the whole classifier alone, where the others rank anew after every `eval.step` weights
        """
        if name not in self._orders:
            config = replace(self.config, step=None) if all_at_once else self.config
            self._orders[name] = ZeroingOrder(config, self.graphs, ranking)
        return self._orders[name]

    def auto_kappa(self, order: ZeroingOrder) -> int:
        """The smallest kappa of an order's steps that makes the training split forget the class."""
        return order.forgotten_at(self.forget)

    def first_of(self, order: ZeroingOrder) -> Tensor:
        """The vertices that an order zeroes at this kappa; with kappa auto at its own smallest kappa that forgets.

        The time of steps that were made before, for a smaller kappa or in the search for auto, counts as spent.
        """
        started = time.perf_counter()
        kappa = self.auto_kappa(order) if self._is_auto else self.kappa
        vertices = order.first(kappa)
        self.reused_seconds = max(0.0, order.seconds(kappa) - (time.perf_counter() - started))
        return vertices

    def zeroing(self, vertices: Tensor, graph: WeightGraph | None = None) -> HookedMNISTClassifier:
        """The classifier without the given vertices of the weight graph, or of that of other masked layers."""
        graph = self.graphs.graph if graph is None else graph
        self.zeroed_by_layer = self.count_by_layer(vertices, graph)
        classifier = self.classifier
        Mask.zeroing(graph, vertices).apply(classifier)
        return classifier

    def count_by_layer(self, vertices: Tensor, graph: WeightGraph) -> dict[str, int]:
        """How many of the vertices are weights of each masked layer; of the output layer, the forget class's row apart.

        Zeroing that row alone is the trivial way to forget.
        """
        counts = {}
        chosen = torch.zeros(graph.num_vertices, dtype=torch.long, device=vertices.device)
        chosen[vertices] = 1
        for layer, of_layer in zip(graph.layers, graph.split(chosen)):
            counts[f"layer {layer}"] = int(of_layer.sum())
            if layer == len(self._classifier.layers) - 1:
                counts["output row of the class"] = int(of_layer[self.forget_class].sum())
                counts[f"layer {layer}"] -= counts["output row of the class"]
        return counts

    def keeping(self, vertices: Tensor) -> HookedMNISTClassifier:
        """The classifier with only the given vertices of its masked layers; the other layers are whole."""
        classifier = self.classifier
        Mask.keeping(self.graphs.graph, vertices).apply(classifier)
        return classifier


# Hyperparameters with a range of their own. An int is from 1, a float from 0.
Positive = Annotated[float, "above 0"]
Share = Annotated[float, "above 0, at most 1"]


def check_hyperparameter(name: str, value: int | float, kind: object) -> None:
    """Raises ValueError unless the value is what its annotation says."""
    if kind is int and not isinstance(value, int):
        raise ValueError(f"{name} must be an integer, not {value}")
    check_range(name, value, at_least=1 if kind is int else 0, above=0 if kind in (Positive, Share) else None)
    if kind is Share and value > 1:
        raise ValueError(f"{name} must be a share, at most 1, not {value}")


# What a method may change, and which training samples it needs.
Touches = Literal["nothing", "a mask", "the output", "one layer", "all weights"]
Needs = Literal["nothing", "forget set", "retain set", "both sets"]


@dataclass(frozen=True)
class Method:
    """A way to forget, and what its tables say of it.

    unlearn: from a request, and the hyperparameters as keywords, to an unlearned classifier
    uses_kappa: whether the answer depends on the request's kappa
    most_needed: which K vertices of the weight graph the class needs most, where the method can say so
    in_default_run: whether it stands among the methods where the config names none
    """

    unlearn: Callable[..., nn.Module]
    uses_kappa: bool
    most_needed: Callable[[Request], Tensor] | None
    paper: str
    touches: Touches
    needs: Needs
    in_default_run: bool

    @property
    def hyperparameters(self) -> dict[str, object]:
        """The keyword-only parameters of `unlearn` and their annotations; the config gives their values."""
        parameters = inspect.signature(self.unlearn, eval_str=True).parameters.values()
        return {each.name: each.annotation for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY}

    def about(self) -> dict[str, Any]:
        """What tables say of it, as JSON holds it."""
        says = (inspect.getdoc(self.unlearn) or "").partition("\n\n")[0].replace("\n", " ")
        return {"does": says, "paper": self.paper, "touches": self.touches, "needs": self.needs}


METHODS: dict[str, Method] = {}


def unlearning_method(
    name: str,
    uses_kappa: bool = False,
    most_needed: Callable[[Request], Tensor] | None = None,
    paper: str = "",
    touches: Touches = "all weights",
    needs: Needs = "both sets",
    in_default_run: bool = True,
) -> Callable[[Callable[..., nn.Module]], Callable[..., nn.Module]]:
    """Registers a function from a request to an unlearned classifier, which then stands in every plot and table.

    Keyword-only parameters of the function are its hyperparameters: `eval.hyperparameters.<name>` holds their values.
    The first paragraph of its docstring says in the tables what it does.

    uses_kappa: whether the answer depends on `request.kappa`; if not, it is computed once for all kappas.
    most_needed: gives the K = `request.top_k` vertices that the class needs, for the mask efficacy; or (choices, K),
        whose metrics are averaged.
    paper, touches, needs: the source, what the method changes, and which training samples it needs, for the tables
    in_default_run: whether it runs where the config names no methods
    """

    def register(unlearn: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        if name in METHODS or name in ("gcn", "experiment"):  # these stand beside the methods in the JSON's seconds
            raise ValueError(f"method {name!r} is registered already: choose another name")
        if not name.isprintable() or not name or "$" in name:
            raise ValueError(f"method {name!a} must have a name of printable characters without $")
        METHODS[name] = Method(unlearn, uses_kappa, most_needed, paper, touches, needs, in_default_run)
        return unlearn

    return register


def every_vertex(request: Request) -> Tensor:
    return torch.arange(request.graphs.graph.num_vertices)


@unlearning_method("original", most_needed=every_vertex, touches="nothing", needs="nothing")
def original(request: Request) -> nn.Module:
    """The classifier as it is: nothing is forgotten. As a keep mask it keeps every weight."""
    return request.classifier


@unlearning_method("mimu", uses_kappa=True, most_needed=lambda request: request.ranking.most_needed(), touches="a mask")
def mimu(request: Request) -> nn.Module:
    """The kappa weights that the masking GCN zeroes first."""
    return request.zeroing(request.first_of(request.order))


@unlearning_method("saliency", uses_kappa=True, touches="a mask")
def saliency(request: Request, *, retain_weight: float, erasure_weight: float) -> nn.Module:
    """No GCN: in the same steps, the weights whose removal costs the class its margin and the others the least loss."""
    config, graphs = request.config, request.graphs
    erasure_weight *= config.erasure
    ranking = SaliencyRanking(config, graphs, request.forget_class, request.seed, retain_weight, erasure_weight)
    return request.zeroing(request.first_of(request.order_of("saliency", ranking)))


def random_vertices(request: Request, count: int, draw: int = 0) -> Tensor:
    generator = seeded("random", request.seed, request.forget_class, draw)
    return torch.randperm(request.graphs.graph.num_vertices, generator=generator)[:count]


def random_choices(request: Request) -> Tensor:
    """Several random keep masks (masks, K), since a single one may keep a class or lose it by chance."""
    return torch.stack([random_vertices(request, request.top_k, draw) for draw in range(request.config.random_masks)])


@unlearning_method("random", uses_kappa=True, most_needed=random_choices, touches="a mask", needs="nothing")
def random(request: Request) -> nn.Module:
    """The control: kappa random weights of the same layers."""
    return request.zeroing(random_vertices(request, request.kappa))


def largest_vertices(request: Request, count: int) -> Tensor:
    """The vertices of the masked weights that are largest in magnitude, (count)."""
    return torch.cat([weight.flatten() for weight in request.graphs.weights()]).abs().topk(count).indices


@unlearning_method(
    "magnitude",
    uses_kappa=True,
    most_needed=lambda request: largest_vertices(request, request.top_k),
    touches="a mask",
    needs="nothing",
)
def magnitude(request: Request) -> nn.Module:
    """The second control: the kappa largest weights of the same layers."""
    return request.zeroing(largest_vertices(request, request.kappa))


def removal_effect(request: Request) -> Tensor:
    """-w E_c[dL/dw], the first-order rise of the loss of each class c when a weight is removed, (classes, vertices)."""
    features, _ = request.graphs.class_features(request.graphs.by_class(), ["effect"])
    return -features["effect"]


@unlearning_method(
    "first_order",
    uses_kappa=True,
    paper="after Mozer and Smolensky 1988, NIPS",
    touches="a mask",
    needs="forget set",
    in_default_run=False,
)
def first_order_saliency(request: Request) -> nn.Module:
    """All at once, the weights whose removal raises the forget class's loss most to first order, by -w dL/dw."""
    order = request.order_of(
        "first_order", lambda step, zeroed: removal_effect(request)[request.forget_class], all_at_once=True
    )
    return request.zeroing(request.first_of(order))


@unlearning_method(
    "saliency_contrast",
    uses_kappa=True,
    paper="after Mozer and Smolensky 1988, NIPS",
    touches="a mask",
    in_default_run=False,
)
def saliency_contrast(request: Request) -> nn.Module:
    """All at once, by the first-order saliency on the forget class less its mean over the retain classes."""
    order = request.order_of(
        "saliency_contrast",
        lambda step, zeroed: contrast(removal_effect(request))[request.forget_class],
        all_at_once=True,
    )
    return request.zeroing(request.first_of(order))


@unlearning_method("output_row", touches="a mask", needs="nothing", in_default_run=False)
def output_row(request: Request) -> nn.Module:
    """The trivial mask: the forget class's row of the output layer, so that its logit is always 0 (or its bias)."""
    output_layer = WeightGraph(request.graphs.classifier.shapes, -1)
    (vertices,) = output_layer.split(torch.arange(output_layer.num_vertices))
    return request.zeroing(vertices[request.forget_class], output_layer)


class WithoutLogit(nn.Module):
    """A classifier that gives one class the probability 0."""

    def __init__(self, classifier: nn.Module, forget_class: int) -> None:
        super().__init__()
        self.classifier = classifier
        self.forget_class = forget_class

    def forward(self, images: Tensor) -> Tensor:
        removed = torch.tensor([self.forget_class], device=images.device)
        return self.classifier(images).index_fill(1, removed, float("-inf"))


@unlearning_method("logit_removed", touches="the output", needs="nothing", in_default_run=False)
def logit_removed(request: Request) -> nn.Module:
    """The trivial filter: the forget class's logit is minus infinity, all weights stay."""
    return WithoutLogit(request.classifier, request.forget_class)


@unlearning_method("sft", paper="after Graves et al. 2021, arXiv:2010.10981", touches="one layer", needs="forget set")
def sft(request: Request, *, epochs: int, batch_size: int, learning_rate: Positive) -> nn.Module:
    """Fine-tuning of the masked layers on random labels for the forget class's training samples."""
    config = UnlearningSFTConfig(epochs, batch_size, learning_rate)
    return UnlearningSFT(config, request.seed).unlearn(request.classifier, request.forget, request.graphs.graph.layers)


@unlearning_method("retrain", needs="retain set")
def retrain(request: Request) -> nn.Module:
    """The gold standard: trained from scratch on the retain set alone, from the original's own initial weights."""
    return request.trainer.train(request.retain, request.graphs.num_classes, f"retrain without {request.forget_class}")


@unlearning_method("retrain_again", needs="retain set", in_default_run=False)
def retrain_again(request: Request) -> nn.Module:
    """The same from other initial weights: how far two classifiers are apart that never saw the class."""
    trainer = Trainer(request.trainer.config, request.other_seed)
    return trainer.train(request.retain, request.graphs.num_classes, f"retrain again without {request.forget_class}")
