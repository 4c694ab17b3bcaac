"""Data sets on disk and in memory, their splits, and the activation graphs of a classifier."""

import gzip
import hashlib
from collections.abc import Callable
from functools import partial
from glob import glob
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from experiment.files import ROOT
from mimu.errors import InputError, in_one_line
from mimu.files import digest
from mimu.saliency import ActivationGraphs
from mimu.samples import Split
from mimu.seeds import seeded

DATASET_ROOT = ROOT / "datasets"
# The data sets that torchvision downloads, and the names of their classes.
DATASETS = {
    "MNIST": tuple("0123456789"),
    "FashionMNIST": ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"),
    "KMNIST": ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
    "CIFAR10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
}
FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


class DataError(InputError):
    """A data set that is missing or cannot be read, or results that are missing."""


class DataSet(NamedTuple):
    """A data set on disk. Its images are read only by `read`.

    size: of an image, (height, width) in grey or (3, height, width) in colour
    class_names: the name of each class, by label
    read: returns the training split, for False the test split: images (samples, *size) uint8 and labels (samples)
    """

    size: tuple[int, ...]
    class_names: tuple[str, ...]
    read: Callable[[bool], tuple[Tensor, Tensor]]


def data_set(name: str, root: Path = DATASET_ROOT) -> DataSet:
    """Returns the data set of a name: one of DATASETS, or a folder under `root`. Raises DataError if it is neither."""
    folder = root / name
    if name in DATASETS:
        size = (3, 32, 32) if name == "CIFAR10" else (28, 28)
        return DataSet(size, DATASETS[name], partial(read_torchvision, folder, name))
    own_names = {path.name for path in root.glob("*") if path.is_dir()}.difference(DATASETS, ["Graphs"])
    if name not in own_names:
        valid = ", ".join([*DATASETS, *sorted(own_names)])
        raise DataError(f"dataset must be {valid}, or another folder in {root}, not {name!r}")
    with in_one_line(DataError, f"dataset {name} in {folder}: cannot be used"):
        files = [*folder.glob("raw/*-ubyte*"), *folder.glob("*-ubyte*")]
        own = idx_files(files[0].parent) if files else image_folders(folder)
        names = own.class_names
        if len(names) < 2 or not "".join(names).isprintable() or set("$|") & set("".join(names)):
            raise ValueError(f"it must have two classes at least, named without $, | and line breaks, not {names}")
    return own


def read_torchvision(folder: Path, name: str, is_train: bool) -> tuple[Tensor, Tensor]:
    """Reads a split of one of DATASETS. Downloads the data set if files are missing, or damaged in CIFAR10."""
    if all(as_read(folder / "raw" / file).exists() for file in FILES):
        return read_idx(folder / "raw", is_train)
    from torchvision import datasets  # takes seconds, which a bad setting need not wait for

    if name == "CIFAR10":
        split = datasets.CIFAR10(folder, is_train, download=True)
        return torch.from_numpy(split.data).permute(0, 3, 1, 2), torch.tensor(split.targets)
    getattr(datasets, name)(folder.parent, download=True)
    return read_idx(folder / "raw", is_train)


def idx_files(folder: Path) -> DataSet:
    """Returns the data set in a folder that holds files in MNIST's format, compressed by gzip or not."""
    _, height, width = idx(folder / FILES[0]).shape
    class_names = tuple(map(str, range(1 + int(idx(folder / FILES[1]).max()))))
    return DataSet((height, width), class_names, partial(read_idx, folder))


def read_idx(folder: Path, is_train: bool) -> tuple[Tensor, Tensor]:
    images, labels = FILES[:2] if is_train else FILES[2:]
    return idx(folder / images), idx(folder / labels).long()


def idx(path: Path) -> Tensor:
    """Reads the numbers (uint8) in a file of MNIST's format, which may be compressed by gzip."""
    source = as_read(path)
    with in_one_line(ValueError, f"{source.name} cannot be read"):  # damaged bytes can raise any error
        content = source.read_bytes() if source == path else gzip.decompress(source.read_bytes())
        start = 4 + 4 * content[3]  # byte 3 is the number of dimensions; the size of each follows, in four bytes
        sizes = np.frombuffer(content[4:start], ">i4").tolist()
        return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start).view(sizes)


def as_read(path: Path) -> Path:
    """Returns the file that is read for a path: its copy compressed by gzip, if there is one beside it, else itself."""
    compressed = path.with_name(f"{path.name}.gz")
    return compressed if compressed.exists() else path


def image_folders(folder: Path) -> DataSet:
    """Returns the data set of the images in train/<class>/ and test/<class>/, all of one size and all grey or RGB."""
    if not ((folder / "train").is_dir() and (folder / "test").is_dir()):
        raise ValueError("it must hold images in train/<class>/ and test/<class>/, or the four files of MNIST's format")
    from torchvision.datasets import ImageFolder

    train, test = (ImageFolder(folder / part, loader=pixels) for part in ("train", "test"))
    if odd := set(train.classes) ^ set(test.classes):
        raise ValueError(f"train/ and test/ must have the same classes, not {', '.join(sorted(odd))} in one alone")
    size = train[0][0].shape

    def read(is_train: bool) -> tuple[Tensor, Tensor]:
        part, images = train if is_train else test, []
        for path, _ in tqdm(part.samples, "images", delay=1, leave=False, disable=None):
            images.append(pixels(path))
            if images[-1].shape != size:
                raise ValueError(f"{path} is of {images[-1].shape}, but {train.samples[0][0]} is of {size}")
        # Shuffled: the last samples may be held out, and must not be of one class.
        order = torch.randperm(len(images), generator=seeded("folders", is_train))
        return torch.from_numpy(np.stack(images))[order], torch.tensor(part.targets)[order]

    return DataSet(size, tuple(train.classes), read)


def pixels(path: str) -> np.ndarray:
    """Reads an image: (height, width) in grey or (3, height, width) in colour, uint8. Raises ValueError otherwise."""
    with in_one_line(ValueError, f"{path} must be an image, grey or RGB of 8 bits"), Image.open(path) as image:
        if image.mode not in ("L", "RGB"):
            raise ValueError(f"its mode is {image.mode}")
        return np.asarray(image) if image.mode == "L" else np.moveaxis(np.asarray(image), 2, 0).copy()


def checksum(name: str, root: Path = DATASET_ROOT) -> str:
    """Returns a digest of all files that are read of a data set; it is empty if there are none."""
    folder, hashes = root / name, {}
    for path in glob("**", root_dir=folder, recursive=True):
        is_read = (folder / path).is_file() and as_read(folder / path) == folder / path
        if is_read and not path.endswith(".tar.gz"):  # torchvision unpacks it beside itself
            hashes[path] = hashlib.sha256((folder / path).read_bytes()).hexdigest()
    return digest(hashes) if hashes else ""


class ImageData(NamedTuple):
    """The training split, which is all that a `Request` gives to a method, and the test split, which scores methods."""

    train: Split
    test: Split
    class_names: tuple[str, ...] = ()  # by label


def load_image_data(
    name: str = "MNIST", root: Path = DATASET_ROOT, device: torch.device | str = "cpu", held_out: int = 0
) -> ImageData:
    """Reads a data set into memory, standardised by its training split.

    Args:
        held_out: the last so many training samples replace the test split, for choices that must not see it

    Raises:
        DataError: files are missing and cannot be downloaded, or are damaged, or a split lacks a class
    """
    source = data_set(name, root)
    num_classes, splits = len(source.class_names), []
    with in_one_line(DataError, f"dataset {name} in {root / name}: cannot be used"):
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
    for split in splits:
        split.images.sub_(mean).div_(deviation)  # in place, because a copy would double the memory
    return ImageData(splits[0], splits[1], source.class_names)


class GraphGenerator(ActivationGraphs):
    """Activation graphs of a classifier, with the export of single samples to PyG."""

    def get_data(self, index: int, max_edges: int = 50_000_000) -> Any:
        """Returns the graph of one sample as PyG's `Data`: x (vertices, features), edge_index (2, edges), y (1).

        Building the edge list takes about 100 bytes of memory per edge.

        Raises:
            IndexError: there is no such sample
            ValueError: the graph has more than `max_edges` edges
        """
        from torch_geometric.data import Data  # takes seconds, which nothing but this export needs

        if (edges := self.graph.num_edges) > max_edges:
            raise ValueError(f"max_edges must be at least {edges:,} ({16 * edges / 1e9:.1f} GB), not {max_edges:,}")
        label, samples = self.labels[[index]], self.by_class.clone()
        class_index = self.classes.index(int(label))
        samples[class_index] = index  # the sample takes the place of its class
        x = self.snapshot(samples, class_index, features=self.config.features, forgets=False).class_graph()[0]
        return Data(x=x, edge_index=self.graph.edge_index().to(label.device), y=label)
