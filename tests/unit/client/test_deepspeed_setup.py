"""The store through which a client's ranks meet: reached at their meeting address alone."""

import socket
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import psutil
import pytest

from ubsmoe_ds.client.deepspeed_setup import open_store

TIMEOUT = timedelta(seconds=20)


def listening() -> set[tuple[str, int]]:
    return {tuple(each.laddr) for each in psutil.Process().net_connections() if each.status == psutil.CONN_LISTEN}


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.2", "::1"])
def test_the_store_listens_on_the_groups_address_alone(address):
    try:
        with socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET) as free:
            port = free.getsockname()[1]
    except OSError:
        pytest.skip("this machine has no IPv6")
    before = listening()
    with ThreadPoolExecutor() as pool:
        first, second = pool.map(lambda rank: open_store((address, port), rank, 2, TIMEOUT), range(2))
    assert listening() - before == {(address, port)}
    first.set("key", "value")
    assert second.get("key") == b"value"


def test_a_group_of_one_rank_listens_nowhere():
    before = listening()
    store = open_store(("127.0.0.1", 0), 0, 1, TIMEOUT)
    store.set("key", "value")
    assert store.get("key") == b"value" and listening() == before
