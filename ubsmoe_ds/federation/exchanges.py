"""Plan the exchanges of a run: which rank owns which unit, and how units travel for given LoRA ranks."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from ubsmoe_ds.aggregation.exchange import Exchange
from ubsmoe_ds.aggregation.layout import Unit, group_layouts, owners
from ubsmoe_ds.aggregation.shared_memory import SHARED_FOLDER, SharedMemory
from ubsmoe_ds.aggregation.units import UnitStore
from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.mpi.world import World

ExchangeFactory = Callable[[Sequence[int], Sequence[int]], Exchange]  # LoRA ranks sent and received -> exchange


def plan_exchanges(
    exp: Experiment, world: World, store: UnitStore, warn: Callable[[str], None] | None = None
) -> tuple[ExchangeFactory, list[Unit]]:
    """Assign owners and make the factory of exchanges (a collective).

    Args:
        exp: the experiment.
        world: this rank's place in the job.
        store: this rank's units.
        warn: called once if the host's shared memory is too small for an exchange.

    Returns:
        (factory of exchanges, units that this rank owns whatever the LoRA ranks are).
    """
    owner = owners(store.units, exp.lora.rank, world.comm.size)
    # memory that ranks share on a host does not survive the death of one of them
    memory = None if world.survives else SharedMemory.of_job(world.comm)
    warned = False

    def plan(ranks: Sequence[int], reply_ranks: Sequence[int]) -> Exchange:
        layouts = [
            replace(layout, lora_rank=rank, reply_rank=reply)
            for layout, rank, reply in zip(group_layouts(exp.trainers), ranks, reply_ranks, strict=True)
        ]
        payload, same = exp.merge.payload, exp.merge.row.elementwise or exp.takes_turns
        exchange = Exchange(
            world.comm,
            layouts,
            store.units,
            exp.num_experts,
            owner,
            payload,
            memory,
            same_reply=same,
        )
        nonlocal warned
        if warn is not None and not warned and memory is not None and exchange.memory is None:
            warned = True
            warn(
                f"warning: {SHARED_FOLDER} is too small for the exchange; ranks send messages instead, which is "
                "slower; enlarge it (docker run --shm-size=...)"
            )
        return exchange

    return plan, [unit for unit, rank in zip(store.units, owner, strict=True) if rank == world.rank]
