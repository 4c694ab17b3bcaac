"""Runs of the smoke config in a folder of their own, and what they leave there."""

import gzip
import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from data import FILES

PROJECT = Path(__file__).resolve().parents[1]
SMOKE = PROJECT / "configs" / "smoke.yaml"
TINY = ("sweep.forget_digits=[3]", "sweep.kappa=[20]", "gcn.steps=2", "eval.methods=[original, mimu, retrain]")


def run_here(folder: Path, *overrides: str, configs: dict | None = None, is_fresh: bool = False) -> None:
    """Runs the smoke config, or others, in this process, which has imported PyTorch."""
    import main

    threads = torch.get_num_threads()
    try:
        main.run(configs or smoke(*overrides), folder, is_fresh=is_fresh)
    finally:
        torch.set_num_threads(threads)


def smoke(*overrides: str) -> dict:
    from experiment.config import load_variants

    return load_variants(SMOKE, ["eval.visualize=false", *overrides])


def write_few(folder: Path, count: int = 2000) -> Path:
    """MNIST as torchvision unpacks it, of the first samples of each split only; returns where its files are."""
    raw = folder / "datasets" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in FILES:
        head, size = (16, 28 * 28) if "images" in name else (8, 1)
        with gzip.open(PROJECT / "datasets" / "MNIST" / "raw" / f"{name}.gz") as file:
            content = file.read(head + count * size)
        (raw / name).write_bytes(content[:4] + count.to_bytes(4, "big") + content[8:])
    return raw


def write_image(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def files(folder: Path) -> dict[str, str]:
    """Path to the hash of the content of every file, but for Python's own."""
    paths = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def metrics(folder: Path) -> dict[str, dict]:
    """The JSON of every experiment, without what varies from run to run."""
    results = {path.name: json.loads(path.read_text()) for path in folder.glob("eval/*/metrics/*.json")}
    for result in results.values():
        del result["seconds"], result["checksum"]
    return results


def checkpoint(folder: Path, name: str) -> dict:
    """The only checkpoint whose name begins so."""
    (path,) = folder.glob(f"checkpoints/{name}_*.pt")
    return torch.load(path, weights_only=True)


def draw_nothing(monkeypatch) -> None:
    """Pictures are empty from here on, so that a run takes no time."""
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **options: file.write(b"a picture"))
