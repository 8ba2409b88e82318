"""Define the line of a family: names in files and configs, and the rule of its router and experts. Imports no torch.

models/families.py has the lines; models/block_check.py compares them with transformers' blocks.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class RouterLine:
    """A family's router: names of its tensors in transformers' block, and its rule, see moe/router.py.

    weight, bias, correction: of the logits, and of the choice alone; "" where there is none
    correction_ndim: dimensions of the last, of which but one is more than 1
    score: "softmax" or "sigmoid"
    normalizes: whether the K weights sum to one; None: the config says (norm_topk_prob)
    scaling, least_sum, groups: keys of the config for the factor of the K weights, the least divisor, and (number of
        groups, number of kept ones)
    group_best: how many of a group's best values rank it
    grouped_if: (key, value) of the config on which groups depend
    """

    weight: str = "gate.weight"
    bias: str = ""
    correction: str = ""
    correction_ndim: int = 1
    score: str = "softmax"
    normalizes: bool | None = None
    scaling: str = ""
    least_sum: str = ""
    groups: tuple[str, str] = ("", "")
    group_best: int = 1
    grouped_if: tuple[str, str] = ("", "")

    @property
    def tensors(self) -> list[str]:
        """Return the names of the tensors."""
        return [name for name in (self.weight, self.bias, self.correction) if name]

    @property
    def saved(self) -> dict[str, str]:
        """Return our endings and transformers' names of what is in the weight's module, which PEFT saves whole."""
        ours = {"weight": self.weight, "bias": self.bias, "correction": self.correction}
        return {ending: name for ending, name in ours.items() if name.startswith(f"{self.module}.")}

    @property
    def module(self) -> str:
        """Return the module that holds the weight."""
        return self.weight.rpartition(".")[0]

    def groups_of(self, config: Any) -> tuple[int, int]:
        """Return (number of groups, number of kept ones) of a model; (1, 1) without groups."""
        key, value = self.grouped_if
        if not self.groups[0] or (key and getattr(config, key, None) != value):
            return 1, 1
        number, kept = (getattr(config, name, None) or 1 for name in self.groups)
        return number, kept


@dataclass(frozen=True)
class ExpertsLine:
    """A family's experts: what they compute, and the form of transformers' stacked tensors.

    activation: "swiglu", or "clamped_swish" with the config's swiglu_alpha and swiglu_limit
    biased: whether projections have biases, stacked as gate_up_proj_bias and down_proj_bias
    transposed: whether weights are [in, out]
    interleaved: whether outputs of gate and up alternate; else those of gate come first
    """

    activation: str = "swiglu"
    biased: bool = False
    transposed: bool = False
    interleaved: bool = False


@dataclass(frozen=True)
class Family:
    """How models of one `model_type` are stored, and what they compute.

    block: name of a layer's MoE block in the weights' tensor names, `model.layers.0.<block>.`
    module: its name in transformers' decoder layer
    gate, up, down: names of an expert's projections in the files, `experts.0.<gate>.weight`; "": only stacked ones
    renamed: (ending in files, transformers' name) of a block's tensors, where they differ
    num_experts, width, active: keys of the config for the number of experts of a layer, an expert's F, and K
    shared: names of the block's modules that every token passes: one, or (expert, its sigmoid gate)
    shared_beside: name of the decoder layer's module that every token passes beside the block
    returns_pair: whether the block returns (hidden states, router scores)
    attention: names of the projections that get LoRA with `lora.attention`, of those that a layer's self_attn has
    normed_queries: whether queries and keys pass a norm
    fused_attention: whether transformers computes attention by torch's fused operation unless told otherwise
    shared_width: keys of the config whose product is the width of the shared expert
    gated_attention: whether q_proj gives a gate too, of the same size as the queries
    """

    block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    num_experts: str = "num_experts"
    width: str = "moe_intermediate_size"
    active: str = "num_experts_per_tok"
    shared: tuple[str, ...] = ()
    shared_beside: str = ""
    normed_queries: bool = False
    fused_attention: bool = True
    shared_width: tuple[str, ...] = ()
    gated_attention: bool = False
    module: str = "mlp"
    renamed: tuple[tuple[str, str], ...] = ()
    returns_pair: bool = False
    attention: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    router: RouterLine = field(default_factory=RouterLine)
    experts: ExpertsLine = field(default_factory=ExpertsLine)

    @property
    def keys(self) -> list[str]:
        """Return the keys that a config of the family has."""
        line = self.router
        optional = [line.scaling, line.least_sum, *line.groups, *self.shared_width]
        clamped = ("swiglu_alpha", "swiglu_limit") if self.experts.activation == "clamped_swish" else ()
        optional += [*clamped, "norm_topk_prob" * (line.normalizes is None)]
        return [self.num_experts, self.width, self.active, *filter(None, optional)]

    def usual_name(self, name: str) -> str:
        """Return a stored tensor's name as the family's files usually have it, of renamed ones transformers' name.

        transformers reads other names too: its own in memory, and those of a model saved without its head.
        """
        name = name if name.startswith(("model.", "lm_head.")) else f"model.{name}"
        name = name.replace(f".{self.module}.", f".{self.block}.")
        for stored, ours in self.renamed:
            if name.endswith(f".{self.block}.{stored}"):
                return f"{name.removesuffix(stored)}{ours}"
        return name
