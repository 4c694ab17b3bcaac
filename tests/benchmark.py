"""Times the parts of the project against the plain ways to do the same, and shows how cost grows with the classifier.

Run it with `uv run tests/benchmark.py`; `--only gcn growth` runs some parts.
One process, a warm-up before each measurement, medians of several runs. Compare ratios, not machines.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from itertools import cycle
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch_geometric.data import Data
from torch_geometric.nn import SAGEConv

from data import GraphGenerator, load_image_data
from eval import Eval, Request
from experiment.config import load_config
from experiment.files import ROOT, Artifact
from experiment.processes import peak_bytes
from mimu.graph import MaskingGCN, WeightGraph, keep_freed_memory
from mimu.pretrained import TrainedGCN
from mimu.pruning import Pruning, SaliencyScorer
from mimu.samples import Split
from model import HookedMNISTClassifier
from reporter import markdown_table
from trainer import GCNTrainer, Trainer

warnings.filterwarnings("ignore", category=FutureWarning)
warnings.filterwarnings("ignore", message="Sparse")
CONFIG = load_config()


class Table(dict[str, tuple[float, float | None, float | None]]):
    """Figures by what they are of: the median of several runs, the smallest and the largest; or one number."""

    def add(self, what: str, number: float) -> None:
        self[what] = (number, None, None)

    def time(self, what: str, work: Callable[[], object], runs: int, scale: float = 1e3) -> float:
        """Adds the wall time of one run in milliseconds, or in other units by `scale` a second; returns the median."""
        for _ in range(max(1, runs // 10)):  # to warm up
            work()
        times = []
        for _ in range(runs):
            started = time.perf_counter()
            work()
            times.append(scale * (time.perf_counter() - started))
        self[what] = (statistics.median(times), min(times), max(times))
        return self[what][0]

    def __str__(self) -> str:
        rows = []
        for what, (median, low, high) in self.items():
            shown = f"{median:,.0f}" if median >= 1000 else f"{median:.3g}"
            rows.append([what, shown, "" if low is None else f"{low:.3g} to {high:.3g}"])
        return markdown_table(["what", "median", "smallest to largest"], rows)


class PlainGCN(MaskingGCN):
    """The masking GCN with PyG's SAGEConv, on an edge list or a CSR adjacency: the same parameters and outputs."""

    def __init__(self, gcn: MaskingGCN) -> None:
        super().__init__(gcn.num_features, gcn.readout.in_features, len(gcn.convs))
        shapes = [conv.lin_l.weight.shape for conv in gcn.convs]
        self.convs = nn.ModuleList(SAGEConv(n, m, bias=False) for m, n in shapes)
        self.load_state_dict(gcn.state_dict())

    def hidden(self, x: Tensor, edges: Tensor) -> list[Tensor]:
        x = x[0]
        for index, conv in enumerate(self.convs):
            x = conv(x, edges).relu() if index else conv(x, edges)
        return [x[None, None]]  # (1, 1, vertices, hidden)


def default_gcn() -> MaskingGCN:
    """The GCN of the default run, with a read-out that is not 0 as before the training."""
    torch.manual_seed(0)
    gcn = CONFIG.gcn.network(CONFIG.graphs.num_features)
    nn.init.normal_(gcn.readout.weight, std=0.1)
    return gcn


def forward_and_backward(gcn: nn.Module, x: Tensor, graph: object) -> Callable[[], None]:
    def work() -> None:
        gcn.zero_grad()
        gcn(x, graph).sum().backward()

    return work


def layer_graph() -> tuple[WeightGraph, Tensor, dict[str, Tensor]]:
    """A 64x128 graph, vertex features, and the edges in the ways in which PyG takes them."""
    graph = WeightGraph(HookedMNISTClassifier((), 128, 64), 0)
    x, edges = torch.randn(1, graph.num_vertices, CONFIG.graphs.num_features), graph.edge_index()
    adjacency = torch.sparse_coo_tensor(edges, torch.ones(edges.shape[1]), [graph.num_vertices] * 2)
    return graph, x, {"edge list": edges, "CSR sparse product": adjacency.to_sparse_csr()}


def pyg_part(table: Table, before: dict[str, Table]) -> None:
    """PyG's SAGEConv with memory managed as PyTorch comes: the default GCN, forward and backward on a 64x128 graph."""
    _, x, ways = layer_graph()
    for name, edges in ways.items():
        table.time(f"{name}, ms", forward_and_backward(PlainGCN(default_gcn()), x, edges), 9)


def gcn_part(table: Table, before: dict[str, Table]) -> None:
    """The same with the closed form beside it, in a process that keeps its freed memory, as a run does."""
    pyg_part(table, before)
    gcn, (graph, x, ways) = default_gcn(), layer_graph()
    closed = table.time("closed form, ms", forward_and_backward(gcn, x, graph), 300)
    for name in ways:
        table.add(f"{name} as PyTorch comes / closed form", before["pyg"][f"{name}, ms"][0] / closed)
        table.add(f"{name} / closed form", table[f"{name}, ms"][0] / closed)
    with torch.no_grad():
        outputs = {name: PlainGCN(gcn)(x, edges) for name, edges in ways.items()} | {"closed form": gcn(x, graph)}
    expected = outputs.pop("edge list")
    for name, output in outputs.items():
        difference = (output - expected).abs().max().item()
        table.add(f"{name}, largest difference of outputs to the edge list", difference)


def one_sample_at_a_time(classifier: HookedMNISTClassifier, samples: Split, layer: int) -> list[Data]:
    """Activation graphs as they were published: a pass per sample, and its four features kept for every vertex."""
    classifier = copy.deepcopy(classifier)
    weight, module = classifier.weights[layer], classifier.network[1 + 2 * layer]
    graphs = []
    for image, label in DataLoader(TensorDataset(samples.images, samples.labels), batch_size=1):
        seen = {}
        hook = module.register_forward_hook(
            lambda _, inputs, output, seen=seen: seen.update(source=inputs[0], target=output.relu())
        )
        classifier.zero_grad()
        F.cross_entropy(classifier(image), label).backward()
        hook.remove()
        source, target = seen["source"].detach().expand_as(weight), seen["target"].detach().T.expand_as(weight)
        features = torch.stack([source, target, weight.detach(), weight.grad], -1).flatten(0, 1)
        graphs.append(Data(x=features, y=label))
    return graphs


def graphs_part(table: Table, before: dict[str, Table]) -> None:
    """Activation graphs of the 64x128 layer: one sample at a time against all samples in one batch."""
    train = load_image_data(CONFIG.dataset, ROOT / "datasets").train
    torch.manual_seed(0)
    classifier = HookedMNISTClassifier(CONFIG.classifier.hidden_sizes)
    graphs = GraphGenerator(classifier, train, CONFIG.graphs, seed=0)
    layer, count = graphs.graph.layers[0], 500
    some = Split(train.images[:count], train.labels[:count])

    def one_by_one() -> list[Data]:
        return one_sample_at_a_time(classifier, some, layer)

    def in_one_batch() -> object:
        return GraphGenerator(classifier, train, CONFIG.graphs, 0).record

    slow = table.time("one sample at a time, ms a sample", one_by_one, 5, 1e3 / count)
    in_one = f"{len(graphs):,} samples in one batch, ms a sample"
    fast = table.time(in_one, in_one_batch, 20, 1e3 / len(graphs))
    table.add("one sample at a time / in one batch", slow / fast)


def growth_part(table: Table, before: dict[str, Table]) -> None:
    """The closed form with all layers masked, on classifiers of 784-128-64-10 scaled up and down."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here, where the system allows it (Linux)
    held, per_vertex = peak_bytes() / 1e9, {}
    table.add("GB that the process holds before, with all that it has imported", held)
    for scale in (0.27, 0.5, 1, 2, 3.5, 6):
        inputs, first, second = (round(scale * size) for size in (784, 128, 64))
        graph = WeightGraph(HookedMNISTClassifier((first, second), inputs), None)
        x = torch.randn(1, graph.num_vertices, CONFIG.graphs.num_features)
        runs = max(3, min(100, 10**6 // graph.num_vertices))
        name = f"{inputs}-{first}-{second}-10, {graph.num_vertices:,} weights"
        taken = table.time(f"{name}, ms", forward_and_backward(default_gcn(), x, graph), runs)
        per_vertex[scale] = 1e6 * taken / graph.num_vertices
        table.add(f"{name}, ns a vertex", per_vertex[scale])
        table.add(f"{name}, GB more at most", peak_bytes() / 1e9 - held)
    table.add("time a vertex, 4 million weights / 100 thousand", per_vertex[6] / per_vertex[1])


def stages_part(table: Table, before: dict[str, Table]) -> None:
    """A training step of the GCN, a request, an evaluation."""
    data, trainer = load_image_data(CONFIG.dataset, ROOT / "datasets"), Trainer(CONFIG.classifier, 0)
    classifier = trainer.train(data.train, 10)
    graphs = GraphGenerator(classifier, data.train, CONFIG.graphs, seed=0)
    few = GCNTrainer(replace(CONFIG.gcn, steps=20), [graphs], CONFIG.eval.retain_weight, 0)
    table.time("training step of the GCN, ms", few.train, 10, 1e3 / 20)
    gcn, asks = TrainedGCN.load().gcn, load_config(overrides=["gcn.pretrained=true", "eval.group_size=100"])
    graphs, digits = GraphGenerator(classifier, data.train, asks.graphs, seed=0), cycle(range(10))

    def request_to_mask() -> None:
        digit = next(digits)
        order = Pruning(asks.eval, graphs, digit, SaliencyScorer(asks.eval, graphs, digit, 0, gcn))
        order.answer("auto", data.train.forget(digit))

    table.time("request, pretrained GCN to mask, kappa auto, ten digits in turn, ms", request_to_mask, 10)
    mimu_alone = replace(asks.eval, methods=("mimu",))
    request = Request(
        mimu_alone, classifier, trainer, data.train, graphs, gcn, 9, top_k=2048, seed=0, requested_kappa=200
    )
    request.in_steps("mimu", gcn=gcn)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        metrics, mask = Artifact(folder / "metrics.json", {}), Artifact(folder / "mask.pt", {})
        evaluation = Eval(request, data, metrics, mask, {"seconds": {}}, {})
        table.time("evaluation of a mask: all metrics, JSON, ms", evaluation.eval, 20)


# In this order: before growth, whose memory is measured, nothing may have left memory that is kept.
PARTS = {"pyg": pyg_part, "growth": growth_part, "gcn": gcn_part, "graphs": graphs_part, "stages": stages_part}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    choices = [name for name in PARTS if name != "pyg"]
    parser.add_argument("--only", nargs="+", choices=choices, default=choices, help="the parts to run")
    arguments = parser.parse_args()
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "torch-geometric", "torchvision", "numpy"))
    cpus = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []  # of Linux
    names = [line.partition(": ")[2] for line in cpus if line.startswith("model name")] or [platform.machine()]
    threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    print(f"{names[0]}, {threads}; Python {platform.python_version()}, {packages}")
    tables: dict[str, Table] = {}
    for name, part in PARTS.items():
        if name not in arguments.only and not (name == "pyg" and "gcn" in arguments.only):
            continue
        if name != "pyg":
            keep_freed_memory()
        tables[name] = Table()
        part(tables[name], tables)
        print(f"\n{part.__doc__}\n\n{tables[name]}", flush=True)


if __name__ == "__main__":
    main()
