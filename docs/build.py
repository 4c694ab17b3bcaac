"""Measures what the pages show, and writes it between their marks: `<!-- name -->` and `<!-- /name -->`.

`uv run docs/build.py` measures everything, in more than an hour and with Fashion-MNIST; with names, as in
`uv run docs/build.py ablation performance`, it measures those. Every measurement removes first what runs have made.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib import pyplot as plt

from mimu.reporter import RETAIN_GAP, markdown_table, method_styles

ROOT = Path(__file__).resolve().parents[1]

REPORTS, DOCS = ROOT / "reports", ROOT / "docs"
PAGES = (ROOT / "README.md", *sorted(DOCS.glob("*.md")))
ON_TWO = ("-m", "torch.distributed.run", "--nproc-per-node", "2")
LOOKS = {"one look": 1, "looks at every fourth step": 3, "looks at every step": 12}  # variants of configs/few.yaml
THREE_CLASSIFIERS = "sweep.seeds=[0, 1, 2]"


def write_block(name: str, content: str) -> None:
    """Writes to the page that has the marks. Raises ValueError where not exactly one has them."""
    block = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- /{re.escape(name)} -->)", re.DOTALL)
    found = [page for page in PAGES if block.search(page.read_text())]
    if len(found) != 1:
        raise ValueError(f"block {name!r} must stand on one page, not on {len(found)}")
    text = block.sub(lambda match: f"{match[1]}{content.strip()}\n{match[2]}", found[0].read_text())
    found[0].write_text(text)


def python(*arguments: str) -> float:
    """Runs Python in the project, and returns the seconds that it took."""
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True)
    return time.perf_counter() - started


def run(config: str, *overrides: str, on_two: bool = False, is_clean: bool = True) -> str:
    """Runs a config, by one process or by two; returns what to say of it: the command, the seconds and the memory."""
    if is_clean:
        subprocess.run(["bash", "clean.sh"], cwd=ROOT, check=True)
    path = f"configs/{config}.yaml"
    python(*(ON_TWO if on_two else ()), "main.py", "--config", path, *overrides)
    figures = json.loads((REPORTS / "run.json").read_text())
    start = "torchrun --nproc-per-node 2 main.py" if on_two else "main.py"
    command = " ".join([start, "--config", path, *(f"'{each}'" for each in overrides)])
    memory = f"{figures['peak_bytes'] / 1e9:.1f} GB{' a process' if on_two else ''}"
    return f"`uv run {command}`, {figures['total_seconds']:.0f} s, {memory}"


def experiments() -> Iterator[dict[str, Any]]:
    """The JSON of every experiment that is there."""
    for path in (ROOT / "eval" / "Metrics and Plots" / "metrics").glob("*.json"):
        yield json.loads(path.read_text())


def take_pictures(**names: str) -> None:
    """Copies pictures of the reports: their names there, and in docs/."""
    for theirs, ours in names.items():
        shutil.copy(REPORTS / f"{theirs}.png", DOCS / f"{ours}.png")


def section(heading: str) -> list[str]:
    """The paragraphs and tables under a heading of the summary."""
    _, found, rest = (REPORTS / "summary.md").read_text().partition(f"## {heading}\n\n")
    if not found:
        raise ValueError(f"reports/summary.md has no section {heading!r}")
    return rest.partition("\n## ")[0].strip().split("\n\n")


def cells(table: str) -> list[list[str]]:
    """The header and the rows of a table."""
    header, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines())
    return [header, *rows]


def rows_of(table: str, *methods: str) -> str:
    """The table with the rows of these methods alone."""
    header, *rows = cells(table)
    return markdown_table(header, [row for row in rows if row[0] in methods])


def columns_of(table: str, *columns: str) -> str:
    """The table with these columns alone."""
    header, *rows = cells(table)
    indices = [header.index(column) for column in columns]
    return markdown_table(columns, [[row[index] for index in indices] for row in rows])


def all_digits() -> dict[str, str]:
    """The table of the README, and the tables of its page."""
    said = run("all_digits")
    take_pictures(summary="summary_all_digits")
    about, methods, *worst = section("Every method, kappa = auto")
    _, efficacy = section("Mask efficacy, K = 2048")
    (kappas,) = section("Every kappa")
    about = f"Ten digits, three classifiers (mean ± standard deviation over them), test split. {about} {said}"
    gcn = fmean(experiment["seconds"]["gcn"] for experiment in experiments())
    gap = "retain score against retrain, points"
    first = columns_of(methods, "method", "forget score, %", "retain score, %", gap, "seconds a request")
    page = [
        f"{about}.",
        methods,
        *worst,
        "Mask efficacy: only K = 2048 weights of the layer kept, scores on the class.",
        efficacy,
        "Every kappa:",
        rows_of(kappas, "mimu", "saliency"),
    ]
    return {
        "headline": f"{about}; training the GCN takes {gcn:.0f} s of it for each classifier.\n\n{first}",
        "all_digits": "\n\n".join(page),
    }


def default() -> dict[str, str]:
    run("config")
    take_pictures(score_forget_set="score_forget_set", score_retain_set="score_retain_set")
    figures = json.loads((REPORTS / "run.json").read_text())
    (score,) = figures["classifier_test_scores"].values()
    rows = [
        ["`uv run main.py`, wall time, s", f"{figures['total_seconds']:.0f}"],
        ["the same again, nothing left to do, s", f"{python('main.py'):.1f}"],
        ["`uv run main.py`, peak memory, GB", f"{figures['peak_bytes'] / 1e9:.1f}"],
        ["its classifier, test score over ten digits, %", f"{score:.2f}"],
        ["`uv run pytest`, wall time, s", f"{python('-m', 'pytest', '-q'):.0f}"],
        ["`uv run pytest -m faults`, wall time, s", f"{python('-m', 'pytest', '-q', '-m', 'faults'):.0f}"],
    ]
    return {"default": markdown_table(["what", "measured"], rows)}


def published() -> dict[str, str]:
    run("published")
    (kappas,) = section("Every kappa")
    table = columns_of(rows_of(kappas, "mimu"), "kappa", "forget score, %", "retain score, %")
    return {"published": table}


def full_model() -> dict[str, str]:
    said = run("full_model")
    about, methods, _, layers = section("Every method, kappa = auto")
    return {"full_model": "\n\n".join([f"Digit 9, test split. {about} {said}.", methods, layers])}


def cifar10() -> dict[str, str]:
    said = run("cifar10", "dataset=cifar10-images", on_two=True)
    methods, gap = section("Every method, kappa = auto")[1], "retain score against retrain, points"
    table = columns_of(methods, "method", "forget score, %", "retain score, %", gap, "seconds a request")
    return {"cifar10": f"{table}\n\n{said}."}


def variants(config: str, has_picture: bool = True) -> Callable[[], dict[str, str]]:
    """The tables of the variants of a config, and their picture."""

    def measure() -> dict[str, str]:
        said = run(config, on_two=True)
        if has_picture:
            take_pictures(variants=config)
        return {config: f"{variant_tables()}\n\n{said}."}

    return measure


def variant_tables() -> str:
    """What `reports/variants.md` says under its title."""
    return (REPORTS / "variants.md").read_text().partition("\n\n")[2].strip()


def baselines() -> dict[str, str]:
    """Every method beside retraining, on three classifiers; and what one classifier takes, in one process."""
    one, three = run("baselines"), run("baselines", THREE_CLASSIFIERS, on_two=True)
    take_pictures(audits="audits", masks="masks", trade_off="trade_off")
    parts = [f"One classifier: {one}. Here, three, by two processes with one thread each: {three}."]
    for heading in ("Distance to retraining", "Audits", "Cost", "The methods"):
        parts += [f"### {heading}", *section(heading)]
    return {"baselines": "\n\n".join(parts)}


def erasure() -> dict[str, str]:
    """What methods leave in the representation, on three classifiers; and what one classifier takes."""
    one = run("erasure", on_two=True)
    more = run("erasure", THREE_CLASSIFIERS, on_two=True, is_clean=False)  # what is there of the first is reused
    take_pictures(frontier="frontier")
    first, second = variant_tables().split("\n\n")
    parts = [
        "Ten digits, three classifiers (mean ± standard deviation over them), test split; kappa is chosen for each "
        "request on the training split.",
        first,
        "What is left in the representation: recall of the class by each probe against that of the same probe on the "
        "retrained classifier, points; and the steps of relearning from 1, 10 and 100 samples of every class, at most "
        "100.",
        second,
        f"One classifier: {one}. The two others after it: {more}.",
    ]
    return {"erasure": "\n\n".join(parts)}


def few() -> dict[str, str]:
    """What few looks and few samples cost."""
    blocks = {}
    for name, overrides in (("few_fashion", ("dataset=FashionMNIST", "sweep.seeds=[0]")), ("few", ())):
        said = run("few", *overrides, on_two=True)
        blocks[name] = f"{variant_tables()}\n\n{said}."
    draw_few(variant_tables())
    return blocks


def draw_few(table: str) -> None:
    """Draws the retain score over the time of a request, by its looks, and over the samples that it has."""
    found = {
        name: [float((cell.split() or "–")[0].replace("–", "nan")) for cell in row] for name, *row in cells(table)[1:]
    }

    def of(variants: Iterable[str], method: str, column: int) -> list[float]:
        return [found[each if method == "mimu" else f"{each}: {method}"][column] for each in variants]

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4.2), layout="constrained", sharey=True)
    methods = "mimu", "saliency", "optimised_mask", "damp", "output_row"
    styles = method_styles(methods)
    numbers = {n: f"{n} sample{'s' * (n > 1)}" for n in (1, 2, 5, 10, 50, 1000)}
    for method in ("mimu", "saliency"):
        milliseconds, gaps = [1000 * each for each in of(LOOKS, method, 5)], of(LOOKS, method, 2)
        left.plot(milliseconds, gaps, label=method, **styles[method])
        for x, y, looks in zip(milliseconds, gaps, LOOKS.values()):
            place = {"xytext": (0, -8), "va": "top"} if looks == 1 else {"xytext": (0, 8), "va": "bottom"}
            left.annotate(str(looks), (x, y), **place, textcoords="offset points", fontsize=8, ha="center")
    for method in methods:
        style = styles[method]
        gaps, left_of = of(numbers.values(), method, 2), of(numbers.values(), method, 0)
        right.plot([*numbers], gaps, **style | {"marker": ""})
        for n, gap, forget in zip(numbers, gaps, left_of):
            filled = {"fillstyle": "none" if forget > 1 else "full", "label": method if n == 1000 else None}
            right.plot(n, gap, **style | {"linestyle": "none"} | filled)
    left.set(xlim=(0, None), xlabel="a request, ms (numbers: its looks)", ylabel=RETAIN_GAP.name, ylim=(-0.8, 0.3))
    right.set(xscale="log", xlabel="samples of every class (hollow: over 1 % left)")
    right.xaxis.set_major_formatter("{x:g}")
    for axes in (left, right):
        axes.axhline(0, color="0.6", linewidth=0.8, zorder=1)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="lower right")
    figure.savefig(DOCS / "few.png", dpi=150)


def pretrain(config: str, file: str) -> Callable[[], dict[str, str]]:
    """What training a pretrained GCN takes; it takes the place of the tracked one."""

    def measure() -> dict[str, str]:
        subprocess.run(["bash", "clean.sh"], cwd=ROOT, check=True)
        seconds = python("docs/pretrain.py", f"configs/{config}.yaml")
        kilobytes = (ROOT / "checkpoints" / "pretrained" / file).stat().st_size / 1000
        return {config: f"It takes {seconds:.0f} s and {kilobytes:.0f} KB."}

    return measure


def two_processes() -> dict[str, str]:
    """The sweep that `all_digits` measures with one process, by two."""
    return {"two_processes": f"On the same two cores: {run('all_digits', on_two=True)}."}


def benchmark() -> dict[str, str]:
    done = subprocess.run([sys.executable, "tests/benchmark.py"], cwd=ROOT, check=True, capture_output=True, text=True)
    return {"benchmark": done.stdout}


MEASUREMENTS: dict[str, Callable[[], dict[str, str]]] = {
    "pretrain": pretrain("pretrain", "gcn.pt"),
    "pretrain_kernels": pretrain("pretrain_kernels", "kernels.pt"),
    "cnn": variants("cnn", has_picture=False),
    "cifar10": cifar10,
    "transfer": variants("transfer"),
    "transfer_fashion": variants("transfer_fashion"),
    "ablation": variants("ablation"),
    "baselines": baselines,
    "full_model": full_model,
    "full_model_ablation": variants("full_model_ablation"),
    "erasure": erasure,
    "few": few,
    "published": published,
    "all_digits": all_digits,
    "two_processes": two_processes,
    "default": default,
    "benchmark": benchmark,
}

if __name__ == "__main__":
    for measurement in sys.argv[1:] or MEASUREMENTS:
        for name, content in MEASUREMENTS[measurement]().items():
            write_block(name, content)
