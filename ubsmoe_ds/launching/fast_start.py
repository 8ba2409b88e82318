"""Start ranks by forking them from one process that has imported everything: where that is sound, and with what.

A job of N ranks then imports torch, transformers and DeepSpeed once and not N times, and memory holds their pages once.
It is done on one host, on the CPU, under MPICH or the wheel of Open MPI; everywhere else each rank imports for itself.
"""

import runpy
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from ubsmoe_ds.launching.scratch import scratch_folder

SERVER = "UBSMOE_DS_FORK_SERVER"  # in the environment: the socket of a server that is there already
# what all ranks of a job import, as far as it starts neither threads nor MPI
PRELOADED = (
    "ubsmoe_ds.client.engine",
    "transformers.models.olmoe.modeling_olmoe",
    "transformers.models.auto.tokenization_auto",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.op_builder.all_ops",
    "setuptools",
    "torch.utils.tensorboard",
    "rich.console",
)
SHIM = Path(__file__).with_name("fork_shim.py")


def is_cpu_build() -> bool:
    """Return whether this torch knows no accelerator, whose runtime does not outlive a fork; torch is not imported."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    version = runpy.run_path(str(Path(spec.origin).with_name("version.py")))
    return not any(version.get(kind) for kind in ("cuda", "hip", "xpu"))


class ForkServer(NamedTuple):
    """A running server: process id and socket."""

    pid: int
    path: str

    @property
    def through(self) -> list[str]:
        """Return the words that go before the command of a rank which it is to fork."""
        return through(self.path)


@contextmanager
def fork_server(
    environment: Mapping[str, str], modules: Sequence[str] = PRELOADED, python: str = sys.executable
) -> Iterator[ForkServer]:
    """Start a server that forks ranks as long as the context lasts; yield it.

    The ranks' shims may connect at once: they wait until the server has imported everything.

    Args:
        environment: of the ranks; those with another are not forked.
        modules: to import.
        python: of the ranks.
    """
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours, theirs = socket.socketpair()
    with scratch_folder() as folder, listening, ours, theirs:
        path = str(folder / "fork_server")
        listening.bind(path)
        listening.listen(socket.SOMAXCONN)
        numbers = [listening.fileno(), theirs.fileno()]
        # -P: the user's folder is not on the path of what is imported
        command = [python, "-P", "-u", "-m", "ubsmoe_ds.launching.fork_server", *map(str, numbers), *modules]
        # a session of its own: signals to the group of this process are not meant for ranks
        server = subprocess.Popen(
            command, env=environment, pass_fds=numbers, start_new_session=True, stdin=subprocess.DEVNULL
        )
        listening.close()
        theirs.close()
        try:
            yield ForkServer(server.pid, path)
        finally:
            server.kill()  # ranks that are left go with it
            server.wait()


def through(path: str) -> list[str]:
    """Return the words that go before the command of a rank which a server is to fork.

    Args:
        path: of its socket.
    """
    return [sys.executable, "-I", "-S", str(SHIM), path]


@contextmanager
def shims(environment: Mapping[str, str], sound: bool) -> Iterator[list[str]]:
    """Have ranks forked as long as the context lasts; yield the words that go before their command.

    Args:
        environment: of the ranks. It may name a server that runs already.
        sound: whether they run on this host alone, under an MPI that starts in a forked process. If not, or where torch
            may use an accelerator, there are no such words.
    """
    with ExitStack() as stack:
        words: list[str] = []
        if sound and environment.get(SERVER):
            words = through(environment[SERVER])
        elif sound and is_cpu_build():
            with suppress(OSError):  # such as a path too long for a socket
                words = stack.enter_context(fork_server(environment)).through
        yield words
