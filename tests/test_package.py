"""The library as people install it: what the wheel holds, what it imports, and that it works where little else is."""

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import copy_to
from running import PROJECT

DEPENDENCIES = {"torch", "numpy", "tqdm", "yaml"}  # of the library; PyTorch brings more of its own
ABSENT = ("torch_geometric", "torchvision", "matplotlib", "PIL", "pydantic", "pandas", "sklearn", "scipy")
BUILD = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"  # as pip asks for it
FORGET = f"""
import sys
sys.modules |= dict.fromkeys({ABSENT})
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
for _ in range(30):
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

from mimu.settings import library_settings
assert set(library_settings()) == {{"erase", "kernels"}}
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    clone = copy_to(folder / "clone", "*.py", "*/*.py", "*/*.yaml", "mimu/gcn.pt", "pyproject.toml", "README.md")
    subprocess.run([sys.executable, "-c", BUILD, str(folder)], cwd=clone, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_the_library_and_nothing_else(wheel):
    library = {f"mimu/{path.name}": path.read_bytes() for path in (PROJECT / "mimu").iterdir() if path.is_file()}
    assert {"mimu/__init__.py", "mimu/gcn.pt", "mimu/settings.yaml"} <= library.keys()
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        assert {name: archive.read(name) for name in names} == library
    assert wheel.stat().st_size < 10**6


def test_a_custom_model_forgets_where_only_the_library_and_its_dependencies_are(wheel, tmp_path):
    installed, current = tmp_path / "installed", tmp_path / "current"
    pip = ["uv", "pip"] if shutil.which("uv") else [sys.executable, "-m", "pip"]
    options = ["--no-deps", "--no-index", "--no-cache-dir", "--target", str(installed)]
    subprocess.run([*pip, "install", *options, str(wheel)], check=True, capture_output=True)
    for name in ("model.py", "data.py", "eval.py", "trainer.py", "experiment.py"):  # people have files named alike
        copied = current / name
        copied.parent.mkdir(exist_ok=True)
        copied.write_text(f"raise ImportError('{name} of the current folder')\n")
    offline = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")  # nobody listens there
    environment = os.environ | offline | {"PYTHONPATH": str(installed)}
    command = [sys.executable, "-c", FORGET, str(installed)]
    done = subprocess.run(command, cwd=current, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


def imports(path: Path) -> set[str]:
    """The modules that a file imports anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", sorted((PROJECT / "mimu").glob("**/*.py")), ids=lambda path: path.name)
def test_the_library_imports_nothing_of_the_experiment_and_four_packages(path):
    packages = {name.partition(".")[0] for name in imports(path)}
    assert packages <= {"mimu", *DEPENDENCIES, *sys.stdlib_module_names}
