"""Lines that a run prints before its first round: what is about to run, and what the experiment loses."""

from collections.abc import Iterator, Mapping, Sequence

import torch

from ubsmoe_ds.client.engine import Client
from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.launching.placement import describe
from ubsmoe_ds.models.cost import trainable_parameters
from ubsmoe_ds.models.hf_config import model_shape
from ubsmoe_ds.models.stored import left_out
from ubsmoe_ds.mpi.world import World

MOST_LISTED = 32  # clients
GROUPED_PRODUCTS = (9, 10)  # majors of CUDA's compute capability where torch multiplies all experts in one kernel


def headline(exp: Experiment, client: Client) -> str:
    """Return one line that sums up the run: method, clients, K, quantised weights, LoRA ranks, adapter size, rounds."""
    all_ks = [exp.active_experts(client) for client in exp.clients]
    ks = " ".join(map(str, sorted(set(all_ks)) if exp.takes_turns else all_ks))
    who = f"{len(exp.clients)} clients"
    if exp.sampling is not None:
        who += f", {exp.sampling.size(len(exp.clients))} a round,"
    where = f"{exp.world_size} ranks"
    if exp.groups is not None:
        where += f" in {len(exp.groups)} group{'s' if len(exp.groups) > 1 else ''}"
    quantized = f", weights in {exp.model.quantize}" if exp.model.quantize else ""
    ranks = " ".join(map(str, dict.fromkeys(exp.lora_ranks)))
    shape = model_shape(client.hf_config, lora_rank=exp.lora.rank, lora_attention=exp.lora.attention)
    adapter = trainable_parameters(shape, exp.router.trainable)
    return (
        f"{exp.name}: {exp.method}, {who} on {where} ({client.device.type}), "
        f"K {ks} of {exp.num_experts} experts{quantized}, LoRA rank {ranks}, "
        f"adapter {adapter / 1e6:.2f} M parameters, rounds {exp.train.rounds}"
    )


def placement(exp: Experiment, world: World) -> str:
    """Return one line that says on which hosts the groups run, and which address a group uses if not the default."""
    meetings = [f"; {t.name} meets at {at}" for t, at in zip(exp.trainers, world.meetings, strict=True) if at]
    return "".join([f"placement: {describe(exp.trainers, world.group_hosts)}", *meetings])


def row_counts(rows: Mapping[str, int], weights: Sequence[float], kind: str) -> str:
    """Return one line that says how many training rows each client has, and its weight w_c in the merge.

    Args:
        rows: training rows by client.
        weights: w_c of each client.
        kind: as `train.weights`.
    """
    if len(rows) > MOST_LISTED:
        most, least = max(rows.values()), min(rows.values())
        counts = f"{len(rows)} clients, {least} to {most} ({min(weights):.3g} to {max(weights):.3g})"
    else:
        counts = ", ".join(
            f"{name} {count} ({weight:.3f})" for (name, count), weight in zip(rows.items(), weights, strict=True)
        )
    return f"rows (weight{'' if kind == 'rows' else f', train.weights={kind}'}): {counts}"


def warnings(exp: Experiment, client: Client) -> Iterator[str]:
    """Yield a line for all that the experiment loses but rows (see `RowReport`): what is not learned, speed."""
    unused = left_out(exp.weights_dir)
    if unused:
        yield (
            f"warning: model.path: {len(unused)} tensors that predict tokens after the next one (MTP), first "
            f"{unused[0]!r}, are neither used nor trained, as in transformers"
        )
    sparsest = [config.name for config in exp.clients if exp.active_experts(config) == 1]
    if sparsest and client.model.layers[0].gate.router.normalize and (exp.router.trainable or exp.dmr.enabled):
        yield (
            f"warning: this model's K weights sum to one, so at K = 1 ({', '.join(sparsest)}) router and phi learn "
            "nothing from the rows; give a budget of K = 2 or more where they should"
        )
    pseudo_gradients = exp.pseudo_gradient.estimator != "none"
    if exp.merge.row.by_utilisation and pseudo_gradients:
        yield (
            f"warning: merge.rule {exp.merge.rule} gives no weight to a client that did not use an expert, so its "
            "pseudo-gradients for that expert are lost; set merge.rule fedavg to keep them"
        )
    if torch.cuda.is_available() and exp.accelerator != "cpu":
        capability = torch.cuda.get_device_capability()
        if capability[0] not in GROUPED_PRODUCTS or not exp.deepspeed.use_bf16:
            yield (
                "warning: torch computes experts one by one here; it computes them together in bf16 on devices of "
                "compute capability 9 or 10 "
                f"(this one: {'.'.join(map(str, capability))}, bf16 {exp.deepspeed.use_bf16})"
            )
