"""Times parts of the project beside the plain ways to do the same, and shows how cost grows with the classifier.

Run it with `uv run tests/benchmark.py`; `--only gcn growth` runs some parts.
It runs in one process, warms up before each measurement, and prints medians of several runs. Compare ratios.
"""

import argparse
import contextlib
import copy
import itertools
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

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
from mimu.samples import Split
from model import HookedMNISTClassifier
from reporter import markdown_table
from trainer import GCNTrainer, Trainer

warnings.filterwarnings("ignore", category=FutureWarning)
warnings.filterwarnings("ignore", message="Sparse")
CONFIG = load_config()


class Table(dict[str, list[float]]):
    """Figures by what they measure: the median, the smallest and the largest of several runs, or one number."""

    def time(self, what: str, work: Callable[[], object], runs: int, scale: float = 1e3) -> float:
        """Adds the wall time of one run, in units of which a second has `scale`, and returns the median."""
        times = []
        for run in range(-max(1, runs // 10), runs):  # those below 0 warm up
            started = time.perf_counter()
            work()
            times += [scale * (time.perf_counter() - started)] if run >= 0 else []
        self[what] = [statistics.median(times), min(times), max(times)]
        return self[what][0]

    def __str__(self) -> str:
        rows = []
        for what, (median, *span) in self.items():
            shown = f"{median:,.0f}" if median >= 1000 else f"{median:.3g}"
            rows.append([what, shown, " to ".join(f"{number:.3g}" for number in span)])
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
        return [x[None, None, None]]  # one graph, a single matrix of one row: (1, 1, 1, vertices, hidden)


def default_gcn() -> MaskingGCN:
    """The GCN of the default run, with a read-out that is not 0 as before the training."""
    torch.manual_seed(0)
    gcn = MaskingGCN(CONFIG.graphs.num_features, CONFIG.gcn.hidden, CONFIG.gcn.rounds)
    nn.init.normal_(gcn.readout.weight, std=0.1)
    return gcn


def time_gcn(table: Table, what: str, gcn: nn.Module, x: Tensor, graph: object, runs: int) -> float:
    def forward_and_backward() -> None:
        gcn.zero_grad()
        gcn(x, graph).sum().backward()

    return table.time(f"{what}, ms", forward_and_backward, runs)


def pyg_part(table: Table, pyg: Table | None = None) -> tuple[WeightGraph, Tensor, dict[str, Tensor]]:
    """PyG's SAGEConv with memory managed as PyTorch comes: the default GCN, forward and backward on a 64x128 graph."""
    graph = WeightGraph(HookedMNISTClassifier((), 128, 64).trace.layers, 0)
    x, edges = torch.randn(1, graph.num_vertices, CONFIG.graphs.num_features), graph.edge_index()
    adjacency = torch.sparse_coo_tensor(edges, torch.ones(edges.shape[1]), [graph.num_vertices] * 2)
    formats = {"edge list": edges, "CSR sparse product": adjacency.to_sparse_csr()}
    for name, edges in formats.items():
        time_gcn(table, name, PlainGCN(default_gcn()), x, edges, 9)
    return graph, x, formats


def gcn_part(table: Table, pyg: Table) -> None:
    """The same with the closed form beside it, in a process that keeps its freed memory, as a run does."""
    (graph, x, formats), gcn = pyg_part(table), default_gcn()
    closed = time_gcn(table, "closed form", gcn, x, graph, 300)
    for name in formats:
        table[f"{name} as PyTorch comes / closed form"] = [pyg[f"{name}, ms"][0] / closed]
        table[f"{name} / closed form"] = [table[f"{name}, ms"][0] / closed]
    with torch.no_grad():
        outputs = {name: PlainGCN(gcn)(x, edges) for name, edges in formats.items()} | {"closed form": gcn(x, graph)}
    expected = outputs.pop("edge list")
    for name, output in outputs.items():
        table[f"{name}, largest difference of outputs to the edge list"] = [(output - expected).abs().max().item()]


def one_sample_at_a_time(classifier: HookedMNISTClassifier, samples: Split, layer: int) -> list[Data]:
    """Activation graphs as they were published: a pass per sample, and its four features kept for every vertex."""
    classifier = copy.deepcopy(classifier)
    weight, module, graphs = classifier.weights[layer], classifier.network[1 + 2 * layer], []
    module.register_forward_hook(lambda _, inputs, output: ends.update(source=inputs[0], target=output.relu()))
    for image, label in DataLoader(TensorDataset(samples.images, samples.labels), batch_size=1):
        ends: dict[str, Tensor] = {}
        classifier.zero_grad()
        F.cross_entropy(classifier(image), label).backward()
        source, target = ends["source"].detach().expand_as(weight), ends["target"].detach().T.expand_as(weight)
        features = torch.stack([source, target, weight.detach(), weight.grad], -1).flatten(0, 1)
        graphs.append(Data(x=features, y=label))
    return graphs


def graphs_part(table: Table, pyg: Table) -> None:
    """Activation graphs of the 64x128 layer: one sample at a time against all samples in one batch."""
    train, count = load_image_data(CONFIG.dataset, ROOT / "datasets").train, 500
    torch.manual_seed(0)
    classifier = HookedMNISTClassifier(CONFIG.classifier.hidden_sizes)
    graphs, few = GraphGenerator(classifier, train, CONFIG.graphs, 0), train[:count]
    one_by_one = lambda: one_sample_at_a_time(classifier, few, graphs.graph.layers[0])  # noqa: E731
    slow = table.time("one sample at a time, ms a sample", one_by_one, 5, 1e3 / count)
    in_one_batch = lambda: GraphGenerator(classifier, train, CONFIG.graphs, 0).recorded()  # noqa: E731
    fast = table.time(
        f"{len(graphs.labels):,} samples in one batch, ms a sample", in_one_batch, 20, 1e3 / len(graphs.labels)
    )
    table["one sample at a time / in one batch"] = [slow / fast]


def growth_part(table: Table, pyg: Table) -> None:
    """The closed form with all layers masked, on classifiers of 784-128-64-10 scaled up and down."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here, where the system allows it (Linux)
    held, per_vertex = peak_bytes() / 1e9, {}
    table["GB that the process holds before, with all that it has imported"] = [held]
    for scale in (0.27, 0.5, 1, 2, 3.5, 6):
        inputs, first, second = (round(scale * size) for size in (784, 128, 64))
        graph = WeightGraph(HookedMNISTClassifier((first, second), inputs).trace.layers, None)
        x = torch.randn(1, graph.num_vertices, CONFIG.graphs.num_features)
        name = f"{inputs}-{first}-{second}-10, {graph.num_vertices:,} weights"
        milliseconds = time_gcn(table, name, default_gcn(), x, graph, max(3, min(100, 10**6 // graph.num_vertices)))
        per_vertex[scale] = 1e6 * milliseconds / graph.num_vertices
        table[f"{name}, ns a vertex"] = [per_vertex[scale]]
        table[f"{name}, GB more at most"] = [peak_bytes() / 1e9 - held]
    table["time a vertex, 4 million weights / 100 thousand"] = [per_vertex[6] / per_vertex[1]]


def stages_part(table: Table, pyg: Table) -> None:
    """A training step of the GCN, a request, an evaluation."""
    data, trainer = load_image_data(CONFIG.dataset, ROOT / "datasets"), Trainer(CONFIG.classifier, 0)
    train, classifier = data.train, trainer.train(data.train, 10)
    graphs = GraphGenerator(classifier, train, CONFIG.graphs, seed=0)
    few_steps = GCNTrainer(replace(CONFIG.gcn, steps=20), [graphs], CONFIG.eval.retain_weight, 0)
    table.time("training step of the GCN, ms", few_steps.train, 10, 1e3 / 20)
    config = load_config(overrides=["gcn.pretrained=true", "eval.group_size=100", "eval.methods=[mimu]"])
    graphs, gcn = GraphGenerator(classifier, train, config.graphs, seed=0), TrainedGCN.load().gcn
    about, digits = {"top_k": 2048, "seed": 0, "requested_kappa": 200}, itertools.cycle(range(10))
    request = Request(config.eval, classifier, trainer, train, graphs, gcn, forget_class=9, **about)

    def request_to_mask() -> None:
        auto = replace(request, forget_class=next(digits), requested_kappa="auto", prunings={})
        auto.in_steps("mimu", gcn=gcn)

    table.time("request, pretrained GCN to mask, kappa auto, ten digits in turn, ms", request_to_mask, 10)
    request.in_steps("mimu", gcn=gcn)
    with tempfile.TemporaryDirectory() as folder:
        metrics, mask = (Artifact(Path(folder) / name, {}) for name in ("metrics.json", "mask.pt"))
        evaluate = lambda: Eval(request, data, metrics, mask, {"seconds": {}}, {}).eval()  # noqa: E731
        table.time("evaluation of a mask: all metrics, JSON, ms", evaluate, 20)


# The memory of growth is measured before another part leaves memory that is kept.
PARTS = {"pyg": pyg_part, "growth": growth_part, "gcn": gcn_part, "graphs": graphs_part, "stages": stages_part}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    choices = [name for name in PARTS if name != "pyg"]
    parser.add_argument("--only", nargs="+", choices=choices, default=choices, help="the parts to run")
    only = parser.parse_args().only
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "torch-geometric", "torchvision", "numpy"))
    cpus = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []  # of Linux
    names = [line.partition(": ")[2] for line in cpus if line.startswith("model name")] or [platform.machine()]
    threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    print(f"{names[0]}, {threads}; Python {platform.python_version()}, {packages}")
    tables = {name: Table() for name in PARTS}
    for name, part in PARTS.items():
        if name in only or (name == "pyg" and "gcn" in only):
            if name != "pyg":
                keep_freed_memory()
            part(tables[name], tables["pyg"])
            print(f"\n{part.__doc__}\n\n{tables[name]}", flush=True)


if __name__ == "__main__":
    main()
