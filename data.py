"""Image data sets in memory, their forget and retain splits, and the activation graphs of a classifier."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset

from model import HookedMNISTClassifier, LayerRecord, Mask, WeightGraph
from runs.files import InputError, one_line

if TYPE_CHECKING:
    from torch_geometric.data import Data

DATASET_ROOT = Path(__file__).resolve().parent / "datasets"
IMAGE_SIZE = 28 * 28
NUM_CLASSES = 10
DATASETS = ("MNIST", "FashionMNIST", "KMNIST")
FILES = tuple(f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))
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


def seeded(*key: object) -> torch.Generator:
    """A random generator (CPU) that depends on its key alone, so that no draw depends on the order of other work."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


@contextmanager
def seeded_initialisation(seed: int) -> Iterator[None]:
    """Modules made while the context is open get the weights of this seed; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


class DataError(InputError):
    """A data set that is not there and cannot be had, or whose files are not what they should be."""


@dataclass(frozen=True)
class Split:
    """Samples in memory. images: (samples, 784) float, labels: (samples) int64."""

    images: Tensor
    labels: Tensor

    def forget(self, forget_class: int) -> Split:
        """The samples of the forget class."""
        return self._where(self.labels == forget_class)

    def retain(self, forget_class: int) -> Split:
        """The samples of all other classes."""
        return self._where(self.labels != forget_class)

    def _where(self, chosen: Tensor) -> Split:
        return Split(self.images[chosen], self.labels[chosen])

    def loader(self, batch_size: int = SCORED_AT_ONCE) -> DataLoader:
        """Whole batches (images, labels) in order, cut from the tensors at once rather than sample by sample."""
        samples = TensorDataset(self.images, self.labels)
        batches = BatchSampler(SequentialSampler(samples), batch_size, drop_last=False)
        return DataLoader(samples, sampler=batches, batch_size=None)


def some_of_every_class(split: Split, count: int, *key: object) -> Split:
    """Random samples, class after class: `count` of every class that is there, or all where it has fewer.

    key: what the draw depends on, beside the class
    """
    chosen = []
    for label in split.labels.unique().tolist():
        of_class = (split.labels == label).nonzero().squeeze(1)
        order = torch.randperm(len(of_class), generator=seeded(*key, label))
        chosen.append(of_class[order[:count].to(of_class.device)])
    found = torch.cat(chosen)
    # Copies rows; indexing copies numbers one by one.
    return Split(split.images.index_select(0, found), split.labels[found])


def is_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Which samples are classified correctly, (samples): none whose logits (samples, classes) are not numbers.

    The largest of logits that are not numbers would be the first class.
    """
    return (logits.argmax(1) == labels) & ~logits.isnan().any(1)


class ImageData:
    """A training split that methods may use, and a test split that scores them.

    While a method runs, the test split is sealed: asking for it raises PermissionError.
    """

    def __init__(self, train: Split, test: Split) -> None:
        self.train = train
        self._test = test
        self._sealed = False

    @property
    def test(self) -> Split:
        if self._sealed:
            raise PermissionError(
                "the test split is sealed while a method runs: methods may use the training split only"
            )
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
    """Reads a torchvision data set of 28 x 28 images into memory, standardised by its training split.

    held_out: for choices that the test split must not make, this many training samples, the last ones, are taken out of
        the training split and stand in the place of the test split

    Raises DataError where its files are missing and cannot be had or are damaged, ValueError on an unknown name.
    """
    # Imported here, so that a bad setting is told without waiting for it.
    import torchvision

    if name not in DATASETS:
        raise ValueError(f"dataset must be one of {', '.join(DATASETS)}, not {name!r}")
    folder = root / name / "raw"
    try:
        for path in map(folder.joinpath, FILES):
            # torchvision unpacks what is not there, but looks at no more than the names of what is.
            if path.exists() and packed(path).exists() and crc_and_size(path) != crc_and_size(packed(path)):
                path.unlink()
        parts = [getattr(torchvision.datasets, name)(root, is_train, download=True) for is_train in (True, False)]
    except (RuntimeError, OSError, ValueError, AssertionError, EOFError, zlib.error) as error:
        missing = [packed(folder / file).name for file in FILES if not (folder / file).exists()]
        what = f"{', '.join(missing)}: not there, or damaged, and cannot be downloaded" if missing else "cannot be read"
        raise DataError(f"dataset {name} in {folder}: {what} ({one_line(error)})") from None
    for part, file in zip(parts, FILES[::2]):
        shape, labels = tuple(part.data.shape), part.targets
        if shape != (len(labels), 28, 28) or not len(labels) or not 0 <= labels.min() <= labels.max() < NUM_CLASSES:
            raise DataError(
                f"{folder / file}: must hold 28 x 28 images, each with a label from 0 to {NUM_CLASSES - 1}, not images "
                f"of shape {shape} with {len(labels)} labels from {set(labels.tolist())}"
            )
    train, test = (Split(part.data.to(device).float().flatten(1), part.targets.to(device)) for part in parts)
    if held_out:
        test = Split(train.images[-held_out:], train.labels[-held_out:])
        train = Split(train.images[:-held_out], train.labels[:-held_out])
    for split, kind in ((train, "training"), (test, "test")):
        counts = torch.bincount(split.labels, minlength=NUM_CLASSES)
        if not counts.all():
            raise DataError(f"dataset {name} in {folder}: class {int(counts.argmin())} has no {kind} sample")
    deviation, mean = torch.std_mean(train.images)
    return ImageData(*(Split((split.images - mean) / deviation, split.labels) for split in (train, test)))


def packed(path: Path) -> Path:
    return path.with_name(f"{path.name}.gz")


def crc_and_size(path: Path) -> bytes:
    """CRC-32 and size of the content of a file, of a packed one without unpacking it: they end every gzip file."""
    content = path.read_bytes()
    if path.suffix == ".gz":
        return content[-8:]
    return zlib.crc32(content).to_bytes(4, "little") + (len(content) % 2**32).to_bytes(4, "little")


def checksums(name: str, root: Path = DATASET_ROOT) -> dict[str, str]:
    """CRC-32 and size of every file of a data set: what says which data set it is. Empty where a file is not there."""
    paths = [root / name / "raw" / file for file in FILES]
    try:
        return {path.name: crc_and_size(packed(path) if packed(path).exists() else path).hex() for path in paths}
    except OSError:
        return {}


class ClassGroup:
    """One layer's record of a group of samples for every class: what the vertex features are made of.

    Fields of the record are (classes, samples, neurons) here; weight is (m, n).
    """

    def __init__(self, record: LayerRecord, weight: Tensor) -> None:
        self.record = record
        self.weight = weight

    def mean_product(self, of_target: Tensor, of_source: Tensor) -> Tensor:
        """Mean over the samples of of_target[s, r] * of_source[s, c], (classes, m, n)."""
        return of_target.transpose(1, 2) @ of_source / of_source.shape[1]

    @cached_property
    def gradient(self) -> Tensor:
        """Mean gradient of the cross entropy with respect to each weight, (classes, m, n)."""
        return self.mean_product(self.record.loss_gradient, self.record.inputs)


# From a group to (classes, m, n), or what broadcasts to it; E is the mean over the samples of a class.
FEATURES: dict[str, Callable[[ClassGroup], Tensor]] = {
    # E[a_c], of the weight's source neuron
    "input_activation": lambda group: group.record.inputs.mean(1)[:, None],
    # E[h_r], of the weight's target neuron
    "output_activation": lambda group: group.record.outputs.mean(1)[:, :, None],
    "weight": lambda group: group.weight[None],
    # E[dL/dw]
    "gradient": lambda group: group.gradient,
    # w E[dL/dw]: the first-order fall of the loss when the weight is removed
    "effect": lambda group: group.weight * group.gradient,
    # |w| sqrt(E[(dL/dw)^2]): the root of the diagonal Fisher information of removing the weight
    "fisher": lambda group: (
        group.weight.abs() * group.mean_product(group.record.loss_gradient**2, group.record.inputs**2).sqrt()
    ),
    # w E[d(logit of the class - mean logit)/dw]: the first-order fall of the margin when the weight is removed
    "margin": lambda group: group.weight * group.mean_product(group.record.margin_gradient, group.record.inputs),
    # |w| E[unit r is active * a_c]: the signal that the weight passes on
    "coactivation": lambda group: group.weight.abs() * group.mean_product(group.record.active, group.record.inputs),
}


@dataclass(frozen=True)
class GraphConfig:
    """What the activation graphs are made of.

    mask_layer: an index, a list of them, or null for all layers; features: names of FEATURES
    scope: whether the weights of all masked layers compete, or every layer gives the same share of its own
    other_classes: adds to each feature (but the weight) its mean over the other classes
    """

    mask_layer: int | tuple[int, ...] | None
    scope: Literal["global", "layerwise"]
    features: tuple[str, ...]
    other_classes: bool
    samples_per_class: Count

    def __post_init__(self) -> None:
        if not self.features or len(set(self.features)) < len(self.features) or set(self.features) - set(FEATURES):
            raise ValueError(f"features must be some of {', '.join(FEATURES)}, each once, not {list(self.features)}")

    @property
    def num_features(self) -> int:
        """The features of a vertex, without an auxiliary one."""
        return len(self.features) + self.other_classes * sum(name != "weight" for name in self.features)


class Auxiliary(Protocol):
    """What may be asked of a mask beside forgetting: a further feature, term of the loss, and condition for done.

    weight: what it is worth to a request; 0: nothing
    """

    weight: float

    def draw_weight(self, generator: torch.Generator) -> float:
        """The weight of the term in a step of training; the GCN is told it as the scale of the feature."""

    def feature(self, samples: Tensor, classes: Sequence[int], mask: Mask | None) -> Tensor:
        """The feature of each of `classes` (classes, vertices), from a group of every class (classes, group_size)."""

    def loss(self, features: Tensor, classes: Sequence[int]) -> Tensor:
        """The mean over masks, one for each of `classes`, on representations (masks, classes, group_size, n)."""

    def is_reached(self, mask: Mask, forget_class: int) -> bool:
        """Whether a mask is enough, so that kappa auto may stop there."""


class GraphGenerator:
    """Activation graphs of a classifier: what every sample does in the masked layers, recorded in one batched pass.

    Stored are a few hundred floats a sample; the vertex features of a group are formed when they are needed.
    The samples of class c are the indices c * samples_per_class to (c + 1) * samples_per_class - 1.

    auxiliary: makes what is asked of masks beside forgetting
    """

    def __init__(
        self,
        classifier: HookedMNISTClassifier,
        train: Split,
        config: GraphConfig,
        seed: int,
        auxiliary: Callable[[GraphGenerator], Auxiliary] | None = None,
    ) -> None:
        self.classifier = classifier
        self.train = train
        self.config = config
        self.graph = WeightGraph(classifier.shapes, config.mask_layer)
        self.num_classes = classifier.shapes[-1][0]
        counts = torch.bincount(train.labels, minlength=self.num_classes)
        self.samples_per_class = min(config.samples_per_class, int(counts.min()))
        if self.samples_per_class == 0:
            raise ValueError(f"class {int(counts.argmin())} has no training sample: every class needs at least one")
        self.samples = some_of_every_class(train, self.samples_per_class, "graphs", seed)
        self.labels = self.samples.labels
        self.records, self.loss = classifier.record(self.samples.images, self.labels, self.graph.layers)
        self.auxiliary = None if auxiliary is None else auxiliary(self)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_features(self) -> int:
        """The features of a vertex in a class graph."""
        return self.config.num_features + (self.auxiliary is not None)

    @property
    def inputs(self) -> Tensor:
        """Input activations of the first masked layer, (samples, n): no mask changes what comes before."""
        return self.records[0].inputs

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
        order = keys.argsort(1)[:, :group_size]
        return (order + self.samples_per_class * torch.arange(self.num_classes)[:, None]).to(self.labels.device)

    def weights(self) -> list[Tensor]:
        """The weight matrices of the masked layers as they are now, (m, n) each."""
        return [self.classifier.layers[index].weight.detach() for index in self.graph.layers]

    def class_graphs(
        self, samples: Tensor, mask: Mask | None = None, auxiliary_weight: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """The graph of one group of samples per class, on the classifier or on a masked one.

        samples: (classes, group_size); auxiliary_weight: what the auxiliary feature, if there is one, is scaled with
        Returns the vertex features (classes, vertices, features), each standardised over its graph before, and the mean
        cross entropy of each class (classes), nats.
        """
        own, loss = self.class_features(samples, self.config.features, mask)
        others = {name: (x.sum(0) - x) / (len(x) - 1) for name, x in own.items()}
        if self.auxiliary is None:
            return self._vertex_features(own, others), loss
        if auxiliary_weight:
            own["auxiliary"] = self.auxiliary.feature(samples, range(self.num_classes), mask)
        else:
            own["auxiliary"] = torch.zeros(len(loss), self.graph.num_vertices, device=loss.device, dtype=loss.dtype)
        x = self._vertex_features(own, others)
        x[..., len(own) - 1] *= auxiliary_weight
        return x, loss

    def class_features(
        self, samples: Tensor, names: Sequence[str], mask: Mask | None = None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The features of groups of samples before they are standardised, on the classifier or on a masked one.

        samples: (groups, group_size); names: of FEATURES
        Returns name to (groups, vertices), and the mean cross entropy of each group (groups), nats.
        """
        flat = samples.flatten()
        if mask is None:
            records, loss = [record.map(lambda x: x[flat]) for record in self.records], self.loss[flat]
            weights = self.weights()
        else:
            first = self.graph.layers[0]
            with mask.applied_to(self.classifier):
                records, loss = self.classifier.record(self.inputs[flat], self.labels[flat], self.graph.layers, first)
                weights = self.weights()
        groups = [
            ClassGroup(record.map(lambda x: x.unflatten(0, samples.shape)), weight)
            for record, weight in zip(records, weights)
        ]
        features = {}
        for name in names:
            parts = [FEATURES[name](group).expand(len(samples), *group.weight.shape).flatten(1) for group in groups]
            features[name] = torch.cat(parts, 1)  # (groups, vertices)
        return features, loss.view(samples.shape).mean(1)

    def _vertex_features(self, own: dict[str, Tensor], others: dict[str, Tensor]) -> Tensor:
        """Features of the class and of the others, standardised over the vertices: (groups, vertices, features)."""
        features = list(own.values())
        if self.config.other_classes:
            features += [x for name, x in others.items() if name != "weight"]
        x = torch.stack(features)  # (features, groups, vertices)
        # torch.std_mean takes ten times as long.
        x -= x.mean(-1, keepdim=True)
        deviation = torch.linalg.vector_norm(x, dim=-1, keepdim=True) / max(1, x.shape[-1] - 1) ** 0.5
        x /= deviation.clamp_min(1e-12)
        return x.permute(1, 2, 0).contiguous()

    def get_data(self, index: int, max_edges: int = 50_000_000) -> Data:
        """The graph of one sample (n = 1) for PyG: x (vertices, features), edge_index (2, edges), y (1).

        Without the auxiliary feature, which a class has and a sample has not.

        max_edges: an edge takes 16 bytes in the list, and about 100 while the list is built
        Raises IndexError where there is no such sample, ValueError on a graph with more edges.
        """
        # Imported here, since it takes longer than the rest and only this export needs it.
        from torch_geometric.data import Data

        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} is not there: valid are 0 to {len(self) - 1}")
        if (edges := self.graph.num_edges) > max_edges:
            raise ValueError(
                f"max_edges must be at least {edges:,} (a list of {16 * edges / 1e9:.1f} GB), not {max_edges:,}"
            )
        label, everything = self.labels[index : index + 1], self.by_class()
        own, _ = self.class_features(everything.view(-1)[index : index + 1, None], self.config.features)
        classes, _ = self.class_features(everything, self.config.features)
        others = {name: (x.sum(0) - x)[label] / (len(x) - 1) for name, x in classes.items()}
        x = self._vertex_features(own, others)[0]
        return Data(x=x, edge_index=self.graph.edge_index().to(label.device), y=label)

    def recorded(self) -> dict[str, Any]:
        """What was recorded, as it is saved: `layers`, `labels` (samples), and `records`, a dictionary for each layer.

        Tensors in it are (samples, neurons), as in `LayerRecord`.
        """
        return {"layers": list(self.graph.layers), "labels": self.labels, "records": list(map(vars, self.records))}
