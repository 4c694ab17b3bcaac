import functools
import shutil
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from running import PROJECT, draw_nothing, write_few
from torch import Tensor, nn
from torch.autograd import grad

from data import GraphGenerator
from eval import EvalConfig, Request
from mimu.graph import MaskingGCN
from mimu.masks import LayerMask, Mask
from mimu.pretrained import TrainedGCN
from mimu.pruning import PruningConfig
from mimu.saliency import FEATURES, GraphConfig, Snapshot
from mimu.saliency import FORGETTING_TEMPERATURE as T
from mimu.samples import Split
from mimu.seeds import seeded
from mimu.training import learn
from model import HookedMNISTClassifier
from trainer import Trainer, TrainerConfig

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


RECIPE = {"architecture": "mlp", "channels": (4, 6), "blocks": 1, "bias": False, "patch": 7,
          "heads": 2, "learning_rate": 0.01, "momentum": None, "weight_decay": 0.0, "warm_up": 0.0,
          "label_smoothing": 0.0, "shift": 0, "flip": False, "bfloat16": False}  # fmt: skip
GRAPHS = {"scope": "global", "features": tuple(FEATURES), "other_classes": True, "samples_per_class": 15}
PRUNING = {"step": 4, "snapshot_every": 1, "momentum": 0.0, "group_size": 8, "retain_weight": 5.0,
           "penalty_growth": 1.0, "target": 1.25, "max_kappa": 20, "tolerance": None}  # fmt: skip


def trainer_config(hidden_sizes: tuple[int, ...], epochs: int, batch_size: int = 16, **changes) -> TrainerConfig:
    return TrainerConfig(hidden_sizes=hidden_sizes, epochs=epochs, batch_size=batch_size, **RECIPE | changes)


def graph_config(mask_layer: int | Sequence[int] | None = -2, **changes) -> GraphConfig:
    return GraphConfig(mask_layer=mask_layer, **GRAPHS | changes)


def graph_generator(mask_layer=-2, dtype=torch.float32, bias=False, **changes) -> GraphGenerator:
    classifier, split = random_classifier(dtype=dtype, bias=bias), random_split(dtype=dtype)
    return GraphGenerator(classifier, split, graph_config(mask_layer, **changes), 0)


def pruning_config(**changes) -> PruningConfig:
    return PruningConfig(**PRUNING | changes)


def untrained_gcn(num_features: int, rounds: int = 2) -> MaskingGCN:
    torch.manual_seed(5)
    return MaskingGCN(num_features, 8, rounds)


@functools.cache
def trained_problem() -> tuple[Split, Trainer, HookedMNISTClassifier]:
    train, trainer = random_split(40), Trainer(trainer_config((6, 5), 10), 0)
    return train, trainer, trainer.train(train, NUM_CLASSES)


def small_request(requested_kappa: int | str | None = 9, mask_layer=-2, **changes) -> Request:
    """To forget class 1 of three, with a masking GCN before its training; changes: of `eval`."""
    train, trainer, classifier = deepcopy(trained_problem())
    described = graph_config(mask_layer, features=("weight", "taylor"), samples_per_class=20)
    graphs = GraphGenerator(classifier, train, described, 0)
    settings = PRUNING | {"momentum": 0.7, "group_size": 10, "target": 0.1, "max_kappa": 29, "methods": ("mimu",)}
    settings |= {"hyperparameters": {"sft": {"epochs": 1, "batch_size": 8, "learning_rate": 0.01}}, "visualize": False}
    gcn, about = untrained_gcn(described.num_features), {"forget_class": 1, "top_k": 8, "seed": 0}
    config = EvalConfig(**settings | changes)
    return Request(config, classifier, trainer, train, graphs, gcn, requested_kappa=requested_kappa, **about)


@pytest.fixture
def trained_gcn() -> TrainedGCN:
    described = graph_config()
    return TrainedGCN(untrained_gcn(described.num_features), described, pruning_config())


def mask_of(keep: dict[str, Tensor], forgets: tuple[int, ...] = ()) -> Mask:
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


def log_odds(model: nn.Module, x: Tensor, label: int, among: list[int]) -> Tensor:
    p = model(x[None])[0, among].softmax(0)[among.index(label)]
    return (p / (1 - p)).log()


class Group:
    """Samples of one class on a masked classifier whose modules stand in a row, convolutions 3 x 3 in a border of 1."""

    def __init__(self, graphs: GraphGenerator, zeroed: Tensor, samples: Tensor, among: list[int]) -> None:
        self.masked = deepcopy(graphs.classifier)
        graphs.graph.zeroing(zeroed).apply(self.masked, permanent=True)
        names = [self.masked.names[layer].removesuffix(".weight") for layer in graphs.graph.layers]
        self.layers = [self.masked.network.get_submodule(name) for name in names]
        self.images, label = graphs.samples.images[samples], int(graphs.labels[samples[0]])
        models = (self.masked, graphs.classifier)
        self.log_odds, kept = (torch.stack([log_odds(model, x, label, among) for x in self.images]) for model in models)
        self.p, self.t = self.log_odds.sigmoid(), kept.sigmoid().detach()

    def gradients(self, values: Tensor) -> Tensor:
        """The gradients by the weights of all masked layers, (samples, vertices)."""
        weights = [layer.weight for layer in self.layers]
        parts = zip(*[grad(value, weights, retain_graph=True) for value in values])
        return torch.cat([torch.stack(part).flatten(1) for part in parts], 1)

    def activations(self, layer: nn.Module) -> list[Tensor]:
        """The mean input, output and input where the output is active, of the neurons at the ends of every weight."""
        network = list(self.masked.network)
        begin = network.index(layer)
        relus = [index for index in range(begin, len(network)) if isinstance(network[index], nn.ReLU)]
        a, h = (self.masked.network[:end](self.images) for end in (begin, (relus or [begin])[0] + 1))
        if isinstance(layer, nn.Conv2d):
            a = F.pad(a, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1).flatten(4).movedim(-1, 2).flatten(1, 2)
        a, h = (each.mT if each.ndim == 3 and isinstance(layer, nn.Linear) else each for each in (a, h))
        a, h = (each.reshape(*each.shape[:2], -1).detach() for each in (a, h))  # (samples, n, places)
        a, h = (each.unflatten(1, (getattr(layer, "groups", 1), -1)) for each in (a, h))
        both = ((h > 0 if relus else torch.ones_like(h))[:, :, :, None] * a[:, :, None]).mean((0, 4))
        ends = a.mean((0, 3))[:, None].expand_as(both), h.mean((0, 3))[..., None].expand_as(both), both
        return [each.flatten() for each in ends]

    def features(self) -> dict[str, Tensor]:
        forgetting = T * F.softplus(self.log_odds / T)
        retention = -self.t * self.p.log() - (1 - self.t) * (1 - self.p).log()
        losses = [self.gradients(each).mean(0) for each in (-self.p.log(), forgetting, retention)]
        curvature = ((self.p * (1 - self.p))[:, None] * self.gradients(self.log_odds) ** 2).mean(0).sqrt().detach()
        w = torch.cat([layer.weight.detach().flatten() for layer in self.layers])
        a, h, both = map(torch.cat, zip(*map(self.activations, self.layers)))
        of_weights = a, h, w, losses[0], *(w * loss for loss in losses), w.abs() * curvature, w.abs() * both
        return dict(zip(FEATURES, of_weights, strict=True))


def averaged(groups: list[Group], shares: Tensor) -> dict[str, Tensor]:
    """The features for means over all samples of several groups, each with its share."""
    features = [group.features() for group in groups]
    means = {name: torch.stack([each[name] for each in features]) for name in FEATURES}
    return {name: (shares @ each**2).sqrt() if name == "curvature" else shares @ each for name, each in means.items()}


def assert_by_hand(snapshot: Snapshot, own: Group, others: list[Group]) -> None:
    """Asserts that a snapshot has the log-odds and the features of a class and of groups of the other classes."""
    damage = torch.stack([(F.softplus(-group.log_odds.detach()).mean() + 0.02).sqrt() for group in others])
    expected = [
        (snapshot.own, own.features()),
        (snapshot.others, averaged(others, torch.full_like(damage, 1 / len(damage)))),
        (
            snapshot.retained,
            {name: averaged(others, damage / damage.sum())[name] for name in ("retention", "curvature")},
        ),
    ]
    for log_odds, group in zip([snapshot.log_odds[0], *snapshot.log_odds[1]], [own, *others], strict=True):
        assert torch.allclose(log_odds, group.log_odds, atol=1e-9)
    for sums, features in expected:
        for name, values in features.items():
            assert torch.allclose(snapshot.feature(name, sums), values, rtol=1e-9, atol=1e-12), name


PACKAGES = ("mimu", "experiment", "methods", "tables")
TRACKED = ("*.py", "*.sh", *(f"{name}/*.py" for name in PACKAGES), "configs/*.yaml", "mimu/gcn.pt",
           "mimu/settings.yaml", "README.md", "pyproject.toml")  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder with a few samples of MNIST, for quick runs in this process that draw nothing."""
    folder = tmp_path / "mimu"
    write_few(folder)
    draw_nothing(monkeypatch)
    monkeypatch.setattr("trainer.COMPARED", 1)  # class: ten take longer than all the rest
    return folder
