"""Deal rows to clients: common rows by partition, or the rows of each client's own site.

Imports neither torch nor MPI, so that bad rows are reported before a process is started. What ranks tell each other
about their rows is in `client_rows.py`.
"""

from collections.abc import Sequence
from typing import NamedTuple

from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.config.sections import ClientConfig
from ubsmoe_ds.data.partition import partition
from ubsmoe_ds.data.sources import Row, Rows, Unused, digest, load_rows, load_site


class CommonRows(NamedTuple):
    """Rows that every rank reads, dealt to the clients.

    training: all training rows; shares: of each client, the numbers of its rows in `training`; together they are all
    rows, and none is dealt twice. evaluation: rows, the same for all clients. unused: numbers of other rows.
    """

    training: list[Row]
    shares: list[list[int]]
    evaluation: list[Row]
    unused: Unused

    def of_client(self, number: int) -> list[Row]:
        """Return a client's training rows."""
        return [self.training[row] for row in self.shares[number]]

    @property
    def digest(self) -> str:
        """Return a digest of training and evaluation rows."""
        return digest([*self.training, *self.evaluation])


def has_sites(clients: Sequence[ClientConfig]) -> bool:
    """Return whether clients have sources of their own; then all have, and a source may exist only at its site."""
    return clients[0].source is not None


def common_rows(exp: Experiment) -> CommonRows:
    """Read the rows of an experiment without sites, and deal them to the clients.

    Raises:
        UserError: for a bad row, or a client that would get none.
    """
    rows = load_rows(exp.data, exp.seed)
    shares = partition([row["task"] for row in rows.training], exp.clients, exp.data, exp.seed)
    return CommonRows(rows.training, shares, rows.evaluation, rows.unused)


def site_rows(exp: Experiment, number: int) -> Rows:
    """Read the rows of a client with a source of its own.

    Raises:
        UserError: as `load_rows`.
    """
    source = exp.clients[number].source
    assert source is not None
    return load_site(exp.data, source, exp.seed)


def rows_by_client(exp: Experiment) -> tuple[list[list[Row]], list[Row]]:
    """Read (each client's training rows, evaluation rows) in one process, which must reach the rows of all sites.

    Raises:
        UserError: for a bad row, or a client that would get none.
    """
    numbers = range(len(exp.clients))
    if has_sites(exp.clients):
        sites = [site_rows(exp, number) for number in numbers]
        return [site.training for site in sites], sites[0].evaluation
    rows = common_rows(exp)
    return [rows.of_client(number) for number in numbers], rows.evaluation


def check_rows(exp: Experiment) -> None:
    """Raise if common rows on this machine are bad or leave a client without any. Rows of sites and of the hub pass."""
    if not has_sites(exp.clients) and not any(source.startswith("hub:") for source in exp.data.files):
        common_rows(exp)
