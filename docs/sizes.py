"""Compares ways to choose weights at equal mask sizes, on classifiers that no choice was made on, for docs/sizes.md.

`uv run docs/sizes.py` measures the table and the picture; `uv run docs/sizes.py tune` tries 24 candidates of the
settings of a request for the formula and for the GCN each, on held-out training samples of another classifier.
"""

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev

import torch
from matplotlib import pyplot as plt
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from build import DOCS, ROOT, write_block

from data import GraphGenerator, load_image_data
from eval import Request
from experiment.config import load_config
from methods.controls import largest
from mimu.auditing import jensen_shannon
from mimu.pretrained import TrainedGCN
from mimu.pruning import PruningConfig, prune
from mimu.samples import is_correct
from mimu.seeds import seeded
from mimu.settings import number_of_weights
from mimu.training import forgetting_loss
from reporter import markdown_table, method_styles
from trainer import Trainer, masked_weights

SHARES = (0.03, 0.06, 0.12, 0.24, 0.36)  # of the masked weights, which are zeroed
TUNED_AT = 0.24
NETWORKS = {
    "MNIST": ("perceptron, MNIST", (400, 401, 402), ()),
    "Fashion-MNIST": ("perceptron, Fashion-MNIST", (400, 401), ("dataset=FashionMNIST",)),
    "cnn": (
        "hidden layer of a CNN, Fashion-MNIST",
        (400,),
        (
            "dataset=FashionMNIST",
            "classifier={architecture: cnn, hidden_sizes: [64], channels: [16, 32], epochs: 4, batch_size: 256}",
            "graphs.samples_per_class=250",
        ),
    ),
}
NAMES = {"mimu": "GCN", "saliency": "formula", "optimised_mask": "optimised mask", "magnitude": "magnitude"}
NAMES["random"] = "random"
GRID = {"momentum": [0.5, 0.7, 0.9], "group_size": [100, 200], "retain_weight": [25.0, 50.0, 100.0, 200.0]}
Scores = tuple[float, float, float]  # forget accuracy, %; gap to retraining, percentage points; divergence, bits


@dataclass(frozen=True)
class Comparison:
    """A classifier, its test samples, and the logits that a classifier retrained for each class has for these."""

    requests: list[Request]
    test_inputs: Tensor
    labels: Tensor
    retrained: list[Tensor]
    retrained_again: list[Tensor]

    @classmethod
    def of(cls, seed: int, overrides: Sequence[str], held_out: int = 0) -> "Comparison":
        """Trains a classifier, and two without each class."""
        config = load_config(overrides=["gcn.pretrained=true", *overrides])
        data = load_image_data(config.dataset, ROOT / "datasets", torch.device("cpu"), held_out)
        num_classes = len(data.class_names)
        trainer = Trainer(config.classifier, seed, config.source.size)
        classifier = trainer.trained(data.train, num_classes).model
        graphs = GraphGenerator(classifier, data.train, config.graphs, seed)
        gcn = TrainedGCN.load().gcn
        request = Request(config.eval, classifier, trainer, data.train, graphs, gcn, 0, 0, seed)
        requests = [replace(request, forget_class=label) for label in range(num_classes)]

        def without(label: int, seed: int) -> Tensor:
            model = requests[label].retrained(seed).model
            with torch.no_grad():
                return torch.cat([model(images) for images in data.test.images.split(10_000)])

        retrained, again = (
            [without(label, each) for label in tqdm(range(num_classes), "retraining", leave=False)]
            for each in (seed, seed + 1_000_000)
        )
        inputs = classifier.prefix_activations(graphs.graph.layers, data.test.images)
        return cls(requests, inputs, data.test.labels, retrained, again)

    def scores(self, label: int, logits: Tensor) -> Scores:
        """Scores the logits of the test samples."""
        retrained, is_forget = self.retrained[label], self.labels == label
        correct, reference = (100 * is_correct(each, self.labels).double() for each in (logits, retrained))
        gap = correct[~is_forget].mean() - reference[~is_forget].mean()
        divergence = jensen_shannon(logits[is_forget], retrained[is_forget])
        return float(correct[is_forget].mean()), float(gap), divergence

    def masked(self, label: int, zeroed: Tensor) -> Scores:
        """Scores the classifier without some weights."""
        return self.scores(label, self.requests[label].graphs.logits(self.test_inputs, zeroed))


def in_steps(request: Request, kappas: Sequence[int], with_gcn: bool, config: PruningConfig) -> Iterator[Tensor]:
    """Yields the vertices that the steps of a request zero, for each size."""
    gcn = request.gcn if with_gcn else None
    steps = prune(request.graphs, request.class_index, config, request.seed, gcn)
    for kappa in kappas:
        yield next(step.vertices for step in steps if len(step.vertices) >= kappa)[:kappa]


def optimised(request: Request, kappas: Sequence[int]) -> Iterator[Tensor]:
    """Yields the vertices of masks that are optimised for one class and one size each (Adam, 500 steps).

    The loss has the terms of `optimised_mask` in methods/; in each step the kappa smallest numbers are zeros.
    """
    graphs, removed = request.graphs, torch.tensor([request.forget_class])
    without_class = graphs.predictions.index_fill(1, removed, float("-inf")).softmax(1)
    for kappa in kappas:
        generator = seeded("sizes", request.seed, request.forget_class, kappa)
        numbers = 0.01 * torch.randn(graphs.graph.num_vertices, generator=generator)
        numbers.requires_grad_(True)
        optimizer = torch.optim.Adam([numbers], 0.02)
        for _ in range(500):
            soft = (numbers - numbers.detach().kthvalue(kappa).values).div(0.1).sigmoid()
            keep = (soft > 0.5).float() + soft - soft.detach()
            batch = graphs.draw(100, generator).flatten()
            weights = masked_weights(request.original, graphs.graph, keep)
            log_p = graphs.suffix.outputs(graphs.cached_inputs[batch], weights)[1].log_softmax(1)
            is_forget = graphs.labels[batch] == request.forget_class
            retain = -(without_class[batch] * log_p).sum(1)[~is_forget].mean()
            loss = forgetting_loss(log_p[is_forget, request.forget_class].exp()) + retain
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        yield numbers.detach().topk(kappa, largest=False).indices


def magnitude(request: Request, kappas: Sequence[int]) -> Iterator[Tensor]:
    """Yields the vertices of the weights that are largest in magnitude."""
    yield from (largest(request, kappa) for kappa in kappas)


def random(request: Request, kappas: Sequence[int]) -> Iterator[Tensor]:
    """Yields random vertices."""
    order = torch.randperm(request.graphs.graph.num_vertices, generator=seeded("sizes", request.seed))
    yield from (order[:kappa] for kappa in kappas)


METHODS: dict[str, Callable[[Request, Sequence[int]], Iterator[Tensor]]] = {
    "mimu": lambda request, kappas: in_steps(request, kappas, True, request.config),
    "saliency": lambda request, kappas: in_steps(request, kappas, False, request.config),
    "optimised_mask": optimised,
    "magnitude": magnitude,
    "random": random,
}


def measured(name: str) -> dict[tuple[str, float], list[Scores]]:
    """Measures every method and size on the classifiers of a network; the means over classes, seed by seed."""
    _, seeds, overrides = NETWORKS[name]
    scores: dict[tuple[str, float], list[Scores]] = {}
    for seed in seeds:
        comparison = Comparison.of(seed, overrides)
        graph = comparison.requests[0].graphs.graph
        kappas = [number_of_weights(share, graph.num_vertices) for share in SHARES]
        rows: dict[tuple[str, float], list[Scores]] = {}
        for request in tqdm(comparison.requests, f"{name}, seed {seed}", leave=False):
            label = request.forget_class
            again = comparison.scores(label, comparison.retrained_again[label])
            rows.setdefault(("retrain_again", 0.0), []).append(again)
            for method, choose in METHODS.items():
                if method == "optimised_mask" and seed != seeds[0]:  # it takes as long as all others together
                    continue
                for share, zeroed in zip(SHARES, choose(request, kappas)):
                    rows.setdefault((method, share), []).append(comparison.masked(label, zeroed))
        for key, each in rows.items():
            scores.setdefault(key, []).append(tuple(map(fmean, zip(*each))))
    return scores


def draw(figures: dict[str, dict[tuple[str, float], list[Scores]]]) -> None:
    """Draws the gap to retraining and the divergence over the mask size, a column for every network."""
    styles = method_styles([*METHODS, "retrain_again"])
    size = {"figsize": (4 * len(figures), 6), "sharex": True, "squeeze": False, "layout": "constrained"}
    figure, axes = plt.subplots(2, len(figures), **size)
    for column, (name, scores) in zip(axes.T, figures.items()):
        column[0].set_title(NETWORKS[name][0], fontsize=10)
        for row, panel in enumerate(column, 1):
            for method in METHODS:
                y = [fmean(each[row] for each in scores[method, share]) for share in SHARES]
                panel.plot([100 * share for share in SHARES], y, label=NAMES[method], **styles[method])
            again = fmean(each[row] for each in scores["retrain_again", 0.0])
            panel.axhline(again, color="0.4", linestyle="--", label="another retrained classifier")
        column[0].set_ylim(-3, 1)
        column[1].set(yscale="log", ylim=(0.015, 1.1))
        column[1].set_yticks((0.02, 0.05, 0.1, 0.2, 0.5, 1), minor=False)
        column[1].yaxis.set_major_formatter("{x:g}")
        column[1].yaxis.set_minor_formatter("")
        column[1].set_xlabel("weights zeroed, % of the layer")
    axes[0, 0].set_ylabel("gap to retraining, percentage points")
    axes[1, 0].set_ylabel("divergence on the forget set, bits")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    figure.savefig(DOCS / "sizes.png", dpi=150)


def table(figures: dict[str, dict[tuple[str, float], list[Scores]]]) -> str:
    """The gap to retraining and the divergence of every network, method and size, one number a cell."""
    shown = [f"{100 * share:.0f} %" for share in SHARES]
    header = ["network", "method", *(f"gap, {each}" for each in shown), *(f"divergence, {each}" for each in shown)]
    rows = []
    for name, scores in figures.items():
        for method in METHODS:
            gaps, divergences = (
                [fmean(each[place] for each in scores[method, share]) for share in SHARES] for place in (1, 2)
            )
            rows.append([name, NAMES[method], *(f"{x:+.2f}" for x in gaps), *(f"{x:.3f}" for x in divergences)])
        _, gap, divergence = map(fmean, zip(*scores["retrain_again", 0.0]))
        empty = [""] * (len(SHARES) - 1)
        rows.append([name, "another retrained classifier", f"{gap:+.2f}", *empty, f"{divergence:.3f}", *empty])
    return markdown_table(header, rows, texts=2)


def lead(scores: dict[tuple[str, float], list[Scores]]) -> str:
    """The lead of the GCN over the formula at the size of tuning, with its deviation over the classifiers."""
    leads = [a[1] - b[1] for a, b in zip(scores["mimu", TUNED_AT], scores["saliency", TUNED_AT])]
    spread = f" ± {stdev(leads):.2f}" if len(leads) > 1 else ""
    return f"{fmean(leads):+.2f}{spread}"


def tune() -> None:
    """Tries the same candidates for the GCN and for the formula, and prints the best of each and its lead."""
    rows = []
    for name, overrides in {key: NETWORKS[key][2] for key in sys.argv[2:] or NETWORKS}.items():
        comparison = Comparison.of(410, overrides, held_out=10_000)
        kappa = number_of_weights(TUNED_AT, comparison.requests[0].graphs.graph.num_vertices)
        for with_gcn in (True, False):
            trials = []
            for values in itertools.product(*GRID.values()):
                changes = dict(zip(GRID, values))
                scores = [
                    comparison.masked(
                        request.forget_class,
                        next(in_steps(request, [kappa], with_gcn, replace(request.config, **changes))),
                    )
                    for request in comparison.requests[::2]  # five classes are enough to choose
                ]
                trials.append((fmean(each[1] for each in scores), fmean(each[0] for each in scores), changes))
                print(name, "GCN" if with_gcn else "formula", *trials[-1], flush=True)
            best = max(trials, key=lambda trial: (trial[1] < 0.05, trial[0]))
            default = next(t for t in trials if t[2] == {"momentum": 0.7, "group_size": 200, "retain_weight": 50.0})
            chosen = ", ".join(f"{key} {value:g}" for key, value in best[2].items())
            label = "GCN" if with_gcn else "formula"
            rows.append([name, label, chosen, f"{best[1]:.2f}", f"{best[0]:+.2f}", f"{default[0]:+.2f}"])
    header = ["network", "method", "chosen", "forget accuracy, %", "gap, points", "gap as configured, points"]
    write_block("sizes_tuned", markdown_table(header, rows, texts=3))


def main() -> None:
    """Measures the table and the picture."""
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["tune"]:
        return tune()
    figures = {name: measured(name) for name in sys.argv[1:] or NETWORKS}
    draw(figures)
    leads = ", ".join(f"{name} {lead(scores)}" for name, scores in figures.items())
    write_block("sizes", f"{table(figures)}\n\nAt {100 * TUNED_AT:.0f} % the GCN leads the formula by: {leads} points.")


if __name__ == "__main__":
    main()
