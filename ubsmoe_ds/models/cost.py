"""Compute FLOPs and trainable parameters of a model from its sizes.

A multiplication and an addition count as two FLOPs; softmax and norms are left out.
"""

from dataclasses import dataclass
from typing import NamedTuple


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
    leading_dense: int = 0  # those of them before the first layer with experts
    dense_width: int = 0
    shared_width: int = 0  # width of the expert that every token passes beside its K
    tied_embeddings: bool = False  # the head is the embedding
    normed_queries: bool = False  # queries and keys pass a norm


class Products(NamedTuple):
    """Forward FLOPs of one token in matrix products, by what their backward pass costs.

    frozen: with a frozen matrix; backward is one product of the same size, for the gradient of the input.
    learned: of two factors that both get a gradient, so two products backward: LoRA, a trained router, and attention's
        scores and their weighted sum of values, which have no parameters.
    """

    frozen: float
    learned: float

    @property
    def forward(self) -> float:
        """Return the forward FLOPs."""
        return self.frozen + self.learned

    def plus(self, other: "Products", times: int = 1) -> "Products":
        """Return the sum of this and of `times` the other."""
        return Products(self.frozen + times * other.frozen, self.learned + times * other.learned)


def flops_per_token(shape: ModelShape, k: int, context: int) -> float:
    """Return the forward FLOPs of one token, the head included.

    Args:
        shape: the model.
        k: active experts.
        context: tokens attended to, counted in full (no causal halving).
    """
    return _layers(shape, k, context, router=False).forward + _head(shape)


def step_flops(shape: ModelShape, k: int, tokens: int, context: int, answers: int, *, router: bool) -> float:
    """Return the FLOPs of one training step, forward and backward, without pseudo-gradients.

    Args:
        shape, k, context: as in `flops_per_token`.
        tokens: number of tokens of all rows, padding included.
        answers: number of positions whose next token is asked for; the head is computed only there.
        router: whether the router is trained.
    """
    layers = _layers(shape, k, context, router)
    token = 2 * layers.frozen + 3 * layers.learned - _without_backward(shape, k, context)
    return tokens * token + answers * 2 * _head(shape)


def _layers(shape: ModelShape, k: int, context: int, router: bool) -> Products:
    """Return the products of all decoder layers."""
    d, sparse = shape.hidden, shape.layers - shape.dense_layers
    routing = 2 * d * shape.num_experts
    total = Products(sparse * _shared(shape) + shape.dense_layers * _dense(shape), 0.0)
    total = total.plus(Products(0.0, routing) if router else Products(routing, 0.0), times=sparse)
    total = total.plus(_attention(shape, context), times=shape.layers)
    return total.plus(_expert(shape), times=k * sparse)


def _without_backward(shape: ModelShape, k: int, context: int) -> float:
    """Return the FLOPs of the backward products that autograd leaves out: those that lead to nothing trained.

    The embedding is frozen. So with LoRA on attention the first layer's queries, keys and values give their input no
    gradient. Without it nothing before the experts of the first layer that has any is run backward, and these experts,
    their router and the shared expert give their input no gradient.
    """
    d, r = shape.hidden, shape.lora_rank
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    if shape.lora_attention:
        return 2 * d * (q + 2 * kv) + 3 * 2 * r * d
    attention = _attention(shape, context)
    before = (shape.leading_dense + 1) * (attention.frozen + 2 * attention.learned)
    before += shape.leading_dense * _dense(shape)
    experts = k * 2 * (2 * d * shape.expert_width + 2 * r * d)  # gate and up; down's input leads to their LoRA
    return before + experts + 2 * d * shape.num_experts + _shared(shape)


def _attention(shape: ModelShape, context: int) -> Products:
    d, r = shape.hidden, shape.lora_rank
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    lora = 2 * r * (2 * (d + q) + 2 * (d + kv)) if shape.lora_attention else 0
    return Products(2 * (2 * d * q + 2 * d * kv), 4 * context * q + lora)


def _expert(shape: ModelShape) -> Products:
    d, f, r = shape.hidden, shape.expert_width, shape.lora_rank
    return Products(2 * 3 * d * f, 2 * 3 * r * (d + f))


def _dense(shape: ModelShape) -> float:
    return 2 * 3 * shape.hidden * shape.dense_width


def _shared(shape: ModelShape) -> float:
    """Return the FLOPs of the shared expert and its gate."""
    d, width = shape.hidden, shape.shared_width
    return 2 * 3 * d * width + 2 * d if width else 0


def _head(shape: ModelShape) -> float:
    return 2 * shape.hidden * shape.vocab


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
