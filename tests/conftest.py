import shutil
import sys
from pathlib import Path

import pytest
import torch

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


def graph_generator(mask_layer=-2, dtype: torch.dtype = torch.float32, bias: bool = False, **changes) -> GraphGenerator:
    settings = {"features": tuple(FEATURES), "other_classes": True, "samples_per_class": 15} | changes
    classifier = random_classifier(dtype=dtype, bias=bias)
    return GraphGenerator(classifier, random_split(dtype=dtype), GraphConfig(mask_layer, **settings), 0)


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
