"""Measures what the pages show, and writes it between their marks: `<!-- name: digest -->` and `<!-- /name -->`.

The digest is of all that decides the figures: the settings, the code, and the pretrained GCN where one is taken.
`uv run docs/build.py` measures every block that is stale, whose digest is not today's, one after the other; stopped, it
goes on from there. All of them take hours, Fashion-MNIST and CIFAR-10; the first two train the tracked GCNs anew, in
their places. With names, as in `uv run docs/build.py ablation few`, it measures those in any case. With `--stale` it
measures nothing, and says which blocks are stale; its exit status is 1 where one is.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import inspect
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import yaml
from matplotlib import pyplot as plt

from experiment.command_line import parse_arguments
from experiment.config import load_variants
from experiment.files import ROOT as PACKAGE
from main import CODE, TRAINING_CODE
from mimu.files import digest, write_text
from mimu.pretrained import PRETRAINED
from reporter import FORGET_SCORE, RETAIN_GAP, RETAIN_SCORE, SECONDS, markdown_table, method_styles

ROOT = Path(__file__).resolve().parents[1]
REPORTS, DOCS = ROOT / "reports", ROOT / "docs"
ON_TWO = "torchrun --nproc-per-node 2 main.py"
SHORT = ("method", FORGET_SCORE.name, RETAIN_SCORE.name, RETAIN_GAP.name, SECONDS.name)  # columns
SAMPLES = {1: "1 sample", 5: "5 samples", 10: "10 samples", 50: "50 samples"}  # variants of configs/few.yaml


class Measurement(NamedTuple):
    """What a block shows, and what decides its figures.

    content: runs the commands, and returns the text; None where they write the block themselves
    commands: as one types them after `uv run`; of one with --fresh, which reuses nothing, the block says what it took
    settings: commands of main.py, or candidates of docs/tune.py, whose settings decide; none named: those of `commands`
    code: which files of the project decide, beside the scripts of the commands
    """

    content: Callable[[Sequence[str]], str | None]
    commands: Sequence[str]
    settings: Sequence[str] = ()
    code: Sequence[str] = CODE

    def sources(self) -> dict[str, str]:
        """File to the digest of its code, as this process first read it, for all files that figures may depend on."""
        found = {}
        scripts = [word for word in " ".join(self.commands).split() if word.endswith(".py")]
        for pattern in [*self.code, *scripts]:
            for path in ROOT.glob(pattern):
                found[path.relative_to(ROOT).as_posix()] = code_digest(path)
        found.pop("reporter.py", None)  # no number depends on it
        return found


class Block(NamedTuple):
    """Where a block stands, the digest of what made it, its content, and all of it with its marks."""

    page: Path
    provenance: str
    content: str
    marked: str


def block(name: str) -> Block:
    """Finds a block by its marks. Raises ValueError where they do not stand once, on one page."""
    marks = re.compile(rf"<!-- {re.escape(name)}: (\w+) -->\n(.*?)<!-- /{re.escape(name)} -->", re.DOTALL)
    found = []
    for page in (ROOT / "README.md", *sorted(DOCS.glob("*.md"))):
        found += [Block(page, match[1], match[2], match[0]) for match in marks.finditer(page.read_text())]
    if len(found) != 1:
        raise ValueError(f"block {name}: its marks with a digest must stand once on the pages, not {len(found)} times")
    return found[0]


def write_block(name: str, content: str, provenance: str | None = None) -> None:
    """Writes what was measured, and the digest of what made it: today's where none is given."""
    written = block(name)
    marked = f"<!-- {name}: {provenance or today(name)} -->\n{content.strip()}\n<!-- /{name} -->"
    write_text(written.page, written.page.read_text().replace(written.marked, marked))


def today(name: str) -> str:
    """The digest of all that decides the figures of a block."""
    measured, settings = MEASUREMENTS[name], []
    for each in measured.settings or measured.commands:
        if each.startswith("docs/tuning"):
            settings.append(all_of_tuning(Path(each).stem))
        elif "main.py" in each:
            settings.append(settings_of(each))
    function = without_words(inspect.getsource(measured.content))
    return digest([measured.commands, settings, function, measured.sources()])[:8]


def is_stale(name: str) -> bool:
    """Whether something else decided the figures of a block than what decides them today."""
    return block(name).provenance != today(name)


def measure(name: str) -> None:
    """Runs what a block needs, and writes it."""
    provenance = today(name)  # before, so that what is changed meanwhile leaves the block stale
    content = MEASUREMENTS[name].content(MEASUREMENTS[name].commands)
    if content is not None:
        write_block(name, content, provenance)


def settings_of(command: str) -> dict[str, Any]:
    """The settings of a command of main.py that figures depend on, by the names of its variants.

    Data sets that overrides name are left out, since they need not be there.
    """
    parsed, found = arguments_of(command), {}
    overrides = [each for each in parsed.overrides if not each.startswith("dataset=")]
    for name, config in load_variants(ROOT / parsed.config, overrides).items():
        settings = asdict(config) | {"eval": config.eval.decisive()}
        del settings["report"]
        if not config.audit.enabled:
            del settings["audit"]
        if config.gcn.pretrained:
            settings["pretrained"] = hashlib.sha256(tracked_gcn().read_bytes()).hexdigest()
        found[name] = settings
    return found


def tuning_settings(name: str) -> dict[str, Any]:
    """What docs/<name>.yaml says, the rest as in the file that it is `like`."""
    own = yaml.safe_load((DOCS / f"{name}.yaml").read_text())
    if "like" not in own:
        return own
    base = tuning_settings(f"tuning_{own.pop('like')}")
    return base | own | {"candidates": base["candidates"] | own.get("candidates", {})}


def all_of_tuning(name: str) -> list[Any]:
    """The settings of a tuning, and of the config all but the hyperparameters that it tries, which it is to choose."""
    tuning = tuning_settings(name)
    methods = ", ".join(sorted({"mimu", *tuning["candidates"]}))
    overrides = ["gcn.pretrained=true", "audit.enabled=true", f"eval.methods=[{methods}]"]
    config = settings_of(shlex.join(["main.py", *overrides, *tuning.get("overrides", [])]))[""]
    for method, rounds in tuning["candidates"].items():
        for grid in rounds:
            for hyperparameter in grid:
                config["eval"]["hyperparameters"][method].pop(hyperparameter, None)
    return [tuning, config]


def tracked_gcn() -> Path:
    return ROOT / PRETRAINED.relative_to(PACKAGE)


def arguments_of(command: str) -> argparse.Namespace:
    """The options and overrides of a command of main.py."""
    return parse_arguments(shlex.split(command.partition("main.py")[2]))


@cache
def code_digest(path: Path) -> str:
    return digest(without_words(path.read_text()))


class WithoutDocstrings(ast.NodeTransformer):
    """Takes what stands for itself and does nothing out of code."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        return None if isinstance(node.value, ast.Constant) else node


def without_words(code: str) -> str:
    """Code without docstrings, comments and line breaks of its own."""
    return ast.unparse(WithoutDocstrings().visit(ast.parse(code)))  # unlike ast.dump the same in Python 3.11 and 3.13


def python(command: str) -> float:
    """Runs a command in the project, and returns the seconds that it took."""
    started = time.perf_counter()
    words = shlex.split(command.replace("torchrun", "-m torch.distributed.run", 1))
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True)
    return time.perf_counter() - started


def figures() -> dict[str, Any]:
    """What the last run took."""
    return json.loads((REPORTS / "run.json").read_text())


def run(command: str) -> str:
    """Runs main.py, and returns what to say of it: the command, and of a fresh run the seconds and the memory."""
    python(command)
    said = f"`uv run {command.replace(' --fresh', '')}`"
    if "--fresh" not in command:
        return said
    memory = f"{figures()['peak_bytes'] / 1e9:.1f} GB{' a process' if ON_TWO in command else ''}"
    return f"{said}, {figures()['total_seconds']:.0f} s, {memory}"


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


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("|")[1:-1]]


def cells(table: str) -> list[list[str]]:
    """The header and the rows of a table."""
    lines = table.strip().splitlines()
    return [cells_of(line) for line in lines[:1] + lines[2:]]


def rows_of(table: str, methods: Sequence[str]) -> str:
    """The table with the rows of these methods alone."""
    header, *rows = cells(table)
    return markdown_table(header, [row for row in rows if row[0] in methods])


def columns_of(table: str, columns: Sequence[str]) -> str:
    """The table with these columns alone."""
    header, *rows = cells(table)
    places = [header.index(column) for column in columns]

    def chosen(row: list[str]) -> list[str]:
        return [row[place] for place in places]

    return markdown_table(columns, map(chosen, rows))


def variant_tables() -> str:
    """What `reports/variants.md` says under its title."""
    return (REPORTS / "variants.md").read_text().partition("\n\n")[2].strip()


def by_script(commands: Sequence[str]) -> None:
    """A script writes its block itself."""
    python(commands[0])


def pretrained(commands: Sequence[str]) -> str:
    """What training a pretrained GCN takes; it takes the place of the tracked one."""
    seconds = python(commands[0])
    return f"It takes {seconds:.0f} s and {tracked_gcn().stat().st_size / 1000:.0f} KB."


def two_processes(commands: Sequence[str]) -> str:
    return f"On the same two cores: {run(commands[0])}."


def about_all_digits(commands: Sequence[str]) -> str:
    said = run(commands[0])
    about = section("Every method, kappa = auto")[0]
    return f"Ten digits, three classifiers (mean ± standard deviation over them), test split. {about} {said}"


def headline(commands: Sequence[str]) -> str:
    """The table of the README."""
    about = about_all_digits(commands)
    take_pictures(summary="summary_all_digits")
    gcn = [seconds for stage, seconds in figures()["seconds"].items() if stage.startswith("masking GCN")]
    table = columns_of(section("Every method, kappa = auto")[1], SHORT)
    return f"{about}; training the GCN takes {fmean(gcn):.0f} s of it for each classifier.\n\n{table}"


def all_digits(commands: Sequence[str]) -> str:
    parts = [f"{about_all_digits(commands)}.", *section("Every method, kappa = auto")[1:]]
    parts += ["Mask efficacy: only K = 2048 weights of the layer kept, scores on the class."]
    parts += [section("Mask efficacy, K = 2048")[1]]
    parts += ["Every kappa:", rows_of(section("Every kappa")[0], ["mimu", "saliency"])]
    return "\n\n".join(parts)


def coverage(commands: Sequence[str]) -> None:
    """As `by_script`, with the packages that the command names."""
    subprocess.run(["uv", "run", *shlex.split(commands[0])], cwd=ROOT, check=True)


def default(commands: Sequence[str]) -> str:
    fresh, again, tests, faults = commands
    run(fresh)
    take_pictures(score_forget_set="score_forget_set", score_retain_set="score_retain_set")
    took = figures()
    rows = [
        ["`uv run main.py`, wall time, s", f"{took['total_seconds']:.0f}"],
        ["the same again, nothing left to do, s", f"{python(again):.1f}"],
        ["`uv run main.py`, peak memory, GB", f"{took['peak_bytes'] / 1e9:.1f}"],
        ["`uv run pytest`, wall time, s", f"{python(tests):.0f}"],
        ["`uv run pytest -m faults`, wall time, s", f"{python(faults):.0f}"],
    ]
    return markdown_table(["what", "measured"], rows)


def benchmark(commands: Sequence[str]) -> str:
    done = subprocess.run([sys.executable, commands[0]], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout


def baselines(commands: Sequence[str]) -> str:
    """Every method beside retraining, on three classifiers; and what one classifier takes, in one process."""
    one, three = map(run, commands)
    parts = [f"One classifier: {one}. Here, three, by two processes with one thread each: {three}."]
    take_pictures(audits="audits", trade_off="trade_off")
    for heading in ("Distance to retraining", "Audits", "Cost", "The methods"):
        parts += [f"### {heading}", *section(heading)]
    return "\n\n".join(parts)


def published(commands: Sequence[str]) -> str:
    run(commands[0])
    columns = ["method", "kappa", FORGET_SCORE.name, RETAIN_SCORE.name]
    return columns_of(rows_of(section("Every kappa")[0], ["mimu", "published"]), columns)


def variants(commands: Sequence[str]) -> str:
    """The tables of the variants of a config."""
    said = run(commands[0])
    return f"{variant_tables()}\n\n{said}."


def variants_and_picture(commands: Sequence[str]) -> str:
    content = variants(commands)
    take_pictures(variants=arguments_of(commands[0]).config.stem)
    return content


def few(commands: Sequence[str]) -> str:
    """What few snapshots and few samples cost."""
    content = variants(commands)
    draw_few(variant_tables())
    return content


def cifar10(commands: Sequence[str]) -> str:
    """Every class and method in the field's form, and what another retrained classifier knows of two classes."""
    whole, others = commands
    said = run(whole)
    take_pictures(trade_off="cifar10")
    _, means, _, worst = section("Every method, kappa = auto")
    scores = {row[0]: row for row in cells(columns_of(means, SHORT))[1:]}
    worst_of, audits = ({row[0]: row[1:] for row in cells(table)} for table in (worst, section("Audits")[1]))
    seconds_of = {method: float(row[-1].split()[0]) for method, row in scores.items()}
    rows = []
    for method, (_, forget, retain, gap, seconds) in scores.items():
        worst_forget, worst_gap = worst_of[method]
        *left, _ = audits[method]  # no time of relearning, which the other table has
        share = f"{100 * seconds_of[method] / seconds_of['retrain']:.3g}"
        rows.append([method, forget, worst_forget, retain, gap, worst_gap, *left, seconds, share])
    worst_forget, worst_gap = "forget score, worst class", "against retrain, worst class"
    (name, forget, retain, gap, seconds), (*left, _) = SHORT, audits["method"]
    header = [name, forget, worst_forget, retain, gap, worst_gap, *left, seconds, "% of retraining"]
    again = run(others)
    beside = columns_of(section("Audits")[1], ("method", "IDI", "relearn time, steps"))
    return f"{markdown_table(header, rows)}\n\n{said}.\n\n{beside}\n\n{again}."


def erasure(commands: Sequence[str]) -> str:
    """What methods leave in the representation, and at what price."""
    said = run(commands[0])
    scores, representations = map(without_repeats, variant_tables().split("\n\n"))
    parts = [
        "Ten digits, test split; `MNIST`: three classifiers (mean ± standard deviation over them), the others: one. "
        "`MNIST` alone is mimu, its kappa chosen on the training split.",
        scores,
        "What is left: IDI of the representation and of the layer before it, 1 as in the original, 0 as after "
        "retraining; recall of the linear probe and of prototypes less that on the retrained classifier, points; and "
        "the steps of relearning from 1, 10 and 100 samples of every class, at most 60.",
        representations,
        f"{said}.",
    ]
    return "\n\n".join(parts)


def without_repeats(table: str) -> str:
    """The table of variants without mimu's rows but the first, where it stands in each and is the same in all."""
    header, *rows = cells(table)
    first = next(row for row in rows if ": " not in row[0])
    return markdown_table(header, [row for row in rows if row is first or ": " in row[0]])


def draw_few(table: str) -> None:
    """Draws the retain score over the samples that a request has."""
    header, *rows = cells(table)
    found = {row[0]: row for row in rows}

    def figure_of(variant: str, method: str, column: str) -> float:
        row = found[variant if method == "mimu" else f"{variant}: {method}"]
        mean = row[header.index(column)].partition(" ")[0]
        return math.nan if mean in ("", "–") else float(mean)

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    methods = "mimu", "saliency", "optimised_mask", "damp", "output_row"
    for method, style in method_styles(methods).items():
        if method not in methods:
            continue
        axes.plot([], [], label=method, **style)
        gaps = [figure_of(variant, method, RETAIN_GAP.name) for variant in SAMPLES.values()]
        axes.plot(list(SAMPLES), gaps, **style | {"marker": ""})
        for (count, variant), gap in zip(SAMPLES.items(), gaps):
            fill = "none" if figure_of(variant, method, FORGET_SCORE.name) > 1 else "full"
            axes.plot(count, gap, fillstyle=fill, **style)
    axes.set(xscale="log", xlabel="samples of every class (hollow: over 1 % left)")
    axes.set_yscale("symlog", linthresh=0.2)
    axes.set_ylabel(f"{RETAIN_GAP.name}\n(symmetric log scale)")
    axes.set_yticks((-1, -0.5, -0.2, -0.1, 0, 0.1, 0.2))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.axhline(0, color="0.6", linewidth=0.8, zorder=1)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    figure.savefig(DOCS / "few.png", dpi=150)


PRETRAIN = "configs/pretrain.yaml"
ALL_DIGITS, FEW = "--config configs/all_digits.yaml", "--config configs/few.yaml"
BASELINES, ERASURE = "--config configs/baselines.yaml", "--config configs/erasure.yaml"
NETWORKS = "--config configs/erasure_networks.yaml"
CIFAR10 = "--config configs/cifar10.yaml 'dataset=cifar10-images'"
TWO_CLASSES = (
    "'sweep.forget_digits=[airplane, cat]' 'eval.methods=[original, mimu, erase, retrain, retrain_again]' "
    "'audit.relearn_steps=100'"
)
THREE = "'sweep.seeds=[0, 1, 2]'"
BY_PRETRAINED = "main.py gcn.pretrained=true"
ERASING = "main.py audit.enabled=true 'eval.methods=[mimu, erase]'"
UNLEARN_CODE = [*CODE, "unlearning/*.py"]

# In this order: pretraining decides the figures of the others, and later blocks reuse what earlier ones have run.
MEASUREMENTS = {
    "pretrain": Measurement(pretrained, [f"main.py --pretrain --config {PRETRAIN}"], code=TRAINING_CODE),
    "default": Measurement(default, ["main.py --fresh", "main.py", "-m pytest -q", "-m pytest -q -m faults"]),
    "benchmark": Measurement(benchmark, ["tests/benchmark.py"], ["main.py", BY_PRETRAINED]),
    "two_processes": Measurement(two_processes, [f"{ON_TWO} --fresh {ALL_DIGITS}"]),
    "headline": Measurement(headline, [f"main.py --fresh {ALL_DIGITS}"]),
    "all_digits": Measurement(all_digits, [f"main.py {ALL_DIGITS}"]),
    "full_model": Measurement(variants, [f"{ON_TWO} --config configs/full_model.yaml"]),
    "published": Measurement(published, ["main.py --config configs/published.yaml"]),
    "few": Measurement(few, [f"{ON_TWO} {FEW}"]),
    "ablation": Measurement(variants_and_picture, [f"{ON_TWO} --config configs/ablation.yaml"]),
    "transfer": Measurement(variants_and_picture, [f"{ON_TWO} --config configs/transfer.yaml"]),
    "transfer_fashion": Measurement(variants_and_picture, [f"{ON_TWO} --config configs/transfer_fashion.yaml"]),
    "baselines": Measurement(baselines, [f"main.py --fresh {BASELINES}", f"{ON_TWO} --fresh {BASELINES} {THREE}"]),
    "erasure": Measurement(erasure, [f"{ON_TWO} --fresh {ERASURE}"]),
    "erasure_networks": Measurement(variants, [f"{ON_TWO} {NETWORKS}"]),
    "cnn": Measurement(variants, [f"{ON_TWO} --config configs/cnn.yaml"]),
    "vit": Measurement(variants, [f"{ON_TWO} --config configs/vit.yaml"]),
    "cifar10": Measurement(cifar10, [f"{ON_TWO} {CIFAR10}", f"{ON_TWO} {CIFAR10} {TWO_CLASSES}"]),
    "own_layers": Measurement(by_script, ["docs/own.py by_layer"], [BY_PRETRAINED], UNLEARN_CODE),
    "own_several": Measurement(by_script, ["docs/own.py several"], [BY_PRETRAINED], UNLEARN_CODE),
    "choice": Measurement(by_script, ["docs/own.py choice"], [BY_PRETRAINED, ERASING], UNLEARN_CODE),
    "own_networks": Measurement(by_script, ["docs/own.py networks"], [BY_PRETRAINED], UNLEARN_CODE),
    "own_kinds": Measurement(by_script, ["docs/own.py kinds"], [BY_PRETRAINED], UNLEARN_CODE),
    "own_few": Measurement(by_script, ["docs/own.py with_few_samples"], [BY_PRETRAINED], UNLEARN_CODE),
    "coverage": Measurement(coverage, ["--with timm --with transformers docs/coverage.py"], code=["networks/*.py"]),
    "bar": Measurement(by_script, ["docs/bar.py"], [ERASING]),
    "shadow": Measurement(by_script, ["docs/shadow.py"], [f"{BY_PRETRAINED} eval.methods=all"]),
    "scale": Measurement(by_script, ["docs/scale.py"], [BY_PRETRAINED, ERASING], UNLEARN_CODE),
    "tuning": Measurement(by_script, ["docs/tune.py"], ["docs/tuning.yaml"]),
    "tuning_erasure": Measurement(by_script, ["docs/tune.py erasure"], ["docs/tuning_erasure.yaml"]),
    "tuning_cnn": Measurement(by_script, ["docs/tune.py cnn"], ["docs/tuning_cnn.yaml"]),
    "tuning_resnet": Measurement(by_script, ["docs/tune.py resnet"], ["docs/tuning_resnet.yaml"]),
    "tuning_cifar10": Measurement(by_script, ["docs/tune.py cifar10"], ["docs/tuning_cifar10.yaml"]),
}
for each in MEASUREMENTS.values():
    each.sources()  # reads the code now, as scripts that import this file run it


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 where blocks are stale, or could not be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("blocks", nargs="*", help=", ".join(MEASUREMENTS))
    parser.add_argument("--stale", action="store_true", help="measure nothing, and say which blocks are stale")
    given = parser.parse_args(arguments)
    if odd := sorted(set(given.blocks).difference(MEASUREMENTS)):
        parser.error(f"{odd[0]} is no block: valid are {', '.join(MEASUREMENTS)}")
    if given.stale:
        found = [name for name in given.blocks or MEASUREMENTS if is_stale(name)]
        for name in found:
            print(f"{block(name).page.relative_to(ROOT)}: {name}")
        return 1 if found else 0
    failed = []
    for name in given.blocks or MEASUREMENTS:
        if name in given.blocks or is_stale(name):
            print(f"measuring {name}", flush=True)
            try:
                measure(name)
            except subprocess.CalledProcessError as error:
                failed.append(f"{name}: {error}")
    print("\n".join(failed), end="\n" if failed else "")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
