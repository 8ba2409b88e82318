"""Small things that tests share: a random OLMoE, an experiment with it, and rows of tokens."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.config.merge_rules import RULES
from ubsmoe_ds.data.batches import Example

if TYPE_CHECKING:
    from transformers import OlmoeForCausalLM

VOCAB = 61
# the preset's other values would hide PG's own: what it draws, and how little it weighs
WITHOUT_PG = {"estimator": "none", "scale": 1.0, "tokens_per_expert": None, "moment_share": 1.0}


def hf_model(seed: int = 0, **changes: Any) -> "OlmoeForCausalLM":
    """Return a random OLMoE with weights large enough that experts and router matter."""
    from transformers import OlmoeConfig, OlmoeForCausalLM  # takes seconds, for nothing in ranks that need none

    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_experts": 8,
        "num_experts_per_tok": 4,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    model = OlmoeForCausalLM(OlmoeConfig(**(sizes | changes))).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.3)
    return model


def save_model(folder: Path, **changes: Any) -> str:
    """Save `hf_model` as a model folder and return the folder."""
    hf_model(**changes).save_pretrained(folder)
    return str(folder)


def experiment(model_path: str, clients: list[dict], **sections: Any) -> Experiment:
    """Return an experiment with a model of 8 experts, 4 active, without reading a YAML."""
    raw: dict[str, Any] = {
        "name": "test",
        "model": {"path": model_path},
        "num_experts": 8,
        "k_max": 4,
        "lora": {"rank": 3, "alpha": 6.0},
        "pseudo_gradient": WITHOUT_PG,
        "router": {"gate_rescale": "none"},
        "deepspeed": deepspeed(),
        "clients": [{"name": f"c{i}"} | client for i, client in enumerate(clients)],
    }
    return Experiment.model_validate(_reset_where_the_basis_turns(raw | sections))


def _reset_where_the_basis_turns(raw: dict[str, Any]) -> dict[str, Any]:
    """Return an experiment with the optimiser reset each round where its merge rule needs that."""
    rule = raw.get("merge", {}).get("rule", "fedavg")
    state = {"optimizer_state": "reset"} if rule in RULES and RULES[rule].turns_basis else {}
    return raw | {"train": raw.get("train", {}) | state}


def deepspeed(
    zero: int = 0, accumulation: int = 1, clip: float = 0.0, bf16: bool = False, gradients: str | None = None
) -> dict:
    """Return a DeepSpeed config for 8 rows a step."""
    return {
        "train_batch_size": 8,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.0, "eps": 1e-6}},
        "zero_optimization": {"stage": zero},
        "bf16": {"enabled": bf16},
        "data_types": {"grad_accum_dtype": gradients},
    }


def examples(count: int = 24, seed: int = 3) -> list[Example]:
    """Return rows of random tokens of unequal length."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(2, VOCAB, (length,), generator=generator).tolist()

    return [Example(tokens(4, 12), tokens(1, 4)) for _ in range(count)]


def variant(base: Experiment, changes: dict[str, Any]) -> Experiment:
    """Return `base` with changes.

    Args:
        base: the experiment.
        changes: "deepspeed" (arguments of `deepspeed`), "pg" (estimator), "aux" (loss), "attention" (LoRA), "rescale",
            "candidates", "capacity_factor"; "ranks": LoRA rank of each client; "packing": tokens of a sequence, for
            `scenarios.train` alone; "sections": {section: {key: value}} for everything else.
    """
    raw = base.model_dump()
    raw["deepspeed"] = deepspeed(**changes.get("deepspeed", {}))
    raw["pseudo_gradient"] = {**WITHOUT_PG, "estimator": changes.get("pg", "none")}
    raw["router"] = {"aux_loss": changes.get("aux", 0.0), "gate_rescale": changes.get("rescale", "none")}
    raw["lora"]["attention"] = changes.get("attention", False)
    raw["dmr"]["candidates"] = changes.get("candidates")
    for client, rank in zip(raw["clients"], changes.get("ranks", [None] * len(raw["clients"])), strict=True):
        client["capacity_factor"] = changes.get("capacity_factor")
        client["lora_rank"] = rank
    for section, values in changes.get("sections", {}).items():
        raw[section] = {**raw[section], **values}
    return Experiment.model_validate(_reset_where_the_basis_turns(raw))


def usage(client: int) -> Tensor:
    """Return the share of a client's tokens that used each expert, [2 layers, 8 experts]; none used the last."""
    used = torch.from_numpy(federated_value("usage", client, (2, 8))).abs()
    used[:, -1] = 0
    return used


def known_shift(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return what stands in for SCAFFOLD's c - c_i of a parameter where one client trains alone."""
    return (0.003 * federated_value(f"{name} shift", 0, shape)).astype(np.float32)


def federated_value(name: str, client: int, shape: tuple[int, ...]) -> np.ndarray:
    """Return known weights: a draw that depends on the parameter's name and the client alone."""
    return np.random.default_rng([client, *name.encode()]).normal(size=shape).astype(np.float32)
