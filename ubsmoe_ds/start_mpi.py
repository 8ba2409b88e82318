"""MPI, started before anything else imports it, which would start it as it comes."""

from collections.abc import MutableMapping

import mpi4py

from ubsmoe_ds.launchers import netmod_for


def start_mpi(environment: MutableMapping[str, str]) -> None:
    """Initialise MPI, over a network that this rank's process manager can tell the others of; see `netmod_for`.

    Args:
        environment: the process's own. Whoever sets MPIR_CVAR_CH4_NETMOD has chosen.
    """
    mpi4py.rc.initialize, mpi4py.rc.finalize = False, True
    from mpi4py import MPI

    if netmod := netmod_for(environment, MPI.Get_library_version()):
        environment.setdefault("MPIR_CVAR_CH4_NETMOD", netmod)
    if not MPI.Is_initialized():
        MPI.Init_thread()
