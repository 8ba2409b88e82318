"""Continue a run when ranks die: drop their groups, and merge among the others.

Where clients take turns only the turns of the current round that a lost group had are lost, see `Roster.lose`. Every
stage of rounds.py is completed by all ranks or by none. The units of dead owners go to new owners: their shared state
comes from any group, since all hold it; the server optimiser's state comes from its replica.
"""

from collections.abc import Sequence

from ubsmoe_ds.aggregation.layout import Unit
from ubsmoe_ds.aggregation.server import Server
from ubsmoe_ds.base.errors import TooFewClients
from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.federation.exchanges import plan_exchanges
from ubsmoe_ds.federation.roster import Lost
from ubsmoe_ds.federation.rounds import Federation
from ubsmoe_ds.launching.run_folder import open_run_folder
from ubsmoe_ds.mpi.collectives import RanksLost
from ubsmoe_ds.mpi.ulfm import recover
from ubsmoe_ds.mpi.world import World

PASS_ON_SECONDS = 60.0  # for a first rank that is cut off to end, and so to give up the run's folder


def run(federation: Federation) -> None:
    """Call `Federation.run`, and again after every death; the other ranks of a lost group leave the job.

    Raises:
        TooFewClients: if fewer than `min_clients` are left, or none of them for a round.
        Preempted: if the job was asked to stop; its progress has been saved.
    """
    deaths = []  # kept, see `wait_quietly`
    while True:
        try:
            federation.run()
            return
        except RanksLost as death:
            deaths.append(death)
        federation.hang_watch.enter("recovery from a death")
        while True:
            try:
                _shrink(federation)
                break
            except RanksLost as death:  # another rank died during recovery
                deaths.append(death)


def _shrink(federation: Federation) -> None:
    """Drop the lost groups, and update everything that depends on the list of groups or of clients."""
    world, lost = recover(federation.world, [federation.stop.comm])
    if not lost:
        raise RuntimeError("MPI has failed although no rank has died")
    old, training, progress = federation.exp, federation.training, federation.progress
    exp = old.without(lost)
    number = None if progress.merged or progress.is_over(exp.train) else progress.round
    gone = training.roster.lose(exp, lost, number)
    progress.lost |= dict.fromkeys([*gone.trainers, *gone.clients], progress.round)
    exchange_for, owned = plan_exchanges(exp, world, federation.aggregator.store)
    _pass_on_monitor(federation, exp, world, gone)
    if training.kept is not None:
        training.kept.survive(exp, world, lost)
    if exp.takes_turns:
        training.texts.exp = exp  # rows go by the clients' numbers, which stay; batches by the groups'
    else:
        taken = progress.steps_taken.get(federation.world.group, 0)
        training.current, progress.steps_taken = world.group, {world.group: taken}
    server = _server_of(exp, owned, federation.aggregator.server, lost)
    federation.aggregator.survive(exp, world, server, exchange_for)  # from here on exp and world are the new ones
    federation.checkpoints = federation.checkpoints.among(exp, world)
    federation.stop.listen_on(world.comm)  # last, because it may meet another death
    left = len(exp.clients_left)
    if left < exp.min_clients:
        raise TooFewClients(
            f"min_clients: {left} clients are left, fewer than the {exp.min_clients} required; continue with "
            "--resume auto"
        )


def _server_of(exp: Experiment, owned: Sequence[Unit], before: Server, lost: Sequence[int]) -> Server:
    """Return the server of the units that this rank owns now; where clients take turns it knows the lost ones too."""
    kept = [client for client in range(len(before.weights)) if exp.takes_turns or client not in lost]
    weights = [before.weights[client] for client in kept]
    server = Server(exp, owned, weights if exp.takes_turns else [weight / sum(weights) for weight in weights])
    server.lora_ranks = [before.lora_ranks[client] for client in kept]
    return server


def _pass_on_monitor(federation: Federation, exp: Experiment, world: World, gone: Lost) -> None:
    """Open a monitor on the new first rank if the old one died, and name what is lost."""
    number = federation.progress.round
    if world.rank == 0 and federation.monitor is None:
        from ubsmoe_ds.federation.monitor import Monitor

        config, run_id = federation.checkpoints.config, federation.progress.run_id
        owner = open_run_folder(exp.run_dir, run_id, PASS_ON_SECONDS)
        federation.monitor = Monitor(exp, run_id, owner, resume_at=number, config=config)
        if federation.record is not None and federation.monitor.latest < federation.record.number:
            federation.monitor.round(federation.record)  # the old first rank died before it wrote this record
    if federation.monitor is not None:
        federation.monitor.lost(number, exp, gone)
