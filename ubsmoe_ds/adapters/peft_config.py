"""Read, check and write PEFT's `adapter_config.json`, as far as it describes adapters like ours."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.base.files import read_json
from ubsmoe_ds.models.causal_lm import ATTENTION_PROJECTIONS
from ubsmoe_ds.models.family import Family

MOST_CONFIG, MOST_PATTERNS = 4 * 2**20, 1024  # bytes; each pattern is tried on each module
MOST_RANK, LEAST_ALPHA, MOST_ALPHA = 2**16, 1e-6, 1e9
# of rank_pattern and alpha_pattern: a file must not bring an expression that takes for ever
SAFE_PATTERN, MOST_REPEATS = re.compile(r"\^?(?:[\w.-]|\\\.|\.\*|\\d\+)+"), 3
Number = TypeVar("Number", int, float)
# keys with which PEFT would compute something else
UNSUPPORTED = (
    *("use_dora", "use_qalora", "use_bdlora", "fan_in_fan_out", "lora_bias", "layer_replication"),
    *("corda_config", "loftq_config", "arrow_config", "kasa_config", "monteclora_config", "alora_invocation_tokens"),
    "trainable_token_indices",
)
# values of init_lora_weights that leave the base's weights alone; others (pissa, olora, ...) change them at loading
PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class LoraSettings:
    """LoRA rank and scaling of each module, as PEFT's config gives them.

    rank, alpha: of modules that match no pattern; by_root: whether B A is scaled by alpha / sqrt(rank) (rsLoRA).
    ranks, alphas: of modules that match; parameters: weights that PEFT adapts by name, or by the end of their name.
    """

    rank: int
    alpha: float
    by_root: bool
    ranks: Mapping[re.Pattern[str], int]
    alphas: Mapping[re.Pattern[str], float]
    parameters: Sequence[str]

    @property
    def scaling(self) -> float:
        """Return the factor of B A for modules that match no pattern."""
        return self._scaling(self.alpha, self.rank)

    def rank_of(self, module: str) -> int:
        """Return the LoRA rank of a module or weight, `model.layers.0.mlp.experts.down_proj` for one."""
        return _first_match(self.ranks, module, self.rank)

    def scaling_of(self, module: str) -> float:
        """Return the factor of B A of a module or weight."""
        return self._scaling(_first_match(self.alphas, module, self.alpha), self.rank_of(module))

    def is_plain(self, module: str) -> bool:
        """Return whether a module has the config's own rank and alpha, and alpha / rank as its scaling."""
        patterns = [*self.ranks, *self.alphas]
        return not self.by_root and not any(pattern.match(module) for pattern in patterns)

    def targets(self, weight: str) -> bool:
        """Return whether target_parameters names a weight."""
        return any(weight == name or weight.endswith(f".{name}") for name in self.parameters)

    def _scaling(self, alpha: float, rank: int) -> float:
        return alpha / (math.sqrt(rank) if self.by_root else rank)


def _first_match(values: Mapping[re.Pattern[str], Number], module: str, default: Number) -> Number:
    return next((value for pattern, value in values.items() if pattern.match(module)), default)


def adapter_config(
    tensors: Mapping[str, Tensor],
    targets: Sequence[str],
    rank: int,
    alpha: float,
    base_model: str,
    *,
    family: Family,
    revision: str | None = None,
    rslora: bool = False,
) -> dict[str, Any]:
    """Return PEFT's config for the tensors of `to_peft` and the weights of `expert_targets`.

    Gate and up are one adapter of twice the LoRA rank, whose alpha gives it the same scaling.
    """
    gate_up, router = f"{family.module}.experts.gate_up_proj", f"{family.module}.{family.router.module}"
    attention = [name for name in ATTENTION_PROJECTIONS if any(f".self_attn.{name}." in key for key in tensors)]
    joined = gate_up in targets
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
        "target_parameters": list(targets) or None,
        "rank_pattern": {gate_up: 2 * rank} if joined else {},
        "alpha_pattern": {gate_up: (math.sqrt(2) if rslora else 2) * alpha} if joined else {},
        "modules_to_save": [router] if any(key.endswith(f".{router}.weight") for key in tensors) else None,
    } | ({"use_rslora": True} if rslora else {})


def read_config(path: Path) -> dict[str, Any]:
    """Read PEFT's config of an adapter.

    Raises:
        UserError: naming the file.
    """
    try:
        config = read_json(path, MOST_CONFIG)
    except OSError as error:
        raise UserError(
            f"adapter: {str(path)!r} cannot be read ({error.strerror}); name an adapter's folder"
        ) from error
    except ValueError as error:
        raise UserError(f"adapter: {str(path)!r} is not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise UserError(f"adapter: {str(path)!r} must hold key: value pairs, found {type(config).__name__}")
    return config


def read_settings(path: Path) -> LoraSettings:
    """Read and check PEFT's config of a LoRA adapter.

    Raises:
        UserError: naming the file, the key and its value, if PEFT would compute something else than LoRA.
    """
    config = read_config(path)
    where = f"adapter: in {str(path)!r},"
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
    by_root = config.get("use_rslora") or False
    if type(by_root) is not bool:
        raise UserError(f"{where} use_rslora is {by_root!r}, must be true or false")
    parameters = config.get("target_parameters") or []
    if not isinstance(parameters, list) or not all(isinstance(name, str) for name in parameters):
        raise UserError(f"{where} target_parameters is {parameters!r}, must be a list of names")
    return LoraSettings(
        rank=_lora_rank(config.get("r"), f"{where} r"),
        alpha=_alpha(config.get("lora_alpha"), f"{where} lora_alpha"),
        by_root=by_root,
        ranks=_pattern(config, "rank_pattern", _lora_rank, where),
        alphas=_pattern(config, "alpha_pattern", _alpha, where),
        parameters=tuple(parameters),
    )


def _lora_rank(value: Any, what: str) -> int:
    if type(value) is not int or not 1 <= value <= MOST_RANK:
        raise UserError(f"{what} is {value!r}, must be a whole number from 1 to {MOST_RANK}")
    return value


def _alpha(value: Any, what: str) -> float:
    if type(value) not in (int, float) or not LEAST_ALPHA <= value <= MOST_ALPHA:
        raise UserError(f"{what} is {value!r}, must be a number above 0, and at most {MOST_ALPHA:g}")
    return float(value)


def _pattern(
    config: Mapping[str, Any], key: str, check: Callable[[Any, str], Number], where: str
) -> dict[re.Pattern[str], Number]:
    """Return the values of modules that match a regular expression, the first that matches first, as PEFT does."""
    pattern = config.get(key) or {}
    if not isinstance(pattern, dict):
        raise UserError(f"{where} {key} is {pattern!r}, must be numbers by module")
    if len(pattern) > MOST_PATTERNS:
        raise UserError(f"{where} {key} has {len(pattern)} patterns, must be at most {MOST_PATTERNS}")
    checked = {}
    for module, value in pattern.items():
        if not SAFE_PATTERN.fullmatch(module) or sum(map(module.count, "*+")) > MOST_REPEATS or len(module) > 200:
            raise UserError(f"{where} {key} has the pattern {module!r}; write names of modules, without groups")
        checked[re.compile(rf"(.*\.)?({module})$")] = check(value, f"{where} {key} of {module!r}")
    return checked
