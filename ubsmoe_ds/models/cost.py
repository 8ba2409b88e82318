"""Compute FLOPs and trainable parameters of a model from its sizes.

A multiplication and an addition count as two FLOPs; softmax and norms are left out.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a mixture-of-experts decoder that its cost depends on."""

    layers: int
    hidden: int
    expert_width: int
    num_experts: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    lora_rank: int
    lora_attention: bool = False
    dense_layers: int = 0  # layers with a plain MLP of `dense_width` in place of experts
    dense_width: int = 0
    shared_width: int = 0  # width of the expert that every token passes beside its K
    tied_embeddings: bool = False  # the head is the embedding
    normed_queries: bool = False  # queries and keys pass a norm


def flops_per_token(shape: ModelShape, k: int, context: int) -> float:
    """Return the forward FLOPs of one token.

    Args:
        shape: the model.
        k: active experts.
        context: tokens attended to, counted in full (no causal halving).

    Returns:
        FLOPs. Training takes two to three times as much, the same factor for every k, so that ratios between k hold
        for it too: the backward pass of a frozen matrix costs one product, that of a LoRA factor two.
    """
    d, f, r = shape.hidden, shape.expert_width, shape.lora_rank
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = 2 * (2 * d * q + 2 * d * kv) + 4 * context * q
    if shape.lora_attention:
        attention += 2 * r * (2 * (d + q) + 2 * (d + kv))
    expert = 2 * 3 * d * f + 2 * 3 * r * (d + f)
    shared = 2 * 3 * d * shape.shared_width + (2 * d if shape.shared_width else 0)
    router = 2 * d * shape.num_experts
    sparse_layers = shape.layers - shape.dense_layers
    dense = shape.dense_layers * 2 * 3 * d * shape.dense_width
    return shape.layers * attention + sparse_layers * (router + shared + k * expert) + dense + 2 * d * shape.vocab


def step_flops(shape: ModelShape, k: int, tokens: int, context: int, answers: int) -> float:
    """Return the FLOPs of one step, forward and backward: twice the forward products, and once more those of LoRA.

    Args:
        shape, k, context: as in `flops_per_token`.
        tokens: number of tokens of all rows, padding included.
        answers: number of positions whose next token is asked for; the head is computed only there.
    """
    forward = flops_per_token(shape, k, context)
    lora = forward - flops_per_token(replace(shape, lora_rank=0), k, context)
    head = 2 * shape.hidden * shape.vocab
    return tokens * (2 * (forward - head) + lora) + answers * 2 * head


def trainable_parameters(shape: ModelShape, router: bool) -> int:
    """Return the number of values a client sends: LoRA, phi (also where DMR is off and none is sent), the router.

    Args:
        shape: the model.
        router: whether the router is trained.
    """
    d, f, r = shape.hidden, shape.expert_width, shape.lora_rank
    per_layer = shape.num_experts * 3 * r * (d + f) + shape.num_experts + (shape.num_experts * d if router else 0)
    total = (shape.layers - shape.dense_layers) * per_layer
    if shape.lora_attention:
        q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        total += shape.layers * r * (2 * (d + q) + 2 * (d + kv))
    return total
