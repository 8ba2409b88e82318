"""When a merge has nothing to merge, and whose control variates it moves."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ubsmoe_ds.base.errors import Diverged
from ubsmoe_ds.federation.aggregator import Aggregator
from ubsmoe_ds.federation.statistics import RoundStatistics


@pytest.mark.parametrize(
    ("work", "nonfinite", "message"),
    [
        ([1.0, 0.0], [False, False], None),
        ([1.0, 1.0], [False, True], None),
        ([0.0, 0.0], [False, False], "a: sat the round out, b: sat the round out"),
        ([0.5, 0.0], [True, False], "a: NaN or Inf in its update, b: sat the round out"),
    ],
)
def test_a_round_without_any_finite_update_is_an_end(work, nonfinite, message):
    aggregator = SimpleNamespace(exp=SimpleNamespace(clients=[SimpleNamespace(name="a"), SimpleNamespace(name="b")]))
    statistics = SimpleNamespace(cohort=[0, 1], work_C=np.array(work), nonfinite=np.array(nonfinite))
    if message is None:
        Aggregator._require_updates(aggregator, statistics)
        return
    with pytest.raises(Diverged) as raised:
        Aggregator._require_updates(aggregator, statistics)
    assert message in str(raised.value)


def test_only_merged_clients_move_their_control_variates():
    """Of the cohort 1, 3, 4, 6 client 3 sat out or was left out, and client 4 sent NaN; client 6 is another group's."""
    nothing = dict.fromkeys(RoundStatistics._fields)
    of_round = {"cohort": [1, 3, 4, 6], "work_C": np.array([0.5, 0, 1, 1]), "norm_C": np.array([1, 2, np.nan, 3])}
    statistics = RoundStatistics(**nothing | of_round)
    turns = SimpleNamespace(done=[SimpleNamespace(client=n, control=torch.tensor([float(n)])) for n in (4, 1, 3)])
    aggregator = SimpleNamespace(controls=SimpleNamespace(merge=lambda own, exchange: own), exchange=None)
    assert Aggregator._merge_controls(aggregator, turns, statistics) == {1: torch.tensor([1.0])}
    assert statistics.merged == [1, 6]
