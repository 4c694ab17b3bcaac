"""The arguments of main.py, and the exit status and the one line that an error ends with."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from experiment.files import ROOT, Log
from mimu.errors import ArtifactError, InputError, one_line


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line; exits where it asks for help or is wrong."""
    parser = argparse.ArgumentParser(
        prog="main.py",
        description="Trains a classifier, makes it forget classes by masks of its weights, scores and plots it all.",
        epilog="for example: main.py 'sweep.forget_digits=[3]' 'sweep.kappa=[100, 300]' gcn.steps=200",
    )
    about = "a YAML file with what it changes of configs/config.yaml, where every setting is explained"
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "config.yaml", metavar="PATH", help=about)
    flag = partial(parser.add_mutually_exclusive_group().add_argument, action="store_true")
    flag("--plot-only", help="draw the reports anew from the metrics of a run of the same config, and stop")
    flag("--dry-run", help="say what is there already and what would be made, and stop")
    flag("--pretrain", help="train the GCN for mimu/ on the classifiers of all variants, and stop")
    flag("--fresh", help="remove first what earlier runs of the same config have left")
    parser.add_argument("--debug", action="store_true", help="show where in the code an error was raised")
    about = "a setting to change, its value read as YAML: seed=1, eval.step=50, gcn.rounds=2"
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help=about)
    return parser.parse_intermixed_args(arguments)


def stop(number: int, frame: object) -> None:
    """Ends a run on a signal as Ctrl-C does."""
    raise KeyboardInterrupt(number)


def run_command(
    start: Callable[[argparse.Namespace], None], arguments: Sequence[str] | None = None, root: Path = ROOT
) -> int:
    """Calls `start` with the parsed arguments, and returns the exit status.

    0: all is done; 2: something that the user can mend, such as a setting, a file, a full disk; 1: any other error;
    130: stopped by Ctrl-C; 143: by SIGTERM. What nobody expected leaves its traceback in `reports/run.log`.
    """
    sys.stdout = sys.stdout or open(os.devnull, "w")  # where the shell has closed them, Python has none
    sys.stderr = sys.stderr or open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a sign that a terminal cannot show is no reason to end
    parsed = parse_arguments(arguments)
    note = ""
    signal.signal(signal.SIGTERM, stop)
    try:
        start(parsed)
        sys.stdout.flush()
        return 0
    except BrokenPipeError:  # of `main.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt as stopped:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends one behind a Ctrl-C
        status = 128 + (stopped.args or [signal.SIGINT])[0]
        again = "the same command without --fresh" if parsed.fresh else "the same command"
        note = line = f"stopped: all that is finished stays, and {again} goes on from there"
    except Exception as error:
        if parsed.debug:
            traceback.print_exc()
        status = 2
        if isinstance(error, InputError):
            line = f"error: {error}"[:2000]
        elif isinstance(error, OSError):
            line = f"error: {error.filename or 'a file'}: {error.strerror or one_line(error)}"
        else:
            status = 1
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(where.filename).name}, line {where.lineno}"
            more = "--debug shows where" if parsed.dry_run else "the traceback is in reports/run.log"
            line = f"error: {type(error).__name__}: {one_line(error)} ({place}); {more}"
            note = "".join(traceback.format_exception(error))
    with suppress(OSError):  # nobody reads it
        print(line, file=sys.stderr)
    if note and not parsed.dry_run:  # which writes nothing
        with suppress(ArtifactError):
            Log(root / "reports" / "run.log").note(note)
    return status
