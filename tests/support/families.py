"""Small random models: every supported family, and variants within some."""

import copy
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from tests.support import tiny

COMMON = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 3,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
MODELS = {
    "olmoe": OlmoeConfig(**COMMON, intermediate_size=12, num_experts=8, norm_topk_prob=False),
    "olmoe, tied": OlmoeConfig(**COMMON, intermediate_size=12, num_experts=8, tie_word_embeddings=True),
    "olmoe, clipped and scaled": OlmoeConfig(
        **COMMON,
        intermediate_size=12,
        num_experts=8,
        clip_qkv=0.5,
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0},
    ),
    # norm_topk_prob is not a key of this family, and transformers ignores it there
    "mixtral": MixtralConfig(**COMMON, intermediate_size=12, num_local_experts=8, norm_topk_prob=False),
    "qwen2_moe": Qwen2MoeConfig(
        **COMMON, moe_intermediate_size=12, num_experts=8, intermediate_size=20, shared_expert_intermediate_size=24
    ),
    "qwen2_moe, every second": Qwen2MoeConfig(
        **COMMON,
        moe_intermediate_size=12,
        num_experts=8,
        intermediate_size=20,
        shared_expert_intermediate_size=24,
        norm_topk_prob=True,
        decoder_sparse_step=2,
    ),
    "qwen3_moe": Qwen3MoeConfig(
        **COMMON,
        moe_intermediate_size=12,
        num_experts=8,
        intermediate_size=20,
        norm_topk_prob=True,
        head_dim=8,
        mlp_only_layers=[1],
    ),
}


INDEX = "model.safetensors.index.json"


def saved_family(name: str, folder: Path, *, stacked: bool = False) -> PreTrainedModel:
    """Save a random model of the family in several shards, and return it; stacked: with a layer's experts in one."""
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(copy.deepcopy(MODELS[name])).eval()  # saving writes the dtype into it
    for parameter in hf.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.3)
        else:  # norms about 1, biases about 0
            parameter.data.add_(0.3 * torch.randn(parameter.shape))
    hf.save_pretrained(folder, max_shard_size="20KB", save_original_format=not stacked)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return hf


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a model folder."""
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def store(folder: Path, tensors: dict[str, Tensor], shards: int = 1) -> None:
    """Write these as the folder's only tensors, in one file or in shards with an index."""
    for path in [*folder.glob("*.safetensors"), *folder.glob(INDEX)]:
        path.unlink()
    files = [f"model-{n + 1:05}-of-{shards:05}.safetensors" for n in range(shards)]
    weight_map = {name: files[n % shards] for n, name in enumerate(sorted(tensors))}
    for file in files:
        part = {name: tensors[name].contiguous() for name, place in weight_map.items() if place == file}
        save_file(part, folder / (file if shards > 1 else "model.safetensors"), {"format": "pt"})
    if shards > 1:
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def ids_and_mask(rows: int = 3, length: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random token ids and a mask without padding."""
    torch.manual_seed(5)
    return torch.randint(2, tiny.VOCAB, (rows, length)), torch.ones(rows, length, dtype=torch.bool)
