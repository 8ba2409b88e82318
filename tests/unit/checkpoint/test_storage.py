"""Checkpoint files: complete or absent, verified, readable in any layout."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ubsmoe_ds import __version__
from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.base.files import sha256
from ubsmoe_ds.checkpoint import storage
from ubsmoe_ds.checkpoint.compatibility import check_same_experiment, with_defaults
from ubsmoe_ds.checkpoint.storage import Damaged, OtherFormat, Piece, Reader
from ubsmoe_ds.config.experiment import Experiment


def serials(run_dir: Path) -> list[int]:
    return [storage.serial_of(folder) for folder in storage.folders(run_dir)]


def write(run_dir: Path, pieces: list[list[Piece]], keep: int = 2, label: str = "round-1") -> Path:
    """Write a checkpoint with one file for each list of pieces; return its folder."""
    serial = next(iter(serials(run_dir)), 0) + 1
    folder = storage.begin(run_dir, serial)
    by_name = {storage.rank_file(rank): part for rank, part in enumerate(pieces)}
    files = {name: storage.write_pieces(folder / name, part) for name, part in by_name.items()}
    done = storage.commit(run_dir, serial, label, files, {"round": serial})
    storage.remove_old(run_dir, keep, None)
    return done


def verify(folder: Path) -> Reader:
    manifest = storage.read_manifest(folder)
    for name, expected in manifest["files"].items():
        storage.verify_file(folder, name, expected)
    return Reader(folder, manifest["files"])


def two_pieces() -> list[list[Piece]]:
    return [
        [Piece("weight", "a", "w", 0, torch.tensor([1.0, 2.0]))],
        [Piece("weight", "a", "w", 2, torch.tensor([3.0, 4.0, 5.0])), Piece("weight", "b", "w", 0, torch.ones(2))],
    ]


def test_ranges_are_read_from_the_pieces_that_hold_them(tmp_path):
    reader = verify(write(tmp_path, two_pieces()))
    assert reader.read("weight", "a", "w").tolist() == [1, 2, 3, 4, 5]
    assert reader.read("weight", "a", "w", 1, 3).tolist() == [2, 3, 4]
    assert reader.read("weight", "b", "w").tolist() == [1, 1]
    assert list(reader.overlaps("weight", "a", "w", 3, 9))[0][0] == 3
    assert reader.has("weight", "a", "w") and not reader.has("weight", "c", "w")
    assert reader.kinds("wei") == ["weight"] and reader.kinds("x") == []


@pytest.mark.parametrize(("name", "start", "numel"), [("w", 3, 3), ("w", -1, 2), ("v", 0, 1), ("w", 7, 1)])
def test_missing_pieces_are_named(name, start, numel, tmp_path):
    reader = verify(write(tmp_path, two_pieces()))
    with pytest.raises(UserError, match=f"no weight of '{name}' of 'a'"):
        reader.read("weight", "a", name, start, numel)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_cut_is_read_back_by_any_other(tmp_path_factory, data):
    """Cut a flat tensor at random, write parts of it twice as replicas do, and read a random range."""
    numel = data.draw(st.integers(1, 30))
    value = torch.arange(numel, dtype=torch.float32)
    cuts = sorted(data.draw(st.sets(st.integers(1, numel), max_size=4)) | {numel})
    pieces, first = [], 0
    for cut in cuts:
        again = data.draw(st.integers(0, first))  # a piece may begin earlier, as a replica does
        pieces.append([Piece("k", "o", "t", min(first, again), value[min(first, again) : cut])])
        first = cut
    reader = verify(write(tmp_path_factory.mktemp("cut"), data.draw(st.permutations(pieces))))
    start = data.draw(st.integers(0, numel - 1))
    length = data.draw(st.integers(1, numel - start))
    assert torch.equal(reader.read("k", "o", "t", start, length), value[start : start + length])


def test_the_newest_are_kept_and_half_written_ones_do_not_count(tmp_path):
    assert serials(tmp_path) == []
    for _ in range(3):
        write(tmp_path, two_pieces())
    assert serials(tmp_path) == [3, 2]
    leftover = storage.begin(tmp_path, 4)
    storage.write_pieces(leftover / storage.rank_file(0), two_pieces()[0])  # and then the job was killed
    assert serials(tmp_path) == [3, 2]
    write(tmp_path, two_pieces(), label="within-round-3")
    assert serials(tmp_path) == [4, 3]
    assert storage.folders(tmp_path)[0].name == "000004-within-round-3"
    assert [path.name for path in (tmp_path / "checkpoints").glob(".tmp*")] == []


def damage(folder: Path, how: str) -> None:
    rank_file, manifest = folder / "rank-00001.safetensors", folder / "manifest.json"
    if how == "flipped":
        content = bytearray(rank_file.read_bytes())
        content[-3] ^= 1
        rank_file.write_bytes(content)
    elif how == "truncated":
        rank_file.write_bytes(rank_file.read_bytes()[:-1])
    elif how == "missing":
        rank_file.unlink()
    elif how == "no manifest":
        manifest.unlink()
    elif how == "half a manifest":
        manifest.write_text(manifest.read_text()[:50])
    elif how == "changed manifest":
        manifest.write_text(manifest.read_text().replace('"round": 1', '"round": 2'))
    elif how == "pickled":
        manifest.write_bytes(b"\x80\x04\x95\x05\x00\x00\x00\x00\x00\x00\x00K\x01.")
    elif how == "another format":
        manifest.write_text(json.dumps({"format": "another.program.0", "files": {}}))


HOW = {
    "flipped": "does not have its checksum",
    "truncated": "bytes instead of",
    "missing": "cannot be read",
    "no manifest": "cannot be read",
    "half a manifest": "cannot be read",
    "changed manifest": "does not have its checksum",
    "pickled": "cannot be read",
    "another format": "is not of format",
}


@pytest.mark.parametrize("how", HOW)
def test_damage_is_detected(how, tmp_path):
    folder = write(tmp_path, two_pieces())
    verify(folder)
    damage(folder, how)
    with pytest.raises(Damaged, match=HOW[how]):
        verify(folder)


def test_a_pickle_with_the_right_checksum_is_refused_and_not_run(tmp_path):
    """Only safetensors files are read, whatever the checksum says."""
    folder = storage.begin(tmp_path, 1)
    path = folder / storage.rank_file(0)
    path.write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR.")
    files = {path.name: (path.stat().st_size, sha256(path))}
    done = storage.commit(tmp_path, 1, "round-1", files, {})
    with pytest.raises(UserError, match="rank-00000.safetensors cannot be read"):
        verify(done)
    assert not (tmp_path / "ran").exists()


BASE = {
    "name": "x",
    "method": "ub_smoe",
    "train": {"rounds": 3, "local_steps": 2},
    "clients": [{"name": "a", "ranks": 1, "budget": 0.5}, {"name": "b", "ranks": 1, "budget": 1.0}],
    "deepspeed": {"zero_optimization": {}, "train_batch_size": 8},
    "evaluation": {"every": 1},
}


def changed(**sections) -> dict:
    return BASE | {key: BASE[key] | value if isinstance(BASE[key], dict) else value for key, value in sections.items()}


def check(old: dict, new: dict) -> None:
    check_same_experiment(old, with_defaults(Experiment, new), Path("c"), "0.0.7")


def test_layout_length_and_evaluation_may_change_on_resume():
    two_ranks = [BASE["clients"][0] | {"ranks": 2, "expert_parallel": 2}, BASE["clients"][1]]
    new = changed(
        name="y",
        train={"rounds": 9},
        clients=two_ranks,
        deepspeed={"zero_optimization": {"stage": 2}},
        evaluation={"every": 4},
    )
    check(BASE, new)


@pytest.mark.parametrize(
    ("new", "message"),
    [
        (changed(method="topk"), "method is 'topk', but 'ub_smoe' in c"),
        (changed(train={"local_steps": 5}), "train.local_steps is 5, but 2"),
        (changed(deepspeed={"train_batch_size": 16}), "deepspeed.train_batch_size is 16, but 8"),
        (changed(clients=[BASE["clients"][0] | {"budget": 0.25}, BASE["clients"][1]]), "clients.0.budget is 0.25"),
        (changed(clients=BASE["clients"][:1]), "clients.1.budget is None, but 1.0"),
    ],
)
def test_keys_that_change_results_may_not_change_on_resume(new, message):
    with pytest.raises(UserError, match=message):
        check(BASE, new)


def test_a_key_that_was_added_since_has_its_default():
    """The checkpoint's config is that of an older version, which had no `merge.screen_factor` and no section `lora`."""
    old = with_defaults(Experiment, BASE)
    del old["merge"]["screen_factor"], old["lora"], old["clients"][0]["capacity_factor"]
    check(old, BASE)
    with pytest.raises(UserError, match=r"merge.screen_factor is 7.0, but 30.0 in c"):
        check(old, changed() | {"merge": {"screen_factor": 7.0}})


@pytest.mark.parametrize("where", ["merge", "clients"])
def test_a_key_that_is_no_more_is_named_with_both_versions(where):
    old = with_defaults(Experiment, BASE)
    (old[where][1] if where == "clients" else old[where])["pseudo_weight"] = 0.5
    with pytest.raises(UserError, match=rf"pseudo_weight=0.5, which this version {__version__} .* with version 0.0.7"):
        check(old, BASE)


def test_a_checkpoint_of_another_format_is_not_called_damaged(tmp_path, monkeypatch):
    with monkeypatch.context() as older:
        older.setattr(storage, "FORMAT", "ubsmoe_ds.checkpoint.1")
        older.setattr(storage, "__version__", "0.0.7")
        folder = write(tmp_path, two_pieces())
    with pytest.raises(OtherFormat, match=rf"version 0.0.7 in format ubsmoe_ds.checkpoint.1; this is .*{__version__}"):
        verify(folder)


def test_the_kept_checkpoint_outlives_newer_ones(tmp_path):
    sound = write(tmp_path, two_pieces())
    for _ in range(4):
        newest = write(tmp_path, two_pieces(), keep=9)
    storage.remove_old(tmp_path, 2, sound)
    assert serials(tmp_path) == [5, 4, 1] and newest.exists()


def test_abandoned_branches_are_set_aside_under_different_names(tmp_path):
    """Resume from the first of three checkpoints, twice."""
    first = write(tmp_path, two_pieces(), keep=9)
    for _ in range(2):
        for _ in range(2):
            write(tmp_path, two_pieces(), keep=9)
        storage.set_aside_newer(tmp_path, first)
    assert serials(tmp_path) == [1]
    left = {path.name for path in first.parent.iterdir()} - {first.name}
    assert left == {f"left-00000{serial}-round-1{branch}" for serial in (2, 3) for branch in ("", "-1")}
    storage.set_aside_newer(tmp_path / "another", first)
    assert len(list(first.parent.iterdir())) == 5
