"""Times the parts of the project against the plain ways to do the same, and shows how cost grows with the classifier.

Run it with `uv run tests/benchmark.py`; `--only gcn growth` runs some parts, `--quick` all in less than a minute.
One process, a warm-up before each measurement, medians of several runs. Compare ratios, not machines.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import io
import json
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch_geometric.data import Data
from torch_geometric.nn import SAGEConv

from mimu.configs import Config, load_config, load_variants
from mimu.data import GraphGenerator, Split, load_image_data, number_of_weights
from mimu.eval import Eval, Request
from mimu.main import run
from mimu.masking.order import ZeroingOrder
from mimu.masking.rankings import GCNRanking, TrainedGCN
from mimu.model import HookedMNISTClassifier, MaskingGCN, WeightGraph, keep_freed_memory
from mimu.reporter import markdown_table
from mimu.runs.files import Artifact, save, write_text
from mimu.runs.work import peak_bytes
from mimu.trainer import GCNTrainer, Trainer

ROOT = Path(__file__).resolve().parents[1]
warnings.filterwarnings("ignore", category=FutureWarning)
warnings.filterwarnings("ignore", message="Sparse")


@dataclasses.dataclass(frozen=True)
class Measurement:
    """A figure: the median of several runs, and the smallest and the largest; or one number."""

    what: str
    median: float
    low: float | None = None
    high: float | None = None

    def row(self) -> list[str]:
        spread = "" if self.low is None else f"{self.low:.3g} to {self.high:.3g}"
        return [self.what, f"{self.median:,.0f}" if self.median >= 1000 else f"{self.median:.3g}", spread]


Results = dict[str, dict[str, Measurement]]


def timed(what: str, work: Callable[[], object], runs: int, scale: float = 1e3) -> Measurement:
    """Wall time of one run in milliseconds, or in other units by `scale` a second, after a warm-up."""
    for _ in range(max(1, runs // 10)):
        work()
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        work()
        times.append(scale * (time.perf_counter() - started))
    return Measurement(what, statistics.median(times), min(times), max(times))


class PlainGCN(nn.Module):
    """The masking GCN with PyG's SAGEConv, on an edge list or a CSR adjacency: the same parameters, the same scores."""

    def __init__(self, gcn: MaskingGCN) -> None:
        super().__init__()
        shapes = [conv.lin_l.weight.shape for conv in gcn.convs]
        self.convs = nn.ModuleList(SAGEConv(n, m, bias=False) for m, n in shapes)
        self.readout = nn.Linear(gcn.readout.in_features, 1, bias=False)
        self.load_state_dict(gcn.state_dict())

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        for index, conv in enumerate(self.convs):
            x = conv(x, edges)
            if index > 0:
                x = x.relu()
        return self.readout(x).squeeze(-1)  # (vertices)


def default_gcn(config: Config) -> MaskingGCN:
    torch.manual_seed(0)
    return MaskingGCN(config.graphs.num_features, config.gcn.hidden, config.gcn.rounds)


def forward_and_backward(gcn: nn.Module, x: Tensor, graph: object) -> Callable[[], None]:
    def work() -> None:
        gcn.zero_grad()
        gcn(x, graph).sum().backward()

    return work


def needed_operations(gcn: MaskingGCN, graph: WeightGraph) -> int:
    """Additions and multiplications, forward and backward, on the vertices of a graph: three rounds, two products.

    The first round and the second are one product; nothing asks for the gradient of the features.
    """
    features, hidden = gcn.convs[0].lin_l.in_features, gcn.readout.in_features
    forward = features * hidden + hidden * hidden + hidden
    backward = features * hidden + 2 * hidden * hidden + 2 * hidden
    return 2 * graph.num_vertices * (forward + backward)


def on_edges(config: Config) -> tuple[WeightGraph, MaskingGCN, Tensor, dict[str, Tensor]]:
    """A 64x128 graph, the default GCN, vertex features, and the edges in the ways in which PyG takes them."""
    graph, gcn = WeightGraph.of(HookedMNISTClassifier((), 128, 64), 0), default_gcn(config)
    x, edges = torch.randn(1, graph.num_vertices, config.graphs.num_features), graph.edge_index()
    adjacency = torch.sparse_coo_tensor(edges, torch.ones(edges.shape[1]), [graph.num_vertices] * 2)
    return graph, gcn, x, {"edge list": edges, "CSR sparse product": adjacency.to_sparse_csr()}


def pyg_part(config: Config, quick: bool, results: Results) -> Iterator[Measurement]:
    """PyG's SAGEConv with memory managed as PyTorch comes: the default GCN, forward and backward on a 64x128 graph."""
    _, gcn, x, ways = on_edges(config)
    for name, edges in ways.items():
        yield timed(f"{name}, ms", forward_and_backward(PlainGCN(gcn), x[0], edges), 3 if quick else 9)


def gcn_part(config: Config, quick: bool, results: Results) -> Iterator[Measurement]:
    """The same with the closed form beside it, in a process that keeps its freed memory, as a run does."""
    graph, gcn, x, ways = on_edges(config)
    slow = list(pyg_part(config, quick, results))
    closed = timed("closed form, ms", forward_and_backward(gcn, x, graph), 100 if quick else 300)
    a, b = torch.randn(2, 2048, 2048).unbind()
    product = timed("product of two 2048x2048 matrices, ms", lambda: a @ b, 5 if quick else 20)
    rate, reached = 2 * 2048**3 / product.median / 1e6, needed_operations(gcn, graph) / closed.median / 1e6
    yield from (*slow, closed)
    for name, measured in zip(ways, slow):
        as_it_comes = results["pyg"][measured.what].median
        yield Measurement(f"{name} as PyTorch comes / closed form", as_it_comes / closed.median)
        yield Measurement(f"{name} / closed form", measured.median / closed.median)
    with torch.no_grad():
        outputs = {name: PlainGCN(gcn)(x[0], edges) for name, edges in ways.items()}
        expected = outputs.pop("edge list")
        outputs["closed form"] = gcn(x, graph)[0]
    for name, output in outputs.items():
        difference = (output - expected).abs().max().item()
        yield Measurement(f"{name}, largest difference of outputs to the edge list", difference)
    yield Measurement("rate of large matrix products, GFLOP/s", rate)
    yield Measurement("rate of the closed form, GFLOP/s", reached)
    yield Measurement("share of the rate of large products, %", 100 * reached / rate)


def one_sample_at_a_time(classifier: HookedMNISTClassifier, samples: Split, layer: int) -> list[Data]:
    """Activation graphs as they were published: a pass per sample, and its four features kept for every vertex."""
    classifier = copy.deepcopy(classifier)
    weight = classifier.layers[layer].weight
    graphs = []
    for image, label in DataLoader(TensorDataset(samples.images, samples.labels), batch_size=1):
        seen = {}
        hook = classifier.layers[layer].register_forward_hook(
            lambda _, inputs, output, seen=seen: seen.update(source=inputs[0], target=output.relu())
        )
        classifier.zero_grad()
        F.cross_entropy(classifier(image), label).backward()
        hook.remove()
        source, target = seen["source"].detach().expand_as(weight), seen["target"].detach().T.expand_as(weight)
        features = torch.stack([source, target, weight.detach(), weight.grad], -1).flatten(0, 1)
        graphs.append(Data(x=features, y=label))
    return graphs


def graphs_part(config: Config, quick: bool, results: Results) -> Iterator[Measurement]:
    """Activation graphs of the 64x128 layer: one sample at a time against all samples in one batch."""
    train = load_image_data(config.dataset, ROOT / "datasets").train
    torch.manual_seed(0)
    classifier = HookedMNISTClassifier(config.classifier.hidden_sizes)
    count = 100 if quick else 500
    some = Split(train.images[:count], train.labels[:count])
    graphs = GraphGenerator(classifier, train, config.graphs, seed=0)
    layer = graphs.graph.layers[0]
    runs = (3, 5) if quick else (5, 20)
    one_by_one = "one sample at a time, ms a sample"
    slow = timed(one_by_one, lambda: one_sample_at_a_time(classifier, some, layer), runs[0], 1e3 / count)
    in_one = f"{len(graphs):,} samples in one batch, ms a sample"
    fast = timed(
        in_one, lambda: GraphGenerator(classifier, train, config.graphs, 0).records, runs[1], 1e3 / len(graphs)
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graphs.pt"
        save(path, graphs.recorded())
        recorded = path.stat().st_size / len(graphs)
        torch.save(torch.stack([graph.x for graph in one_sample_at_a_time(classifier, some, layer)]), path)
        of_vertices = path.stat().st_size / count
    yield from (slow, fast)
    yield Measurement("one sample at a time / in one batch", slow.median / fast.median)
    yield Measurement("samples a second, one at a time", 1e3 / slow.median)
    yield Measurement("samples a second, in one batch", 1e3 / fast.median)
    yield Measurement("bytes a sample, four features of every vertex", of_vertices)
    yield Measurement("bytes a sample, what the batch recorded", recorded)
    yield Measurement("features of every vertex / recorded", of_vertices / recorded)


def growth_part(config: Config, quick: bool, results: Results) -> Iterator[Measurement]:
    """The closed form with all layers masked, on classifiers of 784-128-64-10 scaled up and down."""
    per_vertex = {}
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here, where the system allows it (Linux)
    held = peak_bytes() / 1e9
    yield Measurement("GB that the process holds before, with all that it has imported", held)
    for scale in (0.27, 0.5, 1, 2, 3.5, 6):
        sizes = [round(scale * size) for size in (784, 128, 64)] + [10]
        graph = WeightGraph.of(HookedMNISTClassifier(sizes[1:3], sizes[0]), None)
        x = torch.randn(1, graph.num_vertices, config.graphs.num_features)
        runs = max(3, (2 if quick else 10) * 10**5 // graph.num_vertices)
        name = f"{'-'.join(map(str, sizes))}, {graph.num_vertices:,} weights"
        measured = timed(f"{name}, ms", forward_and_backward(default_gcn(config), x, graph), min(runs, 100))
        per_vertex[graph.num_vertices] = 1e6 * measured.median / graph.num_vertices
        yield measured
        yield Measurement(f"{name}, ns a vertex", per_vertex[graph.num_vertices])
        yield Measurement(f"{name}, GB more at most", peak_bytes() / 1e9 - held)
    (from_100k, *_, to_4m) = [taken for size, taken in sorted(per_vertex.items()) if size > 100_000]
    yield Measurement("time a vertex, 4 million weights / 100 thousand", to_4m / from_100k)


def stages_part(config: Config, quick: bool, results: Results) -> Iterator[Measurement]:
    """A training step of the GCN, a request, an evaluation; and the stages of the default run."""
    data = load_image_data(config.dataset, ROOT / "datasets")
    trainer = Trainer(config.classifier, 0)
    classifier = trainer.train(data.train, 10)
    graphs = GraphGenerator(classifier, data.train, config.graphs, seed=0)
    top_k = number_of_weights(config.sweep.top_k[0], graphs.graph.num_vertices)
    few = GCNTrainer(dataclasses.replace(config.gcn, steps=20, warmup=2), [graphs], top_k, 0)
    yield timed("training step of the GCN, ms", few.train, 3 if quick else 10, 1e3 / 20)
    gcn, asks = TrainedGCN.load().gcn, load_config(overrides=["gcn.pretrained=true", "eval.group_size=100"])
    graphs = GraphGenerator(classifier, data.train, asks.graphs, seed=0)
    digits = iter(range(10**6))

    def request_to_mask() -> None:
        digit = next(digits) % 10
        order = ZeroingOrder(asks.eval, graphs, digit, GCNRanking(asks.eval, graphs, digit, 0, gcn, top_k))
        order.until_forgotten(data.train.forget(digit))

    yield timed("request, pretrained GCN to mask, kappa auto, ten digits in turn, ms", request_to_mask, 10)
    mimu_alone = dataclasses.replace(asks.eval, methods=("mimu",))
    request = Request(mimu_alone, classifier, trainer, data.train, graphs, gcn, 9, top_k, 0, asked=200)
    request.in_steps("mimu", request.ranking)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        metrics, mask = Artifact(folder / "metrics.json", {}), Artifact(folder / "mask.pt", {})
        yield timed(
            "evaluation of a mask: all metrics, JSON, ms",
            lambda: Eval(request, data, metrics, mask, {"seconds": {}}, {}).eval(),
            5 if quick else 20,
        )
        less = ["gcn.steps=40", "sweep.kappa=[auto, 300]"] if quick else []
        (folder / "datasets").mkdir()
        (folder / "datasets" / "MNIST").symlink_to(ROOT / "datasets" / "MNIST")
        started = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            run(load_variants(overrides=less), folder)
        total = time.perf_counter() - started
        summary = json.loads((folder / "reports" / "run.json").read_text())
    command = " ".join(["main.py", *less])
    for stage, seconds in summary["seconds"].items():
        yield Measurement(f"`{command}`, {stage}, s", seconds)
    yield Measurement(f"`{command}`, all but the imports, s", total)


# In this order: before growth, whose memory is measured, nothing may have left memory that is kept.
PARTS: dict[str, Callable[[Config, bool, Results], Iterator[Measurement]]] = {
    "pyg": pyg_part,
    "growth": growth_part,
    "gcn": gcn_part,
    "graphs": graphs_part,
    "stages": stages_part,
}


def processor() -> str:
    """The name of the processor, where the system tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    choices = [name for name in PARTS if name != "pyg"]
    parser.add_argument("--only", nargs="+", choices=choices, default=choices, help="the parts to run")
    parser.add_argument("--quick", action="store_true", help="fewer runs: everything in less than a minute")
    arguments = parser.parse_args()
    versions = {name: version(name) for name in ("torch", "torch-geometric", "torchvision", "numpy")}
    packages = ", ".join(f"{name} {number}" for name, number in versions.items())
    head: dict[str, Any] = {"processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    head |= {"python": platform.python_version(), "packages": versions, "quick": arguments.quick}
    print(f"{head['processor']}, {head['cores']} cores, {head['threads']} threads; Python {head['python']}, {packages}")
    results: Results = {}
    for name in [name for name in PARTS if name in arguments.only or (name == "pyg" and "gcn" in arguments.only)]:
        if name != "pyg":
            keep_freed_memory()
        results[name] = {each.what: each for each in PARTS[name](load_config(), arguments.quick, results)}
        print(f"\n{PARTS[name].__doc__}\n")
        rows = map(Measurement.row, results[name].values())
        print(markdown_table(["what", "median", "smallest to largest"], rows), flush=True)
    measured = {
        name: {each.what: dataclasses.astuple(each)[1:] for each in part.values()} for name, part in results.items()
    }
    write_text(ROOT / "reports" / "benchmark.json", json.dumps(head | measured, indent=1))


if __name__ == "__main__":
    main()
