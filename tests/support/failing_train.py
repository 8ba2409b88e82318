"""`launch/train.py` with a fault planted; the tests start it as they start the real one.

UBSMOE_DS_FAULT=KIND@RANK[:STEP] deepspeed tests/support/failing_train.py ...

in a job rank's STEP-th (default: second) local step; several with + between

raise, user    an error; a user's mistake
hang           it never comes back
deadlock       it waits for a message that nobody sends, so that all others wait for it
stop           a real SIGSTOP
nan            its weights hold NaN for this step
slow           every step takes STEP (2) seconds longer
huge           its update of round STEP is 10^12 times as large
absent@RANK    a real SIGSTOP before MPI starts
nobf16@all     every device says that it lacks bf16
kill-STAGE     a real SIGKILL when it does so the STEP-th time; see STAGES
"""

import importlib
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from launch import train  # noqa: E402
from ubsmoe_ds.base.errors import UserError  # noqa: E402
from ubsmoe_ds.launching import launchers  # noqa: E402
from ubsmoe_ds.mpi.start import start_mpi  # noqa: E402

# where -> what is called there; the exchange sends before it merges, and the evaluation comes after the merge
STAGES = {
    "local": ("ubsmoe_ds.client.engine", "Client.step"),
    "statistics": ("ubsmoe_ds.federation.aggregator", "gather"),
    "exchange": ("ubsmoe_ds.aggregation.exchange", "Exchange.distribute"),
    "evaluation": ("ubsmoe_ds.client.evaluation", "Evaluator._log_probabilities"),
    "checkpoint": ("ubsmoe_ds.checkpoint.storage", "write_pieces"),
    "summary": ("ubsmoe_ds.federation.monitor", "Monitor.finish"),
    "agreement": ("ubsmoe_ds.mpi.world", "World.agree"),
    "recovery": ("ubsmoe_ds.mpi.ulfm", "_assemble"),
}


def plant_kill(stage: str, count: int) -> None:
    """Kill this process when it gets there for the `count`-th time."""
    module, path = STAGES[stage][0], STAGES[stage][1].split(".")
    holder = importlib.import_module(module)
    for part in path[:-1]:
        holder = getattr(holder, part)
    real, calls = getattr(holder, path[-1]), []

    def killing(*arguments: object, **named: object) -> object:
        calls.append(stage)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **named)

    setattr(holder, path[-1], killing)


def plant(fault: str) -> None:
    """Replace the local step of the chosen rank, or what devices say of themselves."""
    kind, _, place = fault.partition("@")
    rank, _, step = place.partition(":")
    from mpi4py import MPI

    from ubsmoe_ds.mpi.collectives import wait_quietly

    if kind.startswith("kill-"):
        if MPI.COMM_WORLD.rank == int(rank):
            plant_kill(kind.removeprefix("kill-"), int(step or 1))
        return
    from ubsmoe_ds.client import engine

    if kind == "nobf16":
        type(engine.get_accelerator()).is_bf16_supported = lambda self: False
        return
    if MPI.COMM_WORLD.rank != int(rank):
        return
    if kind == "huge":
        plant_huge_update(int(step or 2))
        return
    real_step, calls = engine.Client.step, []

    def fault(self: engine.Client, batch: object) -> object:
        calls.append(batch)
        if kind == "slow":
            time.sleep(int(step or 2))
        elif len(calls) == int(step or 2):
            return harm(kind, self, batch)
        return real_step(self, batch)

    def harm(kind: str, self: engine.Client, batch: object) -> object:
        if kind == "raise":
            raise RuntimeError("planted fault")
        if kind == "user":
            raise UserError("data: planted mistake")
        if kind == "nan":
            weight = self.model.layers[0].experts.base()["down"]
            healthy = weight.clone()
            weight.fill_(float("nan"))
            nll = real_step(self, batch)
            weight.copy_(healthy)
            return nll
        if kind == "deadlock":
            wait_quietly(MPI.COMM_WORLD.Irecv(bytearray(1), source=0, tag=99))
        if kind == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        print(f"hanging with process id {os.getpid()}", flush=True)
        time.sleep(300)
        return None

    engine.Client.step = fault


def plant_huge_update(round_number: int) -> None:
    """Multiply what this rank sends in one round."""
    from ubsmoe_ds.aggregation.units import UnitStore

    real, calls = UnitStore.updates, []

    def updates(self: UnitStore, lora_rank: int) -> object:
        calls.append(lora_rank)
        return real(self, lora_rank) * (1e12 if len(calls) == round_number else 1.0)

    UnitStore.updates = updates


if __name__ == "__main__":
    if os.environ["UBSMOE_DS_FAULT"].startswith("absent@") and launchers.inside_mpi(os.environ):
        if launchers.started_as(os.environ) == int(os.environ["UBSMOE_DS_FAULT"].removeprefix("absent@")):
            os.kill(os.getpid(), signal.SIGSTOP)  # before MPI starts
    elif launchers.inside_mpi(os.environ):
        start_mpi(os.environ)
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        for fault in os.environ["UBSMOE_DS_FAULT"].split("+"):
            plant(fault)
    sys.exit(train.main())
