"""The fidelity report on experts trained from scratch, and its command."""

import subprocess

import numpy as np
import pandas as pd
import pytest

from tests.support.ranks import REPO, clean_environment, run_ranks, warm_python

TINY = REPO / "ds_configs" / "compare_tiny.yaml"


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fidelity")
    arguments = {"folder": str(folder / "model"), "train_steps": 100, "batches": 8}
    (result,) = run_ranks(folder, 1, "tests.support.fidelity_scenario:fidelity", arguments, timeout=500)
    columns = ("estimator", "group", "layer", "experts", "cosine", "size")
    return pd.DataFrame({column: result[column] for column in columns}), result


def cosine(table: pd.DataFrame, estimator: str, group: str) -> float:
    chosen = table[(table.estimator == estimator) & (table.group == group) & (table.experts > 0)]
    assert chosen.experts.sum() >= 20, "too few experts to say anything"
    return float(np.average(chosen.cosine, weights=chosen.experts))


@pytest.mark.extended
def test_linearised_finds_the_dense_gradient_of_experts_trained_from_scratch(scratch):
    """Experts that no token of the batch activated at K = 1: measured 0.44, token_weighted -0.03, the oracle 0.8."""
    table, _ = scratch
    assert cosine(table, "linearised", "never") > 0.3
    assert abs(cosine(table, "token_weighted", "never")) < 0.15
    assert cosine(table, "none", "never") == 0
    assert cosine(table, "dense_oracle", "never") > cosine(table, "linearised", "never")
    assert cosine(table, "linearised", "some") > cosine(table, "none", "some")


@pytest.mark.extended
def test_the_bias_of_top_k_grows_as_k_falls(scratch):
    """Corollary 1 of the paper; the inactive experts' true gradient helps but at K = 1, where dL/dy is far off."""
    _, result = scratch
    plain = result["bias/none"]
    assert plain[0] > plain[1] > plain[2] > 0
    assert (result["bias/dense_oracle"] < plain)[1:].all()


def command(*arguments: str) -> subprocess.CompletedProcess:
    line = [*warm_python(), str(REPO / "launch" / "fidelity.py"), "--config", str(TINY), *arguments]
    return subprocess.run(line, env=clean_environment(), capture_output=True, text=True, timeout=300, cwd=REPO)


def test_command_writes_table_and_picture(tmp_path):
    small = ["data.rows=200", "deepspeed.train_batch_size=2", "sampling.clients=1"]  # which the study leaves alone
    done = command(*small, "--ks", "1", "8", "--steps", "1", "--batches", "1", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "| linearised |" in done.stdout and "K = 8" in done.stdout
    assert (tmp_path / "fidelity.md").read_text().strip() == done.stdout.strip()
    assert (tmp_path / "fidelity.png").read_bytes()[:4] == b"\x89PNG"
    table = pd.read_csv(tmp_path / "fidelity.csv")
    assert set(table.k) == {1, 8} and set(table.estimator) >= {"none", "linearised", "dense_oracle"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ks", "17"], "--ks: 17 must lie between 1 and the model's 16 experts"),
        (["--batches", "0"], "argument --batches: 0 must be 1 to"),
        (["method=nothing"], "method: 'nothing' is not a method"),
    ],
)
def test_bad_options_are_one_line(arguments, message):
    done = command(*(a for a in arguments if "=" in a), *(a for a in arguments if "=" not in a))
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1
