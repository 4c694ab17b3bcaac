"""A run takes what is there and matches, makes the rest, says which and why, and mixes nothing."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from runs import PROJECT, QUICK, SMOKE, checkpoint, files, metrics, replace_once, run, run_here

import artifacts
import pipeline
import plan
import visualization
from artifacts import ArtifactError, InputError
from config import load_variants
from data import DataError, ImageData, Split, load_image_data
from main import main
from plan import Artifacts, Guess, Plan, time_in_words
from reporter import METHOD_STYLES
from trainer import TrainingError

TINY = ("sweep.forget_digits=[3]", "sweep.kappa=[20]", "gcn.steps=2", "gcn.warmup=0", "eval.methods=[mimu, retrain]")


@pytest.fixture
def little_data(monkeypatch):
    """A few of the samples, so that a run takes no time."""
    data = load_image_data()
    little = ImageData(*(Split(split.images[:2000], split.labels[:2000]) for split in (data.train, data.test)))
    monkeypatch.setattr(pipeline, "load_image_data", lambda *arguments: little)


def configs(*overrides: str):
    return load_variants(PROJECT / SMOKE[1], ["eval.visualize=false", *overrides])


def plan_of(folder: Path, *overrides: str) -> Plan:
    return Plan(Artifacts(configs(*overrides), folder, torch.get_num_threads()))


def reasons(folder: Path, *overrides: str) -> dict[str, str]:
    """What a dry run says of every file, by the first words of its line."""
    lines = plan_of(folder, *TINY, *overrides).table()
    return {line.split(",")[0]: line.split(": ", 1)[1] for line in lines[:-1]} | {"sum": lines[-1]}


@pytest.fixture
def sources(tmp_path, monkeypatch) -> Path:
    """A copy of the code whose changes count as changes of the code."""
    folder = tmp_path / "sources"
    folder.mkdir()
    for path in PROJECT.glob("*.py"):
        shutil.copy(path, folder)
    for module in (plan, visualization):
        monkeypatch.setattr(module, "code_of", functools.partial(artifacts.code_of, root=folder))
    return folder


FILES = ("classifier", "activation graphs", "masking GCN", "experiments")


def test_a_change_makes_anew_what_depends_on_it_and_nothing_else(here, little_data, sources):
    everything = reasons(here)
    assert all(everything[name].removeprefix("1 ").startswith("not there yet, about ") for name in FILES)
    run_here(here, *TINY)
    finished = dict.fromkeys(FILES, "there") | {
        "experiments": "1 there",
        "sum": "1 of 1 experiments are there; nothing left to do",
    }
    assert reasons(here) == finished

    for file, change, made in (
        ("eval.py", "# a remark\n", ()),
        ("reporter.py", "x = 1\n", ()),  # reports are drawn in every run
        ("main.py", "x = 1\n", ()),
        *((f"{name}.py", "x = 1\n", ("experiments",)) for name in ("eval", "methods", "baselines", "audits")),
        *((f"{name}.py", "x = 1\n", FILES) for name in ("model", "trainer", "data", "artifacts", "pipeline")),
    ):
        source = (sources / file).read_text()
        (sources / file).write_text(source + change)
        said = reasons(here)
        assert {name for name in FILES if f"{file} changed" in said[name]} == set(made), (file, said)
        assert made or said == finished
        (sources / file).write_text(source)
    for setting, made in (
        ("gcn.steps=13", FILES[2:]),
        ("eval.step=16", FILES[3:]),
        ("eval.target=0.2", FILES[3:]),
        ("graphs.samples_per_class=99", FILES[1:]),
        ("classifier.epochs=2", FILES),
        ("threads=2", FILES),
        ("seed=1", FILES),
        ("report.dpi=51", ()),
        ("eval.hyperparameters.scrub.epochs=2", ()),  # of a method that does not run
        ("eval.audit.probe_steps=2", ()),
    ):
        said = reasons(here, setting)
        assert {name for name in FILES if said[name].removeprefix("1 ").startswith("not there yet")} == set(made), said
    assert reasons(here) == finished
    assert reasons(here, "sweep.kappa=[20, 30]")["experiments"].startswith("1 there, 1 not there yet, about")


def test_another_data_set_under_the_same_name_is_seen(here, little_data):
    raw = here / "datasets" / "MNIST" / "raw"
    run_here(here, *TINY)
    (here / "datasets" / "MNIST").unlink()
    raw.mkdir(parents=True)
    for path in (PROJECT / "datasets" / "MNIST" / "raw").glob("*ubyte"):
        shutil.copy(path, raw)  # unpacked alone is as good
    assert reasons(here)["experiments"] == "1 there"
    labels = raw / "t10k-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes()[:-1] + bytes([1]))
    assert all("data changed" in reasons(here)[name] for name in FILES)


def test_a_finished_run_computes_nothing_again(here, little_data, capsys):
    run_here(here, *TINY, "eval.visualize=true")
    before = files(here)
    capsys.readouterr()
    run_here(here, *TINY, "eval.visualize=true")
    output = capsys.readouterr().out
    assert "1 of 1 experiments are there; nothing left to do" in output and "classifier, " not in output
    after = files(here)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {"reports/run.json", "reports/run.log", ".lock"} and before.keys() == after.keys()


def test_a_colour_only_plots(here, little_data, sources, monkeypatch, capsys):
    settings = (*TINY, "eval.visualize=true")
    run_here(here, *settings)
    before = files(here)
    replace_once(sources / "reporter.py", '"mimu": {"color": "#0072B2"', '"mimu": {"color": "#0072B3"')
    monkeypatch.setitem(METHOD_STYLES["mimu"], "color", "#FF0000")
    monkeypatch.setattr(pipeline, "load_image_data", None)
    assert reasons(here, "eval.visualize=true")["experiments"].startswith("1 plots to draw, about")
    capsys.readouterr()
    run_here(here, *settings)
    assert "1 of 1 experiments are there; 0 to make (1 plots to draw), about " in capsys.readouterr().out
    after = files(here)
    changed = {Path(name).name for name in after if after[name] != before[name]}
    assert {"summary.png", "unlearning.png", "mask_efficacy.png", "weights.png"} < changed
    assert all(name.endswith(".png") for name in changed - {"run.json", "run.log", ".lock", "reporter.py"})
    (picture,) = here.glob("eval/*/plots/*/weights.png")
    picture.write_bytes(picture.read_bytes()[:-20])
    assert reasons(here, "eval.visualize=true")["experiments"].startswith("1 plots to draw")


def test_a_dry_run_writes_nothing(copy):
    before = files(copy)
    output = run(copy, *SMOKE, "--dry-run", "sweep.kappa=[20]")
    assert output.splitlines()[-1].startswith("0 of 2 experiments are there; 2 to make, about ")
    assert files(copy) == before


def test_configs_do_not_write_over_one_another(here, little_data):
    run_here(here, *TINY)
    first = files(here)
    run_here(here, *TINY, "eval.step=7")
    both = files(here)
    for name in first:
        if name.startswith(("checkpoints", "datasets", "eval")):
            assert both[name] == first[name]
    assert len(metrics(here)) == 2 and len(list(here.glob("checkpoints/*"))) == 2, "the step is of the evaluation only"
    run_here(here, *TINY)
    assert {name: content for name, content in files(here).items() if "run." not in name and name != ".lock"} == {
        name: first.get(name, content) for name, content in both.items() if "run." not in name and name != ".lock"
    }, "the reports are those of the first again"


def test_reports_of_another_config_do_not_stay_beside(here, little_data):
    run_here(here, *TINY, "sweep.forget_digits=[3, 4]", "sweep.top_k=[64, 128]")
    for own in ("mine.md", "first_try/summary.png", "variants/mine.md"):
        (here / "reports" / own).parent.mkdir(exist_ok=True)
        (here / "reports" / own).write_text("mine")
    (here / "reports" / "trade_off.png").symlink_to("nowhere")
    assert (here / "reports" / "top_k_64" / "masks.png").exists()
    run_here(here, *TINY)
    names = {str(path.relative_to(here / "reports")) for path in (here / "reports").rglob("*")}
    assert "masks.png" not in names and not any(name.startswith("top_k") for name in names)
    assert {"mine.md", "first_try/summary.png", "variants/mine.md", "summary.md", "score_forget_set.png"} < names


def test_fresh_makes_all_anew(here, little_data, capsys):
    run_here(here, *TINY)
    before = metrics(here)
    (path,) = here.glob("checkpoints/gcn_*")
    made_at = path.stat().st_mtime_ns
    mine = here / "checkpoints" / "gcn_of_mine.pt"
    mine.write_text("mine")
    pipeline.run(configs(*TINY), here, is_fresh=True)
    assert "0 of 1 experiments are there; 1 to make" in capsys.readouterr().out
    assert path.stat().st_mtime_ns > made_at and metrics(here) == before and mine.read_text() == "mine"


def test_fresh_removes_nothing_where_the_data_cannot_be_read(here, little_data, monkeypatch):
    run_here(here, *TINY)
    before = files(here)

    def damaged(*arguments):
        raise DataError("damaged")

    monkeypatch.setattr(pipeline, "load_image_data", damaged)
    with pytest.raises(DataError):
        pipeline.run(configs(*TINY), here, is_fresh=True)
    assert {name for name in before if files(here)[name] != before[name]} <= {".lock", "reports/run.log"}


def test_what_pretraining_leaves_is_what_a_run_would_make(here, little_data, tmp_path):
    pipeline.pretrain(configs(*TINY, "threads=1"), here)
    pretrained = checkpoint(here, "classifier_seed_0")
    shutil.rmtree(here / "checkpoints")
    run_here(here, *TINY, "threads=1")
    made = checkpoint(here, "classifier_seed_0")
    assert made["made_by"] == pretrained["made_by"]
    assert all(torch.equal(made["state_dict"][name], weight) for name, weight in pretrained["state_dict"].items())


def test_an_output_that_nobody_reads_does_not_stop_a_run(copy):
    done = subprocess.run(
        f"{sys.executable} main.py {' '.join(SMOKE + QUICK)} sweep.kappa=[20] > /dev/full",
        shell=True,
        cwd=copy,
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in done.stderr and len(metrics(copy)) == 1


def test_variants_that_share_a_gcn_train_it_once(here, little_data, capsys):
    more = {"other step": configs(*TINY, "eval.step=7")[""], "as it is": configs(*TINY)[""]}
    pipeline.run(more, here)
    output = capsys.readouterr().out
    assert (
        output.count("\nmasking GCN, other step") == 1 and "masking GCN, as it is, seed 0, top-K 128: reused" in output
    )
    assert len(list(here.glob("checkpoints/gcn_*"))) == 1 and len(metrics(here)) == 2


def test_what_is_missing_or_damaged_is_made_again(here, little_data):
    run_here(here, *TINY)
    before = {str(path.relative_to(here)): path.read_bytes() for path in here.rglob("*.pt")}
    results = metrics(here)
    for index, name in enumerate(before):
        (here / name).write_bytes(before[name][:-9]) if index % 2 else (here / name).unlink()
        assert len(plan_of(here, *TINY).to_do) == 1
        run_here(here, *TINY)
        assert artifacts.load(here / name) and metrics(here) == results
        assert not plan_of(here, *TINY).to_do


def test_a_checkpoint_of_other_shapes_is_not_taken(here, little_data):
    run_here(here, *TINY)
    results = metrics(here)
    (path,) = here.glob("checkpoints/classifier_*")
    wrong = artifacts.load(path)
    wrong["state_dict"]["layers.0.weight"] = torch.zeros(3, 784)
    artifacts.save(path, wrong)
    shutil.rmtree(here / "eval")
    run_here(here, *TINY)
    assert metrics(here) == results
    assert checkpoint(here, "classifier_seed_0")["state_dict"]["layers.0.weight"].shape == (32, 784)


def test_reports_are_of_whole_classifiers_or_of_the_digits_so_far(here, little_data):
    settings = (*TINY, "sweep.forget_digits=[3, 4, 5]", "sweep.seeds=[0, 1]")
    run_here(here, *settings)
    artifacts_of = Artifacts(configs(*settings), here, torch.get_num_threads())

    def shown() -> list[tuple[int, int]]:
        return [
            (training.seed, json.loads(path.read_text())["forget_digit"])
            for training, paths in artifacts_of.reportable()
            for path in paths
        ]

    assert shown() == [(seed, digit) for seed in (0, 1) for digit in (3, 4, 5)]
    (path,) = here.glob("eval/*/metrics/seed_1_digit_4*")
    path.unlink()
    assert shown() == [(0, 3), (0, 4), (0, 5)]
    (path,) = here.glob("eval/*/metrics/seed_0_digit_5*")
    path.unlink()
    assert shown() == [(0, 3), (0, 4)]
    shutil.rmtree(here / "reports")
    pipeline.plot(configs(*settings), here)
    assert "# Forgetting 3, 4" in (here / "reports" / "summary.md").read_text()


def test_reports_are_drawn_while_experiments_go_on(here, little_data, monkeypatch):
    drawn = []
    draw = pipeline.report
    monkeypatch.setattr(pipeline, "report", lambda results, folder: drawn.append(results) or draw(results, folder))
    create = pipeline.Run.__init__

    def long_ago(self, *arguments):
        create(self, *arguments)
        self._reported = -1e9

    monkeypatch.setattr(pipeline.Run, "__init__", long_ago)
    run_here(here, *TINY, "sweep.forget_digits=[3, 4, 5]")
    assert [sum(len(paths) for _, paths in results) for results in drawn] == [1, 3], "then not again for a while"


def test_a_report_that_fails_midway_does_not_stop_the_experiments(here, little_data, monkeypatch, capsys):
    def fail(results, folder):
        raise RuntimeError("no picture")

    monkeypatch.setattr(pipeline, "report", fail)
    stages = pipeline.Run(here, pipeline.Processes(torch.device("cpu")), Artifacts(configs(*TINY), here, 1))
    stages._reported = -1e9
    stages.report_so_far()
    assert "reports so far: no picture" in capsys.readouterr().out
    with pytest.raises(RuntimeError):
        run_here(here, *TINY)
    assert len(metrics(here)) == 1


def test_metrics_of_another_number_of_threads_are_plotted_those_of_the_latest(here, little_data, monkeypatch):
    drawn = []
    draw = pipeline.report
    monkeypatch.setattr(pipeline, "report", lambda results, folder: drawn.append(results) or draw(results, folder))
    own = torch.get_num_threads()
    for threads in (own + 1, own, own + 2):
        torch.set_num_threads(threads)
        try:
            pipeline.run(configs(*TINY, "threads=null"), here)
        finally:
            torch.set_num_threads(own)
        pipeline.plot(configs(*TINY, "threads=null"), here)
        (((_, (path,)),),) = drawn[-1:]
        assert json.loads(path.read_text())["made_by"]["settings"]["threads"] == threads


def test_json_changed_by_hand_is_not_plotted_and_not_reused(here, little_data):
    run_here(here, *TINY)
    results = metrics(here)
    (path,) = here.glob("eval/*/metrics/*.json")
    text = path.read_text()
    score = f'"score": {json.loads(text)["unlearning_metrics"]["mimu"]["score"]}'
    assert score in text
    path.write_text(text.replace(score, '"score": 0.125'))
    with pytest.raises(ArtifactError, match="is damaged or something else .it was changed after it was written"):
        pipeline.plot(configs(*TINY), here)
    assert "1 damaged" in plan_of(here, *TINY).summary()
    run_here(here, *TINY)
    assert metrics(here) == results


def test_the_estimate_follows_what_was_measured_here(here, little_data):
    untouched = plan_of(here, *TINY, "sweep.forget_digits=[3, 4]")
    assert untouched.to_do and all(work.seconds > 0 for work in untouched.to_do)
    run_here(here, *TINY)
    (path,) = here.glob("eval/*/metrics/*.json")
    took = json.loads(path.read_text())["seconds"]["experiment"]
    (config,) = configs(*TINY).values()
    assert Guess(here).experiment(config, 1) == took
    path.write_text("no JSON")
    assert Guess(here).experiment(config, 1) != took
    (audited,) = configs("eval.audit.enabled=true").values()
    (plain,) = configs().values()
    assert Guess(here).experiment(audited, 3) > Guess(here).experiment(plain, 3)


@pytest.mark.parametrize("seconds, words", [(0.4, "0 s"), (99, "99 s"), (150, "2 min"), (7200, "2.0 h")])
def test_times_are_said_in_words(seconds, words):
    assert time_in_words(seconds) == words


def test_a_log_has_all_that_was_said_with_the_time(here, little_data, capsys):
    run_here(here, *TINY)
    said = [
        line
        for line in capsys.readouterr().out.splitlines()
        if line.startswith(("0 of 1", "classifier, seed 0: 0", "mask"))
    ]
    log = (here / "reports" / "run.log").read_text()
    assert len(said) == 3 and all(line in log for line in said)
    assert all(time.strptime(line[:19], "%Y-%m-%d %H:%M:%S") for line in log.splitlines())
    assert f"torch {torch.__version__}" in log.splitlines()[0]


def test_a_log_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "reports").write_text("a file")
    log = pipeline.Log(tmp_path, pipeline.Processes(torch.device("cpu")))
    with pytest.raises(ArtifactError, match="run.log: cannot be written"):
        log.note("something")


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_says_how_to_go_on(copy, number, status):
    process = subprocess.Popen(
        [sys.executable, "main.py", *SMOKE, "--fresh"],
        cwd=copy,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # in the background, shells ignore it
    )
    for line in process.stdout:
        if "digit 3" in line:
            break
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == status
    assert said.strip() == (
        "stopped: all that is finished stays, and the same command without --fresh goes on from there"
    )
    assert "3 of 6 experiments are there" in run(copy, *SMOKE, "--dry-run")


def test_a_full_disk_is_one_line(copy):
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)); import main;"
        "sys.exit(main.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, *SMOKE, *QUICK]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {copy}/datasets/Graphs/seed_0_") and len(done.stderr.splitlines()) == 1
    assert "cannot be written (File too large)" in done.stderr and not list(copy.rglob("*.mimu-partial"))
    assert "classifier, seed 0: reused" in run(copy, *SMOKE, *QUICK)


def test_a_second_run_stops_and_names_the_first(here, little_data):
    with artifacts.locked(here):
        code = (
            "import sys, pipeline; from pathlib import Path; from config import load_variants;"
            f"pipeline.run(load_variants(Path('{PROJECT / SMOKE[1]}')), Path('{here}'))"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    assert f"is held by another run (process {os.getpid()} on" in done.stderr
    assert not (here / "checkpoints").exists()


def test_clean_refuses_while_a_run_works(clone):
    with artifacts.locked(clone):
        done = subprocess.run(["bash", str(clone / "clean.sh")], capture_output=True, text=True)
        assert done.returncode == 2 and f"a run works here: process {os.getpid()}" in done.stderr
    subprocess.run(["bash", str(clone / "clean.sh")], check=True)
    assert not (clone / ".lock").exists()


def tell(monkeypatch, capsys, error: Exception, *options: str) -> tuple[int, str]:
    def fail(*arguments, **keywords):
        raise error

    monkeypatch.chdir(PROJECT)
    monkeypatch.setattr(pipeline, "run", fail)
    status = main([*SMOKE, *options])
    return status, capsys.readouterr().err


@pytest.mark.parametrize(
    "error, status, line",
    [
        (DataError("no data"), 2, "error: no data"),
        (TrainingError("loss is nan"), 2, "error: loss is nan"),
        (InputError("this"), 2, "error: this"),
        (OSError(28, "No space left on device", "file.png"), 2, "error: file.png: No space left on device"),
        (OSError("odd"), 2, "error: a file: odd"),
        (KeyError("x"), 1, "error: KeyError: 'x' (test_plan.py, line "),
        (RuntimeError("a\nb"), 1, "error: RuntimeError: a b (test_plan.py, line "),
    ],
)
def test_every_error_is_one_line(monkeypatch, capsys, error, status, line):
    noted = []
    monkeypatch.setattr("main.note", noted.append)
    returned, said = tell(monkeypatch, capsys, error)
    assert returned == status and said.startswith(line) and len(said.splitlines()) == 1
    assert len(noted) == (status == 1) and all("Traceback (most recent call last)" in text for text in noted)
    with pytest.raises(type(error)):
        tell(monkeypatch, capsys, error, "--debug")


@pytest.mark.parametrize("options", [("--pretrain", "--plot-only"), ("--dry-run", "--fresh")])
def test_options_that_exclude_one_another_are_refused(options, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*options])
    assert stopped.value.code == 2 and "not allowed with argument" in capsys.readouterr().err


def test_a_file_of_a_training_that_is_not_taken_is_named_with_the_reason(here, little_data, capsys):
    run_here(here, *TINY)
    (path,) = here.glob("checkpoints/classifier_*")
    path.write_bytes(b"no checkpoint")
    capsys.readouterr()
    run_here(here, *TINY)
    assert "classifier, seed 0: damaged, made anew" in capsys.readouterr().out


def test_a_dry_run_says_which_data_set_is_not_there(here, capsys):
    pipeline.dry_run(configs("dataset=FashionMNIST"), here)
    assert capsys.readouterr().out.startswith("data, FashionMNIST: to be downloaded\n")


def test_options_that_need_one_process_say_so(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for option, call in (("--dry-run", pipeline.dry_run), ("--plot-only", pipeline.plot)):
        with pytest.raises(TrainingError, match=f"{option} runs in one process: start it without torchrun"):
            call(configs())
