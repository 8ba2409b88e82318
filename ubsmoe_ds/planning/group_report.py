"""Show a plan of groups that train clients in turn: tables of their memory and of shapes, and what does not fit."""

from collections.abc import Sequence

from rich.table import Table

from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.planning.group_plan import GroupPlan, GroupShape
from ubsmoe_ds.planning.inputs import PlanInput
from ubsmoe_ds.planning.memory_model import largest_phase

SHOWN_SHAPES = 5
SHOWN_NAMES = 3


def layout(ranks: int, expert_parallel: int) -> str:
    """Return ranks, with their expert parallelism where there is some."""
    return f"{ranks} (EP {expert_parallel})" if expert_parallel > 1 else str(ranks)


def gigabytes(size: float) -> str:
    """Return bytes as a text in GB."""
    return f"{size / 1e9:.2f}"


def needed(plan: GroupPlan) -> float:
    """Return the peak bytes of a rank of a group."""
    return largest_phase(plan.phases)[1]


def group_table(inputs: PlanInput, plans: Sequence[GroupPlan], memory: float | None) -> Table:
    """Return the memory of a rank of each group; groups that are alike share a line.

    Args:
        inputs: of the plan.
        plans: of each group.
        memory: bytes of a rank; None: not compared.
    """
    table = Table(title="memory of a rank, the most of all clients of its group", title_justify="left")
    for heading in ("group", "ranks", "turns", "GB", "fullest in", *(["fits"] if memory else [])):
        table.add_column(heading, justify="left" if heading == "group" else "right")
    alike: dict[tuple[str, ...], list[str]] = {}
    for trainer, plan in zip(inputs.exp.trainers, plans, strict=True):
        phase, most = largest_phase(plan.phases)
        fits = [] if memory is None else ["yes" if most <= memory else "no"]
        ranks = layout(trainer.ranks, trainer.expert_parallel)
        alike.setdefault((ranks, str(plan.turns), gigabytes(most), phase, *fits), []).append(trainer.name)
    for cells, names in alike.items():
        more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
        table.add_row(" ".join(names[:SHOWN_NAMES]) + more, *cells)
    return table


def shape_table(found: Sequence[GroupShape], devices: int, rounds: int) -> Table:
    """Return the best shapes, the first one the best of all."""
    title = f"groups for {devices} devices, by the schedules of {rounds} round{'s' if rounds > 1 else ''}"
    table = Table(title=title, title_justify="left")
    for heading in ("groups", "ranks", "time", "idle %", "MB/step", "GB", "fullest in"):
        table.add_column(heading, justify="right")
    for shape in found[:SHOWN_SHAPES]:
        phase, most = largest_phase(shape.plan.phases)
        table.add_row(
            str(shape.groups),
            layout(shape.ranks, shape.expert_parallel),
            f"{shape.time / found[0].time:.2f}",
            f"{100 * shape.idle:.0f}",
            f"{shape.plan.step_bytes / 1e6:.1f}",
            gigabytes(most),
            phase,
        )
    return table


def as_config(shape: GroupShape) -> str:
    """Return the shape as the key `groups`."""
    parallel = f", expert_parallel: {shape.expert_parallel}" if shape.expert_parallel > 1 else ""
    return f"groups=[{{ranks: {shape.ranks}{parallel}, count: {shape.groups}}}]"


def that_fit(found: Sequence[GroupShape], memory: float | None) -> list[GroupShape]:
    """Return the shapes that fit in the memory of a rank.

    Raises:
        UserError: if there is none.
    """
    fitting = [shape for shape in found if memory is None or needed(shape.plan) <= memory]
    if not found:
        raise UserError("--devices: no number of ranks divides the clients' batches; change train_batch_size")
    if not fitting:
        least = min(found, key=lambda shape: needed(shape.plan))
        raise UserError(
            f"--device-memory: no shape of groups fits in {(memory or 0) / 1e9:.3g} GB; the least, of "
            f"{layout(least.ranks, least.expert_parallel)} ranks, needs {needed(least.plan) / 1e9:.3g} GB "
            f"({largest_phase(least.plan.phases)[0]}); use larger devices or smaller batches"
        )
    return fitting


def check_groups_fit(inputs: PlanInput, plans: Sequence[GroupPlan], memory: float, best: GroupShape | None) -> None:
    """Refuse a plan in which a group does not fit.

    Args:
        inputs: of the plan.
        plans: of each group.
        memory: bytes of a rank.
        best: a shape of groups that fits; None: none was looked for.

    Raises:
        UserError: naming the first group, what it needs, for which client, and what would fit.
    """
    failing = [number for number, plan in enumerate(plans) if needed(plan) > memory]
    if not failing:
        return
    number, exp = failing[0], inputs.exp
    phase, most = largest_phase(plans[number].phases)
    more = f" (and {len(failing) - 1} more)" if len(failing) > 1 else ""
    remedy = (
        "--devices says which groups fit"
        if best is None
        else f"{as_config(best)} needs {needed(best.plan) / 1e9:.3g} GB"
    )
    client = exp.clients[plans[number].client]
    raise UserError(
        f"groups: {exp.trainers[number].name!r} needs {most / 1e9:.3g} GB a rank ({phase}; most for client "
        f"{client.name!r}, K {exp.active_experts(client)}), there are {memory / 1e9:.3g} GB; {remedy}{more}"
    )
