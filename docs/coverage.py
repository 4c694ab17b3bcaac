"""Lists which weights can be masked of every family of networks that people use, untrained, for docs/coverage.md.

`uv run --with timm --with transformers docs/coverage.py` takes an hour, and downloads nothing but these two packages.
With names of networks, as in `docs/coverage.py timm/levit_128s`, it prints its findings and writes nothing.
"""

import resource
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn
from torch_geometric.nn import GCNConv
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from build import write_block

from mimu.hooked import HookedClassifier
from reporter import markdown_table

# One of each of forty families, a small one.
TIMM = (
    "vit_tiny_patch16_224", "deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256", "mixer_s32_224", "resmlp_12_224", "gmlp_ti16_224", "eva02_tiny_patch14_224",
    "beit_base_patch16_224", "cait_xxs24_224", "xcit_nano_12_p16_224", "mobilevit_xxs", "convit_tiny", "eca_nfnet_l0",
    "vgg11", "hiera_tiny_224", "levit_128s", "efficientformer_l1", "crossvit_9_240", "convnext_atto", "convnextv2_atto",
    "coatnet_nano_rw_224", "maxvit_nano_rw_256", "poolformer_s12", "pvt_v2_b0", "twins_svt_small", "tnt_s_patch16_224",
    "visformer_tiny", "volo_d1_224", "regnety_002", "resnext50_32x4d", "res2net50_14w_8s", "resnest14d", "dla46_c",
    "dpn48b", "efficientnet_b0", "mobilenetv3_small_050", "ghostnet_100", "hrnet_w18_small",
)  # fmt: skip
OPERATIONS = (torch.ops.aten.linear, torch.ops.aten.conv1d, torch.ops.aten.conv2d, torch.ops.aten.conv3d)
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
COMPUTED = "the layer reads something that is computed from it"
UNREACHED = "it reads positions, and nothing of a sample"


class Bert(nn.Module):
    """Two layers of transformers' BERT: tokens (batch, words) to logits (batch, 10)."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        config = transformers.BertConfig(vocab_size=100, num_labels=10, **sizes)
        self.bert = transformers.BertForSequenceClassification(config)

    def forward(self, words: Tensor) -> Tensor:
        return self.bert(input_ids=words).logits


class Encoder(nn.Module):
    """nn.TransformerEncoder, a linear layer on the mean of its tokens: (batch, tokens, 16) to (batch, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


class Recurrent(nn.Module):
    """An LSTM, and a linear layer on its last output: (batch, time, 8) to (batch, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class OnNodes(nn.Module):
    """PyG's GCN on the nodes of one graph, a ring: (nodes, 8) to (nodes, 10)."""

    def __init__(self, nodes: int) -> None:
        super().__init__()
        ring = torch.arange(nodes)
        self.register_buffer("edges", torch.stack([ring, ring.roll(1)]))
        self.first, self.second = GCNConv(8, 16), GCNConv(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x, self.edges).relu(), self.edges)


def conv1d() -> nn.Module:
    layers = nn.Conv1d(3, 8, 5), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(8, 16, 5), nn.ReLU()
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(16, 10))


SMALL: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "transformers' BERT": lambda: (Bert(), torch.randint(100, (2, 12))),
    "nn.TransformerEncoder": lambda: (Encoder(), torch.randn(2, 12, 16)),
    "LSTM": lambda: (Recurrent(), torch.randn(2, 12, 8)),
    "1-D CNN": lambda: (conv1d(), torch.randn(2, 3, 64)),
    "PyG's GCN on nodes": lambda: (OnNodes(12), torch.randn(12, 8)),
}


def build(name: str) -> tuple[nn.Module, Tensor]:
    """Builds a network in evaluation mode, and an example for it: `torchvision/vgg/vgg11`, `timm/...`, `other/LSTM`."""
    library, _, path = name.partition("/")
    if library == "other":
        network, example = SMALL[path]()
        return network.eval(), example
    if library == "timm":
        network = timm.create_model(path, pretrained=False)
        return network.eval(), torch.rand(2, *network.default_cfg["input_size"])
    model = path.rpartition("/")[2]
    options = {"init_weights": False} if model in ("googlenet", "inception_v3") else {}
    side = 299 if model == "inception_v3" else 224
    return torchvision.models.get_model(model, weights=None, **options).eval(), torch.rand(2, 3, side, side)


def family(name: str) -> str:
    """Returns the row of the table that a network belongs to."""
    return name.rpartition("/")[0] if name.startswith("torchvision/") else name.removeprefix("other/")


def all_networks() -> list[str]:
    names = []
    for model in torchvision.models.list_models(module=torchvision.models):
        module = torchvision.models.get_model_builder(model).__module__.rpartition(".")[2]
        names.append(f"torchvision/{module}/{model}")
    return sorted(names) + [f"timm/{model}" for model in TIMM] + [f"other/{model}" for model in SMALL]


def layer_weights(network: nn.Module, example: Tensor) -> dict[str, str]:
    """Finds the parameters of linear layers and convolutions that are called, and those that such operations read.

    Returns, for each, why it might be impossible to mask it; "" if the operation reads something of the samples.
    """
    names, called = {id(parameter): name for name, parameter in network.named_parameters()}, set()

    def note(module: nn.Module, *_: Any) -> None:
        called.add(names.get(id(module.weight)))

    hooks = [each.register_forward_hook(note) for each in network.modules() if isinstance(each, LAYERS)]
    network(example)
    for hook in hooks:
        hook.remove()
    reasons = dict.fromkeys(called, COMPUTED)
    exported = torch.export.export(network, (example,), strict=False)
    signature, depends_on_samples = exported.graph_signature, set()
    for node in exported.graph.nodes:
        if node.name in signature.user_inputs or not depends_on_samples.isdisjoint(node.all_input_nodes):
            depends_on_samples.add(node)
        if getattr(node.target, "overloadpacket", None) in OPERATIONS:
            name = signature.inputs_to_parameters.get(node.args[1].name)
            reasons[name] = "" if node in depends_on_samples else UNREACHED
    return {name: reasons[name] for name in names.values() if name in reasons}


def inspect(name: str) -> dict[str, Any]:
    """Returns how many weights there are, which cannot be masked and why, seconds, gigabytes, and any failure."""
    warnings.simplefilter("ignore")  # of the packages
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, example = build(name)
    started, maskable, failure = time.perf_counter(), [], ""
    try:
        maskable = HookedClassifier(model, example).names
    except Exception as error:  # a library may raise anything
        failure = f"{type(error).__name__}: {error}".partition("\n")[0]
    seconds, gigabytes = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    weights = {} if failure else layer_weights(model, example)
    unmaskable = {weight: reason for weight, reason in weights.items() if weight not in maskable}
    about = {"failure": failure, "seconds": seconds, "gigabytes": gigabytes}
    return about | {"weights": len(weights), "unmaskable": unmaskable}


def row(label: str, findings: Sequence[dict[str, Any]]) -> list[str]:
    """Summarises the networks of a family, or of a library."""
    weights, unmaskable = sum(each["weights"] for each in findings), []
    for each in findings:
        unmaskable += each["unmaskable"].values()
    return [
        label,
        f"{sum(not each['failure'] for each in findings)} / {len(findings)}",
        f"{weights - len(unmaskable)} / {weights}",
        str(unmaskable.count(UNREACHED)),
        f"{max(each['seconds'] for each in findings):.1f}",
        f"{max(each['gigabytes'] for each in findings):.1f}",
    ]


def is_complete(finding: dict[str, Any]) -> bool:
    return not finding["failure"] and not finding["unmaskable"]


def content(findings: dict[str, dict[str, Any]]) -> str:
    """Returns a table of the libraries and of the families with exceptions, the other families, and the exceptions."""
    rows, complete, notes = [], [], []
    for library in ("torchvision", "timm"):
        rows.append(row(f"{library}, all", [findings[name] for name in findings if name.startswith(f"{library}/")]))
    for label in dict.fromkeys(map(family, findings)):
        members = [findings[name] for name in findings if family(name) == label]
        if all(map(is_complete, members)):
            complete.append(label)
        else:
            rows.append(row(label, members))
    for name, each in findings.items():
        if each["failure"]:
            notes.append(f"- {name}: {each['failure']}")
        for reason in dict.fromkeys(each["unmaskable"].values()):
            if reason == UNREACHED:  # the table counts these
                continue
            weights = [weight for weight, its in each["unmaskable"].items() if its == reason]
            more = f" and {len(weights) - 1} more" if len(weights) > 1 else ""
            notes.append(f"- {name}: `{weights[0]}`{more}: {reason or 'another reason'}")
    columns = ["networks", "exported", "weights that can be masked", "positions only", "seconds", "GB"]
    names = f"All weights can be masked in {', '.join(complete)}."
    return "\n\n".join([markdown_table(columns, rows), names, "\n".join(notes)])


def main(names: Sequence[str]) -> None:
    findings = {}
    # Each network is inspected in a process of its own, so that the memory is the network's.
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as processes:
        inspected = names or all_networks()
        for name, finding in zip(inspected, tqdm(processes.map(inspect, inspected), total=len(inspected))):
            findings[name] = finding
            tqdm.write(f"{name}: {finding}")
    if not names:
        write_block("coverage", content(findings))


if __name__ == "__main__":
    main(sys.argv[1:])
