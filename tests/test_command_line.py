"""Errors are one line and an exit status; a run can be stopped; processes share what is to do and fail together."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from running import PROJECT

from experiment.command_line import parse_arguments, run_command
from experiment.files import Log
from experiment.processes import Processes
from mimu.errors import ArtifactError, InputError


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Gives the tests their signals back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_start_gets_the_parsed_arguments():
    calls = []
    assert run_command(calls.append, ["seed=1", "--config", "mine.yaml", "gcn.steps=3", "--fresh"]) == 0
    assert run_command(calls.append, []) == 0
    assert (calls[0].config, calls[0].overrides) == (Path("mine.yaml"), ["seed=1", "gcn.steps=3"]) and calls[0].fresh
    assert calls[1].config == PROJECT / "configs" / "config.yaml" and calls[1].overrides == []
    assert not any(vars(calls[1])[name] for name in ("dry_run", "pretrain", "fresh"))


ERRORS = [
    (InputError("this"), "error: this\n"),
    (OSError(28, "No space left on device", "file.png"), "error: file.png: No space left on device\n"),
    (OSError("odd\nthing"), "error: a file: odd thing\n"),
    (RuntimeError("a\nb"), None),
]


@pytest.mark.parametrize("error, line", ERRORS)
def test_an_error_that_the_user_can_mend_is_one_line_and_no_other_is_caught(capsys, error, line):
    def start(parsed: Namespace) -> None:
        raise error

    if line is None:
        with pytest.raises(type(error)):
            run_command(start, [])
    else:
        assert run_command(start, []) == 2 and capsys.readouterr() == ("", line)


STOPPED = "stopped: finished work is kept; run the same command again to resume"
HEEDING = "signal.signal(signal.SIGINT, signal.default_int_handler)"  # in the background, shells ignore it


def script(start: str, before: str = "") -> list[str]:
    """The command that runs a line of code as `start`, in a folder and with options that follow it."""
    code = (
        "import signal, sys, time; from pathlib import Path; from experiment.command_line import run_command\n"
        "from mimu.errors import InputError; from experiment.files import Log\n"
        f"log = Log(Path(sys.argv[1]) / 'run.log')\n{before}\n"
        f"def start(parsed): {start}\nsys.exit(run_command(start, sys.argv[2:]))"
    )
    return [sys.executable, "-c", code]


def stopped(command: list[str], number: signal.Signals, **environment: str) -> tuple[int, str]:
    """The status and the output of a process that gets a signal once it says that it is working."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": os.environ | environment}
    process = subprocess.Popen(command, cwd=PROJECT, text=True, **pipes)
    try:
        assert process.stdout.readline() == "working\n"
        time.sleep(0.1)  # it waits by then
        process.send_signal(number)
        _, line = process.communicate(timeout=20)
    finally:
        process.kill()
    return process.returncode, line.strip()


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_says_how_to_resume(tmp_path, number, status):
    command = [*script("print('working', flush=True); time.sleep(60)", HEEDING), str(tmp_path), "--fresh"]
    expected = STOPPED.replace("command", "command without --fresh")
    assert stopped(command, number) == (status, expected)


def test_a_run_that_is_stopped_while_pytorch_is_imported_ends_in_one_line(tmp_path):
    (tmp_path / "torch.py").write_text(f"import signal, time; {HEEDING}; print('working', flush=True); time.sleep(60)")
    command = [sys.executable, "main.py", "--dry-run"]
    assert stopped(command, signal.SIGINT, PYTHONPATH=str(tmp_path)) == (130, STOPPED)


@pytest.mark.parametrize("into", ["| head -n 1", "> /dev/full"])
def test_an_output_that_nobody_reads_does_not_stop_a_run(tmp_path, into):
    printing = script("[log('x' * 100) for line in range(3000)]; print('a table')")
    command = f"{shlex.join([*printing, str(tmp_path)])} {into}"
    done = subprocess.run(command, shell=True, cwd=PROJECT, capture_output=True, text=True)
    assert len((tmp_path / "run.log").read_text().splitlines()) == 3000
    assert "Traceback" not in done.stderr


def test_a_terminal_that_cannot_show_a_sign_ends_nothing(tmp_path):
    printing = script("print('96.1 ± 0.2'); log('97.0 ± 0.1'); raise InputError('± σ')")
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([*printing, tmp_path], cwd=PROJECT, env=ascii_only, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout.splitlines() == ["96.1 \\xb1 0.2", "97.0 \\xb1 0.1"]
    assert done.stderr == "error: \\xb1 \\u03c3\n"
    assert "97.0 ± 0.1" in (tmp_path / "run.log").read_text(encoding="utf-8")
    with open("/dev/full", "w") as full:  # an error that nobody can read keeps its status
        assert subprocess.run([*printing, tmp_path], cwd=PROJECT, stderr=full, capture_output=False).returncode == 2


def test_help_waits_for_no_library_and_shows_every_option():
    code = "import sys; sys.modules['torch'] = None; import experiment.command_line as line; line.parse_arguments()"
    done = subprocess.run([sys.executable, "-c", code, "--help"], cwd=PROJECT, capture_output=True, text=True)
    options = ("--config", "--dry-run", "--fresh", "section.key=value")
    assert done.returncode == 0 and all(option in done.stdout for option in options), done.stderr
    _, _, example = done.stdout.partition("for example:")
    assert "[" in example and "[" not in re.sub("'[^']*'", "", example), "zsh reads brackets that are not quoted"


@pytest.mark.parametrize("options", [("--pretrain", "--fresh"), ("--dry-run", "--fresh"), ("--fast",)])
def test_wrong_options_are_refused(options, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse_arguments(options)
    assert ("unrecognized arguments" if len(options) == 1 else "not allowed with argument") in capsys.readouterr().err


@pytest.fixture
def three(monkeypatch) -> list[Processes]:
    """Three that share a store, as torchrun makes them, to be used by a thread each."""
    store, ranks = dist.HashStore(), iter(range(3))
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "0")

    def rendezvous(url: str, timeout: timedelta) -> Iterator[tuple[dist.Store, int, int]]:
        assert timeout <= timedelta(minutes=10), "those whose launcher is dead are to end"
        store.set_timeout(timedelta(milliseconds=10))  # work may take longer than that
        return iter([(store, next(ranks), 3)])

    monkeypatch.setattr(dist, "rendezvous", rendezvous)
    return [Processes() for _ in range(3)]


def test_a_process_that_waits_for_another_one_can_be_stopped(three):
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    with pytest.raises(KeyboardInterrupt):
        three[1].first(print)


def test_every_task_is_taken_once_after_the_beginning_and_all_is_gathered_in_order(three):
    done = []

    def work(processes: Processes) -> object:
        processes.first(lambda: (time.sleep(0.1), done.append("begun")))
        done.append("after")
        processes.once("shared", lambda: (time.sleep(0.1), done.append("shared")))
        done.append("later")
        taken = list(processes.take(range(30)))
        return processes.gathered({"rank": processes.rank, "taken": taken})

    with ThreadPoolExecutor(3) as threads:
        gathered, *empty = threads.map(work, three)
    assert empty == [[], []] and [share["rank"] for share in gathered] == [0, 1, 2]
    assert sorted(sum((share["taken"] for share in gathered), [])) == list(range(30))
    assert done[0] == "begun" and done.count("begun") == done.count("shared") == 1
    assert done.count("after") == done.count("later") == 3 and done.index("shared") < done.index("later")


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
