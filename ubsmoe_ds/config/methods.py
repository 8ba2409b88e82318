"""Define UB-SMoE and the methods it is compared with as presets: the defaults that `method: NAME` sets.

A preset is a mapping shaped like the YAML; the experiment can override every key of it. Comments here and
docs/methods.md say which parts come from the papers and which are ours.
"""

from collections.abc import Mapping
from typing import Any

Settings = Mapping[str, Any]

_PLAIN = {
    "budget_scales": "experts",
    "dmr": {"enabled": False},
    "pseudo_gradient": {"estimator": "none"},
    "router": {"gate_rescale": "none", "aux_loss": 0.0},
    "merge": {"rule": "fedavg"},
    # keep Adam's moments between rounds as long as the adapters keep their basis [ours]: on a seed that no comparison
    # uses, this helped every such method, and hurt flexlora, whose basis changes each round
    "train": {"optimizer_state": "keep"},
}


def _on(base: Settings, changes: Settings) -> dict[str, Any]:
    """Return `base` with `changes` laid over it, section by section."""
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _on(merged[key], value) if both else value
    return merged


_RANKS = _on(_PLAIN, {"budget_scales": "lora_rank"})  # every client runs K_max experts; its budget sets its LoRA rank
_NEW_BASIS = _on(_RANKS, {"train": {"optimizer_state": "reset"}})

PRESETS: dict[str, dict[str, Any]] = {
    # arXiv 2605.16690: DMR, PG and FedAvg are the paper's; the estimator's formula is ours
    "ub_smoe": _on(
        _PLAIN,
        {
            "dmr": {"enabled": True},
            # scale and tokens are ours: results/pg_scale, and the cost of drawing more in docs/performance.md
            "pseudo_gradient": {
                "estimator": "linearised",
                "scale": 0.08,
                "tokens_per_expert": 4,
                "moment_share": 0.0625,
            },
        },
    ),
    # sparse routing with K_c experts and FedAvg, nothing else
    "topk": _PLAIN,
    # the same with a load-balancing loss on every client; the coefficient is ours
    "smoe_llb": _on(_PLAIN, {"router": {"aux_loss": 0.01}}),
    # our reading of A3SMoE, whose text we did not have: experts are merged in proportion to their activation
    "a3smoe": _on(_PLAIN, {"merge": {"rule": "activation"}}),
    # arXiv 2506.16600: learnable rescaling and activation-aware merging; share of tokens and temperature 1 are ours
    "flame": _on(_PLAIN, {"router": {"gate_rescale": "learned"}, "merge": {"rule": "activation"}}),
    # arXiv 2401.06432: zero-padding, weights by the norm of B A, self-pruning; its two constants are ours
    "hetlora": _on(_RANKS, {"merge": {"rule": "hetlora"}, "lora": {"prune_penalty": 0.005}}),
    # zero-padding and FedAvg of the factors
    "hetlora_plain": _on(_RANKS, {"merge": {"rule": "zero_pad"}}),
    # arXiv 2402.11505
    "flexlora": _on(_NEW_BASIS, {"merge": {"rule": "flexlora"}}),
    # arXiv 2409.05976
    "flora": _on(_NEW_BASIS, {"merge": {"rule": "flora"}}),
    # arXiv 2506.09199; that a client of smaller rank gets the leading part is ours
    "florist": _on(_NEW_BASIS, {"merge": {"rule": "florist"}}),
}

# label -> changes to ub_smoe; without both parts it would be topk
ABLATIONS: dict[str, dict[str, Any]] = {
    "ub_smoe-no_dmr": {"method": "ub_smoe", "dmr": {"enabled": False}},
    "ub_smoe-no_pg": {"method": "ub_smoe", "pseudo_gradient": {"estimator": "none"}},
}


def with_preset(experiment: Settings) -> dict[str, Any]:
    """Lay the experiment over the preset that `method` names (default ub_smoe); an unknown name has no preset."""
    name = experiment.get("method", "ub_smoe")
    return _on(PRESETS.get(name, {}) if isinstance(name, str) else {}, experiment)
