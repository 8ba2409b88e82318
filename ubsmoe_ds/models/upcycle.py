"""Dense Llama-family models made mixtures of experts: copies of their feed-forward networks, or parts of them.

`upcycle` copies: every K computes what the dense model does, exactly, and experts part ways in training.
`split` deals the neurons out [ours]: the most important ones are a shared expert that every token passes, the others
become experts; a router is fitted to what each of them would contribute, and the down projections are repaired in
closed form for the neurons that a token leaves out. `recover` then trains the new parts for a few steps to say what the
dense model says.

Shapes: T tokens, B rows, S positions, D width, F the dense network's neurons, G of them in an expert, H in the shared
expert, E experts, V vocabulary.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from ubsmoe_ds.base.errors import UserError

CARRIED = (  # keys that the configs of all these families share
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("hidden_act", "rms_norm_eps", "max_position_embeddings", "rope_parameters", "tie_word_embeddings"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)
ROUTER_STD = 0.02
QUANTILE = 0.99  # first tokens of a text have huge activations; what an expert contributes is cut there


def check_dense(config: Any) -> None:
    """That the model is a Llama without biases, whose blocks an expert can hold.

    Raises:
        UserError: naming what it is instead.
    """
    if config.model_type != "llama":
        raise UserError(
            f"--model: is of the family {config.model_type!r}; a dense model of the family 'llama' can be prepared"
        )
    for key in ("attention_bias", "mlp_bias"):
        if getattr(config, key, False):
            raise UserError(f"--model: has {key} true; experts without biases cannot hold it")
    if config.hidden_act != "silu":
        raise UserError(f"--model: hidden_act {config.hidden_act!r} is not supported; the experts are SwiGLU (silu)")


@torch.no_grad()
def upcycle(dense: PreTrainedModel, experts: int, k: int, seed: int = 0) -> PreTrainedModel:
    """A Mixtral whose experts are all copies of the dense network; equal logits for every K (sparse upcycling).

    Mixtral's K weights sum to one, hence the equality. The router starts small and random.

    Args:
        dense: a Llama.
        experts: copies.
        k: `num_experts_per_tok` of the config.
        seed: of the router.

    Raises:
        UserError: as `check_dense`.
    """
    check_dense(dense.config)
    config = MixtralConfig(
        **_carried(dense.config),
        intermediate_size=dense.config.intermediate_size,
        num_local_experts=experts,
        num_experts_per_tok=k,
        sliding_window=None,
    )
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dense.dtype)
    _copy_all_but_blocks(dense, model)
    for source, target in zip(dense.model.layers, model.model.layers, strict=True):
        block = target.mlp
        gate_up_OD = torch.cat([source.mlp.gate_proj.weight, source.mlp.up_proj.weight])
        block.experts.gate_up_proj.copy_(gate_up_OD.expand_as(block.experts.gate_up_proj))
        block.experts.down_proj.copy_(source.mlp.down_proj.weight.expand_as(block.experts.down_proj))
        block.gate.weight.copy_(torch.randn(block.gate.weight.shape, generator=generator) * ROUTER_STD)
    return model.eval()


class SplitReport(NamedTuple):
    """Of each layer: what the K chosen experts leave of the dense output's energy as error, before and after repair."""

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
    """A Qwen2-MoE whose experts are parts of the dense network, layer by layer on calibration text.

    Args:
        dense: a Llama.
        ids_BS: calibration text, without padding.
        experts: E; must divide what `shared` leaves of the neurons.
        shared: H, neurons that stay on for every token.
        ks: values of K that the repair is made for, drawn anew for each token; the largest becomes the config's.
        router_std: spread of the router's logits. Small, and the K weights are near to equal; large, and they vary.
        ridge: of the repair, over the mean of the normal matrix's diagonal.
        seed: of the neurons' deal and of the draws of K.
        say: told of each layer.

    Raises:
        UserError: as `check_dense`, and for sizes that do not go up.
    """
    check_dense(dense.config)
    neurons = dense.config.intermediate_size
    if not 0 < shared < neurons or (neurons - shared) % experts:
        raise UserError(f"--shared: {neurons} - {shared} neurons cannot be dealt to {experts} experts evenly")
    config = Qwen2MoeConfig(
        **_carried(dense.config),
        intermediate_size=neurons,
        moe_intermediate_size=(neurons - shared) // experts,
        shared_expert_intermediate_size=shared,
        num_experts=experts,
        num_experts_per_tok=max(ks),
        norm_topk_prob=False,
        qkv_bias=False,
        use_sliding_window=False,
    )
    model = Qwen2MoeForCausalLM(config).to(dense.dtype)
    _copy_all_but_blocks(dense, model)
    generator = torch.Generator().manual_seed(seed)
    report = SplitReport([], [])
    hidden_BSD = dense.model.embed_tokens(ids_BS)
    rotary = dense.model.rotary_emb(hidden_BSD, torch.arange(ids_BS.shape[1]).unsqueeze(0))
    for number, (source, target) in enumerate(zip(dense.model.layers, model.model.layers, strict=True)):
        attended = source.self_attn(
            hidden_states=source.input_layernorm(hidden_BSD), position_embeddings=rotary, attention_mask=None
        )[0]
        middle_BSD = hidden_BSD + attended
        x_TD = source.post_attention_layernorm(middle_BSD).flatten(0, 1)
        deal = _Deal(source.mlp, x_TD.float(), experts, shared, generator)
        k_T = torch.tensor(ks)[torch.randint(len(ks), (len(x_TD),), generator=generator)]
        router_ED = deal.fit_router(router_std)
        before, after, y_TD = deal.repair(router_ED, k_T, ridge)
        deal.write(target.mlp, router_ED)
        report.error_before.append(before)
        report.error_after.append(after)
        hidden_BSD = middle_BSD + y_TD.view_as(middle_BSD).to(middle_BSD.dtype)
        say(f"layer {number + 1}/{len(dense.model.layers)}: error {before:.3f} -> {after:.3f}")
    return model.eval(), report


class _Deal:
    """One layer's neurons dealt to the shared expert and the others, and what follows from it; fp32.

    order_F lists the shared expert's neurons, then each expert's; columns and rows below are in that order.
    """

    def __init__(self, mlp: nn.Module, x_TD: Tensor, experts: int, shared: int, generator: torch.Generator) -> None:
        self.x_TD, self.experts, self.shared = x_TD, experts, shared
        gate_FD, up_FD, down_DF = (getattr(mlp, f"{name}_proj").weight.float() for name in ("gate", "up", "down"))
        h_TF = F.silu(x_TD @ gate_FD.mT) * (x_TD @ up_FD.mT)
        self.y_TD = h_TF @ down_DF.mT
        norm_T = self.y_TD.norm(dim=1)
        self.weight_T1 = (1 / norm_T.clamp_min(norm_T.median())).unsqueeze(1)  # of tokens: the huge ones count less
        importance_F = (h_TF.abs() * self.weight_T1).mean(0) * down_DF.norm(dim=0)
        ranked_F = importance_F.argsort(descending=True)
        others = ranked_F[shared:]
        order_F = torch.cat([ranked_F[:shared], others[torch.randperm(len(others), generator=generator)]])
        self.gate_FD, self.up_FD, self.down_DF = gate_FD[order_F], up_FD[order_F], down_DF[:, order_F].clone()
        self.h_TF = h_TF[:, order_F]

    def fit_router(self, std: float) -> Tensor:
        """Least squares from x to the length of what each expert adds; logits then spread by `std`; [E, D]."""
        h_TEG = self.h_TF[:, self.shared :].unflatten(1, (self.experts, -1))
        down_EGD = self.down_DF[:, self.shared :].unflatten(1, (self.experts, -1)).permute(1, 2, 0)
        norm_TE = torch.stack([(h_TEG[:, e] @ down_EGD[e]).norm(dim=1) for e in range(self.experts)], dim=1)
        norm_TE = norm_TE.minimum(norm_TE.quantile(QUANTILE, dim=0))
        wanted_TE = norm_TE - norm_TE.mean(1, keepdim=True)  # softmax sees differences only
        router_DE = _ridge(self.x_TD, wanted_TE, 1e-3)
        logits_TE = self.x_TD @ router_DE
        return (router_DE * (std / logits_TE.std(dim=1).mean().clamp_min(1e-12))).mT.contiguous()

    def repair(self, router_ED: Tensor, k_T: Tensor, ridge: float) -> tuple[float, float, Tensor]:
        """Change the down projection so that the neurons a token keeps make up for those it leaves out.

        Returns:
            (share of the output's energy that is missing before, after, the output with K experts [T, D]).
        """
        p_TE = (self.x_TD @ router_ED.mT).softmax(-1)
        rank_TE = p_TE.argsort(dim=1, descending=True).argsort(dim=1)
        factor_TE = self.experts * p_TE * (rank_TE < k_T.unsqueeze(1))  # near 1 where the expert is active
        group = (self.h_TF.shape[1] - self.shared) // self.experts
        factor_TF = torch.cat([torch.ones(len(p_TE), self.shared), factor_TE.repeat_interleave(group, dim=1)], dim=1)
        kept_TF = self.h_TF * factor_TF
        wanted_TD, weighted_TF = self.y_TD * self.weight_T1, kept_TF * self.weight_T1
        missing_TD = wanted_TD - weighted_TF @ self.down_DF.mT
        energy = wanted_TD.square().sum()
        before = float(missing_TD.square().sum() / energy)
        change_FD = _ridge(weighted_TF, missing_TD, ridge)
        self.down_DF += change_FD.mT
        after = float((missing_TD - weighted_TF @ change_FD).square().sum() / energy)
        return before, after, kept_TF @ self.down_DF.mT

    def write(self, block: Any, router_ED: Tensor) -> None:
        """Into a block of Qwen2-MoE: its K weights are about 1 / E each, and the shared expert's gate is 1 / 2."""
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
    """Train the blocks (experts, shared expert, router) to give the dense model's next-token distribution [ours].

    Args:
        model: what `split` gave; changed in place.
        dense: its teacher.
        batches: token ids [B, S], one batch a step.
        ks: K of the steps, in turn.
        lr: of AdamW.

    Yields:
        (K, mean KL divergence from the dense model's distribution in nats a token) of each step.
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
        found = model(input_ids=ids_BS, use_cache=False).logits.float().log_softmax(-1)
        loss = F.kl_div(found, wanted, log_target=True, reduction="none").sum(-1).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield k, float(loss.detach())
    for block in blocks:
        block.gate.top_k = model.config.num_experts_per_tok
    model.requires_grad_(True).eval()


def _carried(config: Any) -> dict[str, Any]:
    """None is carried for tokens: without a word of them a family puts in its own."""
    found = {key: getattr(config, key, None) for key in CARRIED}
    return {key: value for key, value in found.items() if value is not None or key.endswith("_token_id")}


def _copy_all_but_blocks(dense: PreTrainedModel, model: PreTrainedModel) -> None:
    """Embeddings, attention, norms and head, which have the same names."""
    source = {name: value for name, value in dense.state_dict().items() if ".mlp." not in name}
    missing, unexpected = model.load_state_dict(source, strict=False)
    left = [name for name in missing if ".mlp." not in name]
    assert not left and not unexpected, f"not carried over: {left} {unexpected}"


def _ridge(x_TI: Tensor, y_TO: Tensor, ridge: float) -> Tensor:
    """argmin ||x W - y||^2 + ridge * mean(diag x^T x) ||W||^2, [I, O]."""
    normal_II = x_TI.mT @ x_TI
    normal_II.diagonal().add_(ridge * normal_II.diagonal().mean())
    return torch.linalg.solve(normal_II, x_TI.mT @ y_TO)
