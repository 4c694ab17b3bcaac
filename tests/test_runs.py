"""Whole runs of the smoke config: what they leave, what of it the next one takes, and the examples of the README."""

import io
import json
import re
import shutil
import subprocess
import sys
import textwrap
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from conftest import TRACKED, copy_to
from running import PROJECT, SMOKE, checkpoint, draw_nothing, files, metrics, run, run_here, smoke, write_few

import main
import trainer
from data import GraphGenerator, load_image_data
from experiment.config import CONFIG, load_variants
from mimu import files as run_files
from mimu.errors import DataError
from mimu.pretrained import TrainedGCN
from mimu.pruning import Pruning, SaliencyScorer
from trainer import GCNTrainer, Trainer

METHODS = ["original", "mimu", "random", "sft", "retrain", "saliency", "magnitude"]
TINY = ("sweep.forget_digits=[3]", "sweep.kappa=[20]", "gcn.steps=2", "eval.methods=[original, mimu, retrain]")
README = (PROJECT / "README.md").read_text()


def with_smoke(folder: Path, changes: str) -> Path:
    settings = yaml.safe_load((PROJECT / SMOKE[1]).read_text())
    settings["eval"]["visualize"] = False
    for section, values in yaml.safe_load(changes).items():
        settings[section] = settings.get(section, {}) | values
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


def there(folder: Path, *overrides: str) -> dict[str, int]:
    made = main.Files(folder)
    (training,) = main.trainings_of(smoke(*TINY, *overrides))
    counts = {name: int(artifact.is_current) for name, artifact in made.of_training(training).items()}
    return counts | {"experiments": sum(file.is_current for file in made.every(training, 3)) - sum(counts.values())}


def test_the_whole_path_leaves_its_artifacts_and_clean_removes_them_alone(clone):
    before = files(clone)
    own = {clone / "eval" / "masks" / "seed_of_mine.pt", clone / "reports" / "mine.png"}
    for path in own:
        run_files.write_text(path, "mine")
    output = run(clone, *SMOKE, "sweep.kappa=[auto, 20]", "sweep.forget_digits=[3]", "report.format=[pdf, svg]")
    assert all(name in output for name in (*METHODS, "forget accuracy", "retain accuracy", "reports"))
    results = metrics(clone).values()
    assert [result["forget_digit"] for result in results] == [3, 3]
    for result in results:
        assert list(result["unlearning_metrics"]) == METHODS
        assert len(result["zeroed"]) == result["kappa"] and set(result["gave_up"]) <= {"mimu", "saliency"}
        assert result["num_graph_vertices"] == 16 * 32 and result["num_graph_edges"] == 16 * 32 * (16 + 32 - 2)
        assert all((clone / path).exists() for path in result["files"].values()) and len(result["files"]) == 4
    drawn = ["loss_forget_set", "score_forget_set", "loss_retain_set", "score_retain_set"]
    for name in (*drawn, "summary", "probability_on_forget_class"):
        assert {path.suffix for path in (clone / "reports").glob(f"{name}.*")} - {".md"} == {".pdf", ".svg"}
    assert (clone / "reports" / "summary.md").exists()
    made = ["checkpoints/classifier_seed_0_*", "checkpoints/gcn_seed_0_*", "datasets/Graphs/seed_0_*"]
    made += ["eval/masks/seed_0*", "eval/Metrics and Plots/plots/*/*.svg"]
    assert [len(list(clone.glob(pattern))) for pattern in made] == [1, 1, 1, 2, 2 * 4]
    subprocess.run(["bash", str(clone / "clean.sh")], check=True, cwd="/")
    assert {name: content for name, content in files(clone).items() if clone / name not in own} == before
    assert {path.read_text() for path in own} == {"mine"}


def said_of(folder: Path, capsys, *overrides: str) -> str:
    """What `--dry-run` says."""
    capsys.readouterr()
    main.dry_run(smoke(*TINY, *overrides), folder)
    return capsys.readouterr().out


def without_seconds(path: Path) -> bytes:
    """What a file holds but for what varies from run to run."""
    content = io.BytesIO()
    torch.save(run_files.load(path) | {"seconds": 0}, content)
    return content.getvalue()


def test_a_change_makes_anew_what_depends_on_it_and_nothing_else_and_a_dry_run_says_why(here, monkeypatch, capsys):
    names = ["classifier", "graphs", "gcn", "experiments"]
    assert there(here) == dict.fromkeys(names, 0)
    run_here(here, *TINY)
    finished = {"classifier": 1, "graphs": 1, "gcn": 1, "experiments": 2}
    assert there(here) == finished
    of_settings = {
        # What is drawn, of a method that does not run, of audits that are not made:
        4: ["report.dpi=51", "eval.visualize=true", "audit.relearn_steps=2", "eval.hyperparameters.scrub.epochs=2"],
        3: ["eval.step=16", "eval.target=0.2", "audit.enabled=true", "sweep.top_k=[64]"],
        2: ["gcn.steps=13", "eval.retain_weight=51"],
        1: ["graphs.samples_per_class=99", "samples=50"],
        0: ["classifier.epochs=2", "threads=2", "seed=1", "held_out=10"],
    }
    for first, settings in of_settings.items():
        for setting in settings:
            assert there(here, setting) == finished | dict.fromkeys(names[first:], 0), setting
    assert there(here, "sweep.kappa=[20, 30]")["experiments"] == 2
    for setting, why in (("threads=2", "0 of 5 files are there; made with other threads: 5"),
                         ("gcn.steps=13", "2 of 5 files are there; made with other gcn: 3"),
                         ("sweep.kappa=[20, 30]", "5 of 7 files are there")):  # fmt: skip
        assert said_of(here, capsys, setting) == f"seed 0, top-K 128: {why}\n"

    sources = copy_to(here / "sources", *TRACKED)
    monkeypatch.setattr(main, "ROOT", sources)
    of_all = ["main.py", "model.py", "data.py", "trainer.py", "images/sources.py", "masking/regression.py"]
    of_none = ["reporter.py", "tables/variants.py", "runs/files.py"]
    for first, changed in {0: of_all, 3: ["eval.py", "methods/controls.py", "of_my_own.py"], 4: of_none}.items():
        for file in changed:
            source = (sources / file).read_text() if (sources / file).exists() else ""
            (sources / file).write_text(f"{source}# a remark\n")
            assert there(here) == finished | dict.fromkeys(names[first:], 0), file
            assert ("made with other code" in said_of(here, capsys)) == (first < 4)
            (sources / file).write_text(source) if source else (sources / file).unlink()
    monkeypatch.setattr(main, "checksum", lambda *arguments: "other")
    assert there(here) == dict.fromkeys(names, 0) and "made with other data: 5" in said_of(here, capsys)


def test_a_retrained_classifier_is_kept_with_the_seconds_that_it_took_until_a_run_begins_anew(here, monkeypatch):
    made, trained = [], Trainer.trained

    def noted(self, train, *others):
        made.append((self.seed, *train.labels.unique().tolist()))
        return trained(self, train, *others)

    def seconds() -> float:
        (path,) = here.glob("eval/*/metrics/*.json")
        return json.loads(path.read_text())["seconds"]["retrain"]

    monkeypatch.setattr(Trainer, "trained", noted)
    run_here(here, *TINY)
    original, without_3, without_5 = (0, *range(10)), (0, *range(3), *range(4, 10)), (0, *range(5), *range(6, 10))
    took = seconds()
    assert made == [original, without_3] and took > 0
    (path,) = here.glob("eval/*/metrics/*.json")
    path.unlink()
    run_here(here, *TINY, "eval.methods=[original, mimu, sft, retrain]")
    assert made == [original, without_3] and seconds() == took
    run_here(here, *TINY, "sweep.forget_digits=[5]")
    assert made == [original, without_3, without_5]
    run_here(here, *TINY, is_fresh=True)
    assert made == [original, without_3, without_5, original, without_3]


def test_a_finished_run_computes_nothing_again_and_what_is_missing_or_damaged_is_made_again(here, capsys, monkeypatch):
    assert said_of(here, capsys) == "seed 0, top-K 128: 0 of 5 files are there\n"
    assert [path.name for path in here.iterdir()] == ["datasets"]
    run_here(here, *TINY)
    expected, before = metrics(here), files(here)
    capsys.readouterr()
    run_here(here, *TINY, "eval.visualize=true")
    output, after = capsys.readouterr().out, files(here)
    assert "5 of 5 files are there" in output and "classifier, " not in output
    made = {name for name in after if after[name] != before.get(name)}
    made -= {"reports/run.json", "reports/run.log", ".lock"}
    assert len(made) == 4 and all("/plots/" in name for name in made) and before.keys() == after.keys() - made
    log = (here / "reports" / "run.log").read_text()
    assert all(line[:4].isdigit() for line in log.splitlines()) and "5 of 5 files are there" in log

    (path,) = (here / "eval").glob("*/metrics/*.json")
    changed = path.read_text().replace('"kappa": 20', '"kappa": 21')
    damages = [partial(path.write_text, changed), path.unlink, partial(path.write_bytes, b"{")]
    for damage in damages + [partial(run_files.save, path, {"made_by": each}) for each in (None, "other")]:
        damage()
        with pytest.raises(DataError, match="run it first, or .* missing: seed_0_digit_3_top_k_128_kappa_20_fixed$"):
            main.plot(smoke(*TINY), here)
        run_here(here, *TINY)
        assert metrics(here) == expected
    for pattern in ("checkpoints/classifier_*", "checkpoints/gcn_*", "datasets/Graphs/*"):
        (path,) = here.glob(pattern)
        whole, stand = without_seconds(path), files(here / "eval")
        for experiments in (stand, {}):
            if not experiments:
                shutil.rmtree(here / "eval")
            path.write_bytes(path.read_bytes()[:-1] + b"x")
            assert f"{path}: is damaged or something else (it does not match its checksum)\n" in said_of(here, capsys)
            run_here(here, *TINY)
            assert without_seconds(path) == whole and files(here / "eval").items() >= experiments.items()
            assert metrics(here) == expected
    unneeded = here / "checkpoints" / "gcn_seed_7_00000000.pt"
    run_files.write_text(unneeded, "cut short")
    assert said_of(here, capsys).startswith(f"{unneeded}: is damaged")
    reads, load = Counter(), run_files.load
    monkeypatch.setattr(run_files, "load", lambda path: reads.update([path]) or load(path))
    run_here(here, *TINY)
    assert len(reads) == 5 and set(reads.values()) == {1}, "a rerun reads a file once"
    capsys.readouterr()
    run_here(here, *TINY, is_fresh=True)
    assert "0 of 5 files are there" in capsys.readouterr().out


def test_all_layers_can_be_masked_and_several_top_k_and_seeds_are_reported(here):
    settings = "graphs.mask_layer=null", "sweep.top_k=[64, 128]", "sweep.seeds=[0, 1]", "held_out=500"
    run_here(here, *TINY, *settings)
    results = metrics(here).values()
    assert len(results) == 4 and {result["split"] for result in results} == {"500 held-out training samples"}
    assert {result["num_graph_vertices"] for result in results} == {784 * 32 + 32 * 16 + 16 * 10}
    for top_k in (64, 128):
        summary = (here / "reports" / f"top_k_{top_k}" / "summary.md").read_text()
        assert f"K = {top_k}" in summary and "over seeds: 2" in summary
    first, other = (checkpoint(here, f"classifier_seed_{seed}")["state_dict"]["network.1.weight"] for seed in (0, 1))
    assert not torch.equal(first, other) and len(list(here.glob("checkpoints/gcn_*.pt"))) == 2


VARIANTS = """
sweep: {forget_digits: [3, 9], kappa: [auto]}
variants:
  as it is: {eval: {methods: [mimu, retrain]}}
  two steps: {gcn: {steps: 2}, eval: {methods: [mimu]}}
  wider: {classifier: {hidden_sizes: [40, 16]}, eval: {methods: [mimu, retrain]}}
"""


def test_variants_run_side_by_side_on_shared_classifiers(here, capsys):
    main.run(load_variants(with_smoke(here, VARIANTS), ["report.format=[png, pdf, svg]"]), here)
    output = capsys.readouterr().out
    assert output.count("% of the test split classified correctly") == 2, "two of the three share one"
    results = metrics(here)
    assert sorted(each["variant"] for each in results.values()) == ["as it is"] * 2 + ["two steps"] * 2 + ["wider"] * 2
    assert all(re.search("_(as_it_is|two_steps|wider)_[0-9a-f]{8}.json$", name) for name in results)
    table = (here / "reports" / "variants.md").read_text()
    assert table.splitlines()[2] in output and "–" not in table
    assert [line.split("|")[1].strip() for line in table.splitlines()[4:]] == ["as it is", "two steps", "wider"]
    made = "variants.png", "variants.pdf", "variants.svg", "variants/two_steps/summary.md"
    assert all((here / "reports" / each).exists() for each in made)
    shutil.copy(PROJECT / "clean.sh", here)
    subprocess.run(["bash", str(here / "clean.sh")], check=True)
    assert {path.name for path in here.iterdir()} == {"datasets", "mine.yaml", "clean.sh"}


def graphs_of(config: main.Config, folder: Path) -> GraphGenerator:
    train = load_image_data("MNIST", folder / "datasets").train
    return GraphGenerator(Trainer(config.classifier, 0).train(train, 10), train, config.graphs, 0)


def test_a_pretrained_gcn_is_made_from_all_variants(here):
    text = "variants: {wide: {classifier: {hidden_sizes: [40, 16]}}, narrow: {}}"
    configs = load_variants(with_smoke(here, text), ["gcn.steps=4"])
    main.pretrain(configs, here)
    made = torch.load(here / "checkpoints" / "pretrained" / "gcn.pt", weights_only=True)
    assert made["config"]["gcn"]["steps"] == 4
    graphs, wide = [graphs_of(config, here) for config in configs.values()], configs["wide"]
    expected = GCNTrainer(wide.gcn, graphs, wide.eval.retain_weight, 0).train().state_dict()
    assert all(torch.equal(expected[name], value) for name, value in made["state_dict"].items())


def test_the_pretrained_gcn_is_taken_as_it_is(here):
    run_here(here, *TINY, "gcn.pretrained=true")
    assert not list((here / "checkpoints").glob("gcn_*"))
    (result,) = metrics(here).values()
    config = smoke("gcn.pretrained=true", "graphs={features: [weight], other_classes: false}")[""]
    trained, graphs = TrainedGCN.load(), graphs_of(config, here)
    assert config.graphs.features == trained.graphs.features
    assert config.graphs.other_classes == trained.graphs.other_classes
    ranking = SaliencyScorer(config.eval, graphs, 3, 0, trained.gcn)
    assert result["zeroed"] == Pruning(config.eval, graphs, 3, ranking).first(20).vertices.tolist()


def test_results_depend_neither_on_the_processes_nor_on_the_rest_of_the_sweep(copy, tmp_path_factory):
    alone = tmp_path_factory.mktemp("alone")
    write_few(alone)
    settings = ("sweep.seeds=[0, 1]", "sweep.kappa=[auto, 60]", "gcn.steps=2")
    run_here(alone, *settings, "sweep.forget_digits=[9]", "sweep.kappa=[60]")
    assert len(metrics(alone)) == 2
    run_here(alone, *settings)
    output = run(copy, *SMOKE, "eval.visualize=false", *settings, processes=2)
    assert "process 0: " in output and "process 1: " in output
    together, apart = metrics(copy), metrics(alone)
    assert len(together) == 8 and together.keys() == apart.keys()
    for name, result in together.items():
        assert result | {"config": None} == apart[name] | {"config": None}, name
    ours, theirs = (json.loads((folder / "reports" / "run.json").read_text()) for folder in (copy, alone))
    assert (ours["processes"], theirs["processes"]) == (2, 1) and set(ours["seconds"]) >= set(theirs["seconds"])


def test_reports_are_drawn_anew_from_the_json_alone(here, monkeypatch):
    monkeypatch.undo()  # with real pictures
    settings, reports = [*TINY, "sweep.forget_digits=[3, 9]"], here / "reports"
    run_here(here, *settings)
    before = {path.name: path.read_bytes() for path in reports.iterdir() if path.stem != "run"}
    shutil.rmtree(reports)
    shutil.rmtree(here / "checkpoints")
    main.plot(smoke(*settings), here)
    assert {path.name: path.read_bytes() for path in reports.iterdir()} == before
    names = [f"seed_0_digit_{digit}_top_k_128_kappa_{kappa}" for digit, kappa in ((3, 30), (4, 20), (4, 30))]
    with pytest.raises(DataError, match=f"run it first, or leave out what is missing: {'_fixed, '.join(names)}_fixed$"):
        main.plot(smoke(*settings, "sweep.forget_digits=[3, 4]", "sweep.kappa=[20, 30]"), here)


def insert(path: Path, text: str, before: str, below: str = "") -> None:
    """Writes lines above the first one that begins with `before` (below another), at the same depth."""
    content = path.read_text()
    place = re.compile(f"^ *{re.escape(before)}", re.MULTILINE).search(content, content.index(below))
    depth = " " * (len(place[0]) - len(before))
    lines = textwrap.indent(textwrap.dedent(text).strip("\n"), depth) + "\n" * (1 if depth else 3)
    path.write_text(content[: place.start()] + lines + content[place.start() :])


def in_readme(pattern: str, text: str = README) -> str:
    """The one group of a pattern in the README, or another page."""
    return re.search(pattern, text, re.DOTALL)[1]


def test_what_the_readme_adds_by_hand_shows_up_everywhere(copy):
    example = in_readme(r"```python\n(@unlearning_method.*?)```")
    (name,) = re.findall(r'@unlearning_method\("([^"]+)"', example)
    insert(copy / "eval.py", example, "@dataclass\nclass Eval:")
    insert(copy / "configs" / "config.yaml", in_readme(r"```yaml\n( +coactivation: .*?)\n```"), "sft: {epochs")
    methods = (PROJECT / "docs" / "methods.md").read_text()
    scored = in_readme(r"\n((?: {4}[^\n]*\n)+)\nand in `eval_performance", methods)
    insert(copy / "eval.py", scored, "return metrics", below="def eval_unlearning(self)")
    reporter = copy / "reporter.py"
    drawn = in_readme(r"metric:\n\n((?: {4}[^\n]*\n)+)", methods)
    insert(reporter, drawn, 'self._plot_methods(x, FORGET, "score")', below="def draw_score_curves_on_forget_set(self)")
    insert(reporter, 'print("FIGURE", name, plt.gca().get_legend_handles_labels()[1])', "save_figure(figure, self.fo")

    output = run(copy, *SMOKE, "eval.visualize=false", "sweep.forget_digits=[3]")
    for result in metrics(copy).values():
        assert {"loss", "score", "probability"} == set(result["unlearning_metrics"][name])
        assert {"loss", "score"} == set(result["performance_degradation_metrics"][name])
        assert result["methods"][name]["touches"] == "a mask" and result["num_zeroed"][name] > 0
        assert len({result["unlearning_metrics"][each]["loss"] for each in (name, "original", "random", "mimu")}) == 4
        assert result["unlearning_metrics"]["mine"] == result["unlearning_metrics"]["original"]
    figures = re.findall(r"FIGURE (\S+) (\[.*\])", output)
    assert len(figures) == 6 and all(f"'{name}'" in labels and "'mine'" in labels for _, labels in figures)
    assert [figure for figure, labels in figures if "'sft, by hand'" in labels] == ["score_forget_set.png"]
    assert name in (copy / "reports" / "summary.md").read_text() and name in output.split("forgetting class 3")[-1]

    example = in_readme(r"```python\n(import json.*?)```", (PROJECT / "docs" / "own.md").read_text())
    for ours, this in (("digit_9", "digit_3"), ("kappa_200", "kappa_20"), ("(128, 64)", "(32, 16)")):
        example = example.replace(ours, this)
    example += "assert list(mask.origins) == list(mask.layers), 'it is known to be of this classifier'\n"
    example += "from data import load_image_data\ntest = load_image_data().test.forget(3)\n"
    example += "print(100 * (classifier(test.images).argmax(1) == 3).double().mean().item())"
    done = subprocess.run([sys.executable, "-c", example], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (result,) = [result for id, result in metrics(copy).items() if "kappa_20_" in id]
    assert float(done.stdout) == pytest.approx(result["unlearning_metrics"]["mimu"]["score"])


def test_the_lines_of_the_pages_make_a_data_set_of_ones_own_whose_classes_are_forgotten(tmp_path, monkeypatch):
    draw_nothing(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("data.DATASET_ROOT", tmp_path / "datasets")
    exec(in_readme(r"```python\n([^`]*load_digits[^`]*)```", (PROJECT / "docs" / "data.md").read_text()), {})
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


def test_the_lines_of_the_readme_unlearn_a_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example = in_readme(r"```python\n([^`]*unlearn\(model[^`]*)```")
    train = load_image_data("MNIST", PROJECT / "datasets").train
    classifier = smoke("classifier.bias=true", "classifier.hidden_sizes=[64, 32]", "classifier.epochs=2")[""].classifier
    model = Trainer(classifier, 0).train(train[:20000], 10).network
    keys, given = list(model.state_dict()), {"model": model, "inputs": train.images, "labels": train.labels}
    given["data_set"] = torch.utils.data.TensorDataset(train.images[:10000], train.labels[:10000])
    before = train.labels[5000:] == model(train.images[5000:]).argmax(1)
    exec(example, given)
    assert list(model.state_dict()) == keys and given["both"].forgets == given["same"].forgets == (3, 7)
    assert sum(int((model[index].weight == 0).sum()) for index in (1, 3, 5)) == given["both"].num_zeroed
    labels = train.labels[5000:]
    now, is_gone = model(train.images[5000:]).argmax(1) == labels, (labels == 3) | (labels == 7)
    assert now[is_gone].float().mean() < 0.01 and now[~is_gone].float().mean() > before[~is_gone].float().mean() - 0.01


def test_trainings_that_are_interrupted_go_on_where_they_were_and_figures_stay(here, monkeypatch):
    longer = (*TINY, "classifier.epochs=3", "gcn.steps=12")
    run_here(here, *longer)
    expected, check, seen = metrics(here), trainer.check_finite, {}

    def interrupted(losses, step, setting) -> None:
        seen.setdefault(setting, []).append(step)
        if len(seen[setting]) == 6:
            raise KeyboardInterrupt
        check(losses, step, setting)

    monkeypatch.setattr("mimu.training.check_finite", interrupted)
    monkeypatch.setattr(trainer, "SAVED_EVERY", 0.0)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run_here(here, *longer, is_fresh=not seen)
    run_here(here, *longer)
    of_classifier, of_gcn = seen.values()
    assert of_classifier[:14] == [*range(6), *range(4, 12)] and of_gcn == [*range(6), *range(3, 12)]
    assert metrics(here) == expected


def test_a_gcn_that_its_training_leaves_behind_the_formula_is_the_one_before_and_the_run_says_so(
    here, capsys, monkeypatch
):
    monkeypatch.setattr(trainer, "COMPARED", 10)
    few = ("eval.methods=[mimu, saliency]", "sweep.kappa=[auto]", "sweep.forget_digits=[3]")
    for changes, is_behind in ((("gcn.learning_rate=1", "gcn.steps=20"), True), (("gcn.learning_rate=1e-6",), False)):
        run_here(here, *few, *changes)
        says = "points behind the formula: taken as it was before"
        assert (says in capsys.readouterr().out) == is_behind
        (result,) = metrics(here).values()
        assert result["gcn_untrained"] == is_behind
        kept = result["performance_degradation_metrics"]
        assert kept["mimu"] == kept["saliency"]
        shutil.rmtree(here / "eval")
