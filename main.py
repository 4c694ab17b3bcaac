"""Runs what a config describes: classifier, activation graphs, masking GCN, unlearning, metrics, reports."""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

if TYPE_CHECKING:
    from config import Config

ROOT = Path(__file__).resolve().parent


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="main.py",
        description="Trains a classifier, makes it forget classes by masks of its weights, scores and plots it all.",
        epilog="for example: main.py sweep.forget_digits=[3] 'sweep.kappa=[100, 300]' gcn.steps=200",
    )
    parser.add_argument(
        "--config",
        type=Path,
        default=ROOT / "configs" / "config.yaml",
        metavar="PATH",
        help="a YAML file with what it changes of configs/config.yaml, where every setting is explained",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="a setting to change, its value read as YAML: seed=1, eval.step=50, gcn.prior=0.1",
    )
    return parser.parse_args(arguments)


@contextmanager
def stage(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Measures a stage of the run and says when it is done."""
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started
    print(f"{name}: {seconds[name]:.1f} s", flush=True)


def run(config: Config, root: Path = ROOT, started: float | None = None) -> None:
    """Runs all stages and leaves their artifacts under `root`. started: when the clock of the whole run began."""
    import torch

    from data import NUM_CLASSES, GraphGenerator, load_image_data
    from eval import Eval, Experiment, Request
    from model import keep_freed_memory
    from reporter import Reporter
    from trainer import GCNTrainer, Trainer

    keep_freed_memory()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    started = time.perf_counter() if started is None else started
    settings = dataclasses.asdict(config)
    seconds: dict[str, float] = {}
    test_scores: dict[int, float] = {}
    metrics: dict[int, list[Path]] = {top_k: [] for top_k in config.sweep.top_k}

    def save(module: torch.nn.Module, name: str, seed: int) -> None:
        (root / "checkpoints").mkdir(parents=True, exist_ok=True)
        checkpoint = {"state_dict": module.state_dict(), "config": settings, "seed": seed}
        torch.save(checkpoint, root / "checkpoints" / f"{name}.pt")

    with stage("data", seconds):
        data = load_image_data(config.dataset, root / "datasets", config.torch_device())
    for seed in config.seeds:
        with stage(f"classifier, seed {seed}", seconds):
            trainer = Trainer(config.classifier, seed)
            classifier = trainer.train(data.train, NUM_CLASSES)
            save(classifier, f"classifier_seed_{seed}", seed)
            correct = classifier(data.test.images).argmax(1) == data.test.labels
            test_scores[seed] = 100 * correct.double().mean().item()
        with stage(f"activation graphs, seed {seed}", seconds):
            graphs = GraphGenerator(classifier, data.train, config.graphs, seed)
            graphs.save(root / "datasets" / "Graphs" / f"seed_{seed}.pt")
        for top_k in config.sweep.top_k:
            gcn_stage = f"masking GCN, seed {seed}, top-K {top_k}"
            with stage(gcn_stage, seconds):
                gcn = GCNTrainer(config.gcn, graphs, top_k, seed).train()
                save(gcn, f"gcn_seed_{seed}_top_k_{top_k}", seed)
            with stage(f"experiments, seed {seed}, top-K {top_k}", seconds):
                for digit in tqdm(config.sweep.forget_digits, "experiments", unit="digit", leave=False, disable=None):
                    request = Request(config.eval, classifier, trainer, data.train, graphs, gcn, digit, top_k, seed)
                    shared: dict[Any, Any] = {}
                    kappas = [(kappa, "fixed") for kappa in config.sweep.fixed_kappas]
                    if "auto" in config.sweep.kappa:
                        kappas.append((request.auto_kappa(request.order), "auto"))
                    for kappa, choice in kappas:
                        experiment = Experiment(
                            seed, digit, config.graphs.mask_layer, top_k, kappa, choice, seconds[gcn_stage], settings
                        )
                        evaluation = Eval(config.eval, experiment, request, data, root / "eval", shared)
                        evaluation.eval()
                        metrics[top_k].append(evaluation.metrics_path)

    with stage("reports", seconds):
        reporters = []
        for top_k, paths in metrics.items():
            folder = root / "reports" if len(metrics) == 1 else root / "reports" / f"top_k_{top_k}"
            reporters.append(Reporter(config.report, paths, folder))
            reporters[-1].plot()
    # Kilobytes on Linux, bytes on macOS.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    for reporter in reporters:
        print(f"\n{reporter.closing_table()}")
    total = time.perf_counter() - started
    summary = {"seconds": seconds, "total_seconds": total, "peak_bytes": peak, "threads": torch.get_num_threads()}
    summary["classifier_test_scores"] = test_scores
    (root / "reports" / "run.json").write_text(json.dumps(summary, indent=1))
    print(f"\n{total:.0f} s, {peak / 1e9:.1f} GB at most. Curves and tables: {root / 'reports'}")
    print(
        f"Metrics and plots of each experiment: {root / 'eval' / 'Metrics and Plots'}; masks: {root / 'eval' / 'masks'}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 2 for a setting that cannot work or data that is not there."""
    started = time.perf_counter()
    parsed = parse_arguments(arguments)
    # Imported here, so that --help does not wait for PyTorch.
    from config import ConfigError, load_config
    from data import DataError
    from trainer import TrainingError

    try:
        run(load_config(parsed.config, parsed.overrides), started=started)
    except (ConfigError, DataError, TrainingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
