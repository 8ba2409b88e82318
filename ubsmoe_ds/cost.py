"""FLOPs, parameters and bytes of a client, analytic. Multiply and add count as two; softmax and norms are left out."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a mixture-of-experts decoder: the numbers that its cost depends on."""

    layers: int
    hidden: int
    expert_width: int
    num_experts: int
    heads: int
    kv_heads: int
    vocab: int
    lora_rank: int
    lora_attention: bool = False


def flops_per_token(shape: ModelShape, k: int, context: int) -> float:
    """Forward FLOPs of one token.

    Args:
        shape: the model.
        k: active experts.
        context: tokens attended to, counted in full (no causal halving).

    Returns:
        FLOPs. Training takes two to three times as much alike for every k, so that ratios between k hold for it too:
        the backward pass of a frozen matrix costs one product, of a LoRA factor two.
    """
    d, f, r = shape.hidden, shape.expert_width, shape.lora_rank
    kv = d * shape.kv_heads // shape.heads
    attention = 2 * (2 * d * d + 2 * d * kv) + 4 * context * d
    if shape.lora_attention:
        attention += 2 * r * (2 * (d + d) + 2 * (d + kv))
    expert = 2 * 3 * d * f + 2 * 3 * r * (d + f)
    router = 2 * d * shape.num_experts
    return shape.layers * (attention + router + k * expert) + 2 * d * shape.vocab


def trainable_parameters(shape: ModelShape, router: bool) -> int:
    """LoRA, phi and, if trained, the router: what a client sends to the others."""
    d, f, r = shape.hidden, shape.expert_width, shape.lora_rank
    per_layer = shape.num_experts * 3 * r * (d + f) + shape.num_experts + (shape.num_experts * d if router else 0)
    if shape.lora_attention:
        kv = d * shape.kv_heads // shape.heads
        per_layer += r * (2 * (d + d) + 2 * (d + kv))
    return shape.layers * per_layer
