"""The stages of a run in their order: data, classifier, activation graphs, masking GCN, requests, reports."""

import sys
import time
from importlib import import_module

from experiment.command_line import run_command

STARTED = time.perf_counter()
if __name__ == "__main__":
    # PyTorch takes seconds to import: --help, wrong options and Ctrl-C do not wait for it.
    sys.exit(run_command(lambda parsed: import_module("main").start(parsed)))

import argparse
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import tables
from data import GraphGenerator, ImageData, load_image_data
from eval import Eval, Request
from experiment.audits import Audit
from experiment.config import Config, Files, Training, load_variants, trainings_of
from experiment.files import ROOT, Artifact, Log, locked
from experiment.processes import Processes, by_torchrun, peak_bytes
from mimu.errors import InputError
from mimu.files import save
from mimu.graph import MaskingGCN, keep_freed_memory
from mimu.pretrained import PRETRAINED, TrainedGCN
from mimu.samples import some_of_every_class
from reporter import ReporterConfig
from tables.figures import draw
from trainer import TOLERATED, GCNTrainer, Trained


class Stages:
    """The stages of one process of a run. A stage whose file is current reads it instead of making it again."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files = Files(root)
        self.processes = Processes()
        prefix = f"process {self.processes.rank}: " if self.processes.count > 1 else ""
        self.log = Log(root / "reports" / "run.log", prefix)
        self._load_data = cache(load_image_data)
        self._training: Training | None = None  # the last one, of which these are
        self._request: Callable[..., Request] = Request
        self._about_gcn: dict[str, Any] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measures a stage, and logs its seconds."""
        started = time.perf_counter()
        yield
        self.log(f"{name}: {time.perf_counter() - started:.1f} s")

    def load_or_make(self, artifact: Artifact, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Returns the content of a file. The first process that needs it makes it, where it is not current."""

        def make_missing() -> None:
            if not artifact.is_current:
                with self.stage(name):
                    artifact.save(make())

        self.processes.once(artifact.path.name, make_missing)
        return artifact.load()

    def data(self, config: Config) -> ImageData:
        """Returns images and labels in memory, which are read once."""
        return self._load_data(config.dataset, self.root / "datasets", config.torch_device(), config.held_out)

    def classifier(self, training: Training, forget_class: int | None = None, seed: int | None = None) -> Trained:
        """Returns the classifier of a training, or one that was trained without a class from the weights of a seed.

        The seconds are those that its training took, in whichever run.
        """
        config, samples = training.config, self.data(training.config).train
        trainer, num_classes = training.trainer, len(config.source.class_names)
        if forget_class is None:
            name, artifact = f"classifier, {training.name}", self.files.shared(training)["classifier"]
        else:
            name = f"retrained without class {forget_class}, {training.name}, from the weights of seed {seed}"
            artifact = self.files.retrained(training, forget_class, seed)
            trainer, samples = replace(trainer, seed=seed), samples.retain(forget_class)

        def train() -> dict[str, Any]:
            model, seconds = trainer.trained(samples, num_classes, artifact)
            return checkpoint_of(model, training) | {"seed": trainer.seed, "seconds": seconds}

        checkpoint = self.load_or_make(artifact, name, train)
        model = trainer.initial(samples.images, num_classes)
        model.load_state_dict(checkpoint["state_dict"])
        return Trained(model, checkpoint["seconds"])

    def graphs(self, training: Training) -> GraphGenerator:
        """Returns the activation graphs. They are recorded in every run, which is faster than reading a file."""
        config, train = training.config, self.data(training.config).train
        classifier = self.classifier(training).model
        if config.samples is not None:
            train = some_of_every_class(train, config.samples, "samples", training.seed)
        graphs = GraphGenerator(classifier, train, config.graphs, training.seed)
        if config.save_graphs:
            self.load_or_make(self.files.shared(training)["graphs"], f"graphs, {training.name}", graphs.recorded)
        return graphs

    def gcn(self, training: Training, graphs: GraphGenerator) -> tuple[MaskingGCN, dict[str, Any]]:
        """Returns the masking GCN, and the part of an experiment's JSON that tells how it was trained."""
        config = training.config
        if config.gcn.pretrained:
            return TrainedGCN.load().gcn.to(graphs.labels.device), {"seconds": {"gcn": 0.0}}
        name, artifact = f"masking GCN, {training.name}", self.files.shared(training)["gcn"]
        trainer = GCNTrainer(config.gcn, [graphs], config.eval.retain_weight, training.seed)

        def train() -> dict[str, Any]:
            started = time.perf_counter()
            return checkpoint_of(trainer.train(artifact), training) | {"seconds": time.perf_counter() - started}

        checkpoint = self.load_or_make(artifact, name, train)
        gcn = trainer.initial()
        gcn.load_state_dict(checkpoint["state_dict"])
        with self.stage(f"{name}, beside the formula"):
            points = trainer.points_behind(gcn, config.eval)
        is_untrained = points > TOLERATED
        if is_untrained:
            self.log(f"{name}: after its training it is {points:.1f} points behind the formula: the untrained is used")
            gcn = trainer.initial()
        return gcn, {"gcn_untrained": is_untrained, "seconds": {"gcn": checkpoint["seconds"]}}

    def forget(self, training: Training, forget_class: int | None) -> None:
        """Runs every experiment on one forget class; without a class, only what requests share is prepared."""
        config = training.config
        torch.set_num_threads(config.threads)
        is_done = all(artifact.is_current for artifact in self.files.every(training, forget_class))
        if not is_done and self._training != training:
            graphs = self.graphs(training)
            gcn, self._about_gcn = self.gcn(training, graphs)
            shared = {"graphs": graphs, "gcn": gcn, "top_k": config.top_k, "seed": training.seed, "kept": {}}
            self._request = partial(Request, config.eval, graphs.classifier, training.trainer, graphs.train, **shared)
            self._training = training
        if forget_class is not None:
            with self.stage(f"class {forget_class}, {training.name}"):
                self.experiments(training, forget_class)

    def experiments(self, training: Training, forget_class: int) -> None:
        """Runs the experiments on one forget class whose files are not current, and draws the missing plots."""
        config, shared = training.config, {}
        request = partial(self._request, forget_class=forget_class, prunings={})
        for requested_kappa in config.kappas:
            metrics, mask = self.files.metrics_and_mask(training, forget_class, requested_kappa)
            plots = metrics.path.parents[1] / "plots" / metrics.path.stem
            draw_plots = partial(draw, metrics.path, plots, config.report) if config.eval.visualize else None
            if not (metrics.is_current and mask.is_current):
                data, retrain = self.data(config), partial(self.classifier, training, forget_class)
                about = self.about(training, metrics, mask) | self._about_gcn
                is_audited = config.audit.enabled or "retrain" in config.eval.method_names
                audit = partial(Audit, config.audit, data, forget_class, training.seed) if is_audited else None
                one = request(requested_kappa=requested_kappa, retrain=retrain)
                Eval(one, data, metrics, mask, about, shared, audit, draw_plots).eval()
            elif draw_plots is not None:
                draw_plots()

    def about(self, training: Training, metrics: Artifact, mask: Artifact) -> dict[str, Any]:
        """Returns the part of an experiment's JSON that describes the run."""
        config = training.config
        artifacts = self.files.shared(training) | {"mask": mask}
        return {
            "id": metrics.path.stem,
            "variant": training.variant,
            "dataset": config.dataset,
            "class_names": list(config.source.class_names),
            "split": config.split,
            "classifier": config.architecture,
            "mask_layer": config.graphs.mask_layer,
            "config": asdict(config),
            "files": {name: file.path.relative_to(self.root).as_posix() for name, file in artifacts.items()},
        }


def checkpoint_of(model: torch.nn.Module, training: Training) -> dict[str, Any]:
    """Returns the weights of a model, with the config and the seed that made them."""
    return {"state_dict": model.state_dict(), "config": asdict(training.config), "seed": training.seed}


def run(configs: Mapping[str, Config], root: Path = ROOT, is_fresh: bool = False) -> None:
    """Runs the experiments of all configs, and writes the reports. Files that are current are not made again.

    Args:
        configs: The configs by the names of variants, "" for the only one.
        root: The folder of all files.
        is_fresh: Removes the files of earlier runs of the same configs first.
    """
    stages = Stages(root)
    processes = stages.processes
    with locked(root) if processes.rank == 0 else nullcontext():
        processes.first(partial(begin, stages, configs, is_fresh))
        # Several processes begin with all trainings: otherwise they would wait for the first one.
        tasks = [(training, None) for training in trainings_of(configs) if processes.count > 1]
        tasks += [(each, forget_class) for each in trainings_of(configs) for forget_class in each.config.forget_digits]
        for training, forget_class in tqdm(processes.take(tasks), "the run", len(tasks), leave=False, disable=None):
            stages.forget(training, forget_class)
        peaks = processes.gathered(peak_bytes())
        if processes.rank == 0:
            end(stages, configs, peaks)


def begin(stages: Stages, configs: Mapping[str, Config], is_fresh: bool) -> None:
    """Logs how many files are current, and reads the data sets where work is to be done; in the first process."""
    stages.log.note(shlex.join(sys.argv))
    files, trainings = stages.files, list(trainings_of(configs))
    artifacts = sum(map(files.every, trainings), [])
    if is_fresh or not all(artifact.is_current for artifact in artifacts):
        for config in configs.values():
            stages.data(config)  # a missing or damaged data set is an error before any work
    if is_fresh:
        retrained = [files.retrained(each, label, "*") for each in trainings for label in each.config.forget_digits]
        for artifact in artifacts + retrained:
            for path in artifact.path.parent.glob(artifact.path.name):
                path.unlink()
    stages.log(count_current(artifacts))


def count_current(artifacts: Sequence[Artifact]) -> str:
    """Returns how many files are current, in words."""
    count = sum(artifact.is_current for artifact in artifacts)
    return f"{count} of {len(artifacts)} files are there, {len(artifacts) - count} would be made"


def end(stages: Stages, configs: Mapping[str, Config], peaks: Sequence[int]) -> None:
    """Writes the reports, and logs the time and the memory (bytes) that processes took; in the first process."""
    reports = stages.root / "reports"
    with stages.stage("reports"):
        write_reports(stages.files, configs)
    total, peak = time.perf_counter() - STARTED, max(peaks)
    save(reports / "run.json", {"total_seconds": total, "peak_bytes": peak})
    each = " a process" if len(peaks) > 1 else ""
    stages.log(f"{total:.0f} s, {peak / 1e9:.1f} GB at most{each}. Curves and tables: {reports}")
    print(f"Metrics and plots of each experiment, and masks: {stages.root / 'eval'}")


def write_reports(files: Files, configs: Mapping[str, Config]) -> None:
    """Draws the reports from the JSON of all experiments, and prints the closing tables."""
    results: dict[str, tuple[ReporterConfig, list[Path]]] = {}
    for training in trainings_of(configs):
        _, paths = results.setdefault(training.variant, (training.config.report, []))
        paths += [artifact.path for artifact in files.every(training) if artifact.path.suffix == ".json"]
    print("\n".join(f"\n{table}" for table in tables.report(results, files.root / "reports")), end="\n\n")


def pretrain(configs: Mapping[str, Config], root: Path = ROOT) -> None:
    """Trains one masking GCN on the classifiers of all configs and seeds, with the settings of the first config.

    It replaces the GCN that is part of the library.
    """
    config = next(iter(configs.values()))
    with locked(root):
        stages, graphs = Stages(root), []
        for training in trainings_of(configs):
            torch.set_num_threads(training.config.threads)
            graphs.append(stages.graphs(training))
        with stages.stage(f"masking GCN, {len(graphs)} classifiers"):
            gcn = GCNTrainer(config.gcn, graphs, config.eval.retain_weight, config.seed).train()
        path = root / PRETRAINED.relative_to(ROOT)
        save(path, {"config": asdict(config), "seed": config.seed, "state_dict": gcn.state_dict()})
        stages.log(f"{path}: {path.stat().st_size / 1000:.0f} KB")


def dry_run(configs: Mapping[str, Config], root: Path = ROOT) -> None:
    """Prints how many files of every training are current, and how many a run would make; writes nothing."""
    files = Files(root)
    for training in trainings_of(configs):
        print(f"{training.name}: {count_current(files.every(training))}")


def start(parsed: argparse.Namespace) -> None:
    """Does what the command line asks for."""
    if by_torchrun() and (parsed.dry_run or parsed.pretrain):
        raise InputError("--dry-run and --pretrain run in one process: start it without torchrun")
    keep_freed_memory()
    configs = load_variants(parsed.config, parsed.overrides)
    if parsed.dry_run:
        dry_run(configs)
    elif parsed.pretrain:
        pretrain(configs)
    else:
        run(configs, is_fresh=parsed.fresh)
