"""The command line, and the stages of a run in their order.

Data, classifier, activation graphs, masking GCN, requests to forget, reports: `Stages.forget` goes through them.
"""

from __future__ import annotations

import time

from mimu.runs.command_line import parse_arguments, run_command

STARTED = time.perf_counter()
if __name__ == "__main__":
    parse_arguments()  # answers --help and wrong options before PyTorch is imported, which takes seconds

import argparse
import hashlib
import itertools
import json
import math
import os
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mimu import tables
from mimu.audits import Audit
from mimu.configs import Asked, Config, load_variants
from mimu.data import GraphGenerator, ImageData, is_correct, load_image_data, some_of_every_class
from mimu.eval import Eval, Request
from mimu.images.sources import DataError, checksum
from mimu.masking.rankings import TrainedGCN, pretrained_for
from mimu.model import MaskingGCN, keep_freed_memory
from mimu.networks.hooked import HookedClassifier
from mimu.runs.files import PACKAGE, ROOT, Artifact, InputError, code_of, digest, locked, save, slug, write_text
from mimu.runs.work import Work, describe_machine, how_many, memory_of, peak_bytes
from mimu.tables import experiment
from mimu.trainer import GCNTrainer, Trainer

# The source files that a classifier, its graphs and its GCN depend on, and those that metrics do.
TRAINING_CODE = ("main.py", "model.py", "data.py", "trainer.py", "images/*.py", "networks/*.py", "masking/*.py")
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
    def sections(self) -> dict[str, dict[str, Any]]:
        """The sections of the config that files depend on, as JSON holds them."""
        config = self.config
        sections = {name: asdict(getattr(config, name)) for name in ("classifier", "graphs", "gcn", "audit")}
        return sections | {"eval": config.eval.decisive()}


class Stages:
    """The stages of one process of a run; what a stage makes is taken from its file where it is there."""

    def __init__(self, work: Work, files: Files) -> None:
        self.work = work
        self.files = files
        self.test_scores: dict[str, float] = {}
        self._data: dict[tuple[str, str, int], ImageData] = {}
        self._last: tuple[Training, GraphGenerator, MaskingGCN, float] | None = None
        self._kept: dict[str, Any] = {}  # by the methods, of the last classifier
        self._threads = torch.get_num_threads()

    def forget(self, training: Training, forget_class: int | None) -> None:
        """The method, stage by stage, up to the metrics and the mask of every kappa; without a class, the training."""
        config = training.config
        torch.set_num_threads(config.threads or self._threads)
        is_done = True
        for each in config.forget_digits if forget_class is None else [forget_class]:
            is_done = is_done and all(file.is_there for file in self.files.experiments(training, each))
        if not is_done and (self._last is None or self._last[0] != training):
            data = self.data(config)
            classifier = self.classifier(training, data)
            graphs = self.graphs(training, classifier, data)
            self._last, self._kept = (training, graphs, *self.gcn(training, graphs)), {}
        if forget_class is not None:
            self.requests(training, forget_class)

    def data(self, config: Config) -> ImageData:
        """Images and labels in memory, read once."""
        key = (config.dataset, config.device, config.held_out)
        if key not in self._data:
            with self.work.stage(f"data, {config.dataset}"):
                root, device = self.work.root / "datasets", config.torch_device()
                self._data[key] = load_image_data(config.dataset, root, device, config.held_out)
        return self._data[key]

    def classifier(self, training: Training, data: ImageData) -> HookedClassifier:
        config, name = training.config, f"classifier, {training.name}"
        trainer, num_classes = Trainer(config.classifier, training.seed, config.source.size), len(data.class_names)

        def train() -> dict[str, Any]:
            classifier = trainer.train(data.train, num_classes)
            correct = is_correct(classifier(data.test.images), data.test.labels)
            score = 100 * correct.sum().item() / len(correct)
            self.work.log(f"{name}: {score:.2f} % of {config.split} classified correctly")
            return checkpoint_of(classifier, training) | {"test_score": score}

        checkpoint = self.work.made(self.files.classifier(training), name, train)
        self.test_scores[training.name] = checkpoint["test_score"]
        classifier = trainer.initial(data.train.images, num_classes)
        classifier.load_state_dict(checkpoint["state_dict"])
        return classifier

    def graphs(self, training: Training, classifier: HookedClassifier, data: ImageData) -> GraphGenerator:
        """The activation graphs: recorded anew where they are read, since that takes less than reading the file."""
        config, artifact = training.config, self.files.graphs(training)
        train = data.train
        if config.samples is not None:
            train = some_of_every_class(train, config.samples, "samples", training.seed)
        graphs = GraphGenerator(classifier, train, config.graphs, training.seed)
        self.work.processes.once(artifact.path.name, lambda: artifact.is_there or artifact.save(graphs.recorded()))
        return graphs

    def gcn(self, training: Training, graphs: GraphGenerator) -> tuple[MaskingGCN, float]:
        """The masking GCN, and the seconds of its training."""
        config = training.config.gcn
        if config.pretrained:
            return TrainedGCN.load(pretrained_for(graphs.graph.shapes)).gcn.to(graphs.labels.device), 0.0

        def train() -> dict[str, Any]:
            started = time.perf_counter()
            gcn = GCNTrainer(config, [graphs], training.config.eval.retain_weight, training.seed).train()
            return checkpoint_of(gcn, training) | {"seconds": time.perf_counter() - started}

        name = f"masking GCN, {training.name}"
        checkpoint = self.work.made(self.files.gcn(training), name, train)
        gcn = config.network(graphs.config.num_features)
        gcn.load_state_dict(checkpoint["state_dict"])
        return gcn.to(graphs.labels.device), checkpoint["seconds"]

    def of_method(
        self, training: Training, name: str, settings: dict[str, Any], make: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """What a method makes once for a classifier, from its file where it is there."""
        return self.work.made(self.files.of_method(training, name, settings), f"{name}, {training.name}", make)

    def requests(self, training: Training, forget_class: int) -> None:
        """Every experiment on one forget class that is not there, and the plots that are not."""
        config, folder = training.config, self.work.root / "eval"
        shared, orders, made, started = {}, {}, 0, time.perf_counter()
        drawn = partial(experiment.draw, folder=folder, config=config.report)
        draw = drawn if config.eval.visualize else None
        for asked in tqdm(config.kappas, f"class {forget_class}", unit="experiment", leave=False, disable=None):
            metrics, mask = self.files.metrics_and_mask(training, forget_class, asked)
            if metrics.is_there and mask.is_there:
                if draw is not None:
                    draw(metrics.load())
                continue
            _, graphs, gcn, gcn_seconds = self._last
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
                asked=asked,
                orders=orders,
                kept=self._kept,
                trained_on=data.train,
                checkpoint=partial(self.of_method, training),
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
                "files": {name: file.path.relative_to(self.work.root).as_posix() for name, file in paths.items()},
                "seconds": {"gcn": gcn_seconds},
            }
            audit = partial(Audit, config.audit, data, forget_class, training.seed)
            Eval(request, data, metrics, mask, about, shared, audit if config.audit.enabled else None, draw).eval()
            made += 1
        seconds = time.perf_counter() - started
        self.work.seconds[f"requests, {training.name}"] += seconds
        self.work.log(f"class {forget_class}, {training.name}: {seconds:.1f} s, {made} of {len(config.kappas)} made")


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
        self._training_code = code_of(PACKAGE, TRAINING_CODE)
        self._code = code_of(PACKAGE, CODE)
        self._code.pop("reporter.py", None)  # no number depends on it
        self._checksums: dict[str, str] = {}

    def classifier(self, training: Training) -> Artifact:
        return self._artifact(f"checkpoints/classifier_seed_{training.seed}.pt", training, ["classifier"])

    def graphs(self, training: Training) -> Artifact:
        return self._artifact(f"datasets/Graphs/seed_{training.seed}.pt", training, ["classifier", "graphs"])

    def gcn(self, training: Training) -> Artifact:
        return self._artifact(f"checkpoints/gcn_seed_{training.seed}.pt", training, ["classifier", "graphs", "gcn"])

    def of_method(self, training: Training, name: str, settings: dict[str, Any]) -> Artifact:
        """What a method makes once for a classifier."""
        path = f"checkpoints/{name}_seed_{training.seed}.pt"
        return self._artifact(path, training, ["classifier", "graphs"], {"method": settings})

    def of_training(self, training: Training) -> dict[str, Artifact]:
        """The files that a training makes, by what is in them."""
        made = {"classifier": self.classifier(training), "graphs": self.graphs(training)}
        return made if training.config.gcn.pretrained else made | {"gcn": self.gcn(training)}

    def metrics_and_mask(self, training: Training, forget_class: int, asked: Asked) -> tuple[Artifact, Artifact]:
        """The JSON of an experiment, whose name is the experiment's id, and its mask."""
        layers = training.config.graphs.mask_layer
        masked = "all" if layers is None else "_".join(map(str, [layers] if isinstance(layers, int) else layers))
        name = f"seed_{training.seed}_digit_{forget_class}_layer_{masked[:60]}_top_k_{training.top_k}"
        name += "_kappa_auto" if asked == "auto" else f"_kappa_{asked}_fixed"
        name += f"_{slug(training.variant)[:60]}" if training.variant else ""
        decisive = {
            "eval": training.sections["eval"],
            "audit": training.sections["audit"] if training.config.audit.enabled else None,
            "variant": training.variant,
            "forget_digit": forget_class,
            "top_k": training.top_k,
            "kappa": asked,
        }
        paths = f"eval/Metrics and Plots/metrics/{name}.json", f"eval/masks/{name}.pt"
        return tuple(self._artifact(path, training, ["classifier", "graphs", "gcn"], decisive) for path in paths)

    def experiments(self, training: Training, forget_class: int) -> list[Artifact]:
        """The JSON and the mask of every kappa."""
        found: list[Artifact] = []
        for asked in training.config.kappas:
            found += self.metrics_and_mask(training, forget_class, asked)
        return found

    def _artifact(
        self, path: str, training: Training, sections: Sequence[str], of_experiment: dict[str, Any] | None = None
    ) -> Artifact:
        """A file that depends on sections of the config, and where it is of an experiment, on more."""
        config = training.config
        settings = {name: getattr(config, name) for name in ("threads", "dataset", "held_out")}
        settings |= {"seed": training.seed, "device": config.torch_device().type}
        settings |= {section: training.sections[section] for section in sections}
        if "graphs" in sections:
            settings["samples"] = config.samples
        if "gcn" in sections:
            tracked = pretrained_for(config.masked_shapes)
            settings["pretrained"] = config.gcn.pretrained and hashlib.sha256(tracked.read_bytes()).hexdigest()
            settings["retain_weight"] = config.eval.retain_weight
        settings |= of_experiment or {}
        if not self._checksums.get(config.dataset):
            self._checksums[config.dataset] = checksum(config.dataset, self.root / "datasets")
        code = self._training_code if of_experiment is None else self._code
        of_settings, where = digest(settings), self.root / path
        made_by = digest([of_settings, code, self._checksums[config.dataset], torch.__version__])
        return Artifact(where.with_stem(f"{where.stem}_{of_settings[:8]}"), made_by, self._seen)


def trainings_of(configs: Mapping[str, Config]) -> list[Training]:
    found = []
    for variant, config in configs.items():
        for seed, top_k in itertools.product(config.seeds, config.top_ks):
            found.append(Training(variant, config, seed, top_k))
    return found


def tasks_in_order(configs: Mapping[str, Config], processes: int) -> list[tuple[Training, int | None]]:
    """What a process does at a time: a training alone, or with the experiments on one forget class.

    Trainings come early enough for the other processes to have requests to work on meanwhile.
    """
    trainings = trainings_of(configs)
    tasks: list[tuple[Training, int | None]] = [(training, None) for training in trainings[: processes - 1]]
    for index, training in enumerate(trainings):
        tasks += [(ahead, None) for ahead in trainings[index + processes - 1 : index + processes]]
        tasks += [(training, forget_class) for forget_class in training.config.forget_digits]
    return tasks


def run(configs: Mapping[str, Config], root: Path = ROOT, is_fresh: bool = False) -> None:
    """Runs the experiments of every config by its name, "" for the only one, and leaves their files under `root`.

    What is there already, made by the same settings and the same code, is taken as it is.

    is_fresh: removes first what is there of the same configs
    """
    prepare(configs)
    work = Work(root)
    with locked(root) if work.processes.rank == 0 else nullcontext():
        stages = Stages(work, Files(root))
        work.processes.first(partial(begin, stages, configs, is_fresh))
        tasks = tasks_in_order(configs, work.processes.count)
        progress = tqdm(work.processes.take(tasks), "the whole run", len(tasks), leave=False, disable=None)
        for training, forget_class in progress:
            stages.forget(training, forget_class)
        share = {"seconds": work.seconds, "scores": stages.test_scores, "peak": peak_bytes()}
        shares = work.processes.gathered(share)
        if work.processes.rank == 0:
            end(stages, configs, shares)


def begin(stages: Stages, configs: Mapping[str, Config], is_fresh: bool) -> None:
    """What the first process does before all work: looks at what is there, and says it."""
    stages.work.log.note(f"{shlex.join(sys.argv)}: {describe_machine()}")
    artifacts = list(itertools.chain.from_iterable(files for _, files in plan(stages.files, configs)))
    if is_fresh or not all(artifact.is_there for artifact in artifacts):
        for config in configs.values():
            stages.data(config)  # all of it first, so that a missing or damaged file is told before any work
    if is_fresh:
        for artifact in artifacts:
            artifact.path.unlink(missing_ok=True)
    stages.work.log(how_many(artifacts))


def end(stages: Stages, configs: Mapping[str, Config], shares: Sequence[dict[str, Any]]) -> None:
    """What the first process does after all work: draws the reports, and says what the run took."""
    work, reports = stages.work, stages.work.root / "reports"
    with work.stage("reports"):
        closing = tables.report(finished(stages.files, configs), reports)
    seconds: Counter[str] = Counter()
    scores: dict[str, float] = {}
    for of_process in shares:
        seconds.update(of_process["seconds"])
        scores |= of_process["scores"]
    total, peak = time.perf_counter() - STARTED, max(of_process["peak"] for of_process in shares)
    summary = {
        "seconds": seconds | {"reports": work.seconds["reports"]},
        "total_seconds": total,
        "peak_bytes": peak,
        "processes": len(shares),
        "machine": describe_machine(),
        "classifier_test_scores": scores,
    }
    write_text(reports / "run.json", json.dumps(summary, indent=1))
    print("\n".join(f"\n{table}" for table in closing), end="\n\n")
    each = " a process" if len(shares) > 1 else ""
    work.log(f"{total:.0f} s, {peak / 1e9:.1f} GB at most{each}. Curves and tables: {reports}")
    print(f"Metrics and plots of each experiment, and masks: {work.root / 'eval'}")


def finished(files: Files, configs: Mapping[str, Config]) -> list[tables.Result]:
    """The JSON of finished experiments, as far as reports may average them.

    Of every training with all its forget classes; where there is none yet, of the first one the classes so far.
    """
    complete, begun = [], []
    for training in trainings_of(configs):
        metrics, is_complete = [], True
        for forget_class in training.config.forget_digits:
            made = files.experiments(training, forget_class)
            if all(file.is_there for file in made):
                metrics += [file.path for file in made if file.path.suffix == ".json"]
            else:
                is_complete = False
        if metrics:
            result = tables.Result(training.variant, training.top_k, training.config.report, metrics)
            (complete if is_complete else begun).append(result)
    return complete or begun[:1]


def pretrain(configs: Mapping[str, Config], root: Path = ROOT) -> None:
    """Trains one masking GCN on the classifiers of all configs and seeds, with the settings of the first.

    It takes the place of the tracked one for the layers that the first config masks.
    """
    prepare(configs, one_process="--pretrain")
    config = next(iter(configs.values()))
    with locked(root):
        work = Work(root)
        stages, graphs = Stages(work, Files(root)), []
        for training in trainings_of(configs):
            torch.set_num_threads(training.config.threads or torch.get_num_threads())
            data = stages.data(training.config)
            graphs.append(stages.graphs(training, stages.classifier(training, data), data))
        with work.stage(f"masking GCN, {len(graphs)} classifiers"):
            gcn = GCNTrainer(config.gcn, graphs, config.eval.retain_weight, config.seed).train()
        path = root / pretrained_for(config.masked_shapes).relative_to(PACKAGE)
        save(path, {"config": asdict(config), "seed": config.seed, "state_dict": gcn.state_dict()})
        work.log(f"{path}: {path.stat().st_size / 1000:.0f} KB")


def plan(files: Files, configs: Mapping[str, Config]) -> Iterator[tuple[str, list[Artifact]]]:
    """All files that a run makes, and how messages call what they are of."""
    for training in trainings_of(configs):
        yield f"training, {training.name}, top-K {training.top_k}", list(files.of_training(training).values())
        for forget_class in training.config.forget_digits:
            name = f"class {forget_class}, {training.name}, top-K {training.top_k}"
            yield name, files.experiments(training, forget_class)


def dry_run(configs: Mapping[str, Config], root: Path = ROOT) -> None:
    """Says what a run would make and what it would reuse; writes nothing."""
    prepare(configs, one_process="--dry-run")
    for name, artifacts in plan(Files(root), configs):
        print(f"{name}: {how_many(artifacts)}")


def plot(configs: Mapping[str, Config], root: Path = ROOT) -> None:
    """Draws and writes the reports anew from the JSON of finished experiments.

    Raises DataError where nothing is finished.
    """
    prepare(configs, one_process="--plot-only")
    files = Files(root)
    with locked(root):
        results = finished(files, configs)
        if not results:
            raise DataError(f"{root / 'eval'}: nothing of this config is finished: run it first")
        closing = tables.report(results, root / "reports")
    print("\n".join(f"\n{table}" for table in closing))
    print(f"\nCurves and tables: {root / 'reports'}")


def prepare(configs: Mapping[str, Config], one_process: str = "") -> None:
    """Sets up the memory, and checks what is not in the configs alone.

    one_process: the option that runs in one process only
    """
    if one_process and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError(f"{one_process} runs in one process: start it without torchrun")
    keep_freed_memory()
    for config in configs.values():
        check_memory(config)


def check_memory(config: Config) -> None:
    """Raises InputError where the tensors that a run cannot do without do not fit in the memory of its device."""
    classes, vertices, gcn = len(config.source.class_names), config.num_vertices, config.gcn
    there = memory_of(config.torch_device()) / 1e9
    needed = {
        # Themselves, their gradients, and the two moments of Adam.
        "classifier.hidden_sizes": 4 * sum(map(math.prod, config.shapes)),
        # The means and the terms of every class, and the features of one, one by one and together.
        "graphs.mask_layer or features": vertices * (7 * classes + 2 * config.graphs.num_features),
        "gcn.hidden or rounds": 0 if gcn.pretrained else vertices * gcn.hidden * gcn.rounds,
    }
    for setting, numbers in needed.items():
        if (gigabytes := 4 * numbers / 1e9) > there:
            raise InputError(
                f"{setting}: needs at least {gigabytes:.1f} GB of memory, and there are {there:.1f}: lower it"
            )


def start(parsed: argparse.Namespace) -> None:
    """Does what the command line asks for."""
    configs = load_variants(parsed.config, parsed.overrides)
    if parsed.dry_run:
        dry_run(configs)
    elif parsed.plot_only:
        plot(configs)
    elif parsed.pretrain:
        pretrain(configs)
    else:
        run(configs, is_fresh=parsed.fresh)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    return run_command(start, arguments, ROOT)


if __name__ == "__main__":
    sys.exit(main())
