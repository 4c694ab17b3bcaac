"""Says which weights of which networks can be masked, for docs/coverage.md: every family that people use, untrained.

`uv run --with timm --with transformers docs/coverage.py`; an hour, nothing is downloaded but these two packages. With
names of networks, as `timm/levit_128s`, it prints what it finds of them and writes nothing.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import timm
import torch
import torchvision
import transformers
from build import write_block
from torch import Tensor, nn
from torch_geometric.nn import GCNConv
from tqdm import tqdm

from mimu.tracing import HookedClassifier
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
COMPUTED, UNREACHED = "what the layer reads is computed from it", "no sample reaches it, positions alone"


class Bert(nn.Module):
    """transformers' BERT, two layers of it: tokens (batch, words) to logits (batch, 10)."""

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
    """An LSTM, a linear layer on what it ends with: (batch, time, 8) to (batch, 10)."""

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


OTHERS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "transformers' BERT": lambda: (Bert(), torch.randint(100, (2, 12))),
    "nn.TransformerEncoder": lambda: (Encoder(), torch.randn(2, 12, 16)),
    "LSTM": lambda: (Recurrent(), torch.randn(2, 12, 8)),
    "1-D CNN": lambda: (conv1d(), torch.randn(2, 3, 64)),
    "PyG's GCN on nodes": lambda: (OnNodes(12), torch.randn(12, 8)),
}


class Network(NamedTuple):
    """One to be looked into: `torchvision/vgg/vgg11`, `timm/levit_128s`, `other/LSTM`."""

    name: str

    @property
    def family(self) -> str:
        """The row that it stands in."""
        return self.name.rpartition("/")[0] if self.name.startswith("torchvision/") else self.name

    def built(self) -> tuple[nn.Module, Tensor]:
        """The network in evaluation mode, and an example for it."""
        library, _, rest = self.name.partition("/")
        if library == "other":
            network, example = OTHERS[rest]()
            return network.eval(), example
        if library == "timm":
            network = timm.create_model(rest, pretrained=False)
            return network.eval(), torch.rand(2, *network.default_cfg["input_size"])
        model = rest.rpartition("/")[2]
        given = {"init_weights": False} if model in ("googlenet", "inception_v3") else {}
        side = 299 if model == "inception_v3" else 224
        return torchvision.models.get_model(model, weights=None, **given).eval(), torch.rand(2, 3, side, side)


def networks() -> list[Network]:
    found = []
    for name in torchvision.models.list_models(module=torchvision.models):
        family = torchvision.models.get_model_builder(name).__module__.rpartition(".")[2]
        found.append(Network(f"torchvision/{family}/{name}"))
    return sorted(found) + [Network(f"timm/{name}") for name in TIMM] + [Network(f"other/{name}") for name in OTHERS]


def weights_of(network: nn.Module, example: Tensor) -> dict[str, str]:
    """The parameters that linear operations and convolutions read, or modules of these have that are called.

    Each with why it might be left out: "" where the operation is given something of the samples.
    """
    names, called = {id(parameter): name for name, parameter in network.named_parameters()}, set()

    def note(module: nn.Module, *_: Any) -> None:
        called.add(names.get(id(module.weight)))

    hooks = [each.register_forward_hook(note) for each in network.modules() if isinstance(each, LAYERS)]
    network(example)
    for hook in hooks:
        hook.remove()
    found = dict.fromkeys(called, COMPUTED)
    try:
        exported = torch.export.export(network, (example,), strict=False)
    except Exception as error:  # of a model that cannot be
        print(f"the modules alone are counted: {type(error).__name__}", file=sys.stderr)
        return {name: found[name] for name in names.values() if name in found}
    signature, of_samples = exported.graph_signature, set()
    for node in exported.graph.nodes:
        if node.name in signature.user_inputs or not of_samples.isdisjoint(node.all_input_nodes):
            of_samples.add(node)
        if getattr(node.target, "overloadpacket", None) in OPERATIONS:
            name = signature.inputs_to_parameters.get(node.args[1].name)
            found[name] = "" if node in of_samples else UNREACHED
    return {name: found[name] for name in names.values() if name in found}


def looked_into(network: Network) -> dict[str, Any]:
    """What can be masked, what there is, seconds and gigabytes; why where it cannot be exported."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, example = network.built()
    started, can_be, failure = time.perf_counter(), [], ""
    try:
        can_be = HookedClassifier(model, example).names
    except Exception as error:  # of a model of somebody else's
        failure = f"{type(error).__name__}: {error}".partition("\n")[0]
    found = {"failure": failure, "seconds": time.perf_counter() - started}
    found["gigabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    there_are = weights_of(model, example)
    excluded_classes = {name: why for name, why in there_are.items() if name not in can_be}
    return found | {"weights": len(there_are), "left out": excluded_classes}


def in_own_process(network: Network) -> dict[str, Any]:
    """The same, so that its memory is its own."""
    command = [sys.executable, __file__, "--one", network.name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        weights = {"weights": 0, "left out": {}}
        return {"failure": f"ended with {done.returncode}", "seconds": 0.0, "gigabytes": 0.0} | weights
    return json.loads(done.stdout.splitlines()[-1])


def row_of(label: str, found: Sequence[dict[str, Any]]) -> list[str]:
    """A row of the table: of the networks of one family, or of a library."""
    weights = sum(each["weights"] for each in found)
    excluded_classes = sum(len(each["left out"]) for each in found)
    return [
        label,
        f"{sum(not each['failure'] for each in found)} / {len(found)}",
        f"{weights - excluded_classes} / {weights}",
        str(sum([*each["left out"].values()].count(UNREACHED) for each in found)),
        f"{max(each['seconds'] for each in found):.1f}",
        f"{max(each['gigabytes'] for each in found):.1f}",
    ]


def content(found: dict[Network, dict[str, Any]]) -> str:
    """A table of the libraries and the families, then what cannot be masked."""
    rows, said = [], []
    for library in ("torchvision", "timm"):
        rows.append(row_of(f"{library}, all", [found[each] for each in found if each.name.startswith(f"{library}/")]))
    for family in dict.fromkeys(network.family for network in found):
        rows.append(row_of(family.removeprefix("other/"), [found[each] for each in found if each.family == family]))
    for network, each in found.items():
        if each["failure"]:
            said.append(f"- {network.name}: {each['failure']}")
            continue
        for why in dict.fromkeys(each["left out"].values()):
            names = [f"`{name}`" for name, its in each["left out"].items() if its == why]
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            said.append(f"- {network.name}: {names[0]}{others}: {why or 'for another reason'}")
    columns = ["networks", "exported", "weights that can be masked", "without samples", "seconds", "GB"]
    return "\n\n".join([markdown_table(columns, rows), "Not exported, or not masked:", "\n".join(said or ["- none"])])


def main(arguments: Sequence[str]) -> None:
    warnings.simplefilter("ignore")  # of the packages
    if arguments[:1] == ["--one"]:
        print(json.dumps(looked_into(Network(arguments[1]))))
        return
    found = {}
    for network in tqdm([*map(Network, arguments)] or networks()):
        found[network] = in_own_process(network)
        tqdm.write(f"{network.name}: {found[network]}")
    if not arguments:
        write_block("coverage", content(found))


if __name__ == "__main__":
    main(sys.argv[1:])
