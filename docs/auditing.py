"""Audits models whose state is known, for the table of docs/auditing.md: `uv run docs/auditing.py`, in ten minutes.

`uv run docs/auditing.py perceptron` audits those of one network, and prints its rows. The CNN and the ViT need
Fashion-MNIST.
"""

import copy
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from build import DOCS, ROOT, write_block

from data import load_image_data
from experiment.config import load_config
from mimu import audit, unlearn
from mimu.samples import Split, some_of_every_class
from mimu.seeds import seeded
from reporter import markdown_table
from trainer import Trainer

HEADER = ["network, class", "unlearned model", "verdict", "bits found", "in the original", "after retraining"]
CNN = "classifier={architecture: cnn, hidden_sizes: [64], channels: [16, 32], epochs: 4, batch_size: 256}"
VIT = "classifier={architecture: vit, hidden_sizes: [128], channels: [64], blocks: 2, epochs: 5, batch_size: 128}"
PICTURED = "masked by the GCN"
Train = Callable[[int, Split], nn.Module]  # from a seed and samples to a classifier


def hidden(model: nn.Module, label: int) -> nn.Module:
    """A copy in whose output layer a class is hidden."""
    model = copy.deepcopy(model)
    *_, name = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    unlearn(model, forget_class=label, method="hide", mask_layer=name).apply(model, permanent=True)
    return model


class Projected(nn.Module):
    """A perceptron whose representation has lost every direction that tells classes, and whose logits lack one class.

    LEACE (Belrose et al. 2023, arXiv:2306.03819): x - W^+ P W (x - mean), W whitens, P projects onto the covariance of
    whitened features and labels.
    """

    def __init__(self, model: nn.Module, train: Split, label: int) -> None:
        super().__init__()
        network = copy.deepcopy(model)
        self.body, self.head, self.label = network[:-1], network[-1], label
        with torch.no_grad():
            x = self.body(train.images).double()
            targets = F.one_hot(train.labels).double()
            self.mean, centred = x.mean(0).float(), x - x.mean(0)
            values, vectors = torch.linalg.eigh(centred.T @ centred / len(x))
            kept = values > 1e-6 * values[-1]
            roots, vectors = values[kept].sqrt(), vectors[:, kept]
            covariance = (centred @ (vectors / roots)).T @ (targets - targets.mean(0)) / len(x)
            directions = torch.linalg.svd(covariance, full_matrices=False)[0][:, : targets.shape[1] - 1]
            self.removed = ((vectors * roots) @ directions @ directions.T @ (vectors / roots).T).float()

    def forward(self, images: Tensor) -> Tensor:
        x = self.body(images)
        logits = self.head(x - (x - self.mean) @ self.removed.T)
        return logits.index_fill(1, torch.tensor([self.label]), -1e4)


def on_images(dataset: str, *overrides: str) -> tuple[Train, Split, Split]:
    """How a network of the experiment is trained, and its samples."""
    config = load_config(overrides=[f"dataset={dataset}", *overrides])
    data = load_image_data(dataset, ROOT / "datasets", torch.device("cpu"))

    def train(seed: int, samples: Split) -> nn.Module:
        return Trainer(config.classifier, seed, config.source.size).train(samples, 10).network

    return train, data.train, data.test


def on_clusters() -> tuple[Train, Split, Split]:
    """A perceptron on 100 clusters in 64 dimensions, 20 samples each."""
    centres = 0.6 * torch.randn(100, 64, generator=seeded("centres"))

    def draw(count: int, name: str) -> Split:
        labels = torch.arange(100).repeat_interleave(count)
        return Split(centres[labels] + torch.randn(len(labels), 64, generator=seeded(name)), labels)

    def train(seed: int, samples: Split) -> nn.Module:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 100))
        optimizer = torch.optim.Adam(model.parameters(), 0.001)
        for _, batch in zip(range(400), samples.batches(256, seeded("clusters", seed))):
            optimizer.zero_grad()
            F.cross_entropy(model(batch.images), batch.labels).backward()
            optimizer.step()
        return model

    return train, draw(20, "train"), draw(200, "test")


NETWORKS = {
    "perceptron": ("perceptron, MNIST, 3", 3, partial(on_images, "MNIST")),
    "cnn": ("CNN, Fashion-MNIST, 4", 4, partial(on_images, "FashionMNIST", CNN)),
    "vit": ("ViT, Fashion-MNIST, 0", 0, partial(on_images, "FashionMNIST", VIT)),
    "clusters": ("100 clusters of 20 samples, 7", 7, on_clusters),
}


def rows(name: str) -> Iterator[list[str]]:
    """Audits the cases of a network."""
    title, label, load = NETWORKS[name]
    train, samples, test = load()
    original = train(0, samples)
    *retrained, another = (train(seed, samples.retain(label)) for seed in (0, 1_000_000, 2_000_000, 3_000_000))

    def row(words: str, model: nn.Module, references: list[nn.Module], few: Split | None = None) -> list[str]:
        read, tested = few or samples, None if few else (test.images, test.labels)
        arguments = {"forget_class": label, "test": tested, "retrained": references or None, "progress": False}
        report = audit(original, model, read.images, read.labels, **arguments)
        if words == PICTURED:
            report.plot(DOCS / "auditing.png")

        def bits(name: str) -> float:
            probes = report.figures[name]["probes"]["last"]
            return max(probes[each]["bits"] for each in ("linear", "two-layer"))

        after = sorted(f"{bits(f'retrained {place}'):.3f}" for place in range(1, len(references) + 1))
        figures = [f"{bits(each):.3f}" for each in ("unlearned", "original")]
        return [title, words, report.verdict, *figures, " to ".join(dict.fromkeys(after[:: max(1, len(after) - 1)]))]

    if name == "perceptron":
        yield row("the original", original, retrained)
        yield row("class 5 hidden", hidden(original, 5), retrained)
    yield row("hidden", hidden(original, label), retrained)
    if name in ("perceptron", "cnn"):
        mask = unlearn(original, samples.images, samples.labels, label, method="mask", progress=False)
        with mask.applied_to(copy.deepcopy(original)) as masked:
            yield row(PICTURED if name == "perceptron" else "masked", masked, retrained)
    yield row("another retrained one", another, retrained)
    if name == "perceptron":
        yield row("all directions of classes removed (LEACE)", Projected(original, samples, label), retrained)
        yield row("hidden, no retrained model", hidden(original, label), [])
        yield row("retrained, no retrained model given", another, [])
        few = some_of_every_class(samples, 5, "auditing")
        yield row("hidden, five samples a class", hidden(original, label), retrained, few)


def main() -> None:
    """Audits all cases and writes the table, or prints the rows of some networks."""
    torch.set_num_threads(1)
    table = []
    for name in sys.argv[1:] or NETWORKS:
        for each in rows(name):
            print(*each, sep=" | ", flush=True)
            table.append(each)
    if not sys.argv[1:]:
        write_block("auditing", markdown_table(HEADER, table, texts=3))


if __name__ == "__main__":
    main()
