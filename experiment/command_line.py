"""The arguments of main.py, and the exit status and the line with which a run ends."""

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from experiment.files import ROOT
from mimu.errors import InputError, one_line


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
    flag("--dry-run", help="count the files that exist and those that a run would make, and stop")
    flag("--pretrain", help="train the GCN in mimu/ on the classifiers of all variants, and stop")
    flag("--fresh", help="first remove the files of earlier runs of the same config")
    about = "a setting to change, its value read as YAML: seed=1, eval.step=50, gcn.rounds=2"
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help=about)
    return parser.parse_intermixed_args(arguments)


def stop(number: int, frame: object) -> None:
    """Ends a run on a signal as Ctrl-C does."""
    raise KeyboardInterrupt(number)


def describe(error: BaseException, is_fresh: bool) -> tuple[int, str]:
    """Returns the exit status of a run that an error ends, and the line that the user reads."""
    if isinstance(error, KeyboardInterrupt):
        again = "the same command without --fresh" if is_fresh else "the same command"
        number = (error.args or [signal.SIGINT])[0]
        return 128 + number, f"stopped: finished work is kept; run {again} again to resume"
    if isinstance(error, InputError):
        return 2, f"error: {error}"[:2000]
    return 2, f"error: {error.filename or 'a file'}: {error.strerror or one_line(error)}"


def run_command(start: Callable[[argparse.Namespace], None], arguments: Sequence[str] | None = None) -> int:
    """Calls `start` with the parsed arguments, and returns the exit status.

    0: done; 2: an error that the user can mend, such as a setting, a file or a full disk; 130: stopped by Ctrl-C; 143:
    stopped by SIGTERM. Any other error is raised: Python prints its traceback, and ends with status 1.
    """
    sys.stdout.reconfigure(errors="backslashreplace")  # for terminals that cannot show every character
    parsed = parse_arguments(arguments)
    signal.signal(signal.SIGTERM, stop)
    try:
        start(parsed)
        sys.stdout.flush()
        return 0
    except (KeyboardInterrupt, InputError, OSError) as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends one after a Ctrl-C
        status, line = describe(error, parsed.fresh)
    with suppress(OSError):  # the terminal is closed
        print(line, file=sys.stderr)
    return status
