"""The stages of a run in their order: data, classifier, activation graphs, masking GCN, requests, reports."""

from __future__ import annotations

import sys
import time
from importlib import import_module

from experiment.command_line import run_command

STARTED = time.perf_counter()
if __name__ == "__main__":
    # PyTorch takes seconds to import: --help, wrong options and Ctrl-C do not wait for it.
    sys.exit(run_command(lambda parsed: import_module("main").start(parsed)))

import argparse
import hashlib
import itertools
import os
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

import tables
from audits import Audit
from data import GraphGenerator, ImageData, checksum, load_image_data
from eval import Eval, Request
from experiment.config import Config, RequestedKappa, load_variants
from experiment.files import ROOT, Artifact, Log, code_of, damaged, locked, slug
from experiment.processes import Processes, how_many, peak_bytes
from mimu.errors import DataError, InputError
from mimu.files import digest, save
from mimu.graph import MaskingGCN, keep_freed_memory
from mimu.pretrained import PRETRAINED, TrainedGCN
from mimu.samples import Split, is_correct, some_of_every_class
from mimu.tracing import HookedClassifier
from tables.experiment import draw as draw_experiment
from trainer import TOLERATED, GCNTrainer, Trained, Trainer

# The source files that a classifier, its graphs and its GCN depend on, and those that metrics do.
TRAINING_CODE = ("main.py", "model.py", "data.py", "trainer.py", "mimu/*.py")
CODE = ("*.py", "methods/*.py", "audits/*.py", *TRAINING_CODE)


@dataclass(frozen=True)
class Training:
    """What requests share: a classifier, the graphs of its activations, and the masking GCN trained on them."""

    variant: str
    config: Config
    seed: int
    top_k: int

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"{self.variant}, seed {self.seed}" if self.variant else f"seed {self.seed}"

    @cached_property
    def settings(self) -> dict[str, dict[str, Any]]:
        """What decides what is in its files, by what they are of, as JSON holds it."""
        config = self.config
        of_classifier = {name: getattr(config, name) for name in ("threads", "dataset", "held_out")}
        of_classifier |= {"seed": self.seed, "device": config.torch_device().type}
        of_classifier |= {"classifier": asdict(config.classifier)}
        of_graphs = of_classifier | {"graphs": asdict(config.graphs), "samples": config.samples}
        of_gcn = of_graphs | {"gcn": asdict(config.gcn), "retain_weight": config.eval.retain_weight}
        if config.gcn.pretrained:
            of_gcn["pretrained"] = hashlib.sha256(PRETRAINED.read_bytes()).hexdigest()
        audit = asdict(config.audit) if config.audit.enabled else None
        of_experiments = {"eval": config.eval.decisive(), "audit": audit, "variant": self.variant, "top_k": self.top_k}
        return {"classifier": of_classifier, "graphs": of_graphs, "gcn": of_gcn, "experiments": of_gcn | of_experiments}


class Stages:
    """The stages of one process of a run; what a stage makes is taken from its file where it is there."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files = Files(root)
        self.processes = Processes()
        prefix = f"process {self.processes.rank}: " if self.processes.count > 1 else ""
        self.log = Log(root / "reports" / "run.log", prefix)
        self.seconds: Counter[str] = Counter()  # of every stage so far, by its name
        self._data: dict[tuple[str, str, int], ImageData] = {}
        self._last: tuple[Training, GraphGenerator, MaskingGCN, dict[str, Any]] | None = None
        self._kept: dict[str, Any] = {}  # by the methods, of the last classifier
        self._threads = torch.get_num_threads()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measures a stage, and says when it is done."""
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        self.seconds[name] += seconds
        self.log(f"{name}: {seconds:.1f} s")

    def made(self, artifact: Artifact, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The content of a file: as it is there, or made and written by the first process that asks for it."""

        def make_it() -> None:
            if not artifact.is_current:
                with self.stage(name):
                    artifact.save(make())

        self.processes.once(artifact.path.name, make_it)
        return artifact.load()

    def forget(self, training: Training, forget_class: int | None) -> None:
        """The method, stage by stage, up to the metrics and the mask of every kappa; without a class, the training."""
        config = training.config
        torch.set_num_threads(config.threads or self._threads)
        is_done = all(file.is_current for file in self.files.every(training, forget_class))
        if not is_done and (self._last is None or self._last[0] != training):
            data = self.data(config)
            classifier = self.classifier(training, data)
            graphs = self.graphs(training, classifier, data)
            self._last, self._kept = (training, graphs, *self.gcn(training, graphs)), {}
        if forget_class is not None:
            with self.stage(f"class {forget_class}, {training.name}"):
                self.requests(training, forget_class)

    def data(self, config: Config) -> ImageData:
        """Images and labels in memory, read once."""
        key = (config.dataset, config.device, config.held_out)
        if key not in self._data:
            with self.stage(f"data, {config.dataset}"):
                root, device = self.root / "datasets", config.torch_device()
                self._data[key] = load_image_data(config.dataset, root, device, config.held_out)
        return self._data[key]

    def classifier(self, training: Training, data: ImageData) -> HookedClassifier:
        config, artifact = training.config, self.files.of_training(training)["classifier"]
        trainer = Trainer(config.classifier, training.seed, config.source.size)
        return self.trained(f"classifier, {training.name}", training, trainer, data.train, artifact, data.test).model

    def retrained(self, training: Training, forget_class: int, trainer: Trainer, samples: Split) -> Trained:
        """A classifier that never saw a class."""
        artifact = self.files.retrained(training, forget_class, trainer.seed)
        name = f"retrained without class {forget_class}, {training.name}, from the weights of seed {trainer.seed}"
        return self.trained(name, training, trainer, samples, artifact)

    def trained(
        self, name: str, training: Training, trainer: Trainer, samples: Split, kept: Artifact, test: Split | None = None
    ) -> Trained:
        """A classifier, and the seconds that its training took in whichever run it was; test: to say how good it is."""
        num_classes = len(training.config.source.class_names)

        def train() -> dict[str, Any]:
            model, seconds = trainer.trained(samples, num_classes, kept)
            if test is not None:
                score = 100 * is_correct(model(test.images), test.labels).double().mean()
                self.log(f"{name}: {score:.2f} % of {training.config.split} classified correctly")
            return checkpoint_of(model, training) | {"seed": trainer.seed, "seconds": seconds}

        checkpoint = self.made(kept, name, train)
        classifier = trainer.initial(samples.images, num_classes)
        classifier.load_state_dict(checkpoint["state_dict"])
        return Trained(classifier, checkpoint["seconds"])

    def graphs(self, training: Training, classifier: HookedClassifier, data: ImageData) -> GraphGenerator:
        """The activation graphs: recorded anew where they are read, since that takes less than reading the file."""
        config, artifact = training.config, self.files.of_training(training)["graphs"]
        train = data.train
        if config.samples is not None:
            train = some_of_every_class(train, config.samples, "samples", training.seed)
        graphs = GraphGenerator(classifier, train, config.graphs, training.seed)
        self.processes.once(artifact.path.name, lambda: artifact.is_current or artifact.save(graphs.recorded()))
        return graphs

    def gcn(self, training: Training, graphs: GraphGenerator) -> tuple[MaskingGCN, dict[str, Any]]:
        """The masking GCN, and what experiments say of its training."""
        config = training.config.gcn
        if config.pretrained:
            trained = TrainedGCN.load()
            return trained.gcn.to(graphs.labels.device), {"seconds": {"gcn": 0.0}}
        name, artifact = f"masking GCN, {training.name}", self.files.of_training(training)["gcn"]
        trainer = GCNTrainer(config, [graphs], training.config.eval.retain_weight, training.seed)

        def train() -> dict[str, Any]:
            started = time.perf_counter()
            return checkpoint_of(trainer.train(artifact), training) | {"seconds": time.perf_counter() - started}

        checkpoint = self.made(artifact, name, train)
        gcn = trainer.initial()
        gcn.load_state_dict(checkpoint["state_dict"])
        with self.stage(f"{name}, beside the formula"):
            behind = trainer.points_behind(gcn, training.config.eval)
        is_untrained = behind > TOLERATED
        if is_untrained:
            self.log(f"{name}: its training leaves it {behind:.1f} points behind the formula: taken as it was before")
            gcn = trainer.initial()
        return gcn, {"gcn_untrained": is_untrained, "seconds": {"gcn": checkpoint["seconds"]}}

    def requests(self, training: Training, forget_class: int) -> None:
        """Every experiment on one forget class that is not there, and the plots that are not."""
        config, shared, prunings = training.config, {}, {}
        drawn = partial(draw_experiment, folder=self.root / "eval", config=config.report)
        draw = drawn if config.eval.visualize else None
        for requested_kappa in tqdm(
            config.kappas, f"class {forget_class}", unit="experiment", leave=False, disable=None
        ):
            metrics, mask = self.files.metrics_and_mask(training, forget_class, requested_kappa)
            if metrics.is_current and mask.is_current:
                if draw is not None:
                    draw(metrics.load())
                continue
            _, graphs, gcn, about_gcn = self._last
            data, trainer = self.data(config), Trainer(config.classifier, training.seed, config.source.size)
            request = Request(
                config=config.eval,
                original=graphs.classifier,
                trainer=trainer,
                train=graphs.train,
                graphs=graphs,
                gcn=gcn,
                forget_class=forget_class,
                top_k=training.top_k,
                seed=training.seed,
                requested_kappa=requested_kappa,
                prunings=prunings,
                kept=self._kept,
                trained_on=data.train,
                retrain=partial(self.retrained, training, forget_class),
            )
            paths = self.files.of_training(training) | {"mask": mask}
            about = {
                "id": metrics.path.stem,
                "variant": training.variant,
                "dataset": config.dataset,
                "class_names": list(data.class_names),
                "split": config.split,
                "classifier": config.architecture,
                "mask_layer": config.graphs.mask_layer,
                "config": asdict(config),
                "files": {name: file.path.relative_to(self.root).as_posix() for name, file in paths.items()},
                **about_gcn,
            }
            audit = partial(Audit, config.audit, data, forget_class, training.seed)
            Eval(request, data, metrics, mask, about, shared, audit if config.audit.enabled else None, draw).eval()


def checkpoint_of(model: torch.nn.Module, training: Training) -> dict[str, Any]:
    """The weights of a model, with the config and the seed that made them."""
    return {"state_dict": model.state_dict(), "config": asdict(training.config), "seed": training.seed}


class Files:
    """Where every file of a run stands, and what it depends on.

    Two configs share what both would make alike, and nothing else: the names of files end in a digest of the settings
    that they depend on. A change of the code, the data set or PyTorch leaves the name and makes the file anew.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._seen: dict[Path, Any] = {}
        self._training_code = code_of(ROOT, TRAINING_CODE)
        self._code = code_of(ROOT, CODE)
        self._code.pop("reporter.py", None)  # no number depends on it
        self._checksums: dict[str, str] = {}

    def of_training(self, training: Training) -> dict[str, Artifact]:
        """The files that a training makes, by what is in them."""
        end = f"seed_{training.seed}.pt"
        paths = {"classifier": f"checkpoints/classifier_{end}", "graphs": f"datasets/Graphs/{end}"}
        if not training.config.gcn.pretrained:
            paths["gcn"] = f"checkpoints/gcn_{end}"
        made = {}
        for name, path in paths.items():
            made[name] = self._artifact(path, training, training.settings[name], self._training_code)
        return made

    def metrics_and_mask(
        self, training: Training, forget_class: int, requested_kappa: RequestedKappa
    ) -> tuple[Artifact, Artifact]:
        """The JSON of an experiment, whose name is the experiment's id, and its mask."""
        name = f"seed_{training.seed}_digit_{forget_class}_top_k_{training.top_k}"
        name += "_kappa_auto" if requested_kappa == "auto" else f"_kappa_{requested_kappa}_fixed"
        name += f"_{slug(training.variant)[:60]}" if training.variant else ""
        settings = training.settings["experiments"] | {"forget_digit": forget_class, "kappa": requested_kappa}
        paths = f"eval/Metrics and Plots/metrics/{name}.json", f"eval/masks/{name}.pt"
        return tuple(self._artifact(path, training, settings, self._code) for path in paths)

    def retrained(self, training: Training, forget_class: int, seed: int | Literal["*"]) -> Artifact:
        """A classifier trained as the original, with a seed, without a class; of every seed: its name is a pattern."""
        settings = training.settings["classifier"] | {"forget_digit": forget_class}
        path = f"checkpoints/retrained_seed_{seed}_digit_{forget_class}.pt"
        return self._artifact(path, training, settings, self._training_code)

    def every(self, training: Training, forget_class: int | None = None) -> list[Artifact]:
        """The files of a training, and the JSON and the mask of every kappa: of all forget classes, or of one."""
        found = [*self.of_training(training).values()]
        forget_classes = training.config.forget_digits if forget_class is None else [forget_class]
        for forget_class, requested_kappa in itertools.product(forget_classes, training.config.kappas):
            found += self.metrics_and_mask(training, forget_class, requested_kappa)
        return found

    def _artifact(self, path: str, training: Training, settings: dict[str, Any], code: dict[str, str]) -> Artifact:
        dataset, of_settings, where = training.config.dataset, digest(settings), self.root / path
        if not self._checksums.get(dataset):
            self._checksums[dataset] = checksum(dataset, self.root / "datasets")
        others = {"code": code, "data": self._checksums[dataset], "PyTorch": torch.__version__}
        provenance = {name: digest(value) for name, value in (settings | others).items()}
        return Artifact(where.with_stem(f"{where.stem}_{of_settings[:8]}"), provenance, self._seen)


def trainings_of(configs: Mapping[str, Config]) -> Iterator[Training]:
    for variant, config in configs.items():
        for seed, top_k in itertools.product(config.seeds, config.top_ks):
            yield Training(variant, config, seed, top_k)


def run(configs: Mapping[str, Config], root: Path = ROOT, is_fresh: bool = False) -> None:
    """Runs the experiments of every config by its name, "" for the only one, and leaves their files under `root`.

    What is there already, made by the same settings and the same code, is taken as it is.

    is_fresh: removes first what is there of the same configs
    """
    stages = Stages(root)
    processes = stages.processes
    with locked(root) if processes.rank == 0 else nullcontext():
        processes.first(partial(begin, stages, configs, is_fresh))
        # What a process does at a time: a training alone, or with the experiments on one forget class.
        tasks: list[tuple[Training, int | None]] = []
        if processes.count > 1:  # each trains something, before requests that all of them would wait to be trained for
            tasks += [(training, None) for training in trainings_of(configs)]
        for training in trainings_of(configs):
            tasks += [(training, forget_class) for forget_class in training.config.forget_digits]
        progress = tqdm(processes.take(tasks), "the whole run", len(tasks), leave=False, disable=None)
        for training, forget_class in progress:
            stages.forget(training, forget_class)
        shares = processes.gathered({"seconds": stages.seconds, "peak": peak_bytes()})
        if processes.rank == 0:
            end(stages, configs, shares)


def begin(stages: Stages, configs: Mapping[str, Config], is_fresh: bool) -> None:
    """What the first process does before all work: looks at what is there, and says it."""
    stages.log.note(shlex.join(sys.argv))
    artifacts = list(itertools.chain.from_iterable(map(stages.files.every, trainings_of(configs))))
    if is_fresh or not all(artifact.is_current for artifact in artifacts):
        for config in configs.values():
            stages.data(config)  # all of it first, so that a missing or damaged file is told before any work
    if is_fresh:
        for artifact in artifacts:
            artifact.path.unlink(missing_ok=True)
        for training in trainings_of(configs):
            for forget_class in training.config.forget_digits:
                of_any_seed = stages.files.retrained(training, forget_class, "*").path
                for path in of_any_seed.parent.glob(of_any_seed.name):
                    path.unlink()
    stages.log(how_many(artifacts))


def end(stages: Stages, configs: Mapping[str, Config], shares: Sequence[dict[str, Any]]) -> None:
    """What the first process does after all work: draws the reports, and says what the run took."""
    reports = stages.root / "reports"
    with stages.stage("reports"):
        closing = tables.report(finished(stages.files, configs), reports)
    seconds = sum((Counter(of_process["seconds"]) for of_process in shares), Counter())
    total, peak = time.perf_counter() - STARTED, max(of_process["peak"] for of_process in shares)
    seconds["reports"] = stages.seconds["reports"]
    summary = {"seconds": seconds, "total_seconds": total, "peak_bytes": peak, "processes": len(shares)}
    save(reports / "run.json", summary)
    print("\n".join(f"\n{table}" for table in closing), end="\n\n")
    each = " a process" if len(shares) > 1 else ""
    stages.log(f"{total:.0f} s, {peak / 1e9:.1f} GB at most{each}. Curves and tables: {reports}")
    print(f"Metrics and plots of each experiment, and masks: {stages.root / 'eval'}")


def finished(files: Files, configs: Mapping[str, Config]) -> tables.Results:
    """The JSON of all trainings. Raises DataError where experiments are missing: reports of a part would mislead."""
    results, missing = {}, []
    for training in trainings_of(configs):
        metrics = [file for file in files.every(training) if file.path.suffix == ".json"]
        missing += [file.path.stem[:-9] for file in metrics if not file.is_current]
        _, paths = results.setdefault((training.variant, training.top_k), (training.config.report, []))
        paths += [file.path for file in metrics]
    if missing:
        names = ", ".join(missing)
        raise DataError(f"{files.root / 'eval'}: not all is there: run it first, or leave out what is missing: {names}")
    return results


def pretrain(configs: Mapping[str, Config], root: Path = ROOT) -> None:
    """Trains one masking GCN on the classifiers of all configs and seeds, with the settings of the first.

    It takes the place of the tracked one for the layers that the first config masks.
    """
    config = next(iter(configs.values()))
    with locked(root):
        stages, graphs = Stages(root), []
        for training in trainings_of(configs):
            torch.set_num_threads(training.config.threads or torch.get_num_threads())
            data = stages.data(training.config)
            graphs.append(stages.graphs(training, stages.classifier(training, data), data))
        with stages.stage(f"masking GCN, {len(graphs)} classifiers"):
            gcn = GCNTrainer(config.gcn, graphs, config.eval.retain_weight, config.seed).train()
        path = root / PRETRAINED.relative_to(ROOT)
        save(path, {"config": asdict(config), "seed": config.seed, "state_dict": gcn.state_dict()})
        stages.log(f"{path}: {path.stat().st_size / 1000:.0f} KB")


def dry_run(configs: Mapping[str, Config], root: Path = ROOT) -> None:
    """Says what a run would make and what it would reuse, why not all, and what is damaged; writes nothing."""
    for error in damaged(root):
        print(error)
    files = Files(root)
    for training in trainings_of(configs):
        artifacts = files.every(training)
        others = Counter(", ".join(artifact.differences()) for artifact in artifacts)
        why = [f"; made with other {names}: {count}" for names, count in others.items() if names]
        print(f"{training.name}, top-K {training.top_k}: {how_many(artifacts)}{''.join(why)}")


def plot(configs: Mapping[str, Config], root: Path = ROOT) -> None:
    """Draws and writes the reports anew from the JSON of the experiments. Raises DataError where one is missing."""
    with locked(root):
        closing = tables.report(finished(Files(root), configs), root / "reports")
    print("\n".join(f"\n{table}" for table in closing))
    print(f"\nCurves and tables: {root / 'reports'}")


def start(parsed: argparse.Namespace) -> None:
    """Does what the command line asks for."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and (parsed.dry_run or parsed.plot_only or parsed.pretrain):
        raise InputError("--dry-run, --plot-only and --pretrain run in one process: start it without torchrun")
    keep_freed_memory()
    configs = load_variants(parsed.config, parsed.overrides)
    if parsed.dry_run:
        dry_run(configs)
    elif parsed.plot_only:
        plot(configs)
    elif parsed.pretrain:
        pretrain(configs)
    else:
        run(configs, is_fresh=parsed.fresh)
