"""Deal rows to clients: common rows by partition, or the rows of each client's own site.

Imports neither torch nor MPI, so that bad rows are reported before a process is started. What ranks tell each other
about their rows is in `client_rows.py`.
"""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple, NoReturn

import numpy as np

from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.config.sections import ClientConfig
from ubsmoe_ds.data.formats import read_template
from ubsmoe_ds.data.partition import deal
from ubsmoe_ds.data.row_table import RowTable
from ubsmoe_ds.data.schema import Row
from ubsmoe_ds.data.sources import Chosen, Unused, choose, digest_of, evaluation_table
from ubsmoe_ds.data.stored import Alone, Sharing


class CommonRows(NamedTuple):
    """Rows that every rank reads, dealt to the clients.

    training: all training rows; shares: of each client, the numbers of its rows in `training`; together they are all
    rows, and none is dealt twice. evaluation: rows, the same for all clients. unused: numbers of other rows. notes:
    lines for the user. template: the text of `data.chat_template`, which the digest is of too.
    """

    training: RowTable
    shares: list[np.ndarray]
    evaluation: Sequence[Row]
    unused: Unused
    notes: list[str]
    template: str | None

    def of_client(self, number: int) -> Sequence[Row]:
        """Return a client's training rows."""
        return self.training.rows_at(self.shares[number])

    @property
    def digest(self) -> str:
        """Return a digest of training and evaluation rows."""
        return digest_of([self.training.rows, self.evaluation, *template_parts(self.template)])


class OwnRows(NamedTuple):
    """Rows that one client uses.

    training: rows to train on; evaluation: its own evaluation rows, if it has some; evaluated, beyond: numbers of
    training rows left out because they are evaluation rows of its own, or over its `max_rows`.
    """

    training: Sequence[Row]
    evaluation: Sequence[Row]
    evaluated: int
    beyond: int


def template_text(exp: Experiment) -> str | None:
    """Return the text of `data.chat_template`; raise UserError if it cannot be read."""
    return None if exp.data.chat_template is None else read_template(exp.data.chat_template)


def template_parts(template: str | None) -> list[Sequence[Any]]:
    """Return what a digest of rows holds of their template."""
    return [] if template is None else [[template]]


def has_sites(clients: Sequence[ClientConfig]) -> bool:
    """Return whether clients have rows of their own, which may exist only at their site."""
    return any(client.source is not None or client.eval_source is not None for client in clients)


def has_sources(clients: Sequence[ClientConfig]) -> bool:
    """Return whether clients have training rows of their own; then all have."""
    return clients[0].source is not None


def common_rows(exp: Experiment, sharing: Sharing | None = None) -> CommonRows:
    """Read the rows of an experiment without sites, and deal them to the clients.

    Args:
        exp: the experiment.
        sharing: with whom many rows are shared; None: with nobody.

    Raises:
        UserError: for a bad row, or a client that would get too few.
    """
    rows = choose(exp.data, exp.seed, sharing)
    shares, notes = deal(rows.training, exp.clients, exp.data, exp.seed)
    return CommonRows(rows.training, shares, rows.evaluation, rows.unused, notes, template_text(exp))


def site_rows(exp: Experiment, number: int, sharing: Sharing | None = None) -> Chosen:
    """Read the rows of a client with a source of its own, and the common evaluation rows, if there are some.

    Args:
        exp: the experiment.
        number: the client's.
        sharing: with whom many rows are shared; None: with nobody.

    Raises:
        UserError: as `choose`.
    """
    client = exp.clients[number]
    undealt = {"source": client.source, "partition": "iid", "client_column": None}
    data = exp.data.model_copy(update=undealt)
    return choose(data, exp.seed, sharing, evaluates=data.eval_source is not None)


def own_rows(exp: Experiment, number: int, training: RowTable, sharing: Sharing | None = None) -> OwnRows:
    """Return what a client uses of its training rows, and its own evaluation rows.

    Args:
        exp: the experiment.
        number: the client's.
        training: rows that are dealt to it, or of its source.
        sharing: with whom many rows are shared; None: with nobody.

    Raises:
        UserError: for bad rows, or if none is left to train on.
    """
    client, evaluation, used_N = exp.clients[number], None, np.arange(len(training))
    if client.eval_source is not None:
        evaluation = evaluation_table(exp.data, client.eval_source, exp.seed, sharing or Alone()).ordered()
        used_N = np.flatnonzero(~np.isin(training.numbers("same"), evaluation.numbers("same")))
    chosen_N = used_N[: client.max_rows]
    if not len(chosen_N):
        raise UserError(
            f"clients: {client.name!r} has no training rows: all {len(training)} are rows of its eval_source; give more"
        )
    rows = [] if evaluation is None else list(evaluation.rows_at(np.arange(len(evaluation))[: exp.data.eval_rows]))
    return OwnRows(training.rows_at(chosen_N), rows, len(training) - len(used_N), len(used_N) - len(chosen_N))


def rows_by_client(exp: Experiment) -> tuple[list[OwnRows], Sequence[Row]]:
    """Read (each client's rows, common evaluation rows) in one process, which must reach the rows of all sites.

    Raises:
        UserError: for a bad row, or a client that would get none.
    """
    numbers = range(len(exp.clients))
    if has_sources(exp.clients):
        sites = [site_rows(exp, number) for number in numbers]
        return [own_rows(exp, n, site.training) for n, site in enumerate(sites)], sites[0].evaluation
    rows = common_rows(exp)
    return [own_rows(exp, n, rows.training.select(rows.shares[n])) for n in numbers], rows.evaluation


class _TooMany(Exception):  # noqa: N818  # no error: the ranks read on
    """Rows are more than this process reads."""


class _First:
    """Shares with nobody and keeps no file: rows that are many are left to the ranks."""

    def map(self, write: object) -> NoReturn:
        raise _TooMany


def check_rows(exp: Experiment) -> None:
    """Raise if common rows on this machine are bad or leave a client without any. Rows of sites and of the hub pass.

    Of a source that is too large for memory only the first part is read; its ranks read the rest.
    """
    if has_sources(exp.clients) or any(source.startswith("hub:") for source in exp.data.files):
        return
    with suppress(_TooMany):
        common_rows(exp, _First())
