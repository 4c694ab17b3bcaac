"""The arguments of main.py, and the exit status and the line with which a run ends."""

import argparse
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
    """Reads the command line. Exits for --help, and with status 2 if an option is wrong."""
    parser = argparse.ArgumentParser(
        prog="main.py",
        description="Trains a classifier, makes it forget classes by masks of its weights, scores and plots it all.",
        epilog="for example: main.py 'sweep.forget_digits=[3]' 'sweep.kappa=[100, 300]' gcn.steps=200",
    )
    about = "a YAML file with what it changes of configs/config.yaml, where every setting is explained"
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "config.yaml", metavar="PATH", help=about)
    flag = partial(parser.add_mutually_exclusive_group().add_argument, action="store_true")
    flag("--dry-run", help="list the files that exist and those that a run would make, and stop")
    flag("--pretrain", help="train the GCN in mimu/ on the classifiers of all variants, and stop")
    flag("--fresh", help="first remove the files of earlier runs of the same config")
    about = "a setting to change, its value read as YAML: seed=1, eval.step=50, gcn.rounds=2"
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help=about)
    return parser.parse_intermixed_args(arguments)


def stop(number: int, frame: object) -> None:
    """Ends a run on a signal as Ctrl-C does."""
    raise KeyboardInterrupt(number)


def describe(error: BaseException, parsed: argparse.Namespace) -> tuple[int, str, str]:
    """Returns the exit status of an error, the line that the user reads, and what the log says, "" for nothing."""
    if isinstance(error, KeyboardInterrupt):
        again = "the same command without --fresh" if parsed.fresh else "the same command"
        line = f"stopped: finished work is kept; run {again} again to resume"
        return 128 + (error.args or [signal.SIGINT])[0], line, "" if parsed.dry_run else line
    if isinstance(error, InputError):
        return 2, f"error: {error}"[:2000], ""
    if isinstance(error, OSError):
        return 2, f"error: {error.filename or 'a file'}: {error.strerror or one_line(error)}", ""
    line = f"error: {type(error).__name__}: {one_line(error)}; the traceback is in reports/run.log"
    return 1, line, "".join(traceback.format_exception(error))


def run_command(
    start: Callable[[argparse.Namespace], None], arguments: Sequence[str] | None = None, root: Path = ROOT
) -> int:
    """Calls `start` with the parsed arguments, and returns the exit status.

    0: done; 2: an error that the user can mend, such as a setting, a file or a full disk; 1: any other error, whose
    traceback goes to `reports/run.log`; 130: stopped by Ctrl-C; 143: stopped by SIGTERM.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # for terminals that cannot show every character
    parsed = parse_arguments(arguments)
    signal.signal(signal.SIGTERM, stop)
    try:
        start(parsed)
        sys.stdout.flush()
        return 0
    except (KeyboardInterrupt, Exception) as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends one after a Ctrl-C
        status, line, note = describe(error, parsed)
    with suppress(OSError):  # the terminal is closed
        print(line, file=sys.stderr)
    if note:
        with suppress(ArtifactError):
            Log(root / "reports" / "run.log").note(note)
    return status
