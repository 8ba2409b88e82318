"""The rows of the clients that a rank's group trains, and what all ranks know about the rows of all clients."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.data.host_files import OfHost
from ubsmoe_ds.data.schema import Row
from ubsmoe_ds.data.shares import common_rows, has_sites, site_rows
from ubsmoe_ds.data.site_key import key_of
from ubsmoe_ds.data.sources import Chosen, Unused, digest, digest_of
from ubsmoe_ds.mpi.collectives import gather_json
from ubsmoe_ds.mpi.world import World


@dataclass(frozen=True)
class ClientRows:
    """Rows as one rank sees them.

    of_client: returns the training rows of a client that this rank's group may train; counts: training rows of each
    client; evaluation: rows, the same for all clients; unused: numbers of other rows, of the common source (one item)
    or of each client's; digest: differs when any rows differ, and is the same on all ranks. It is kept with the run,
    which others may read; where rows stay at a site, nobody can test a guess of them against it (`site_key.py`).
    """

    of_client: Callable[[int], Sequence[Row]]
    counts: list[int]
    evaluation: Sequence[Row]
    unused: list[Unused]
    digest: str


def client_rows(exp: Experiment, world: World) -> ClientRows:
    """Read the rows of the clients that this rank's group trains (a collective).

    Raises:
        UserError: for a bad row, a client without any, or a site that has no place for its key.
    """
    if not has_sites(exp.clients):
        common = common_rows(exp, OfHost(world.comm, world.hosts, says=world.rank == 0))
        counts = [len(share) for share in common.shares]
        return ClientRows(common.of_client, counts, common.evaluation, [common.unused], common.digest)

    @lru_cache(maxsize=1)  # read again where clients take turns
    def of_site(client: int) -> Chosen:
        return site_rows(exp, client, OfHost(world.group_comm, world.group_hosts[world.group]))

    spoken = []
    for client in exp.clients_of(world.group):
        rows = of_site(client)
        if world.group_rank == 0:  # it speaks for the clients that its group answers for
            key, training = key_of(exp.clients[client].name), rows.training.rows
            spoken.append([client, len(training), rows.unused, digest_of([training, rows.evaluation], key)])
    evaluation = of_site(exp.clients_for(world.group)[0]).evaluation
    sites = sorted(site for part in gather_json(world.comm, spoken) for site in part)
    counts, unused = [count for _, count, *_ in sites], [Unused(*numbers) for _, _, numbers, _ in sites]
    digests = [list(bytes.fromhex(digest_of_site)) for *_, digest_of_site in sites]
    return ClientRows(lambda client: of_site(client).training.rows, counts, evaluation, unused, digest(digests))


def merge_weights(kind: str, rows_C: Sequence[int], tokens_C: Sequence[int]) -> list[float]:
    """Return w_c, each client's weight in the merge, summing to one.

    Args:
        kind: as `train.weights`.
        rows_C: training rows of each client.
        tokens_C: answer tokens of these rows.
    """
    counts = {"rows": rows_C, "tokens": tokens_C, "equal": [1] * len(rows_C)}[kind]
    return [count / sum(counts) for count in counts]
