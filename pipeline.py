"""The stages of a run in their order: data, classifier, activation graphs, masking GCN, experiments, reports."""

from __future__ import annotations

import dataclasses
import json
import resource
import sys
import time
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from config import Config
from data import NUM_CLASSES, GraphGenerator, ImageData, load_image_data
from eval import Eval, Experiment, Request, slug
from model import HookedMNISTClassifier, MaskingGCN, keep_freed_memory
from reporter import Comparison, Reporter
from trainer import PRETRAINED, GCNTrainer, TrainedGCN, Trainer

ROOT = Path(__file__).resolve().parent


class Run:
    """What the stages share: the folder of the artifacts, the seconds that each took, data and classifiers."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.seconds: dict[str, float] = {}
        self.test_scores: dict[str, float] = {}
        self._data: dict[Hashable, ImageData] = {}
        self._classifiers: dict[Hashable, HookedMNISTClassifier] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measures a stage and says when it is done."""
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started
        print(f"{name}: {self.seconds[name]:.1f} s", flush=True)

    def data(self, config: Config) -> ImageData:
        """The data set of a config, read once."""
        key = (config.dataset, config.device, config.held_out)
        if key not in self._data:
            with self.stage(f"data, {config.dataset}"):
                device = config.torch_device()
                self._data[key] = load_image_data(config.dataset, self.root / "datasets", device, config.held_out)
        return self._data[key]

    def classifier(self, config: Config, seed: int, variant: str) -> HookedMNISTClassifier:
        """The classifier of a config and a seed, trained once for all variants that leave it as it is."""
        data = self.data(config)
        key = (config.dataset, config.device, config.held_out, config.classifier, seed)
        if key not in self._classifiers:
            with self.stage(f"classifier, {label(variant, seed)}"):
                classifier = Trainer(config.classifier, seed).train(data.train, NUM_CLASSES)
                correct = classifier(data.test.images).argmax(1) == data.test.labels
            self.test_scores[label(variant, seed)] = 100 * correct.double().mean().item()
            self._classifiers[key] = classifier
        self.save(
            self.root / "checkpoints" / f"classifier_{stem(variant, seed)}.pt", self._classifiers[key], config, seed
        )
        return self._classifiers[key]

    def graphs(self, config: Config, seed: int, variant: str) -> GraphGenerator:
        """The activation graphs of the classifier of a config and a seed."""
        classifier = self.classifier(config, seed, variant)
        with self.stage(f"activation graphs, {label(variant, seed)}"):
            return GraphGenerator(classifier, self.data(config).train, config.graphs, seed)

    def gcn(self, config: Config, seed: int, variant: str, graphs: GraphGenerator, top_k: int) -> MaskingGCN:
        """The masking GCN for these graphs: the pretrained one, or one that is trained now."""
        if config.gcn.pretrained:
            return TrainedGCN.load().gcn.to(graphs.labels.device)
        gcn = GCNTrainer(config.gcn, [graphs], top_k, seed).train()
        self.save(
            self.root / "checkpoints" / f"gcn_{stem(variant, seed)}_top_k_{top_k}.pt", gcn, config, seed, top_k=top_k
        )
        return gcn

    def save(self, path: Path, module: nn.Module, config: Config, seed: int, **more: Any) -> None:
        """Writes a checkpoint: the weights, with the config and the seed that made them."""
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint = {"state_dict": module.state_dict(), "config": dataclasses.asdict(config), "seed": seed}
        torch.save(checkpoint | more, path)

    def experiments(self, config: Config, seed: int, variant: str) -> Iterator[tuple[int, Path]]:
        """Runs every experiment on one classifier; yields top_k and the JSON of each."""
        graphs = self.graphs(config, seed, variant)
        graphs.save(self.root / "datasets" / "Graphs" / f"{stem(variant, seed)}.pt")
        num_vertices, data, settings = graphs.graph.num_vertices, self.data(config), dataclasses.asdict(config)
        for top_k in config.sweep.top_ks(num_vertices):
            gcn_stage = f"masking GCN, {label(variant, seed)}, top-K {top_k}"
            with self.stage(gcn_stage):
                gcn = self.gcn(config, seed, variant, graphs, top_k)
            with self.stage(f"experiments, {label(variant, seed)}, top-K {top_k}"):
                for digit in tqdm(config.sweep.forget_digits, "experiments", unit="digit", leave=False, disable=None):
                    trainer = Trainer(config.classifier, seed)
                    request = Request(
                        config.eval, graphs.classifier, trainer, data.train, graphs, gcn, digit, top_k, seed
                    )
                    shared: dict[Hashable, Any] = {}
                    kappas = [(kappa, "fixed") for kappa in config.sweep.fixed_kappas(num_vertices)]
                    if "auto" in config.sweep.kappa:
                        kappas.append((request.auto_kappa(request.order), "auto"))
                    for kappa, choice in kappas:
                        experiment = Experiment(
                            variant=variant,
                            seed=seed,
                            forget_digit=digit,
                            mask_layer=config.graphs.mask_layer,
                            top_k=top_k,
                            kappa=kappa,
                            kappa_choice=choice,
                            gcn_seconds=self.seconds[gcn_stage],
                            config=settings,
                        )
                        evaluation = Eval(config.eval, experiment, request, data, self.root / "eval", shared)
                        evaluation.eval()
                        yield top_k, evaluation.metrics_path


def label(variant: str, seed: int) -> str:
    """How messages call the classifier of a variant and a seed."""
    return f"{variant}, seed {seed}" if variant else f"seed {seed}"


def stem(variant: str, seed: int) -> str:
    """How names of files call it."""
    return f"seed_{seed}_{slug(variant)}" if variant else f"seed_{seed}"


def run(configs: Mapping[str, Config], root: Path = ROOT, started: float | None = None) -> None:
    """Runs the experiments of every config by its name, "" for the only one, and leaves their artifacts under `root`.

    started: when the clock of the whole run began
    """
    started = time.perf_counter() if started is None else started
    prepare(configs)
    stages = Run(root)
    for config in configs.values():
        stages.data(config)  # all of it first, so that a missing file is told before any work
    metrics: dict[tuple[str, int], list[Path]] = {}
    for variant, config in configs.items():
        for seed in config.seeds:
            for top_k, path in stages.experiments(config, seed, variant):
                metrics.setdefault((variant, top_k), []).append(path)
    with stages.stage("reports"):
        tables = report(configs, metrics, root / "reports")
    # Kilobytes on Linux, bytes on macOS.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    total = time.perf_counter() - started
    summary = {
        "seconds": stages.seconds,
        "total_seconds": total,
        "peak_bytes": peak,
        "threads": torch.get_num_threads(),
        "classifier_test_scores": stages.test_scores,
    }
    (root / "reports" / "run.json").write_text(json.dumps(summary, indent=1))
    print("\n".join(f"\n{table}" for table in tables))
    print(f"\n{total:.0f} s, {peak / 1e9:.1f} GB at most. Curves and tables: {root / 'reports'}")
    print(
        f"Metrics and plots of each experiment: {root / 'eval' / 'Metrics and Plots'}; masks: {root / 'eval' / 'masks'}"
    )


def pretrain(configs: Mapping[str, Config], root: Path = ROOT) -> None:
    """Trains one masking GCN on the classifiers of all configs and their seeds, with the settings of the first config.

    It takes the place of the tracked one.
    """
    prepare(configs)
    stages = Run(root)
    config = next(iter(configs.values()))
    graphs = [stages.graphs(each, seed, variant) for variant, each in configs.items() for seed in each.seeds]
    with stages.stage(f"masking GCN, {len(graphs)} classifiers"):
        gcn = GCNTrainer(config.gcn, graphs, config.sweep.top_k[0], config.seed).train()
    path = root / PRETRAINED.relative_to(ROOT)
    stages.save(path, gcn, config, config.seed, top_k=config.sweep.top_k[0])
    print(f"{path}: {path.stat().st_size / 1000:.0f} KB")


def prepare(configs: Mapping[str, Config]) -> None:
    """Sets up memory and threads, and checks the pretrained GCN where a config asks for it."""
    keep_freed_memory()
    for config in configs.values():
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        if config.gcn.pretrained:
            TrainedGCN.load().check(config.graphs)


def report(configs: Mapping[str, Config], metrics: Mapping[tuple[str, int], list[Path]], folder: Path) -> list[str]:
    """Draws and writes the reports: of every config and top_k, and of variants side by side. Returns closing tables."""
    reporters = {}
    for (variant, top_k), paths in metrics.items():
        several = sum(name == variant for name, _ in metrics) > 1
        parts = (["variants", slug(variant)] if variant else []) + ([f"top_k_{top_k}"] if several else [])
        name = ", ".join(([variant] if variant else []) + ([f"top-K {top_k}"] if several else []))
        reporters[name] = Reporter(configs[variant].report, paths, folder.joinpath(*parts))
    if "" in configs:
        for reporter in reporters.values():
            reporter.plot()
        return [reporter.closing_table() for reporter in reporters.values()]
    for reporter in reporters.values():
        reporter.write_summary()
    comparison = Comparison(reporters, folder)
    comparison.plot()
    return [comparison.table()]
