"""A run's folder is cleared of its own files alone."""

import os

import pytest

from tests.support import tiny
from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.launching.run_folder import check_run_folder, clear_run_folder


@pytest.mark.parametrize(
    "link, file",
    [
        ("adapter", "adapter_model.safetensors"),
        ("checkpoints", "000001-round-1/manifest.json"),
        ("tensorboard", "events.out"),
    ],
)
def test_what_lies_behind_a_link_is_not_removed(link, file, tmp_path):
    kept = tmp_path / "another run" / file
    kept.parent.mkdir(parents=True)
    kept.touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / link).symlink_to(tmp_path / "another run")
    with pytest.raises(UserError, match="output: .* is behind a link out of the run's folder"):
        clear_run_folder(tmp_path / "run")
    assert kept.exists()


def test_a_linked_run_folder_and_links_to_files_are_cleared(tmp_path):
    for name in ("elsewhere", "precious"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").touch()
    (tmp_path / "elsewhere" / "config.json").symlink_to(tmp_path / "precious" / "summary.json")
    (tmp_path / "run").symlink_to(tmp_path / "elsewhere")
    clear_run_folder(tmp_path / "run")
    assert not any((tmp_path / "elsewhere").iterdir()) and (tmp_path / "precious" / "summary.json").exists()


def test_a_config_that_never_ends_is_another_run(tmp_path):
    """Reading the pipe would wait for ever."""
    exp = tiny.experiment("unused", [{"budget": 1.0}], output=str(tmp_path))
    exp.run_dir.mkdir(parents=True)
    os.mkfifo(exp.run_dir / "config.json")
    with pytest.raises(UserError, match="holds another run"):
        check_run_folder(exp, resuming=True)
