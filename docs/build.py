"""Runs what the README's tables and pictures come from, and writes them into README.md and docs/.

Run it with `uv run docs/build.py`, or with the names of some blocks: `uv run docs/build.py default benchmark`.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import correlation, fmean

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from comparison import AuditReport  # noqa: E402
from config import load_config, load_variants  # noqa: E402
from eval import metrics_folder  # noqa: E402
from reporter import FORGET, RETAIN, Reporter, markdown_table  # noqa: E402

REPORTS, DOCS = ROOT / "reports", ROOT / "docs"


def replace_block(text: str, name: str, content: str) -> str:
    """The text with what stands between `<!-- name -->` and `<!-- /name -->` replaced. Raises ValueError without it."""
    block = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- /{re.escape(name)} -->)", re.DOTALL)
    if not block.search(text):
        raise ValueError(f"there is no block <!-- {name} --> ... <!-- /{name} --> to write to")
    return block.sub(lambda match: f"{match[1]}{content.strip()}\n{match[2]}", text)


def run_config(config: str, *arguments: str, processes: int = 1) -> Path:
    """Runs a config from a clean start and returns its path."""
    subprocess.run(["bash", "clean.sh"], cwd=ROOT, check=True)
    path = ROOT / "configs" / f"{config}.yaml"
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    subprocess.run([sys.executable, *torchrun, "main.py", "--config", path, *arguments], cwd=ROOT, check=True)
    return path


def run(config: str, *arguments: str, processes: int = 1) -> Reporter:
    """Runs a config from a clean start and returns the reporter of its experiments."""
    path = run_config(config, *arguments, processes=processes)
    shutil.copy(REPORTS / "summary.md", DOCS / f"{config}.md")
    return Reporter(load_config(path).report, sorted(metrics_folder(ROOT / "eval").glob("*.json")), REPORTS)


def run_figures() -> tuple[float, float, list[float]]:
    """Seconds, gigabytes and the test score of each classifier, percent, of the last run."""
    figures = json.loads((REPORTS / "run.json").read_text())
    return figures["total_seconds"], figures["peak_bytes"] / 1e9, list(figures["classifier_test_scores"].values())


def timed(*arguments: str) -> float:
    """Seconds that Python takes with these arguments."""
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True)
    return time.perf_counter() - started


def default() -> str:
    run("config")
    for name in ("score_forget_set", "score_retain_set"):
        shutil.copy(REPORTS / f"{name}.png", DOCS / f"{name}.png")
    seconds, gigabytes, (score,) = run_figures()
    again = timed("main.py")
    tests, faults = timed("-m", "pytest", "-q"), timed("-m", "pytest", "-q", "-m", "faults")
    rows = [
        ["`uv run main.py`, wall time, s", f"{seconds:.0f}"],
        ["the same again, nothing left to do, s", f"{again:.1f}"],
        ["`uv run main.py`, peak memory, GB", f"{gigabytes:.1f}"],
        ["its classifier, test score over ten digits, %", f"{score:.2f}"],
        ["`uv run pytest`, wall time, s", f"{tests:.0f}"],
        ["`uv run pytest -m faults`, wall time, s", f"{faults:.0f}"],
    ]
    return markdown_table(["what", "measured"], rows)


def all_digits() -> str:
    reporter = run("all_digits")
    shutil.copy(REPORTS / "summary.png", DOCS / "summary_all_digits.png")
    kappa, best = reporter.headline_kappa(), reporter.best_kappa()
    seconds, gigabytes, _ = run_figures()
    top_k = reporter.experiments[0]["top_k"]
    return (
        f"Ten digits, {len(reporter.seeds)} classifiers (mean ± standard deviation over them), test split. "
        f"{reporter.about(kappa)} `uv run main.py --config configs/all_digits.yaml`, {seconds:.0f} s, "
        f"{gigabytes:.1f} GB.\n\n"
        f"{reporter.methods_table(kappa)}\n\n"
        f"With one kappa for all requests, {best} (the best of the sweep on training samples), mimu's forget score is "
        f"{reporter.value(FORGET, 'mimu', 'score', kappa=best):.2f} % and its retain score "
        f"{reporter.value(RETAIN, 'mimu', 'score', kappa=best):.2f} %. Training the GCN takes "
        f"{reporter.value('seconds', 'gcn', kappa=kappa):.0f} s, once for all requests.\n\n"
        f"The worst digit of any classifier:\n\n"
        f"{reporter.worst_table(kappa)}\n\n"
        f"Mask efficacy: only K = {top_k} weights of the layer kept, scores on the class.\n\n"
        f"{reporter.efficacy_table(kappa)}"
    )


def published() -> str:
    reporter = run("published")
    rows = [
        [kappa, *(f"{reporter.value(key, 'mimu', 'score', kappa=kappa):.2f}" for key in (FORGET, RETAIN))]
        for kappa in reporter.kappas
    ]
    return markdown_table(["kappa", "forget score, %", "retain score, %"], rows)


def variants(config: str, processes: int = 1, is_drawn: bool = True) -> str:
    """The tables of the variants of a config."""
    run_config(config, processes=processes)
    if is_drawn:
        shutil.copy(REPORTS / "variants.png", DOCS / f"{config}.png")
    seconds, gigabytes, _ = run_figures()
    table = (REPORTS / "variants.md").read_text().partition("\n\n")[2]
    several = processes > 1
    start = f"torchrun --nproc-per-node {processes} main.py" if several else "main.py"
    memory = f"{gigabytes:.1f} GB a process" if several else f"{gigabytes:.1f} GB"
    return f"{table}\n`uv run {start} --config configs/{config}.yaml`, {seconds:.0f} s, {memory}."


def baselines() -> str:
    """Every method beside retraining, on three classifiers; and what one classifier takes, in one process."""
    run_config("baselines")
    seconds, gigabytes, _ = run_figures()
    report = AuditReport(run("baselines", "sweep.seeds=[0, 1, 2]", processes=2))
    for name in ("audits", "masks", "trade_off"):
        shutil.copy(REPORTS / f"{name}.png", DOCS / f"{name}.png")
    return (
        f"`uv run main.py --config configs/baselines.yaml`, one classifier, takes {seconds:.0f} s and {gigabytes:.1f} "
        "GB. Here, three classifiers, two processes with one thread each: `uv run torchrun --nproc-per-node 2 main.py "
        f"--config configs/baselines.yaml 'sweep.seeds=[0, 1, 2]'`, {run_figures()[0]:.0f} s.\n\n"
        + "\n\n".join(report.tables()).replace("## ", "### ")
    )


def erasure() -> str:
    """What methods leave in the representation, on three classifiers; and what one classifier takes."""
    config = run_config("erasure", processes=2)
    one_seed, gigabytes, _ = run_figures()
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "main.py", "--config", config]
    subprocess.run([*start, "sweep.seeds=[0, 1, 2]"], cwd=ROOT, check=True)  # what is there of the first is reused
    shutil.copy(REPORTS / "frontier.png", DOCS / "frontier.png")
    shutil.copy(REPORTS / "variants.md", DOCS / "erasure.md")
    tables = (REPORTS / "variants.md").read_text().partition("\n\n")[2]
    first, second = tables.strip().split("\n\n")
    return (
        "Ten digits, three classifiers (mean ± standard deviation over them), test split; kappa is chosen for each "
        "request on the training split.\n\n"
        f"{first}\n\n"
        "What is left in the representation: recall of the class by each probe against that of the same probe on the "
        "retrained classifier, points; and the steps of relearning from 1, 10 and 100 samples of every class, at most "
        f"{load_variants(config)['hidden'].eval.audit.relearn_steps}.\n\n"
        f"{second}\n\n{reference_agreement()}\n\n"
        "`uv run torchrun --nproc-per-node 2 main.py --config configs/erasure.yaml`, one classifier, takes "
        f"{one_seed:.0f} s and {gigabytes:.1f} GB a process; with `'sweep.seeds=[0, 1, 2]'` behind it the two others "
        f"take {run_figures()[0]:.0f} s more."
    )


def reference_agreement() -> str:
    """How well the regression on the pixels tells what it finds in the representation of a retrained classifier."""
    experiments = [json.loads(path.read_text()) for path in metrics_folder(ROOT / "eval").glob("*.json")]
    recalls = [each["training_recall"] for each in experiments if "retrain" in each["training_recall"]]
    pixels, retrained, original = ([each[key] for each in recalls] for key in ("pixels", "retrain", "original"))
    differences = [a - b for a, b in zip(pixels, retrained)]
    return (
        f"The regression of the stopping rule finds a class in {fmean(retrained):.1f} % of the training samples in the "
        f"representation of the retrained classifiers, in {fmean(original):.1f} % in that of the originals, and in "
        f"{fmean(pixels):.1f} % in the pixels, by which the first is estimated: mean difference "
        f"{fmean(differences):+.1f} points, mean absolute difference {fmean(map(abs, differences)):.1f}, correlation "
        f"over {len(recalls)} classes and classifiers {correlation(pixels, retrained):.2f}."
    )


def pretrain() -> str:
    """What training the pretrained GCN takes; it takes the place of the tracked one."""
    started = time.perf_counter()
    run_config("pretrain", "--pretrain")
    kilobytes = (ROOT / "checkpoints" / "pretrained" / "gcn.pt").stat().st_size / 1000
    return f"It takes {time.perf_counter() - started:.0f} s and {kilobytes:.0f} KB."


def full_model() -> str:
    reporter = run("full_model")
    kappa = reporter.headline_kappa()
    seconds, gigabytes, _ = run_figures()
    return (
        f"Digit 9, test split. {reporter.about(kappa)} `uv run main.py --config configs/full_model.yaml`, "
        f"{seconds:.0f} s, {gigabytes:.1f} GB.\n\n{reporter.methods_table(kappa)}\n\n{reporter.layers_table(kappa)}"
    )


def benchmark() -> str:
    done = subprocess.run([sys.executable, "tests/benchmark.py"], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout


def two_processes() -> str:
    """The same sweep by two processes, beside what `all_digits` has measured with one."""
    run_config("all_digits", processes=2)
    seconds, gigabytes, _ = run_figures()
    return (
        f"`uv run torchrun --nproc-per-node 2 main.py --config configs/all_digits.yaml` takes {seconds:.0f} s and at "
        f"most {gigabytes:.1f} GB a process on the same two cores."
    )


BLOCKS: dict[str, Callable[[], str]] = {
    "pretrain": pretrain,
    "transfer": lambda: variants("transfer", processes=2),
    "transfer_fashion": lambda: variants("transfer_fashion", processes=2),
    "ablation": lambda: variants("ablation", processes=2),
    "baselines": baselines,
    "full_model": full_model,
    "erasure": erasure,
    "erasure_ablation": lambda: variants("erasure_ablation", processes=2, is_drawn=False),
    "full_model_ablation": lambda: variants("full_model_ablation", processes=2),
    "published": published,
    "all_digits": all_digits,
    "two_processes": two_processes,
    "default": default,
    "benchmark": benchmark,
}

if __name__ == "__main__":
    for name in sys.argv[1:] or BLOCKS:
        content = BLOCKS[name]()
        readme = ROOT / "README.md"
        readme.write_text(replace_block(readme.read_text(), name, content))
