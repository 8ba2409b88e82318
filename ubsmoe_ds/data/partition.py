"""Deal training rows to clients: iid, Dirichlet, whole tasks, or by whose they are. Copies no rows.

Shapes: N rows, C clients.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.config.sections import ClientConfig, DataConfig
from ubsmoe_ds.data.row_table import RowTable

LENGTH_BINS = 10  # of equal numbers of rows, where Dirichlet has no tasks to deal
MOST_DRAWS = 1000  # of Dirichlet, until each client has `data.min_rows`


class Dealt(NamedTuple):
    """Row numbers of each client, in order, and what the user should know of it.

    Together they are all rows, and none is dealt twice.
    """

    shares: list[np.ndarray]
    notes: list[str]


def deal(training: RowTable, clients: Sequence[ClientConfig], config: DataConfig, seed: int) -> Dealt:
    """Deal the rows of a table, see `partition` and `by_client`.

    Dirichlet deals by `data.label_column`, else by the rows' tasks. Rows of one task alone, which is that of formats
    without any, are dealt by length: in bins of equal numbers of rows, short ones first.

    Raises:
        UserError: naming a client that would get fewer rows than `data.min_rows`, or a key that does not fit the rows.
    """
    if config.partition == "by_client":
        return by_client(*training.codes("owner"), clients, config)
    (group_N, _), notes = training.codes("group"), []
    has_tasks = config.label_column or training.format == "instruction" or np.ptp(group_N) > 0
    if config.partition == "by_task" and not has_tasks:
        raise UserError("data.partition: by_task, but all rows have the same task; set data.label_column, or use iid")
    if config.partition == "dirichlet" and not has_tasks:
        length_N = training.numbers("length")
        group_N = np.empty(len(length_N), dtype=np.int64)
        group_N[np.argsort(length_N, kind="stable")] = np.arange(len(length_N)) * LENGTH_BINS // len(length_N)
        notes = [f"note: data.partition: rows have no tasks, so dirichlet deals {LENGTH_BINS} bins of their lengths"]
    dealt = partition(group_N, clients, config, seed)
    return dealt._replace(notes=notes + dealt.notes)


def partition(
    tasks: Sequence[str] | np.ndarray, clients: Sequence[ClientConfig], config: DataConfig, seed: int
) -> Dealt:
    """Deal rows by their tasks.

    iid: rows are shuffled, then cut in proportion to the clients' shares.
    dirichlet: each task is cut by a draw of Dirichlet(alpha * C * shares / their sum), whose mean is the shares; with
    equal shares it is Dirichlet(alpha) (arXiv 1909.06335). It is drawn again until each client has `data.min_rows`.
    by_task: tasks go to the clients in turn; with fewer tasks than clients, clients of one task split it by shares.

    Args:
        tasks: the task of each row, or its place among all tasks in the order of their names.
        clients: in order.
        config: `partition`, `alpha` and `min_rows`.
        seed: of the shuffle and the draws.

    Raises:
        UserError: naming a client that would get fewer rows.
    """
    rng = np.random.default_rng([seed, 1])
    groups = [np.arange(len(tasks))]
    if config.partition != "iid":
        names = np.asarray(tasks)
        groups = [np.flatnonzero(names == task) for task in np.unique(names)]
    for draws in range(1, MOST_DRAWS + 1 if config.partition == "dirichlet" else 2):
        shares = _drawn(groups, clients, config, rng)
        if min(map(len, shares)) >= config.min_rows:
            again = f"note: data.partition: dirichlet was drawn {draws} times, until each client had data.min_rows="
            return Dealt(shares, [f"{again}{config.min_rows}"] if draws > 1 else [])
    raise _too_few(shares, clients, config, len(tasks))


def by_client(owner_N: np.ndarray, owners: Sequence[str], clients: Sequence[ClientConfig], config: DataConfig) -> Dealt:
    """Deal rows by the values of `data.client_column`, each value as a whole.

    A value that is a client's name goes to it. The others, most rows first, go each to the client that has the fewest
    rows for its share so far.

    Args:
        owner_N: place of each row's value among `owners`.
        owners: the values.
        clients: in order.
        config: `min_rows`.
    """
    names = [client.name for client in clients]
    counts, of_owner = np.bincount(owner_N, minlength=len(owners)), np.full(len(owners), -1)
    share_C, rows_C = np.array([client.share for client in clients]), np.zeros(len(clients))
    for owner, name in enumerate(owners):
        if name in names:
            of_owner[owner] = names.index(name)
            rows_C[of_owner[owner]] += counts[owner]
    others = np.flatnonzero(of_owner < 0)
    for other in others[np.argsort(-counts[others], kind="stable")].tolist():
        of_owner[other] = np.argmin(rows_C / share_C)
        rows_C[of_owner[other]] += counts[other]
    client_N = of_owner[owner_N]
    shares = [np.flatnonzero(client_N == number) for number in range(len(clients))]
    if min(map(len, shares)) < config.min_rows:
        raise _too_few(shares, clients, config, len(owner_N))
    return Dealt(shares, [])


def _drawn(
    groups: Sequence[np.ndarray], clients: Sequence[ClientConfig], config: DataConfig, rng: np.random.Generator
) -> list[np.ndarray]:
    """Return the row numbers of each client in one draw."""
    share_C = np.array([client.share for client in clients])
    dealt: list[list[np.ndarray]] = [[] for _ in clients]
    for number, group in enumerate(groups):
        weight_C = share_C.copy()
        if config.partition == "dirichlet":
            weight_C = rng.dirichlet(config.alpha * (share_C / share_C.mean()))
        elif config.partition == "by_task":
            weight_C = np.where(_takes_task(number, len(groups), len(clients)), share_C, 0.0)
        # a draw with alpha close to 0 can underflow to zero for every client
        weight_C = weight_C / weight_C.sum() if weight_C.sum() > 0 else share_C / share_C.sum()
        cuts = np.round(np.cumsum(weight_C) * len(group)).astype(int)[:-1]
        for parts, part in zip(dealt, np.split(rng.permutation(group), cuts), strict=True):
            parts.append(part)
    return [np.sort(np.concatenate(parts)) for parts in dealt]


def _too_few(shares: Sequence[np.ndarray], clients: Sequence[ClientConfig], config: DataConfig, rows: int) -> UserError:
    """Return the error that names the client with the fewest rows."""
    number = int(np.argmin([len(share) for share in shares]))
    count = len(shares[number]) or "none"
    client = clients[number]
    least = f", fewer than data.min_rows {config.min_rows}" if config.min_rows > 1 else ""
    return UserError(
        f"clients: {client.name!r} would get {count} of the {rows} rows{least} (share {client.share:g}, partition "
        f"{config.partition}); raise its share, data.alpha or data.rows"
    )


def _takes_task(task: int, tasks: int, clients: int) -> np.ndarray:
    """Return which clients get rows of a task, [C] bool: one, or with fewer tasks than clients every `tasks`-th."""
    client_C = np.arange(clients)
    return client_C % tasks == task if tasks < clients else client_C == task % clients
