"""The stages of a run in their order: data, classifier, activation graphs, masking GCN, experiments, reports."""

from __future__ import annotations

import datetime
import json
import os
import platform
import resource
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

import artifacts
from artifacts import ROOT, Artifact, ArtifactError, locked, one_line
from comparison import AuditReport, Comparison
from config import Config
from data import IMAGE_SIZE, NUM_CLASSES, DataError, GraphGenerator, ImageData, is_correct, load_image_data
from eval import Eval, slug
from frontier import Frontier
from methods import Request
from model import HookedMNISTClassifier, MaskingGCN, keep_freed_memory
from plan import Artifacts, Plan, Task, Training, Work, tasks_in_order, thread_counts, time_in_words, trainings_of
from reporter import Reporter
from trainer import PRETRAINED, GCNTrainer, TrainedGCN, Trainer, TrainingError
from visualization import Visualization


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

    def take(self, tasks: Sequence[int]) -> Iterator[int]:
        """The next task that no process has taken, until there is none."""
        while (taken := self.store.add("tasks taken", 1) - 1) < len(tasks):
            yield tasks[taken]

    def told_by_the_first(self, tell: Callable[[], Any]) -> Any:
        """What the first process finds out (as JSON holds it), at all of them, once a run: the others wait for it."""
        if self.rank == 0:
            self.store.set("told", json.dumps(tell()))
        return json.loads(self.store.get("told"))

    def gathered(self, value: Any) -> list[Any]:
        """The values (as JSON holds them) of all processes in order, once a run, at the first one; else nothing."""
        if self.rank > 0:
            self.store.set(f"share of {self.rank}", json.dumps(value))
            return []
        return [value] + [json.loads(self.store.get(f"share of {rank}")) for rank in range(1, self.count)]


class Log:
    """What a run says: on the terminal beside the bars of the progress, and with the time in `reports/run.log`."""

    def __init__(self, root: Path, processes: Processes) -> None:
        self.path = root / "reports" / "run.log"
        self.prefix = f"process {processes.rank}: " if processes.count > 1 else ""

    def __call__(self, message: str) -> None:
        with suppress(OSError):  # nobody reads it any more: `main.py | head`
            tqdm.write(f"{self.prefix}{message}")
            sys.stdout.flush()
        self.note(message)

    def note(self, message: str) -> None:
        """Says it in the file alone."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {self.prefix}{message}\n")
        except OSError as error:
            raise ArtifactError(f"{self.path}: cannot be written ({error.strerror or error})") from None


class Run:
    """What the stages share: the files, the seconds that each stage took, data, classifiers and the last training."""

    def __init__(self, root: Path, processes: Processes, files: Artifacts) -> None:
        self.root = root
        self.processes = processes
        self.files = files
        self.log = Log(root, processes)
        self.seconds: dict[str, float] = {}
        self.test_scores: dict[str, float] = {}
        self._data: dict[Hashable, ImageData] = {}
        self._classifiers: dict[Path, HookedMNISTClassifier] = {}
        self._last: tuple[Training, GraphGenerator, MaskingGCN, float] | None = None
        self._reported, self._report_seconds = time.perf_counter(), 1.0

    @contextmanager
    def stage(self, name: str, says_so: bool = True) -> Iterator[None]:
        """Measures a stage, or a part of it, and says when it is done."""
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        if says_so:
            self.log(f"{name}: {seconds:.1f} s")

    def set_threads(self, config: Config) -> None:
        torch.set_num_threads(config.threads or self.files.threads)

    def data(self, config: Config) -> ImageData:
        """The data set of a config, read once."""
        key = (config.dataset, config.device, config.held_out)
        if key not in self._data:
            with self.stage(f"data, {config.dataset}"):
                device = config.torch_device()
                self._data[key] = load_image_data(config.dataset, self.root / "datasets", device, config.held_out)
        return self._data[key]

    def classifier(self, training: Training) -> HookedMNISTClassifier:
        """The classifier of a training: from its checkpoint, or trained and written."""
        artifact, config, name = self.files.classifier(training), training.config, training.classifier_name
        if artifact.path in self._classifiers:
            return self._classifiers[artifact.path]
        data = self.data(config)
        classifier = HookedMNISTClassifier(
            config.classifier.hidden_sizes, IMAGE_SIZE, NUM_CLASSES, config.classifier.bias
        ).to(data.train.labels.device)
        try:
            self.test_scores[name] = restore(classifier, artifact)["test_score"]
            self.log(f"classifier, {name}: reused")
        except ArtifactError:
            with self.stage(f"classifier, {name}"):
                classifier = Trainer(config.classifier, training.seed).train(data.train, NUM_CLASSES)
                correct = is_correct(classifier(data.test.images), data.test.labels)
            self.test_scores[name] = 100 * correct.sum().item() / len(correct)
            self.log(f"classifier, {name}: {self.test_scores[name]:.2f} % of the test split classified correctly")
            self.save(artifact, classifier, training, test_score=self.test_scores[name])
        self._classifiers[artifact.path] = classifier
        return classifier

    def graphs(self, training: Training) -> GraphGenerator:
        """The activation graphs of a training's classifier: they are recorded sooner than read."""
        classifier, artifact = self.classifier(training), self.files.graphs(training)
        with self.stage(f"activation graphs, {training.classifier_name}", says_so=False):
            graphs = GraphGenerator(classifier, self.data(training.config).train, training.config.graphs, training.seed)
        if artifact.why_not():
            artifact.save(graphs.recorded())
        return graphs

    def gcn(self, training: Training, graphs: GraphGenerator) -> tuple[MaskingGCN, float]:
        """The masking GCN and the seconds of its training: the tracked one, from its checkpoint, or trained."""
        artifact, config, device = self.files.gcn(training), training.config, graphs.labels.device
        if artifact is None:
            return TrainedGCN.load().gcn.to(device), 0.0
        gcn = MaskingGCN(
            config.graphs.num_features, config.gcn.hidden, config.gcn.rounds, config.gcn.message_passing
        ).to(device)
        try:
            seconds = restore(gcn, artifact)["seconds"]
            self.log(f"masking GCN, {training.name}: reused")
        except ArtifactError:
            stage = f"masking GCN, {training.name}"
            with self.stage(stage):
                gcn = GCNTrainer(config.gcn, [graphs], training.top_k, training.seed).train()
            seconds = self.seconds[stage]
            self.save(artifact, gcn, training, top_k=training.top_k, seconds=seconds)
        return gcn, seconds

    def save(self, artifact: Artifact, module: nn.Module, training: Training, **more: Any) -> None:
        """Writes a checkpoint: the weights, with the config and the seed that made them."""
        config = asdict(training.config)
        artifact.save({"state_dict": module.state_dict(), "config": config, "seed": training.seed} | more)

    def train(self, training: Training, makes: Sequence[str], awaited: Sequence[str]) -> None:
        """Makes the files of a training, and tells the other processes so.

        makes: those that no other process makes; awaited: all that some process makes
        """
        self.wait_for(training, [name for name in awaited if name not in makes])
        self.trained(training)
        for name in makes:
            self.processes.store.set(name, "")

    def wait_for(self, training: Training, awaited: Sequence[str]) -> None:
        """Waits for the files of a training that other processes make."""
        for artifact in self.files.of_training(training).values():
            if artifact.path.name in awaited:
                self.processes.store.get(artifact.path.name)

    def trained(self, training: Training) -> tuple[GraphGenerator, MaskingGCN, float]:
        """Graphs and masking GCN of a training, and the seconds that it took."""
        if self._last is None or self._last[0] != training:
            graphs = self.graphs(training)
            self._last = (training, graphs, *self.gcn(training, graphs))
        return self._last[1:]

    def work(self, tasks: Sequence[Task], to_do: Sequence[Work]) -> dict[str, Any]:
        """Does what no other process has taken of what is to do.

        Returns, as JSON holds it: `seconds` of the stages, `test_scores` of the classifiers, and `peak_bytes`, the most
        memory held.
        """
        awaited = [name for work in to_do for name in work.makes]
        total = sum(work.seconds for work in to_do)
        started = time.perf_counter()
        hidden = True if self.processes.rank else None
        bar = "{desc}: {percentage:3.0f} %|{bar}| {elapsed}, about {remaining} left"
        with tqdm(total=total, desc="the whole run", bar_format=bar, leave=False, disable=hidden) as progress:
            for position in self.processes.take(range(len(to_do))):
                task = tasks[to_do[position].task]
                self.set_threads(task.training.config)
                if task.digit is None:
                    self.train(task.training, to_do[position].makes, awaited)
                else:
                    self.wait_for(task.training, awaited)
                    self.experiments(task.training, task.digit)
                done = sum(work.seconds for work in to_do[: position + 1])
                progress.update(done - progress.n)
                if task.digit is not None and position + 1 < len(to_do):
                    left = (total - done) * (time.perf_counter() - started) / max(done, 1e-9)
                    self.log(f"about {time_in_words(left)} left")
                    self.report_so_far()
        # Kilobytes on Linux, bytes on macOS.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return {"seconds": dict(self.seconds), "test_scores": self.test_scores, "peak_bytes": peak}

    def experiments(self, training: Training, digit: int) -> None:
        """Runs every experiment on one forget digit that is not there yet, and draws the plots that are not."""
        config, folder, shared = training.config, self.root / "eval", {}
        experiments = self.files.experiments(training, digit)
        missing = [each for each in experiments if self.files.why_not(each)]
        if missing:
            graphs, gcn, gcn_seconds = self.trained(training)
            data, trainer = self.data(config), Trainer(config.classifier, training.seed)
            request = Request(
                config.eval, graphs.classifier, trainer, data.train, graphs, gcn, digit, training.top_k, training.seed
            )
        with self.stage(f"experiments, {training.name}", says_so=False):
            started = time.perf_counter()
            for experiment in tqdm(experiments, f"digit {digit}", unit="experiment", leave=False, disable=None):
                if experiment in missing:
                    kappa = request.auto_kappa(request.order) if experiment.kappa is None else experiment.kappa
                    found = replace(experiment, kappa=kappa, gcn_seconds=gcn_seconds)
                    Eval(config.eval, found, request, data, folder, shared).eval()
                elif config.eval.visualize:
                    Visualization(experiment.metrics(folder).load(), folder, shared).draw()
        took = f"{time.perf_counter() - started:.1f} s"
        reused = f", {len(experiments) - len(missing)} reused" if len(missing) < len(experiments) else ""
        self.log(f"experiments, {training.name}, digit {digit}: {took}, {len(missing)} made{reused}")

    def report_so_far(self) -> None:
        """Draws the reports of what is finished, unless it would take more than a twentieth of the time."""
        started = time.perf_counter()
        if self.processes.rank > 0 or started - self._reported < 20 * self._report_seconds:
            return
        try:
            report(self.files.reportable(), self.root / "reports")
        except Exception as error:  # the experiments go on; the last report raises it
            self.log(f"reports so far: {one_line(error)}")
        self._reported = time.perf_counter()
        self._report_seconds = self._reported - started


def restore(module: nn.Module, artifact: Artifact) -> dict[str, Any]:
    """Gives a module the weights of its checkpoint, and returns that. Raises ArtifactError where it is not there."""
    checkpoint = artifact.load()
    try:
        module.load_state_dict(checkpoint["state_dict"])
    except (RuntimeError, LookupError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{artifact.path}: does not fit ({one_line(error)})") from None
    return checkpoint


def run(configs: Mapping[str, Config], root: Path = ROOT, started: float | None = None, is_fresh: bool = False) -> None:
    """Runs the experiments of every config by its name, "" for the only one, and leaves their artifacts under `root`.

    What is there already, made by the same settings and the same code, is taken as it is.

    started: when the clock of the whole run began; is_fresh: removes first what is there of the same configs
    """
    started = time.perf_counter() if started is None else started
    prepare(configs)
    processes = Processes(next(iter(configs.values())).torch_device())
    with locked(root) if processes.rank == 0 else nullcontext():
        run_stages(Run(root, processes, Artifacts(configs, root, torch.get_num_threads())), started, is_fresh)


def run_stages(stages: Run, started: float, is_fresh: bool) -> None:
    """All stages of a run in one of its processes."""
    processes, files, root, log = stages.processes, stages.files, stages.root, stages.log

    def begin() -> list[dict[str, Any]]:
        """What is to do, as JSON holds it."""
        log.note(f"{shlex.join(sys.argv)}: {describe_machine()}")
        for config in files.configs.values():
            if not files.data(config.dataset):
                stages.data(config)  # which downloads it
        artifacts.make_folders(root)
        if is_fresh:
            for config in files.configs.values():
                stages.data(config)  # before anything is removed
            files.remove()
        plan = Plan(files, processes.count)
        for line in (plan.summary(), *plan.made_anew()):
            log(line)
        return [asdict(work) for work in plan.to_do]

    to_do = [Work(**work) for work in processes.told_by_the_first(begin)]
    if any(work.needs_data for work in to_do):
        for config in files.configs.values():
            stages.data(config)  # all of it first, so that a damaged file is told before any work
    shares = processes.gathered(stages.work(tasks_in_order(files.configs, processes.count), to_do))
    if processes.rank > 0:
        return
    with stages.stage("reports"):
        tables = report(files.reportable(), root / "reports")
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
        "machine": describe_machine(),
        "tasks": len(to_do),
        "classifier_test_scores": {name: score for share in shares for name, score in share["test_scores"].items()},
    }
    artifacts.write_text(root / "reports" / "run.json", json.dumps(summary, indent=1))
    print("\n".join(f"\n{table}" for table in tables))
    each = " a process" if processes.count > 1 else ""
    print()
    log(f"{total:.0f} s, {peak / 1e9:.1f} GB at most{each}. Curves and tables: {root / 'reports'}")
    print(
        f"Metrics and plots of each experiment: {root / 'eval' / 'Metrics and Plots'}; masks: {root / 'eval' / 'masks'}"
    )


def describe_machine() -> str:
    """What the last digits of the numbers depend on."""
    return (
        f"{platform.node()}, {platform.machine()}, {torch.get_num_threads()} threads, Python "
        f"{platform.python_version()}, torch {torch.__version__}"
    )


def pretrain(configs: Mapping[str, Config], root: Path = ROOT) -> None:
    """Trains one masking GCN on the classifiers of all configs and their seeds, with the settings of the first config.

    It takes the place of the tracked one.
    """
    one_process("--pretrain")
    prepare(configs)
    config = next(iter(configs.values()))
    with locked(root):
        stages = Run(root, Processes(config.torch_device()), Artifacts(configs, root, torch.get_num_threads()))
        for each in configs.values():
            stages.data(each)
        trainings = {str(stages.files.graphs(training).path): training for training in trainings_of(configs)}
        graphs = []
        for training in trainings.values():
            stages.set_threads(training.config)
            graphs.append(stages.graphs(training))
        stages.set_threads(config)
        with stages.stage(f"masking GCN, {len(graphs)} classifiers"):
            gcn = GCNTrainer(config.gcn, graphs, config.sweep.top_k[0], config.seed).train()
        path = root / PRETRAINED.relative_to(ROOT)
        checkpoint = {"state_dict": gcn.state_dict(), "config": asdict(config), "seed": config.seed}
        artifacts.save(path, checkpoint | {"top_k": config.sweep.top_k[0]})
        stages.log(f"{path}: {path.stat().st_size / 1000:.0f} KB")


def one_process(option: str) -> None:
    """Raises TrainingError where torchrun has started several."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise TrainingError(f"{option} runs in one process: start it without torchrun")


def dry_run(configs: Mapping[str, Config], root: Path = ROOT) -> None:
    """Says what a run would make, what it would reuse, and about how long it would take; writes nothing."""
    one_process("--dry-run")
    prepare(configs)
    files = Artifacts(configs, root, torch.get_num_threads())
    for dataset in dict.fromkeys(config.dataset for config in configs.values()):
        if not files.data(dataset):
            print(f"data, {dataset}: to be downloaded")
    print("\n".join(Plan(files).table()))


def plot(configs: Mapping[str, Config], root: Path = ROOT) -> None:
    """Draws and writes the reports anew from the JSON of experiments that a run of these configs would reuse.

    Raises ArtifactError on one that is damaged, DataError where nothing is finished.
    """
    one_process("--plot-only")
    prepare(configs)
    with locked(root):
        for threads in dict.fromkeys((*thread_counts(root), torch.get_num_threads())):
            files = Artifacts(configs, root, threads)
            if results := files.reportable():
                break
        files.check()
        plan = Plan(files)
        if not results:
            raise DataError(f"{root / 'eval'}: nothing of this config is finished: run it first ({plan.summary()})")
        tables = report(results, root / "reports")
    print("\n".join(f"\n{table}" for table in tables))
    print(f"\n{plan.summary()}. Curves and tables: {root / 'reports'}")


def prepare(configs: Mapping[str, Config]) -> None:
    """Sets up the memory, and checks the pretrained GCN where a config asks for it."""
    keep_freed_memory()
    for config in configs.values():
        if config.gcn.pretrained:
            TrainedGCN.load().check(config.graphs)


# In the folder of the reports, and in those of single variants and top-K.
CURVES = [f"{metric}_{part}_set.png" for metric in ("loss", "score") for part in ("forget", "retain")]
PICTURES = ["probability_on_forget_class.png", "summary.png", "trade_off.png", "masks.png", "audits.png"]
REPORTS = [*CURVES, *PICTURES, "summary.md", "variants.png", "variants.md", "frontier.png"]
REPORT_FOLDERS = ["top_k_*", "variants/*", "variants/*/top_k_*"]


def report(results: Sequence[tuple[Training, list[Path]]], folder: Path) -> list[str]:
    """Draws and writes the reports, in the place of all that were there. Returns the closing tables."""
    folders = [folder, *(each for pattern in REPORT_FOLDERS for each in folder.glob(pattern))]
    before = {path: path.stat().st_ino for each in folders for path in map(each.joinpath, REPORTS) if path.is_file()}
    tables = draw_reports(results, folder)
    for path, inode in before.items():
        if path.stat().st_ino == inode:  # not written anew: of another config
            path.unlink()
            if not any(path.parent.iterdir()):
                path.parent.rmdir()
    return tables


def draw_reports(results: Sequence[tuple[Training, list[Path]]], folder: Path) -> list[str]:
    """The reports of every config and top_k, and of variants side by side."""
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
        audits = AuditReport(reporter) if reporter.has_audits and "retrain" in reporter.methods else None
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
    frontier = Frontier(comparison)
    if frontier.is_there:
        frontier.draw()
    return comparison.tables()
