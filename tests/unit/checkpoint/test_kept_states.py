"""What clients keep between their rounds: in memory, in files, handed over, in checkpoints. Two groups of one rank."""

import shutil
from types import SimpleNamespace

import pytest
import torch

from tests.support import tiny
from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.checkpoint.kept_states import NO_GROUP, KeptStates, Place
from ubsmoe_ds.checkpoint.storage import Piece, Reader, write_pieces

BYTES = 20  # of a state: 4 + 1 fp32


def world(rank: int) -> SimpleNamespace:
    return SimpleNamespace(
        rank=rank,
        group=rank,
        group_rank=0,
        comm=SimpleNamespace(size=2),
        host_comm=SimpleNamespace(size=2),
        barrier=lambda: None,
    )


def states(folder, limit: int, saved: Reader | None = None) -> list[KeptStates]:
    """Return both ranks' parts; each may keep `limit` states in memory."""
    exp = tiny.experiment(
        "unused",
        [{"budget": 0.5, "name": f"c{n}"} for n in range(4)],
        output=str(folder),
        groups=[{"count": 2}],
        train={"kept_states_gb": 2 * limit * BYTES / 1e9},
    )
    return [KeptStates(exp, world(rank), saved) for rank in range(2)]


def pieces(client: int, value: float):
    owner = f"c{client}"
    yield Piece("optimizer.exp_avg", owner, "w", 0, torch.full((4,), float(value))), True
    yield Piece("scalar.step", owner, "w", 0, torch.tensor(float(value))), False  # another rank writes it


def value(kept: KeptStates, client: int) -> float | None:
    reader = kept.reader(client)
    return None if reader is None else float(reader.read("optimizer.exp_avg", f"c{client}", "w")[2])


def files(folder) -> set[str]:
    return {path.relative_to(folder / "test" / "kept_states").as_posix() for path in folder.rglob("rank-*")}


def test_what_does_not_fit_into_memory_goes_to_files(tmp_path):
    first, _ = states(tmp_path, limit=1)
    for client in (0, 1):
        first.keep(client, 1, pieces(client, client + 0.5))
    first.settle(1, [(0, 0), (1, 0)], [])
    assert list(first.held) == [0] and files(tmp_path) == {"000001-000001/rank-00000.safetensors"}
    assert (value(first, 0), value(first, 1), value(first, 2)) == (0.5, 1.5, None)
    first.keep(0, 2, pieces(0, 7))  # takes the place of the state before it
    assert value(first, 0) == 7 and list(first.held) == [0]
    reader = first.reader(0)
    assert reader is not None and float(reader.read("scalar.step", "c0", "w")) == 7


def test_a_client_that_moves_is_handed_over_and_its_old_files_go(tmp_path):
    first, second = states(tmp_path, limit=9)
    first.keep(0, 1, pieces(0, 1))
    for kept in (first, second):
        kept.settle(1, [(0, 0)], [])
        kept.hand_over([[0], []])
        assert files(tmp_path) == set()  # it stays
    for kept in (first, second):
        kept.hand_over([[], [0]])
        assert kept.places == {0: Place(NO_GROUP, 1, 1)}
    assert value(second, 0) == 1 and not first.held
    second.keep(0, 2, pieces(0, 2))
    for kept in (first, second):
        kept.settle(2, [(0, 1)], [])
        assert kept.places == {0: Place(1, 2, 1)} and not kept.written
    assert files(tmp_path) == set() and value(second, 0) == 2


def test_what_a_dead_group_had_in_memory_is_gone_and_its_files_are_not(tmp_path):
    first, second = states(tmp_path, limit=1)
    for client, kept in [(0, first), (1, first), (2, second)]:
        kept.keep(client, 1, pieces(client, client))
    second.settle(1, [(0, 0), (1, 0), (2, 1)], [])
    second.survive(second.exp, second.world, [0])
    assert second.places == {1: Place(NO_GROUP, 1, 1), 2: Place(0, 1, 1)}
    assert [value(second, client) for client in range(3)] == [None, 1, 2]


def test_a_state_whose_files_are_gone_ends_the_job(tmp_path):
    """Nobody begins anew without a word."""
    (first, second) = states(tmp_path, limit=0)
    first.keep(1, 1, pieces(1, 1))
    for kept in (first, second):
        kept.settle(1, [(1, 0)], [])
    assert value(second, 1) == 1
    shutil.rmtree(tmp_path / "test" / "kept_states" / "000001-000001")
    with pytest.raises(UserError, match="kept_states/000001-000001, what 'c1' keeps between its rounds, is gone"):
        second.reader(1)


def test_a_state_without_tensors_is_handed_over(tmp_path):
    """Plain SGD has none."""
    first, second = states(tmp_path, limit=9)
    first.keep(0, 1, [])
    for kept in (first, second):
        kept.settle(1, [(0, 0)], [])
    for kept in (first, second):
        kept.hand_over([[], [0]])
    assert list(second.reader(0).pieces("optimizer")) == []


@pytest.mark.parametrize("limit", [0, 9])
def test_a_dropped_client_begins_anew(limit, tmp_path):
    both = states(tmp_path, limit)
    both[0].keep(0, 1, pieces(0, 1))
    for kept in both:
        kept.settle(1, [(0, 0)], [0])
        assert (kept.reader(0), kept.places, kept.held, kept.written) == (None, {}, {}, {})
    assert files(tmp_path) == set()


@pytest.mark.parametrize("limit", [0, 1, 9])
def test_a_checkpoint_holds_the_newest_state_of_each_client(limit, tmp_path):
    """Client 0 has had its turn in round 2 on the other group, and the round is not merged."""
    both = states(tmp_path, limit)
    both[0].keep(0, 1, pieces(0, 1))
    both[0].keep(1, 1, pieces(1, 3))
    for kept in both:
        kept.settle(1, [(0, 0), (1, 0)], [])
        kept.hand_over([[], [0]])
    both[1].keep(0, 2, pieces(0, 2))
    folder, names = tmp_path / "checkpoint", []
    folder.mkdir()
    for kept in both:
        names.append(f"rank-{kept.world.rank:05d}.safetensors")
        write_pieces(folder / names[-1], kept.pieces())
        for name, file in kept.files():
            (folder / name).hardlink_to(file.path)
            names.append(name)
    again = states(tmp_path, limit, Reader(folder, names))
    for kept in again:
        assert kept.places == {0: Place(NO_GROUP, 2, 1), 1: Place(NO_GROUP, 1, 1)}
        assert (value(kept, 0), value(kept, 1)) == (2, 3)
        kept.settle(2, [(0, 1)], [])
        assert kept.places[0] == Place(NO_GROUP, 2, 1) and value(kept, 0) == 2
