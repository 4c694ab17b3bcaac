"""The stages of a run in their order: data, classifier, activation graphs, masking GCN, experiments, reports."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from comparison import AuditReport, Comparison
from config import Config
from data import IMAGE_SIZE, NUM_CLASSES, DataError, GraphGenerator, ImageData, is_correct, load_image_data
from eval import Eval, Experiment, metrics_folder, slug
from methods import Request
from model import HookedMNISTClassifier, MaskingGCN, keep_freed_memory
from reporter import Reporter
from trainer import PRETRAINED, GCNTrainer, TrainedGCN, Trainer, TrainingError

ROOT = Path(__file__).resolve().parent


@dataclasses.dataclass(frozen=True)
class Training:
    """What the requests to forget a class of one classifier share: the classifier, its graphs and its masking GCN."""

    variant: str
    config: Config
    seed: int
    top_k: int

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"{label(self.variant, self.seed)}, top-K {self.top_k}"


@dataclasses.dataclass(frozen=True)
class Task:
    """What one process does at a time: a training, or all experiments on one forget digit after it."""

    training: Training
    digit: int | None = None


def tasks_in_order(configs: Mapping[str, Config], processes: int) -> list[Task]:
    """All tasks of a run. Trainings come early enough for the other processes to have requests to work on meanwhile."""
    trainings = [
        Training(variant, config, seed, top_k)
        for variant, config in configs.items()
        for seed in config.seeds
        for top_k in config.sweep.top_ks(config.num_vertices)
    ]
    tasks = [Task(training) for training in trainings[: processes - 1]]
    for index, training in enumerate(trainings):
        tasks += [Task(ahead) for ahead in trainings[index + processes - 1 : index + processes]]
        tasks += [Task(training, digit) for digit in training.config.sweep.forget_digits]
    return tasks


class Processes:
    """The processes of a run: this one alone, or all that torchrun has started.

    They share the folder of the artifacts, on several machines by a network file system, and the store of
    torch.distributed. No tensor goes from one to another, so they are no process group: gloo and nccl are not needed.
    """

    def __init__(self, device: torch.device) -> None:
        self.rank, self.count = 0, 1
        self.store: dist.Store = dist.HashStore()
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            forever = datetime.timedelta(days=365)  # torchrun ends the others when one has failed
            self.store, self.rank, self.count = next(dist.rendezvous("env://", timeout=forever))
            # Tasks are counted anew when torchrun starts all processes again.
            self.store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), self.store)
            self.store.set_timeout(forever)
            if device.type == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())

    def take(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Task]]:
        """The next task that no process has taken, with its index, until there is none."""
        while (index := self.store.add("tasks taken", 1) - 1) < len(tasks):
            yield index, tasks[index]

    @contextmanager
    def one_before_the_others(self) -> Iterator[None]:
        """The first process passes, then all others, as where a file is to be unpacked once."""
        if self.rank > 0:
            self.store.get("first is done")
        yield
        if self.rank == 0:
            self.store.set("first is done", "")

    def gathered(self, value: Any) -> list[Any]:
        """The values (as JSON holds them) of all processes in order, at the first one; nothing at the others."""
        if self.rank > 0:
            self.store.set(f"share of {self.rank}", json.dumps(value))
            return []
        return [value] + [json.loads(self.store.get(f"share of {rank}")) for rank in range(1, self.count)]


class Run:
    """What the stages share: the folder of the artifacts, the seconds that each took, data and classifiers."""

    def __init__(self, root: Path, processes: Processes) -> None:
        self.root = root
        self.processes = processes
        self.seconds: dict[str, float] = {}
        self.test_scores: dict[str, float] = {}
        self._data: dict[Hashable, ImageData] = {}
        self._classifiers: dict[Hashable, HookedMNISTClassifier] = {}
        self._last: tuple[Training, GraphGenerator, MaskingGCN, float] | None = None

    @contextmanager
    def stage(self, name: str, is_last: bool = True) -> Iterator[None]:
        """Measures a stage, or a part of it, and says when it is done."""
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
        if is_last:
            process = f"process {self.processes.rank}: " if self.processes.count > 1 else ""
            tqdm.write(f"{process}{name}: {self.seconds[name]:.1f} s")
            sys.stdout.flush()

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
                correct = is_correct(classifier(data.test.images), data.test.labels)
            self.test_scores[label(variant, seed)] = 100 * correct.sum().item() / len(correct)
            self._classifiers[key] = classifier
        self.save(self.classifier_path(variant, seed), self._classifiers[key], config, seed)
        return self._classifiers[key]

    def graphs(self, config: Config, seed: int, classifier: HookedMNISTClassifier) -> GraphGenerator:
        """The activation graphs of a classifier."""
        return GraphGenerator(classifier, self.data(config).train, config.graphs, seed)

    def classifier_path(self, variant: str, seed: int) -> Path:
        return self.root / "checkpoints" / f"classifier_{stem(variant, seed)}.pt"

    def gcn_path(self, training: Training) -> Path:
        name = f"gcn_{stem(training.variant, training.seed)}_top_k_{training.top_k}.pt"
        return self.root / "checkpoints" / name

    def save(self, path: Path, module: nn.Module, config: Config, seed: int, **more: Any) -> None:
        """Writes a checkpoint: the weights, with the config and the seed that made them."""
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint = {"state_dict": module.state_dict(), "config": dataclasses.asdict(config), "seed": seed}
        # Another process may read it meanwhile.
        beside = path.with_name(f"{path.name}.{os.getpid()}")
        torch.save(checkpoint | more, beside)
        beside.replace(path)

    def train(self, training: Training) -> None:
        """Trains the classifier and its masking GCN, writes both, and tells the other processes so."""
        config, seed, top_k = training.config, training.seed, training.top_k
        classifier = self.classifier(config, seed, training.variant)
        with self.stage(f"activation graphs, {label(training.variant, seed)}"):
            graphs = self.graphs(config, seed, classifier)
        graphs.save(self.root / "datasets" / "Graphs" / f"{stem(training.variant, seed)}.pt")
        stage = f"masking GCN, {training.name}"
        with self.stage(stage):
            if config.gcn.pretrained:
                gcn = TrainedGCN.load().gcn.to(graphs.labels.device)
            else:
                gcn = GCNTrainer(config.gcn, [graphs], top_k, seed).train()
                self.save(self.gcn_path(training), gcn, config, seed, top_k=top_k)
        self._last = (training, graphs, gcn, self.seconds[stage])
        self.processes.store.set(training.name, repr(self.seconds[stage]))

    def trained(self, training: Training) -> tuple[GraphGenerator, MaskingGCN, float]:
        """Graphs and masking GCN of a training, and the seconds that it took: read from its files if not at hand."""
        if self._last is None or self._last[0] != training:
            seconds = float(self.processes.store.get(training.name))  # waits for the process that trains it
            config, device = training.config, self.data(training.config).train.labels.device
            classifier = HookedMNISTClassifier(
                config.classifier.hidden_sizes, IMAGE_SIZE, NUM_CLASSES, config.classifier.bias
            ).to(device)
            path = self.classifier_path(training.variant, training.seed)
            classifier.load_state_dict(torch.load(path, map_location=device, weights_only=True)["state_dict"])
            trained = TrainedGCN.load() if config.gcn.pretrained else TrainedGCN.load(self.gcn_path(training))
            graphs = self.graphs(config, training.seed, classifier)
            self._last = (training, graphs, trained.gcn.to(device), seconds)
        return self._last[1:]

    def work(self, tasks: Sequence[Task]) -> dict[str, Any]:
        """Does every task that no other process has taken.

        Returns, as JSON holds it: `metrics`, the paths of the experiments' JSON with the index of their task;
        `seconds` of the stages, `test_scores` of the classifiers, and `peak_bytes`, the most memory held.
        """
        metrics: list[tuple[int, list[str]]] = []
        hidden = True if self.processes.rank else None
        with tqdm(total=len(tasks), desc="tasks", unit="task", leave=False, disable=hidden) as progress:
            for index, task in self.processes.take(tasks):
                if task.digit is None:
                    self.train(task.training)
                else:
                    is_last = task.training not in [following.training for following in tasks[index + 1 : index + 2]]
                    self.trained(task.training)  # may wait for another process, which is not time of this stage
                    with self.stage(f"experiments, {task.training.name}", is_last):
                        metrics.append((index, list(map(str, self.experiments(task.training, task.digit)))))
                progress.update(index + 1 - progress.n)
        # Kilobytes on Linux, bytes on macOS.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return {
            "metrics": metrics,
            "seconds": dict(self.seconds),
            "test_scores": self.test_scores,
            "peak_bytes": peak,
        }

    def experiments(self, training: Training, digit: int) -> list[Path]:
        """Runs every experiment on one forget digit; returns the JSON of each."""
        graphs, gcn, gcn_seconds = self.trained(training)
        config, seed, top_k = training.config, training.seed, training.top_k
        num_vertices, data = graphs.graph.num_vertices, self.data(config)
        trainer = Trainer(config.classifier, seed)
        request = Request(config.eval, graphs.classifier, trainer, data.train, graphs, gcn, digit, top_k, seed)
        shared: dict[Hashable, Any] = {}
        kappas = [(kappa, "fixed") for kappa in config.sweep.fixed_kappas(num_vertices)]
        if "auto" in config.sweep.kappa:
            kappas.append((request.auto_kappa(request.order), "auto"))
        paths = []
        for kappa, choice in kappas:
            experiment = Experiment(
                variant=training.variant,
                seed=seed,
                forget_digit=digit,
                mask_layer=config.graphs.mask_layer,
                top_k=top_k,
                kappa=kappa,
                kappa_choice=choice,
                gcn_seconds=gcn_seconds,
                config=dataclasses.asdict(config),
            )
            evaluation = Eval(config.eval, experiment, request, data, self.root / "eval", shared)
            evaluation.eval()
            paths.append(evaluation.metrics_path)
        return paths


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
    processes = Processes(next(iter(configs.values())).torch_device())
    stages = Run(root, processes)
    with processes.one_before_the_others():
        for config in configs.values():
            stages.data(config)  # all of it first, so that a missing file is told before any work
    tasks = tasks_in_order(configs, processes.count)
    shares = processes.gathered(stages.work(tasks))
    if processes.rank > 0:
        return
    metrics = sorted((indexed for share in shares for indexed in share["metrics"]), key=lambda indexed: indexed[0])
    with stages.stage("reports"):
        results = [(tasks[index].training, list(map(Path, paths))) for index, paths in metrics]
        tables = report(results, root / "reports")
    seconds: Counter[str] = Counter(reports=stages.seconds["reports"])
    for share in shares:
        seconds.update(share["seconds"])
    peak = max(share["peak_bytes"] for share in shares)
    total = time.perf_counter() - started
    summary = {
        "seconds": seconds,
        "total_seconds": total,
        "peak_bytes": peak,
        "processes": processes.count,
        "threads": torch.get_num_threads(),
        "classifier_test_scores": {name: score for share in shares for name, score in share["test_scores"].items()},
    }
    (root / "reports" / "run.json").write_text(json.dumps(summary, indent=1))
    print("\n".join(f"\n{table}" for table in tables))
    each = " a process" if processes.count > 1 else ""
    print(f"\n{total:.0f} s, {peak / 1e9:.1f} GB at most{each}. Curves and tables: {root / 'reports'}")
    print(
        f"Metrics and plots of each experiment: {root / 'eval' / 'Metrics and Plots'}; masks: {root / 'eval' / 'masks'}"
    )


def pretrain(configs: Mapping[str, Config], root: Path = ROOT) -> None:
    """Trains one masking GCN on the classifiers of all configs and their seeds, with the settings of the first config.

    It takes the place of the tracked one.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise TrainingError("--pretrain runs in one process: start it without torchrun")
    prepare(configs)
    config = next(iter(configs.values()))
    stages = Run(root, Processes(config.torch_device()))
    for each in configs.values():
        stages.data(each)
    graphs = [
        stages.graphs(each, seed, stages.classifier(each, seed, variant))
        for variant, each in configs.items()
        for seed in each.seeds
    ]
    with stages.stage(f"masking GCN, {len(graphs)} classifiers"):
        gcn = GCNTrainer(config.gcn, graphs, config.sweep.top_k[0], config.seed).train()
    path = root / PRETRAINED.relative_to(ROOT)
    stages.save(path, gcn, config, config.seed, top_k=config.sweep.top_k[0])
    print(f"{path}: {path.stat().st_size / 1000:.0f} KB")


def plot(configs: Mapping[str, Config], root: Path = ROOT) -> None:
    """Draws and writes the reports anew from the JSON of experiments that were made with these configs.

    Settings of the reports may differ. Raises DataError where a config has no experiment.
    """
    folder = metrics_folder(root / "eval")
    found = [json.loads(path.read_text()) | {"path": path} for path in sorted(folder.glob("*.json"))]
    results = []
    for variant, config in configs.items():
        key = (variant, made_with(json.loads(json.dumps(dataclasses.asdict(config)))))
        own = [each for each in found if (each["variant"], made_with(each["config"])) == key]
        if not own:
            name = f"variant {variant}" if variant else "this config"
            raise DataError(f"{folder}: there is no experiment of {name}: run it first")
        groups = sorted({(each["seed"], each["top_k"]) for each in own})
        for seed, top_k in groups:
            paths = [each["path"] for each in own if (each["seed"], each["top_k"]) == (seed, top_k)]
            results.append((Training(variant, config, seed, top_k), paths))
    tables = report(results, root / "reports")
    print("\n".join(f"\n{table}" for table in tables))
    print(f"\nCurves and tables: {root / 'reports'}")


def made_with(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of a config, as JSON holds them, that say which experiments they are."""
    return {key: value for key, value in config.items() if key not in ("report", "threads", "device")}


def prepare(configs: Mapping[str, Config]) -> None:
    """Sets up memory and threads, and checks the pretrained GCN where a config asks for it."""
    keep_freed_memory()
    for config in configs.values():
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        if config.gcn.pretrained:
            TrainedGCN.load().check(config.graphs)


def report(results: Sequence[tuple[Training, list[Path]]], folder: Path) -> list[str]:
    """Draws and writes the reports: of every config and top_k, and of variants side by side. Returns closing tables."""
    metrics: dict[tuple[str, int], list[Path]] = {}
    configs: dict[str, Config] = {}
    for training, paths in results:
        metrics.setdefault((training.variant, training.top_k), []).extend(paths)
        configs[training.variant] = training.config
    reporters = {}
    for (variant, top_k), paths in metrics.items():
        several = sum(name == variant for name, _ in metrics) > 1
        parts = (["variants", slug(variant)] if variant else []) + ([f"top_k_{top_k}"] if several else [])
        name = ", ".join(([variant] if variant else []) + ([f"top-K {top_k}"] if several else []))
        reporters[name] = Reporter(configs[variant].report, paths, folder.joinpath(*parts))
    for reporter in reporters.values():
        audits = AuditReport(reporter) if reporter.has_audits else None
        sections = audits.tables() if audits else ()
        if "" in configs:
            reporter.plot(sections)
        else:
            reporter.write_summary(sections)
        if audits:
            audits.draw_audits()
    if "" in configs:
        return [reporter.closing_table() for reporter in reporters.values()]
    comparison = Comparison(reporters, folder)
    comparison.plot()
    return [comparison.table()]
