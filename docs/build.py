"""Measures the blocks of the pages: `uv run docs/build.py few ablation`, or without names all of them, for hours.

A block stands between `<!-- few: measured at 559edba -->` and `<!-- /few -->`, where 559edba is the commit whose code
measured it. Some blocks need Fashion-MNIST or CIFAR-10. The block `pretrain` trains the tracked GCN anew.
"""

import argparse
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib import pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eval import METHODS
from methods import controls  # noqa: F401  # the package registers its methods
from mimu.files import write_text
from mimu.pretrained import PRETRAINED
from reporter import (
    DIVERGENCE,
    FORGET_SCORE,
    PROBABILITY,
    RETAIN_GAP,
    RETAIN_SCORE,
    SECONDS,
    ZEROED,
    markdown_table,
    method_styles,
)
from tables.comparison import ABOUT, PROBE_GAP

ROOT = Path(__file__).resolve().parents[1]
REPORTS, DOCS = ROOT / "reports", ROOT / "docs"
TWO_PROCESSES = "torchrun --nproc-per-node 2 main.py"
SHORT = ("method", FORGET_SCORE.name, RETAIN_SCORE.name, RETAIN_GAP.name, SECONDS.name)  # columns
WORST = {FORGET_SCORE.name: "forget accuracy, worst class", RETAIN_GAP.name: "gap, worst class"}
SAMPLES = {1: "1 sample", 5: "5 samples", 10: "10 samples", 50: "50 samples"}  # variants of configs/few.yaml


def head() -> str:
    """Returns the short hash of the commit that is checked out."""
    command = ["git", "rev-parse", "--short=7", "HEAD"]
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


class Block(NamedTuple):
    """A measured part of a page; `marked` is the content with both marks."""

    page: Path
    commit: str
    content: str
    marked: str


def block(name: str) -> Block:
    """Finds a block by its marks. Raises ValueError unless these stand exactly once on the pages."""
    marks = re.compile(rf"<!-- {re.escape(name)}: measured at (\w+) -->\n(.*?)<!-- /{re.escape(name)} -->", re.DOTALL)
    blocks = []
    for page in (ROOT / "README.md", *sorted(DOCS.glob("*.md"))):
        blocks += [Block(page, match[1], match[2], match[0]) for match in marks.finditer(page.read_text())]
    if len(blocks) != 1:
        raise ValueError(f"block {name}: its marks must stand once on the pages, not {len(blocks)} times")
    return blocks[0]


def write_block(name: str, content: str, commit: str | None = None) -> None:
    """Replaces the content of a block, and the commit in its mark; None: by the one that is checked out."""
    before = block(name)
    marked = f"<!-- {name}: measured at {commit or head()} -->\n{content.strip()}\n<!-- /{name} -->"
    write_text(before.page, before.page.read_text().replace(before.marked, marked))


def python(command: str) -> float:
    """Runs a command in the project, and returns the seconds that it took."""
    started = time.perf_counter()
    words = shlex.split(command.replace("torchrun", "-m torch.distributed.run", 1))
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True)
    return time.perf_counter() - started


def last_run() -> dict[str, Any]:
    """Returns the seconds and the memory that the last run took."""
    return json.loads((REPORTS / "run.json").read_text())


def run(command: str) -> str:
    """Runs main.py; returns the command as a reader types it, after `--fresh` with the seconds and the memory."""
    python(command)
    typed = f"`uv run {command.replace(' --fresh', '')}`"
    if "--fresh" not in command:
        return typed
    memory = f"{last_run()['peak_bytes'] / 1e9:.1f} GB{' a process' if TWO_PROCESSES in command else ''}"
    return f"{typed}, {last_run()['total_seconds']:.0f} s, {memory}"


def copy_pictures(**names: str) -> None:
    """Copies pictures from reports/ to docs/, given the name there by the name here."""
    for source, target in names.items():
        shutil.copy(REPORTS / f"{source}.png", DOCS / f"{target}.png")


def section(heading: str) -> list[str]:
    """Returns the paragraphs and tables under a heading of the summary. Raises ValueError if there is no such one."""
    _, marker, text = (REPORTS / "summary.md").read_text().partition(f"## {heading}\n\n")
    if not marker:
        raise ValueError(f"reports/summary.md has no section {heading!r}")
    return text.partition("\n## ")[0].strip().split("\n\n")


def cells(table: str) -> list[list[str]]:
    """Returns the header and the rows of a Markdown table."""
    lines = table.strip().splitlines()
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[:1] + lines[2:]]


def rows_of(table: str, methods: Sequence[str]) -> str:
    """Keeps the rows of these methods."""
    header, *rows = cells(table)
    return markdown_table(header, [row for row in rows if row[0] in methods])


def columns_of(table: str, columns: Sequence[str], texts: int = 1) -> str:
    """Keeps these columns, in this order; the first `texts` of them are text."""
    header, *rows = cells(table)
    return markdown_table(columns, [[row[header.index(column)] for column in columns] for row in rows], texts)


def renamed(table: str, names: Mapping[str, str]) -> str:
    """Renames columns."""
    header, *rows = cells(table)
    return markdown_table([names.get(column, column) for column in header], rows)


def joined(*tables: str) -> str:
    """Joins tables by their first column, in the order of the last one; a row that a table lacks has dashes there."""
    headers, rows = [], []
    for table in tables:
        header, *content = cells(table)
        headers.append(header)
        rows.append({first: rest for first, *rest in content})
    joint = []
    for name in rows[-1]:
        parts = [by_name.get(name, ["–"] * (len(header) - 1)) for header, by_name in zip(headers, rows)]
        joint.append([name, *sum(parts, [])])
    return markdown_table([headers[0][0], *sum((header[1:] for header in headers), [])], joint)


def by_method(table: str, left_out: Sequence[str] = ()) -> str:
    """Gives the methods of a table of variants a column of their own.

    left_out: patterns of "variant: method" whose rows are left out
    """
    header, *rows = cells(table)
    split = []
    for name, *figures in rows:
        variant, _, method = name.partition(": ")
        if not any(fnmatch(f"{variant}: {method or 'mimu'}", pattern) for pattern in left_out):
            split.append([variant, method or "mimu", *figures])
    return markdown_table(["variant", "method", *header[1:]], split, texts=2)


def variant_tables() -> str:
    """Returns the tables of `reports/variants.md`, without its title."""
    return (REPORTS / "variants.md").read_text().partition("\n\n")[2].strip()


def by_script(command: str) -> None:
    """Runs a script that writes its block itself."""
    python(command)


def coverage() -> None:
    """Runs docs/coverage.py, which writes its block itself, with the packages that it needs."""
    command = ["uv", "run", "--with", "timm", "--with", "transformers", "docs/coverage.py"]
    subprocess.run(command, cwd=ROOT, check=True)


def pretrained() -> str:
    """Trains the pretrained GCN anew, in the place of the tracked one."""
    seconds = python("main.py --pretrain --config configs/pretrain.yaml")
    return f"Its training takes {seconds:.0f} s, and its file {PRETRAINED.stat().st_size / 1000:.0f} KB."


def all_digits_intro(command: str) -> str:
    typed = run(command)
    about = section("Every method, kappa = auto")[0]
    return f"Ten digits, three classifiers (mean ± standard deviation over them), test split. {about} {typed}"


SHOWN = {  # of the methods: their names in the README
    "original": "original", "retrain": "retrained", "retrain_again": "retrained a second time",
    "logit_removed": "hidden (logit set to -inf)", "saliency": "masked by the formula", "mimu": "masked by the GCN",
    "erase": "erased", "scrub": "SCRUB", "ssd": "SSD", "delete": "DELETE",
}  # fmt: skip
FIGURES = {  # of the tables of the README: their titles there
    "method": "method", FORGET_SCORE.name: "forget accuracy, %", RETAIN_SCORE.name: "retain accuracy, %",
    RETAIN_GAP.name: "gap, points", DIVERGENCE.name: "divergence, bits",
    "probe, recall of the forget class, %": "probe, %", SECONDS.name: "seconds",
}  # fmt: skip


def headline(source: str, dataset: str) -> None:
    """Copies some rows and columns of a measured table to the README, without deviations."""
    measured = block(source)
    table = next(part for part in measured.content.split("\n\n") if part.startswith("| method"))
    columns = [column for column in FIGURES if column in cells(table)[0]]
    by_method = {row[0]: row for row in cells(columns_of(table, columns))[1:]}
    rows = [
        [SHOWN[name], *(re.sub(" ±.*", "", cell) for cell in by_method[name][1:])]
        for name in SHOWN
        if name in by_method
    ]
    titles = [dataset, *(FIGURES[column] for column in columns[1:])]
    write_block(f"headline_{source}", markdown_table(titles, rows), measured.commit)


WAYS = {  # of the table of choices: the words of the README
    "no samples": "hide",
    "the same by hand: `logit_removed`": "hide by hand: `logits[:, 3] = -math.inf`",
    "a mask, by 1,000 samples per class": "mask",
    "the class must also leave the representation": "erase (the default)",
    "retraining is cheap": "retrain",
}


def three_ways() -> None:
    """Copies the choices to the README, as they end on the CNN alone."""
    measured = block("choice")
    _, *rows = cells(measured.content)
    by_situation = {row[0]: [cell.split(" / ")[1] if " / " in cell else cell for cell in row[1:]] for row in rows}
    table = [[words, *by_situation[situation][1:]] for situation, words in WAYS.items()]
    columns = ["method", "forget accuracy, %", "change of retain accuracy, points", "IDI", "seconds"]
    write_block("three_ways", markdown_table(columns, table), measured.commit)


RESULTS = ("method", FORGET_SCORE.name, WORST[FORGET_SCORE.name], RETAIN_SCORE.name, RETAIN_GAP.name,
           WORST[RETAIN_GAP.name], PROBABILITY.name, ZEROED.name, SECONDS.name)  # fmt: skip


def all_digits() -> str:
    parts = [f"{all_digits_intro('main.py --fresh --config configs/all_digits.yaml')}."]
    copy_pictures(summary="summary_all_digits")
    _, means, _, worst = section("Every method, kappa = auto")
    parts += [columns_of(joined(means, renamed(worst, WORST)), RESULTS)]
    parts += ["Mask efficacy: only K = 2048 weights of the layer kept, accuracy on the class."]
    parts += [columns_of(section("Mask efficacy, K = 2048")[1], ("method", FORGET_SCORE.name, PROBABILITY.name))]
    return "\n\n".join(parts)


def default() -> str:
    run("main.py --fresh")
    copy_pictures(score_forget_set="score_forget_set", score_retain_set="score_retain_set")
    fresh = last_run()
    rows = [
        ["`uv run main.py`, wall time, s", f"{fresh['total_seconds']:.0f}"],
        ["the same again, nothing left to do, s", f"{python('main.py'):.1f}"],
        ["`uv run main.py`, peak memory, GB", f"{fresh['peak_bytes'] / 1e9:.1f}"],
        ["`uv run pytest`, wall time, s", f"{python('-m pytest -q'):.0f}"],
        ["`uv run pytest -m faults`, wall time, s", f"{python('-m pytest -q -m faults'):.0f}"],
    ]
    return markdown_table(["what", "measured"], rows)


def benchmark() -> str:
    """Measures the closed form and the stages of a run."""
    command = [sys.executable, "tests/benchmark.py"]
    return one_benchmark(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout)


def one_benchmark(output: str) -> str:
    """Makes one table of those of the benchmark, without the first one, which measures other memory management."""
    about, *parts = output.strip().split("\n\n")
    _, *tables = [cells(part) for part in parts if part.startswith("|")]
    rows = [row for _, *rows in tables for row in rows]
    shown = [row for row in rows if not any(fnmatch(row[0], pattern) for pattern in LEFT_OUT["benchmark"])]
    return f"{about}\n\n{markdown_table(tables[0][0], shown)}"


COMPARED = (
    "method", FORGET_SCORE.name, RETAIN_SCORE.name, DIVERGENCE.name,
    "divergence on the retain set, bits", "retain accuracy, points",
    "loss attack, area under the curve", "probe, recall of the forget class, %", "relearn time, steps",
    "seconds a request", "weights changed",
)  # fmt: skip


def baselines() -> str:
    """Compares every method with retraining, on three classifiers."""
    three = run(f"{TWO_PROCESSES} --fresh --config configs/baselines.yaml 'sweep.seeds=[0, 1, 2]'")
    parts = [f"Ten digits, three classifiers, two processes with one thread each: {three}."]
    copy_pictures(trade_off="trade_off")
    means = section("Every method, kappa = auto")[1]
    scores = columns_of(means, ("method", FORGET_SCORE.name, RETAIN_SCORE.name))
    tables = [scores, *(section(heading)[-1] for heading in ("Audits", "Cost", "Distance to retraining"))]
    table = renamed(columns_of(joined(*tables), COMPARED), {"retain accuracy, points": RETAIN_GAP.name})
    return "\n\n".join([*parts, section("Cost")[0], table])


def registered_methods() -> str:
    """Lists the methods of today by what the code says of them."""
    rows = [[name, *map(method.about().get, ABOUT)] for name, method in METHODS.items()]
    return markdown_table(["method", *ABOUT.values()], rows, texts=1 + len(ABOUT))


def published() -> str:
    run("main.py --config configs/published.yaml")
    columns = ["method", "kappa", FORGET_SCORE.name, RETAIN_SCORE.name]
    return columns_of(rows_of(section("Every kappa")[0], ["mimu", "published"]), columns)


WITHOUT_MASK = ("original", "output_row", "fine_tune", "salun", "scrub")  # the same for every layer that is masked
LEFT_OUT = {  # by config or block, the rows that its page does without
    "benchmark": ("GB *", "* weights, *", "* as PyTorch comes *"),
    "ablation": ("as it is: original", "the others are not asked for: saliency"),
    "few": ("all at once: *", "* step: optimised_mask", "1 sample: [!m]*", "5 samples: [!m]*", "50 samples: [!m]*"),
    "erasure_networks": ("*: retrain",),
    "transfer_fashion": ("*: original",),
    "erasure": ("stronger*: cola",),
    "cnn": ("MNIST*: [!ms]*", "*: ssd"),
    "vit": tuple(f"{variant}*: {method}" for variant in ("perceptron", "all") for method in WITHOUT_MASK),
}


def variants(config: str) -> str:
    """Returns the tables of all variants of a config, and renews the picture of its page, if there is one."""
    typed = run(f"{TWO_PROCESSES} --config configs/{config}.yaml")
    if (DOCS / f"{config}.png").exists():
        copy_pictures(variants=config)
    return f"{by_method(variant_tables(), LEFT_OUT.get(config, ()))}\n\n{typed}."


def few() -> str:
    """Measures requests of few snapshots and of few samples."""
    table = variants("few")
    draw_few(variant_tables())
    return table


ON_CIFAR10 = (
    *SHORT[:2], WORST[FORGET_SCORE.name], *SHORT[2:4], WORST[RETAIN_GAP.name], "loss attack, area under the curve",
    "entropy attack, % members", "IDI", SECONDS.name,
)  # fmt: skip


CIFAR10 = f"{TWO_PROCESSES} --config configs/cifar10.yaml 'dataset=cifar10-images'"


def cifar10() -> str:
    """Measures every method on every class."""
    typed = run(CIFAR10)
    copy_pictures(trade_off="cifar10")
    _, means, _, worst = section("Every method, kappa = auto")
    table = columns_of(joined(section("Audits")[1], renamed(worst, WORST), means), ON_CIFAR10)
    return f"{table}\n\n{typed}."


def cifar10_two() -> str:
    """Measures the methods of the README on two classes, with a second retrained classifier."""
    methods = "original, mimu, saliency, erase, logit_removed, scrub, ssd, delete, retrain, retrain_again"
    typed = run(f"{CIFAR10} 'sweep.forget_digits=[airplane, cat]' 'eval.methods=[{methods}]'")
    means = columns_of(section("Every method, kappa = auto")[1], SHORT)
    table = joined(section("Audits")[1], section("Distance to retraining")[-1], means)
    *columns, seconds = FIGURES
    return f"{columns_of(table, (*columns, 'IDI', seconds))}\n\n{typed}."


REMAINING = "IDI, representation", PROBE_GAP.name
ON_NETWORKS = ("variant", FORGET_SCORE.name, RETAIN_GAP.name, *REMAINING, SECONDS.name)
ON_PERCEPTRONS = (*ON_NETWORKS[:3], "IDI, hidden layer 0", *REMAINING, "prototype, 10 a class", "steps, 10 a class",
                  SECONDS.name)  # fmt: skip


def erasure() -> str:
    """Measures how much of a class methods leave in the representation, and at which cost."""
    typed = run(f"{TWO_PROCESSES} --fresh --config configs/erasure.yaml")
    tables = map(without_repeats, variant_tables().split("\n\n"))
    table = by_method(columns_of(joined(*tables), ON_PERCEPTRONS), LEFT_OUT["erasure"])
    return f"{table}\n\n{typed}."


def erasure_networks() -> str:
    """Measures the same on networks that are no perceptrons."""
    typed = run(f"{TWO_PROCESSES} --config configs/erasure_networks.yaml")
    tables = variant_tables().split("\n\n")
    return f"{by_method(columns_of(joined(*tables), ON_NETWORKS), LEFT_OUT['erasure_networks'])}\n\n{typed}."


def without_repeats(table: str) -> str:
    """Drops all of mimu's rows but the first: every variant has one, and they are equal."""
    header, *rows = cells(table)
    first = next(row for row in rows if ": " not in row[0])
    return markdown_table(header, [row for row in rows if row is first or ": " in row[0]])


def draw_few(table: str) -> None:
    """Draws the gap to retraining over the number of samples that a request has."""
    header, *rows = cells(table)
    by_variant = {row[0]: row for row in rows}

    def mean(variant: str, method: str, column: str) -> float:
        row = by_variant[variant if method == "mimu" else f"{variant}: {method}"]
        number = row[header.index(column)].partition(" ")[0]
        return math.nan if number in ("", "–") else float(number)

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    methods = ("mimu", "saliency", "optimised_mask", "damp", "output_row")
    styles = method_styles(methods)
    for method in methods:
        axes.plot([], [], label=method, **styles[method])
        gaps = [mean(variant, method, RETAIN_GAP.name) for variant in SAMPLES.values()]
        axes.plot(list(SAMPLES), gaps, **styles[method] | {"marker": ""})
        for (count, variant), gap in zip(SAMPLES.items(), gaps):
            fill = "none" if mean(variant, method, FORGET_SCORE.name) > 1 else "full"
            axes.plot(count, gap, fillstyle=fill, **styles[method])
    axes.set(xscale="log", xlabel="samples of every class (hollow: forget accuracy above 1 %)")
    axes.set_yscale("symlog", linthresh=0.2)
    axes.set_ylabel(f"{RETAIN_GAP.name}\n(symmetric log scale)")
    axes.set_yticks((-1, -0.5, -0.2, -0.1, 0, 0.1, 0.2))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.axhline(0, color="0.6", linewidth=0.8, zorder=1)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    figure.savefig(DOCS / "few.png", dpi=150)


VARIANTS = ("ablation", "transfer", "transfer_fashion", "cnn", "vit")  # configs
OWN = ("own_layers", "own_several", "choice", "own_networks", "own_kinds", "own_few", "own_training")
SCRIPTS = {
    "shadow": "docs/shadow.py",
    "sizes": "docs/sizes.py",
    "sizes_tuned": "docs/sizes.py tune",
    "auditing": "docs/auditing.py",
    "scale": "docs/scale.py",
    "imagenet": "docs/scale.py imagenet",
    "tuning": "docs/tune.py",
}
MEASUREMENTS: dict[str, Callable[[], str | None]] = {  # in their order: all later blocks use the GCN of `pretrain`
    "pretrain": pretrained,
    "default": default,
    "benchmark": benchmark,
    "all_digits": all_digits,
    "published": published,
    "few": few,
    **{name: partial(variants, name) for name in VARIANTS},
    "baselines": baselines,
    "methods": registered_methods,
    "erasure": erasure,
    "erasure_networks": erasure_networks,
    "cifar10": cifar10,
    "cifar10_two": cifar10_two,
    "headline_baselines": partial(headline, "baselines", "MNIST"),
    "headline_cifar10_two": partial(headline, "cifar10_two", "CIFAR-10"),
    "coverage": coverage,
    **{name: partial(by_script, f"docs/own.py {name}") for name in OWN},
    "three_ways": three_ways,
    **{name: partial(by_script, command) for name, command in SCRIPTS.items()},
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures blocks in their order, and returns the exit status: 1 if a command of one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("blocks", nargs="*", help=", ".join(MEASUREMENTS))
    parsed = parser.parse_args(arguments)
    if unknown := sorted(set(parsed.blocks).difference(MEASUREMENTS)):
        parser.error(f"{unknown[0]} is no block: valid are {', '.join(MEASUREMENTS)}")
    failures = 0
    for name, measure in MEASUREMENTS.items():
        if parsed.blocks and name not in parsed.blocks:
            continue
        block(name)  # raises where its marks are missing, before hours of work
        print(f"measuring {name}", flush=True)
        try:
            content = measure()
        except subprocess.CalledProcessError as error:
            failures += 1
            print(f"{name}: {error}")
            continue
        if content is not None:
            write_block(name, content)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
