"""The function that the rank of the fidelity study's test runs."""

import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.support import tiny
from tests.support.scenarios import enter


def fidelity(folder: str, train_steps: int, batches: int) -> dict[str, Any]:
    """Train a byte-level OLMoE from scratch on Python's standard library, then measure estimators on it at K = 1.

    Return the columns of `fidelity.summary` and, as "bias/ESTIMATOR", those of `fidelity.bias` at K = 1, 2, 4.
    """
    text = b"".join(path.read_bytes() for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")))
    data, generator = torch.tensor(list(text[:2_000_000])), torch.Generator().manual_seed(0)

    def windows(count: int) -> torch.Tensor:
        starts = torch.randint(0, len(data) - 128, (count,), generator=generator)
        return torch.stack([data[start : start + 128] for start in starts])

    _save_trained_model(folder, windows, train_steps)
    exp = tiny.experiment(
        folder, [{"budget": 1.0}], num_experts=16, k_max=8, pseudo_gradient={"estimator": "linearised", "rho": 1.0}
    )
    enter(exp)

    from ubsmoe_ds.client.engine import Client
    from ubsmoe_ds.data.batches import StepBatch, Tokens
    from ubsmoe_ds.studies import fidelity

    def batch(count: int) -> StepBatch:
        ids = windows(count)
        position = (torch.arange(count).unsqueeze(1) * 128 + torch.arange(127)).reshape(-1)
        tokens = Tokens(ids, torch.ones_like(ids, dtype=torch.bool), position, ids[:, 1:].reshape(-1))
        return StepBatch([tokens], len(position), ids.numel())

    client = Client(exp, exp.clients[0], 0)
    client.calibrate(iter([batch(4) for _ in range(4)]), 4)
    client.moments.update(client.moments.sums())
    taken = [batch(2) for _ in range(batches)]
    results: dict[str, Any] = {}
    for k in (1, 2, 4):
        measured = fidelity.measure(client, iter(taken), k, fidelity.COMPARED, batches)
        if k == 1:
            table = fidelity.summary(measured, 1)
            results |= {column: table[column].to_numpy() for column in ("layer", "experts", "cosine", "size")}
            results |= {column: table[column].to_numpy(dtype=str) for column in ("estimator", "group")}
        for estimator, value in zip(*fidelity.bias(measured, k)[["estimator", "bias"]].T.to_numpy(), strict=True):
            results[f"bias/{estimator}"] = np.append(results.get(f"bias/{estimator}", []), value)
    torch.distributed.destroy_process_group()
    return results


def _save_trained_model(folder: str, windows: Callable[[int], torch.Tensor], train_steps: int) -> None:
    """Train a small OLMoE on windows of bytes and save it."""
    from transformers import OlmoeConfig, OlmoeForCausalLM

    sizes = {
        "vocab_size": 256,
        "hidden_size": 128,
        "intermediate_size": 64,
        "num_experts": 16,
        "num_experts_per_tok": 8,
    }
    torch.manual_seed(0)
    hf = OlmoeForCausalLM(
        OlmoeConfig(**sizes, num_hidden_layers=2, num_attention_heads=4, pad_token_id=None, output_router_logits=True)
    )
    optimizer = torch.optim.AdamW(hf.parameters(), lr=3e-3, weight_decay=0.05)
    for _ in range(train_steps):
        ids = windows(8)
        hf(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(hf.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    hf.config.output_router_logits = False
    hf.save_pretrained(folder)
