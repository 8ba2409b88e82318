"""The rows of one rank's client, and what all ranks know about the rows of all clients."""

from collections.abc import Sequence
from dataclasses import dataclass

from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.data.host_files import OfHost
from ubsmoe_ds.data.row_report import LeftOut
from ubsmoe_ds.data.schema import Row
from ubsmoe_ds.data.shares import (
    common_rows,
    has_sites,
    has_sources,
    own_rows,
    site_rows,
    template_parts,
    template_text,
)
from ubsmoe_ds.data.site_key import key_of
from ubsmoe_ds.data.sources import Unused, digest, digest_of
from ubsmoe_ds.mpi.collectives import gather_json
from ubsmoe_ds.mpi.world import World


@dataclass(frozen=True)
class ClientRows:
    """Rows as one rank sees them.

    training: this client's rows.
    counts: training rows of each client.
    evaluation: rows, the same for all clients; none if each client has its own.
    own_evaluation: this client's own evaluation rows, if it has some.
    unused: numbers of other rows, of the common source (one item) or of each client's.
    left_out: of each client, numbers of rows that it alone leaves out.
    digest: differs when any rows differ, and is the same on all ranks. It is kept with the run, which others may read;
        where rows stay at a site, nobody can test a guess of them against it (`site_key.py`).
    notes: lines for the user on how rows were dealt.
    """

    training: Sequence[Row]
    counts: list[int]
    evaluation: Sequence[Row]
    own_evaluation: Sequence[Row]
    unused: list[Unused]
    left_out: list[LeftOut]
    digest: str
    notes: list[str]


def merge_weights(kind: str, rows_C: Sequence[int], tokens_C: Sequence[int]) -> list[float]:
    """Return w_c, each client's weight in the merge, summing to one.

    Args:
        kind: as `train.weights`.
        rows_C: training rows of each client.
        tokens_C: answer tokens of these rows.
    """
    counts = {"rows": rows_C, "tokens": tokens_C, "equal": [1] * len(rows_C)}[kind]
    return [count / sum(counts) for count in counts]


def client_rows(exp: Experiment, world: World) -> ClientRows:
    """Read the rows of this rank's client (a collective where clients have rows of their own, or these are many).

    Raises:
        UserError: for a bad row, a client without any, or a site that has no place for its key.
    """
    of_client = OfHost(world.group_comm, world.group_hosts[world.client])
    if has_sources(exp.clients):
        rows = site_rows(exp, world.client, of_client)
        training, evaluation, unused, notes = rows.training, rows.evaluation, rows.unused, []
    else:
        common = common_rows(exp, OfHost(world.comm, world.hosts, says=world.rank == 0))
        training, evaluation = common.training.select(common.shares[world.client]), common.evaluation
        unused, notes = common.unused, common.notes
    own = own_rows(exp, world.client, training, of_client)
    if not has_sites(exp.clients):
        counts = [len(share[: client.max_rows]) for client, share in zip(exp.clients, common.shares, strict=True)]
        left = [LeftOut(0, len(share) - count) for share, count in zip(common.shares, counts, strict=True)]
        return ClientRows(own.training, counts, evaluation, [], [unused], left, common.digest, notes)
    site = None  # the first rank of each client speaks for it
    if world.group_rank == 0:
        key = key_of(exp.clients[world.client].name)
        template = template_parts(template_text(exp))
        digest_of_site = digest_of([own.training, evaluation, own.evaluation, *template], key)
        site = [world.client, len(own.training), unused, (own.evaluated, own.beyond), digest_of_site]
    sites = sorted(site for site in gather_json(world.comm, site) if site is not None)
    counts = [count for _, count, *_ in sites]
    unused_C = [Unused(*numbers) for _, _, numbers, *_ in sites]
    left = [LeftOut(*numbers) for _, _, _, numbers, _ in sites]
    digests = [list(bytes.fromhex(digest_of_site)) for *_, digest_of_site in sites]
    return ClientRows(
        own.training,
        counts,
        evaluation,
        own.evaluation,
        unused_C if has_sources(exp.clients) else [unused],
        left,
        digest(digests),
        notes,
    )
