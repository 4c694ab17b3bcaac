"""Files are whole or not there, say what made them, and are refused where a single byte of them is wrong."""

import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
import torch
from faults import Killed, damaged, power

import artifacts
from artifacts import Artifact, ArtifactError, code_of, locked, written_whole
from model import Mask, WeightGraph

PROJECT = Path(__file__).resolve().parents[1]
MADE_BY = {"settings": {"seed": 0}, "code": {"model.py": "a", "trainer.py": "b"}, "data": {"file": "c"}, "torch": "2"}


def content(value: float) -> dict:
    return {"state_dict": {"weight": torch.full((40, 3), value)}, "seed": 3, "name": "it", "none": None}


def same(a, b) -> bool:
    """Whether two contents are equal to the last bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("suffix", [".pt", ".json"])
def test_what_is_saved_comes_back(tmp_path, suffix):
    saved = content(0.1) if suffix == ".pt" else {"a": [1, 0.1, None], "b": {"c": "d"}}
    path = tmp_path / "new" / "folder" / f"file{suffix}"
    artifacts.save(path, saved)
    assert same(artifacts.load(path), saved)
    assert [each.name for each in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("before", [None, 1.0])
def test_a_kill_at_any_operation_leaves_the_file_before_or_the_file_after(tmp_path, monkeypatch, before):
    path = tmp_path / "folder" / "file.pt"
    with power(monkeypatch) as supply:
        artifacts.save(tmp_path / "other" / "file.pt", content(2.0))
    assert supply.count >= 6, "make the folder, open, write, flush to the disk, rename, and flush the folder"
    for cut in range(supply.count):
        path.unlink(missing_ok=True)
        if before is not None:
            artifacts.save(path, content(before))
        with power(monkeypatch, cut), pytest.raises(Killed):
            artifacts.save(path, content(2.0))
        if path.exists():
            assert same(artifacts.load(path), content(2.0)) or same(artifacts.load(path), content(before))
        else:
            assert before is None
        left = [each for each in tmp_path.rglob("*.mimu-partial")]
        assert len(left) <= 1
        artifacts.save(path, content(2.0))
        assert same(artifacts.load(path), content(2.0))
        for partial in left:
            partial.unlink(missing_ok=True)


def test_partial_files_of_killed_runs_are_removed_and_others_stay(tmp_path):
    for folder in ("checkpoints", "datasets/Graphs", "eval/masks", "reports", "mine"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.pt.host.17.mimu-partial").write_text("half")
        (tmp_path / folder / "a.pt").write_text("whole")
        (tmp_path / folder / "of_mine.partial").write_text("mine")
    with locked(tmp_path):
        left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.mimu-partial"))
    assert left == ["mine/a.pt.host.17.mimu-partial"]
    assert len(list(tmp_path.rglob("a.pt"))) == len(list(tmp_path.rglob("of_mine.partial"))) == 5


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_takes_nothing_is_named_with_the_file(tmp_path, monkeypatch, number):
    path = tmp_path / "folder" / "file.pt"
    error = OSError(number, os.strerror(number))
    for cut in range(5):
        with power(monkeypatch, cut, error), pytest.raises(ArtifactError) as raised:
            artifacts.save(path, content(2.0))
        assert str(raised.value) == f"{path}: cannot be written ({os.strerror(number)})"
        assert not path.exists()


def test_nothing_is_written_where_the_content_cannot_be_made(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(ZeroDivisionError), written_whole(path) as file:
        file.write(bytes([1 // 0]))
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_every_byte_of_a_checkpoint_counts(tmp_path):
    path = tmp_path / "file.pt"
    Artifact(path, MADE_BY).save(content(math.pi))
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1 << position % 8]) + whole[position + 1 :])
        with pytest.raises(ArtifactError, match="file.pt: is damaged or something else .it does not match its check"):
            artifacts.load(path)
        path.write_bytes(whole[:position])
        with pytest.raises(ArtifactError, match="is damaged or something else"):
            artifacts.load(path)


def test_pytorch_reads_a_checkpoint_as_it_is(tmp_path):
    artifacts.save(tmp_path / "file.pt", content(math.pi))
    assert same(torch.load(tmp_path / "file.pt", weights_only=True), content(math.pi))


def test_damaged_json_is_refused_or_holds_the_same(tmp_path):
    path, random = tmp_path / "file.json", Random(0)
    saved = {"scores": [1 / 3, 96.9, None], "config": {"a": {"b": "c"}}, "made_by": MADE_BY}
    artifacts.save(path, saved)
    whole, refused = path.read_bytes(), 0
    for _ in range(400):
        path.write_bytes(damaged(whole, random))
        try:
            assert same(artifacts.load(path), saved)
        except ArtifactError as error:
            assert str(error).startswith(f"{path}: is damaged or something else (") and "\n" not in str(error)
            refused += 1
    assert refused > 300


def test_a_number_changed_by_hand_is_seen(tmp_path):
    path = tmp_path / "file.json"
    artifacts.save(path, {"score": 96.5})
    path.write_text(path.read_text().replace("96.5", "99.5"))
    with pytest.raises(ArtifactError, match="file.json: is damaged or something else .it was changed after"):
        artifacts.load(path)


def test_a_checkpoint_does_not_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    torch.save({"state_dict": Evil()}, tmp_path / "file.pt")
    with pytest.raises(ArtifactError, match="is damaged or something else"):
        artifacts.load(tmp_path / "file.pt")
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("write", [lambda path: torch.save(torch.ones(3), path), lambda path: path.write_text("[]")])
def test_another_content_is_refused(tmp_path, write):
    for name in ("file.pt", "file.json"):
        write(tmp_path / name)
        with pytest.raises(ArtifactError):
            artifacts.load(tmp_path / name)


def test_a_file_that_is_not_there_or_a_folder_is_named(tmp_path):
    with pytest.raises(ArtifactError, match="nowhere.pt: cannot be read .No such file"):
        artifacts.load(tmp_path / "nowhere.pt")
    with pytest.raises(ArtifactError, match="cannot be read .Is a directory"):
        artifacts.load(tmp_path)


@pytest.mark.parametrize(
    "now, why",
    [
        (MADE_BY, ""),
        (MADE_BY | {"code": {"model.py": "a", "trainer.py": "c"}}, "trainer.py changed"),
        (MADE_BY | {"code": {"data.py": "d", "model.py": "a"}}, "data.py, trainer.py changed"),
        (MADE_BY | {"torch": "3"}, "torch changed"),
        (MADE_BY | {"settings": {"seed": 1}, "data": {"a": "b"}}, "settings, data changed"),
        (MADE_BY | {"data": {}}, "data set not there"),
        (MADE_BY | {"gcn": "e"}, "made by another version"),
    ],
)
def test_an_artifact_says_why_it_is_made_anew(tmp_path, now, why):
    path = tmp_path / "file.json"
    assert Artifact(path, now).why_not() == "not there yet"
    Artifact(path, MADE_BY).save({"a": 1})
    assert Artifact(path, now).why_not() == why
    if why:
        with pytest.raises(ArtifactError, match=why):
            Artifact(path, now).load()
    else:
        assert Artifact(path, now).load() == {"a": 1, "made_by": MADE_BY}
    path.write_text("{}")
    assert Artifact(path, now).why_not() == "damaged"


def test_the_code_of_a_module_is_that_of_all_it_imports_but_its_comments(tmp_path):
    sources = {"a": "import b\nfrom c import d", "b": "from __future__ import annotations\nimport torch", "c": "d = 1"}

    def code(**changes):
        for name, source in (sources | changes).items():
            (tmp_path / f"{name}.py").write_text(source)
        return code_of("a", root=tmp_path)

    before = code()
    assert list(before) == ["a.py", "b.py", "c.py"]
    assert code(c="d = 1  # one", b=sources["b"] + "\n\n\n") == before
    after = code(c="d = 2")
    assert after != before and {name for name in after if after[name] != before[name]} == {"c.py"}
    assert "b.py" not in code_of("a", without=("b",), root=tmp_path)
    (tmp_path / "own").mkdir()
    for name in ("__init__", "e", "f"):
        (tmp_path / "own" / f"{name}.py").write_text("")
    whole = {"a.py", "own/__init__.py", "own/e.py", "own/f.py"}
    assert set(code(a="import own.e\nfrom own import f")) == whole
    (tmp_path / "own" / "f.py").write_text("from .e import anything")
    assert set(code(a="import own.f")) == whole
    (tmp_path / "own" / "f.py").write_text("from . import e")
    assert set(code(a="import own.f")) == whole


def test_what_counts_is_the_code_as_it_was_imported(monkeypatch, tmp_path):
    """An edit while a run goes on is for the next one."""
    code = (
        f"import sys; sys.path.insert(0, '{tmp_path}'); import artifacts; before = artifacts.code_of('trainer');"
        "path = artifacts.ROOT / 'trainer.py'; path.write_text(path.read_text() + 'x = 1');"
        "assert artifacts.ROOT != artifacts.Path.cwd() and artifacts.code_of('trainer') == before"
    )
    for path in PROJECT.glob("*.py"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    subprocess.run([sys.executable, "-c", code], cwd="/", check=True)


def test_the_numbers_depend_on_no_plot_and_the_trainings_on_no_evaluation():
    assert set(code_of("trainer")) == {"artifacts.py", "data.py", "erasure.py", "model.py", "trainer.py"}
    evaluation = set(code_of("eval", without=("reporter", "visualization")))
    assert evaluation == set(code_of("trainer")) | {"audits.py", "baselines.py", "eval.py", "methods.py"}
    assert set(code_of("visualization")) == {"artifacts.py", "reporter.py", "visualization.py"}


def test_a_second_run_in_a_folder_says_who_holds_it(tmp_path):
    code = "import sys; from pathlib import Path; from artifacts import locked\nwith locked(Path(sys.argv[1])): pass"
    with locked(tmp_path):
        command = [sys.executable, "-c", code, str(tmp_path)]
        done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
        assert done.returncode == 1
        expected = f"ArtifactError: {tmp_path}: is held by another run (process {os.getpid()} on "
        assert expected in done.stderr
    assert subprocess.run(command, cwd=PROJECT).returncode == 0


def test_a_folder_that_cannot_be_written_to_is_named():
    with pytest.raises(ArtifactError, match="/proc/.lock: cannot be written"), locked(Path("/proc")):
        pass


def test_folders_that_cannot_be_made_are_named_before_any_work(tmp_path):
    artifacts.make_folders(tmp_path)
    assert (tmp_path / "datasets" / "Graphs").is_dir()
    (tmp_path / "eval").rmdir()
    (tmp_path / "eval").write_text("a file")
    with pytest.raises(ArtifactError, match="eval: cannot be made .File exists"):
        artifacts.make_folders(tmp_path)


def test_masks_on_disk_are_masks_or_refused(tmp_path):
    mask = Mask.zeroing(WeightGraph([(4, 6), (3, 4)], None), torch.tensor([1, 30]))
    path = tmp_path / "mask.pt"
    mask.save(path)
    whole, random = path.read_bytes(), Random(1)
    for _ in range(100):
        path.write_bytes(damaged(whole, random))
        try:
            assert torch.equal(Mask.load(path).as_tensor(), mask.as_tensor())
        except ArtifactError as error:
            assert str(path) in str(error)
    artifacts.save(path, {"weights": 3})
    with pytest.raises(ArtifactError, match="is not a mask, but holds weights"):
        Mask.load(path)


def test_json_is_what_other_programs_read(tmp_path):
    artifacts.save(tmp_path / "file.json", {"a": [1.5, None]})
    read = json.loads((tmp_path / "file.json").read_text(), parse_constant=pytest.fail)
    assert read["a"] == [1.5, None] and len(read["checksum"]) == 64
    with pytest.raises(ValueError):
        artifacts.save(tmp_path / "other.json", {"a": math.nan})
    assert not (tmp_path / "other.json").exists()
