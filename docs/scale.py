"""What a request costs as the network grows: `uv run docs/scale.py`; it writes docs/scale.md.

With a network, its image size, the number of classes, the samples of each and a request, as in
`uv run docs/scale.py resnet18 32 10 25 mask`, it measures that request in this process.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections import Counter
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from build import write_block
from torch import Tensor, nn

from data import GraphGenerator
from mimu import erasing, unlearn
from mimu import inputs as custom_model
from mimu import unlearning as forgetting
from mimu.pruning import Pruning
from mimu.tracing import Trace
from reporter import markdown_table

SMALL = [("resnet18", 32, classes, count) for classes, count in ((10, 10), (10, 25), (10, 250), (100, 25), (100, 250))]
LARGE = [(network, 224, 10, 25) for network in ("resnet18", "resnet50", "vit_b_16")]
MEASURED = {"mask": SMALL + LARGE, "erase": SMALL + LARGE, "erase_all": SMALL[1:2]}  # the last edits all late layers
NOISE = 0.5  # standard deviation of samples around their class's image, whose pixels have 1
FITTED = 2  # samples of a class that the last layer is fitted to
SCALE, RIDGE = 10.0, 0.01  # of its logits, and of its regression
PARTS = [(Trace, "__init__"), (custom_model, "run_on_few"), (custom_model, "exported")]
PARTS += [
    (custom_model.CustomModel, "of"),
    (custom_model, "prefix_outputs"),
    (forgetting.Forgetting, "made"),
    (GraphGenerator, "__post_init__"),
]
PARTS += [(Pruning, "first"), (Pruning, "answer"), (forgetting, "erase_class"), (erasing.Edit, "train")]


def measure(owner: Any, name: str, seconds: Counter[str], answers: dict[str, list[Any]]) -> None:
    """Notes the CPU seconds of a function, those of what it calls included, and what it answers."""
    function = getattr(owner, name)

    def measured(*arguments: Any, **named: Any) -> Any:
        started = time.process_time()
        answer = function(*arguments, **named)
        seconds[name] += time.process_time() - started
        answers.setdefault(name, []).append(answer)
        return answer

    setattr(owner, name, measured)


def samples_of(images: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """So many noisy samples around the image of each class, (classes * count, 3, size, size), and their labels."""
    labels = torch.arange(len(images)).repeat_interleave(count)
    return torch.randn(len(labels), *images.shape[1:]).mul_(NOISE).add_(images[labels]), labels


@torch.no_grad()
def fit_last_layer(model: nn.Module, inputs: Tensor, labels: Tensor) -> None:
    """Ridge regression of the classes on the features that the last layer is given, without a bias."""
    given: list[Tensor] = []
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    watch = last.register_forward_pre_hook(lambda _, arguments: given.append(arguments[0].double()))
    for part in inputs.split(10):
        model(part)
    watch.remove()
    features = torch.cat(given)
    scale = features.std(0).mean()
    z = features / scale
    classes, penalty = F.one_hot(labels).double(), RIDGE * z.shape[1] * torch.eye(len(z))
    last.weight.copy_(SCALE * (classes - classes.mean(0)).T @ torch.linalg.solve(z @ z.T + penalty, z))
    last.weight.div_(scale)
    last.bias.zero_()


def cost_of(network: str, size: int, classes: int, count: int, request: str) -> dict[str, float]:
    """A request in this process on random weights: CPU seconds by part, the most memory in GB, millions of numbers."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = getattr(torchvision.models, network)(num_classes=classes).eval()
    images = F.interpolate(torch.randn(classes, 3, 4, 4), size)
    fit_last_layer(model, *samples_of(images, FITTED))
    samples, seconds, answers = samples_of(images, count), Counter(), {}
    for owner, name in PARTS:
        measure(owner, name, seconds, answers)
    # What is left in random weights says nothing: one edit, or all of them.
    erasing.RecoveredInformation.is_at_target = property(lambda _: request == "erase")
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    unlearn(model, *samples, 0, erase=request != "mask", max_fall=None, max_class_fall=None)
    total, custom = time.process_time() - started, answers["of"][0]
    return {
        "parameters, M": sum(each.numel() for each in model.parameters()) / 1e6,
        "weights, M": sum(prod(custom.classifier.shapes[layer]) for layer in custom.masked) / 1e6,
        "held, M": custom.cached_inputs.numel() / 1e6,
        "masks made": len(answers["made"]),
        "weights zeroed": answers["made"][-1].way[-1].num_zeroed,
        "export, s": seconds["__init__"],
        "try, s": seconds["run_on_few"] + seconds["exported"] - seconds["__init__"],
        "network, s": seconds["prefix_outputs"],
        "record, s": seconds["__post_init__"] + seconds["first"] + seconds["erase_class"] - seconds["train"],
        "steps, s": seconds["answer"] - seconds["first"] + seconds["train"],
        "all, s": total,
        "GB before": before * 1024 / 1e9,
        "GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    }


def main() -> None:
    content = []
    for request, rows in MEASURED.items():
        written = []
        for about in rows:
            command = [sys.executable, __file__, *map(str, about), request]
            found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            written.append([*about, *(f"{value:.3g}" for value in found.values())])
            print(*about, request, found, flush=True)
        table = markdown_table(["network", "size", "classes", "samples of each", *found], written)
        content.append(f"`{request}`:\n\n{table}")
    write_block("scale", "\n\n".join(content))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        network, size, classes, count, request = sys.argv[1:]
        print(json.dumps(cost_of(network, int(size), int(classes), int(count), request)))
    else:
        main()
