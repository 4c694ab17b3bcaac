"""MNIST in memory, its forget and retain splits, and the activation graphs of a classifier."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset

from artifacts import InputError, one_line, written_whole
from erasure import explained_variance, nearest_classes, probe_recall
from model import HookedMNISTClassifier, LayerRecord, Mask, WeightGraph

if TYPE_CHECKING:
    from torch_geometric.data import Data

DATASET_ROOT = Path(__file__).resolve().parent / "datasets"
IMAGE_SIZE = 28 * 28
NUM_CLASSES = 10
DATASETS = ("MNIST", "FashionMNIST", "KMNIST")
FILES = tuple(f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))


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


LARGEST = 10**9


def check_range(name: str, value: float, at_least: float | None = None, above: float | None = None) -> None:
    """Raises ValueError unless the value is in its range and at most LARGEST, above which no setting makes sense."""
    if not value <= LARGEST:
        raise ValueError(f"{name} must be at most {LARGEST}, not {value}")
    if at_least is not None and value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, not {value}")
    if above is not None and value <= above:
        raise ValueError(f"{name} must be above {above}, not {value}")


# How many of the masked weights: a number of them (an integer), or a share (a fraction below 1).
Amount = int | float


def check_amount(name: str, amount: Amount) -> None:
    """Raises ValueError unless the amount is a number of weights from 1, or a share of them between 0 and 1."""
    if not (1 <= amount <= LARGEST if isinstance(amount, int) else 0 < amount < 1):
        raise ValueError(f"{name} must be a number of weights from 1, or a share of them below 1, not {amount}")


def check_span(name: str, span: Sequence[Amount]) -> None:
    """Raises ValueError unless the span is [low, high], both numbers of weights or both shares of them."""
    if len(span) != 2 or isinstance(span[0], int) != isinstance(span[1], int) or span[0] > span[1]:
        raise ValueError(f"{name} must be [low, high], two numbers of weights or two shares of them, not {list(span)}")
    for amount in span:
        check_amount(name, amount)


def number_of_weights(amount: Amount, num_vertices: int) -> int:
    """The amount as a number of the masked weights, one at least."""
    return amount if isinstance(amount, int) else max(1, round(amount * num_vertices))


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

    def loader(self, batch_size: int) -> DataLoader:
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
        raise ValueError(f"dataset {name!r} is not known: valid are {', '.join(DATASETS)}")
    dataset, folder = getattr(torchvision.datasets, name), root / name / "raw"
    unpack(dict(dataset.resources), folder)
    try:
        parts = [dataset(root=root, train=is_train, download=True) for is_train in (True, False)]
    except (RuntimeError, OSError, ValueError, AssertionError) as error:
        missing = [f"{file}.gz" for file in FILES if not (folder / file).exists()]
        what = f"{', '.join(missing)} cannot be downloaded: put them there" if missing else "its files cannot be read"
        raise DataError(f"dataset {name} in {folder}: {what} ({one_line(error)})") from None
    splits = []
    for part, where in zip(parts, FILES[::2]):
        check_samples(part.data, part.targets, folder / where)
        splits.append(Split(part.data.to(device).float().flatten(1), part.targets.to(device)))
    train, test = splits
    if held_out:
        test = Split(train.images[-held_out:], train.labels[-held_out:])
        train = Split(train.images[:-held_out], train.labels[:-held_out])
    for split, kind in ((train, "training"), (test, "test")):
        counts = torch.bincount(split.labels, minlength=NUM_CLASSES)
        if not counts.all():
            raise DataError(f"dataset {name} in {folder}: class {int(counts.argmin())} has no {kind} sample")
    deviation, mean = torch.std_mean(train.images)
    return ImageData(*(Split((split.images - mean) / deviation, split.labels) for split in (train, test)))


def checksums(name: str, root: Path = DATASET_ROOT) -> dict[str, str]:
    """CRC-32 and size of every file of a data set, without unpacking it: what says which data set it is.

    Empty where a file is not there, neither packed nor unpacked.
    """
    found = {}
    for file in FILES:
        path = root / name / "raw" / file
        try:
            if (packed := packed_file(path)).exists():
                found[file] = packed.read_bytes()[-8:].hex()  # where gzip keeps both
            else:
                found[file] = gzip_trailer(path.read_bytes()).hex()
        except OSError:
            return {}
    return found


def packed_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.gz")


def gzip_trailer(content: bytes) -> bytes:
    """CRC-32 and size, as they end a gzip file of this content."""
    return zlib.crc32(content).to_bytes(4, "little") + (len(content) % 2**32).to_bytes(4, "little")


def unpack(md5: dict[str, str], folder: Path) -> None:
    """Unpacks the files of a data set that are not there or not what their packed files hold.

    torchvision looks at the names of unpacked files only.

    md5: of every packed file by its name. Raises DataError on a packed file with another.
    """
    for path in map(folder.joinpath, FILES):
        packed = packed_file(path)
        if not packed.exists():
            continue
        content = packed.read_bytes()
        if (found := hashlib.md5(content).hexdigest()) != md5[packed.name]:
            raise DataError(
                f"{packed}: is damaged (its md5 is {found}, not {md5[packed.name]}): fetch it anew, MNIST by "
                "`git checkout datasets`"
            )
        if not path.exists() or gzip_trailer(path.read_bytes()) != content[-8:]:
            with written_whole(path) as file:
                file.write(gzip.decompress(content))


def check_samples(images: Tensor, labels: Tensor, path: Path) -> None:
    """Raises DataError where these are not 28 x 28 images of the ten classes, a label for each."""
    if images.shape[1:] != (28, 28) or len(images) != len(labels) or not len(labels):
        raise DataError(
            f"{path}: holds images of shape {tuple(images.shape)} with {len(labels)} labels, "
            "not 28 x 28 images with a label each"
        )
    if int(labels.min()) < 0 or int(labels.max()) >= NUM_CLASSES:
        raise DataError(
            f"{path}: has labels from {int(labels.min())} to {int(labels.max())}, not from 0 to {NUM_CLASSES - 1}"
        )


class ClassGroup:
    """One layer's record of one group of samples per class: what the vertex features are made of.

    The fields of the record carry (classes, samples, neurons) here; weight is (m, n).
    """

    def __init__(self, record: LayerRecord, weight: Tensor) -> None:
        self.record = record
        self.weight = weight

    @cached_property
    def gradient(self) -> Tensor:
        """Mean gradient of the cross entropy with respect to each weight, (classes, m, n)."""
        return self._mean_product(self.record.loss_gradient, self.record.inputs)

    def _mean_product(self, of_target: Tensor, of_source: Tensor) -> Tensor:
        """Mean over the samples of of_target[s, r] * of_source[s, c], (classes, m, n)."""
        return of_target.transpose(1, 2) @ of_source / of_source.shape[1]

    def input_activation(self) -> Tensor:
        """E[a_c], the activation of the weight's source neuron."""
        return self.record.inputs.mean(1)[:, None]

    def output_activation(self) -> Tensor:
        """E[h_r], the activation of the weight's target neuron."""
        return self.record.outputs.mean(1)[:, :, None]

    def effect(self) -> Tensor:
        """w E[dL/dw]: the first-order fall of the loss when the weight is removed."""
        return self.weight * self.gradient

    def fisher(self) -> Tensor:
        """|w| sqrt(E[(dL/dw)^2]), the root of the diagonal Fisher information of removing the weight."""
        return self.weight.abs() * self._mean_product(self.record.loss_gradient**2, self.record.inputs**2).sqrt()

    def margin(self) -> Tensor:
        """w E[d(logit of the class - mean logit)/dw]: the first-order fall of the margin when the weight is removed."""
        return self.weight * self._mean_product(self.record.margin_gradient, self.record.inputs)

    def coactivation(self) -> Tensor:
        """|w| E[unit r is active * a_c]: the signal that the weight passes on."""
        return self.weight.abs() * self._mean_product(self.record.active, self.record.inputs)


FEATURES: dict[str, Callable[[ClassGroup], Tensor]] = {
    "input_activation": ClassGroup.input_activation,
    "output_activation": ClassGroup.output_activation,
    "weight": lambda group: group.weight[None],
    "gradient": lambda group: group.gradient,
    "effect": ClassGroup.effect,
    "fisher": ClassGroup.fisher,
    "margin": ClassGroup.margin,
    "coactivation": ClassGroup.coactivation,
}


@dataclass(frozen=True)
class GraphConfig:
    """mask_layer: an index, a list of them, or null for all layers; features: names of FEATURES.

    scope: whether the weights of all masked layers compete, or every layer gives the same share of its own
    other_classes adds to each feature (but the weight) its mean over the other classes.
    erasure adds the feature of `GraphGenerator.erasure`, which measures a class against so many rivals with this ridge.
    """

    mask_layer: int | tuple[int, ...] | None
    scope: Literal["global", "layerwise"]
    features: tuple[str, ...]
    other_classes: bool
    samples_per_class: int
    erasure: bool
    rivals: int
    ridge: float

    def __post_init__(self) -> None:
        for name in self.features:
            if name not in FEATURES:
                raise ValueError(f"features: {name!r} is not known: valid are {', '.join(FEATURES)}")
        if not self.features:
            raise ValueError(f"features: at least one is needed of {', '.join(FEATURES)}")
        if len(set(self.features)) < len(self.features):
            raise ValueError(f"features: {list(self.features)} names a feature twice")
        check_range("samples_per_class", self.samples_per_class, at_least=1)
        check_range("rivals", self.rivals, at_least=1)
        check_range("ridge", self.ridge, above=0)

    @property
    def num_features(self) -> int:
        return len(self.features) + self.other_classes * sum(name != "weight" for name in self.features) + self.erasure


class GraphGenerator:
    """Activation graphs of a classifier: what every sample does in the masked layers, recorded in one batched pass.

    Stored are a few hundred floats a sample; the vertex features of a group are formed when they are needed.
    The samples of class c are the indices c * samples_per_class to (c + 1) * samples_per_class - 1.
    """

    def __init__(self, classifier: HookedMNISTClassifier, train: Split, config: GraphConfig, seed: int) -> None:
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

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def inputs(self) -> Tensor:
        """Input activations of the first masked layer, (samples, n): no mask changes what comes before."""
        return self.records[0].inputs

    def by_class(self) -> Tensor:
        """Indices of all samples, (classes, samples_per_class)."""
        return torch.arange(len(self), device=self.labels.device).view(self.num_classes, -1)

    def draw(self, group_size: int, generator: torch.Generator) -> Tensor:
        """Indices of `group_size` random samples of every class, (classes, group_size), without repetition."""
        keys = torch.rand(self.num_classes, self.samples_per_class, generator=generator)
        order = keys.argsort(1)[:, :group_size]
        return (order + self.samples_per_class * torch.arange(self.num_classes)[:, None]).to(self.labels.device)

    @cached_property
    def rivals(self) -> Tensor:
        """The classes that are nearest to each class in the representation, without a mask, (classes, rivals)."""
        with torch.no_grad():
            features = self.classifier.features(self.inputs, self.graph.layers[0])
        count = min(self.config.rivals, self.num_classes - 1)
        return nearest_classes(features, self.labels, self.num_classes, count)

    def against_rivals(self, x: Tensor, classes: Sequence[int]) -> Tensor:
        """Of each of `classes` its own samples and then those of its rivals.

        x: (all classes, samples, ...) to (classes, (1 + rivals) * samples, ...)
        """
        own = torch.tensor(classes, device=x.device)
        return x[torch.cat([own[:, None], self.rivals[own]], 1)].flatten(1, 2)

    def explained_variance(self, features: Tensor, classes: Sequence[int]) -> Tensor:
        """R^2 of each of `classes` against its rivals, (classes): how much of it the representation carries.

        features: (classes, (1 + rivals) * samples, n), as from `against_rivals`
        """
        num_samples = features.shape[1]
        is_class = torch.arange(num_samples, device=features.device) < num_samples // (1 + self.rivals.shape[1])
        return explained_variance(features, is_class.expand(len(classes), -1), self.config.ridge)

    def erasure(self, samples: Tensor, classes: Sequence[int], mask: Mask | None = None) -> Tensor:
        """How much each weight carries a class into the representation: w dR^2/dw, the first-order fall of its R^2.

        samples: a group of every class, (all classes, group_size)
        Returns (classes, vertices), on the classifier or on a masked one.
        """
        flat, layers = samples.flatten(), self.graph.layers
        with nullcontext() if mask is None else mask.applied_to(self.classifier):
            weights = self.weights()
            with torch.enable_grad(), self.classifier.hooks(layers) as seen:
                features = self.classifier.features(self.inputs[flat], layers[0])
        with torch.enable_grad():
            chosen = self.against_rivals(features.detach().unflatten(0, samples.shape), classes).requires_grad_()
            (gradients,) = torch.autograd.grad(self.explained_variance(chosen, classes).sum(), chosen)
        positions = torch.arange(len(flat), device=flat.device).view(samples.shape)
        reached = [layer for layer in layers if layer in seen]  # all but the output layer, which comes after
        falls = torch.zeros(len(classes), self.graph.num_vertices, device=flat.device, dtype=features.dtype)
        if not reached:
            return falls
        for fall, of_class, gradient in zip(falls, self.against_rivals(positions, classes), gradients):
            upstream = torch.zeros_like(features).index_copy_(0, of_class, gradient)
            deltas = torch.autograd.grad(features, [seen[layer][1] for layer in reached], upstream, retain_graph=True)
            of_layers = dict(zip(layers, zip(self.graph.split(fall), weights)))
            for layer, delta in zip(reached, deltas):
                of_layer, weight = of_layers[layer]
                torch.mul(weight, delta[of_class].T @ seen[layer][0][of_class], out=of_layer)
        return falls

    @cached_property
    def pixel_recall(self) -> Tensor:
        """Percent of each class that a ridge regression on the pixels finds among the training samples, (classes).

        An estimate, without retraining, of what a representation tells of a class that it was never trained on.
        """
        return probe_recall(self.train.images, self.train.labels, self.num_classes, self.config.ridge)

    @torch.no_grad()
    def probe_recall(self, mask: Mask) -> Tensor:
        """The same of the representation of a masked classifier, on the recorded samples, (classes)."""
        with mask.applied_to(self.classifier):
            features = self.classifier.features(self.inputs, self.graph.layers[0])
        return probe_recall(features, self.labels, self.num_classes, self.config.ridge)

    def class_graphs(
        self, samples: Tensor, mask: Mask | None = None, erasure_weight: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """The graph of one group of samples per class, on the classifier or on a masked one.

        samples: (classes, group_size); erasure_weight: what the erasure feature, if there is one, is multiplied with
        Returns the vertex features (classes, vertices, features), each standardised over its graph before, and the mean
        cross entropy of each class (classes), nats.
        """
        own, loss = self.class_features(samples, self.config.features, mask)
        others = {name: (x.sum(0) - x) / (len(x) - 1) for name, x in own.items()}
        if not self.config.erasure:
            return self._standardised(own, others), loss
        if erasure_weight == 0:
            erasure = torch.zeros(len(loss), self.graph.num_vertices, device=loss.device, dtype=loss.dtype)
        else:
            erasure = self.erasure(samples, range(self.num_classes), mask)
        x = self._standardised(own | {"erasure": erasure}, others)
        x[..., len(own)] *= erasure_weight
        return x, loss

    def get_data(self, index: int, max_edges: int = 50_000_000) -> Data:
        """The graph of one sample (n = 1) for PyG: x (vertices, features), edge_index (2, edges), y (1).

        Without the erasure feature, which a class has and a sample has not.

        max_edges: an edge takes 16 bytes in the list, and about 100 while the list is built
        Raises IndexError where there is no such sample, ValueError on a graph with more edges.
        """
        # Imported here, since it takes longer than the rest and only this export needs it.
        from torch_geometric.data import Data

        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} is not there: valid are 0 to {len(self) - 1}")
        if (edges := self.graph.num_edges) > max_edges:
            raise ValueError(
                f"max_edges is {max_edges:,}, and the graph has {edges:,} edges: a list of {16 * edges / 1e9:.1f} GB, "
                f"and about {100 * edges / 1e9:.0f} GB while it is built"
            )
        label = self.labels[index : index + 1]
        everything = self.by_class()
        own, _ = self.class_features(everything.view(-1)[index : index + 1, None], self.config.features)
        classes, _ = self.class_features(everything, self.config.features)
        others = {name: (x.sum(0) - x)[label] / (len(x) - 1) for name, x in classes.items()}
        return Data(x=self._standardised(own, others)[0], edge_index=self.graph.edge_index().to(label.device), y=label)

    def recorded(self) -> dict[str, Any]:
        """What was recorded, as it is saved: `layers`, `labels` (samples), and `records`, a dictionary for each layer.

        Its tensors are (samples, neurons), as in `LayerRecord`.
        """
        names = ("inputs", "outputs", "loss_gradient", "margin_gradient")
        records = [{name: getattr(record, name) for name in names} for record in self.records]
        return {"layers": list(self.graph.layers), "labels": self.labels, "records": records}

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

    def weights(self) -> list[Tensor]:
        """The weight matrices of the masked layers as they are now, (m, n) each."""
        return [self.classifier.layers[index].weight.detach() for index in self.graph.layers]

    def _standardised(self, own: dict[str, Tensor], others: dict[str, Tensor]) -> Tensor:
        features = list(own.values())
        if self.config.other_classes:
            features += [x for name, x in others.items() if name != "weight"]
        x = torch.stack(features)  # (features, groups, vertices)
        # torch.std_mean takes ten times as long.
        x -= x.mean(-1, keepdim=True)
        deviation = torch.linalg.vector_norm(x, dim=-1, keepdim=True) / max(1, x.shape[-1] - 1) ** 0.5
        x /= deviation.clamp_min(1e-12)
        return x.permute(1, 2, 0).contiguous()  # (groups, vertices, features)
