"""Compute FLOPs and trainable parameters of a model from its sizes.

A multiplication and an addition count as two FLOPs; softmax and norms are left out.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple


class Projection(NamedTuple):
    """A frozen matrix of a layer's mixer.

    first: whether it reads the layer's input; adapted: whether `lora_attention` gives it LoRA.
    """

    inputs: int
    outputs: int
    first: bool = True
    adapted: bool = True


@dataclass(frozen=True)
class Mixer:
    """Describe the part of a layer that mixes tokens: attention, or a recurrence.

    projections: its matrices
    scores, values: widths of all heads' queries and values; per_token: FLOPs of a recurrence, whatever the context
    """

    projections: tuple[Projection, ...]
    scores: int = 0
    values: int = 0
    per_token: float = 0.0

    @property
    def elements(self) -> int:
        """Return the number of its weights."""
        return sum(p.inputs * p.outputs for p in self.projections)

    @property
    def adapter_width(self) -> int:
        """Return the sum of inputs and outputs of the adapted matrices: LoRA elements for each LoRA rank."""
        return sum(p.inputs + p.outputs for p in self.projections if p.adapted)


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
    shared_gated: bool = True  # the shared expert has a gate
    fused_attention: bool = True  # scores and sums of values are one operation, whose result can be kept
    attention: Mixer | None = None  # None: q, k, v, o of the heads above
    recurrence: Mixer | None = None  # in place of attention in the layers `recurrent`
    recurrent: tuple[int, ...] = ()

    def mixer(self, layer: int) -> Mixer:
        """Return the mixer of a layer."""
        if layer in self.recurrent:
            assert self.recurrence is not None
            return self.recurrence
        if self.attention is not None:
            return self.attention
        d, q, kv = self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim
        return Mixer((Projection(d, q), Projection(d, kv), Projection(d, kv), Projection(q, d, first=False)), q, q)

    @property
    def mixers(self) -> list[Mixer]:
        """Return the mixers of all layers."""
        return [self.mixer(layer) for layer in range(self.layers)]


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


def step_flops(
    shape: ModelShape,
    k: int,
    tokens: int,
    context: int,
    answers: int,
    *,
    router: bool,
    again: bool = False,
    spread: bool = False,
) -> float:
    """Return the FLOPs of one training step, forward and backward, without pseudo-gradients.

    Args:
        shape, k, context: as in `flops_per_token`.
        tokens: number of tokens of all rows, padding included.
        answers: number of positions whose next token is asked for; the head is computed only there.
        router: whether the router is trained.
        again: whether backward computes the layers again (`train.activation_checkpointing`).
        spread: whether the experts are on several ranks; nothing of them is then kept from the first pass.
    """
    layers = _layers(shape, k, context, router)
    token = 2 * layers.frozen + 3 * layers.learned - _without_backward(shape, k, context)
    if again:
        token += _computed_again(shape, k, context, router) - _kept(shape, k, context, spread)
    return tokens * token + answers * 2 * _head(shape)


def _layers(shape: ModelShape, k: int, context: int, router: bool) -> Products:
    """Return the products of all decoder layers."""
    d, sparse = shape.hidden, shape.layers - shape.dense_layers
    routing = 2 * d * shape.num_experts
    total = Products(sparse * _shared(shape) + shape.dense_layers * _dense(shape), 0.0)
    total = total.plus(Products(0.0, routing) if router else Products(routing, 0.0), times=sparse)
    for mixer in shape.mixers:
        total = total.plus(_mixer(shape, mixer, context))
    return total.plus(_expert(shape), times=k * sparse)


def _without_backward(shape: ModelShape, k: int, context: int) -> float:
    """Return the FLOPs of the backward products that autograd leaves out: those that lead to nothing trained.

    The embedding is frozen. So the first matrices that have LoRA give their input no gradient if it is a layer's.
    Without LoRA on attention nothing before the experts of the first layer that has any is run backward, and these
    experts, their router and the shared expert give their input no gradient.
    """
    d, r, left_out = shape.hidden, shape.lora_rank, 0.0
    for layer in range(shape.leading_dense + 1):
        mixer = shape.mixer(layer)
        if shape.lora_attention and any(p.adapted for p in mixer.projections):
            first = [p for p in mixer.projections if p.first]
            return left_out + sum(2 * d * p.outputs + 2 * r * d * p.adapted for p in first)
        products = _mixer(shape, mixer, context)
        left_out += products.frozen + 2 * products.learned
        left_out += _dense(shape) if layer < shape.leading_dense else 0
    experts = k * 2 * (2 * d * shape.expert_width + 2 * r * d)  # gate and up; down's input leads to their LoRA
    return left_out + experts + 2 * d * shape.num_experts + _shared(shape)


def _computed_again(shape: ModelShape, k: int, context: int, router: bool) -> float:
    """Return the FLOPs of a forward pass for backward alone: of layers in which something is trained, or after such.

    torch ends a layer's pass once it has all that backward needs, which is before the last product of frozen networks.
    """
    total, d, before = _layers(shape, k, context, router).forward, shape.hidden, _first_trained(shape)
    for layer in range(before):
        total -= _mixer(shape, shape.mixer(layer), context).forward + _dense(shape)
    total -= (shape.dense_layers - before) * 2 * d * shape.dense_width
    if shape.shared_width:
        adapted = map(partial(_is_adapted, shape), range(shape.leading_dense + 1))
        first = not any(adapted)  # whose shared expert leads to nothing trained
        last_product = 0 if shape.shared_gated else 2 * d * shape.shared_width
        total -= first * _shared(shape) + (shape.layers - shape.dense_layers - first) * last_product
    return total


def _kept(shape: ModelShape, k: int, context: int, spread: bool) -> float:
    """Return the FLOPs of what the first pass keeps: attention's result, and the experts' where one rank has them all.

    Of the experts it is the last product, [W, s B] of down; A h is needed in backward.
    """
    mixers = shape.mixers[_first_trained(shape) :]
    kept = sum(2 * context * (mixer.scores + mixer.values) for mixer in mixers) * shape.fused_attention
    down = 2 * shape.hidden * (shape.expert_width + shape.lora_rank)
    return kept + (0 if spread else k * (shape.layers - shape.dense_layers) * down)


def _first_trained(shape: ModelShape) -> int:
    """Return the first layer in which something is trained: of leading dense ones, one with LoRA on its mixer."""
    layers = range(shape.leading_dense)
    return next((layer for layer in layers if _is_adapted(shape, layer)), shape.leading_dense)


def _is_adapted(shape: ModelShape, layer: int) -> bool:
    """Return whether a layer's mixer has LoRA."""
    return shape.lora_attention and any(p.adapted for p in shape.mixer(layer).projections)


def _mixer(shape: ModelShape, mixer: Mixer, context: int) -> Products:
    """Return the products of a layer's mixer; a recurrence is counted as such, token by token."""
    lora = 2 * shape.lora_rank * mixer.adapter_width if shape.lora_attention else 0
    scores = 2 * context * (mixer.scores + mixer.values)
    return Products(2 * mixer.elements, scores + mixer.per_token + lora)


def _expert(shape: ModelShape) -> Products:
    d, f, r = shape.hidden, shape.expert_width, shape.lora_rank
    return Products(2 * 3 * d * f, 2 * 3 * r * (d + f))


def _dense(shape: ModelShape) -> float:
    return 2 * 3 * shape.hidden * shape.dense_width


def _shared(shape: ModelShape) -> float:
    """Return the FLOPs of the shared expert and, if it has one, its gate."""
    d, width = shape.hidden, shape.shared_width
    return 2 * 3 * d * width + 2 * d * shape.shared_gated if width else 0


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
        total += r * sum(mixer.adapter_width for mixer in shape.mixers)
    return total
