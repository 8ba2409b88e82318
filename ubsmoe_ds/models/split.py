"""Make a mixture of experts from a dense Llama whose experts are parts of its feed-forward networks [ours].

`split` divides a network's neurons: the most important ones form a shared expert that every token passes, the others
become experts. A router is fitted to what each expert would contribute, and the down projections are repaired in closed
form for the neurons that a token leaves out. `recover` then trains the new parts for a few steps towards the dense
model's next-token distribution.

Shapes: T tokens, B rows, S positions, D width, F the dense network's neurons, G of them in an expert, H in the shared
expert, E experts, V vocabulary.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, Qwen2MoeConfig, Qwen2MoeForCausalLM

from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.models.upcycle import carried_keys, check_dense, copy_all_but_blocks

QUANTILE = 0.99  # contributions are cut there: the first tokens of a text have huge activations


class SplitReport(NamedTuple):
    """For each layer, the share of the dense output's energy that the K experts miss, before and after the repair."""

    error_before: list[float]
    error_after: list[float]


@torch.no_grad()
def split(
    dense: PreTrainedModel,
    ids_BS: Tensor,
    *,
    experts: int,
    shared: int,
    ks: Sequence[int],
    router_std: float = 0.25,
    ridge: float = 1e-2,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[PreTrainedModel, SplitReport]:
    """Return a Qwen2-MoE whose experts are parts of the dense network, made layer by layer on calibration text.

    Args:
        dense: a Llama.
        ids_BS: calibration text, without padding.
        experts: E; must divide the neurons that are not shared.
        shared: H, neurons that are active for every token.
        ks: values of K that the repair is made for, one drawn for each token; the largest becomes the config's.
        router_std: spread of the router's logits; at small values the K weights are nearly equal.
        ridge: ridge of the repair, relative to the mean of the normal matrix's diagonal.
        seed: of the assignment of neurons to experts and of the draws of K.
        say: called with a line for each layer.

    Raises:
        UserError: as `check_dense`, and for sizes that do not divide.
    """
    model = _empty_split_model(dense, experts, shared, max(ks))
    generator = torch.Generator().manual_seed(seed)
    errors = []
    hidden_BSD = dense.model.embed_tokens(ids_BS)
    rotary = dense.model.rotary_emb(hidden_BSD, torch.arange(ids_BS.shape[1]).unsqueeze(0))
    for number, (source, target) in enumerate(zip(dense.model.layers, model.model.layers, strict=True)):
        middle_BSD = hidden_BSD + _attend(source, hidden_BSD, rotary)
        x_TD = source.post_attention_layernorm(middle_BSD).flatten(0, 1)
        parts = _NeuronSplit(source.mlp, x_TD.float(), experts, shared, generator)
        k_T = torch.tensor(ks)[torch.randint(len(ks), (len(x_TD),), generator=generator)]
        before, after, y_TD = parts.convert(target.mlp, k_T, router_std, ridge)
        errors.append((before, after))
        hidden_BSD = middle_BSD + y_TD.view_as(middle_BSD).to(middle_BSD.dtype)
        say(f"layer {number + 1}/{len(dense.model.layers)}: error {before:.3f} -> {after:.3f}")
    return model.eval(), SplitReport(*map(list, zip(*errors, strict=True)))


def _empty_split_model(dense: PreTrainedModel, experts: int, shared: int, k: int) -> PreTrainedModel:
    """Return the Qwen2-MoE with everything but its blocks copied from the dense model."""
    check_dense(dense.config)
    neurons = dense.config.intermediate_size
    if not 0 < shared < neurons or (neurons - shared) % experts:
        raise UserError(
            f"--shared: {neurons} - {shared} neurons cannot be divided among {experts} experts evenly; change --shared "
            "or --experts"
        )
    config = Qwen2MoeConfig(
        **carried_keys(dense),
        intermediate_size=neurons,
        moe_intermediate_size=(neurons - shared) // experts,
        shared_expert_intermediate_size=shared,
        num_experts=experts,
        num_experts_per_tok=k,
        norm_topk_prob=False,
        qkv_bias=False,
        use_sliding_window=False,
    )
    model = Qwen2MoeForCausalLM(config).to(dense.dtype)
    copy_all_but_blocks(dense, model)
    return model


def _attend(layer: Any, hidden_BSD: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Return the attention's output of a dense decoder layer."""
    normed_BSD = layer.input_layernorm(hidden_BSD)
    return layer.self_attn(hidden_states=normed_BSD, position_embeddings=rotary, attention_mask=None)[0]


class _NeuronSplit:
    """One layer's neurons divided among the shared expert and the experts, and its router and repair, in fp32.

    Neurons are in the order of order_F: those of the shared expert, then those of each expert.
    """

    def __init__(self, mlp: nn.Module, x_TD: Tensor, experts: int, shared: int, generator: torch.Generator) -> None:
        self.x_TD, self.experts, self.shared = x_TD, experts, shared
        gate_FD, up_FD, down_DF = (getattr(mlp, f"{name}_proj").weight.float() for name in ("gate", "up", "down"))
        h_TF = F.silu(x_TD @ gate_FD.mT) * (x_TD @ up_FD.mT)
        self.y_TD = h_TF @ down_DF.mT
        norm_T = self.y_TD.norm(dim=1)
        self.weight_T1 = (1 / norm_T.clamp_min(norm_T.median())).unsqueeze(
            1
        )  # weights of tokens: huge outputs count less
        # the most important neurons are shared, the others go to the experts at random
        importance_F = (h_TF.abs() * self.weight_T1).mean(0) * down_DF.norm(dim=0)
        ranked_F = importance_F.argsort(descending=True)
        others = ranked_F[shared:]
        order_F = torch.cat([ranked_F[:shared], others[torch.randperm(len(others), generator=generator)]])
        self.gate_FD, self.up_FD, self.down_DF = gate_FD[order_F], up_FD[order_F], down_DF[:, order_F].clone()
        self.h_TF = h_TF[:, order_F]

    def convert(self, block: Any, k_T: Tensor, router_std: float, ridge: float) -> tuple[float, float, Tensor]:
        """Fit the router, repair the down projections and write both to a block of Qwen2-MoE; return as `repair`."""
        router_ED = self.fit_router(router_std)
        result = self.repair(router_ED, k_T, ridge)
        self.write(block, router_ED)
        return result

    def fit_router(self, std: float) -> Tensor:
        """Fit logits by least squares to the norm of each expert's output, scaled to the spread `std`; [E, D]."""
        h_TEG = self.h_TF[:, self.shared :].unflatten(1, (self.experts, -1))
        down_EGD = self.down_DF[:, self.shared :].unflatten(1, (self.experts, -1)).permute(1, 2, 0)
        norm_TE = torch.stack([(h_TEG[:, e] @ down_EGD[e]).norm(dim=1) for e in range(self.experts)], dim=1)
        norm_TE = norm_TE.minimum(norm_TE.quantile(QUANTILE, dim=0))
        wanted_TE = norm_TE - norm_TE.mean(1, keepdim=True)  # softmax sees differences only
        router_DE = _ridge(self.x_TD, wanted_TE, 1e-3)
        logits_TE = self.x_TD @ router_DE
        return (router_DE * (std / logits_TE.std(dim=1).mean().clamp_min(1e-12))).mT.contiguous()

    def repair(self, router_ED: Tensor, k_T: Tensor, ridge: float) -> tuple[float, float, Tensor]:
        """Change the down projections so that the neurons a token keeps make up for those it leaves out.

        Returns:
            (share of the output's energy that is missing before, the same after, the output with K experts [T, D]).
        """
        # the factor on each neuron: 1 if shared, E p where its expert is among the K (near 1), else 0
        p_TE = (self.x_TD @ router_ED.mT).softmax(-1)
        rank_TE = p_TE.argsort(dim=1, descending=True).argsort(dim=1)
        factor_TE = self.experts * p_TE * (rank_TE < k_T.unsqueeze(1))
        group = (self.h_TF.shape[1] - self.shared) // self.experts
        factor_TF = torch.cat([torch.ones(len(p_TE), self.shared), factor_TE.repeat_interleave(group, dim=1)], dim=1)
        kept_TF = self.h_TF * factor_TF
        # ridge regression of the weighted tokens' missing output on the neurons kept
        wanted_TD, weighted_TF = self.y_TD * self.weight_T1, kept_TF * self.weight_T1
        missing_TD = wanted_TD - weighted_TF @ self.down_DF.mT
        energy = wanted_TD.square().sum()
        before = float(missing_TD.square().sum() / energy)
        change_FD = _ridge(weighted_TF, missing_TD, ridge)
        self.down_DF += change_FD.mT
        after = float((missing_TD - weighted_TF @ change_FD).square().sum() / energy)
        return before, after, kept_TF @ self.down_DF.mT

    def write(self, block: Any, router_ED: Tensor) -> None:
        """Write to a block of Qwen2-MoE: its K weights are about 1 / E each, its shared expert's gate is 1 / 2."""
        shared, down_DF = self.shared, self.down_DF
        block.gate.weight.copy_(router_ED)
        gate_up_EOD = torch.cat(
            [part[shared:].unflatten(0, (self.experts, -1)) for part in (self.gate_FD, self.up_FD)], dim=1
        )
        block.experts.gate_up_proj.copy_(gate_up_EOD)
        down_EDG = down_DF[:, shared:].unflatten(1, (self.experts, -1)).transpose(0, 1)
        block.experts.down_proj.copy_(self.experts * down_EDG)
        block.shared_expert_gate.weight.zero_()
        block.shared_expert.gate_proj.weight.copy_(self.gate_FD[:shared])
        block.shared_expert.up_proj.weight.copy_(self.up_FD[:shared])
        block.shared_expert.down_proj.weight.copy_(2 * down_DF[:, :shared])


def recover(
    model: PreTrainedModel, dense: PreTrainedModel, batches: Iterable[Tensor], ks: Sequence[int], lr: float
) -> Iterable[tuple[int, float]]:
    """Train the blocks (experts, shared expert, router) towards the dense model's next-token distribution [ours].

    Args:
        model: a result of `split`; changed in place.
        dense: the model it was made from, as the teacher.
        batches: token ids [B, S], one batch a step.
        ks: K of the steps, in turn.
        lr: learning rate of AdamW.

    Yields:
        For each step, (K, mean KL divergence from the dense model's distribution, in nats a token).
    """
    blocks = [layer.mlp for layer in model.model.layers]
    model.requires_grad_(False).train()
    trained = [p.requires_grad_() for block in blocks for p in block.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    for number, ids_BS in enumerate(batches):
        k = ks[number % len(ks)]
        for block in blocks:
            block.gate.top_k = k
        with torch.no_grad():
            wanted = dense(input_ids=ids_BS, use_cache=False).logits.float().log_softmax(-1)
        given = model(input_ids=ids_BS, use_cache=False).logits.float().log_softmax(-1)
        loss = F.kl_div(given, wanted, log_target=True, reduction="none").sum(-1).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield k, float(loss.detach())
    for block in blocks:
        block.gate.top_k = model.config.num_experts_per_tok
    model.requires_grad_(True).eval()


def _ridge(x_TI: Tensor, y_TO: Tensor, ridge: float) -> Tensor:
    """Return W = argmin ||x W - y||^2 + ridge * mean(diag x^T x) ||W||^2, [I, O]."""
    normal_II = x_TI.mT @ x_TI
    normal_II.diagonal().add_(ridge * normal_II.diagonal().mean())
    return torch.linalg.solve(normal_II, x_TI.mT @ y_TO)
