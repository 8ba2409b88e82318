"""The rows of the clients that a rank's group trains, and what all ranks know about the rows of all clients."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.data.host_files import OfHost
from ubsmoe_ds.data.row_report import LeftOut
from ubsmoe_ds.data.schema import Row
from ubsmoe_ds.data.shares import (
    OwnRows,
    common_rows,
    has_sites,
    has_sources,
    own_rows,
    site_rows,
    template_parts,
    template_text,
)
from ubsmoe_ds.data.site_key import key_of
from ubsmoe_ds.data.sources import Chosen, Unused, digest, digest_of
from ubsmoe_ds.mpi.collectives import gather_json
from ubsmoe_ds.mpi.world import World


@dataclass(frozen=True)
class ClientRows:
    """Rows as one rank sees them.

    of_client: returns the training rows of a client that this rank's group may train.
    counts: training rows of each client.
    evaluation: rows, the same for all clients; none if each client has its own.
    own_evaluation: returns the same client's own evaluation rows; none if it is scored on the common ones.
    unused: numbers of other rows, of the common source (one item) or of each client's.
    left_out: of each client, numbers of rows that it alone leaves out.
    digest: differs when any rows differ, and is the same on all ranks. It is kept with the run, which others may read;
        where rows stay at a site, nobody can test a guess of them against it (`site_key.py`).
    notes: lines for the user on how rows were dealt.
    """

    of_client: Callable[[int], Sequence[Row]]
    counts: list[int]
    evaluation: Sequence[Row]
    own_evaluation: Callable[[int], Sequence[Row]]
    unused: list[Unused]
    left_out: list[LeftOut]
    digest: str
    notes: list[str]


def client_rows(exp: Experiment, world: World) -> ClientRows:
    """Read the rows of the clients that this rank's group trains.

    A collective where clients have rows of their own, or these are many.

    Raises:
        UserError: for a bad row, a client without any, or a site that has no place for its key.
    """
    if not has_sources(exp.clients):
        return _dealt_rows(exp, world)

    @lru_cache(maxsize=1)  # read again where clients take turns
    def of_site(client: int) -> tuple[OwnRows, Chosen]:
        sharing = OfHost(world.group_comm, world.group_hosts[world.group])
        chosen = site_rows(exp, client, sharing)
        return own_rows(exp, client, chosen.training, sharing), chosen

    spoken, template = [], template_parts(template_text(exp))
    for client in exp.clients_of(world.group):
        own, chosen = of_site(client)
        spoken.append(_site(exp, client, own, chosen.evaluation, template) + [list(chosen.unused)])
    _, chosen = of_site(exp.clients_for(world.group)[0])
    sites = _spoken(world, spoken)
    return ClientRows(
        of_client=lambda client: of_site(client)[0].training,
        counts=[count for _, count, *_ in sites],
        evaluation=chosen.evaluation,
        own_evaluation=lambda client: of_site(client)[0].evaluation,
        unused=[Unused(*numbers) for *_, numbers in sites],
        left_out=[LeftOut(*numbers) for _, _, numbers, *_ in sites],
        digest=digest([list(bytes.fromhex(of)) for _, _, _, of, _ in sites]),
        notes=[],
    )


def _dealt_rows(exp: Experiment, world: World) -> ClientRows:
    """Return rows of the common source; clients may have evaluation rows of their own."""
    common = common_rows(exp, OfHost(world.comm, world.hosts, says=world.rank == 0))
    sharing = OfHost(world.group_comm, world.group_hosts[world.group])

    @lru_cache(maxsize=None if not exp.takes_turns else 1)
    def of_client(client: int) -> OwnRows:
        return own_rows(exp, client, common.training.select(common.shares[client]), sharing)

    rows = ClientRows(
        of_client=lambda client: of_client(client).training,
        counts=[len(share[: client.max_rows]) for client, share in zip(exp.clients, common.shares, strict=True)],
        evaluation=common.evaluation,
        own_evaluation=lambda client: of_client(client).evaluation,
        unused=[common.unused],
        left_out=[
            LeftOut(0, len(share[client.max_rows :]) if client.max_rows else 0)
            for client, share in zip(exp.clients, common.shares, strict=True)
        ],
        digest=common.digest,
        notes=common.notes,
    )
    if not has_sites(exp.clients):
        return rows
    template = template_parts(template_text(exp))
    sites = _spoken(
        world, [_site(exp, c, of_client(c), common.evaluation, template) for c in exp.clients_of(world.group)]
    )
    return replace(
        rows,
        counts=[count for _, count, *_ in sites],
        left_out=[LeftOut(*numbers) for _, _, numbers, _ in sites],
        digest=digest([list(bytes.fromhex(of)) for *_, of in sites]),
    )


def _site(exp: Experiment, client: int, own: OwnRows, evaluation: Sequence[Row], template: list[Any]) -> list[Any]:
    """Return what leaves the site of a client: number, counts, and a keyed digest of its rows."""
    key = key_of(exp.clients[client].name)
    of = digest_of([own.training, evaluation, own.evaluation, *template], key)
    return [client, len(own.training), [own.evaluated, own.beyond], of]


def _spoken(world: World, own: list[list[Any]]) -> list[list[Any]]:
    """Return what the first rank of each group says of the clients that it answers for, by client (a collective)."""
    said = gather_json(world.comm, own if world.group_rank == 0 else [])
    return sorted(site for part in said for site in part)


def merge_weights(kind: str, rows_C: Sequence[int], tokens_C: Sequence[int]) -> list[float]:
    """Return w_c, each client's weight in the merge, summing to one.

    Args:
        kind: as `train.weights`.
        rows_C: training rows of each client.
        tokens_C: answer tokens of these rows.
    """
    counts = {"rows": rows_C, "tokens": tokens_C, "equal": [1] * len(rows_C)}[kind]
    return [count / sum(counts) for count in counts]
