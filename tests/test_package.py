"""The package as people install it: what the wheel holds, and that it works beside files named as its own are."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import copy_to
from running import files

TRACKED = ("*.py", "*/*.py", "configs/*.yaml", "checkpoints/pretrained/*.pt", "datasets/MNIST/raw/*.gz", "docs/*.md",
           "pyproject.toml", "README.md")  # fmt: skip
# What people have in their folders, too, and what would be imported if it were looked for there.
NAMED_ALIKE = ("model.py", "data.py", "eval.py", "trainer.py", "main.py", "configs/__init__.py", "runs/__init__.py")
BUILD = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"  # as pip asks for it
FORGET = """
import sys
import mimu
assert mimu.__file__ == sys.argv[1] + "/mimu/__init__.py", mimu.__file__
assert "torch" not in sys.modules, "import mimu takes seconds"

import torch
from torch import nn
from mimu import Mask, unlearn
torch.manual_seed(0)
labels = torch.arange(3).repeat(100)
inputs = torch.randn(300, 7) + 4 * torch.eye(3, 7)[labels]
model = nn.Sequential(nn.Linear(7, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))
optimizer = torch.optim.Adam(model.parameters(), 0.03)
for _ in range(50):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(inputs), labels).backward()
    optimizer.step()

def scores():
    is_correct = model(inputs).argmax(1) == labels
    return [is_correct[labels == label].float().mean().item() for label in range(3)]

assert min(scores()) > 0.9
unlearn(model, inputs, labels, 1, mask_layer=-1).save("mask.pt")
mask = Mask.load("mask.pt")
mask.apply(model)
assert mask.num_zeroed and mask.forgets == (1,)
assert scores()[1] < 0.05 and min(scores()[0], scores()[2]) > 0.9
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    clone = copy_to(folder / "clone", *TRACKED)
    subprocess.run([sys.executable, "-c", BUILD, str(folder)], cwd=clone, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel) -> Path:
    folder = wheel.parent / "installed"
    pip = ["uv", "pip"] if shutil.which("uv") else [sys.executable, "-m", "pip"]
    options = ["--no-deps", "--no-index", "--no-cache-dir", "--target", str(folder)]
    subprocess.run([*pip, "install", *options, str(wheel)], check=True, capture_output=True)
    return folder


@pytest.fixture
def of_others(tmp_path, monkeypatch) -> Path:
    """The current folder of processes to come; its files are named as the package's own, and cannot be imported."""
    for name in NAMED_ALIKE:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"raise ImportError('{name} of the current folder')\n")
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nobody listens: no internet
    return tmp_path


def python(folder: Path, installed: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(installed)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=100)


def test_the_wheel_holds_all_of_the_package_and_no_data_sets_tests_or_pages(wheel):
    clone = wheel.parent / "clone"
    expected = {path for path in files(clone) if path.endswith((".py", ".yaml", ".pt"))}
    expected = {path for path in expected if not path.startswith(("tests/", "docs/", "build/"))}
    assert {"main.py", "configs/config.yaml", "checkpoints/pretrained/gcn.pt", "methods/controls.py"} <= expected
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        assert sorted(names) == sorted(f"mimu/{path}" for path in expected)
        assert all(archive.read(f"mimu/{path}") == (clone / path).read_bytes() for path in expected)
    assert wheel.stat().st_size < 10**6


def test_a_custom_model_forgets_beside_files_named_as_those_of_the_package(installed, of_others):
    done = python(of_others, installed, "-c", FORGET, str(installed))
    assert done.returncode == 0, done.stderr


def test_runs_of_the_installed_package_leave_their_files_in_the_current_folder_alone(installed, of_others):
    package, current = files(installed), files(of_others)
    done = python(of_others, installed, "-m", "mimu.main", "--dry-run")
    assert done.returncode == 0 and "0 of 21 files are there" in done.stdout, done.stderr
    assert files(of_others) == current
    done = python(of_others, installed, "-m", "mimu.main")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: dataset MNIST in {of_others / 'datasets' / 'MNIST'}: ")
    assert done.returncode == 2
    assert files(of_others).keys() - current.keys() == {".lock", "reports/run.log"}
    assert files(installed) == package
