"""The command that compares methods: which jobs it runs and runs again, and what it refuses."""

import csv
import json
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from launch import compare
from tests.unit.studies.test_comparison import CONFIG, LOSS, TWO, finish
from ubsmoe_ds.config.loading import load_experiment
from ubsmoe_ds.config.methods import ABLATIONS, PRESETS
from ubsmoe_ds.studies.comparison_jobs import Runner, run_job


@pytest.fixture(autouse=True)
def _quick_pictures(request, monkeypatch):
    """Leave drawing to one test: what pictures show is tested in test_comparison.py."""
    if request.function is not test_all_jobs_and_files:
        monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: Path(path).write_bytes(b"a picture"))


class FakeRunner:
    """Stand-in for `run_job`: finishes at once, or ends with the exit code given for a job's name."""

    def __init__(self, **codes: int) -> None:
        self.codes, self.ran = codes, []

    def __call__(self, command: list[str], log: Path) -> int:
        assert command[:3] == [sys.executable, str(Path(compare.__file__).with_name("train.py")), "--config"]
        assert command[-2:] == ["--resume", "auto"]
        exp = load_experiment(command[3], command[4:-2])
        assert exp.overwrite and log == exp.run_dir.with_name(f"{exp.name}.log")
        self.ran.append(exp.name)
        code = self.codes.get(exp.name.replace("-", "_"), 0)
        if code == 0:
            finish(exp, LOSS.get(exp.method, (0.6, 0.6, 0.6))[exp.seed])
        return code


def compare_tiny(out: Path, runner: Runner, *more: str, methods: str = "topk", seeds: str = "0") -> int:
    """Run the command with two clients and two rounds."""
    arguments = ["--config", CONFIG, "--methods", *methods.split(), "--seeds", *seeds.split(), "--out", str(out)]
    return compare.main([*arguments, TWO, "train.rounds=2", *more], runner)


def test_all_jobs_and_files(tmp_path, capsys):
    runner = FakeRunner()
    assert compare_tiny(tmp_path, runner, "--ablate", methods="all", seeds="0 2") == 0
    labels = [*PRESETS, *ABLATIONS]
    assert runner.ran == [f"{label}-seed{seed}" for seed in (0, 2) for label in labels]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(runner.ran) + 1
    assert lines[1].startswith("[ 2/24] topk") and "eval loss 0.2500  accuracy  75.0 %  ETA 0:00:0" in lines[1]
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert list(dict.fromkeys((row["method"], row["seed"]) for row in rows)) == [(m, s) for s in "02" for m in labels]
    assert len(list(csv.DictReader((tmp_path / "rounds.csv").open()))) == len(runner.ran) * 3  # rounds 0 to 2
    headline = (tmp_path / "results.md").read_text().splitlines()[0]
    assert headline.startswith(f"`python launch/compare.py --config {CONFIG} --methods all")
    assert headline.endswith("; seeds 0 2")
    for name in ("comparison.png", "ablation.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG") and (tmp_path / name).stat().st_size > 10_000


def test_some_methods_and_some_ablations(tmp_path):
    runner = FakeRunner()
    assert compare_tiny(tmp_path, runner, methods="topk ub_smoe-no_pg ub_smoe") == 0
    assert runner.ran == ["topk-seed0", "ub_smoe-no_pg-seed0", "ub_smoe-seed0"]
    assert {path.name for path in tmp_path.glob("*.png")} == {"comparison.png", "ablation.png"}
    assert compare_tiny(tmp_path / "one", FakeRunner(), methods="ub_smoe-no_dmr") == 0
    assert {path.name for path in (tmp_path / "one").glob("*.png")} == {"ablation.png"}


def test_experiment_of_each_job(tmp_path):
    """Overrides reach every job, but not the keys that make an ablation what it is."""
    arguments = ["--config", CONFIG, "--out", str(tmp_path), "--seeds", "5", "--ablate"]
    jobs = compare.read_jobs(compare.parse([*arguments, "lora.alpha=3.0", "dmr.enabled=true", "dmr.zeta=0.25"]))
    of = {job.run.method: job.run.exp for job in jobs}
    assert all((exp.lora.alpha, exp.dmr.zeta, exp.seed) == (3.0, 0.25, 5) for exp in of.values())
    expected = {name: name for name in PRESETS} | {name: "ub_smoe" for name in ABLATIONS}
    assert {label: exp.method for label, exp in of.items()} == expected

    def parts(label: str) -> tuple[bool, bool]:
        exp = of[label]
        return exp.dmr.enabled, exp.pseudo_gradient.estimator != "none"

    assert parts("ub_smoe") == (True, True) and parts("ub_smoe-no_dmr") == (False, True)
    assert parts("topk") == (True, False)  # as asked for, and as the notes say
    assert parts("ub_smoe-no_pg") == (True, False)


def test_labels_with_other_keys_than_their_preset_are_noted(tmp_path, capsys):
    assert compare_tiny(tmp_path, FakeRunner(), "dmr.enabled=true", methods="ub_smoe topk") == 0
    note = "`topk` here has dmr.enabled=True (not False)"
    assert capsys.readouterr().err == f"note: {note}\n"
    assert (tmp_path / "results.md").read_text().splitlines()[2] == note


def test_finished_jobs_are_not_run_again(tmp_path, capsys):
    assert compare_tiny(tmp_path, FakeRunner(), methods="topk ub_smoe", seeds="0 1") == 0
    results = (tmp_path / "results.csv").read_text()
    torn = tmp_path / "runs" / "topk-seed1" / "summary.json"
    torn.write_text(torn.read_text()[:-9])
    runner = FakeRunner()
    assert compare_tiny(tmp_path, runner, methods="topk ub_smoe", seeds="0 1") == 0
    assert runner.ran == ["topk-seed1"] and capsys.readouterr().out.count("done before") == 3
    assert (tmp_path / "results.csv").read_text() == results
    # another path to the same folder is the same folder
    assert compare_tiny(tmp_path / "runs" / "..", runner, methods="topk ub_smoe", seeds="0 1") == 0
    assert runner.ran == ["topk-seed1"]


def in_tables(out: Path) -> list[tuple[str, str]]:
    """Return (method, seed) of the runs in a folder's table, in its order."""
    rows = csv.DictReader((out / "results.csv").open())
    return list(dict.fromkeys((row["method"], row["seed"]) for row in rows))


def test_other_methods_and_seeds_in_the_same_folder_add_to_the_tables(tmp_path, capsys):
    assert compare_tiny(tmp_path, FakeRunner(), methods="ub_smoe flora", seeds="0 1") == 0
    assert capsys.readouterr().err == ""
    runner = FakeRunner()
    assert compare_tiny(tmp_path, runner, methods="topk", seeds="2") == 0 and runner.ran == ["topk-seed2"]
    names = "ub_smoe-seed0, ub_smoe-seed1, flora-seed0, flora-seed1"
    told = f"also in the tables, from earlier commands: {names}"
    assert capsys.readouterr().err == f"note: {told}\n"
    assert in_tables(tmp_path) == [("topk", "2"), *((m, s) for m in ("ub_smoe", "flora") for s in "01")]
    lines = (tmp_path / "results.md").read_text().splitlines()
    assert "--methods topk --seeds 2 " in lines[0] and lines[0].endswith("; seeds 0 1 2")
    assert lines[2] == told and sum(line.startswith("| `topk` | 0.5000 (n = 1) |") for line in lines) == 1
    assert sum(line.startswith("| `ub_smoe` | 0.3300 ± 0.0566 (n = 2) |") for line in lines) == 1  # of 0.29 0.37


def test_earlier_runs_of_another_comparison_are_left_out_and_named(tmp_path, capsys):
    """Another config, other weights, damaged files. A run that is not finished has no place in a table anyway."""
    assert compare_tiny(tmp_path, FakeRunner(), "train.local_steps=7", methods="flora florist", seeds="0") == 0
    assert compare_tiny(tmp_path, FakeRunner(), methods="flame a3smoe smoe_llb", seeds="0") == 0
    runs = tmp_path / "runs"
    weights = runs / "flame-seed0" / "summary.json"
    weights.write_text(json.dumps(json.loads(weights.read_text()) | {"model_digest": "0", "data_digest": "0"}))
    (runs / "a3smoe-seed0" / "metrics.jsonl").write_text("")
    (runs / "smoe_llb-seed0" / "summary.json").unlink()
    (runs / "topk-seed01").mkdir()  # no name that a job has
    (runs / "topk-seed01" / "summary.json").write_text(weights.read_text())
    capsys.readouterr()
    assert compare_tiny(tmp_path, FakeRunner(), methods="topk") == 0
    told = [
        "left out of the tables: a3smoe-seed0 (their files are damaged)",
        "left out of the tables: flame-seed0 (made with other weights than there are now)",
        "left out of the tables: flora-seed0, florist-seed0 (made with train.local_steps=7, this command has 10)",
    ]
    assert capsys.readouterr().err == "".join(f"note: {line}\n" for line in told)
    assert in_tables(tmp_path) == [("topk", "0")]
    assert (tmp_path / "results.md").read_text().splitlines()[2:7:2] == told


def test_earlier_runs_whose_method_does_not_go_with_this_config_are_left_out(tmp_path, capsys):
    assert compare_tiny(tmp_path, FakeRunner(), methods="flora") == 0
    assert compare_tiny(tmp_path, FakeRunner(), "merge.clip_norm=1.0", methods="topk") == 0
    assert "left out of the tables: flora-seed0 (merge.clip_norm: 1.0 does not work" in capsys.readouterr().err
    assert in_tables(tmp_path) == [("topk", "0")]


def test_finished_job_of_another_config_is_refused(tmp_path, capsys):
    assert compare_tiny(tmp_path, FakeRunner(), seeds="1") == 0
    before = (tmp_path / "results.csv").read_text()
    runner = FakeRunner()
    assert compare_tiny(tmp_path, runner, "train.local_steps=7", seeds="0 1") == 2
    assert runner.ran == [] and (tmp_path / "results.csv").read_text() == before
    error = capsys.readouterr().err
    assert error == (
        f"error: out: {tmp_path}/runs/topk-seed1 holds a finished run with train.local_steps=10, but this command asks "
        "for 7; remove the folder or choose another --out\n"
    )


def test_unfinished_job_of_another_config_is_refused_and_kept(tmp_path, capsys):
    """Only a run with a checkpoint is refused; without one nothing is lost by starting again."""
    assert compare_tiny(tmp_path, FakeRunner(), seeds="0 1") == 0
    folders = [tmp_path / "runs" / f"topk-seed{seed}" for seed in (0, 1)]
    for folder in folders:
        (folder / "summary.json").unlink()
    saved = folders[1] / "checkpoints" / "000001-round-1"
    saved.mkdir(parents=True)
    assert compare_tiny(tmp_path, FakeRunner(), "train.local_steps=7", seeds="0 1") == 2
    assert (
        f"{folders[1]} holds an unfinished run with train.local_steps=10, but this command asks for 7"
        in capsys.readouterr().err
    )
    assert saved.exists()
    runner = FakeRunner()
    assert compare_tiny(tmp_path, runner, seeds="0 1") == 0 and runner.ran == ["topk-seed0", "topk-seed1"]


def test_failing_job_ends_the_comparison_with_its_exit_code(tmp_path, capsys):
    runner = FakeRunner(topk_seed1=7)
    assert compare_tiny(tmp_path, runner, methods="topk ub_smoe", seeds="0 1") == 7
    assert runner.ran == ["topk-seed0", "ub_smoe-seed0", "topk-seed1"]
    error = capsys.readouterr().err
    assert error == f"error: job topk-seed1 ended with exit code 7; see {tmp_path}/runs/topk-seed1.log\n"
    assert not (tmp_path / "results.csv").exists()
    again = FakeRunner()
    assert compare_tiny(tmp_path, again, methods="topk ub_smoe", seeds="0 1") == 0
    assert again.ran == ["topk-seed1", "ub_smoe-seed1"]


def test_one_job_of_the_list(tmp_path, capsys):
    """As in slurm/compare.sbatch: nothing is written for the other jobs, and no results."""
    assert compare_tiny(tmp_path / "out", FakeRunner(), "--list", methods="topk ub_smoe", seeds="0 1") == 0
    names = capsys.readouterr().out.split()
    assert names == ["topk-seed0", "ub_smoe-seed0", "topk-seed1", "ub_smoe-seed1"] and not (tmp_path / "out").exists()
    for number in (4, 2):
        runner = FakeRunner()
        assert compare_tiny(tmp_path, runner, "--only", str(number), methods="topk ub_smoe", seeds="0 1") == 0
        assert runner.ran == [names[number - 1]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]
    runner = FakeRunner()
    assert compare_tiny(tmp_path, runner, methods="topk ub_smoe", seeds="0 1") == 0
    assert runner.ran == [names[0], names[2]] and (tmp_path / "results.csv").exists()


def test_job_that_leaves_no_summary_has_failed(tmp_path, capsys):
    assert compare_tiny(tmp_path, lambda command, log: 0) == 1
    assert "topk-seed0 ended with exit code 0 but without a summary.json" in capsys.readouterr().err


def test_interruption_is_one_line(tmp_path, capsys):
    def interrupted(command, log):
        raise KeyboardInterrupt

    assert compare_tiny(tmp_path, interrupted) == 130
    error = capsys.readouterr().err
    assert error.startswith("error: interrupted") and error.count("\n") == 1


BAD = {
    "method": (["--methods", "topk", "top"], "methods: 'top' is not a method; use all, or some of ub_smoe, topk"),
    "override among methods": (["--methods", "topk", "train.rounds=1"], "methods: 'train.rounds=1' is not a method"),
    "no methods": (["--methods"], "methods: none given"),
    "seed": (["--seeds", "0", "x"], "seeds: 'x' is no seed"),
    "negative seed": (["--seeds", "-1"], "seeds: '-1' is no seed"),
    "large seed": (["--seeds", "0", "9999999999"], "seed: 9999999999 is not valid"),
    "repeated seed": (["--seeds", "1", "2", "01"], "seeds: '1 2 01' must name at least one seed, and none twice"),
    "no seeds": (["--seeds"], "seeds: '' must name"),
    "config": (["--config", "none.yaml"], "none.yaml: cannot be read"),
    "override": (["train.epochs=3"], "train.epochs: unknown key"),
    "job 0": (["--only", "0"], "argument --only: 0 must be 1 to"),
    "job beyond the list": (["--methods", "topk", "--only", "4"], "--only: 4, but there are 3 jobs; use 1 to 3"),
    "own key": (["seed=3"], "override 'seed=3': differs from job to job; use --methods, --seeds and --out"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_one_line_and_nothing_runs(name, tmp_path, capsys):
    arguments, message = BAD[name]
    runner, out = FakeRunner(), tmp_path / "out"
    assert compare.main(["--out", str(out), *arguments], runner) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: " + message) and error.count("\n") == 1
    assert runner.ran == [] and not out.exists()


def test_out_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "out").write_text("a file")
    runner = FakeRunner()
    assert compare_tiny(tmp_path / "out", runner) == 2 and runner.ran == []
    assert "cannot be written" in capsys.readouterr().err


def test_job_runs_outside_of_any_mpi_world(tmp_path, monkeypatch):
    job_variables = ("PMI_RANK", "PMI_FD", "OMPI_COMM_WORLD_SIZE", "MASTER_PORT", "UBSMOE_DS_PARENT_SPEAKS")
    for name in (*job_variables, "UCX_LOG_LEVEL"):
        monkeypatch.setenv(name, "1")
    show = "import os, sys; print(*sorted(os.environ)); print('problem', file=sys.stderr); sys.exit(3)"
    log = tmp_path / "job.log"
    assert run_job([sys.executable, "-c", show], log) == 3
    names, problem = log.read_text().splitlines()
    assert problem == "problem" and "UCX_LOG_LEVEL" in names.split()
    assert not set(job_variables) & set(names.split())
    assert run_job([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], log) == 128 + 9
