"""Share mapped files among the ranks of a host: the first one writes, the others wait, and then the name goes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ubsmoe_ds.base.terminal import say
from ubsmoe_ds.data.stored import Write, mapped, written
from ubsmoe_ds.launching.scratch import scratch_folder
from ubsmoe_ds.mpi.collectives import gather_json

NAME = "rows.arrow"


class OfHost:
    """A `Sharing` of the ranks of a communicator that are on one host.

    Args:
        comm: ranks that all need the same files.
        hosts: host name of each of them.
        says: whether this rank tells the user where the files are.
    """

    def __init__(self, comm: Any, hosts: Sequence[str], *, says: bool = False) -> None:
        self.comm, self.says = comm, says
        self.writer = hosts.index(hosts[comm.rank])

    def map(self, write: Write) -> Any:
        """Return the table that the first rank of each host writes, mapped (a collective over the communicator)."""
        if self.comm.rank != self.writer:
            path = Path(gather_json(self.comm, "")[self.writer])
            table = mapped(path)
            gather_json(self.comm, "")  # the name may go
            return table
        with scratch_folder() as folder:
            if self.says:
                say(f"note: rows are many, so the ranks of a host share them in a file in {folder.parent} (TMPDIR)")
            table = written(write, folder / NAME)
            gather_json(self.comm, str(folder / NAME))
            gather_json(self.comm, "")
            return table
