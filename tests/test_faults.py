"""The long tests of what may happen to a run: `uv run pytest -m faults`."""

import errno
import gzip
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from random import Random

import pytest
import torch
from faults import MADE, SMALL, damaged, emptied, kill_runs, power, results
from running import run_here, write_few

from mimu import main
from mimu.configs import CONFIG, load_variants
from mimu.data import load_image_data
from mimu.images.sources import FILES, DataError
from mimu.runs import settings
from mimu.runs.files import PARTIAL, ArtifactError, InputError

pytestmark = pytest.mark.faults
TINY = (*SMALL, "sweep.forget_digits=[3]")


def contents(folder: Path) -> dict[str, bytes]:
    """Path to content of all that a run leaves, but for the log and the seconds of the run."""
    found = {}
    for name in MADE:
        paths = [path for path in (folder / name).rglob("*") if path.is_file() and path.stem != "run"]
        found |= {str(path.relative_to(folder)): path.read_bytes() for path in paths}
    return found


def test_a_kill_between_any_two_operations_on_files_is_made_good(here, monkeypatch):
    """What a kill leaves is what is there before the next operation, or in the middle of a write.

    What stands in a file that is not whole yet makes no difference: it is removed unread.
    """
    one = (*TINY, "eval.visualize=true", "sweep.kappa=[20]")
    left: dict[frozenset, dict[str, bytes]] = {}

    def keep() -> None:
        found = contents(here)
        left.setdefault(frozenset((name, not name.endswith(PARTIAL) and each) for name, each in found.items()), found)

    with power(monkeypatch, before=keep) as supply:
        run_here(here, *one)
    expected, names = results(here), set(contents(here))
    assert supply.count > 80 and sum(PARTIAL in " ".join(each) for each in left.values()) > 15
    for before in left.values():
        emptied(here)
        for name, content in before.items():
            (here / name).parent.mkdir(parents=True, exist_ok=True)
            (here / name).write_bytes(content)
        run_here(here, *one)
        assert results(here) == expected and set(contents(here)) == names, sorted(before)


def test_a_disk_that_fills_up_at_any_operation_is_one_error(here, monkeypatch):
    run_here(here, *TINY)
    expected, failed = results(here), 0
    emptied(here)
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for cut in range(0, 1000, 3):
        with power(monkeypatch, cut, error) as supply:
            try:
                run_here(here, *TINY)
            except (ArtifactError, OSError) as raised:
                assert "No space left on device" in str(raised)
                failed += 1
        if supply.count <= cut:
            break
    assert failed > 10 and results(here) == expected


def test_a_damaged_file_of_a_run_is_never_used(here):
    """Whatever is damaged is refused, and the metrics of the next run are those of an undisturbed one."""
    run_here(here, *TINY)
    expected, random = results(here), Random(0)
    whole = {name: content for name, content in contents(here).items() if name.endswith((".pt", ".json"))}
    for _ in range(20):
        some = random.sample(sorted(whole), 5)
        for name in some[:3]:
            (here / name).write_bytes(damaged(whole[name], random))
        for name in some[3:]:  # so that the damaged files are needed
            (here / name).unlink()
        run_here(here, *TINY)
        assert results(here) == expected, some


def test_damaged_configs_are_one_line_or_a_config(tmp_path, capsys, monkeypatch):
    random, path, refused = Random(0), tmp_path / "mine.yaml", 0
    bases = {base: settings.read_yaml(base) for base in (CONFIG, CONFIG.with_name("methods.yaml"))}
    monkeypatch.setattr(settings, "read_yaml", lambda path, read=settings.read_yaml: bases.get(path) or read(path))
    for turn in range(300):
        source = CONFIG.with_name(("config.yaml", "smoke.yaml", "ablation.yaml")[turn % 3])
        path.write_bytes(damaged(source.read_bytes(), random))
        try:
            assert all(config.num_vertices > 0 for config in load_variants(path).values())
        except InputError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
            if refused % 20 == 0:
                assert main.main(["--config", str(path)]) == 2
                said = capsys.readouterr().err
                assert said.startswith("error: ") and "Traceback" not in said and len(said.splitlines()) == 1
    assert refused > 150


def test_damaged_data_is_refused_where_it_is_read(tmp_path):
    raw, random, refused = write_few(tmp_path, 100), Random(0), 0
    for name in FILES:
        (raw / f"{name}.gz").write_bytes(gzip.compress((raw / name).read_bytes()))
    whole = {path: path.read_bytes() for path in raw.iterdir()}
    expected = load_image_data("MNIST", tmp_path / "datasets")
    for turn in range(100):
        path = raw / (FILES[turn % 4] + (".gz" if turn % 3 == 0 else ""))
        path.write_bytes(damaged(whole[path], random))
        try:
            data = load_image_data("MNIST", tmp_path / "datasets")
            for ours, theirs in ((data.train, expected.train), (data.test, expected.test)):
                assert torch.equal(ours.images, theirs.images) and torch.equal(ours.labels, theirs.labels)
        except DataError as error:
            assert path.suffix == ".gz" and path.name in str(error)
            refused += 1
        path.write_bytes(whole[path])
    assert 10 < refused <= 34


def test_a_kill_at_a_random_time_is_made_good(tmp_path):
    write_few(tmp_path)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as apart:
        found = apart.submit(kill_runs, tmp_path, 30).result(timeout=900)
    assert found["kills"] == 30 and found["finished"] == found["equal"] >= 3, found
