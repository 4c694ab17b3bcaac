"""The whole path with the smoke config, as users run it: reruns, clean.sh, and baselines added by hand."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from runs import PROJECT, QUICK, SMOKE, checkpoint, files, metrics, replace_once, run, run_here, torchrun

import pipeline
from artifacts import ArtifactError
from config import load_config, load_variants
from data import DataError, GraphGenerator, load_image_data
from model import HookedMNISTClassifier
from plan import tasks_in_order
from trainer import GCNRanking, GCNTrainer, TrainedGCN, Trainer, ZeroingOrder

METHODS = {"original", "mimu", "saliency", "random", "magnitude", "sft", "retrain"}


def print_legends(folder: Path) -> None:
    """Makes the reporter of a copy of the project say what each figure shows."""
    replace_once(
        folder / "reporter.py",
        "            save_figure(",
        '            print("FIGURE", name, plt.gca().get_legend_handles_labels()[1])\n            save_figure(',
    )


def legends(output: str) -> dict[str, list[str]]:
    return {name: re.findall(r"'([^']+)'", labels) for name, labels in re.findall(r"FIGURE (\S+) (\[.*\])", output)}


def test_the_whole_path_leaves_its_artifacts_and_a_rerun_gives_the_same_metrics(clone):
    before = files(clone)
    own = {
        clone / "eval" / "masks" / "seed_of_mine.pt",
        clone / "reports" / "mine.png",
        clone / "reports" / "top_k_notes",
    }
    for path in own:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    output = run(clone, *SMOKE)
    for name in (*METHODS, "forget score", "retain score", "reports"):
        assert name in output
    first = metrics(clone)
    assert len(first) == 6 and {result["forget_digit"] for result in first.values()} == {3, 9}
    for result in first.values():
        assert set(result["unlearning_metrics"]) == METHODS
        assert len(result["zeroed"]) == result["kappa"] and result["kappa_choice"] in ("fixed", "auto")
        assert result["num_graph_vertices"] == 16 * 32 and result["num_graph_edges"] == 16 * 32 * (16 + 32 - 2)
    written = files(clone)
    for name in ("checkpoints/classifier_seed_0_", "checkpoints/gcn_seed_0_top_k_128_", "datasets/Graphs/seed_0_"):
        assert sum(path.startswith(name) for path in written) == 1
    for name in ("loss_forget_set", "score_forget_set", "loss_retain_set", "score_retain_set", "summary"):
        assert f"reports/{name}.png" in written
    assert "reports/probability_on_forget_class.png" in written and "reports/summary.md" in written
    assert sum(name.startswith("eval/masks/seed_0") for name in written) == 6
    assert sum(name.startswith("eval/Metrics and Plots/plots") for name in written) == 6 * 5

    subprocess.run(["bash", str(clone / "clean.sh")], check=True, cwd="/")
    for path in own:
        assert path.read_text() == "mine"
        path.unlink()
    assert files(clone) == before

    run_here(clone)
    again = metrics(clone)
    for name, result in again.items():
        assert result.pop("config") | {"eval": None} == first[name].pop("config") | {"eval": None}
    assert again == first


def test_the_results_of_a_digit_do_not_depend_on_the_rest_of_the_sweep(here):
    run_here(here)
    together = metrics(here)
    (here / "eval").rename(here / "together")
    run_here(here, "sweep.forget_digits=[9]", "sweep.kappa=[60]")
    ((name, alone),) = metrics(here).items()
    assert "digit_9" in name and "kappa_60" in name
    assert alone.pop("config") != together[name].pop("config")
    assert alone == together[name]


def test_the_baseline_of_the_readme_shows_up_everywhere(copy):
    example = re.search(r"```python\n(@unlearning_method.*?)```", (copy / "README.md").read_text(), re.DOTALL)[1]
    name = re.search(r'@unlearning_method\("([^"]+)"', example)[1]
    replace_once(copy / "eval.py", "def slug(", f"{example}\n\ndef slug(")
    setting = re.search(r"```yaml\n( +coactivation: .*?)\n```", (copy / "README.md").read_text())[1]
    replace_once(copy / "configs" / "config.yaml", "    fine_tune:", f"{setting}\n    fine_tune:")
    print_legends(copy)
    output = run(copy, *SMOKE, *QUICK)
    for result in metrics(copy).values():
        assert {"loss", "score", "probability"} == set(result["unlearning_metrics"][name])
        assert {"loss", "score"} == set(result["performance_degradation_metrics"][name])
        assert result["methods"][name]["touches"] == "a mask" and result["num_zeroed"][name] > 0
        scores = [result["unlearning_metrics"][method]["loss"] for method in (name, "original", "random", "mimu")]
        assert len(set(scores)) == 4
    assert len(legends(output)) == 6 and all(name in labels for labels in legends(output).values())
    assert name in (copy / "reports" / "summary.md").read_text() and name in output.split("Forgetting digit 3")[-1]
    assert_the_readme_masks_the_classifier_of_a_run(copy)


def assert_the_readme_masks_the_classifier_of_a_run(folder: Path) -> None:
    example = re.search(
        r"```python\n(import json\n.*?mask\.apply.*?)```", (folder / "README.md").read_text(), re.DOTALL
    )[1]
    for ours, here in (("digit_9", "digit_3"), ("kappa_200", "kappa_20"), ("(128, 64)", "(32, 16)")):
        assert ours in example
        example = example.replace(ours, here)
    check = (
        "from data import load_image_data\ntest = load_image_data().test.forget(3)\n"
        "print(100 * (classifier(test.images).argmax(1) == 3).double().mean().item())"
    )
    done = subprocess.run([sys.executable, "-c", example + check], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (score,) = [
        result["unlearning_metrics"]["mimu"]["score"] for name, result in metrics(folder).items() if "kappa_20_" in name
    ]
    assert float(done.stdout) == pytest.approx(score)


def test_a_model_scored_by_hand_and_a_line_plotted_by_hand_show_up(copy):
    evaluation = copy / "eval.py"
    head, method, tail = evaluation.read_text().partition("    def eval_unlearning(self)")
    by_hand = (
        "        mine = self.request.classifier\n"
        "        mine.layers[-1].weight.data[self.experiment.forget_digit] = 0\n"
        '        metrics["mine"] = self.inference(mine, self.mnist_forget_set(), True, "mine")\n'
        "        return metrics\n"
    )
    evaluation.write_text(head + method + tail.replace("        return metrics\n", by_hand, 1))
    reporter = copy / "reporter.py"
    head, method, tail = reporter.read_text().partition("    def draw_score_curves_on_forget_set(self)")
    drawn = '            self._plot_methods(x, FORGET, "score")\n'
    line = "            y = self.get_mimu_unlearning_forget_set_score()\n            plt.plot(x, y, label='by hand')\n"
    reporter.write_text(head + method + tail.replace(drawn, drawn + line, 1))
    print_legends(copy)
    output = run(copy, *SMOKE, *QUICK)
    for result in metrics(copy).values():
        assert result["unlearning_metrics"]["mine"]["score"] < result["unlearning_metrics"]["original"]["score"]
    shown = legends(output)
    assert "by hand" in shown["score_forget_set.png"] and "by hand" not in shown["loss_forget_set.png"]
    assert all("mine" in shown[name] for name in ("score_forget_set.png", "loss_forget_set.png"))


def test_all_layers_can_be_masked(here):
    run_here(here, "sweep.forget_digits=[3]", "graphs.mask_layer=null", "sweep.kappa=[200]", "gcn.steps=2")
    (result,) = metrics(here).values()
    assert result["mask_layer"] is None and result["num_graph_vertices"] == 784 * 32 + 32 * 16 + 16 * 10


def test_several_top_k_and_seeds_are_reported_apart_and_together(here):
    run_here(here, "sweep.top_k=[64, 128]", "sweep.seeds=[0, 1]", "sweep.kappa=[20]", "gcn.steps=2")
    for top_k in (64, 128):
        summary = (here / "reports" / f"top_k_{top_k}" / "summary.md").read_text()
        assert f"K = {top_k}" in summary and "over 2 seeds" in summary and "±" in summary
    assert len(metrics(here)) == 8
    weights = [checkpoint(here, f"classifier_seed_{seed}") for seed in (0, 1)]
    assert [checkpoint["seed"] for checkpoint in weights] == [0, 1]
    assert not torch.equal(*(checkpoint["state_dict"]["layers.0.weight"] for checkpoint in weights))
    gcns = [torch.load(path, weights_only=True) for path in here.glob("checkpoints/gcn_*.pt")]
    assert len(gcns) == 4 and all("readout.weight" in checkpoint["state_dict"] for checkpoint in gcns)


def test_help_shows_the_overrides_and_waits_for_no_library(copy):
    output = run(copy, "--help")
    assert "section.key=value" in output and "--config" in output
    code = "import sys, main; main.parse_arguments([]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=copy, check=True)


def test_a_bad_setting_stops_before_any_work(copy):
    before = files(copy)
    output = run(copy, "sweep.kappa=[99999]", status=2)
    assert output.splitlines() == [
        "error: override sweep.kappa=[99999]: sweep.kappa must be from 1 to 8191 (masked weights less one), not 99999"
    ]
    assert files(copy) == before


VARIANTS = """
sweep: {forget_digits: [3, 9], kappa: [auto]}
variants:
  as it is:
    eval: {methods: [mimu, retrain]}
  two steps:
    gcn: {steps: 2}
    eval: {methods: [mimu]}
  wider:
    classifier: {hidden_sizes: [40, 16]}
    eval: {methods: [mimu, retrain]}
"""


def with_smoke(path: Path, text: str) -> Path:
    """A config that changes the smoke config further."""
    settings = yaml.safe_load((PROJECT / SMOKE[1]).read_text())
    for section, values in yaml.safe_load(text).items():
        settings[section] = settings.get(section, {}) | values
    settings["eval"]["visualize"] = False
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


def test_variants_run_side_by_side_on_shared_classifiers(here, capsys):
    pipeline.run(load_variants(with_smoke(here / "mine.yaml", VARIANTS)), here)
    output = capsys.readouterr().out
    assert output.count("% of the test split classified correctly") == 2, "two of the three share one"
    results = metrics(here)
    assert (
        sorted(result["variant"] for result in results.values()) == ["as it is"] * 2 + ["two steps"] * 2 + ["wider"] * 2
    )
    assert all(re.search("_(as_it_is|two_steps|wider)_[0-9a-f]{8}.json$", name) for name in results)
    table = (here / "reports" / "variants.md").read_text()
    assert table.splitlines()[2] in output and "–" not in table
    assert [line.split("|")[1].strip() for line in table.splitlines()[4:]] == ["as it is", "two steps", "wider"]
    assert (here / "reports" / "variants.png").exists() and (
        here / "reports" / "variants" / "two_steps" / "summary.md"
    ).exists()
    sizes = [
        len(torch.load(path, weights_only=True)["state_dict"]["layers.0.weight"])
        for path in here.glob("checkpoints/classifier_*")
    ]
    assert sorted(sizes) == [32, 40]
    shutil.copy(PROJECT / "clean.sh", here)
    subprocess.run(["bash", str(here / "clean.sh")], check=True)
    assert {path.name for path in here.iterdir()} == {"datasets", "mine.yaml", "clean.sh"}


def test_a_pretrained_gcn_is_made_from_all_variants_and_left_by_clean(here):
    configs = load_variants(
        with_smoke(here / "mine.yaml", "variants: {wide: {classifier: {hidden_sizes: [40, 16]}}, narrow: {}}"),
        ["gcn.steps=4"],
    )
    pipeline.pretrain(configs, here)
    path = here / "checkpoints" / "pretrained" / "gcn.pt"
    made = torch.load(path, weights_only=True)
    assert made["config"]["gcn"]["steps"] == 4 and made["top_k"] == 128
    data = load_image_data()
    graphs = [
        GraphGenerator(Trainer(config.classifier, 0).train(data.train, 10), data.train, config.graphs, 0)
        for config in configs.values()
    ]
    expected = GCNTrainer(configs["wide"].gcn, graphs, 128, 0).train().state_dict()
    assert all(torch.equal(expected[name], value) for name, value in made["state_dict"].items())
    shutil.copy(PROJECT / "clean.sh", here)
    subprocess.run(["bash", str(here / "clean.sh")], check=True)
    assert [file.name for file in (here / "checkpoints").rglob("*.pt")] == ["gcn.pt"]


def test_the_pretrained_gcn_is_taken_as_it_is(here):
    settings = ("sweep.kappa=[20]", "sweep.forget_digits=[3]", "gcn.pretrained=true")
    run_here(here, *settings)
    assert not list((here / "checkpoints").glob("gcn_*"))
    (result,) = metrics(here).values()
    saved = checkpoint(here, "classifier_seed_0")
    classifier = HookedMNISTClassifier((32, 16))
    classifier.load_state_dict(saved["state_dict"])
    smoke = load_config(PROJECT / SMOKE[1])
    graphs = GraphGenerator(classifier, load_image_data().train, smoke.graphs, 0)
    ranking = GCNRanking(smoke.eval, TrainedGCN.load().gcn, graphs, 3, 128, 0)
    assert result["zeroed"] == ZeroingOrder(smoke.eval, graphs, ranking).first(20).tolist()
    shutil.rmtree(here / "checkpoints")
    with pytest.raises(ArtifactError, match="graphs.other_classes must be True, which the trained GCN reads"):
        run_here(here, *settings, "graphs.other_classes=false")
    assert not (here / "checkpoints").exists()


def test_the_lines_of_the_readme_unlearn_a_model(copy):
    """The README's example, on a model of ones own."""
    example = re.search(r"```python\n([^`]*unlearn\(model[^`]*)```", (copy / "README.md").read_text())[1]
    prelude = (
        "import torch\nfrom data import load_image_data\ntrain = load_image_data().train\n"
        "torch.manual_seed(0)\nnn = torch.nn\n"
        "model = nn.Sequential(nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 10))\n"
        "optimizer = torch.optim.Adam(model.parameters(), 0.01)\n"
        "for batch in torch.randperm(20000).split(256):\n"
        "    optimizer.zero_grad()\n"
        "    nn.functional.cross_entropy(model(train.images[batch]), train.labels[batch]).backward()\n"
        "    optimizer.step()\n"
        "inputs, labels = train.images, train.labels\n"
        "before = model[2].weight.detach().clone()\n"
    )
    check = (
        "\nassert torch.equal(model[2].weight, before)\n"
        "mask.apply(model)\n"
        "print((model(inputs).argmax(1) == labels)[labels == 3].float().mean().item())\n"
    )
    done = subprocess.run([sys.executable, "-c", prelude + example + check], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0 and float(done.stdout.split()[-1]) < 0.01, done.stdout + done.stderr


def test_a_data_set_that_is_not_there_is_told_before_any_work(here, monkeypatch):
    load = pipeline.load_image_data

    def without_kmnist(name, *arguments):
        if name == "KMNIST":
            raise DataError("dataset KMNIST is not there")
        return load(name, *arguments)

    monkeypatch.setattr(pipeline, "load_image_data", without_kmnist)
    configs = load_variants(with_smoke(here / "mine.yaml", "variants: {mnist: {}, other: {dataset: KMNIST}}"))
    with pytest.raises(DataError):
        pipeline.run(configs, here)
    assert not (here / "checkpoints").exists()


def test_two_processes_write_what_one_writes(copy):
    here = copy / "here"
    (here / "datasets").mkdir(parents=True)
    (here / "datasets" / "MNIST").symlink_to(PROJECT / "datasets" / "MNIST")
    settings = ("sweep.seeds=[0, 1]", "sweep.kappa=[auto, 20]", "eval.visualize=false")
    done = torchrun(copy, *SMOKE, *settings)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "process 0: " in done.stdout and "process 1: " in done.stdout
    run_here(here, *settings)
    expected = metrics(here)
    assert len(expected) == 8 and metrics(copy) == expected
    summaries = [json.loads((folder / "reports" / "run.json").read_text()) for folder in (copy, here)]
    assert [summary["processes"] for summary in summaries] == [2, 1]
    assert set(summaries[0]["seconds"]) == set(summaries[1]["seconds"])
    for folder in (copy, here):
        assert (folder / "reports" / "score_forget_set.png").exists()


def test_a_failed_process_fails_the_run_with_its_error(copy):
    docstring = '    """The control: kappa random weights of the same layers."""\n'
    failure = (
        "    if request.forget_class == 9:\n        raise RuntimeError(f'on purpose, digit {request.forget_class}')\n"
    )
    replace_once(copy / "methods.py", docstring, docstring + failure)
    done = torchrun(copy, *SMOKE, "sweep.kappa=[20]", "eval.visualize=false")
    assert done.returncode != 0 and "on purpose, digit 9" in done.stderr
    assert [path.name for path in (copy / "reports").iterdir()] == ["run.log"]


@pytest.mark.parametrize("processes", [1, 2, 5])
def test_a_run_is_every_training_and_all_requests_after_it(processes):
    configs = load_variants(PROJECT / "configs" / "ablation.yaml", ["sweep.forget_digits=[1, 7]"])
    tasks = tasks_in_order(configs, processes)
    trainings = [task.training for task in tasks if task.digit is None]
    expected = [(variant, seed) for variant, config in configs.items() for seed in config.seeds]
    assert [(training.variant, training.seed) for training in trainings] == expected
    assert all(training.top_k == 2048 for training in trainings)
    requests = [(task.training, task.digit) for task in tasks if task.digit is not None]
    assert requests == [(training, digit) for training in trainings for digit in (1, 7)]
    ahead = 0
    for task in tasks:
        ahead += 1 if task.digit is None else -0.5
        assert 0 <= ahead <= processes


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_scores_of_the_cpu(here):
    settings = ("sweep.forget_digits=[3]", "sweep.kappa=[20]")
    run_here(here, *settings, "device=cpu")
    (expected,) = metrics(here).values()
    run_here(here, *settings, "device=cuda")
    (result,) = metrics(here).values()
    for method in ("original", "mimu", "retrain"):
        for key in ("unlearning_metrics", "performance_degradation_metrics"):
            assert result[key][method]["score"] == pytest.approx(expected[key][method]["score"], abs=5)


def test_the_benchmark_compares_the_closed_form_with_pyg(copy):
    (copy / "tests").mkdir()
    shutil.copy(PROJECT / "tests" / "benchmark.py", copy / "tests")
    command = [sys.executable, "tests/benchmark.py", "--quick", "--only", "gcn"]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = json.loads((copy / "reports" / "benchmark.json").read_text())
    assert written["threads"] >= 1 and written["packages"]["torch"] == torch.__version__.split("+")[0]
    assert set(written) >= {"pyg", "gcn"} and "growth" not in written
    for name, (median, _, _) in written["gcn"].items():
        assert name.split(",")[0] in done.stdout
        if "difference" in name:
            assert median < 1e-5
        if "/" in name and "GFLOP" not in name:
            assert median > 1, name


def test_reports_are_drawn_anew_from_the_json_alone(here, capsys):
    run_here(here)
    reports = here / "reports"
    before = {path.name: path.read_bytes() for path in reports.iterdir() if path.stem != "run"}
    shutil.rmtree(reports)
    shutil.rmtree(here / "checkpoints")
    capsys.readouterr()
    pipeline.plot(load_variants(PROJECT / "configs" / "smoke.yaml", ["eval.visualize=false"]), here)
    assert {path.name: path.read_bytes() for path in reports.iterdir()} == before
    assert "| mimu" in capsys.readouterr().out
    with pytest.raises(DataError, match="nothing of this config is finished: run it first .0 of 6 experiments"):
        pipeline.plot(load_variants(PROJECT / "configs" / "smoke.yaml", ["seed=5"]), here)
