"""Data sets on disk and in memory, their splits, and the activation graphs of a classifier."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from glob import glob
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from experiment.files import ROOT
from mimu.errors import InputError, one_line
from mimu.files import digest, naming
from mimu.saliency import ActivationGraphs
from mimu.samples import Split
from mimu.seeds import seeded

DATASET_ROOT = ROOT / "datasets"
# What torchvision downloads, and the names of the classes.
DATASETS = {
    "MNIST": tuple("0123456789"),
    "FashionMNIST": ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"),
    "KMNIST": ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
    "CIFAR10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    "SVHN": tuple("0123456789"),
}
if TYPE_CHECKING:
    from torch_geometric.data import Data

FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


class DataError(InputError):
    """A data set that is missing or cannot be read, or results that are missing."""


class DataSet(NamedTuple):
    """A data set on the disk, of which no more is read yet than what its images and classes are.

    size: (height, width) of a grey image, (3, height, width) of one in colour; class_names: by label
    read: the training split, or with False the test split: images (samples, *size), uint8, and labels (samples)
    """

    size: tuple[int, ...]
    class_names: tuple[str, ...]
    read: Callable[[bool], tuple[Tensor, Tensor]]


def data_set(name: str, root: Path = DATASET_ROOT) -> DataSet:
    """A data set by its name, one of DATASETS or a folder under `root`. Raises DataError where it cannot be one."""
    folder = root / name
    if name == "SVHN" and not find_spec("scipy"):
        raise DataError(f"dataset SVHN in {folder}: its files are read by scipy, install it (uv pip install scipy)")
    if name in ("CIFAR10", "SVHN"):
        return DataSet((3, 32, 32), DATASETS[name], partial(read_in_colour, folder, name))
    if name in DATASETS:
        return DataSet((28, 28), DATASETS[name], partial(read_idx, folder / "raw", name))
    there = {path.name for path in root.glob("*") if path.is_dir()}.difference(DATASETS, ["Graphs"])
    if name not in there:
        valid = ", ".join([*DATASETS, *sorted(there)])
        raise DataError(f"dataset must be {valid}, or another folder in {root}, not {name!r}")
    with reading(name, folder):
        files = [*folder.glob("raw/*-ubyte*"), *folder.glob("*-ubyte*")]
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
    except (RuntimeError, OSError, ValueError, TypeError, LookupError, AssertionError) as error:
        raise DataError(f"dataset {name} in {folder}: cannot be used ({one_line(error)})") from None


def idx_files(folder: Path) -> DataSet:
    """A data set in the format of MNIST, its files packed by gzip or not."""
    _, height, width = idx(folder / FILES[0]).shape
    class_names = tuple(map(str, range(1 + int(idx(folder / FILES[1]).max()))))
    return DataSet((height, width), class_names, partial(read_idx, folder, ""))


def read_idx(folder: Path, name: str, is_train: bool) -> tuple[Tensor, Tensor]:
    """Reads a split in the format of MNIST; downloads what of DATASETS is not there."""
    paths = [folder / file for file in FILES]
    if name in DATASETS and not all(as_read(path).exists() for path in paths):
        from torchvision import datasets  # takes seconds, which a bad setting need not wait for

        getattr(datasets, name)(folder.parents[1], download=True)
    images, labels = paths[:2] if is_train else paths[2:]
    return idx(images), idx(labels).long()


def idx(path: Path) -> Tensor:
    """The numbers (uint8) in a file of MNIST's format, which may be packed by gzip."""
    source = as_read(path)
    with naming(source, "read"):
        content = source.read_bytes()
    try:
        content = content if source == path else gzip.decompress(content)
        start = 4 + 4 * content[3]  # after three bytes, the number of dimensions, and the size of each in four bytes
        sizes = np.frombuffer(content[4:start], ">i4").tolist()
        return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start).view(sizes)
    except Exception as error:  # any byte may be wrong, and what that raises is anything
        raise ValueError(f"{source.name} is damaged: {one_line(error)}") from None


def read_in_colour(folder: Path, name: str, is_train: bool) -> tuple[Tensor, Tensor]:
    """Reads a split of CIFAR10 or SVHN, which it downloads where a file of it is missing or damaged."""
    from torchvision import datasets

    if name == "CIFAR10":
        split = datasets.CIFAR10(folder, is_train, download=True)
        return torch.from_numpy(split.data).permute(0, 3, 1, 2), torch.tensor(split.targets)
    split = datasets.SVHN(folder, "train" if is_train else "test", download=True)
    return torch.from_numpy(split.data), torch.from_numpy(split.labels)


def image_folders(folder: Path) -> DataSet:
    """A data set of images in train/<class>/ and test/<class>/, all of one size, and all grey or all in colour."""
    if not ((folder / "train").is_dir() and (folder / "test").is_dir()):
        raise ValueError("it must hold images in train/<class>/ and test/<class>/, or the four files of MNIST's format")
    from torchvision.datasets import ImageFolder

    train = ImageFolder(folder / "train", loader=pixels)
    test = ImageFolder(folder / "test", loader=pixels)
    if odd := set(train.classes) ^ set(test.classes):
        raise ValueError(f"train/ and test/ must have the same classes, not {', '.join(sorted(odd))} in one alone")
    size = train[0][0].shape

    def stacked(part: ImageFolder) -> tuple[Tensor, Tensor]:
        images = []
        for path, _ in tqdm(part.samples, "images", delay=1, leave=False, disable=None):
            images.append(pixels(path))
            if images[-1].shape != size:
                raise ValueError(f"{path} is of {images[-1].shape}, but {train.samples[0][0]} is of {size}")
        # The last samples may be held out: they must not be of one class.
        order = torch.randperm(len(images), generator=seeded("folders", part is train))
        return torch.from_numpy(np.stack(images))[order], torch.tensor(part.targets)[order]

    return DataSet(size, tuple(train.classes), lambda is_train: stacked(train if is_train else test))


def pixels(path: str) -> np.ndarray:
    """An image (height, width), or in colour (3, height, width), uint8. Raises ValueError where it is none of these."""
    try:
        with naming(Path(path), "read"), Image.open(path) as image:
            if image.mode not in ("L", "RGB"):
                raise ValueError(f"its mode is {image.mode}")
            return np.asarray(image) if image.mode == "L" else np.moveaxis(np.asarray(image), 2, 0).copy()
    except Exception as error:  # any byte may be wrong, and what that raises is anything
        raise ValueError(f"{path} must be an image, grey or RGB of 8 bits: {error}") from None


def as_read(path: Path) -> Path:
    """The file that is read in the place of another: the one packed by gzip beside it, if there is one, else itself."""
    packed = path.with_name(f"{path.name}.gz")
    return packed if packed.exists() else path


def checksum(name: str, root: Path = DATASET_ROOT) -> str:
    """A digest of every file of a data set: what says which data set it is. Empty where none is there."""
    folder, hashes = root / name, {}
    for path in glob("**", root_dir=folder, recursive=True):
        is_read = (folder / path).is_file() and as_read(folder / path) == folder / path
        if is_read and not path.endswith(".tar.gz"):  # which is unpacked beside it, or yet to be
            hashes[path] = hashlib.sha256((folder / path).read_bytes()).hexdigest()
    return digest(hashes) if hashes else ""


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
    return ImageData(splits[0], splits[1], source.class_names)


class GraphGenerator(ActivationGraphs):
    """Activation graphs of a classifier, with the export of single samples to PyG."""

    def get_data(self, index: int, max_edges: int = 50_000_000) -> Data:
        """The graph of one sample for PyG: x (vertices, features), edge_index (2, edges), y (1).

        While the list of edges is built, an edge takes about 100 bytes. Raises IndexError where there is no such
        sample, ValueError on more than `max_edges`.
        """
        # Imported here, since it takes longer than the rest and only this export needs it.
        from torch_geometric.data import Data

        if (edges := self.graph.num_edges) > max_edges:
            raise ValueError(f"max_edges must be at least {edges:,} ({16 * edges / 1e9:.1f} GB), not {max_edges:,}")
        label, names = self.labels[[index]], self.config.features
        own = self.snapshot(torch.tensor([[index]], device=label.device), names)
        classes = self.snapshot(self.by_class(), names)
        x = own.class_graph(self.class_index_of(int(label)), classes)[0]
        return Data(x=x, edge_index=self.graph.edge_index().to(label.device), y=label)
