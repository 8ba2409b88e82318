"""A population's results do not depend on the groups that train it: four, one that takes turns, two of two ranks.

The peer is also the same four clients with a group of their own each, and a plain loop in one process.
"""

import json

import numpy as np
import pytest

from tests.support import reference
from tests.support.jobs import records, small_model
from tests.support.ranks import REPO, run_ranks
from ubsmoe_ds.config.loading import load_experiment
from ubsmoe_ds.config.methods import PRESETS

TINY = str(REPO / "ds_configs" / "tiny.yaml")
SHORT = ["train.rounds=2", "train.local_steps=2", "data.rows=160", "data.eval_rows=8", "evaluation.every=2"]
SHORT += [small_model()]
# without draws, which a turn takes from its own generator; eps, so that Adam does not turn rounding into steps
SAME = ["train.optimizer_state=reset", "pseudo_gradient.tokens_per_expert=null", "pseudo_gradient.moment_share=1.0"]
SAME += ["deepspeed.optimizer={type: AdamW, params: {lr: 0.003, eps: 0.0001}}", "checkpoint.every=0"]
SAME += ["deepspeed.train_batch_size=8"]
CLIENTS = (
    "clients=[{budget: 0.25, name: a, lr: 0.002}, {budget: 0.5, name: b, gradient_accumulation_steps: 2}, "
    "{budget: 0.75, name: c, local_steps: 3}, {budget: 1.0, name: d}]"
)
ONE, FOUR = ["groups=[{count: 1}]"], ["groups=[{count: 4}]"]
PAIRS = ["groups=[{ranks: 2, expert_parallel: 2, count: 2}]"]
WHOLE = ["groups=[{ranks: 4, expert_parallel: 2}]"]
METHODS = {name: [f"method={name}"] for name in PRESETS} | {
    "dropping": ["method=topk", "clients.3.capacity_factor=0.5"],
    "kept": ["train.optimizer_state=keep"],  # Adam's moments and steps follow the client
    "median": ["method=topk", "merge.rule=median"],
    "trimmed_mean": ["method=topk", "merge.rule=trimmed_mean"],
    "clipped": ["method=topk", "merge.clip_norm=0.05"],
    "sampled": ["sampling={clients: 3}"],
    # a turn draws from the seed, the client, the round and its rank; a client with a group of its own goes on drawing
    "drawing": ["pseudo_gradient.tokens_per_expert=4", "pseudo_gradient.moment_share=0.5"],
}
# their results depend on the layout: a basis of no weight is arbitrary, and each rank balances its own load
BY_LAYOUT = ("flexlora", "florist", "smoe_llb", "dropping", "drawing")
# owners get each client's update by itself, so nothing is summed in another order
TO_THE_BIT = ("flora", "median", "trimmed_mean", "clipped")


def run(folder, ranks, names, kinds):
    variants = {
        f"{name}-{kind}": [CLIENTS, *METHODS[name], *changes] for name in names for kind, changes in kinds.items()
    }
    arguments = {"config": TINY, "overrides": [*SHORT, *SAME], "variants": variants, "folder": str(folder / "runs")}
    return run_ranks(folder, ranks, "tests.support.scenarios:layouts", arguments, timeout=900)


def products(result: dict, name: str) -> dict[str, np.ndarray]:
    """Return everything that a run holds: B A of each adapter, and other values as they are."""
    state = {key.removeprefix(f"{name}/"): value for key, value in result.items() if key.startswith(f"{name}/")}
    found = {key: value for key, value in state.items() if ".lora_" not in key}
    for key in (key.removesuffix(".lora_A") for key in state if key.endswith(".lora_A")):
        found[key] = state[f"{key}.lora_B"] @ state[f"{key}.lora_A"]
    return found


def assert_same(one: dict, other: dict, atol: float) -> None:
    assert one.keys() == other.keys() and one
    for key, value in one.items():
        np.testing.assert_allclose(value, other[key], atol=atol, rtol=0, err_msg=key)


def evaluated(folder, name: str) -> list[float]:
    """Return the mean training losses and evaluation losses of a run, round by round."""
    names = ("train/loss", "eval/loss", "eval/loss_weighted")
    found = [record["metrics"] for record in records(folder / "runs" / name)]
    return [metrics[key] for metrics in found for key in names if key in metrics]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("turns")


@pytest.fixture(scope="module")
def on_one(folder):
    return run(folder, 1, METHODS, {"one": ONE})[0]


@pytest.fixture(scope="module")
def on_four(folder):
    return run(folder, 4, METHODS, {"four": FOUR, "own": []})


@pytest.mark.extended
@pytest.mark.parametrize("name", METHODS)
def test_one_group_with_four_turns_equals_four_groups_with_one(name, on_one, on_four, folder):
    atol = 0 if name in TO_THE_BIT else 1e-6
    for rank in range(4):
        assert_same(products(on_one, f"{name}-one"), products(on_four[rank], f"{name}-four"), atol)
    np.testing.assert_allclose(evaluated(folder, f"{name}-one"), evaluated(folder, f"{name}-four"), atol=1e-5)


@pytest.mark.extended
@pytest.mark.parametrize("name", [name for name in METHODS if name != "drawing"])
def test_turns_equal_clients_with_groups_of_their_own(name, on_one, on_four, folder):
    """The last client has the full LoRA rank, and so holds all that is shared."""
    assert_same(products(on_one, f"{name}-one"), products(on_four[3], f"{name}-own"), 1e-6)
    np.testing.assert_allclose(evaluated(folder, f"{name}-one"), evaluated(folder, f"{name}-own"), atol=1e-5)


@pytest.mark.extended
@pytest.mark.parametrize(
    ("kind", "groups", "names"),
    [("pairs", PAIRS, [name for name in METHODS if name not in BY_LAYOUT]), ("whole", WHOLE, ["sampled", "hetlora"])],
)
def test_groups_of_several_ranks_with_expert_parallelism_equal_them_too(kind, groups, names, on_one, folder):
    found = run(folder, 4, names, {kind: groups})
    for name in names:
        assert_same(products(on_one, f"{name}-one"), products(found[0], f"{name}-{kind}"), 2e-5)
        np.testing.assert_allclose(evaluated(folder, f"{name}-one"), evaluated(folder, f"{name}-{kind}"), atol=1e-4)


POPULATION = ["clients=[{count: 6, budgets: [0.25, 0.5, 1.0]}]", "sampling={clients: 5}", "checkpoint.keep=9"]
UNEQUAL = ["groups=[{ranks: 1}, {ranks: 2, expert_parallel: 2}]"]
KEPT_IN_FILES = ["train.optimizer_state=keep", "train.kept_states_gb=0.0"]
# overrides, then the polls of the last rank, of the group of two, at which the job is stopped
STOPPED: dict[str, list] = {
    "ub_smoe": [["pseudo_gradient.tokens_per_expert=4"], 4, 12],
    "flame": [
        ["method=flame", "deepspeed.zero_optimization.stage=2", "evaluation.generate=2", "train.prox_mu=0.5"],
        15,
        8,
    ],
    "hetlora": [["method=hetlora", "lora.prune_gamma=0.7", "lora.prune_penalty=0.5"], 22],
    "flora": [["method=flora", "deepspeed.bf16.enabled=true"], 13],
    "kept": [["train.optimizer_state=keep", "train.scaffold=true"], 4, 12, 9],
    # all in files, which both groups read and write
    "kept_zero": [[*KEPT_IN_FILES, "train.scaffold=true", "deepspeed.zero_optimization.stage=2"], 22],
}


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resumed")
    overrides = [*SHORT, "evaluation.batch_size=4", "train.rounds=3", *POPULATION, *UNEQUAL]
    arguments = {"config": TINY, "overrides": overrides, "variants": STOPPED, "folder": str(folder)}
    return folder, run_ranks(folder, 3, "tests.support.scenarios:stopped_and_resumed", arguments, timeout=900)


@pytest.mark.extended
@pytest.mark.parametrize("name", STOPPED)
def test_a_round_resumed_between_its_turns_ends_with_the_same_bits(name, resumed):
    folder, ranks = resumed
    whole, again = records(folder / name), records(folder / f"{name}-resumed")
    assert [record["metrics"] for record in again] == [record["metrics"] for record in whole] and len(whole) == 4
    checked = 0
    for result in ranks:
        for key in [key for key in result if key.startswith(f"{name}/")]:
            np.testing.assert_array_equal(result[key.replace(name, f"{name}-resumed", 1)], result[key], err_msg=key)
            checked += 1
    assert checked > 3 * 15


@pytest.mark.extended
def test_it_was_stopped_with_turns_done_begun_and_to_come(resumed):
    states = set()
    for name in STOPPED:
        for path in (resumed[0] / f"{name}-resumed" / "checkpoints").glob("*within*/manifest.json"):
            clients = json.loads(path.read_text())["clients"].values()
            states.add(tuple(sorted({client["turn"] for client in clients})))
    assert ("", "begun", "done") in states


@pytest.mark.extended
def test_a_round_goes_on_with_other_groups(tmp_path):
    """Stopped on a group of one and one of two ranks, with turns done and begun; resumed on four groups."""
    common = [
        *SHORT,
        *SAME,
        *POPULATION,
        "train.local_steps=3",
        "method=flame",
        "train.scaffold=true",
        f"output={tmp_path}",
        "checkpoint.every=1",
    ]
    arguments = {"config": TINY, "overrides": [*common, *ONE, "name=whole"], "looks": None, "resume": False}
    whole = run_ranks(tmp_path, 1, "tests.support.scenarios:part_of_run", arguments)[0]
    arguments = {"config": TINY, "overrides": [*common, *UNEQUAL, "name=cut"], "looks": 17, "resume": False}
    assert run_ranks(tmp_path, 3, "tests.support.scenarios:part_of_run", arguments)[0] == {}
    (path,) = (tmp_path / "cut" / "checkpoints").glob("*within*/manifest.json")
    turns = [client["turn"] for client in json.loads(path.read_text())["clients"].values()]
    assert "done" in turns and "begun" in turns
    arguments = {"config": TINY, "overrides": [*common, *FOUR, "name=cut"], "looks": None, "resume": True}
    resumed = run_ranks(tmp_path, 4, "tests.support.scenarios:part_of_run", arguments)
    for result in resumed:
        assert_same(products(result, "run"), products(whole, "run"), 2e-5)
    sides = [[r["metrics"] for r in records(tmp_path / name)] for name in ("whole", "cut")]
    for one, other in zip(*sides, strict=True):
        for key in ("train/loss", "eval/loss", "clients/cohort", "utilisation/cv"):
            assert one.get(key) == pytest.approx(other.get(key), abs=1e-4), key


DRIFT = ["train.scaffold=true", "train.prox_mu=0.1"]


@pytest.mark.extended
def test_a_sampled_run_equals_a_plain_loop_in_one_process(tmp_path):
    """Three of six clients a round, on two groups: the same cohorts, one after the other, without DeepSpeed.

    Once more with FedProx and SCAFFOLD, whose c_i moves with its client between groups.
    """
    changes = ["method=topk", *POPULATION[:1], "sampling={clients: 3}", "groups=[{count: 2}]", "train.rounds=3"]
    variants = {"run": changes, "drift": [*changes, *DRIFT, "train.rounds=4"]}
    arguments = {"config": TINY, "overrides": [*SHORT, *SAME], "variants": variants, "folder": str(tmp_path)}
    found = run_ranks(tmp_path, 2, "tests.support.scenarios:layouts", arguments)
    for name, overrides in variants.items():
        cohorts, expected = reference.federate(load_experiment(TINY, [*SHORT, *SAME, *overrides]))
        assert len({tuple(cohort) for cohort in cohorts}) > 1
        took_part = [
            [int(key.removeprefix("steps/c")) for key in record["metrics"] if key.startswith("steps/")]
            for record in records(tmp_path / name)[1:]
        ]
        assert took_part == cohorts
        for key, value in expected.items():
            atol = 1e-6 if name == "run" else 1e-5
            np.testing.assert_allclose(found[0][f"{name}/{key}"], value, atol=atol, rtol=0, err_msg=key)


PAIR = ["method=topk", "clients=[{budget: 0.25, name: a}, {budget: 1.0, name: b}]", "train.rounds=3"]
KINDS = {
    "own": {"own": []},
    "turns": {
        "experts": ["groups=[{ranks: 2, expert_parallel: 2}]"],
        "zero2": ["groups=[{ranks: 2}]", "deepspeed.zero_optimization.stage=2"],
    },
}


@pytest.mark.parametrize("kinds", ["own", pytest.param("turns", marks=pytest.mark.extended)])
def test_corrections_against_drift_equal_a_plain_loop(kinds, tmp_path):
    """FedProx and SCAFFOLD over three rounds of two clients, with a group each or in turn on one of two ranks."""
    variants = {name: [*PAIR, *DRIFT, *changes] for name, changes in KINDS[kinds].items()}
    arguments = {"config": TINY, "overrides": [*SHORT, *SAME], "variants": variants, "folder": str(tmp_path)}
    found = run_ranks(tmp_path, 2, "tests.support.scenarios:layouts", arguments)
    _, expected = reference.federate(load_experiment(TINY, [*SHORT, *SAME, *PAIR, *DRIFT]))
    _, pulled = reference.federate(load_experiment(TINY, [*SHORT, *SAME, *PAIR, DRIFT[1]]))
    for key, value in expected.items():
        assert np.abs(value - pulled[key]).max() > 1e-4, "SCAFFOLD does nothing"
        for name, result in ((name, result) for name in variants for result in found):
            np.testing.assert_allclose(result[f"{name}/{key}"], value, atol=2e-5, rtol=0, err_msg=key)


FIRST = ["train.rounds=3", "method=topk", "sampling={clients: 2, over_sample: 1.5}"]


def slow_client(fast: str, slow: str) -> str:
    """Return three clients, of which one has far more steps, and a group of its own."""
    return (
        f"clients=[{{name: a, budget: 0.5, groups: [{fast}]}}, {{name: b, budget: 1.0, groups: [{fast}]}}, "
        f"{{name: slow, budget: 0.5, groups: [{slow}], local_steps: 4000}}]"
    )


def without_the_slow(folder) -> list[str]:
    """Return the same in which the slow client is never there."""
    (folder / "slow.json").write_text(json.dumps({"slow": [[9, 9]]}))
    return [*FIRST[:-1], f"sampling={{clients: 2, by: availability, availability: {folder / 'slow.json'}}}"]


def check_first(folder, found: dict, first: str, without: str) -> None:
    """Check that two of three drawn are merged, as in a run in which the slow one is not there at all."""
    keys = [key for key in found if key.startswith(f"{first}/")]
    for key in keys:
        np.testing.assert_array_equal(found[key], found[key.replace(first, without, 1)], err_msg=key)
    assert len(keys) > 10
    for record in records(folder / first)[1:]:
        metrics = record["metrics"]
        assert (metrics["clients/cohort"], metrics["clients/drawn"]) == (2, 3) and "steps/slow" not in metrics
    summary = json.loads((folder / first / "summary.json").read_text())
    assert {row["client"]: row["rounds"] for row in summary["clients"]} == {"a": 3, "b": 3, "slow": 0}


def test_of_too_many_clients_the_first_that_finish_are_merged(tmp_path):
    two = [slow_client("g0", "g1"), "groups=[{count: 2}]"]
    variants = {"first": [*FIRST, *two], "without": [*without_the_slow(tmp_path), *two]}
    arguments = {"config": TINY, "overrides": [*SHORT, *SAME], "variants": variants, "folder": str(tmp_path)}
    for result in run_ranks(tmp_path, 2, "tests.support.scenarios:layouts", arguments):
        check_first(tmp_path, result, "first", "without")


@pytest.mark.extended
def test_the_first_that_finish_are_merged_where_groups_have_several_ranks(tmp_path):
    """Two ranks train the slow client, or the others."""
    variants = {}
    for who, (fast, slow) in {"slow": ("g0", "g1"), "fast": ("g1", "g0")}.items():
        groups = [slow_client(fast, slow), "groups=[{}, {ranks: 2, expert_parallel: 2}]"]
        variants |= {f"first_{who}": [*FIRST, *groups], f"without_{who}": [*without_the_slow(tmp_path), *groups]}
    arguments = {"config": TINY, "overrides": SHORT, "variants": variants, "folder": str(tmp_path)}
    for result in run_ranks(tmp_path, 3, "tests.support.scenarios:layouts", arguments):
        for who in ("slow", "fast"):
            check_first(tmp_path, result, f"first_{who}", f"without_{who}")


@pytest.fixture(scope="module")
def three_ranks(tmp_path_factory):
    """Run what needs a group of one rank and one of two: return the folder, and what rank 0 holds after each run."""
    folder = tmp_path_factory.mktemp("three")
    there = {"c0": [[1, 2]], "c1": [[1, 2]], "c2": [[3, 3]], "c3": [[3, 3]], "c4": [], "c5": []}
    (folder / "there.json").write_text(json.dumps(there))
    # by budget, so that it is known who comes first; without moments, which all that are drawn calibrate
    six = ["clients={count: 6, budgets: [1.0, 1.0, 0.75, 0.75, 0.25, 0.25]}", "train.local_steps=1", "method=topk"]
    six += ["groups=[{}, {ranks: 2, expert_parallel: 2}]"]
    available = f"sampling={{clients: 4, by: availability, availability: {folder / 'there.json'}}}"
    variants = {
        "cut": [*six, "sampling={clients: 4, by: round_robin}", "train.round_deadline_s=0.001"],
        "alone": [*six, available],
        "own": [
            "clients=[{name: a, budget: 0.5, train_batch_size: 7}, {name: b, budget: 1.0, ranks: 2}]",
            "sampling={clients: 1, by: round_robin}",
        ],
    }
    arguments = {"config": TINY, "overrides": [*SHORT, "train.rounds=3"], "variants": variants, "folder": str(folder)}
    return folder, run_ranks(folder, 3, "tests.support.scenarios:layouts", arguments)[0]


def test_clients_whose_turns_a_deadline_cuts_are_out_of_the_merge_and_come_back(three_ranks):
    """Four of six clients a round, the largest first, one turn a group: c0 and c1 in rounds 1 and 2, c2 and c3 in 3.

    The peer are rounds of those alone that have a turn; the others are not available.
    """
    folder, found = three_ranks
    cut, alone = ({k.partition("/")[2]: v for k, v in found.items() if k.startswith(n)} for n in ("cut/", "alone/"))
    assert cut.keys() == alone.keys() and len(cut) > 10
    for key, value in alone.items():
        np.testing.assert_array_equal(cut[key], value, err_msg=key)
    rounds = [record["metrics"] for record in records(folder / "cut")][1:]
    trained = [sorted(key for key in metrics if key.startswith("steps/")) for metrics in rounds]
    assert trained == [["steps/c0", "steps/c1"], ["steps/c0", "steps/c1"], ["steps/c2", "steps/c3"]]
    assert [metrics["clients/cohort"] for metrics in rounds] == [2, 2, 2]
    for metrics in rounds:
        assert sum(value for key, value in metrics.items() if key.startswith("merge_weight/")) == pytest.approx(1)


def test_sampled_clients_with_groups_of_their_own_evaluate_all_views(three_ranks):
    """b's group of two ranks evaluates a's view too, whose batch of seven it could not share."""
    rounds = [record["metrics"] for record in records(three_ranks[0] / "own")]
    assert [[key for key in metrics if key.startswith("steps/")] for metrics in rounds] == [
        [],
        ["steps/a"],
        ["steps/b"],
        ["steps/a"],
    ]
    assert {"eval_loss/a", "eval_loss/b"} <= rounds[-1].keys()
