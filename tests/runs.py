"""Runs of the smoke config in a folder of their own, and what they leave there."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import torch

import pipeline
from config import load_variants

PROJECT = Path(__file__).resolve().parents[1]
SMOKE = ("--config", "configs/smoke.yaml")
QUICK = ("eval.visualize=false", "sweep.forget_digits=[3]")


def run(folder: Path, *arguments: str, status: int = 0) -> str:
    done = subprocess.run([sys.executable, "main.py", *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def run_here(folder: Path, *overrides: str) -> None:
    """The same as `run`, without the seconds that importing PyTorch takes."""
    threads = torch.get_num_threads()
    try:
        pipeline.run(load_variants(PROJECT / SMOKE[1], ["eval.visualize=false", *overrides]), folder)
    finally:
        torch.set_num_threads(threads)


def files(folder: Path) -> dict[str, str]:
    """Path to content of every file, but for Python's own."""
    paths = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def metrics(folder: Path) -> dict[str, dict]:
    results = {path.name: json.loads(path.read_text()) for path in folder.glob("eval/*/metrics/*.json")}
    for result in results.values():
        del result["seconds"], result["checksum"]
    return results


def checkpoint(folder: Path, name: str) -> dict:
    """The only checkpoint whose name begins so."""
    (path,) = folder.glob(f"checkpoints/{name}_*.pt")
    return torch.load(path, weights_only=True)


def replace_once(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {path.name}"
    path.write_text(text.replace(old, new))


def torchrun(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "main.py", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)
