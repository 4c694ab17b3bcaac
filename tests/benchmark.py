"""Times the closed form against PyTorch Geometric's edge list, and activation graphs recorded in one batch.

Run it with `uv run tests/benchmark.py`. Medians of several runs in one process; compare ratios, not machines.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from config import load_config  # noqa: E402
from data import GraphGenerator, load_image_data  # noqa: E402
from model import HookedMNISTClassifier, MaskingGCN, WeightGraph, keep_freed_memory  # noqa: E402
from reporter import markdown_table  # noqa: E402


class EdgeListGCN(nn.Module):
    """The masking GCN with PyG's SAGEConv on an explicit edge list: the same parameters, the same scores."""

    def __init__(self, gcn: MaskingGCN) -> None:
        super().__init__()
        from torch_geometric.nn import SAGEConv

        self.convs = nn.ModuleList(
            SAGEConv(conv.lin_l.in_features, conv.lin_l.out_features, bias=False) for conv in gcn.convs
        )
        self.readout = nn.Linear(gcn.readout.in_features, 1, bias=False)
        self.load_state_dict(gcn.state_dict())

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        for index, conv in enumerate(self.convs):
            x = conv(x, edge_index)
            if index > 0:
                x = x.relu()
        return self.readout(x).squeeze(-1)  # (vertices)


def seconds(work: Callable[[], object], runs: int) -> float:
    """Median wall time of one run, after a warm-up."""
    work()
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def closed_form_against_edge_list() -> dict[str, float]:
    """Forward and backward pass of the default GCN on one 64x128 graph."""
    config = load_config()
    graph = WeightGraph([(64, 128)], 0)
    torch.manual_seed(0)
    gcn = MaskingGCN(config.graphs.num_features, config.gcn.hidden, config.gcn.rounds)
    edge_list = EdgeListGCN(gcn)
    edges = graph.edge_index()
    x = torch.randn(1, graph.num_vertices, config.graphs.num_features)
    difference = (gcn(x, graph)[0] - edge_list(x[0], edges)).abs().max().item()

    def ours() -> None:
        gcn.zero_grad()
        gcn(x, graph).sum().backward()

    def theirs() -> None:
        edge_list.zero_grad()
        edge_list(x[0], edges).sum().backward()

    closed, listed = seconds(ours, runs=60), seconds(theirs, runs=5)
    return {
        "edge list, ms a graph": 1e3 * listed,
        "closed form, ms a graph": 1e3 * closed,
        "edge list / closed form": listed / closed,
        "largest difference of outputs": difference,
    }


def activation_graphs() -> dict[str, float]:
    """Recording 10,000 training samples in one batch, and their size on disk."""
    config = load_config()
    train = load_image_data(config.dataset).train
    torch.manual_seed(0)
    classifier = HookedMNISTClassifier(config.classifier.hidden_sizes)
    graphs = GraphGenerator(classifier, train, config.graphs, seed=0)
    taken = seconds(lambda: GraphGenerator(classifier, train, config.graphs, seed=0), runs=5)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graphs.pt"
        graphs.save(path)
        size = path.stat().st_size
    return {
        f"recording {len(graphs):,} samples, s": taken,
        "bytes a sample on disk": size / len(graphs),
    }


def main() -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    keep_freed_memory()
    results = closed_form_against_edge_list() | activation_graphs()
    (ROOT / "reports").mkdir(exist_ok=True)
    head = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    (ROOT / "reports" / "benchmark.json").write_text(json.dumps(head | results, indent=1))
    print(f"PyTorch {head['torch']}, {head['threads']} threads\n")
    print(markdown_table(["what", "measured"], [[name, f"{value:.4g}"] for name, value in results.items()]))


if __name__ == "__main__":
    main()
