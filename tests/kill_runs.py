"""Starts the smoke config again and again, kills it at random times, and compares what it ends with.

`python tests/kill_runs.py FOLDER --kills 25 --seed 0` prints, as JSON, how many runs were killed, how many sequences of
killed runs were finished by an undisturbed one, and how many of these have the metrics of a run that was never killed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torchvision  # noqa: E402, F401  # once for all runs

import artifacts  # noqa: E402
import pipeline  # noqa: E402
from config import load_variants  # noqa: E402


def start(folder: Path) -> int:
    """Runs the smoke config in a process of its own, which has all imports already; returns its number."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            pipeline.run(load_variants(Path(__file__).resolve().parents[1] / "configs" / "smoke.yaml"), folder)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return child


def ended(child: int, within: float) -> int | None:
    """The status of a process that ends in time, else None."""
    until = time.perf_counter() + within
    while time.perf_counter() < until:
        if (status := os.waitpid(child, os.WNOHANG))[0]:
            return status[1]
        time.sleep(0.01)
    return None


def results(folder: Path) -> dict[str, dict]:
    """Every experiment's JSON without its seconds, checked for damage, as are all checkpoints."""
    for path in folder.rglob("*.pt"):
        artifacts.load(path)
    found = {path.name: artifacts.load(path) for path in folder.glob("eval/*/metrics/*.json")}
    for result in found.values():
        del result["seconds"]
    return found


def empty(folder: Path) -> None:
    for name in ("checkpoints", "datasets/Graphs", "eval", "reports"):
        shutil.rmtree(folder / name, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder, random = arguments.folder, Random(arguments.seed)
    artifacts.code_of("pipeline")  # kept for all runs
    started = time.perf_counter()
    if ended(start(folder), 600) != 0:
        sys.exit("the undisturbed run failed")
    took = time.perf_counter() - started
    expected = results(folder)
    empty(folder)
    kills = finished = equal = 0
    while kills < arguments.kills:
        child = start(folder)
        status = ended(child, random.uniform(0, took))
        if status is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            kills += 1
            # Now and then the sequence ends with a run that is left alone.
            if random.random() < 0.9 and kills < arguments.kills:
                continue
            status = ended(start(folder), 600)
        finished += 1
        equal += status == 0 and results(folder) == expected and not list(folder.rglob("*.mimu-partial"))
        empty(folder)
    print(json.dumps({"kills": kills, "finished": finished, "equal": equal, "seconds": time.perf_counter() - started}))


if __name__ == "__main__":
    main()
