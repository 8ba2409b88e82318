"""Files of users are read within bounds; files are written whole or not at all."""

import json
import os
from pathlib import Path

import pytest

from ubsmoe_ds.base import files
from ubsmoe_ds.base.errors import UserError


def test_a_path_that_may_never_end_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, reason in (
        (tmp_path / "pipe", "not a regular file"),
        (Path("/dev/zero"), "not a regular file"),
        (tmp_path, "Is a directory"),
        (tmp_path / "none", "No such file"),
        (Path("a\0b"), "cannot hold a NUL"),
    ):
        with pytest.raises(OSError, match=reason):
            files.read_text(path)


def test_a_text_has_a_largest_size(tmp_path):
    (tmp_path / "text").write_text("é" * 10)
    assert files.read_text(tmp_path / "text", most=20) == "é" * 10
    with pytest.raises(ValueError, match="more than 19 bytes"):
        files.read_text(tmp_path / "text", most=19)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1, "a": 2}', "'a' stands twice"),
        ('{"outer": {"a": 1, "a": 1}}', "'a' stands twice"),
        ("[NaN]", "NaN is not a number in JSON"),
        ("[-Infinity]", "-Infinity is not a number in JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("[1,", "Expecting value"),
    ],
)
def test_json_that_would_lose_something_is_refused(text, reason):
    with pytest.raises(ValueError, match=reason):
        files.parse_json(text)


def test_what_json_cannot_express_becomes_null():
    value = {"a": float("nan"), "b": [1.5, float("-inf"), {"c": float("inf")}], "d": "NaN", "e": True}
    assert files.finite_or_null(value) == {"a": None, "b": [1.5, None, {"c": None}], "d": "NaN", "e": True}
    assert json.loads(files.json_line(value)) == files.finite_or_null(value)
    assert files.json_line({"a": 1.5}) == '{"a": 1.5}\n' and files.json_line(["a"], indent=2) == '[\n  "a"\n]\n'


def fail(path: Path) -> None:
    path.write_text("half")
    raise OSError(28, "No space left on device")


def test_a_failed_write_leaves_the_earlier_files_whole(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).write_text("earlier")
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\); free space there"):
        files.replace_files(tmp_path, {"first": lambda path: path.write_text("new"), "second": fail})
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"first": "earlier", "second": "earlier"}
    files.replace_files(tmp_path, {"first": lambda path: path.write_text("new")})
    assert (tmp_path / "first").read_text() == "new"


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
@pytest.mark.parametrize("earlier", [("first", "second", "third"), ("second",), ()], ids=["all", "one", "none"])
@pytest.mark.parametrize("failing", ["first", "second", "third"])
def test_files_that_belong_together_are_replaced_together(failing, earlier, links, tmp_path, monkeypatch):
    """Whichever cannot be given its name: the earlier ones are there again, and nothing else."""
    names = ("first", "second", "third")
    for name in earlier:
        (tmp_path / name).write_text(f"earlier {name}")
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}
    really = Path.replace

    def replace(path, target):
        if target == tmp_path / failing and path.read_text() == "new":
            raise OSError(1, "Operation not permitted")
        return really(path, target)

    def link(*_, **__):
        raise PermissionError(1, "no links here")

    with monkeypatch.context() as broken:
        broken.setattr(Path, "replace", replace)
        if not links:
            broken.setattr(os, "link", link)
        with pytest.raises(UserError, match="Operation not permitted"):
            files.replace_files(tmp_path, {name: lambda path: path.write_text("new") for name in names})
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before
    files.replace_files(tmp_path, {name: lambda path: path.write_text("new") for name in names})
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(names, "new")


def test_a_folder_in_a_files_place_leaves_the_others_alone(tmp_path):
    (tmp_path / "first").write_text("earlier")
    (tmp_path / "second" / "inner").mkdir(parents=True)
    with pytest.raises(UserError, match="Is a directory"):
        files.replace_files(tmp_path, {name: lambda path: path.write_text("new") for name in ("first", "second")})
    assert (tmp_path / "first").read_text() == "earlier" and sorted(p.name for p in tmp_path.iterdir()) == [
        "first",
        "second",
    ]


def test_a_folder_that_was_made_for_a_failed_write_goes_again(tmp_path):
    with pytest.raises(UserError):
        files.replace_files(tmp_path / "new", {"only": fail})
    assert not list(tmp_path.iterdir())


def test_a_new_folder_exists_complete_or_not_at_all(tmp_path):
    with pytest.raises(UserError), files.new_folder(tmp_path / "out", "--out") as unfinished:
        fail(unfinished / "part")
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()  # an empty folder may be taken
    with files.new_folder(tmp_path / "out", "--out") as unfinished:
        (unfinished / "part").write_text("whole")
        assert not list((tmp_path / "out").iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "part").read_text() == "whole"


@pytest.mark.parametrize("kind", ["file", "link", "full folder"])
def test_a_folder_in_use_is_refused(kind, tmp_path):
    folder = tmp_path / "out"
    if kind == "file":
        folder.write_text("")
    elif kind == "link":
        folder.symlink_to(tmp_path / "nowhere")
    else:
        (folder / "inner").mkdir(parents=True)
    with pytest.raises(UserError, match="--out: .* is in use; name a new folder"):
        files.require_new(folder, "--out")
