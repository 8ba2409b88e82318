"""Small random models: every supported family, and variants within some."""

import copy
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    Dots1Config,
    Ernie4_5_MoeConfig,
    FlexOlmoConfig,
    Glm4MoeConfig,
    GptOssConfig,
    GraniteMoeConfig,
    GraniteMoeSharedConfig,
    HunYuanMoEV1Config,
    MiniMaxM2Config,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3_5MoeTextConfig,
    Qwen3MoeConfig,
    Qwen3NextConfig,
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
BARE = {key: value for key, value in COMMON.items() if key != "num_experts_per_tok"}  # families that call it otherwise
NARROW = {"intermediate_size": 20, "moe_intermediate_size": 12}
RECURRENT = {  # layers with a recurrence in place of attention, and one with attention
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "head_dim": 8,
}
LATENT = {  # multi-head latent attention
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "num_key_value_heads": 4,
}
MULTIPLIED = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 0.5,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.4,
}
DENSE_FIRST = {"n_routed_experts": 8, "n_shared_experts": 2, "first_k_dense_replace": 1}
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
    "flex_olmo": FlexOlmoConfig(**COMMON, intermediate_size=12, num_experts=8, norm_topk_prob=True),
    "qwen3_next": Qwen3NextConfig(
        **COMMON, **NARROW, **RECURRENT, num_experts=8, shared_expert_intermediate_size=24, mlp_only_layers=[0]
    ),
    "qwen3_5_moe_text": Qwen3_5MoeTextConfig(
        **COMMON, **NARROW, **RECURRENT, num_experts=8, shared_expert_intermediate_size=24
    ),
    "granitemoe": GraniteMoeConfig(**COMMON, **MULTIPLIED, intermediate_size=12, num_local_experts=8),
    "granitemoeshared": GraniteMoeSharedConfig(
        **COMMON, **MULTIPLIED, intermediate_size=12, num_local_experts=8, shared_intermediate_size=24
    ),
    "deepseek_v2": DeepseekV2Config(
        **COMMON | LATENT | NARROW | DENSE_FIRST,
        q_lora_rank=None,
        routed_scaling_factor=1.5,
    ),
    "deepseek_v2, grouped": DeepseekV2Config(
        **COMMON | LATENT | NARROW | DENSE_FIRST,
        q_lora_rank=12,
        topk_method="group_limited_greedy",
        n_group=4,
        topk_group=2,
    ),
    "deepseek_v3": DeepseekV3Config(
        **COMMON | LATENT | NARROW | DENSE_FIRST,
        q_lora_rank=12,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
    ),
    "glm4_moe": Glm4MoeConfig(
        **COMMON, **NARROW, **DENSE_FIRST, head_dim=8, routed_scaling_factor=1.5, use_qk_norm=True, attention_bias=True
    ),
    "dots1": Dots1Config(**COMMON, **NARROW, **DENSE_FIRST, head_dim=8, n_group=2, topk_group=1, norm_topk_prob=False),
    "ernie4_5_moe": Ernie4_5_MoeConfig(
        **BARE,
        **NARROW,
        moe_k=3,
        moe_num_experts=8,
        moe_num_shared_experts=2,
        moe_layer_start_index=1,
    ),
    "ernie4_5_moe, no shared expert": Ernie4_5_MoeConfig(
        **BARE,
        **NARROW,
        moe_k=3,
        moe_num_experts=8,
        moe_num_shared_experts=0,
        moe_layer_interval=2,
        moe_norm_min=0.9,
    ),
    "hunyuan_v1_moe": HunYuanMoEV1Config(
        **BARE,
        intermediate_size=12,
        num_experts=8,
        moe_topk=3,
        head_dim=8,
    ),
    "minimax_m2": MiniMaxM2Config(**COMMON, intermediate_size=12, num_local_experts=8, head_dim=8, bos_token_id=None),
    "gpt_oss": GptOssConfig(
        **COMMON, intermediate_size=12, num_local_experts=8, head_dim=8, swiglu_limit=0.5, sliding_window=8
    ),
}


INDEX = "model.safetensors.index.json"


def random_model(name: str) -> PreTrainedModel:
    """Return a random model of the family, the same in each call."""
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(copy.deepcopy(MODELS[name])).eval()  # saving writes the dtype into it
    for tensor, value in hf.state_dict().items():  # buffers too
        if value.ndim > 1 and "correction" not in tensor:
            value.normal_(0, 0.3)
        else:  # norms about 1, biases about 0
            value.add_(0.3 * torch.randn(value.shape))
    return hf


def saved_family(name: str, folder: Path, *, stacked: bool = False) -> PreTrainedModel:
    """Save a random model of the family in several shards, and return it; stacked: with a layer's experts in one."""
    hf = random_model(name)
    hf.save_pretrained(folder, max_shard_size="20KB", save_original_format=not stacked)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return hf


def with_k(hf: PreTrainedModel, k: int) -> PreTrainedModel:
    """Return a copy of transformers' model with another K than its config's."""
    changed = copy.deepcopy(hf)
    for module in changed.modules():
        if hasattr(module, "top_k"):
            module.top_k = k
    return changed


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
