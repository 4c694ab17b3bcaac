"""The command line: reads a config and runs what it describes."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from types import FrameType

CONFIG = Path(__file__).resolve().parent / "configs" / "config.yaml"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="main.py",
        description="Trains a classifier, makes it forget classes by masks of its weights, scores and plots it all.",
        epilog="for example: main.py sweep.forget_digits=[3] 'sweep.kappa=[100, 300]' gcn.steps=200",
    )
    parser.add_argument(
        "--config",
        type=Path,
        default=CONFIG,
        metavar="PATH",
        help="a YAML file with what it changes of configs/config.yaml, where every setting is explained",
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--pretrain",
        action="store_true",
        help="train one masking GCN on the classifiers of all variants and seeds of the config, keep it for "
        "gcn.pretrained, and stop",
    )
    mode.add_argument(
        "--plot-only",
        action="store_true",
        help="draw the reports anew from the metrics of a run of the same config, and stop",
    )
    mode.add_argument(
        "--dry-run",
        action="store_true",
        help="say what would be run, what is there already, and about how long it would take, and stop",
    )
    mode.add_argument(
        "--fresh",
        action="store_true",
        help="remove first what earlier runs of the same config have left",
    )
    parser.add_argument("--debug", action="store_true", help="show where in the code an error was raised")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="a setting to change, its value read as YAML: seed=1, eval.step=50, gcn.prior=0.1",
    )
    return parser.parse_intermixed_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status.

    0: all is done; 2: something that the user can mend, such as a setting, a file, a full disk; 1: any other error;
    130 and 143: stopped by Ctrl-C and by SIGTERM
    """
    started = time.perf_counter()
    # Where the shell has closed them, Python has none.
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))
    parsed = parse_arguments(arguments)
    before = signal.getsignal(signal.SIGTERM)
    if os.environ.get("WORLD_SIZE", "1") == "1":  # torchrun ends its processes itself, also while they wait
        signal.signal(signal.SIGTERM, terminate)
    try:
        start(parsed, started)
    except KeyboardInterrupt as stopped:
        again = "the same command without --fresh" if parsed.fresh else "the same command"
        message = f"stopped: all that is finished stays, and {again} goes on from there"
        print(f"\n{message}", file=sys.stderr)
        if not parsed.dry_run:
            note(message)
        return 128 + (signal.SIGTERM if isinstance(stopped, Terminated) else signal.SIGINT)
    except Exception as error:
        if parsed.debug:
            raise
        return tell(error, has_log=not parsed.dry_run)
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def start(parsed: argparse.Namespace, started: float) -> None:
    # Imported here, so that --help does not wait for PyTorch.
    from config import load_variants
    from pipeline import dry_run, plot, pretrain, run

    configs = load_variants(parsed.config, parsed.overrides)
    if parsed.dry_run:
        dry_run(configs)
    elif parsed.pretrain:
        pretrain(configs)
    elif parsed.plot_only:
        plot(configs)
    else:
        run(configs, started=started, is_fresh=parsed.fresh)


class Terminated(KeyboardInterrupt):
    """SIGTERM: the run ends as it does on Ctrl-C."""


def terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


def tell(error: Exception, has_log: bool = True) -> int:
    """Prints an error as one line, and returns the exit status. The log gets the traceback of what nobody expected."""
    from artifacts import InputError, one_line

    if isinstance(error, BrokenPipeError):  # of `main.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if isinstance(error, InputError):
        say(f"error: {error}")
        return 2
    if isinstance(error, OSError):
        say(f"error: {error.filename or 'a file'}: {error.strerror or one_line(error)}")
        return 2
    where = traceback.extract_tb(error.__traceback__)[-1]
    log = "the traceback is in reports/run.log, and " if has_log else ""
    place = f"{Path(where.filename).name}, line {where.lineno}"
    say(
        f"error: {type(error).__name__}: {one_line(error)} ({place}); {log}--debug shows {'it' if has_log else 'where'}"
    )
    if has_log:
        note("".join(traceback.format_exception(error)))
    return 1


def say(line: str) -> None:
    """Prints a line to stderr, whatever characters are in it."""
    print(line.encode(errors="backslashreplace").decode(), file=sys.stderr)


def note(message: str) -> None:
    """Says it in the log of the runs, if that can be written."""
    log = Path(__file__).resolve().parent / "reports" / "run.log"
    with suppress(OSError):
        log.parent.mkdir(exist_ok=True)
        with open(log, "a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}\n".encode(errors="backslashreplace").decode())


if __name__ == "__main__":
    sys.exit(main())
