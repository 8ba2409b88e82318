"""Which training rows are a client's: its share of common rows, or those of its own site, which nobody else reads."""

from dataclasses import dataclass

import numpy as np

from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.data.partition import partition
from ubsmoe_ds.data.sources import Row, digest, load_rows, load_site
from ubsmoe_ds.mpi.world import World

DIGEST_BYTES = 16


@dataclass(frozen=True)
class ClientRows:
    """What a rank knows of the data.

    training: this client's rows; counts: training rows of each client; evaluation: rows, the same for all;
    digest: tells all of this from other data, the same on all ranks.
    """

    training: list[Row]
    counts: list[int]
    evaluation: list[Row]
    digest: str

    @property
    def weights(self) -> list[float]:
        """w_c: each client's share of all training rows."""
        return [count / sum(self.counts) for count in self.counts]


def client_rows(exp: Experiment, world: World) -> ClientRows:
    """Read the rows (a collective where clients have sources of their own).

    Raises:
        UserError: for bad rows, or a client without any.
    """
    source = exp.clients[world.client].source
    if source is None:
        rows, evaluation = load_rows(exp.data, exp.seed)
        shares = partition([row["task"] for row in rows], exp.clients, exp.data, exp.seed)
        mine = [rows[number] for number in shares[world.client]]
        return ClientRows(mine, [len(share) for share in shares], evaluation, digest([*rows, *evaluation]))
    rows, evaluation = load_site(exp.data, source, exp.seed)
    # whole numbers below 2^53 are exact in the sums
    known = np.zeros((len(exp.clients), 1 + DIGEST_BYTES))
    if world.group_rank == 0:
        known[world.client] = [len(rows), *bytes.fromhex(digest([*rows, *evaluation]))]
    known = world.sum(known)
    return ClientRows(rows, known[:, 0].astype(int).tolist(), evaluation, digest(known[:, 1:].astype(int).tolist()))
