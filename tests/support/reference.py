"""Second implementations to compare with, slow and plain: one process, no DeepSpeed, loops over tokens and experts."""

from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.support import tiny
from ubsmoe_ds.client.engine import client_spec
from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.data.batches import steps
from ubsmoe_ds.data.encoding import read_encoder
from ubsmoe_ds.data.shares import common_rows
from ubsmoe_ds.models.causal_lm import UBSMoEForCausalLM
from ubsmoe_ds.models.conversion import load
from ubsmoe_ds.moe.activations import Activation, SwiGLU
from ubsmoe_ds.moe.layer import UBSMoE
from ubsmoe_ds.moe.pseudo_gradient import PROJECTIONS, Moments


class Masters:
    """Stands in for `MasterWeights` of a model without an engine; its masters are the parameters.

    Args:
        are_parameters: whether it says so.
    """

    def __init__(self, are_parameters: bool = True) -> None:
        self.are_parameters = are_parameters

    def read(self, parameter: torch.Tensor) -> torch.Tensor:
        return parameter.detach().clone()

    def view(self, parameter: torch.Tensor) -> torch.Tensor:
        return parameter.detach()

    def write_all(self, values: dict[torch.Tensor, torch.Tensor]) -> None:
        for parameter, value in values.items():
            assert value.device == parameter.device
            parameter.data.copy_(value)


def whole_model(exp: Experiment) -> UBSMoEForCausalLM:
    """Return the model of the first client with all experts in this process."""
    config = exp.clients[0].model_copy(update={"expert_parallel": 1, "ranks": 1})
    return load(exp.weights_dir, client_spec(exp, config, 0)).train()


def train(exp: Experiment, count: int) -> tuple[list[float], list[float], UBSMoEForCausalLM, Tensor]:
    """Train the first client for `count` steps in a plain loop.

    Return (mean losses, gradient norms, the model, squared norms of each expert's real and pseudo-gradient as added,
    [L, E, 2]).
    """
    model = whole_model(exp)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    begun = {name: p.detach().clone() for name, p in trained.items()}
    options = exp.deepspeed.optimizer["params"]
    optimizer = torch.optim.AdamW(trained.values(), lr=options["lr"], weight_decay=0.0, eps=options["eps"])
    batches = steps(tiny.examples(), batch_size=8, micro_batches=1, rank=0, ranks=1, pad=0, seed=(exp.seed, 0))
    seen = watch(model.layers)
    if exp.pseudo_gradient.estimator == "linearised":
        calibrate(exp, model, seen)
    losses, norms = [], []
    squares_LE2 = torch.zeros(len(model.layers), exp.num_experts, 2, dtype=torch.float64)
    for _ in range(count):
        tokens = next(batches).micro[0]
        logits = model(tokens.input_ids, tokens.used, tokens.position_A)
        loss = F.cross_entropy(logits, tokens.target_A)
        total = loss + exp.lora.prune_penalty * tail_penalty(model, keep=exp.lora.rank - 1)
        (total + model.auxiliary_loss(exp.dmr.penalty, exp.router.aux_loss)).backward()
        norms.append(float(torch.stack([p.grad.norm() for p in trained.values()]).norm()))
        clip = exp.deepspeed.gradient_clipping
        factor = min(1.0, clip / (norms[-1] + 1e-6)) if clip else 1.0
        pseudo = pseudo_gradients(exp, model, seen)
        for p in trained.values():
            p.grad.mul_(factor)
        of = {id(parameter): gradient * factor for parameter, gradient in pseudo}
        for i, layer in enumerate(model.layers):
            for p in [p for pair in layer.experts.factors().values() for p in pair if id(p) in of]:
                for e in range(len(p)):
                    squares_LE2[i, e, 0] += p.grad[e].square().sum()
                    squares_LE2[i, e, 1] += of[id(p)][e].square().sum()
        for parameter, _ in pseudo:
            parameter.grad.add_(of[id(parameter)])
        for name, p in trained.items():
            if not name.endswith("scale"):  # FedProx's and SCAFFOLD's terms; the learned scale is not shared
                p.grad.add_(exp.train.prox_mu * (p.detach() - begun[name]))
                p.grad.add_(torch.from_numpy(tiny.known_shift(name, tuple(p.shape))), alpha=float(exp.train.scaffold))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms, model, squares_LE2


def _keep(record: dict[str, Tensor], module: UBSMoE, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    record["x"] = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
    record["used"] = module.used_token.reshape(-1)
    y = output[0] if isinstance(output, tuple) else output
    y.register_hook(lambda grad: record.__setitem__("delta", grad.reshape(-1, grad.shape[-1])))


def watch(layers: list[UBSMoE]) -> list[dict[str, Tensor]]:
    """Return records of each layer's input and output gradient, updated by every forward and backward pass."""
    records: list[dict[str, Tensor]] = [{} for _ in layers]
    for record, layer in zip(records, layers, strict=True):
        layer.register_forward_hook(partial(_keep, record))
    return records


def base_weights(model: UBSMoEForCausalLM) -> dict[str, Tensor]:
    """Return copies of the experts' frozen weights, named like the LoRA factors beside them."""
    return {
        f"hf.model.layers.{index}.mlp.deepspeed_moe.experts.{name}_weight": weight.clone()
        for index, layer in enumerate(model.layers)
        for name, weight in layer.experts.base().items()
    }


def pseudo_gradients(exp: Experiment, model: UBSMoEForCausalLM, seen: list[dict[str, Tensor]]) -> list:
    """Return (parameter, pseudo-gradient) of every LoRA factor, computed token by token."""
    estimator, rho = exp.pseudo_gradient.estimator, exp.rho(exp.clients[0])
    additions = []
    for layer, record in zip(model.layers, seen, strict=True):
        if estimator == "none":
            continue
        functions = [token_weighted, expert_mean, dense_oracle, linearised]
        function = next(f for f in functions if f.__name__ == estimator)
        gradients = function(layer, record, rho)
        additions += [(p, gradients[id(p)]) for pair in layer.experts.factors().values() for p in pair]
    return additions


def rank(layer: UBSMoE, m_E: Tensor) -> Tensor:
    """Return what a router ranks a token's experts by; those of groups that are not kept are last."""
    gate, router = layer.gate, layer.gate.router
    rank_E = odds(layer, m_E)
    if gate.correction_E is not None:
        rank_E = rank_E + gate.correction_E
    groups = rank_E.tensor_split(router.groups)
    best = [float(sum(sorted(group.tolist())[-router.group_best :])) for group in groups]
    kept = sorted(range(len(best)), key=lambda n: -best[n])[: router.kept_groups]
    return torch.cat([group if n in kept else group - 100 for n, group in enumerate(groups)])


def odds(layer: UBSMoE, m_E: Tensor) -> Tensor:
    """Return p of a token's experts."""
    return 1 / (1 + torch.exp(-m_E)) if layer.gate.router.score == "sigmoid" else torch.softmax(m_E, 0)


def route(layer: UBSMoE, x_D: Tensor) -> tuple[Tensor, list[int], Tensor]:
    """Return (weights if all experts were active, active experts, their weights) of one token."""
    gate, router = layer.gate, layer.gate.router
    s_E = gate.wg.weight.detach() @ x_D
    if gate.bias_E is not None:
        s_E = s_E + gate.bias_E
    m_E = s_E.clone()
    if gate.phi_range is not None:
        rank_E = rank(layer, s_E)
        for i in rank_E.argsort(descending=True)[: gate.candidates]:
            m_E[i] += gate.phi.detach()[i] * (rank_E[i] > -50)  # not in a group that is left out
    active = rank(layer, m_E).argsort(descending=True)[: gate.k].tolist()
    p_E = odds(layer, s_E if gate.modulate == "selection" else m_E)
    weights = p_E[active]
    if router.normalize:
        weights, p_E = weights / weights.sum(), p_E / p_E.sum()
    return router.scaling * p_E, active, router.scaling * weights


def activate(activation: Activation, g: Tensor, u: Tensor) -> Tensor:
    """Return the hidden units: silu(g) u, or gpt-oss's, written out."""
    if isinstance(activation, SwiGLU):
        return F.silu(g) * u
    alpha, limit = activation.alpha, activation.limit
    g, u = (
        torch.minimum(g, torch.tensor(limit)),
        torch.maximum(torch.minimum(u, torch.tensor(limit)), -torch.tensor(limit)),
    )
    return g / (1 + torch.exp(-alpha * g)) * (1 + u)


def _expert(layer: UBSMoE, j: int) -> dict[str, Tensor]:
    """Return the effective weights W + s B A of expert j, its A and B, and its biases, zero if it has none."""
    e = layer.experts
    weights = {}
    for name in PROJECTIONS:
        A, B = (f.detach()[j] for f in e.factors()[name])
        weights |= {name: e.base()[name][j] + e.scaling * B @ A, f"A_{name}": A, f"B_{name}": B}
        weights[f"b_{name}"] = e.bias()[name][j] if e.bias() else torch.zeros(len(B))
    return weights


def hidden_inputs(w: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Return g and u of a token."""
    return w["gate"] @ x + w["b_gate"], w["up"] @ x + w["b_up"]


def token_weighted(layer: UBSMoE, record: dict[str, Tensor], rho: float) -> dict[int, Tensor]:
    """Compute the formulas of moe/pseudo_gradient.py, one token and one inactive expert at a time."""
    factors, s = layer.experts.factors(), layer.experts.scaling
    out = {id(p): torch.zeros_like(p) for pair in factors.values() for p in pair}
    for x, delta, used in zip(record["x"], record["delta"], record["used"], strict=True):
        if not used:
            continue
        p_E, active, weights = route(layer, x)
        gamma = weights / weights.sum()
        hbar = vgate = vup = 0.0
        for g_j, j in zip(gamma, active, strict=True):
            w = _expert(layer, j)
            h, by_gate, by_up = slopes(layer.experts.activation, *hidden_inputs(w, x))
            back = w["down"].T @ delta
            hbar = hbar + g_j * h
            vgate = vgate + g_j * back * by_gate
            vup = vup + g_j * back * by_up
        for i in set(range(len(p_E))) - set(active):
            c, w = rho * p_E[i], _expert(layer, i)
            out[id(factors["down"][1])][i] += s * c * torch.outer(delta, w["A_down"] @ hbar)
            out[id(factors["down"][0])][i] += s * c * torch.outer(w["B_down"].T @ delta, hbar)
            for name, v in (("gate", vgate), ("up", vup)):
                out[id(factors[name][1])][i] += s * c * torch.outer(v, w[f"A_{name}"] @ x)
                out[id(factors[name][0])][i] += s * c * torch.outer(w[f"B_{name}"].T @ v, x)
    return out


def tail_penalty(model: UBSMoEForCausalLM, keep: int) -> Tensor:
    """Return HetLoRA's penalty, one expert at a time."""
    total = torch.zeros(())
    for layer in model.layers:
        for A, B in layer.experts.factors().values():
            for e in range(len(A)):
                total = total + B[e][:, keep:].norm() * A[e][keep:].norm()
    return total


def slopes(activation: Activation, g: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (h, dh/dg, dh/du) of one token, by autograd."""
    g, u = g.clone().requires_grad_(), u.clone().requires_grad_()
    h = activate(activation, g, u)
    return h.detach(), *torch.autograd.grad(h.sum(), [g, u])


def calibrate(exp: Experiment, model: UBSMoEForCausalLM, seen: list[dict[str, Tensor]]) -> None:
    """Set each expert's moments from the tokens of the first two steps that chose it, token by token."""
    batches = steps(tiny.examples(), batch_size=8, micro_batches=1, rank=0, ranks=1, pad=0, seed=(exp.seed, 0))
    values: list[list[list]] = [[[] for _ in range(layer.num_experts)] for layer in model.layers]
    for _ in range(2):
        tokens = next(batches).micro[0]
        model(tokens.input_ids, tokens.used, tokens.position_A)
        for layer, record, of_experts in zip(model.layers, seen, values, strict=True):
            for x, used in zip(record["x"], record["used"], strict=True):
                for j in route(layer, x)[1] if used else []:
                    w = _expert(layer, j)
                    of_experts[j].append(torch.stack(slopes(layer.experts.activation, *hidden_inputs(w, x))))
    for layer, of_experts in zip(model.layers, values, strict=True):
        width = layer.experts.base()["gate"].shape[1]
        means = [torch.stack(f).mean(0) if f else torch.zeros(3, width) for f in of_experts]
        layer.experts.moments = Moments(*torch.stack(means, dim=1))


def linearised(layer: UBSMoE, record: dict[str, Tensor], rho: float) -> dict[int, Tensor]:
    """Compute the first-order model's gradient, one token and one inactive expert at a time."""
    factors, s, base = layer.experts.factors(), layer.experts.scaling, layer.experts.base()
    out = {id(p): torch.zeros_like(p) for pair in factors.values() for p in pair}
    for x, delta, used in zip(record["x"], record["delta"], record["used"], strict=True):
        if not used:
            continue
        p_E, active, _ = route(layer, x)
        for i in set(range(len(p_E))) - set(active):
            c, w = rho * p_E[i], _expert(layer, i)
            mu, slope_gate, slope_up = (part[i] for part in layer.experts.moments)
            out[id(factors["down"][1])][i] += s * c * torch.outer(delta, w["A_down"] @ mu)
            out[id(factors["down"][0])][i] += s * c * torch.outer(w["B_down"].T @ delta, mu)
            back = base["down"][i].T @ delta
            for name, slope in (("gate", slope_gate), ("up", slope_up)):
                out[id(factors[name][1])][i] += s * c * torch.outer(slope * back, w[f"A_{name}"] @ x)
                out[id(factors[name][0])][i] += s * c * torch.outer(w[f"B_{name}"].T @ (slope * back), x)
    return out


def expert_mean(layer: UBSMoE, record: dict[str, Tensor], rho: float) -> dict[int, Tensor]:
    """Return g_i = [sum_x c_i] [sum_j g_j] / [sum_j sum_x a_j p_j]."""
    pseudo, active_mass = torch.zeros(layer.num_experts), 0.0
    for x, used in zip(record["x"], record["used"], strict=True):
        if used:
            p_E, active, _ = route(layer, x)
            active_mass += float(p_E[active].sum())
            for i in set(range(len(p_E))) - set(active):
                pseudo[i] += rho * p_E[i]
    factors = [p for pair in layer.experts.factors().values() for p in pair]
    return {id(p): (pseudo / active_mass).view(-1, 1, 1) * p.grad.sum(0, keepdim=True) for p in factors}


def dense_oracle(layer: UBSMoE, record: dict[str, Tensor], rho: float) -> dict[int, Tensor]:
    """Differentiate through the inactive experts by autograd, one token and one expert at a time."""
    leaves = {n: [f.detach().clone().requires_grad_() for f in pair] for n, pair in layer.experts.factors().items()}
    base, s = layer.experts.base(), layer.experts.scaling
    total = torch.zeros(())
    for x, delta, used in zip(record["x"], record["delta"], record["used"], strict=True):
        if not used:
            continue
        p_E, active, _ = route(layer, x)
        for i in set(range(len(p_E))) - set(active):
            w = _expert(layer, i) | {n: base[n][i] + s * B[i] @ A[i] for n, (A, B) in leaves.items()}
            total = total + rho * p_E[i] * delta @ (
                w["down"] @ activate(layer.experts.activation, *hidden_inputs(w, x))
            )
    total.backward()
    live = layer.experts.factors()
    return {id(p): leaf.grad for n in PROJECTIONS for p, leaf in zip(live[n], leaves[n], strict=True)}


def federate(exp: Experiment) -> tuple[list[list[int]], dict[str, np.ndarray]]:
    """Run a Top-K experiment under FedAvg in one process; return (cohorts, the shared state at the end).

    With sampling, and with FedProx's or SCAFFOLD's corrections, if it has them.
    """
    encoder, model, rows = read_encoder(exp), whole_model(exp), common_rows(exp)
    examples = [encoder.encode(rows.of_client(c), client.name)[0] for c, client in enumerate(exp.clients)]
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    shared = {name: p.detach().clone() for name, p in trained.items()}
    c_of = [{name: torch.zeros_like(value) for name, value in shared.items()} for _ in exp.clients]  # SCAFFOLD's c_i
    c_all = {name: torch.zeros_like(value) for name, value in shared.items()}
    cohorts, taken = [], [0] * len(exp.clients)
    weights = np.array([len(of_client) for of_client in examples], dtype=np.float64)
    options = exp.deepspeed.optimizer["params"]
    for number in range(1, exp.train.rounds + 1):
        cohorts.append(list(range(len(exp.clients))))
        if exp.sampling is not None:
            count = exp.sampling.size(len(exp.clients))
            draw = np.random.default_rng([exp.seed, 3, number]).choice(len(exp.clients), count, replace=False)
            cohorts[-1] = sorted(int(client) for client in draw)
        c_change = {name: torch.zeros_like(value) for name, value in shared.items()}
        change = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in shared.items()}
        for c in cohorts[-1]:
            for name, p in trained.items():
                p.data.copy_(shared[name])
            model.set_active_experts(exp.active_experts(exp.clients[c]))
            optimizer = torch.optim.AdamW(trained.values(), lr=options["lr"], eps=options["eps"], weight_decay=0.0)
            steps_of = encoder.steps(examples[c], c, exp.clients[c], first=taken[c])
            sums = {name: torch.zeros_like(value) for name, value in shared.items()}
            for _ in range(exp.train.local_steps):
                tokens = next(steps_of).micro[0]
                logits = model(tokens.input_ids, tokens.used, tokens.position_A, None, tokens.position_BS)
                F.cross_entropy(logits, tokens.target_A).backward()
                torch.nn.utils.clip_grad_norm_(list(trained.values()), exp.deepspeed.gradient_clipping)
                for name, p in trained.items():
                    p.grad += exp.train.prox_mu * (p.detach() - shared[name])
                    sums[name] += p.grad
                    p.grad += exp.train.scaffold * (c_all[name] - c_of[c][name])
                optimizer.step()
                optimizer.zero_grad()
                taken[c] += 1
            for name, p in trained.items():
                change[name] += weights[c] / weights[cohorts[-1]].sum() * (p.detach() - shared[name]).double()
                c_change[name] += sums[name] / exp.train.local_steps - c_of[c][name]
                c_of[c][name] = sums[name] / exp.train.local_steps
        c_all = {name: value + c_change[name] / len(exp.clients) for name, value in c_all.items()}
        shared = {name: (value + change[name]).float() for name, value in shared.items()}
    for name, p in trained.items():
        p.data.copy_(shared[name])
    values = {}
    for adapter in model.adapters():
        factors = {"A": adapter.A, "B": adapter.B}
        values |= {f"{adapter.name}.lora_{key}": factor.detach().numpy() for key, factor in factors.items()}
    return cohorts, values
