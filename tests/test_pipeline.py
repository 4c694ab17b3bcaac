"""The whole path with the smoke config, as users run it: reruns, clean.sh, and baselines added by hand."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import main
from config import load_config

PROJECT = Path(__file__).resolve().parents[1]
SMOKE = ("--config", "configs/smoke.yaml")
QUICK = ("eval.visualize=false", "sweep.forget_digits=[3]")


@pytest.fixture
def copy(tmp_path) -> Path:
    """The tracked files of the project, as a clone has them."""
    for pattern in ("*.py", "*.sh", "configs/*.yaml", "datasets/MNIST/raw/*.gz", "README.md"):
        for path in PROJECT.glob(pattern):
            target = tmp_path / path.relative_to(PROJECT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    return tmp_path


def run(folder: Path, *arguments: str, status: int = 0) -> str:
    done = subprocess.run([sys.executable, "main.py", *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def here(tmp_path) -> Path:
    """A folder with the data set only, for runs in this process."""
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "MNIST").symlink_to(PROJECT / "datasets" / "MNIST")
    return tmp_path


def run_here(folder: Path, *overrides: str) -> None:
    """The same as `run`, without the seconds that importing PyTorch takes."""
    threads = torch.get_num_threads()
    try:
        main.run(load_config(PROJECT / SMOKE[1], ["eval.visualize=false", *overrides]), folder)
    finally:
        torch.set_num_threads(threads)


def files(folder: Path) -> dict[str, str]:
    """Path to content of every file, but for Python's own."""
    paths = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def metrics(folder: Path) -> dict[str, dict]:
    results = {path.name: json.loads(path.read_text()) for path in folder.glob("eval/*/metrics/*.json")}
    for result in results.values():
        del result["seconds"]
    return results


def replace_once(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {path.name}"
    path.write_text(text.replace(old, new))


def print_legends(folder: Path) -> None:
    """Makes the reporter of a copy of the project say what each figure shows."""
    replace_once(
        folder / "reporter.py",
        "            figure.savefig(",
        '            print("FIGURE", name, plt.gca().get_legend_handles_labels()[1])\n            figure.savefig(',
    )


def legends(output: str) -> dict[str, list[str]]:
    return {name: re.findall(r"'([^']+)'", labels) for name, labels in re.findall(r"FIGURE (\S+) (\[.*\])", output)}


def test_the_whole_path_leaves_its_artifacts_and_a_rerun_gives_the_same_metrics(copy):
    before = files(copy)
    own = {copy / "eval" / "masks" / "seed_of_mine.pt", copy / "reports" / "mine.png", copy / "reports" / "top_k_notes"}
    for path in own:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    output = run(copy, *SMOKE)
    for name in ("original", "mimu", "saliency", "random", "sft", "retrain", "forget score", "retain score", "reports"):
        assert name in output
    first = metrics(copy)
    assert len(first) == 6 and {result["forget_digit"] for result in first.values()} == {3, 9}
    for result in first.values():
        assert set(result["unlearning_metrics"]) == {"original", "mimu", "saliency", "random", "sft", "retrain"}
        assert len(result["zeroed"]) == result["kappa"] and result["kappa_choice"] in ("fixed", "auto")
        assert result["num_graph_vertices"] == 16 * 32 and result["num_graph_edges"] == 16 * 32 * (16 + 32 - 2)
    written = files(copy)
    for name in (
        "checkpoints/classifier_seed_0.pt",
        "checkpoints/gcn_seed_0_top_k_128.pt",
        "datasets/Graphs/seed_0.pt",
    ):
        assert name in written
    for name in ("loss_forget_set", "score_forget_set", "loss_retain_set", "score_retain_set", "summary"):
        assert f"reports/{name}.png" in written
    assert "reports/probability_on_forget_class.png" in written and "reports/summary.md" in written
    assert sum(name.startswith("eval/masks/seed_0") for name in written) == 6
    assert sum(name.startswith("eval/Metrics and Plots/plots") for name in written) == 6 * 5

    subprocess.run(["bash", str(copy / "clean.sh")], check=True, cwd="/")
    for path in own:
        assert path.read_text() == "mine"
        path.unlink()
    assert files(copy) == before

    run_here(copy)
    again = metrics(copy)
    for name, result in again.items():
        assert result.pop("config") | {"eval": None} == first[name].pop("config") | {"eval": None}
    assert again == first


def test_the_results_of_a_digit_do_not_depend_on_the_rest_of_the_sweep(here):
    run_here(here)
    together = metrics(here)
    run_here(here, "sweep.forget_digits=[9]", "sweep.kappa=[60]")
    alone = [name for name in together if "digit_9" in name and "kappa_60" in name]
    for name in alone:
        result = metrics(here)[name]
        assert result.pop("config") != together[name].pop("config")
        assert result == together[name]
    assert len(alone) == 1


def test_the_baseline_of_the_readme_shows_up_everywhere(copy):
    example = re.search(r"```python\n(@unlearning_method.*?)```", (copy / "README.md").read_text(), re.DOTALL)[1]
    name = re.search(r'@unlearning_method\("([^"]+)"', example)[1]
    replace_once(copy / "eval.py", '@unlearning_method("retrain")', f'{example}\n\n@unlearning_method("retrain")')
    print_legends(copy)
    output = run(copy, *SMOKE, *QUICK)
    for result in metrics(copy).values():
        assert {"loss", "score", "probability"} == set(result["unlearning_metrics"][name])
        assert {"loss", "score"} == set(result["performance_degradation_metrics"][name])
        assert name in result["mask_efficacy_metrics"]
        scores = [result["unlearning_metrics"][method]["loss"] for method in (name, "original", "random", "mimu")]
        assert len(set(scores)) == 4
    assert len(legends(output)) == 6 and all(name in labels for labels in legends(output).values())
    assert name in (copy / "reports" / "summary.md").read_text() and name in output.split("kappa =")[-1]


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
    weights = [torch.load(here / "checkpoints" / f"classifier_seed_{seed}.pt", weights_only=True) for seed in (0, 1)]
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
