import functools
import shutil
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from faults import draw_nothing
from running import PROJECT, write_few
from torch import Tensor, nn

from mimu.data import FEATURES, GraphConfig, GraphGenerator, Split, seeded
from mimu.eval import EvalConfig, Request
from mimu.masking.rankings import MaskingConfig, TrainedGCN
from mimu.model import HookedMNISTClassifier, MaskingGCN
from mimu.networks.masks import LayerMask, Mask
from mimu.trainer import Trainer, TrainerConfig, learn

HIDDEN, IN_FEATURES, NUM_CLASSES = (6, 5), 7, 3
torch.set_num_threads(1)  # the tensors of tests are small: threads only wait for one another


def random_split(
    samples_per_class: int = 20, seed: int = 0, dtype: torch.dtype = torch.float32, num_classes: int = NUM_CLASSES
) -> Split:
    """Samples of a few classes that a small classifier can tell apart."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_classes).repeat_interleave(samples_per_class)
    centres = 2 * torch.randn(num_classes, IN_FEATURES, generator=torch.Generator().manual_seed(1), dtype=dtype)
    images = centres[labels] + torch.randn(len(labels), IN_FEATURES, generator=generator, dtype=dtype)
    order = torch.randperm(len(labels), generator=generator)
    return Split(images[order], labels[order])


def random_classifier(seed: int = 0, dtype: torch.dtype = torch.float32, bias: bool = False) -> HookedMNISTClassifier:
    torch.manual_seed(seed)
    return HookedMNISTClassifier(HIDDEN, IN_FEATURES, NUM_CLASSES, bias).to(dtype)


def trainer_config(hidden_sizes: tuple[int, ...], epochs: int, batch_size: int = 16, **changes) -> TrainerConfig:
    settings = {"architecture": "mlp", "channels": (4, 6), "blocks": 1, "batch_norm": False, "bias": False}
    settings |= {"hidden_sizes": hidden_sizes, "epochs": epochs, "batch_size": batch_size, "learning_rate": 0.01}
    return TrainerConfig(**settings | changes)


def graph_config(mask_layer: int | Sequence[int] | None = -2, **changes) -> GraphConfig:
    settings = {"scope": "global", "features": tuple(FEATURES), "other_classes": True, "samples_per_class": 15}
    return GraphConfig(mask_layer=mask_layer, **settings | changes)


def graph_generator(mask_layer=-2, dtype=torch.float32, bias=False, **changes) -> GraphGenerator:
    classifier, split = random_classifier(dtype=dtype, bias=bias), random_split(dtype=dtype)
    return GraphGenerator(classifier, split, graph_config(mask_layer, **changes), 0)


def masking_config(**changes) -> MaskingConfig:
    settings = {"step": 4, "snapshot_every": 1, "momentum": 0.0, "group_size": 8, "retain_weight": 5.0}
    settings |= {"penalty_growth": 1.0, "target": 1.25, "max_kappa": 20, "patience": 0}
    return MaskingConfig(**settings | changes)


def untrained_gcn(num_features: int, rounds: int = 2) -> MaskingGCN:
    torch.manual_seed(5)
    return MaskingGCN(num_features, 8, rounds)


@functools.cache
def trained_problem() -> tuple[Split, Trainer, HookedMNISTClassifier]:
    train, trainer = random_split(40), Trainer(trainer_config((6, 5), 10), 0)
    return train, trainer, trainer.train(train, NUM_CLASSES)


def small_request(asked: int | str | None = 9, mask_layer=-2, **changes) -> Request:
    """To forget class 1 of three, with a masking GCN before its training; changes: of `eval`."""
    train, trainer, classifier = deepcopy(trained_problem())
    described = graph_config(mask_layer, features=("weight", "taylor"), samples_per_class=20)
    graphs = GraphGenerator(classifier, train, described, 0)
    settings = asdict(masking_config(momentum=0.7, group_size=10, target=0.1, max_kappa=29))
    hyperparameters = {"sft": {"epochs": 1, "batch_size": 8, "learning_rate": 0.01}}
    settings |= {"methods": ("mimu",), "visualize": False, "hyperparameters": hyperparameters}
    config, gcn = EvalConfig(**settings | changes), untrained_gcn(described.num_features)
    return Request(config, classifier, trainer, train, graphs, gcn, forget_class=1, top_k=8, seed=0, asked=asked)


@pytest.fixture
def trained_gcn() -> TrainedGCN:
    described = graph_config()
    return TrainedGCN(untrained_gcn(described.num_features), described, masking_config())


def mask_of(keep: dict[int, Tensor], forgets: tuple[int, ...] = ()) -> Mask:
    """A mask of some layers that takes no direction."""
    return Mask({layer: LayerMask.of(part) for layer, part in keep.items()}, forgets)


@pytest.fixture
def split() -> Split:
    return random_split()


@pytest.fixture
def classifier() -> HookedMNISTClassifier:
    return random_classifier()


def scores(model: nn.Module, split: Split, forget_class: int) -> tuple[float, float]:
    """Percent of the samples of a class, and of all others, that a model classifies correctly."""
    correct, is_forget = model(split.images).argmax(1) == split.labels, split.labels == forget_class
    return tuple(100 * correct[chosen].float().mean().item() for chosen in (is_forget, ~is_forget))


def trained(model: nn.Module, train: Split) -> nn.Module:
    return learn(model, train, 20, 120, torch.optim.Adam(model.parameters(), 0.03), seeded("own"))


def copy_to(folder: Path, *patterns: str) -> Path:
    for pattern in patterns:
        for path in PROJECT.glob(pattern):
            target = folder / path.relative_to(PROJECT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    return folder


PACKAGES = ("images", "networks", "runs", "masking", "unlearning", "audits", "methods", "tables", "configs")
TRACKED = ("*.py", "*.sh", *(f"{name}/*.py" for name in PACKAGES), "configs/*.yaml", "checkpoints/pretrained/*.pt",
           "README.md", "pyproject.toml")  # fmt: skip


@pytest.fixture
def clone(tmp_path) -> Path:
    """The tracked files of the project, as a clone has them."""
    return copy_to(tmp_path / "mimu", *TRACKED, "datasets/MNIST/raw/*.gz")


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder with a few samples of the data set only, for runs in this process that draw nothing and take no time."""
    folder = tmp_path / "mimu"
    write_few(folder)
    draw_nothing(monkeypatch)
    return folder


@pytest.fixture
def copy(here) -> Path:
    return copy_to(here, *TRACKED)
