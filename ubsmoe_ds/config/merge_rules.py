"""List the merge rules with all that config, server and planner need to know about each. Imports no torch.

A new rule is one function in aggregation/rules.py and one row here; `merge.rule` accepts the names of this table.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class MergeRule:
    """One row of `RULES`.

    function: name of the function in aggregation/rules.py.
    kind: "elementwise": (update_CN, weight_CN) -> update_N; all clients have one LoRA rank and get the same back.
        "factors": (each client's factors, weight_CU) -> factors; clients may differ in LoRA rank.
    linear: the result is the weighted mean, so sums can be formed on the way to the owners.
    stacking: the returned factors are merged into the frozen weights, and adapters start anew (FLoRA).
    by_utilisation: a client's weight for an expert follows how much it used that expert (FLAME).
    turns_basis: the factors that clients get back do not continue those that they sent.
    options: keys of the section `merge` that the function takes as keyword arguments.
    """

    function: str
    kind: Literal["elementwise", "factors"]
    linear: bool = False
    stacking: bool = False
    by_utilisation: bool = False
    turns_basis: bool = False
    options: tuple[str, ...] = ()

    @property
    def elementwise(self) -> bool:
        """Return whether the rule takes updates element by element, rather than LoRA factors."""
        return self.kind == "elementwise"


RULES: dict[str, MergeRule] = {
    "fedavg": MergeRule("fedavg", "elementwise", linear=True),
    "activation": MergeRule("fedavg", "elementwise", linear=True, by_utilisation=True),
    "median": MergeRule("coordinate_median", "elementwise"),
    "trimmed_mean": MergeRule("trimmed_mean", "elementwise", options=("trim",)),
    "zero_pad": MergeRule("zero_pad", "factors"),
    "hetlora": MergeRule("hetlora", "factors"),
    "flexlora": MergeRule("flexlora", "factors", turns_basis=True),
    "florist": MergeRule("florist", "factors", turns_basis=True, options=("energy",)),
    "flora": MergeRule("flora", "factors", stacking=True, turns_basis=True),
}


def names(*, elementwise: bool) -> str:
    """Return the names of the elementwise (or factor) rules, for a message."""
    return ", ".join(name for name, rule in RULES.items() if rule.elementwise == elementwise)
