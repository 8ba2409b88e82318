"""Read, check and write PEFT's `adapter_config.json`, as far as it describes adapters like ours."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.base.files import read_json
from ubsmoe_ds.models.causal_lm import ATTENTION_PROJECTIONS

GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
# keys with which PEFT would compute something else
UNSUPPORTED = (
    *("use_rslora", "use_dora", "use_qalora", "use_bdlora", "fan_in_fan_out", "lora_bias", "layer_replication"),
    *("corda_config", "loftq_config", "arrow_config", "kasa_config", "monteclora_config", "alora_invocation_tokens"),
)
# values of init_lora_weights that leave the base's weights alone; others (pissa, olora, ...) change them at loading
PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


def adapter_config(
    tensors: Mapping[str, Tensor], rank: int, alpha: float, base_model: str, revision: str | None = None
) -> dict[str, Any]:
    """Return PEFT's config for the tensors of `to_peft`."""
    attention = [name for name in ATTENTION_PROJECTIONS if any(f".self_attn.{name}." in key for key in tensors)]
    experts = any(".mlp.experts.lora_A." in key for key in tensors)
    router = any(key.endswith(".mlp.gate.weight") for key in tensors)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "revision": revision,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": attention,
        "target_parameters": [GATE_UP, DOWN] if experts else None,
        "rank_pattern": {GATE_UP: 2 * rank} if experts else {},
        "alpha_pattern": {GATE_UP: 2 * alpha} if experts else {},
        "modules_to_save": ["mlp.gate"] if router else None,
    }


def read_config(path: Path) -> dict[str, Any]:
    """Read PEFT's config of an adapter.

    Raises:
        UserError: naming the file.
    """
    try:
        config = read_json(path)
    except OSError as error:
        raise UserError(
            f"adapter: {str(path)!r} cannot be read ({error.strerror}); name an adapter's folder"
        ) from error
    except ValueError as error:
        raise UserError(f"adapter: {str(path)!r} is not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise UserError(f"adapter: {str(path)!r} must hold key: value pairs, found {type(config).__name__}")
    return config


def rank_and_alpha(path: Path) -> tuple[int, float]:
    """Return LoRA rank and alpha of PEFT's config; raise unless s = alpha / r holds for every module, as in ours."""
    config = read_config(path)
    rank: Any = config.get("r")
    alpha: Any = config.get("lora_alpha")
    where = f"adapter: in {str(path)!r},"
    if type(rank) is not int or rank < 1:
        raise UserError(f"{where} r is {rank!r}, must be a whole number from 1")
    if type(alpha) not in (int, float) or not 0 < alpha < math.inf:
        raise UserError(f"{where} lora_alpha is {alpha!r}, must be a number above 0")
    for key, plain in {"peft_type": "LORA", "bias": "none"}.items():
        if config.get(key, "none") != plain:
            raise UserError(f"{where} {key} is {config.get(key)!r}, must be {plain!r}")
    for key in UNSUPPORTED:
        if config.get(key):
            raise UserError(f"{where} {key} is {config[key]!r}, which is not supported; convert it to plain LoRA")
    start = config.get("init_lora_weights")
    if start not in PLAIN_STARTS:
        raise UserError(
            f"{where} init_lora_weights is {start!r}, with which PEFT changes the base; convert it to plain LoRA"
        )
    for module, its_rank, its_alpha in _patterns(config, where):
        if its_alpha * rank != alpha * its_rank:
            raise UserError(f"{where} {module} has its own scaling, {its_alpha} / {its_rank} beside {alpha} / {rank}")
    return rank, float(alpha)


def _patterns(config: Mapping[str, Any], where: str) -> Iterator[tuple[str, float, float]]:
    """Yield (module, rank, alpha) for modules with values of their own."""
    patterns = []
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(name) or {}
        if not isinstance(pattern, dict) or not all(type(value) in (int, float) for value in pattern.values()):
            raise UserError(f"{where} {name} is {pattern!r}, must be numbers by module")
        patterns.append(pattern)
    ranks, alphas = patterns
    for module in ranks | alphas:
        yield module, ranks.get(module, config["r"]), alphas.get(module, config["lora_alpha"])
