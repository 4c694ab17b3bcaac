"""Files are whole or not there, say what made them, and are refused where a single byte of them is wrong."""

import builtins
import errno
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from running import PROJECT, TINY, metrics, run_here

from experiment import files as run_files
from experiment.files import Artifact, Log, code_of, locked
from mimu import files
from mimu.errors import ArtifactError
from mimu.files import PARTIAL, write_text, written_whole

FOLDERS = ("checkpoints", "datasets/Graphs", "eval", "reports")  # which a run makes where there is only data
OPEN = open


@contextmanager
def power(monkeypatch, cut_before=math.inf, before=lambda: None) -> Iterator[list[str]]:
    """Lists the operations that change files while the context is open; from one of them on, the disk is full.

    before: is called before each operation: here a kill leaves the files as they are
    """
    operations = []

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def watch(*arguments: Any, **options: Any) -> Any:
            if function is not OPEN or set(str(arguments[1:2])) & set("wxa+"):
                operations.append(function.__name__)
                if len(operations) > cut_before:
                    raise OSError(errno.ENOSPC, "No space left on device")
                before()
            return function(*arguments, **options)

        return watch

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", watched(OPEN))
        for name in ("replace", "fsync", "mkdir", "rmdir", "unlink"):
            patch.setattr(os, name, watched(getattr(os, name)))
        yield operations


def test_what_is_saved_comes_back_and_others_read_it(tmp_path):
    checkpoint, metrics = tmp_path / "new" / "folder" / "file.pt", tmp_path / "file.json"
    about, tensors = {"seed": 3, "none": None}, {"weight": torch.randn(4, 3), "mask": torch.ones(2) > 0}
    files.save(checkpoint, about | {"state_dict": tensors})
    for loaded in (files.load(checkpoint), torch.load(checkpoint, weights_only=True)):
        state_dict = loaded.pop("state_dict")
        assert loaded == about and all(torch.equal(state_dict[name], tensors[name]) for name in tensors)
    assert list(checkpoint.parent.iterdir()) == [checkpoint]
    assert "state_dict" in files.load(PROJECT / "mimu" / "gcn.pt")
    files.save(metrics, {"a": [1, 0.1, None], "b": {"c": 2}})
    assert files.load(metrics) == {"a": [1, 0.1, None], "b": {"c": 2}}
    read = json.loads(metrics.read_text(), parse_constant=pytest.fail)
    assert read["a"] == [1, 0.1, None] and len(read["checksum"]) == 64


def test_a_full_disk_a_kill_before_the_last_operation_and_a_failure_leave_the_file_as_it_was(tmp_path, monkeypatch):
    path, states = tmp_path / "file.json", []
    files.save(path, {"a": 1})
    before = path.read_bytes()
    with power(monkeypatch, before=lambda: states.append((path.read_bytes(), len(list(tmp_path.iterdir()))))):
        files.save(path, {"a": 2})
    # Before the folder is made, the file opened, flushed to the disk and renamed.
    assert states == [(before, count) for count in (1, 1, 2, 2)]
    with pytest.raises(ValueError):
        files.save(path, {"a": math.nan})
    with pytest.raises(ZeroDivisionError), written_whole(path) as file:
        file.write(bytes([1 // 0]))
    assert list(tmp_path.iterdir()) == [path]
    for cut in range(4):
        with power(monkeypatch, cut), pytest.raises(ArtifactError) as raised:
            files.save(path, {"a": 3})
        assert str(raised.value) == f"{path}: cannot be written (No space left on device)"
        assert files.load(path) == {"a": 2}


def test_partial_files_of_killed_runs_are_removed_and_others_stay(tmp_path):
    for folder in ("checkpoints", "datasets/Graphs", "eval/masks", "reports", "mine"):
        (tmp_path / folder).mkdir(parents=True)
        for name in ("a.pt.host.17.mimu-partial", "a.pt", "of_mine.partial"):
            (tmp_path / folder / name).write_text("some")
    with locked(tmp_path):
        partial = [path.parent.name for path in tmp_path.rglob("*.mimu-partial")]
        assert partial == ["mine"] and len([*tmp_path.glob("**/a.pt"), *tmp_path.glob("**/of_mine.partial")]) == 10


@pytest.mark.parametrize("name, least", [("file.pt", 1), ("file.json", 0.8)])
def test_a_file_with_a_wrong_byte_is_refused(tmp_path, name, least):
    """Of JSON, a few bytes may become others that mean the same."""
    path, saved, refused = tmp_path / name, {"scores": [1 / 3, 96.9, None], "config": {"a": {"b": "c"}}}, 0
    files.save(path, saved)
    whole = path.read_bytes()
    wrong = [b"", whole[::-1], whole + whole, bytes(len(whole)), *(whole[:end] for end in range(1, len(whole), 50))]
    for position in [*range(0, len(whole), 29), *range(len(whole) - 80, len(whole), 3)]:
        wrong.append(whole[:position] + bytes([whole[position] ^ 1 << position % 8]) + whole[position + 1 :])
    for broken in wrong:
        path.write_bytes(broken)
        try:
            assert files.load(path) == saved
        except ArtifactError as error:
            assert str(error).startswith(f"{path}: is damaged or something else (") and "\n" not in str(error)
            refused += 1
    assert refused >= least * len(wrong)


def test_another_content_is_refused_and_no_code_is_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    files.save(tmp_path / "evil.pt", {"state_dict": Evil()})
    files.save(tmp_path / "list.pt", [1])
    torch.save({"a": torch.ones(3)}, tmp_path / "bare.pt")
    files.save(tmp_path / "changed.json", {"a": 96.9})
    write_text(tmp_path / "changed.json", (tmp_path / "changed.json").read_text().replace("96.9", "12.5"))
    forged = {"a": math.nan}
    checksum = hashlib.sha256(json.dumps(forged).encode()).hexdigest()
    write_text(tmp_path / "forged.json", json.dumps(forged | {"checksum": checksum}))
    for name, why in (
        ("forged.json", "is damaged or something else .Out of range float values are not JSON compliant"),
        ("evil.pt", "is damaged or something else .Weights only load failed"),
        ("list.pt", "is damaged or something else .it holds a list"),
        ("bare.pt", "is damaged or something else .it does not match its checksum"),
        ("changed.json", "is damaged or something else .it was changed after it was written"),
        ("nowhere.pt", "cannot be read .No such file"),
        ("", "cannot be read .Is a directory"),
    ):
        with pytest.raises(ArtifactError, match=f"{name}: {why}"):
            files.load(tmp_path / name)
    assert not (tmp_path / "evil").exists()


def test_an_artifact_is_current_where_it_is_whole_and_made_by_the_same_and_is_read_once(tmp_path, monkeypatch):
    path, reads = tmp_path / "file.json", []
    monkeypatch.setattr(run_files, "load", lambda path: reads.append(path) or files.load(path))
    artifact, other = Artifact(path, "one digest"), Artifact(path, "another")
    assert not artifact.is_current and reads == []
    artifact.save({"a": 1})
    assert [artifact.is_current, Artifact(path, "one digest").is_current, other.is_current] == [True, True, False]
    assert reads == [path] and artifact.load() == {"a": 1, "made_by": "one digest"}
    with pytest.raises(ArtifactError, match="file.json: was made by other settings, code or data"):
        other.load()
    # Another process makes it again, and a version that differs in nothing but a byte is another one, too.
    for change in (lambda: Artifact(path, "one digest").save({"a": 2}), lambda: path.write_bytes(path.read_bytes())):
        reads.clear()
        change()
        assert [artifact.is_current, artifact.is_current] == [True, True] and reads == [path]
    for spoil in (lambda: path.write_bytes(b"{"), lambda: files.save(path, {"made_by": {}}), path.unlink):
        spoil()
        assert not artifact.is_current


SOURCES = {
    "stage.py": 'from parts.inner import f\n\nclass A:\n    """Doc."""\n\n    size = f() + 1\n',
    "parts/__init__.py": "COUNT = 2\n",
    "parts/inner.py": "def f():\n    'doc'\n    import late\n    return 2\n",
    "late.py": "import torch, sys, skipped\n",
    "skipped.py": "import behind\n",
    "behind.py": "",
}
CHANGES = {
    "a comment": ("stage.py", "class A", "# a remark\nclass A", False),
    "a docstring": ("stage.py", '"""Doc."""', '"""More."""', False),
    "no docstring": ("parts/inner.py", "    'doc'\n", "", False),
    "blank lines": ("parts/inner.py", "    return", "\n\n    return", False),
    "a number": ("stage.py", "+ 1", "+ 3", True),
    "an imported number": ("parts/inner.py", "return 2", "return 3", True),
    "a package on the way": ("parts/__init__.py", "2", "3", True),
    "an import within a function": ("late.py", "import torch", "import numpy", True),
    "a module that does not count": ("skipped.py", "import behind", "behind = 1", False),
    "one that only this imports": ("behind.py", "", "NUMBER = 1", False),
    "one that nothing imports": ("new.py", "", "NUMBER = 1", False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_code_counts_by_its_syntax_tree_where_a_stage_imports_it(tmp_path, change):
    for name, source in SOURCES.items():
        write_text(tmp_path / name, source)
    before = code_of(tmp_path, ["stage"], ["skipped"])
    name, old, new, is_other = CHANGES[change]
    write_text(tmp_path / name, SOURCES.get(name, "").replace(old, new, 1))
    assert (code_of(tmp_path, ["stage"], ["skipped"]) != before) == is_other


def test_a_folder_that_cannot_be_written_to_and_one_in_the_place_of_a_file_are_named(tmp_path, monkeypatch):
    with pytest.raises(ArtifactError, match="/proc/.lock: cannot be written"), locked(Path("/proc")):
        pass
    with power(monkeypatch, 0), pytest.raises(ArtifactError, match=".lock: cannot be written .No space left"):
        locked(tmp_path).__enter__()
    for name in ("file.pt", "file.json", ".lock"):
        path = tmp_path / name
        path.mkdir()
        assert not Artifact(path, "a digest").is_current
        uses = [partial(files.load, path), partial(files.save, path, {"a": 1}), partial(Log(path).note, "some")]
        for use in uses + [locked(tmp_path).__enter__] * (name == ".lock"):
            with pytest.raises(ArtifactError, match=f"{name}: cannot be (read|written) .Is a directory"):
                use()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "file.json", "file.pt"]


LOCKING = "import sys; from pathlib import Path; from experiment.files import locked\nwith locked(Path(sys.argv[1])): "


def in_another_process(code: str, *arguments: object, **settings: str) -> subprocess.CompletedProcess:
    """What code says in a Python of its own, with further variables of the environment."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=PROJECT, env=os.environ | settings, capture_output=True, text=True)


def test_a_second_run_in_a_folder_says_who_holds_it(tmp_path):
    with locked(tmp_path):
        done = in_another_process(f"{LOCKING}pass", tmp_path)
        assert done.returncode == 1
        assert f"ArtifactError: {tmp_path}: is held by another run (process {os.getpid()} on " in done.stderr
        assert done.stderr.strip().endswith("): wait or end it")
    killed = in_another_process(f"{LOCKING}import os; os.kill(os.getpid(), 9)", tmp_path)
    assert killed.returncode == -9 and "process " in (tmp_path / ".lock").read_text()
    # The lock holds any command in any locale.
    ascii_only = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    code = f"{LOCKING}print((Path(sys.argv[1]) / '.lock').read_bytes())"
    done = in_another_process(code, tmp_path, "modèle", **ascii_only)
    assert done.returncode == 0 and "process " in done.stdout, done.stderr


def test_where_the_system_has_no_locks_files_are_still_written(tmp_path):
    """As on Windows, where there is no fcntl; and no PyTorch is needed for JSON."""
    code = "import sys; sys.modules['fcntl'] = None; sys.modules['torch'] = None; from mimu.files import save\n"
    done = in_another_process(f"{code}{LOCKING}save(Path(sys.argv[1]) / 'a.json', {{'a': 1}})", tmp_path)
    assert done.returncode == 0, done.stderr
    assert files.load(tmp_path / "a.json") == {"a": 1}


def contents(folder: Path) -> dict[str, bytes]:
    """Path to content of all that a run leaves, but for the log and the seconds of the run."""
    paths = [path for name in FOLDERS for path in (folder / name).rglob("*")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths if path.is_file() and path.stem != "run"}


def emptied(folder: Path) -> None:
    for name in FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)


@pytest.mark.faults
def test_a_kill_between_any_two_operations_on_files_is_made_good(here, monkeypatch):
    """What a kill leaves is what is there before the next operation. A file that is not whole yet is never read."""
    one = (*TINY, "eval.visualize=true")
    kept: dict[frozenset, dict[str, bytes]] = {}

    def keep() -> None:
        now = contents(here)
        kept.setdefault(frozenset((name, not name.endswith(PARTIAL) and each) for name, each in now.items()), now)

    with power(monkeypatch, before=keep) as operations:
        run_here(here, *one)
    expected, names = metrics(here), set(contents(here))
    assert len(operations) > 80 and sum(PARTIAL in " ".join(each) for each in kept.values()) > 15
    for before in kept.values():
        emptied(here)
        for name, content in before.items():
            (here / name).parent.mkdir(parents=True, exist_ok=True)
            (here / name).write_bytes(content)
        run_here(here, *one)
        assert metrics(here) == expected and set(contents(here)) == names, sorted(before)


@pytest.mark.faults
def test_a_disk_that_fills_up_at_any_operation_is_one_error(here, monkeypatch):
    run_here(here, *TINY)
    expected, failed = metrics(here), 0
    emptied(here)
    for cut in range(0, 1000, 3):
        with power(monkeypatch, cut) as operations:
            try:
                run_here(here, *TINY)
            except (ArtifactError, OSError) as raised:
                assert "No space left on device" in str(raised)
                failed += 1
        if len(operations) <= cut:
            break
    assert failed > 10 and metrics(here) == expected
