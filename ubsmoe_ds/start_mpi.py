"""MPI, started before anything else imports it, which would start it as it comes."""

from collections.abc import MutableMapping

import mpi4py

from ubsmoe_ds.launchers import mpich_settings


def start_mpi(environment: MutableMapping[str, str]) -> None:
    """Initialise MPI with `mpich_settings`.

    Args:
        environment: the process's own. A variable that is set stays as it is: somebody has chosen.
    """
    mpi4py.rc.initialize, mpi4py.rc.finalize = False, True
    from mpi4py import MPI

    for name, value in mpich_settings(environment, MPI.Get_library_version()).items():
        environment.setdefault(name, value)
    if not MPI.Is_initialized():
        MPI.Init_thread()
