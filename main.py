"""The command line: reads a config and runs what it describes."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

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
    parser.add_argument(
        "--pretrain",
        action="store_true",
        help="train one masking GCN on the classifiers of all variants and seeds of the config, keep it for "
        "gcn.pretrained, and stop",
    )
    parser.add_argument(
        "--plot-only",
        action="store_true",
        help="draw the reports anew from the metrics of a run of the same config, and stop",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="a setting to change, its value read as YAML: seed=1, eval.step=50, gcn.prior=0.1",
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 2 for a setting that cannot work or files that are not there or not what they should."""
    started = time.perf_counter()
    parsed = parse_arguments(arguments)
    # Imported here, so that --help does not wait for PyTorch.
    from config import ConfigError, load_variants
    from data import DataError
    from pipeline import plot, pretrain, run
    from trainer import CheckpointError, TrainingError

    try:
        configs = load_variants(parsed.config, parsed.overrides)
        if parsed.pretrain:
            pretrain(configs)
        elif parsed.plot_only:
            plot(configs)
        else:
            run(configs, started=started)
    except (CheckpointError, ConfigError, DataError, TrainingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
