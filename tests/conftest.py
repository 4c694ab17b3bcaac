import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from runs import PROJECT

from data import FEATURES, GraphConfig, GraphGenerator, Split
from model import HookedMNISTClassifier

HIDDEN, IN_FEATURES, NUM_CLASSES = (6, 5), 7, 3


def random_split(samples_per_class: int = 20, seed: int = 0, dtype: torch.dtype = torch.float32) -> Split:
    """Samples of NUM_CLASSES classes that a small classifier can tell apart."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(NUM_CLASSES).repeat_interleave(samples_per_class)
    centres = 2 * torch.randn(NUM_CLASSES, IN_FEATURES, generator=torch.Generator().manual_seed(1), dtype=dtype)
    images = centres[labels] + torch.randn(len(labels), IN_FEATURES, generator=generator, dtype=dtype)
    order = torch.randperm(len(labels), generator=generator)
    return Split(images[order], labels[order])


def random_classifier(seed: int = 0, dtype: torch.dtype = torch.float32, bias: bool = False) -> HookedMNISTClassifier:
    torch.manual_seed(seed)
    return HookedMNISTClassifier(HIDDEN, IN_FEATURES, NUM_CLASSES, bias).to(dtype)


def graph_config(mask_layer=-2, **changes) -> GraphConfig:
    settings = {
        "scope": "global", "features": tuple(FEATURES), "other_classes": True, "samples_per_class": 15,
        "erasure": False, "rivals": 1, "ridge": 0.01,
    }  # fmt: skip
    return GraphConfig(mask_layer=mask_layer, **settings | changes)


def graph_generator(mask_layer=-2, dtype: torch.dtype = torch.float32, bias: bool = False, **changes) -> GraphGenerator:
    classifier = random_classifier(dtype=dtype, bias=bias)
    return GraphGenerator(classifier, random_split(dtype=dtype), graph_config(mask_layer, **changes), 0)


def as_matrix(features: Tensor) -> np.ndarray:
    """Features in double precision, standardised as the closed forms have it."""
    x = features.detach().double().numpy()
    return (x - x.mean(0)) / (x.std(0) + 1e-3)


def r_squared(features: Tensor, is_class: Tensor, ridge: float) -> float:
    """R^2 of the ridge regression to the indicator of a class, by NumPy: features (samples, n), is_class (samples)."""
    h, t = as_matrix(features), is_class.double().numpy()
    b = h.T @ (t - t.mean()) / len(t)
    return b @ np.linalg.solve(h.T @ h / len(t) + ridge * np.eye(len(b)), b) / t.var()


def ridge_recalls(features: Tensor, labels: Tensor, ridge: float) -> list[float]:
    """Percent of each class that a ridge regression finds, by NumPy, one class at a time."""
    h, y = as_matrix(features), labels.numpy()
    correlation = h.T @ h / len(h) + ridge * np.eye(h.shape[1])
    scores = []
    for label in range(int(y.max()) + 1):
        t = (y == label).astype(float)
        scores.append(h @ np.linalg.solve(correlation, h.T @ (t - t.mean()) / len(t)) + t.mean())
    found = np.argmax(scores, 0)
    return [100 * float((found[y == label] == label).mean()) for label in range(len(scores))]


def representation(classifier: HookedMNISTClassifier, images: Tensor) -> Tensor:
    """The input of the last layer, by the weights alone."""
    for layer in classifier.layers[:-1]:
        images = (images @ layer.weight.T + (0 if layer.bias is None else layer.bias)).relu()
    return images.detach()


def carried(graphs: GraphGenerator, classifier: HookedMNISTClassifier, samples: Tensor, label: int) -> float:
    """R^2 of a class against its rivals in the representation of a classifier, on groups of samples of every class."""
    rows = torch.cat([samples[each] for each in (label, *graphs.rivals[label].tolist())])
    features = representation(classifier, graphs.samples.images[rows])
    return r_squared(features, graphs.labels[rows] == label, graphs.config.ridge)


@pytest.fixture
def split() -> Split:
    return random_split()


@pytest.fixture
def classifier() -> HookedMNISTClassifier:
    return random_classifier()


@pytest.fixture
def graphs() -> GraphGenerator:
    return graph_generator()


def copy_to(folder: Path, *patterns: str) -> Path:
    for pattern in patterns:
        for path in PROJECT.glob(pattern):
            target = folder / path.relative_to(PROJECT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    return folder


TRACKED = ("*.py", "*.sh", "configs/*.yaml", "checkpoints/pretrained/*.pt", "README.md")


@pytest.fixture
def clone(tmp_path) -> Path:
    """The tracked files of the project, as a clone has them."""
    return copy_to(tmp_path, *TRACKED, "datasets/MNIST/raw/*.gz")


@pytest.fixture
def copy(tmp_path) -> Path:
    """The same with the unpacked data set of the project: not to be cleaned."""
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "MNIST").symlink_to(PROJECT / "datasets" / "MNIST")
    return copy_to(tmp_path, *TRACKED)


@pytest.fixture
def here(tmp_path) -> Path:
    """A folder with the data set only, for runs in this process."""
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "MNIST").symlink_to(PROJECT / "datasets" / "MNIST")
    return tmp_path
