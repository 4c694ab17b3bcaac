"""Whole runs of the smoke config: the files that they write, what the next run reuses, the examples of the pages."""

import io
import json
import re
import shutil
import subprocess
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
from experiment import files as run_files
from experiment.config import CONFIG, load_variants
from mimu import training
from mimu.errors import InputError
from mimu.files import load, save, write_text
from mimu.pretrained import TrainedGCN
from mimu.pruning import Pruning, prune
from trainer import GCNTrainer, Trainer

METHODS = ["original", "mimu", "random", "sft", "retrain", "saliency", "magnitude"]
TINY = ("sweep.forget_digits=[3]", "sweep.kappa=[20]", "gcn.steps=2", "eval.methods=[original, mimu, retrain]")
README = (PROJECT / "README.md").read_text()
FINISHED = {"classifier": 1, "gcn": 1, "experiments": 2}


def with_smoke(folder: Path, changes: str) -> Path:
    settings = yaml.safe_load((PROJECT / SMOKE[1]).read_text())
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


def test_a_run_writes_its_files_reports_are_drawn_again_from_json_and_clean_removes_these_alone(
    here, monkeypatch, capsys
):
    monkeypatch.undo()  # with real pictures
    monkeypatch.setattr(trainer, "COMPARED", 1)
    before, reports, outside = files(here), here / "reports", here.parent / "outside"
    settings = ["sweep.kappa=[auto, 20]", "sweep.forget_digits=[3]", "eval.visualize=true", "save_graphs=true"]
    settings += ["report.dpi=20"]
    run_here(here, *settings)
    output, results = capsys.readouterr().out, metrics(here)
    assert all(name in output for name in (*METHODS, "forget accuracy", "retain accuracy", "reports"))
    for result in results.values():
        assert list(result["unlearning_metrics"]) == METHODS and result["forget_digit"] == 3
        assert len(result["zeroed"]) == result["kappa"] and set(result["gave_up"]) <= {"mimu", "saliency"}
        assert result["num_graph_vertices"] == 16 * 32 and result["num_graph_edges"] == 16 * 32 * (16 + 32 - 2)
        assert all((here / path).exists() for path in result["files"].values()) and len(result["files"]) == 4
    patterns = ["checkpoints/classifier_seed_0_*", "checkpoints/gcn_seed_0_*", "datasets/Graphs/seed_0_*"]
    patterns += ["eval/masks/seed_0*", "eval/Metrics and Plots/plots/*/*.png"]
    assert [len(list(here.glob(pattern))) for pattern in patterns] == [1, 1, 1, 2, 2 * 4]
    drawn = {path.name: path.read_bytes() for path in reports.iterdir() if path.stem != "run"}
    names = ["loss_forget_set", "score_forget_set", "loss_retain_set", "score_retain_set", "summary"]
    assert {*(f"{name}.png" for name in names), "probability_on_forget_class.png", "summary.md"} <= drawn.keys()
    shutil.rmtree(reports)
    (here / "checkpoints").rename(outside)
    main.plot(smoke(*settings), here)
    outside.rename(here / "checkpoints")
    assert {path.name: path.read_bytes() for path in reports.iterdir()} == drawn
    names = [f"seed_0_digit_{digit}_top_k_128_kappa_{kappa}" for digit, kappa in ((3, 30), (4, 20), (4, 30))]
    with pytest.raises(InputError, match=f"run it first, or leave out .* missing: {'_fixed, '.join(names)}_fixed$"):
        main.plot(smoke("sweep.forget_digits=[3, 4]", "sweep.kappa=[20, 30]"), here)

    plots, *_ = (here / "eval" / "Metrics and Plots" / "plots").iterdir()
    own = [plots / "note.txt", reports / "mine.png", here / "eval/masks/seed_of_mine.pt", outside / "summary.md"]
    for path in [*own, outside / ".written"]:
        write_text(path, "summary.md\n../reports/mine.png\n")
    (here / "reports" / "top_k_128").symlink_to(outside)
    (plots.parent / "seed_0_digit_3_linked").symlink_to(outside)
    clean(here)
    kept = {path.relative_to(here).as_posix() for path in own[:3]}
    assert files(here).keys() == before.keys() | kept and files(here).items() >= before.items()
    assert len(files(outside)) == 2 and (reports / "top_k_128").is_symlink() and not (here / "checkpoints").exists()


def dry_run(folder: Path, capsys, *overrides: str) -> str:
    """The line that `--dry-run` prints."""
    capsys.readouterr()
    main.dry_run(smoke(*TINY, *overrides), folder)
    return capsys.readouterr().out


def test_a_change_makes_the_files_that_depend_on_it_again_and_no_others(here, monkeypatch, capsys):
    stages = list(FINISHED)
    assert current(here) == dict.fromkeys(stages, 0)
    run_here(here, *TINY)
    assert current(here) == FINISHED
    decisive = {
        # Settings of figures, of a method that does not run, and of audits that are off decide nothing.
        3: ["report.dpi=51", "eval.visualize=true", "audit.relearn_steps=2", "eval.hyperparameters.scrub.epochs=2"],
        2: ["eval.step=16", "eval.target=0.2", "audit.enabled=true", "sweep.top_k=[64]"],
        1: ["gcn.steps=13", "eval.retain_weight=51", "graphs.samples_per_class=99", "samples=50"],
        0: ["classifier.epochs=2", "threads=2", "seed=1", "held_out=10"],
    }
    for first, settings in decisive.items():
        for setting in settings:
            assert current(here, setting) == FINISHED | dict.fromkeys(stages[first:], 0), setting
    assert current(here, "sweep.kappa=[20, 30]")["experiments"] == 2
    for setting, counts in (("threads=2", (0, 4)), ("gcn.steps=13", (1, 3)), ("sweep.kappa=[20, 30]", (4, 2))):
        line = "seed 0, top-K 128: {} of {} files are there, {} would be made\n"
        assert dry_run(here, capsys, setting) == line.format(counts[0], sum(counts), counts[1])

    sources = copy_to(here / "sources", *TRACKED)
    monkeypatch.setattr("experiment.artifacts.ROOT", sources)
    decisive = {0: ["main.py", "model.py", "data.py", "trainer.py", "mimu/graph.py"],
                2: ["eval.py", "methods/controls.py"],
                3: ["reporter.py", "tables/comparison.py", "experiment/files.py", "my_own.py"]}  # fmt: skip
    for first, paths in decisive.items():
        for path in [sources / name for name in paths]:
            source = path.read_text() if path.exists() else ""
            path.write_text(f"{source}\n\n# a remark\n")
            assert current(here) == FINISHED
            path.write_text(f"{source}\nNUMBER = 1\n")
            assert current(here) == FINISHED | dict.fromkeys(stages[first:], 0), path
            path.write_text(source)
    monkeypatch.setattr("experiment.artifacts.checksum", lambda *arguments: "other data")
    assert current(here) == dict.fromkeys(stages, 0)


def test_a_retrained_classifier_is_kept_with_the_seconds_that_it_took_until_a_run_begins_anew(here, monkeypatch):
    without, trained = [], Trainer.trained

    def noted(self, train, *arguments):
        without.append(set(range(10)) - set(train.labels.tolist()))
        return trained(self, train, *arguments)

    monkeypatch.setattr(Trainer, "trained", noted)
    for override, expected in (("seed=0", [set(), {3}]), ("eval.step=16", []), ("sweep.forget_digits=[5]", [{5}])):
        without.clear()
        run_here(here, *TINY, override)
        assert without == expected
    results = [json.loads(path.read_text()) for path in here.glob("eval/*/metrics/*digit_3*.json")]
    assert len(results) == 2 and len({result["seconds"]["retrain"] for result in results}) == 1
    without.clear()
    run_here(here, *TINY, is_fresh=True)
    assert without == [set(), {3}]


def without_seconds(path: Path) -> bytes:
    content = io.BytesIO()
    torch.save(load(path) | {"seconds": 0}, content)
    return content.getvalue()


def test_a_finished_run_computes_nothing_again_and_what_is_missing_or_damaged_is_made_again(here, capsys, monkeypatch):
    assert dry_run(here, capsys) == "seed 0, top-K 128: 0 of 4 files are there, 4 would be made\n"
    assert [path.name for path in here.iterdir()] == ["datasets"]
    run_here(here, *TINY)
    expected, before = metrics(here), files(here)
    capsys.readouterr()
    run_here(here, *TINY, "eval.visualize=true")
    output, after = capsys.readouterr().out, files(here)
    assert "4 of 4 files are there" in output and "classifier, " not in output
    written = {name for name in after if after[name] != before.get(name)}
    written -= {"reports/run.json", "reports/run.log", ".lock"}
    assert len(written) == 5 and all("/plots/" in name for name in written) and before.keys() == after.keys() - written
    log = (here / "reports" / "run.log").read_text()
    assert all(line[:4].isdigit() for line in log.splitlines()) and "4 of 4 files are there" in log

    (path,) = (here / "eval").glob("*/metrics/*.json")
    changed = path.read_text().replace('"kappa": 20', '"kappa": 21')
    for damage in (partial(path.write_text, changed), path.unlink, partial(save, path, {"made_by": "another"})):
        damage()
        with pytest.raises(InputError, match="run it first, or .* missing: seed_0_digit_3_top_k_128_kappa_20_fixed$"):
            main.plot(smoke(*TINY), here)
        run_here(here, *TINY)
        assert metrics(here) == expected
    paths, experiments = [*here.glob("checkpoints/classifier_*"), *here.glob("checkpoints/gcn_*")], files(here / "eval")
    whole = [without_seconds(path) for path in paths]
    for is_evaluated in (True, False):
        for path in paths:
            path.write_bytes(path.read_bytes()[:-1] + b"x")
        if not is_evaluated:
            shutil.rmtree(here / "eval")
        run_here(here, *TINY)
        assert [without_seconds(path) for path in paths] == whole and metrics(here) == expected
        assert files(here / "eval") == experiments or not is_evaluated
    reads = Counter()
    monkeypatch.setattr(run_files, "load", lambda path: reads.update([path]) or load(path))
    run_files.stored_provenance.cache_clear()
    run_here(here, *TINY)
    assert len(reads) == 4 and set(reads.values()) == {1}, "a rerun reads a file once"
    capsys.readouterr()
    run_here(here, *TINY, is_fresh=True)
    assert "0 of 4 files are there" in capsys.readouterr().out


def test_all_layers_can_be_masked_and_several_top_k_and_seeds_are_reported(here):
    settings = "graphs.mask_layer=null", "sweep.top_k=[64, 128]", "sweep.seeds=[0, 1]", "held_out=500"
    run_here(here, *TINY, *settings)
    results = metrics(here).values()
    assert len(results) == 4 and {result["split"] for result in results} == {"500 held-out training samples"}
    assert {result["num_graph_vertices"] for result in results} == {784 * 32 + 32 * 16 + 16 * 10}
    for top_k in (64, 128):
        summary = (here / "reports" / f"top_k_{top_k}" / "summary.md").read_text()
        assert f"K = {top_k}" in summary and "over seeds: 2" in summary
    first, second = (checkpoint(here, f"classifier_seed_{seed}")["state_dict"]["network.1.weight"] for seed in (0, 1))
    assert not torch.equal(first, second) and len(list(here.glob("checkpoints/gcn_*.pt"))) == 2


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
    written = "variants.png", "variants.pdf", "variants.svg", "variants/two_steps/summary.md"
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


def by_method(result: dict) -> dict:
    """The figures of the methods that every run has."""
    figures = {key: values for key, values in result.items() if key.endswith("_metrics") and values}
    figures = {(key, name): figures[key].get(name) for key in figures for name in METHODS}
    return figures | {key: result[key] for key in ("id", "kappa", "zeroed")} | {"id": result["id"][:-8]}


def test_what_the_pages_add_by_hand_shows_up_everywhere_and_neither_it_nor_two_processes_change_a_figure(
    copy, tmp_path_factory, monkeypatch
):
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
    settings = ("sweep.seeds=[0, 1]", "sweep.forget_digits=[3]", "sweep.kappa=[auto, 20]", "gcn.steps=2")
    output = run(copy, *SMOKE, "eval.visualize=false", "report.dpi=20", *settings, processes=2)
    together = metrics(copy)
    for result in together.values():
        assert {"loss", "score", "probability"} == set(result["unlearning_metrics"][name])
        assert {"loss", "score"} == set(result["performance_degradation_metrics"][name])
        assert result["methods"][name]["touches"] == "a mask" and result["num_zeroed"][name] > 0
        assert len({result["unlearning_metrics"][each]["loss"] for each in (name, "original", "random", "mimu")}) == 4
        assert result["unlearning_metrics"]["mine"] == result["unlearning_metrics"]["original"]
    figures = re.findall(r"FIGURE (\S+) (\[.*\])", output)
    assert len(figures) == 6 and all(f"'{name}'" in labels and "'mine'" in labels for _, labels in figures)
    assert [figure for figure, labels in figures if "'sft, by hand'" in labels] == ["score_forget_set.png"]
    assert name in (copy / "reports" / "summary.md").read_text() and name in output.split("forgetting class")[-1]

    assert "process 0: " in output and "process 1: " in output
    alone = tmp_path_factory.mktemp("alone")
    write_few(alone)
    run_here(alone, *settings, "sweep.kappa=[20]")  # which the next one reuses
    run_here(alone, *settings)
    apart = sorted(map(by_method, metrics(alone).values()), key=lambda figures: figures["id"])
    assert len(apart) == 4 and apart == sorted(map(by_method, together.values()), key=lambda figures: figures["id"])
    ours, theirs = (json.loads((folder / "reports" / "run.json").read_text()) for folder in (copy, alone))
    assert (ours["processes"], theirs["processes"]) == (2, 1) and set(ours["seconds"]) >= set(theirs["seconds"])

    example = in_readme(r"```python\n(import json.*?)```", (PROJECT / "docs" / "own.md").read_text())
    for theirs, ours in (("digit_9", "digit_3"), ("kappa_200", "kappa_20"), ("(128, 64)", "(32, 16)")):
        example = example.replace(theirs, ours)
    monkeypatch.chdir(copy)
    exec(example, values := {})
    mask, classifier, test = values["mask"], values["classifier"], load_image_data("MNIST", copy / "datasets").test
    assert list(mask.origins) == list(mask.layers), "it is known to be of this classifier"
    score = 100 * (classifier(test.forget(3).images).argmax(1) == 3).double().mean().item()
    (result,) = [result for id, result in together.items() if id.startswith("seed_0_digit_3") and "kappa_20_" in id]
    assert score == pytest.approx(result["unlearning_metrics"]["mimu"]["score"])


def test_the_lines_of_the_pages_make_a_data_set_of_ones_own_whose_classes_are_forgotten(tmp_path, monkeypatch):
    draw_nothing(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("experiment.config.DATASET_ROOT", tmp_path / "datasets")
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
    train = load_image_data("MNIST", PROJECT / "datasets").train[:20000]
    classifier = smoke("classifier.bias=true", "classifier.hidden_sizes=[64, 32]", "classifier.epochs=2")[""].classifier
    model = Trainer(classifier, 0).train(train, 10).network
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
    expected, check, seen = metrics(here), training.check_finite, {}

    def interrupted(losses, step, setting) -> None:
        seen.setdefault(setting, []).append(step)
        if len(seen[setting]) == 6:
            raise KeyboardInterrupt
        check(losses, step, setting)

    monkeypatch.setattr(training, "check_finite", interrupted)
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
        assert ("points behind the formula: the untrained is used" in capsys.readouterr().out) == is_behind
        (result,) = metrics(here).values()
        assert result["gcn_untrained"] == is_behind
        kept = result["performance_degradation_metrics"]
        assert kept["mimu"] == kept["saliency"]
        shutil.rmtree(here / "eval")
