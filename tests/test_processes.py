"""Processes share what is to do, make what is shared once, and fail together."""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist
from running import PROJECT

from mimu.runs.files import ArtifactError, Log
from mimu.runs.work import Processes


@pytest.fixture
def three(monkeypatch) -> list[Processes]:
    """Three that share a store, as torchrun makes them, to be used by a thread each."""
    store, ranks = dist.HashStore(), iter(range(3))
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(dist, "rendezvous", lambda url, timeout: iter([(store, next(ranks), 3)]))
    processes = [Processes() for _ in range(3)]
    for each in processes:
        each._store.set_timeout(timedelta(seconds=20))
    return processes


def test_every_task_is_taken_once_after_the_beginning_and_all_is_gathered_in_order(three):
    done = []

    def work(processes: Processes) -> object:
        processes.first(lambda: (time.sleep(0.2), done.append("begun")))
        done.append("after")
        processes.once("shared", lambda: (time.sleep(0.2), done.append("shared")))
        done.append("later")
        taken = [task for task in processes.take(range(30)) if time.sleep(0.001) is None]
        return processes.gathered({"rank": processes.rank, "taken": taken})

    with ThreadPoolExecutor(3) as threads:
        gathered, *others = threads.map(work, three)
    assert others == [[], []] and [share["rank"] for share in gathered] == [0, 1, 2]
    assert sorted(sum((share["taken"] for share in gathered), [])) == list(range(30))
    assert done[0] == "begun" and done.count("begun") == done.count("shared") == 1
    assert done.count("after") == done.count("later") == 3 and done.index("shared") < done.index("later")


FAILING = """
import time
from mimu.runs.files import ArtifactError
from mimu.runs.work import Processes
def make():
    time.sleep(0.5)
    raise ArtifactError("disk full")
Processes().once("classifier.pt", make)
"""


def test_what_fails_in_one_process_ends_all(tmp_path):
    (tmp_path / "failing.py").write_text(FAILING)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(tmp_path / "failing.py")]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and done.stderr.count("ArtifactError: disk full") == 1


def test_a_log_says_all_with_the_time_and_is_named_where_it_cannot_be_written(tmp_path, capsys):
    log = Log(tmp_path / "reports" / "run.log", "process 1: ")
    log("classifier: 3 s")
    log.note("in the file \ud800 alone")
    assert capsys.readouterr().out == "process 1: classifier: 3 s\n"
    lines = log.path.read_text().splitlines()
    assert [line[20:] for line in lines] == ["process 1: classifier: 3 s", "process 1: in the file \\ud800 alone"]
    assert all(time.strptime(line[:19], "%Y-%m-%d %H:%M:%S") for line in lines)
    with pytest.raises(ArtifactError, match="run.log/run.log: cannot be written .File exists"):
        Log(log.path / "run.log").note("something")
