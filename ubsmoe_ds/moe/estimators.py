"""Table of pseudo-gradient (PG) estimators: what config, collector and planner need to know of each. Imports no torch.

A new estimator is one function in pseudo_gradient.py and one row here; `pseudo_gradient.estimator` accepts the names of
this table, and "none".
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Estimator:
    """One row of `ESTIMATORS`.

    function: its name in pseudo_gradient.py. It takes (`ExpertTokens`, `Experts`), or with `from_sums` `GradientSums`.
    from_sums: whether it computes from sums over the batch alone, so that no tokens are drawn.
    mixture: whether tokens must come with a `TokenMixture`.
    moments: whether experts must come with `Moments`.
    """

    function: str
    from_sums: bool = False
    mixture: bool = False
    moments: bool = False


ESTIMATORS = {
    "expert_mean": Estimator("expert_mean", from_sums=True),
    "token_weighted": Estimator("token_weighted", mixture=True),
    "linearised": Estimator("linearised", moments=True),
    "dense_oracle": Estimator("dense_oracle"),
}
