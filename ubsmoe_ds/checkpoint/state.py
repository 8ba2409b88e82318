"""Turn a rank's state into pieces of a checkpoint, and restore it in a job of any layout.

Per client: weights, optimiser state, and the number of steps taken. Per rank: random generators, and the counts since
the round began. Common to all clients, in shared_state.py: the shared state, the moments of `linearised` and those of
the server optimiser.

Parameters are addressed as flat tensors of the whole model, experts stacked, so that a job with other rank counts,
expert parallelism or ZeRO stages finds its part. Counts are sums over a client's ranks: in another layout its first
ranks take them over. Each rank resumes the random generators of the rank in the same place.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.moe.utils import is_moe_param
from torch import Tensor, nn

from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.checkpoint.storage import Piece, Reader
from ubsmoe_ds.client.engine import Client, LocalProgress
from ubsmoe_ds.client.gradients import Fragment

EXPERT_SUMS = (".moments", ".squares")  # sums over a rank's own experts, not over its tokens
NORM = 3  # in `LocalProgress.sums`
Layout = Sequence[int]  # a client's ranks and expert parallelism


def client_pieces(client: Client, group_rank: int, with_optimizer: bool) -> Iterator[Piece]:
    """Yield this rank's part of its client's weights and optimiser state.

    Raises:
        UserError: if the optimiser keeps tensors that cannot be split along its parameters.
    """
    owner = client.config.name
    for name, parameter, fragment in _written_here(client, group_rank):
        master, start, offset, numel = fragment
        place = _offset(client, parameter) + offset
        yield Piece("weight", owner, name, place, master.view(-1)[start : start + numel])
        if with_optimizer:
            yield from (piece for piece, own in _optimizer_pieces(client, name, parameter, fragment) if own)
    if group_rank == 0:
        for key, values in _schedule(client).items():
            yield Piece(f"schedule.{key}", owner, "state", 0, torch.tensor(values, dtype=torch.float64))


def drift_pieces(client: Client, group_rank: int) -> Iterator[Piece]:
    """Yield this rank's part of what corrects the gradients of a round that has begun."""
    kept = {} if client.drift is None else client.drift.buffers
    for name, parameter, fragment in _written_here(client, group_rank):
        master, start, offset, numel = fragment
        for key, buffers in kept.items():
            value = buffers[master].view(-1)[start : start + numel]
            yield Piece(f"drift.{key}", client.config.name, name, _offset(client, parameter) + offset, value)


def restore_drift(client: Client, reader: Reader) -> None:
    """Restore what corrects the gradients of a round that has begun."""
    kept = {} if client.drift is None else client.drift.buffers
    for name, parameter in _trained(client):
        fragment = client.gradient_hook.masters.fragment(parameter)
        if fragment is None:
            continue
        master, start, offset, numel = fragment
        for key, buffers in kept.items():
            held = buffers[master].view(-1)[start : start + numel]
            first = _offset(client, parameter) + offset
            held.copy_(reader.read(f"drift.{key}", client.config.name, name, first, numel))


def optimizer_pieces(client: Client, group_rank: int) -> Iterator[tuple[Piece, bool]]:
    """Yield the optimiser state that this rank has, and whether it is the rank that writes each piece of it.

    Raises:
        UserError: see `client_pieces`.
    """
    written = {name for name, *_ in _written_here(client, group_rank)}
    for name, parameter in _trained(client):
        fragment = client.gradient_hook.masters.fragment(parameter)
        if fragment is not None:
            for piece, own in _optimizer_pieces(client, name, parameter, fragment):
                yield piece, own and name in written


def restore_optimizer(client: Client, reader: Reader) -> None:
    """Restore this rank's optimiser state."""
    for name, parameter in _trained(client):
        fragment = client.gradient_hook.masters.fragment(parameter)
        if fragment is not None:
            _restore_optimizer(client, reader, name, fragment, _offset(client, parameter))


def _optimizer_pieces(
    client: Client, name: str, parameter: nn.Parameter, fragment: Fragment
) -> Iterator[tuple[Piece, bool]]:
    """Yield a parameter's optimiser state, and whether it is to be written by the rank that writes this fragment."""
    (master, start, offset, numel), owner = fragment, client.config.name
    place = _offset(client, parameter) + offset
    for key, value in client.engine.basic_optimizer.state.get(master, {}).items():
        if isinstance(value, Tensor) and value.numel() == master.numel() and value.ndim == master.ndim:
            yield Piece(f"optimizer.{key}", owner, name, place, value.view(-1)[start : start + numel]), True
        elif torch.as_tensor(value).numel() == 1:  # a number shared by all elements, such as the step
            yield Piece(f"scalar.{key}", owner, name, 0, torch.as_tensor(value)), place == 0
        else:
            raise UserError(
                f"checkpoint: the optimizer's {key!r} of shape {list(value.shape)} cannot be saved for any layout; "
                "use an optimizer that keeps one value per weight, such as AdamW"
            )


def restore_client(client: Client, reader: Reader) -> None:
    """Restore this rank's weights and optimiser state."""
    owner, masters = client.config.name, client.gradient_hook.masters
    for name, parameter in _trained(client):
        first = _offset(client, parameter)
        value = reader.read("weight", owner, name, first, parameter.numel())
        masters.write(parameter, value.view(parameter.shape).to(parameter.device))
    restore_optimizer(client, reader)
    if client.engine.lr_scheduler is not None:
        kinds = [kind for kind in reader.kinds("schedule.") if reader.has(kind, owner, "state")]
        _restore_schedule(client, {kind.removeprefix("schedule."): reader.read(kind, owner, "state") for kind in kinds})


def _restore_optimizer(client: Client, reader: Reader, name: str, fragment: Fragment, first: int) -> None:
    """Restore a parameter's optimiser state; create entries that the optimiser has not made yet."""
    master, start, offset, numel = fragment
    owner, state = client.config.name, client.engine.basic_optimizer.state[master]
    for kind in reader.kinds("optimizer."):
        if reader.has(kind, owner, name):
            whole = state.setdefault(kind.removeprefix("optimizer."), torch.zeros_like(master))
            whole.view(-1)[start : start + numel] = reader.read(kind, owner, name, first + offset, numel).to(whole)
    for kind in reader.kinds("scalar."):
        if reader.has(kind, owner, name):
            value = reader.read(kind, owner, name)[0]
            held = state.setdefault(kind.removeprefix("scalar."), value.clone())
            if isinstance(held, Tensor):
                held.copy_(value)


def _schedule(client: Client) -> dict[str, list[float]]:
    """Return the learning-rate scheduler's own numbers and the current rates and betas; empty without a scheduler."""
    scheduler = client.engine.lr_scheduler
    if scheduler is None:
        return {}
    numbers = {key: [value] for key, value in scheduler.state_dict().items() if isinstance(value, int | float)}
    groups = client.engine.basic_optimizer.param_groups
    betas = [beta for group in groups for beta in group.get("betas", ())]
    return numbers | {"rates": [group["lr"] for group in groups]} | ({"betas": betas} if betas else {})


def _restore_schedule(client: Client, saved: Mapping[str, Tensor]) -> None:
    """Restore the result of `_schedule`; another layout may have more parameter groups, which share the last rate."""
    current = client.engine.lr_scheduler.state_dict()
    client.engine.lr_scheduler.load_state_dict(
        {key: type(value)(saved[key][0].item()) if key in saved else value for key, value in current.items()}
    )
    rates, betas = saved["rates"].tolist(), saved.get("betas", torch.empty(0)).view(-1, 2).tolist()
    for number, group in enumerate(client.engine.basic_optimizer.param_groups):
        group["lr"] = rates[min(number, len(rates) - 1)]
        if betas:
            group["betas"] = tuple(betas[min(number, len(betas) - 1)])


def _trained(client: Client) -> Iterator[tuple[str, nn.Parameter]]:
    """Return (name, parameter) of every trained parameter."""
    return ((name, p) for name, p in client.model.named_parameters() if p.requires_grad)


def _offset(client: Client, parameter: nn.Parameter) -> int:
    """Return the first element of this rank's parameter within that of the whole model."""
    return parameter.numel() * client.spec.expert_rank if is_moe_param(parameter) else 0


def _written_here(client: Client, group_rank: int) -> Iterator[tuple[str, nn.Parameter, Fragment]]:
    """Yield the fragments that this rank writes: its own under ZeRO, else whole masters if it holds them first."""
    for name, parameter in _trained(client):
        fragment = client.gradient_hook.masters.fragment(parameter)
        first_holders = client.config.expert_parallel if is_moe_param(parameter) else 1
        if fragment is not None and (hasattr(parameter, "_hp_mapping") or group_rank < first_holders):
            yield name, parameter, fragment


def rank_pieces(client: Client, group_rank: int, local: LocalProgress) -> Iterator[Piece]:
    """Yield this rank's random generators and its counts in the current round."""
    owner = client.config.name
    yield Piece(f"random.cpu.{group_rank}", owner, "state", 0, torch.get_rng_state())
    if client.device.type != "cpu":
        yield Piece(f"random.device.{group_rank}", owner, "state", 0, get_accelerator().get_rng_state())
    for name, first, value in _counts(client, local):
        yield Piece(f"count.{group_rank}", owner, name, first, value)


def restore_rank(client: Client, group_rank: int, local: LocalProgress, reader: Reader, layout: Layout) -> None:
    """Restore this rank's random generators and counts.

    Args:
        client: this rank's client.
        group_rank: this rank in its group.
        local: its sums are set in place.
        reader: reads the checkpoint.
        layout: the client's layout in the checkpoint.
    """
    owner, ranks = client.config.name, layout[0]
    twin = group_rank % ranks
    torch.set_rng_state(reader.read(f"random.cpu.{twin}", owner, "state"))
    if client.device.type != "cpu" and reader.has(f"random.device.{twin}", owner, "state"):
        get_accelerator().set_rng_state(reader.read(f"random.device.{twin}", owner, "state"))
    # the same layout: each rank takes its own counts; another one: the first ranks take the sum of all
    sources = [group_rank]
    if list(layout) != [client.config.ranks, client.config.expert_parallel]:
        sources = list(range(ranks)) if group_rank < client.config.expert_parallel else []
    for name, first, held in _counts(client, local):
        of_experts = name.endswith(EXPERT_SUMS)
        taken = sources if of_experts or group_rank == 0 or sources == [group_rank] else []
        total = torch.zeros_like(held).view(-1)
        for source in taken:
            total += _counted(reader, f"count.{source}", owner, name, first, len(total)).to(total)
        if name == "sums" and taken:
            total[NORM] /= len(taken)  # each rank holds the norm of the whole client's gradient
        held.copy_(total.view(held.shape))


def _counted(reader: Reader, kind: str, owner: str, name: str, start: int, numel: int) -> Tensor:
    """Return a rank's counts of elements [start, start + numel); zero for elements that it did not hold."""
    counts = torch.zeros(numel, dtype=torch.float64)
    for offset, value in reader.overlaps(kind, owner, name, start, numel):
        counts[offset - start : offset - start + len(value)] = value.double()
    return counts


def _counts(client: Client, local: LocalProgress) -> Iterator[tuple[str, int, Tensor]]:
    """Yield (name, first element within the whole model, live tensor) of every sum that local steps add to."""
    yield "sums", 0, local.sums
    for index, layer in enumerate(client.model.layers):
        gate, experts = layer.gate, layer.experts
        for key in ("routed_E", "kept_E", "tokens"):
            yield f"layers.{index}.{key}", 0, getattr(gate, key)
        if experts.moment_sums_EX is not None:
            yield (
                f"layers.{index}.moments",
                experts.first * experts.moment_sums_EX.shape[1],
                experts.moment_sums_EX,
            )
        if client.gradient_hook.squares is not None:
            yield f"layers.{index}.squares", experts.first * 2, client.gradient_hook.squares.sums_LE2[index]
