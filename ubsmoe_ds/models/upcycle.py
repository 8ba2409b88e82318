"""Make a mixture of experts from a dense Llama whose experts are copies of its feed-forward networks.

At every K the model equals the dense one; experts diverge in training. models/split.py makes experts of their parts.

Shapes: O a projection's outputs, D width.
"""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedModel

from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.models.families import SILU
from ubsmoe_ds.models.stored import is_tied

CARRIED = (  # keys that the configs of all these families share
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("hidden_act", "rms_norm_eps", "max_position_embeddings", "rope_parameters", "attention_dropout"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)
ROUTER_STD = 0.02


def check_dense(config: Any) -> None:
    """Check that the model is a plain Llama with SiLU and without biases, as its experts have none.

    Raises:
        UserError: naming the key and its value.
    """
    if config.model_type != "llama":
        raise UserError(
            f"--model: model_type is {config.model_type!r}; only dense models of type 'llama' can be prepared"
        )
    for key in ("attention_bias", "mlp_bias"):
        if getattr(config, key, False):
            raise UserError(f"--model: {key} is true, but experts have no biases; choose another model")
    if getattr(config, "quantization_config", None):
        raise UserError("--model: has a quantization_config; use the weights before quantisation")
    if config.hidden_act not in SILU:
        raise UserError(f"--model: hidden_act {config.hidden_act!r} is not supported; the experts are SwiGLU (silu)")


@torch.no_grad()
def upcycle(dense: PreTrainedModel, experts: int, k: int, seed: int = 0) -> PreTrainedModel:
    """Return a Mixtral whose experts are all copies of the dense network (sparse upcycling).

    Its logits equal the dense model's for every K, because Mixtral's K weights sum to one. The router starts small and
    random.

    Args:
        dense: a Llama.
        experts: number of copies.
        k: `num_experts_per_tok` of the config.
        seed: of the router's draw.

    Raises:
        UserError: as `check_dense`.
    """
    check_dense(dense.config)
    config = MixtralConfig(
        **carried_keys(dense),
        intermediate_size=dense.config.intermediate_size,
        num_local_experts=experts,
        num_experts_per_tok=k,
        sliding_window=None,
    )
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dense.dtype)
    copy_all_but_blocks(dense, model)
    for source, target in zip(dense.model.layers, model.model.layers, strict=True):
        block = target.mlp
        gate_up_OD = torch.cat([source.mlp.gate_proj.weight, source.mlp.up_proj.weight])
        block.experts.gate_up_proj.copy_(gate_up_OD.expand_as(block.experts.gate_up_proj))
        block.experts.down_proj.copy_(source.mlp.down_proj.weight.expand_as(block.experts.down_proj))
        block.gate.weight.copy_(torch.randn(block.gate.weight.shape, generator=generator) * ROUTER_STD)
    return model.eval()


def carried_keys(dense: PreTrainedModel) -> dict[str, Any]:
    """Return the keys to carry over; of tokens also None, because a missing key gets the family's own default.

    Whether the head is the embedding is asked of the weights: a config may tie them though the files hold two.
    """
    values = {key: getattr(dense.config, key, None) for key in CARRIED}
    kept = {key: value for key, value in values.items() if value is not None or key.endswith("_token_id")}
    return kept | {"tie_word_embeddings": is_tied(dense)}


def copy_all_but_blocks(dense: PreTrainedModel, model: PreTrainedModel) -> None:
    """Copy embeddings, attention, norms and head, which have the same names in both models."""
    source = {name: value for name, value in dense.state_dict().items() if ".mlp." not in name}
    missing, unexpected = model.load_state_dict(source, strict=False)
    left = [name for name in missing if ".mlp." not in name]
    assert not left and not unexpected, f"not carried over: {left} {unexpected}"
