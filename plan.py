"""What a run consists of, what of it is there already, and how long the rest takes."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

import artifacts
from artifacts import NOT_THERE, Artifact, ArtifactError, code_of, digest, short
from config import Config
from data import IMAGE_SIZE, NUM_CLASSES, checksums
from eval import Experiment, metrics_folder
from trainer import PRETRAINED
from visualization import Visualization, plots_folder


@dataclass(frozen=True)
class Training:
    """What the requests to forget a class of one classifier share: the classifier, its graphs and its masking GCN."""

    variant: str
    config: Config
    seed: int
    top_k: int

    @property
    def classifier_name(self) -> str:
        """How messages call the classifier."""
        return f"{self.variant}, seed {self.seed}" if self.variant else f"seed {self.seed}"

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"{self.classifier_name}, top-K {self.top_k}"


@dataclass(frozen=True)
class Task:
    """What one process does at a time: a training, or all experiments on one forget digit after it."""

    training: Training
    digit: int | None = None


def trainings_of(configs: Mapping[str, Config]) -> list[Training]:
    return [
        Training(variant, config, seed, top_k)
        for variant, config in configs.items()
        for seed in config.seeds
        for top_k in config.sweep.top_ks(config.num_vertices)
    ]


def tasks_in_order(configs: Mapping[str, Config], processes: int) -> list[Task]:
    """All tasks of a run. Trainings come early enough for the other processes to have requests to work on meanwhile."""
    trainings = trainings_of(configs)
    tasks = [Task(training) for training in trainings[: processes - 1]]
    for index, training in enumerate(trainings):
        tasks += [Task(ahead) for ahead in trainings[index + processes - 1 : index + processes]]
        tasks += [Task(training, digit) for digit in training.config.sweep.forget_digits]
    return tasks


class Artifacts:
    """Where every file of a run stands, and what it depends on.

    Two configs share what both would make alike, and nothing else: the names of files end in a digest of the settings
    that they depend on. A change of the code, the data set or PyTorch leaves the name and makes the file anew.

    configs: by their names; threads: of a process, where a config does not say
    """

    def __init__(self, configs: Mapping[str, Config], root: Path, threads: int) -> None:
        self.configs = configs
        self.root = root
        self.threads = threads
        training = code_of("trainer") | {"pipeline.py": code_of("pipeline")["pipeline.py"]}
        evaluation = code_of("eval", without=("reporter", "visualization"))  # no number depends on the plots
        self._code = {"training": training, "evaluation": training | evaluation}
        self._checksums: dict[str, dict[str, str]] = {}

    def classifier(self, training: Training) -> Artifact:
        made_by = self._made_by(training, "training", ("classifier",))
        name = f"classifier_seed_{training.seed}_{short(made_by['settings'])}.pt"
        return Artifact(self.root / "checkpoints" / name, made_by)

    def graphs(self, training: Training) -> Artifact:
        made_by = self._made_by(training, "training", ("classifier", "graphs"))
        name = f"seed_{training.seed}_{short(made_by['settings'])}.pt"
        return Artifact(self.root / "datasets" / "Graphs" / name, made_by)

    def gcn(self, training: Training) -> Artifact | None:
        """The checkpoint of the masking GCN; None where the tracked one is taken."""
        if training.config.gcn.pretrained:
            return None
        made_by = self._made_by(training, "training", ("classifier", "graphs", "gcn"), top_k=training.top_k)
        name = f"gcn_seed_{training.seed}_top_k_{training.top_k}_{short(made_by['settings'])}.pt"
        return Artifact(self.root / "checkpoints" / name, made_by)

    def of_training(self, training: Training) -> dict[str, Artifact]:
        """The files that a training makes, by what is in them."""
        made = {"classifier": self.classifier(training), "graphs": self.graphs(training), "gcn": self.gcn(training)}
        return {name: artifact for name, artifact in made.items() if artifact}

    def experiments(self, training: Training, digit: int) -> list[Experiment]:
        """All experiments on one forget digit, those with kappa auto without the kappa."""
        config, top_k = training.config, training.top_k
        kappas: list[tuple[int | None, str]] = [
            (kappa, "fixed") for kappa in config.sweep.fixed_kappas(config.num_vertices)
        ]
        if "auto" in config.sweep.kappa:
            kappas.append((None, "auto"))
        files = self.of_training(training)
        experiments = []
        for kappa, choice in kappas:
            experiment = Experiment(
                variant=training.variant,
                seed=training.seed,
                forget_digit=digit,
                mask_layer=config.graphs.mask_layer,
                top_k=top_k,
                kappa=kappa,
                kappa_choice=choice,
                gcn_seconds=0.0,
                config=asdict(config),
                made_by=self._made_by(
                    training,
                    "evaluation",
                    ("classifier", "graphs", "gcn"),
                    eval=config.eval.decisive(),
                    variant=training.variant,
                    top_k=top_k,
                    forget_digit=digit,
                    kappa="auto" if kappa is None else kappa,
                ),
            )
            files["mask"] = experiment.mask(self.root / "eval")
            relative = {name: str(file.path.relative_to(self.root)) for name, file in files.items()}
            experiments.append(replace(experiment, files=relative))
        return experiments

    def why_not(self, experiment: Experiment) -> str:
        """Why an experiment has to be made, in a few words; nothing where it is there as it would be made."""
        return experiment.metrics(self.root / "eval").why_not() or experiment.mask(self.root / "eval").why_not()

    def finished(self, training: Training, digit: int) -> list[Path]:
        """The JSON of every experiment on a digit; none where one of them has to be made."""
        experiments = self.experiments(training, digit)
        if any(map(self.why_not, experiments)):
            return []
        return [experiment.metrics(self.root / "eval").path for experiment in experiments]

    def reportable(self) -> list[tuple[Training, list[Path]]]:
        """The JSON of finished experiments, as far as reports may average them.

        Of every training with all its forget digits; where there is none yet, of the first one the digits so far.
        """
        finished = [
            (training, [self.finished(training, digit) for digit in training.config.sweep.forget_digits])
            for training in trainings_of(self.configs)
        ]
        chosen = [each for each in finished if all(each[1])] or [each for each in finished if any(each[1])][:1]
        return [(training, [path for paths in digits for path in paths]) for training, digits in chosen]

    def all_experiments(self) -> Iterator[Experiment]:
        for training in trainings_of(self.configs):
            for digit in training.config.sweep.forget_digits:
                yield from self.experiments(training, digit)

    def remove(self) -> None:
        """Removes all files of the trainings and the experiments, those that other configs share, too."""
        made = [artifact for each in trainings_of(self.configs) for artifact in self.of_training(each).values()]
        for each in self.all_experiments():
            made += [each.metrics(self.root / "eval"), each.mask(self.root / "eval")]
            shutil.rmtree(plots_folder(self.root / "eval", each.id), ignore_errors=True)
        for artifact in made:
            artifact.path.unlink(missing_ok=True)

    def check(self) -> None:
        """Raises ArtifactError on the first JSON of an experiment that is damaged."""
        for each in self.all_experiments():
            if (path := each.metrics(self.root / "eval").path).exists():
                artifacts.load(path)

    def _made_by(self, training: Training, stage: str, sections: Iterable[str], **request: Any) -> dict[str, Any]:
        config = training.config
        settings = {
            "seed": training.seed,
            "device": config.torch_device().type,
            "threads": config.threads or self.threads,
            "dataset": config.dataset,
            "held_out": config.held_out,
            **{section: asdict(getattr(config, section)) for section in sections},
            **request,
        }
        made_by = {
            "settings": settings,
            "code": self._code[stage],
            "data": self.data(config.dataset),
            "torch": torch.__version__,
        }
        if "gcn" in settings and config.gcn.pretrained:
            made_by["gcn"] = hashlib.sha256(PRETRAINED.read_bytes()).hexdigest()
        return json.loads(json.dumps(made_by))

    def data(self, dataset: str) -> dict[str, str]:
        """The checksums of the files of a data set; empty where they are not there."""
        if not self._checksums.get(dataset):
            self._checksums[dataset] = checksums(dataset, self.root / "datasets")
        return self._checksums[dataset]


PLOTS = "plots to draw"  # of an experiment that is there
SPOKEN = {"classifier": "classifier", "graphs": "activation graphs", "gcn": "masking GCN"}


@dataclass(frozen=True)
class Step:
    """A part of a run: how messages call it, its file, why it has to be made (empty: it is there), and its seconds."""

    name: str
    path: Path
    why: str
    seconds: float


@dataclass(frozen=True)
class Work:
    """A task of which something is to do.

    task: its index; seconds: about how long it takes; makes: the names of the files that it makes for other tasks
    """

    task: int
    seconds: float
    needs_data: bool
    makes: list[str]


class Plan:
    """What of a run is there already, and what is still to do."""

    def __init__(self, files: Artifacts, processes: int = 1) -> None:
        self.files = files
        self.tasks = tasks_in_order(files.configs, processes)
        self._guess = Guess(files.root)
        self._looked_at: set[Path] = set()
        self.steps = [self._steps(task) for task in self.tasks]

    @property
    def to_do(self) -> list[Work]:
        """The tasks of which something is still to do, in their order."""
        found = []
        for index, (task, steps) in enumerate(zip(self.tasks, self.steps)):
            if missing := [step for step in steps if step.why]:
                makes = [step.path.name for step in missing] if task.digit is None else []
                needs_data = any(step.why != PLOTS for step in missing)
                found.append(Work(index, sum(step.seconds for step in missing), needs_data, makes))
        return found

    def made_anew(self) -> list[str]:
        """A line for every file of a training that is there and cannot be taken, with the reason."""
        steps = [step for task, steps in zip(self.tasks, self.steps) if task.digit is None for step in steps]
        return [f"{step.name}: {step.why}, made anew" for step in steps if step.why not in ("", NOT_THERE)]

    def table(self) -> list[str]:
        """A line for every file of a training and for the experiments on every digit, and the sum."""
        lines = []
        for task, steps in zip(self.tasks, self.steps):
            if task.digit is None:
                for step in steps:
                    what = f"{step.why}, about {time_in_words(step.seconds)}" if step.why else "there"
                    lines.append(f"{step.name}: {what}")
                continue
            seconds = sum(step.seconds for step in steps)
            counts = Counter(step.why or "there" for step in steps)
            what = ", ".join(f"{count} {why}" for why, count in counts.items())
            about = f", about {time_in_words(seconds)}" if seconds else ""
            lines.append(f"experiments, {task.training.name}, digit {task.digit}: {what}{about}")
        return [*lines, self.summary()]

    def summary(self) -> str:
        """How many experiments are there, why others that were made are not taken, and how long the rest takes."""
        steps = [step for task, steps in zip(self.tasks, self.steps) if task.digit is not None for step in steps]
        reasons = Counter(step.why for step in steps)
        there = reasons.pop("", 0) + reasons[PLOTS]
        to_make = len(steps) - there
        del reasons[NOT_THERE]
        why = f" ({', '.join(f'{count} {reason}' for reason, count in reasons.items() if count)})" if +reasons else ""
        if not self.to_do:
            return f"{there} of {len(steps)} experiments are there; nothing left to do"
        about = f"about {time_in_words(sum(work.seconds for work in self.to_do))} of work"
        return f"{there} of {len(steps)} experiments are there; {to_make} to make{why}, {about}"

    def _steps(self, task: Task) -> list[Step]:
        return self._training_steps(task.training) if task.digit is None else self._experiment_steps(task)

    def _training_steps(self, training: Training) -> list[Step]:
        steps = []
        for name, artifact in self.files.of_training(training).items():
            if artifact.path not in self._looked_at:  # variants may share it
                self._looked_at.add(artifact.path)
                whose = training.name if name == "gcn" else training.classifier_name
                seconds = self._guess.training(name, training.config)
                steps.append(Step(f"{SPOKEN[name]}, {whose}", artifact.path, artifact.why_not(), seconds))
        return steps

    def _experiment_steps(self, task: Task) -> list[Step]:
        training, steps, shared = task.training, [], {}
        folder, experiments = self.files.root / "eval", self.files.experiments(training, task.digit)
        for experiment in experiments:
            metrics = experiment.metrics(folder)
            seconds, why = 0.0, self.files.why_not(experiment)
            if why:
                seconds = self._guess.experiment(training.config, len(experiments))
            elif training.config.eval.visualize:
                missing = Visualization(metrics.load(), folder, shared).missing()
                why, seconds = PLOTS if missing else "", 0.1 * len(missing)
            kappa = "auto" if experiment.kappa is None else experiment.kappa
            steps.append(Step(f"kappa {kappa}", metrics.path, why, seconds))
        return steps


def whole_experiments(root: Path) -> Iterator[dict[str, Any]]:
    """The JSON of all experiments in the folder, the latest first, of whatever config, but for damaged ones."""
    paths = metrics_folder(root / "eval").glob("*.json")
    for path in sorted(paths, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        with suppress(ArtifactError):
            if isinstance((experiment := artifacts.load(path)).get("made_by"), dict):
                yield experiment


def thread_counts(root: Path) -> list[int]:
    """The numbers of threads with which experiments were made, that of the latest first."""
    return list(dict.fromkeys(each["made_by"]["settings"]["threads"] for each in whole_experiments(root)))


# On two cores, as in the tables of the README; a method that is not here is taken for half a second.
CLASSIFIER_SECONDS = 2.4  # a million weights, an epoch
GCN_SECONDS = 4.3  # a million vertices, a step
REQUEST_SECONDS = {
    "original": 0.0,
    "mimu": 0.3,
    "saliency": 0.2,
    "random": 0.0,
    "magnitude": 0.0,
    "sft": 0.1,
    "retrain": 1.2,
}
METRICS_SECONDS = 0.03  # of a method
AUDIT_SECONDS = 0.4  # of a method
PLOTS_SECONDS = 0.5


class Guess:
    """How long parts of a run take: experiments as they took before in this folder, else as in the README."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @cached_property
    def recorded(self) -> dict[str, float]:
        """The mean of the experiments that are in the folder, by their settings of the evaluation."""
        seconds: dict[str, list[float]] = {}
        for experiment in whole_experiments(self.root):
            settings = digest(experiment["made_by"]["settings"]["eval"])
            seconds.setdefault(settings, []).append(experiment["seconds"]["experiment"])
        return {settings: fmean(each) for settings, each in seconds.items()}

    def training(self, name: str, config: Config) -> float:
        """Of a file of a training, by its name in `Artifacts.of_training`."""
        if name == "classifier":
            weights = sum(m * n for m, n in config.classifier.shapes(IMAGE_SIZE, NUM_CLASSES))
            return CLASSIFIER_SECONDS * weights / 1e6 * config.classifier.epochs
        return GCN_SECONDS * config.num_vertices / 1e6 * config.gcn.steps if name == "gcn" else 0.1

    def experiment(self, config: Config, kappas: int) -> float:
        """Of one of the kappas of a request."""
        settings, names = config.eval.decisive(), config.eval.method_names
        known = self.recorded.get(digest(settings))
        if known is not None:
            return known
        once = sum(REQUEST_SECONDS.get(name, 0.5) + AUDIT_SECONDS * config.eval.audit.enabled for name in names)
        return once / kappas + METRICS_SECONDS * len(names) + PLOTS_SECONDS * config.eval.visualize


def time_in_words(seconds: float) -> str:
    """A time as people say it."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
