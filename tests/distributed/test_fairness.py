"""Clients that take turns and have evaluation rows of their own are scored as clients with groups of their own are.

On two ranks: two groups, one group of both ranks whose experts are divided, and no groups at all.
"""

import json

import pytest

from tests.distributed.test_turns import SAME, SHORT, TINY, assert_same, products
from tests.support.jobs import records
from tests.support.ranks import run_ranks
from tests.support.sites import write
from ubsmoe_ds.data import synthetic
from ubsmoe_ds.federation.fairness import variance, worst_tenth

KINDS = {
    "own": [],
    "two": ["groups=[{count: 2}]"],
    "pair": ["groups=[{ranks: 2, expert_parallel: 2}]"],
}
METHODS = ("flame", "topk")  # flame: each client learns a scale for itself


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return the folder of the runs, one of each method and kind. The clients differ in K and in their rows."""
    folder = tmp_path_factory.mktemp("fairness")
    rows = synthetic.rows(40, seed=7)
    sources = [write(folder / f"{name}.jsonl", part) for name, part in (("a", rows[:9]), ("b", rows[20:25]))]
    clients = ", ".join(
        f"{{name: {n}, budget: {b}, eval_source: '{s}'}}" for n, b, s in zip("ab", (0.25, 1.0), sources, strict=True)
    )
    variants = {
        f"{name}-{kind}": [f"method={name}", f"clients=[{clients}]", *changes]
        for name in METHODS
        for kind, changes in KINDS.items()
    }
    overrides = [*SHORT, *SAME, "evaluation.batch_size=4", "evaluation.every=1"]
    arguments = {"config": TINY, "overrides": overrides, "variants": variants, "folder": str(folder / "runs")}
    ranks = run_ranks(folder, 2, "tests.support.scenarios:layouts", arguments, timeout=600)
    for name in METHODS:
        for kind in ("two", "pair"):
            assert_same(products(ranks[1], f"{name}-own"), products(ranks[0], f"{name}-{kind}"), 2e-5)
    return folder / "runs"


def scores(folder, name: str) -> list[dict[str, float]]:
    """Return each round's losses of clients, means and fairness."""
    prefixes = ("eval_loss/", "eval/loss", "fairness/")
    found = [record["metrics"] for record in records(folder / name)]
    return [{key: value for key, value in metrics.items() if key.startswith(prefixes)} for metrics in found]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", ["two", "pair"])
def test_groups_do_not_change_losses_on_own_rows(name, kind, folder):
    alone, turns = scores(folder, f"{name}-own"), scores(folder, f"{name}-{kind}")
    assert len(alone) == len(turns) == 3
    for one, other in zip(alone, turns, strict=True):
        assert one.keys() == other.keys() and len(one) == 6
        assert other == pytest.approx(one, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_fairness_is_of_the_clients_losses_and_in_the_summary(kind, folder):
    rounds = scores(folder, f"flame-{kind}")
    for found in rounds:
        losses = [found["eval_loss/a"], found["eval_loss/b"]]
        assert abs(losses[0] - losses[1]) > 1e-3, "rows and K differ"
        assert found["fairness/worst_tenth"] == pytest.approx(worst_tenth(losses)) == max(losses)
        assert found["fairness/variance"] == pytest.approx(variance(losses))
    summary = json.loads((folder / f"flame-{kind}" / "summary.json").read_text())
    for when, found in (("before", rounds[0]), ("after", rounds[-1])):
        assert summary[f"fairness_variance_{when}"] == found["fairness/variance"]
        assert summary[f"fairness_worst_tenth_{when}"] == found["fairness/worst_tenth"]
    assert summary["rows"]["own_evaluation"]["a"]["kept"] == 9 and summary["clients"][1]["loss_after"] == losses[1]
