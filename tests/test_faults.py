"""The long tests of what may happen to a run: `uv run pytest -m faults`."""

import errno
import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
import torch
from faults import Killed, damaged, power
from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from runs import PROJECT, files, metrics, run_here

import artifacts
import pipeline
from artifacts import ArtifactError
from config import BASE, ConfigError, load_variants
from data import FILES, DataError, ImageData, Split, load_image_data
from main import main

pytestmark = pytest.mark.faults
TINY = (
    "sweep.forget_digits=[3]",
    "sweep.kappa=[auto, 20]",
    "gcn.steps=2",
    "gcn.warmup=0",
    "eval.methods=[original, mimu, retrain]",
    "report.dpi=20",
)


@pytest.fixture
def little_data(monkeypatch):
    """A few of the samples and empty pictures, so that a run takes no time."""
    data = load_image_data()
    little = ImageData(*(Split(split.images[:2000], split.labels[:2000]) for split in (data.train, data.test)))
    monkeypatch.setattr(pipeline, "load_image_data", lambda *arguments: little)

    def save_nothing(self, file, metadata=None, **options):
        text = PngInfo()
        for key, value in (metadata or {}).items():
            text.add_text(key, value)
        Image.new("L", (1, 1)).save(file, format="png", pnginfo=text)

    monkeypatch.setattr(Figure, "savefig", save_nothing)
    monkeypatch.setattr(Figure, "draw_without_rendering", lambda self: None)


def empty(folder: Path) -> None:
    for name in ("checkpoints", "datasets/Graphs", "eval", "reports", ".lock"):
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
        else:
            (folder / name).unlink(missing_ok=True)


def assert_whole(folder: Path) -> None:
    """Every file is one that a run leaves, and is whole."""
    assert not list(folder.rglob("*.mimu-partial"))
    for path in folder.rglob("*"):
        if path.suffix in (".pt", ".json") and path.name != "run.json":
            artifacts.load(path)


def test_a_kill_between_any_two_operations_on_files_is_made_good(here, little_data, monkeypatch):
    settings = (*TINY, "eval.visualize=true", "sweep.kappa=[20]")
    with power(monkeypatch) as supply:
        run_here(here, *settings)
    expected, names = metrics(here), set(files(here))
    assert supply.count > 100
    for cut in range(supply.count):
        empty(here)
        with power(monkeypatch, cut), pytest.raises(Killed):
            run_here(here, *settings)
        run_here(here, *settings)
        assert metrics(here) == expected and set(files(here)) == names, f"killed before operation {cut}"
        assert_whole(here)


def test_a_disk_that_fills_up_at_any_operation_is_one_error(here, little_data, monkeypatch):
    with power(monkeypatch) as supply:
        run_here(here, *TINY)
    expected = metrics(here)
    for cut in range(0, supply.count, 7):
        empty(here)
        error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with power(monkeypatch, cut, error), pytest.raises((ArtifactError, OSError), match="No space left on device"):
            run_here(here, *TINY)
        run_here(here, *TINY)
        assert metrics(here) == expected


def test_a_damaged_file_of_a_run_is_never_used(here, little_data):
    """Whatever is damaged, the metrics of the next run are those of an undisturbed one."""
    run_here(here, *TINY)
    expected, random = metrics(here), Random(0)
    kept = here.parent / "kept"
    shutil.copytree(here, kept, symlinks=True)
    names = [name for name in files(here) if name.endswith((".pt", ".json", ".png")) and "run.json" not in name]
    for turn in range(40):
        name = names[turn % len(names)]
        (here / name).write_bytes(damaged((kept / name).read_bytes(), random))
        # What the others were made of is not there, so that the damaged file is needed.
        for other in random.sample(names, 2):
            if other != name:
                (here / other).unlink(missing_ok=True)
        run_here(here, *TINY)
        assert metrics(here) == expected, name
        assert_whole(here)


def test_a_kill_at_a_random_time_is_made_good(tmp_path):
    """Fifty kills (SIGKILL) of the smoke config, two loops side by side."""
    command = [sys.executable, str(PROJECT / "tests" / "kill_runs.py"), "--kills", "25"]
    loops = []
    for seed in range(2):
        folder = tmp_path / str(seed)
        (folder / "datasets").mkdir(parents=True)
        (folder / "datasets" / "MNIST").symlink_to(PROJECT / "datasets" / "MNIST")
        loops.append(subprocess.Popen([*command, "--seed", str(seed), str(folder)], stdout=subprocess.PIPE, text=True))
    for loop in loops:
        output, _ = loop.communicate(timeout=900)
        assert loop.returncode == 0, output
        result = json.loads(output.splitlines()[-1])
        assert result["kills"] == 25 and result["finished"] == result["equal"] >= 1, result


def test_damaged_configs_are_one_line_or_a_config(tmp_path, capsys):
    random, path, refused = Random(0), tmp_path / "mine.yaml", 0
    for turn in range(300):
        source = (BASE, BASE.parent / "smoke.yaml", BASE.parent / "ablation.yaml")[turn % 3]
        path.write_bytes(damaged(source.read_bytes(), random))
        try:
            configs = load_variants(path)
            assert all(config.num_vertices > 0 for config in configs.values())
        except ConfigError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
            if refused % 20 == 0:
                assert main(["--config", str(path)]) == 2
                said = capsys.readouterr().err
                assert said.startswith("error: ") and "Traceback" not in said and len(said.splitlines()) == 1
    assert refused > 150


def test_damaged_data_is_unpacked_again_or_refused(tmp_path):
    raw, random = tmp_path / "MNIST" / "raw", Random(0)
    shutil.copytree(PROJECT / "datasets" / "MNIST" / "raw", raw)
    expected = load_image_data("MNIST", tmp_path)
    whole = {path: path.read_bytes() for path in raw.iterdir()}
    for turn in range(24):
        path = raw / (FILES[turn % 4] + (".gz" if turn % 3 == 0 else ""))
        path.write_bytes(damaged(whole[path], random))
        if path.suffix == ".gz":
            with pytest.raises(DataError, match=f"{path.name}: is damaged .its md5 is"):
                load_image_data("MNIST", tmp_path)
            path.write_bytes(whole[path])
        else:
            data = load_image_data("MNIST", tmp_path)
            assert path.read_bytes() == whole[path]
            assert torch.equal(data.test.labels, expected.test.labels) and len(data.train.labels) == 60000
    for path in raw.glob("*.gz"):
        assert gzip.decompress(path.read_bytes()) == (raw / path.stem).read_bytes()
