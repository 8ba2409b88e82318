"""Deal rows to clients: common rows by partition, or the rows of each client's own site.

Imports neither torch nor MPI, so that bad rows are reported before a process is started. What ranks tell each other
about their rows is in `client_rows.py`.
"""

from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple, NoReturn

import numpy as np

from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.config.sections import ClientConfig
from ubsmoe_ds.data.partition import partition
from ubsmoe_ds.data.row_table import RowTable
from ubsmoe_ds.data.schema import Row
from ubsmoe_ds.data.sources import Chosen, Unused, choose, digest_of
from ubsmoe_ds.data.stored import Sharing


class CommonRows(NamedTuple):
    """Rows that every rank reads, dealt to the clients.

    training: all training rows; shares: of each client, the numbers of its rows in `training`; together they are all
    rows, and none is dealt twice. evaluation: rows, the same for all clients. unused: numbers of other rows.
    """

    training: RowTable
    shares: list[np.ndarray]
    evaluation: Sequence[Row]
    unused: Unused

    def of_client(self, number: int) -> Sequence[Row]:
        """Return a client's training rows."""
        return self.training.rows_at(self.shares[number])

    @property
    def digest(self) -> str:
        """Return a digest of training and evaluation rows."""
        return digest_of([self.training.rows, self.evaluation])


def has_sites(clients: Sequence[ClientConfig]) -> bool:
    """Return whether clients have sources of their own; then all have, and a source may exist only at its site."""
    return clients[0].source is not None


def common_rows(exp: Experiment, sharing: Sharing | None = None) -> CommonRows:
    """Read the rows of an experiment without sites, and deal them to the clients.

    Args:
        exp: the experiment.
        sharing: with whom many rows are shared; None: with nobody.

    Raises:
        UserError: for a bad row, or a client that would get none.
    """
    rows = choose(exp.data, exp.seed, sharing)
    shares = partition(rows.training.columns.group_N, exp.clients, exp.data, exp.seed)
    return CommonRows(rows.training, shares, rows.evaluation, rows.unused)


def site_rows(exp: Experiment, number: int, sharing: Sharing | None = None) -> Chosen:
    """Read the rows of a client with a source of its own.

    Args:
        exp: the experiment.
        number: the client's.
        sharing: with whom many rows are shared; None: with nobody.

    Raises:
        UserError: as `choose`.
    """
    source = exp.clients[number].source
    assert source is not None
    return choose(exp.data.model_copy(update={"source": source}), exp.seed, sharing)


def rows_by_client(exp: Experiment) -> tuple[list[Sequence[Row]], Sequence[Row]]:
    """Read (each client's training rows, evaluation rows) in one process, which must reach the rows of all sites.

    Raises:
        UserError: for a bad row, or a client that would get none.
    """
    numbers = range(len(exp.clients))
    if has_sites(exp.clients):
        sites = [site_rows(exp, number) for number in numbers]
        return [site.training.rows for site in sites], sites[0].evaluation
    rows = common_rows(exp)
    return [rows.of_client(number) for number in numbers], rows.evaluation


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
    if has_sites(exp.clients) or any(source.startswith("hub:") for source in exp.data.files):
        return
    with suppress(_TooMany):
        common_rows(exp, _First())
