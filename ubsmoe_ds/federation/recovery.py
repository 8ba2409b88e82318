"""A federation that goes on when ranks die: the clients they belong to are dropped, the others merge among themselves.

The round under way is agreed on by every stage of rounds.py being done by all or by none. What the dead owned goes to
new owners: the shared state from any client, which all hold it; the server optimiser's from its replica.
"""

from ubsmoe_ds.aggregation.server import Server
from ubsmoe_ds.base.errors import TooFewClients
from ubsmoe_ds.federation.build import plan_exchanges
from ubsmoe_ds.federation.rounds import Federation
from ubsmoe_ds.mpi.collectives import RanksLost
from ubsmoe_ds.mpi.ulfm import recover


def run(federation: Federation) -> None:
    """`Federation.run`, again after every death; ranks of a client that lost one leave.

    Raises:
        TooFewClients: if fewer than `min_clients` are left.
        Preempted: as there.
    """
    deaths = []  # kept, see `wait_quietly`
    while True:
        try:
            federation.run()
            return
        except RanksLost as death:
            deaths.append(death)
        while True:
            try:
                _go_on(federation)
                break
            except RanksLost as death:  # another one meanwhile
                deaths.append(death)


def _go_on(federation: Federation) -> None:
    """Without the clients that are lost."""
    world, lost = recover(federation.world, [federation.stop.comm])
    if not lost:
        raise RuntimeError("MPI has failed although no rank has died")
    old, number = federation.exp, federation.progress.round
    kept = [client for client in range(len(old.clients)) if client not in lost]
    names = [old.clients[client].name for client in lost]
    exp = old.model_copy(update={"clients": [old.clients[client] for client in kept]})
    federation.progress.lost |= dict.fromkeys(names, number)
    weights = [federation.server.weights[client] for client in kept]
    plan, owned = plan_exchanges(exp, world, federation.store)
    server = Server(exp, owned, [weight / sum(weights) for weight in weights])
    server.ranks = [federation.server.ranks[client] for client in kept]
    monitor = federation.monitor
    if world.rank == 0 and monitor is None:  # the rank that wrote is gone
        from ubsmoe_ds.federation.monitor import Monitor

        monitor = Monitor(exp, go_on_from=number, config=federation.checkpoints.config)
        if federation.latest is not None and monitor.rounds < number:
            monitor.round(*federation.latest)  # it died before it had written that
    if monitor is not None:
        monitor.lost(number, names, len(kept))
    federation.survive(world, exp, server, plan, monitor)
    if len(kept) < exp.min_clients:
        raise TooFewClients(
            f"min_clients: {len(kept)} clients are left of the {exp.min_clients} demanded; --resume auto "
            "goes on from the last checkpoint"
        )
