"""Jobs are asked to stop, killed, damaged, late or given nonsense; real processes and real signals."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.support.jobs import OWN_SERVER, TRAIN, TWO_CLIENTS, Job, records, small_model, train
from ubsmoe_ds.adapters.adapter import read_adapter
from ubsmoe_ds.mpi.preemption import SAME_SIGNAL_SECONDS

SHORT = ["train.rounds=3", "train.local_steps=4", "data.rows=200", "data.eval_rows=12", "deepspeed.train_batch_size=4"]
SHORT += [TWO_CLIENTS, small_model()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Run a job undisturbed; return its folder."""
    out = tmp_path_factory.mktemp("whole")
    code, output = train(*SHORT, f"output={out}", "checkpoint.keep=3")
    assert code == 0, output
    return out / "tiny"


def same_as(whole, folder) -> None:
    """Check that both runs have the same metrics and the same adapter, to the bit."""
    assert [r["metrics"] for r in records(folder)] == [r["metrics"] for r in records(whole)]
    first, second = (read_adapter(path / "adapter") for path in (whole, folder))
    assert first.facts | {"run_id": ""} == second.facts | {"run_id": ""} and first.state.keys() == second.state.keys()
    assert all(torch.equal(value, second.state[key]) for key, value in first.state.items())


@pytest.mark.parametrize(
    "how",
    [
        "SIGTERM to the command",
        pytest.param("SIGTERM to the command while a rank is stopped", marks=pytest.mark.extended),
        pytest.param("SIGKILL to the command", marks=pytest.mark.extended),
    ],
)
def test_asked_to_stop_it_saves_and_the_next_job_goes_on(how, whole, tmp_path):
    command = [sys.executable, "tests/support/failing_train.py", *SHORT, f"output={tmp_path}", "overwrite=false"]
    job = Job(command, tmp_path / "log", UBSMOE_DS_FAULT="slow@1:1", **OWN_SERVER)
    job.wait_for("round   1/3")
    time.sleep(0.3)
    if how.startswith("SIGTERM to the command"):
        if how.endswith("stopped"):
            os.kill(job.rank_pids()[2], signal.SIGSTOP)
        job.process.terminate()
    else:  # the command says nothing more, but mpiexec asks the ranks to stop
        job.process.kill()
    assert job.end(60) == (-9 if how.startswith("SIGKILL") else 75), job.output
    last = [line for line in job.output.splitlines() if line.strip()][-1]
    assert last.startswith("stopped in round 2 of 3, saved to") and last.endswith("continue with --resume auto")
    assert "Abort" not in job.output and "error" not in job.output
    assert [r["round"] for r in records(tmp_path / "tiny")] == [0, 1]
    code, output = train(*SHORT, f"output={tmp_path}", "overwrite=false", "--resume", "auto")
    assert code == 0 and "resumed from" in output, output
    same_as(whole, tmp_path / "tiny")


@pytest.mark.extended
@pytest.mark.parametrize("how", ["a second signal", "the grace time"])
def test_an_end_at_once_leaves_what_was_saved_before(how, whole, tmp_path):
    """A rank hangs, so the job never reaches a step boundary."""
    grace = [] if how == "a second signal" else ["checkpoint.grace_s=1"]
    command = [sys.executable, "tests/support/failing_train.py", *SHORT, f"output={tmp_path}", *grace]
    job = Job(command, tmp_path / "log", UBSMOE_DS_FAULT="hang@0:6")
    job.wait_for("hanging")
    job.process.terminate()
    if how == "a second signal":
        time.sleep(SAME_SIGNAL_SECONDS + 1)
        assert job.process.poll() is None, job.output
        job.process.terminate()
    assert job.end(60) == 143, job.output
    if how == "a second signal":
        return  # resuming is the same
    code, output = train(*SHORT, f"output={tmp_path}", "--resume", "auto")
    assert code == 0 and "resumed from" in output and "round-1" in output, output
    same_as(whole, tmp_path / "tiny")


def test_a_killed_rank_is_named_and_the_next_job_goes_on(whole, tmp_path):
    job = Job([sys.executable, TRAIN, *SHORT, f"output={tmp_path}"], tmp_path / "log")
    job.wait_for("round   1/3")
    rank = job.rank_pids()[2]
    shared = [line for line in Path(f"/proc/{rank}/maps").read_text().splitlines() if "/dev/shm/" in line]
    assert shared and all(line.endswith(" (deleted)") for line in shared), "nothing can stay in /dev/shm"
    os.kill(rank, signal.SIGKILL)
    assert job.end(60) not in (0, 75), job.output
    (line,) = [line for line in job.output.splitlines() if line.endswith(" was killed")]
    assert line.startswith("error: client ") and "client 'b', rank 1 of 2 (job rank 2)" in line
    code, output = train(*SHORT, f"output={tmp_path}", "--resume", "auto")
    assert code == 0, output
    same_as(whole, tmp_path / "tiny")


def test_restarts_go_on_by_themselves(whole, tmp_path):
    """A rank is killed before the first checkpoint; after one, a rank is stopped.

    Then client b's other rank waits for it in gloo, and client a in MPI; neither of them counts as one that hangs.
    """
    command = [sys.executable, TRAIN, *SHORT, f"output={tmp_path}", "--restarts", "2", "hang_timeout_s=5"]
    job = Job(command, tmp_path / "log")
    for text, number in (("tiny: ", signal.SIGKILL), ("round   2/3", signal.SIGSTOP)):
        job.wait_for(text)
        os.kill(job.rank_pids()[2], number)
    assert job.end(240) == 0, job.output
    killed, hangs = [line for line in job.output.splitlines() if line.startswith("error: ")]
    assert killed.endswith(" was killed") and "restart 1 of 2" in job.output
    assert hangs.startswith("error: client 'b', rank 1 of 2 (job rank 2) hangs: no progress for "), hangs
    assert "is stopped by a signal (state T)" in hangs and "exit code 1; restart 2 of 2" in job.output
    same_as(whole, tmp_path / "tiny")


@pytest.mark.extended
def test_a_rank_that_hangs_but_lives_shows_where(tmp_path):
    """Job rank 1 sleeps in its second step; job rank 2 waits for it inside its own."""
    command = [sys.executable, "tests/support/failing_train.py", *SHORT, f"output={tmp_path}", "hang_timeout_s=4"]
    job = Job(command, tmp_path / "log", UBSMOE_DS_FAULT="hang@1:2")
    assert job.end(60) == 1, job.output
    line, *stacks = job.output[job.output.index("error: ") :].splitlines()
    assert line.startswith("error: client 'b', rank 0 of 2 (job rank 1) hangs: ") and "local step 2" in line
    assert "error: " not in "".join(stacks)
    frames = [text for text in stacks if text.startswith("  File ")]
    assert "failing_train.py" in frames[0] and frames[0].endswith(" in harm"), stacks


@pytest.mark.extended
def test_ranks_have_a_watcher_before_they_have_met_and_another_from_then_on(tmp_path):
    """Job rank 2 is stopped before MPI starts. What the watchers do is in tests/unit/launching/test_hang_watcher.py."""
    command = [sys.executable, "tests/support/failing_train.py", *SHORT, f"output={tmp_path}", "hang_timeout_s=450"]
    job = Job(command, tmp_path / "log", UBSMOE_DS_FAULT="absent@2")
    deadline = time.monotonic() + 60
    while watchers(job) != ["start_watcher.py 450 0 rank 1", "start_watcher.py 450 1 rank 0"]:
        assert time.monotonic() < deadline, (watchers(job), job.output)
        time.sleep(0.05)
    os.kill(job.rank_pids()[2], signal.SIGCONT)
    job.wait_for("before ")
    assert [line.split()[0] for line in watchers(job)] == ["hang_watcher.py"] * 3
    assert job.end(60) == 0, job.output


def watchers(job: Job) -> list[str]:
    """Return names and arguments of the watchers of a job's ranks."""
    found = []
    for pid in job.pids():
        _, *words = Path(f"/proc/{pid}/cmdline").read_text().rstrip("\0").split("\0")
        if words[2:3] and words[2].endswith("_watcher.py"):
            found.append(" ".join([Path(words[2]).name, *words[3:]]))
    return sorted(found)


def test_ranks_that_all_wait_for_one_another_are_noticed(tmp_path):
    """Job rank 2 waits for a message that nobody sends, job rank 1 for it in gloo, job rank 0 for both in MPI."""
    command = [sys.executable, "tests/support/failing_train.py", *SHORT, f"output={tmp_path}", "hang_timeout_s=2"]
    job = Job(command, tmp_path / "log", UBSMOE_DS_FAULT="deadlock@2:2")
    assert job.end(60) == 1, job.output
    line, *stacks = job.output[job.output.index("error: ") :].splitlines()
    assert line.startswith("error: all ranks wait for one another: no progress for "), line
    assert (
        "client 'a', rank 0 of 1 (job rank 0) in round 1, " in line
        and "rank 1 of 2 (job rank 2) in round 1, local step 2" in line
    )
    assert "error: " not in "".join(stacks) and any("in wait_quietly" in text for text in stacks)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(whole, tmp_path):
    subprocess.run(["cp", "-r", str(whole), str(tmp_path / "tiny")], check=True)
    path = tmp_path / "tiny" / "checkpoints" / "000003-round-3" / "rank-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    code, output = train(*SHORT, f"output={tmp_path}", "--resume", "auto")
    assert code == 0, output
    assert output.count("warning: checkpoint") == 1 and "rank-00001.safetensors does not have its checksum" in output
    assert "resumed from" in output and "000002-round-2" in output
    same_as(whole, tmp_path / "tiny")


REFUSED = {
    "another method": (["method=topk"], "error: --resume: dmr.enabled is False, but True in"),
    "other rows": (["data.rows=150"], "error: --resume: data.rows is 150, but 200"),
    "no such checkpoint": (["--resume", "{tmp}/none"], "none is not a complete checkpoint; use auto"),
    "a branch that was left": (["--resume", "{tmp}/tiny/checkpoints/left-000001-round-1"], "in a folder of its own"),
    "another run's folder": (["name=other"], "holds another run"),
    "elsewhere, into another's": (["--resume", "{tmp}/tiny/checkpoints/000001-round-1", "name=other"], "already holds"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_resume_that_cannot_be_is_refused_and_nothing_is_touched(name, whole, tmp_path):
    subprocess.run(["cp", "-r", str(whole), str(tmp_path / "tiny")], check=True)
    kept = tmp_path / "tiny" / "checkpoints"
    subprocess.run(["cp", "-r", str(kept / "000001-round-1"), str(kept / "left-000001-round-1")], check=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "metrics.jsonl").write_text("precious")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    changes, message = REFUSED[name]
    changes = [text.replace("{tmp}", str(tmp_path)) for text in changes]
    code, output = train(*SHORT, f"output={tmp_path}", "overwrite=false", "--resume", "auto", *changes)
    assert code == 2 and message in output and output.count("error:") == 1 and "Traceback" not in output, output
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.extended
def test_more_rounds_and_another_layout_go_on(whole, tmp_path):
    """From 3 ranks to 2, and from expert parallelism to ZeRO 2: equal but for the order of sums."""
    for folder in ("same", "other"):
        (tmp_path / folder).mkdir()
        subprocess.run(["cp", "-r", str(whole), str(tmp_path / folder / "tiny")], check=True)
    other = "clients=[{name: a, budget: 0.5, ranks: 2}, {name: b, budget: 1.0}]"
    changes = [other, "deepspeed.zero_optimization.stage=2", "train.rounds=4"]
    code, output = train(*SHORT, f"output={tmp_path / 'other'}", *changes, "--resume", "auto")
    assert code == 0, output
    code, output = train(*SHORT, f"output={tmp_path / 'same'}", "train.rounds=4", "--resume", "auto")
    assert code == 0, output
    same, moved = (records(tmp_path / folder / "tiny") for folder in ("same", "other"))
    assert len(same) == 5
    for first, second in zip(same, moved, strict=True):
        for key in ("eval/loss", "train/loss"):
            if key in first["metrics"]:
                assert second["metrics"][key] == pytest.approx(first["metrics"][key], rel=1e-3)


@pytest.mark.extended
def test_another_layout_takes_over_the_same_global_state(whole, tmp_path):
    """With no round left the job writes what it has read: the same bits, sharded in another way."""
    subprocess.run(["cp", "-r", str(whole), str(tmp_path / "tiny")], check=True)
    other = "clients=[{name: a, budget: 0.5, ranks: 2, expert_parallel: 2}, {name: b, budget: 1.0}]"
    changes = [other, "deepspeed.zero_optimization.stage=2", f"output={tmp_path}"]
    code, output = train(*SHORT, *changes, "--resume", "auto")
    assert code == 0 and "resumed from" in output, output
    same_as(whole, tmp_path / "tiny")


@pytest.mark.extended
def test_a_late_client_merges_what_it_has(tmp_path):
    """Client a takes 4 seconds a step: by the deadline it has done some of four (its weight: test_server.py).

    Nobody takes it for one that hangs, nor b, which waits for it longer than that would need.
    """
    changes = ["train.round_deadline_s=10", "train.rounds=1", f"output={tmp_path}", "hang_timeout_s=7"]
    command = [sys.executable, "tests/support/failing_train.py", *SHORT, *changes]
    job = Job(command, tmp_path / "log", UBSMOE_DS_FAULT="slow@0:4")
    assert job.end() == 0, job.output
    metrics, seconds = (records(tmp_path / "tiny")[-1][part] for part in ("metrics", "seconds"))
    assert 0 < metrics["steps/a"] < 4 and metrics["steps/b"] == 4
    # b waits meanwhile, which does not count as its own work
    assert seconds["seconds_wait/b"] > seconds["seconds_wait/a"]
    assert seconds["seconds_local/a"] > seconds["seconds_local/b"]
    summary = json.loads((tmp_path / "tiny" / "summary.json").read_text())
    assert summary["clients"][0]["loss_after"] < summary["clients"][0]["loss_before"]


HUGE = "warning: round 2: client 'b' has an update of norm "


def test_a_huge_update_is_left_out_and_the_others_are_merged(tmp_path):
    """Client b's update of round 2 is 10^12 times as large, and still finite."""
    command = [sys.executable, "tests/support/failing_train.py", *SHORT, f"output={tmp_path}"]
    job = Job(command, tmp_path / "log", UBSMOE_DS_FAULT="huge@1:2+huge@2:2")
    assert job.end() == 0, job.output
    (line,) = [line for line in job.output.splitlines() if line.startswith("warning: round ")]
    assert line.startswith(HUGE) and line.endswith("it sits the round out (merge.screen_factor 30)")
    metrics = [record["metrics"] for record in records(tmp_path / "tiny")]
    assert metrics[2]["update_norm/b"] > 1e11 > 1e3 > metrics[2]["update_norm/a"]
    losses = [record["eval/loss"] for record in metrics]
    assert losses[0] > losses[1] > losses[2] > losses[3]


@pytest.mark.extended
def test_an_evaluation_that_is_not_finite_ends_the_job_and_a_sound_checkpoint_stays(tmp_path):
    """Nobody is left out, and round 5 is saved before an evaluation could show what has happened to the model."""
    changes = ["merge.screen_factor=null", "train.rounds=6", "evaluation.every=4", "checkpoint.keep=1"]
    command = [sys.executable, "tests/support/failing_train.py", *SHORT, *changes, f"output={tmp_path}"]
    job = Job([*command, "--restarts", "1"], tmp_path / "log", UBSMOE_DS_FAULT="huge@1:5+huge@2:5")
    code, output = job.end(), job.output
    assert code == 3 and "restart 1" not in output, output
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    folder = tmp_path / "tiny" / "checkpoints"
    assert line.startswith("error: round 6: ") and line.endswith(f"a finite evaluation is {folder / '000004-round-4'}")
    assert {path.name for path in folder.iterdir()} == {"000004-round-4", "000005-round-5"}
    assert not (tmp_path / "tiny" / "summary.json").exists()


ZERO = "deepspeed.zero_optimization.stage"
BAD_STEPS = {
    "fp32": (3, [], False),
    "sits out": (0, [], True),
    "zero 2": (3, [f"{ZERO}=2"], False),
    "bf16 sits out": (0, ["deepspeed.bf16.enabled=true"], True),
    "bf16 zero 1": (3, ["deepspeed.bf16.enabled=true", f"{ZERO}=1"], False),
}


@pytest.mark.extended
@pytest.mark.parametrize("name", BAD_STEPS)
def test_steps_with_nan_are_skipped_and_counted(name, tmp_path):
    """DeepSpeed itself skips some such steps, differently in each of its optimisers."""
    limit, changes, out = BAD_STEPS[name]
    changes = [*changes, f"output={tmp_path}", f"train.max_bad_steps={limit}", "train.rounds=2"]
    job = Job(
        [sys.executable, "tests/support/failing_train.py", *SHORT, *changes],
        tmp_path / "log",
        UBSMOE_DS_FAULT="nan@2:2",
    )
    assert job.end() == 0, job.output
    warning = "warning: round 1: client 'b' skipped 1 steps with NaN or Inf"
    assert f"{warning}{'; it sits the round out' if out else ''}\n" in job.output
    rounds = [r["metrics"] for r in records(tmp_path / "tiny")]
    assert [m["bad_steps/b"] for m in rounds[1:]] == [1, 0] and [m["bad_steps/a"] for m in rounds[1:]] == [0, 0]
    assert [m["steps/b"] for m in rounds[1:]] == ([1, 4] if out else [3, 4])
    assert all(m["refused_units/b"] == 0 for m in rounds[1:]) and rounds[-1]["eval/loss"] < rounds[0]["eval/loss"]
    assert all(math.isfinite(value) for m in rounds for value in m.values())


@pytest.mark.extended
def test_an_older_checkpoint_is_gone_on_from_and_the_newer_ones_are_set_aside(whole, tmp_path):
    subprocess.run(["cp", "-r", str(whole), str(tmp_path / "tiny")], check=True)
    folder = tmp_path / "tiny" / "checkpoints"
    code, output = train(*SHORT, f"output={tmp_path}", "--resume", str(folder / "000001-round-1"))
    assert code == 0 and "000001-round-1" in output, output
    same_as(whole, tmp_path / "tiny")
    branches = {f"{left}{name}" for left in ("", "left-") for name in ("000002-round-2", "000003-round-3")}
    assert {path.name for path in folder.iterdir()} == branches


@pytest.mark.extended
def test_restarts_do_not_resume_from_an_earlier_run(whole, tmp_path):
    """The job is killed before it overwrites the old run, whose checkpoints are not its own."""
    subprocess.run(["cp", "-r", str(whole), str(tmp_path / "tiny")], check=True)
    job = Job([sys.executable, TRAIN, *SHORT, f"output={tmp_path}", "--restarts", "1"], tmp_path / "log")
    deadline = time.monotonic() + 60
    while 1 not in job.rank_pids() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(job.rank_pids()[1], signal.SIGKILL)
    assert job.end() == 0, job.output
    assert "restart 1 of 1" in job.output and "resumed from" not in job.output
    same_as(whole, tmp_path / "tiny")


@pytest.mark.extended
def test_a_full_disk_ends_the_job_and_leaves_the_checkpoint_before(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=14m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("may not mount a small disk")
    try:
        code, output = train(*SHORT, "model.path=builtin:tiny_olmoe", f"output={disk}")
        assert code == 2, output
        assert output.count("error: checkpoint: ") == 1 and "free some space" in output and "Traceback" not in output
        kept = [path.name for path in (disk / "tiny" / "checkpoints").glob("[0-9]*")]
        assert kept == ["000001-round-1"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)
