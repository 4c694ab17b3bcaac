"""The long tests of what may happen to a run: `uv run pytest -m faults`."""

import errno
import os
from pathlib import Path

import pytest
from faults import MADE, SMALL, emptied, power, results
from running import run_here

from mimu.runs.files import PARTIAL, ArtifactError

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
