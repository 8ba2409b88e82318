"""Deal training rows to clients: iid, Dirichlet over tasks, or whole tasks. Works on row numbers; copies no rows."""

from collections.abc import Sequence

import numpy as np

from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.config.sections import ClientConfig, DataConfig


def partition(
    tasks: Sequence[str] | np.ndarray, clients: Sequence[ClientConfig], config: DataConfig, seed: int
) -> list[np.ndarray]:
    """Return the row numbers of each client, in order; together they are all rows, and none is dealt twice.

    iid: rows are shuffled, then cut in proportion to the clients' shares.
    dirichlet: each task is cut by a draw of Dirichlet(alpha * C * shares / their sum), whose mean is the shares; with
    equal shares it is Dirichlet(alpha) (arXiv 1909.06335).
    by_task: tasks go to the clients in turn; with fewer tasks than clients, clients of one task split it by shares.

    Args:
        tasks: the task of each row, or its place among all tasks in the order of their names.
        clients: in order.
        config: `partition` and `alpha`.
        seed: of the shuffle and the draw.

    Raises:
        UserError: naming a client that would get no row.
    """
    rng = np.random.default_rng([seed, 1])
    share_C = np.array([client.share for client in clients])
    dealt: list[list[np.ndarray]] = [[] for _ in clients]
    groups = [np.arange(len(tasks))]
    if config.partition != "iid":
        names = np.asarray(tasks)
        groups = [np.flatnonzero(names == task) for task in np.unique(names)]
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
    shares = [np.sort(np.concatenate(parts)) for parts in dealt]
    for client, dealt_rows in zip(clients, shares, strict=True):
        if not len(dealt_rows):
            raise UserError(
                f"clients: {client.name!r} would get none of the {len(tasks)} rows (share {client.share}, partition "
                f"{config.partition}); raise its share, data.alpha or data.rows"
            )
    return shares


def _takes_task(task: int, tasks: int, clients: int) -> np.ndarray:
    """Return which clients get rows of a task, [C] bool: one, or with fewer tasks than clients every `tasks`-th."""
    client_C = np.arange(clients)
    return client_C % tasks == task if tasks < clients else client_C == task % clients
