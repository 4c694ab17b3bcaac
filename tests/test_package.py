"""The library as people install it: what the wheel holds, what it imports, and that it works where little else is."""

import ast
import os
import subprocess
import sys
import zipfile

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
model = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3))
for layer in (model[0], model[2]):
    nn.init.eye_(layer.weight)
    nn.init.zeros_(layer.bias)

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


def test_the_wheel_holds_the_library_alone_by_which_a_model_forgets_where_only_its_dependencies_are(tmp_path):
    clone, installed, current = (tmp_path / name for name in ("clone", "installed", "current"))
    copy_to(clone, "*.py", "*/*.py", "*/*.yaml", "mimu/gcn.pt", "pyproject.toml", "README.md")
    subprocess.run([sys.executable, "-c", BUILD, str(tmp_path)], cwd=clone, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    library = {f"mimu/{path.name}": path.read_bytes() for path in (PROJECT / "mimu").iterdir() if path.is_file()}
    assert {"mimu/__init__.py", "mimu/gcn.pt", "mimu/settings.yaml"} <= library.keys()
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        assert {name: archive.read(name) for name in names} == library
        archive.extractall(installed)  # a wheel of Python files is installed by that
    assert wheel.stat().st_size < 10**6

    current.mkdir()
    for name in ("model.py", "data.py", "eval.py", "trainer.py", "experiment.py"):  # people have files named alike
        (current / name).write_text(f"raise ImportError('{name} of the current folder')\n")
    offline = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")  # nobody listens there
    environment = os.environ | offline | {"PYTHONPATH": str(installed)}
    command = [sys.executable, "-c", FORGET, str(installed)]
    done = subprocess.run(command, cwd=current, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


def test_the_library_imports_nothing_of_the_experiment_and_four_packages():
    modules = set()
    for path in (PROJECT / "mimu").glob("**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: a relative import"
                modules.add(node.module)
    packages = {name.partition(".")[0] for name in modules}
    # The figure of an audit alone needs matplotlib, and imports it when it is drawn.
    assert packages <= {"mimu", "matplotlib", *DEPENDENCIES, *sys.stdlib_module_names}
    assert [path.name for path in (PROJECT / "mimu").glob("*.py") if "matplotlib.figure" in path.read_text()] == [
        "report.py"
    ]
