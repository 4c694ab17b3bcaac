"""Image data sets in memory, their forget and retain splits, and the activation graphs of a classifier."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import InitVar, dataclass
from functools import partial
from glob import glob
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset
from tqdm import tqdm

from model import HookedMNISTClassifier, LayerRecord, Mask, WeightGraph
from runs.files import InputError, digest, naming, one_line

if TYPE_CHECKING:
    from torch_geometric.data import Data

DATASET_ROOT = Path(__file__).resolve().parent / "datasets"
# What torchvision downloads, all of 28 x 28 images, and the names of their classes.
DATASETS = {
    "MNIST": tuple("0123456789"),
    "FashionMNIST": ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"),
    "KMNIST": ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
}
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


class DataSet(NamedTuple):
    """A data set on the disk, of which no more is read yet than what its images and classes are.

    size: height and width of an image, pixels, and 3 of one in colour; class_names: by label
    read: the training split, or with False the test split: images (samples, *size), uint8, and labels (samples)
    """

    size: tuple[int, ...]
    class_names: tuple[str, ...]
    read: Callable[[bool], tuple[Tensor, Tensor]]


def data_set(name: str, root: Path = DATASET_ROOT) -> DataSet:
    """A data set by its name, one of DATASETS or a folder under `root`. Raises DataError where it cannot be one."""
    folder, raw = root / name, root / name / "raw"
    if name in DATASETS:
        return DataSet((28, 28), DATASETS[name], partial(read_idx, name, raw))
    there = {path.name for path in root.glob("*") if path.is_dir()}.difference(DATASETS, ["Graphs"])
    if name not in there:
        valid = ", ".join([*DATASETS, *sorted(there)])
        raise DataError(f"dataset must be {valid}, or another folder in {root}, not {name!r}")
    with reading(name, folder):
        files = [*raw.glob("*-ubyte*"), *folder.glob("*-ubyte*")]
        found = idx_files(files[0].parent) if files else image_folders(folder)
        names = found.class_names
        if len(names) < 2 or not "".join(names).isprintable() or set("$|") & set("".join(names)):
            raise ValueError(f"it must have two classes at least, named without $, | and line breaks, not {names}")
    return found


@contextmanager
def reading(name: str, folder: Path) -> Iterator[None]:
    """Turns what missing and damaged files raise into a DataError that names the data set."""
    try:
        yield
    except (RuntimeError, OSError, ValueError, TypeError, LookupError, AssertionError, EOFError, zlib.error) as error:
        raise DataError(f"dataset {name} in {folder}: cannot be used ({one_line(error)})") from None


def idx_files(folder: Path) -> DataSet:
    """A data set in the format of MNIST, its files packed by gzip or not."""
    with opened(folder / FILES[0]) as images, opened(folder / FILES[1]) as labels:
        _, _, height, width = np.frombuffer(images.read(16), ">i4").tolist()
        class_names = tuple(map(str, range(1 + max(labels.read()[8:]))))
    return DataSet((height, width), class_names, partial(read_idx, "", folder))


def opened(path: Path) -> IO[bytes]:
    with naming(path, "read"):
        return gzip.open(packed(path)) if packed(path).exists() else path.open("rb")


def read_idx(name: str, folder: Path, is_train: bool) -> tuple[Tensor, Tensor]:
    """Reads a split in the format of MNIST; downloads what of DATASETS is not there, and unpacks what is packed."""
    # Imported here, so that a bad setting is told without waiting for it.
    from torchvision import datasets

    paths = [folder / file for file in FILES]
    if name in DATASETS and not all(path.exists() or packed(path).exists() for path in paths):
        getattr(datasets, name)(folder.parents[1], download=True)
    images, labels = paths[:2] if is_train else paths[2:]
    for path in (images, labels):
        if path.exists() and not path.is_file():
            raise ValueError(f"{path.name} is not a regular file")
        if packed(path).exists() and not (path.exists() and crc(path) == crc(packed(path))):
            with suppress(OSError, EOFError, zlib.error):
                datasets.utils.extract_archive(packed(path), folder)
            if not path.exists() or crc(path) != crc(packed(path)):
                raise ValueError(f"{packed(path).name} is damaged, or {path.name} cannot be written")
    return datasets.mnist.read_image_file(images), datasets.mnist.read_label_file(labels)


def image_folders(folder: Path) -> DataSet:
    """A data set of images in train/<class>/ and test/<class>/, all of one size, and all grey or all in colour."""
    if not all((folder / part).is_dir() for part in ("train", "test")):
        raise ValueError("it must hold images in train/<class>/ and test/<class>/, or the four files of MNIST's format")
    from torchvision.datasets import ImageFolder

    train, test = (ImageFolder(folder / part, loader=pixels) for part in ("train", "test"))
    if odd := set(train.classes) ^ set(test.classes):
        raise ValueError(f"train/ and test/ must have the same classes, not {', '.join(sorted(odd))} in one alone")
    size = train[0][0].shape

    def read(is_train: bool) -> tuple[Tensor, Tensor]:
        part = train if is_train else test
        images = [pixels(path) for path, _ in tqdm(part.samples, "images", delay=1, leave=False, disable=None)]
        for (path, _), image in zip(part.samples, images):
            if image.shape != size:
                raise ValueError(f"{path} is of {image.shape}, but {train.samples[0][0]} is of {size}")
        # The last samples may be held out: they must not be of one class.
        order = torch.randperm(len(images), generator=seeded("folders", is_train))
        return torch.from_numpy(np.stack(images))[order], torch.tensor(part.targets)[order]

    return DataSet(size, tuple(train.classes), read)


def pixels(path: str) -> np.ndarray:
    """An image (height, width), or in colour (height, width, 3), uint8. Raises ValueError where it is none of these."""
    try:
        with naming(Path(path), "read"), Image.open(path) as image:
            if image.mode not in ("L", "RGB"):
                raise ValueError(f"its mode is {image.mode}")
            return np.asarray(image)
    except Exception as error:  # any byte may be wrong, and what that raises is anything
        raise ValueError(f"{path} must be an image, grey or RGB of 8 bits: {error}") from None


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
            splits.append(Split(images.to(device).float().flatten(1), labels.to(device)))
    if held_out:
        total, splits = len(splits[0].labels), [splits[0][:-held_out], splits[0][-held_out:]]
        if any(len(split.labels.unique()) < num_classes for split in splits):
            raise DataError(f"held_out must be below {total} and leave every class on both sides, not {held_out}")
    deviation, mean = torch.std_mean(splits[0].images)
    if not deviation > 0:
        raise DataError(f"dataset {name} in {root / name}: all pixels of the training split are alike")
    standardised = (Split((split.images - mean) / deviation, split.labels) for split in splits)
    return ImageData(*standardised, source.class_names)


def packed(path: Path) -> Path:
    return path.with_name(f"{path.name}.gz")


def crc(path: Path) -> bytes:
    """CRC-32 of what a file holds, of a packed one without unpacking it: every gzip file ends with it and a size."""
    content = path.read_bytes()
    return content[-8:-4] if path.suffix == ".gz" else zlib.crc32(content).to_bytes(4, "little")


def checksum(name: str, root: Path = DATASET_ROOT) -> str:
    """A digest of the CRC-32 of every file of a data set: what says which data set it is. Empty where none is there."""
    folder = root / name
    found = {path for path in glob("**", root_dir=folder, recursive=True) if (folder / path).is_file()}
    crcs = {path.removesuffix(".gz"): crc(folder / path).hex() for path in found if f"{path}.gz" not in found}
    return digest(crcs) if crcs else ""


def mean_product(of_target: Tensor, of_source: Tensor) -> Tensor:
    """Mean over the samples of of_target[s, r] * of_source[s, c], (classes, m, n)."""
    return of_target.transpose(1, 2) @ of_source / of_source.shape[1]


# From what a layer does on a group of samples of every class, a record of (classes, samples, neurons), and its weight
# (m, n) to (classes, m, n), or what broadcasts to it. The weight leads from neuron c to r; E is the mean over a group.
FEATURES: dict[str, Callable[[LayerRecord, Tensor], Tensor]] = {
    "input_activation": lambda record, weight: record.inputs.mean(1)[:, None],  # E[a_c]
    "output_activation": lambda record, weight: record.outputs.mean(1)[:, :, None],  # E[h_r]
    "weight": lambda record, weight: weight[None],
    "gradient": lambda record, weight: mean_product(record.loss_gradient, record.inputs),  # E[dL/dw]
    # w E[dL/dw]: the first-order fall of the loss when the weight is removed
    "effect": lambda record, weight: weight * mean_product(record.loss_gradient, record.inputs),
    # |w| sqrt(E[(dL/dw)^2]): the root of the diagonal Fisher information of removing the weight
    "fisher": lambda record, weight: weight.abs() * mean_product(record.loss_gradient**2, record.inputs**2).sqrt(),
    # w E[d(logit of the class - mean logit)/dw]: the first-order fall of the margin when the weight is removed
    "margin": lambda record, weight: weight * mean_product(record.margin_gradient, record.inputs),
    # |w| E[unit r is active * a_c]: the signal that the weight passes on
    "coactivation": lambda record, weight: weight.abs() * mean_product(record.active, record.inputs),
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
        """The features of a vertex, without an auxiliary one."""
        return len(self.features) + self.other_classes * sum(name != "weight" for name in self.features)


class Auxiliary(Protocol):
    """What may be asked of a mask beside forgetting: a further feature, term of the loss, and condition for done."""

    weight: float  # what it is worth to a request; 0: nothing

    def draw_weight(self, generator: torch.Generator) -> float:
        """The weight of the term in a step of training; the GCN is told it as the scale of the feature."""

    def feature(self, samples: Tensor, classes: Sequence[int], mask: Mask | None) -> Tensor:
        """The feature of each of `classes` (classes, vertices), from a group of every class (classes, group_size)."""

    def loss(self, features: Tensor, classes: Sequence[int]) -> Tensor:
        """The mean over masks, one for each of `classes`, on representations (masks, classes, group_size, n)."""

    def is_reached(self, mask: Mask, forget_class: int) -> bool:
        """Whether a mask is enough, so that kappa auto may stop there."""


def vertex_features(features: Sequence[Tensor]) -> Tensor:
    """Features (groups, vertices), standardised over the vertices, as (groups, vertices, features)."""
    x = torch.stack(features)
    # torch.std_mean takes ten times as long.
    x -= x.mean(-1, keepdim=True)
    deviation = torch.linalg.vector_norm(x, dim=-1, keepdim=True) / max(1, x.shape[-1] - 1) ** 0.5
    x /= deviation.clamp_min(1e-12)
    return x.permute(1, 2, 0).contiguous()


@dataclass(eq=False)
class GraphGenerator:
    """Activation graphs of a classifier: what every sample does in the masked layers, recorded in one batched pass.

    Stored are a few hundred floats a sample, class after class; vertex features are formed when they are needed.
    `auxiliary` makes what is asked of masks beside forgetting.
    """

    classifier: HookedMNISTClassifier
    train: Split
    config: GraphConfig
    seed: int
    auxiliary: InitVar[Callable[[GraphGenerator], Auxiliary] | None] = None

    def __post_init__(self, auxiliary: Callable[[GraphGenerator], Auxiliary] | None) -> None:
        self.graph = WeightGraph(self.classifier.shapes, self.config.mask_layer)
        classes, counts = self.train.labels.unique(return_counts=True)
        self.classes = classes.tolist()  # those that there are samples of; graphs and features stand in their order
        self.num_classes = len(self.classes)
        if self.num_classes < 2:
            raise ValueError(f"there must be samples of two classes at least, not of {self.classes} alone")
        self.samples_per_class = min(self.config.samples_per_class, int(counts.min()))
        self.samples = some_of_every_class(self.train, self.samples_per_class, "graphs", self.seed)
        self.labels = self.samples.labels
        self.records, self.loss = self.classifier.record(self.samples.images, self.labels, self.graph.layers)
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
        return self.by_class().gather(1, keys.argsort(1)[:, :group_size].to(self.labels.device))

    def weights(self) -> list[Tensor]:
        """The weight matrices of the masked layers as they are now, (m, n) each."""
        return [self.classifier.layers[index].weight.detach() for index in self.graph.layers]

    def class_graphs(
        self, samples: Tensor, mask: Mask | None = None, auxiliary_weight: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """The graph of a group of every class, samples (classes, group_size), on the classifier or on a masked one.

        Returns the vertex features (classes, vertices, features), standardised over each graph, an auxiliary one then
        scaled by its weight, and the mean cross entropy of each class (classes), nats.
        """
        own, loss = self.class_features(samples, self.config.features, mask)
        features, others = list(own.values()), self._of_others(own)
        if self.auxiliary is not None and auxiliary_weight:
            features.append(self.auxiliary.feature(samples, range(self.num_classes), mask))
        elif self.auxiliary is not None:
            features.append(torch.zeros_like(features[0]))
        x = vertex_features(features + others)
        if self.auxiliary is not None:
            x[..., len(features) - 1] *= auxiliary_weight
        return x, loss

    def class_features(
        self, samples: Tensor, names: Sequence[str], mask: Mask | None = None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Some of FEATURES, not standardised, of groups of samples (groups, group_size), with or without a mask.

        Returns name to (groups, vertices), and the mean cross entropy of each group (groups), nats.
        """
        if mask is None:
            records, loss, weights, rows = self.records, self.loss, self.weights(), samples
        else:
            flat, layers = samples.flatten(), self.graph.layers
            rows = torch.arange(len(flat), device=flat.device).view_as(samples)
            with mask.applied_to(self.classifier):
                records, loss = self.classifier.record(self.inputs[flat], self.labels[flat], layers, layers[0])
                weights = self.weights()
        groups = [LayerRecord(*(x[rows] for x in record)) for record in records]
        features = {}
        for name in names:
            parts = [FEATURES[name](*of_layer) for of_layer in zip(groups, weights)]
            parts = [part.expand(len(rows), *weight.shape).flatten(1) for part, weight in zip(parts, weights)]
            features[name] = torch.cat(parts, 1)  # (groups, vertices)
        return features, loss[rows].mean(1)

    def _of_others(self, own: dict[str, Tensor]) -> list[Tensor]:
        """Means of features (classes, vertices) over the other classes: of none or of all but the weight."""
        names = [name for name in own if name != "weight"] if self.config.other_classes else []
        return [(own[name].sum(0) - own[name]) / (len(own[name]) - 1) for name in names]

    def get_data(self, index: int, max_edges: int = 50_000_000) -> Data:
        """The graph of one sample for PyG: x (vertices, features), edge_index (2, edges), y (1).

        Without the auxiliary feature, which a class has and a sample has not. While the list of edges is built, an edge
        takes about 100 bytes. Raises IndexError where there is no such sample, ValueError on more than `max_edges`.
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
        x = vertex_features([*own.values(), *(x[label] for x in self._of_others(classes))])[0]
        return Data(x=x, edge_index=self.graph.edge_index().to(label.device), y=label)

    def recorded(self) -> dict[str, Any]:
        """What was recorded, as it is saved: `layers`, `labels` (samples), and `records`, each layer's as a dict."""
        records = [record._asdict() for record in self.records]
        return {"layers": list(self.graph.layers), "labels": self.labels, "records": records}
