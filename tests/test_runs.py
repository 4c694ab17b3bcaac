"""Whole runs of the smoke config: the files that they write, what the next run reuses, the examples of the pages."""

import copy
import inspect
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import TRACKED, copy_to
from matplotlib.figure import Figure
from running import PROJECT, SMOKE, TINY, checkpoint, draw_nothing, files, metrics, run_here, smoke, write_few

import eval
import main
import trainer
from data import GraphGenerator, load_image_data
from experiment.config import CONFIG, load_variants
from mimu import training
from mimu.files import load, write_text
from mimu.pretrained import TrainedGCN
from mimu.pruning import Pruning, prune
from reporter import Reporter
from trainer import GCNTrainer, Trainer

METHODS = ["original", "mimu", "random", "sft", "retrain", "saliency", "magnitude"]
README, OWN, RUNNING, DATA, HOW = (
    (PROJECT / name).read_text()
    for name in ("README.md", "docs/own.md", "docs/running.md", "docs/data.md", "docs/methods.md")
)
FINISHED = {"classifier": 1, "gcn": 1, "experiments": 2}


def with_smoke(folder: Path, changes: str) -> Path:
    settings = yaml.safe_load(SMOKE.read_text())
    settings["eval"]["visualize"] = False
    for section, values in yaml.safe_load(changes).items():
        settings[section] = settings.get(section, {}) | values
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


def current(folder: Path, *overrides: str) -> dict[str, int]:
    """How many files of every stage are current."""
    of_run = main.Files(folder)
    (training,) = main.trainings_of(smoke(*TINY, *overrides))
    counts = {stage: int(artifact.is_current) for stage, artifact in of_run.shared(training).items()}
    return counts | {"experiments": sum(each.is_current for each in of_run.every(training)) - sum(counts.values())}


def clean(folder: Path) -> None:
    shutil.copy(PROJECT / "clean.sh", folder)
    subprocess.run(["bash", str(folder / "clean.sh")], check=True, cwd="/")
    (folder / "clean.sh").unlink()


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    write_few(folder)
    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch)
        patch.setattr(trainer, "COMPARED", 1)
        run_here(folder, *TINY)
    return folder


@pytest.fixture
def finished(finished_run, here) -> Path:
    """A folder with a run of TINY."""
    return shutil.copytree(finished_run, here, dirs_exist_ok=True)


def test_a_run_writes_its_files_reports_are_drawn_again_from_json_and_clean_removes_these_alone(here, capsys):
    before, reports, outside = files(here), here / "reports", here.parent / "outside"
    settings = ["sweep.kappa=[20]", "sweep.forget_digits=[3]", "eval.visualize=true", "save_graphs=true"]
    run_here(here, *settings)
    output, (result,) = capsys.readouterr().out, metrics(here).values()
    assert all(name in output for name in (*METHODS, "forget accuracy", "retain accuracy", "reports"))
    assert list(result["unlearning_metrics"]) == METHODS and result["forget_digit"] == 3
    assert len(result["zeroed"]) == result["kappa"] == 20 and not result["gcn_untrained"]
    assert result["num_graph_vertices"] == 16 * 32 and result["num_graph_edges"] == 16 * 32 * (16 + 32 - 2)
    assert all((here / path).exists() for path in result["files"].values()) and len(result["files"]) == 4
    patterns = ["checkpoints/classifier_seed_0_*", "checkpoints/gcn_seed_0_*", "datasets/Graphs/seed_0_*"]
    patterns += ["eval/masks/seed_0*", "eval/Metrics and Plots/plots/*/*.png"]
    assert [len(list(here.glob(pattern))) for pattern in patterns] == [1, 1, 1, 1, 4]
    drawn, summary = {*files(reports)} - {"run.json", "run.log"}, (reports / "summary.md").read_text()
    names = ["loss_forget_set", "score_forget_set", "loss_retain_set", "score_retain_set", "summary"]
    assert {*(f"{name}.png" for name in names), "probability_on_forget_class.png", "summary.md"} <= drawn
    shutil.rmtree(reports)
    run_here(here, *settings)
    assert {*files(reports)} - {"run.json", "run.log"} == drawn and (reports / "summary.md").read_text() == summary

    plots, *_ = (here / "eval" / "Metrics and Plots" / "plots").iterdir()
    own = [plots / "note.txt", reports / "mine.png", here / "eval/masks/seed_of_mine.pt", outside / "summary.md"]
    for path in own:
        write_text(path, "mine")
    (here / "reports" / "linked").symlink_to(outside)
    (plots.parent / "seed_0_digit_3_linked").symlink_to(outside)
    clean(here)
    kept = {path.relative_to(here).as_posix() for path in own[:3]}
    assert files(here).keys() == before.keys() | kept and files(here).items() >= before.items()
    assert len(files(outside)) == 1 and (reports / "linked").is_symlink() and not (here / "checkpoints").exists()


def test_a_change_makes_the_files_that_depend_on_it_again_and_no_others(finished, monkeypatch, capsys):
    stages, before = list(FINISHED), files(finished)
    assert current(finished) == FINISHED
    decisive = {
        # Settings of figures, of a method that does not run, and of audits that are off decide nothing.
        3: ["report.dpi=51", "eval.visualize=true", "audit.relearn_steps=2", "eval.hyperparameters.scrub.epochs=2"],
        2: ["eval.step=16", "audit.enabled=true", "sweep.top_k=64"],
        1: ["gcn.steps=13", "eval.retain_weight=51", "graphs.samples_per_class=99", "samples=50"],
        0: ["classifier.epochs=2", "threads=2", "seed=1", "held_out=10"],
    }
    for first, settings in decisive.items():
        for setting in settings:
            assert current(finished, setting) == FINISHED | dict.fromkeys(stages[first:], 0), setting
    for setting, counts in (("threads=2", (0, 4)), ("gcn.steps=13", (1, 3)), ("sweep.kappa=[20, 30]", (4, 2))):
        main.dry_run(smoke(*TINY, setting), finished)
        line = "seed 0: {} of {} files are there, {} would be made\n"
        assert capsys.readouterr().out == line.format(counts[0], sum(counts), counts[1])
    assert files(finished) == before

    sources = copy_to(finished / "sources", *TRACKED)
    monkeypatch.setattr("experiment.config.ROOT", sources)
    decisive = {0: ["main.py", "mimu/graph.py"], 2: ["eval.py", "methods/controls.py"],
                3: ["reporter.py", "tables/comparison.py", "experiment/files.py", "my_own.py"]}  # fmt: skip
    for first, paths in decisive.items():
        for path in [sources / name for name in paths]:
            source = path.read_text() if path.exists() else ""
            path.write_text(f"{source}\n\n# a remark\n")
            assert current(finished) == FINISHED
            path.write_text(f"{source}\nNUMBER = 1\n")
            assert current(finished) == FINISHED | dict.fromkeys(stages[first:], 0), path
            path.write_text(source)
    monkeypatch.setattr("experiment.config.checksum", lambda *arguments: "other data")
    assert current(finished) == dict.fromkeys(stages, 0)


def without_seconds(path: Path) -> bytes:
    content = io.BytesIO()
    torch.save(load(path) | {"seconds": 0}, content)
    return content.getvalue()


def test_a_finished_run_computes_nothing_again_and_what_is_missing_or_damaged_is_made_again(
    finished, monkeypatch, capsys
):
    expected, before, without, trained = metrics(finished), files(finished), [], Trainer.trained

    def noted(self, train, *arguments):
        without.append(set(range(10)) - set(train.labels.tolist()))
        return trained(self, train, *arguments)

    monkeypatch.setattr(Trainer, "trained", noted)
    run_here(finished, *TINY, "eval.visualize=true")
    after, log = files(finished), (finished / "reports" / "run.log").read_text()
    written = {name for name in after if after[name] != before.get(name)}
    written -= {"reports/run.json", "reports/run.log", ".lock"}
    assert len(written) == 4 and all("/plots/" in name for name in written) and before.keys() == after.keys() - written
    assert "4 of 4 files are there" in capsys.readouterr().out and without == []
    assert all(line[:4].isdigit() for line in log.splitlines()) and "4 of 4 files are there" in log

    (path,) = finished.glob("eval/*/metrics/*.json")
    path.write_text(path.read_text().replace('"kappa": 20', '"kappa": 21'))
    run_here(finished, *TINY)
    assert metrics(finished) == expected and without == []
    paths, experiments = [*finished.glob("checkpoints/[cg]*")], files(finished / "eval")
    whole = [without_seconds(path) for path in paths]
    for is_evaluated in (True, False):
        for path in paths:
            path.write_bytes(path.read_bytes()[:-1] + b"x")
        if not is_evaluated:
            shutil.rmtree(finished / "eval")
        run_here(finished, *TINY)
        assert [without_seconds(path) for path in paths] == whole and metrics(finished) == expected
        assert files(finished / "eval") == experiments or not is_evaluated

    # Retrained classifiers are kept with the seconds that they took, until a run begins anew.
    for override, is_fresh, trainings in (
        ("eval.step=16", False, []),
        ("sweep.forget_digits=[5]", False, [{5}]),
        ("seed=0", True, [set(), {3}]),
    ):
        without.clear()
        run_here(finished, *TINY, override, is_fresh=is_fresh)
        assert without == trainings
        if override == "eval.step=16":
            results = [json.loads(path.read_text()) for path in finished.glob("eval/*/metrics/*.json")]
            assert len(results) == 2 and len({result["seconds"]["retrain"] for result in results}) == 1
    assert "0 of 4 files are there" in capsys.readouterr().out


VARIANTS = """
sweep: {forget_digits: [3, 9], kappa: [auto]}
variants:
  as it is: {eval: {methods: [mimu, retrain]}}
  two steps: {gcn: {steps: 2}, eval: {methods: [mimu]}}
  wider: {classifier: {hidden_sizes: [40, 16]}, eval: {methods: [mimu, retrain]}}
"""


def test_variants_run_side_by_side_on_shared_classifiers(here, capsys):
    main.run(load_variants(with_smoke(here, VARIANTS)), here)
    output = capsys.readouterr().out
    assert output.count("\nclassifier, ") == 2, "two of the three share one"
    results = metrics(here)
    assert sorted(each["variant"] for each in results.values()) == ["as it is"] * 2 + ["two steps"] * 2 + ["wider"] * 2
    assert all(re.search("_(as_it_is|two_steps|wider)_[0-9a-f]{8}.json$", name) for name in results)
    table = (here / "reports" / "variants.md").read_text()
    assert table.splitlines()[2] in output
    assert table.count("–") == 1, "the variant without a retrained classifier has no divergence from it"
    assert [line.split("|")[1].strip() for line in table.splitlines()[4:]] == ["as it is", "two steps", "wider"]
    written = "variants.png", "variants/two_steps/summary.md"
    assert all((here / "reports" / name).exists() for name in written)
    clean(here)
    assert {path.name for path in here.iterdir()} == {"datasets", "mine.yaml"}


def graphs_of(config: main.Config, folder: Path) -> GraphGenerator:
    train = load_image_data("MNIST", folder / "datasets").train
    return GraphGenerator(Trainer(config.classifier, 0).train(train, 10), train, config.graphs, 0)


def test_a_pretrained_gcn_is_made_from_all_variants(here):
    text = "variants: {wide: {classifier: {hidden_sizes: [40, 16]}}, narrow: {}}"
    configs = load_variants(with_smoke(here, text), ["gcn.steps=4"])
    main.pretrain(configs, here)
    checkpoint = torch.load(here / "mimu" / "gcn.pt", weights_only=True)
    assert checkpoint["config"]["gcn"]["steps"] == 4
    graphs, wide = [graphs_of(config, here) for config in configs.values()], configs["wide"]
    expected = GCNTrainer(wide.gcn, graphs, wide.eval.retain_weight, 0).train().state_dict()
    assert all(torch.equal(expected[name], value) for name, value in checkpoint["state_dict"].items())


def test_the_pretrained_gcn_is_taken_as_it_is(here):
    run_here(here, *TINY, "gcn.pretrained=true")
    assert not list((here / "checkpoints").glob("gcn_*"))
    (result,) = metrics(here).values()
    config = smoke("gcn.pretrained=true", "graphs={features: [weight], other_classes: false}")[""]
    trained, graphs = TrainedGCN.load(), graphs_of(config, here)
    assert config.graphs.features == trained.graphs.features
    assert config.graphs.other_classes == trained.graphs.other_classes
    steps = prune(graphs, 3, config.eval, 0, trained.gcn)
    assert result["zeroed"] == Pruning(steps, None, config.eval).at(20).vertices.tolist()


def in_page(pattern: str, page: str = README) -> str:
    """The one group of a pattern in the README, or another page."""
    return re.search(pattern, page, re.DOTALL)[1]


def with_lines(method: Callable, lines: str, depth: int, before: str | None = None) -> Callable:
    """A method with more lines, at a depth of its source: before the one that begins so, or at the end."""
    source = textwrap.dedent(inspect.getsource(method))
    place = source.index(f"    {before}") if before else len(source)
    lines, namespace = textwrap.indent(textwrap.dedent(lines), " " * depth), {}
    exec(source[:place] + lines + source[place:], method.__globals__, namespace)
    return namespace[method.__name__]


def test_what_the_pages_add_by_hand_shows_up_everywhere(here, monkeypatch, capsys):
    example = in_page(r"```python\n(@unlearning_method.*?)```")
    (name,) = re.findall(r'@unlearning_method\("([^"]+)"', example)
    monkeypatch.setitem(eval.METHODS, name, None)  # so that it is removed in the end
    del eval.METHODS[name]
    exec(example, vars(eval))
    scored = in_page(r"\n((?: {4}[^\n]*\n)+)\nand in `eval_performance", HOW)
    drawn = in_page(r"metric:\n\n((?: {4}[^\n]*\n)+)", HOW)
    method = with_lines(eval.Eval.eval_unlearning, scored, 4, "return metrics")
    monkeypatch.setattr(eval.Eval, "eval_unlearning", method)
    method = with_lines(Reporter.draw_score_curves_on_forget_set, drawn, 8)
    monkeypatch.setattr(Reporter, "draw_score_curves_on_forget_set", method)
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **options: figures.append(figure))
    hyperparameters = in_page(r"`(noisy_magnitude: .*?)`")
    changes = f"eval: {{hyperparameters: {{{hyperparameters}}}}}"
    settings = "sweep.forget_digits=[3]", "sweep.kappa=[auto, 20]", "gcn.steps=2"
    run_here(here, configs=load_variants(with_smoke(here, changes), settings))
    for result in metrics(here).values():
        assert {"loss", "score", "probability"} == set(result["unlearning_metrics"][name])
        assert {"loss", "score"} == set(result["performance_degradation_metrics"][name])
        assert result["methods"][name]["touches"] == "a mask" and result["num_zeroed"][name] > 0
        assert len({result["unlearning_metrics"][each]["loss"] for each in (name, "original", "random", "mimu")}) == 4
        assert result["unlearning_metrics"]["mine"] == result["unlearning_metrics"]["original"]
    labels = [[text.get_text() for text in figure.legends[0].get_texts()] for figure in figures if figure.legends]
    assert len(labels) == 6 and all(name in each and "mine" in each for each in labels)
    assert ["sft, by hand" in each for each in labels].count(True) == 1
    assert name in (here / "reports" / "summary.md").read_text() and name in capsys.readouterr().out


def test_two_processes_mask_all_layers_for_two_seeds_with_the_figures_of_one(here, monkeypatch):
    """This process is the first of two, as torchrun starts them; the second is one of its own."""
    changes = [*TINY, "eval.visualize=false", "threads=1", "held_out=500"]
    changes += ["graphs.mask_layer=null", "sweep.seeds=[0, 1]"]
    sources = copy_to(here, *TRACKED)
    (sources / "trainer.py").write_text(f"{(sources / 'trainer.py').read_text()}\nCOMPARED = 1\n")
    monkeypatch.setattr("experiment.config.ROOT", sources)
    run_here(here, *changes)
    alone = metrics(here)
    for folder in ("checkpoints", "eval", "reports"):
        shutil.rmtree(here / folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    environment = os.environ | variables | {"RANK": "1", "LOCAL_RANK": "1", "PYTHONPATH": str(sources)}
    command = [sys.executable, "main.py", "--config", "configs/smoke.yaml", *changes]
    second = subprocess.Popen(command, cwd=here, env=environment, stdout=subprocess.PIPE, text=True)
    for name, value in (variables | {"RANK": "0", "LOCAL_RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    run_here(here, *changes)
    output, _ = second.communicate(timeout=60)
    assert second.returncode == 0 and "process 1: masking GCN" in output
    assert "process 0: masking GCN" in (here / "reports" / "run.log").read_text()
    assert len(alone) == 2 and metrics(here) == alone
    assert {result["split"] for result in alone.values()} == {"500 held-out training samples"}
    assert {result["num_graph_vertices"] for result in alone.values()} == {784 * 32 + 32 * 16 + 16 * 10}
    assert "over seeds: 2" in (here / "reports" / "summary.md").read_text()
    first, other = (checkpoint(here, f"classifier_seed_{seed}")["state_dict"]["network.1.weight"] for seed in (0, 1))
    assert not torch.equal(first, other) and len(list(here.glob("checkpoints/gcn_*.pt"))) == 2


def test_the_lines_of_the_page_load_a_mask_and_its_classifier(finished, monkeypatch):
    example = in_page(r"```python\n(import json.*?)```", RUNNING)
    for theirs, ours in (("digit_9", "digit_3"), ("kappa_200", "kappa_20"), ("(128, 64)", "(32, 16)")):
        example = example.replace(theirs, ours)
    monkeypatch.chdir(finished)
    exec(example, values := {})
    mask, classifier, test = values["mask"], values["classifier"], load_image_data("MNIST", finished / "datasets").test
    assert list(mask.origins) == classifier.names, "it is known to be of this classifier"
    score = 100 * (classifier(test.forget(3).images).argmax(1) == 3).double().mean().item()
    (result,) = metrics(finished).values()
    assert score == pytest.approx(result["unlearning_metrics"]["mimu"]["score"])


def test_the_lines_of_the_pages_make_a_data_set_of_ones_own_whose_classes_are_forgotten(tmp_path, monkeypatch):
    draw_nothing(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("experiment.config.DATASET_ROOT", tmp_path / "datasets")
    exec(in_page(r"```python\n([^`]*load_digits[^`]*)```", DATA), {})
    assert len(list(tmp_path.glob("datasets/digits/*/*/*"))) == 1797
    changes = ["sweep.kappa=[auto]", "eval.methods=[original, mimu]", "eval.visualize=false", "gcn.pretrained=true"]
    run_here(tmp_path, configs=load_variants(CONFIG, ["dataset=digits", *changes]))
    (result,) = metrics(tmp_path).values()
    of_run = {"dataset": "digits", "split": "the test split", "classifier": "64-128-64-10", "forget_digit": 9}
    assert of_run.items() <= result.items() and result["class_names"] == list("0123456789")
    forget, retain = result["unlearning_metrics"], result["performance_degradation_metrics"]
    assert forget["original"]["score"] > 60 and forget["mimu"]["score"] <= 1
    assert retain["mimu"]["score"] > retain["original"]["score"] - 5
    assert "digits" in (tmp_path / "reports" / "summary.md").read_text()


def test_the_quick_start_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(in_page(r"```python\n(import torch[^`]*unlearn\(model[^`]*)```"), names)
    correct = names["model"](names["inputs"]).argmax(1) == names["labels"]
    is_forget = names["labels"] == 3
    assert correct[is_forget].float().mean() < 0.01 and correct[~is_forget].float().mean() > 0.85
    printed = capsys.readouterr().out
    assert "class 3 erased: attackers find R^2" in printed and "Class 3: cannot be judged" in printed


def test_the_lines_of_the_page_unlearn_classes_together_and_in_a_row(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example = in_page(r"```python\n([^`]*unlearn\(model[^`]*Mask.load[^`]*)```", OWN)
    train = load_image_data("MNIST", PROJECT / "datasets").train[:5000]
    classifier = smoke("classifier.bias=true", "classifier.hidden_sizes=[64, 32]", "classifier.epochs=5")[""].classifier
    model = Trainer(classifier, 0).train(train, 10).network
    original, keys = copy.deepcopy(model), list(model.state_dict())
    given = {"model": model, "inputs": train.images, "labels": train.labels}
    given["data_set"] = torch.utils.data.TensorDataset(train.images[:2500], train.labels[:2500])
    before, is_gone = model(train.images).argmax(1) == train.labels, torch.isin(train.labels, torch.tensor([3, 7]))
    exec(example, given)
    assert list(model.state_dict()) == keys and given["both"].forgets == given["same"].forgets == (3, 7)
    expected = given["both"].weights(original)
    assert all(torch.equal(model.get_parameter(name), weight) for name, weight in expected.items()), "for good"
    now = model(train.images).argmax(1) == train.labels
    assert now[is_gone].float().mean() < 0.01 and now[~is_gone].float().mean() > before[~is_gone].float().mean() - 0.01


def test_trainings_that_are_interrupted_go_on_where_they_were_and_figures_stay(here, monkeypatch):
    longer = (*TINY, "classifier.epochs=3", "gcn.steps=12")
    run_here(here, *longer)
    expected, check, steps = metrics(here), training.check_finite, {}

    def interrupted(losses, step, setting) -> None:
        steps.setdefault(setting, []).append(step)
        if len(steps[setting]) == 6:
            raise KeyboardInterrupt
        check(losses, step, setting)

    monkeypatch.setattr(training, "check_finite", interrupted)
    monkeypatch.setattr(trainer, "SAVED_EVERY", 0.0)
    for is_fresh in (True, False):
        with pytest.raises(KeyboardInterrupt):
            run_here(here, *longer, is_fresh=is_fresh)
    run_here(here, *longer)
    of_classifier, of_gcn = steps.values()
    assert of_classifier[:14] == [*range(6), *range(4, 12)] and of_gcn == [*range(6), *range(3, 12)]
    assert metrics(here) == expected


def test_a_gcn_that_its_training_leaves_behind_the_formula_is_the_one_before_and_the_run_says_so(here, capsys):
    methods = "eval.methods=[mimu, saliency]"
    run_here(here, methods, "sweep.kappa=[auto]", "sweep.forget_digits=[3]", "gcn.learning_rate=100", "gcn.steps=20")
    assert "points behind the formula: the untrained is used" in capsys.readouterr().out
    (result,) = metrics(here).values()
    kept = result["performance_degradation_metrics"]
    assert result["gcn_untrained"] and kept["mimu"] == kept["saliency"]
