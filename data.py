"""Image data sets in memory, their forget and retain splits, and the activation graphs of a classifier."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset

from images.sources import DATASET_ROOT, DataError, data_set, reading, seeded
from model import VERTICES_AT_ONCE, Mask, WeightGraph
from networks.hooked import HookedClassifier, LayerRecord

if TYPE_CHECKING:
    from torch_geometric.data import Data

SCORED_AT_ONCE = 10_000  # samples of a batch without a backward pass

# What settings may be; a config is checked against these words.
Count = Annotated[int, "at least 1"]
Positive = Annotated[float, "above 0"]
NonNegative = Annotated[float, "at least 0"]
Share = Annotated[float, "above 0, at most 1"]
# A number of the masked weights, or a share of them.
Amount = Count | Annotated[float, "above 0, below 1"]


def number_of_weights(amount: Amount, num_vertices: int) -> int:
    """The amount as a number of the masked weights, one at least."""
    return amount if isinstance(amount, int) else max(1, round(amount * num_vertices))


@contextmanager
def seeded_initialisation(seed: int) -> Iterator[None]:
    """Modules made while the context is open get the weights of this seed; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@dataclass(frozen=True)
class Split:
    """Samples in memory. images: (samples, pixels) float, labels: (samples) int64."""

    images: Tensor
    labels: Tensor

    def forget(self, forget_class: int) -> Split:
        """The samples of the forget class."""
        return self[self.labels == forget_class]

    def retain(self, forget_class: int) -> Split:
        """The samples of all other classes."""
        return self[self.labels != forget_class]

    def __getitem__(self, chosen: Tensor | slice) -> Split:
        return Split(self.images[chosen], self.labels[chosen])

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Split]:
        """Random batches of the samples, again and again."""
        while True:
            order = torch.randperm(len(self.labels), generator=generator).to(self.labels.device)
            for batch in order.split(batch_size):
                yield Split(self.images.index_select(0, batch), self.labels[batch])

    def loader(self, batch_size: int = SCORED_AT_ONCE) -> DataLoader:
        """Whole batches (images, labels) in order, cut from the tensors at once rather than sample by sample."""
        samples = TensorDataset(self.images, self.labels)
        batches = BatchSampler(SequentialSampler(samples), batch_size, drop_last=False)
        return DataLoader(samples, sampler=batches, batch_size=None)


def some_of_every_class(split: Split, count: int, *key: object) -> Split:
    """Random samples, class after class: `count` of every class that is there, or all where it has fewer; by a key."""
    chosen = []
    for label in split.labels.unique().tolist():
        of_class = (split.labels == label).nonzero().squeeze(1)
        order = torch.randperm(len(of_class), generator=seeded(*key, label))
        chosen.append(of_class[order[:count].to(of_class.device)])
    found = torch.cat(chosen)
    # Copies rows; indexing copies numbers one by one.
    return Split(split.images.index_select(0, found), split.labels[found])


def is_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Which samples are classified correctly, (samples): none whose logits (samples, classes) are not numbers."""
    # The largest of logits that are not numbers would be the first class.
    return (logits.argmax(1) == labels) & ~logits.isnan().any(1)


class ImageData:
    """A training split that methods may use, a test split that scores them, and the names of the classes, by label.

    While a method runs, the test split is sealed: asking for it raises PermissionError.
    """

    def __init__(self, train: Split, test: Split, class_names: Sequence[str] = ()) -> None:
        self.train = train
        self.class_names = class_names
        self._test = test
        self._sealed = False

    @property
    def test(self) -> Split:
        if self._sealed:
            raise PermissionError("the test split is sealed while a method runs: it may use the training split only")
        return self._test

    @contextmanager
    def sealed(self) -> Iterator[None]:
        """Closes the test split for as long as the context is open."""
        before, self._sealed = self._sealed, True
        try:
            yield
        finally:
            self._sealed = before


def load_image_data(
    name: str = "MNIST", root: Path = DATASET_ROOT, device: torch.device | str = "cpu", held_out: int = 0
) -> ImageData:
    """Reads a data set into memory, standardised by its training split.

    held_out: this many training samples, the last, stand in the place of the test split, for choices it must not make
    Raises DataError where its files are missing and cannot be had or are damaged, or a split lacks a class.
    """
    source = data_set(name, root)
    num_classes, splits = len(source.class_names), []
    with reading(name, root / name):
        for kind in ("training", "test"):
            images, labels = source.read(kind == "training")
            counts = torch.bincount(labels, minlength=num_classes)
            if images.shape != (len(labels), *source.size) or len(counts) > num_classes or not counts.all():
                must, has = f"{source.size} pixels and every class from 0 to {num_classes - 1}", tuple(images.shape)
                raise ValueError(f"the {kind} split must be images of {must}, not {has} and {counts.tolist()} labels")
            splits.append(Split(images.to(device).flatten(1).float(), labels.to(device)))
    if held_out:
        total, splits = len(splits[0].labels), [splits[0][:-held_out], splits[0][-held_out:]]
        if any(len(split.labels.unique()) < num_classes for split in splits):
            raise DataError(f"held_out must be below {total} and leave every class on both sides, not {held_out}")
    deviation, mean = torch.std_mean(splits[0].images)
    if not deviation > 0:
        raise DataError(f"dataset {name} in {root / name}: all pixels of the training split are alike")
    for split in splits:
        split.images.sub_(mean).div_(deviation)  # in place, or a large data set would stand in memory twice
    return ImageData(*splits, source.class_names)


def mean_product(of_target: Tensor, of_source: Tensor) -> Tensor:
    """Mean over the samples of of_target[s, r] * of_source[s, c], summed over positions, (classes, m, n)."""
    if of_target.ndim == 4 and of_target.shape[2] > of_target.shape[3]:
        return torch.einsum("csmp,csnp->cmn", of_target, of_source).div_(of_source.shape[1])
    if of_target.ndim == 4:  # of many positions, what kernels read is more than the gradient: it is not copied
        total = of_target.new_zeros(len(of_target), of_target.shape[2], of_source.shape[2])
        for target, source in zip(of_target.unbind(1), of_source.unbind(1)):
            total.baddbmm_(target, source.mT)
        return total.div_(of_source.shape[1])
    return of_target.transpose(1, 2) @ of_source / of_source.shape[1]


def mean_squared_gradient(record: LayerRecord) -> Tensor:
    """Mean over the samples of (dL/dw)^2, (classes, m, n)."""
    if record.inputs.ndim == 3:
        return mean_product(record.loss_gradient**2, record.inputs**2)
    total = gradient = None
    for delta, a in zip(record.loss_gradient.unbind(1), record.inputs.unbind(1)):
        gradient = torch.bmm(delta, a.mT, out=gradient)  # of a sample of every class: those of all are too large
        total = gradient.square() if total is None else total.addcmul_(gradient, gradient)
    return total.div_(record.inputs.shape[1])


def mean_signal(record: LayerRecord) -> Tensor:
    """Mean over samples and positions of what a target neuron that is active is given, (classes, m, n)."""
    positions = record.inputs.shape[3] if record.inputs.ndim == 4 else 1
    return mean_product(record.active, record.inputs) / positions


def foreseen(records: list[LayerRecord], loss: Tensor, removed: list[Tensor]) -> tuple[list[LayerRecord], Tensor]:
    """What layers would do, and the losses (groups, samples) in nats, without the weights `removed` (m, n) of each.

    There is no pass through the network: the log-odds of every sample's label, log(p / (1 - p)), are taken to be linear
    in the weights. They change by delta . (removed a) / (1 - p), and the gradients with 1 - p; activations stay.
    """
    left = -torch.expm1(-loss).clamp_max(-1e-6)  # 1 - p
    log_odds = records[0].odds.clamp_min(1e-30).log()
    for record, weight in zip(records, removed):
        lost = record.inputs @ weight.T if record.inputs.ndim == 3 else weight @ record.inputs
        log_odds = log_odds + (record.loss_gradient * lost).flatten(2).sum(2) / left
    scale = log_odds.neg().sigmoid() / left
    found = []
    for record in records:
        delta = record.loss_gradient * scale.view(*scale.shape, *[1] * (record.loss_gradient.ndim - 2))
        found.append(record._replace(loss_gradient=delta, odds=log_odds.exp().clamp_max(1e6)))
    return found, F.softplus(-log_odds)


def mean_activation(x: Tensor) -> Tensor:
    """Mean over the samples and the positions of a convolution, (classes, neurons)."""
    return (x.mean(3) if x.ndim == 4 else x).mean(1)


def mean_gradient(record: LayerRecord) -> Tensor:
    return mean_product(record.loss_gradient, record.inputs)


def mean_forgetting_gradient(record: LayerRecord) -> Tensor:
    delta = record.loss_gradient
    return -mean_product(delta * record.odds.view(*record.odds.shape, *[1] * (delta.ndim - 2)), record.inputs)


class Feature(NamedTuple):
    """A feature of weights, from a mean over a group's samples, (classes, m, n) or what broadcasts to it.

    mean: of what a layer does on a group of every class, a record of (classes, samples, neurons[, positions]); None
        where it is of the weight alone
    of: from that mean and the weight (m, n) to the feature; the weight leads from neuron c to r
    """

    mean: Callable[[LayerRecord], Tensor] | None
    of: Callable[[Tensor, Tensor], Tensor]


# E is the mean over a group; a sample's gradient of a kernel is the sum over its positions, activations are means.
FEATURES: dict[str, Feature] = {
    # E[a_c], E[h_r]
    "input_activation": Feature(lambda record: mean_activation(record.inputs)[:, None], lambda mean, weight: mean),
    "output_activation": Feature(lambda record: mean_activation(record.outputs)[..., None], lambda mean, weight: mean),
    "weight": Feature(None, lambda _, weight: weight[None]),
    "gradient": Feature(mean_gradient, lambda mean, weight: mean),  # E[dL/dw]
    # w E[dL/dw]: the first-order fall of the loss when the weight is removed
    "effect": Feature(mean_gradient, lambda mean, weight: weight * mean),
    # |w| sqrt(E[(dL/dw)^2]): the root of the diagonal Fisher information of removing the weight
    "fisher": Feature(mean_squared_gradient, lambda mean, weight: weight.abs() * mean.sqrt()),
    # w E[d(logit of the class - mean logit)/dw]: the first-order fall of the margin when the weight is removed
    "margin": Feature(lambda of: mean_product(of.margin_gradient, of.inputs), lambda mean, weight: weight * mean),
    # w E[d(-log(1 - p))/dw], p of the class: the first-order fall of what forgetting asks for, of what is left alone
    "forgetting": Feature(mean_forgetting_gradient, lambda mean, weight: weight * mean),
    # |w| E[unit r is active * a_c]: the signal that the weight passes on
    "coactivation": Feature(mean_signal, lambda mean, weight: weight.abs() * mean),
}


@dataclass(frozen=True)
class GraphConfig:
    """What the activation graphs are made of."""

    mask_layer: int | tuple[int, ...] | None  # an index, several, or None for all layers
    # All masked weights compete, every layer gives the same share of its own, or the layer that is measured to be best.
    scope: Literal["global", "layerwise", "measured"]
    features: tuple[str, ...]  # names of FEATURES
    other_classes: bool  # adds to each feature (but the weight) its mean over the other classes
    samples_per_class: Count

    def __post_init__(self) -> None:
        if not self.features or len(set(self.features)) < len(self.features) or set(self.features) - set(FEATURES):
            raise ValueError(f"features must be some of {', '.join(FEATURES)}, each once, not {list(self.features)}")

    @property
    def num_features(self) -> int:
        """The features of a vertex in a class graph."""
        return len(self.features) + self.other_classes * sum(name != "weight" for name in self.features)


def vertex_features(features: list[Tensor]) -> Tensor:
    """Features (groups, vertices), standardised over the vertices, as (groups, vertices, features). Clears the list."""
    x = torch.stack(features)
    features.clear()  # large ones would stay in memory with the copy
    # torch.std_mean takes ten times as long.
    x -= x.mean(-1, keepdim=True)
    deviation = torch.linalg.vector_norm(x, dim=-1, keepdim=True) / max(1, x.shape[-1] - 1) ** 0.5
    x /= deviation.clamp_min(1e-12)
    return x.permute(1, 2, 0).contiguous()


@dataclass(eq=False)
class GraphGenerator:
    """Activation graphs of a classifier: what every sample does in the masked layers, recorded in one batched pass.

    Stored are a few hundred floats a sample, class after class; vertex features are formed when they are needed.
    """

    classifier: HookedClassifier
    train: Split
    config: GraphConfig
    seed: int

    def __post_init__(self) -> None:
        classifier = self.classifier.eval()
        self.graph = WeightGraph.of(classifier, self.config.mask_layer)
        classes, counts = self.train.labels.unique(return_counts=True)
        self.classes = classes.tolist()  # those that there are samples of; graphs and features stand in their order
        self.num_classes = len(self.classes)
        if self.num_classes < 2:
            raise ValueError(f"there must be samples of two classes at least, not of {self.classes} alone")
        self.samples_per_class = min(self.config.samples_per_class, int(counts.min()))
        self.samples = some_of_every_class(self.train, self.samples_per_class, "graphs", self.seed)
        self.labels = self.samples.labels
        self.inputs = classifier.given_to(self.graph.layers, self.samples.images)  # no mask changes what comes before
        self.at_once = classifier.recorded_at_once(self.graph.layers)
        # What kernels read would be too much to be kept: their passes are made anew.
        self.records: list[LayerRecord] | None = None
        # The last look: its samples and the vertices zeroed, and what was recorded.
        self._looked: tuple[tuple[Tensor, Tensor], list[tuple[list[LayerRecord], Tensor]]] | None = None
        if all(len(shape) == 2 for shape in self.graph.shapes):
            everything = torch.arange(len(self), device=self.labels.device).split(self.at_once)
            records, self.loss = zip(*(self._record(rows) for rows in everything))
            self.records = [LayerRecord(*map(torch.cat, zip(*of_layer))) for of_layer in zip(*records)]
            self.loss = torch.cat(self.loss)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def nothing(self) -> Tensor:
        """No vertex of the weight graph."""
        return torch.empty(0, dtype=torch.long, device=self.labels.device)

    def by_class(self) -> Tensor:
        """Indices of all samples, (classes, samples_per_class)."""
        return torch.arange(len(self), device=self.labels.device).view(self.num_classes, -1)

    def draw(self, group_size: int, generator: torch.Generator) -> Tensor:
        """Indices of `group_size` random samples of every class, (classes, group_size), without repetition."""
        keys = torch.rand(self.num_classes, self.samples_per_class, generator=generator)
        return self.by_class().gather(1, keys.argsort(1)[:, :group_size].to(self.labels.device))

    def weights(self) -> list[Tensor]:
        """The weight matrices of the masked layers as they are now, (m, n) each."""
        return [self.classifier.layers[index].weight.detach() for index in self.graph.layers]

    def class_graphs(
        self, samples: Tensor, mask: Mask | None = None, ahead: Mask | None = None
    ) -> tuple[Iterator[Tensor], Tensor]:
        """The graph of a group of every class, samples (classes, group_size), on the classifier or on a masked one.

        ahead: a mask that includes the first; what its further zeros do is foreseen, without another pass (`foreseen`)

        Returns the vertex features (classes, vertices, features), as many classes at a time as fit in the cache but one
        at least, standardised over each graph; and the mean cross entropy of each class (classes), nats.
        """
        formed, loss = self._features(samples, self.config.features, mask, ahead)
        at_once = max(1, VERTICES_AT_ONCE // self.graph.num_vertices)
        chosen = [slice(first, first + at_once) for first in range(0, self.num_classes, at_once)]
        return self._graphs(formed, chosen), loss

    def weighed_graphs(
        self,
        samples: Tensor,
        classes: Tensor,
        names: Sequence[str],
        mask: Mask | None = None,
        ahead: Mask | None = None,
    ) -> tuple[Iterator[Tensor], dict[str, Tensor], Tensor]:
        """`class_graphs` of some classes alone, one at a time, and `class_features` of all, both from one pass."""
        formed, loss = self._features(samples, [*self.config.features, *names], mask, ahead)
        features = {name: self._flat(formed(name, slice(None))) for name in names}
        return self._graphs(formed, [slice(each, each + 1) for each in classes.tolist()]), features, loss

    def class_features(
        self,
        samples: Tensor,
        names: Sequence[str],
        mask: Mask | None = None,
        ahead: Mask | None = None,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Some of FEATURES, not standardised, of groups of samples (groups, group_size), with or without a mask.

        Returns name to (groups, vertices), and the mean cross entropy of each group (groups), nats.
        """
        formed, loss = self._features(samples, names, mask, ahead)
        return {name: self._flat(formed(name, slice(None))) for name in names}, loss

    def _graphs(self, formed: Callable[[str, slice], list[Tensor]], classes: Sequence[slice]) -> Iterator[Tensor]:
        own = self.config.features
        names = [name for name in own if name != "weight"] if self.config.other_classes else []
        totals = {name: [part.sum(0) for part in formed(name, slice(None))] for name in names}
        for chosen in classes:
            features = [self._flat(formed(name, chosen)) for name in own]
            for name in names:
                sums = (total - part for total, part in zip(totals[name], formed(name, chosen)))
                features.append(self._flat([part / (self.num_classes - 1) for part in sums]))
            yield vertex_features(features)

    def _features(
        self, samples: Tensor, names: Sequence[str], mask: Mask | None, ahead: Mask | None
    ) -> tuple[Callable[[str, slice], list[Tensor]], Tensor]:
        """From a feature's name and some groups to it in every masked layer, and the loss of every group, nats.

        It is (groups, m, n), or with 1 for what it does not depend on. Kept are the means that features are formed of.
        """
        means, losses = [{} for _ in self.graph.layers], []
        weights = self._weights_under(ahead or mask)
        removed = ahead and [before - weight for before, weight in zip(self._weights_under(mask), weights)]
        for records, loss in self._passes(samples, mask):
            if removed:
                records, loss = foreseen(records, loss, removed)
            share = loss.shape[1] / samples.shape[1]
            for of_layer, record in zip(means, records):
                for mean in {FEATURES[name].mean for name in names if FEATURES[name].mean}:
                    part = mean(record).mul_(share)  # in place: of large kernels it takes much memory
                    of_layer[mean] = of_layer[mean].add_(part) if mean in of_layer else part
            losses.append(loss)

        def formed(name: str, chosen: slice) -> list[Tensor]:
            feature, count = FEATURES[name], len(range(len(samples))[chosen])
            found = (of_layer.get(feature.mean) for of_layer in means)
            means_of = (mean if mean is None else mean[chosen] for mean in found)
            parts = [feature.of(mean, weight) for mean, weight in zip(means_of, weights)]
            return [part.expand(count, *part.shape[1:]) for part in parts]

        return formed, torch.cat(losses, 1).mean(1)

    def _weights_under(self, mask: Mask | None) -> list[Tensor]:
        """The weight matrices of the masked layers under a mask, (m, n) each."""
        weights = self.weights() if mask is None else mask.weights(self.classifier).values()
        return [weight.flatten(1) for weight in weights]

    def _passes(self, samples: Tensor, mask: Mask | None) -> Iterable[tuple[list[LayerRecord], Tensor]]:
        """Records (groups, samples, ...) of groups, part after part of their samples, and the samples' losses.

        Those of the last look are kept for the steps that follow it, but for those of kernels.
        """
        if self.records is None:
            return self._run(samples, mask)
        about = samples, self.nothing if mask is None else mask.vertices()
        if self._looked is None or not all(map(torch.equal, about, self._looked[0])):
            if mask is None:
                gathered = [LayerRecord(*(x[samples] for x in record)) for record in self.records]
                self._looked = about, [(gathered, self.loss[samples])]
            else:
                self._looked = about, list(self._run(samples, mask))
        return self._looked[1]

    def _run(self, samples: Tensor, mask: Mask | None) -> Iterator[tuple[list[LayerRecord], Tensor]]:
        with nullcontext() if mask is None else mask.applied_to(self.classifier):
            for part in samples.split(max(1, self.at_once // len(samples)), 1):
                records, loss = self._record(part.flatten())
                of_groups = [LayerRecord(*(x.unflatten(0, part.shape) for x in record)) for record in records]
                yield of_groups, loss.view(part.shape)

    def _record(self, rows: Tensor) -> tuple[list[LayerRecord], Tensor]:
        layers = self.graph.layers
        return self.classifier.record(self.inputs[rows], self.labels[rows], layers, layers)

    def _flat(self, parts: list[Tensor]) -> Tensor:
        """A feature of every masked layer as one of all vertices, (groups, vertices)."""
        shapes = ((len(target), len(source)) for target, source in zip(self.graph.targets, self.graph.sources))
        return torch.cat([part.expand(len(part), *shape).flatten(1) for part, shape in zip(parts, shapes)], 1)

    def get_data(self, index: int, max_edges: int = 50_000_000) -> Data:
        """The graph of one sample for PyG: x (vertices, features), edge_index (2, edges), y (1).

        While the list of edges is built, an edge takes about 100 bytes. Raises IndexError where there is no such
        sample, ValueError on more than `max_edges`.
        """
        # Imported here, since it takes longer than the rest and only this export needs it.
        from torch_geometric.data import Data

        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} is not there: valid are 0 to {len(self) - 1}")
        if (edges := self.graph.num_edges) > max_edges:
            raise ValueError(f"max_edges must be at least {edges:,} ({16 * edges / 1e9:.1f} GB), not {max_edges:,}")
        label, names = self.labels[index : index + 1], self.config.features
        own, _ = self.class_features(torch.tensor([[index]], device=label.device), names)
        classes, _ = self.class_features(self.by_class(), names)
        others = [name for name in names if name != "weight"] if self.config.other_classes else []
        of_others = [(classes[name].sum(0) - classes[name][label]) / (self.num_classes - 1) for name in others]
        x = vertex_features([*own.values(), *of_others])[0]
        return Data(x=x, edge_index=self.graph.edge_index().to(label.device), y=label)

    def recorded(self) -> dict[str, Any]:
        """What was recorded, as it is saved: `layers`, `labels` (samples), and `records`, each layer's as a dict
        where they are kept."""
        records = [record._asdict() for record in self.records or []]
        return {"layers": list(self.graph.layers), "labels": self.labels, "records": records}
