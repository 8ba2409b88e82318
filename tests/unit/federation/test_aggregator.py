"""When a merge has nothing to merge."""

from types import SimpleNamespace

import numpy as np
import pytest

from ubsmoe_ds.base.errors import Diverged
from ubsmoe_ds.federation.aggregator import Aggregator


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
