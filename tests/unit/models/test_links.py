"""Links that leave a model's folder do not lead into what is written; those of the hub's cache do."""

import pytest

from launch.prepare import read_dense
from tests.support.families import saved_family
from tests.unit.adapters.test_peft_format import ALPHA, RANK, trained
from tests.unit.models.test_upcycle import llama
from ubsmoe_ds.adapters.merged import write_merged
from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.models.hub import refuse_links_out


@pytest.fixture
def key(tmp_path):
    path = tmp_path / "private" / "key"
    path.parent.mkdir()
    path.write_text("secret")
    return path


@pytest.mark.parametrize("name", ["notes.txt", "chat_template.jinja", "vocab.json"])
def test_a_link_to_a_key_is_not_copied_into_an_export(name, key, tmp_path):
    saved_family("olmoe", tmp_path / "base")
    _, state = trained(tmp_path / "base")
    (tmp_path / "base" / name).symlink_to(key)
    with pytest.raises(UserError, match=f"{name}' is a link that leads out of the model's folder"):
        write_merged(tmp_path / "base", state, ALPHA / RANK, tmp_path / "out", whole=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["chat_template.jinja", "model.safetensors", "additional_chat_templates"])
def test_a_link_to_a_key_is_not_read_for_a_new_model(name, key, tmp_path):
    """A chat template, for one, would be saved with the tokenizer."""
    llama().save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / name).unlink(missing_ok=True)
    (tmp_path / "dense" / name).symlink_to(key if "." in name else key.parent)
    with pytest.raises(UserError, match="is a link that leads out"):
        read_dense(str(tmp_path / "dense"), "auto")


def test_links_within_the_folder_and_within_the_hubs_cache_are_followed(tmp_path):
    folder = tmp_path / "models--org--small" / "snapshots" / ("a" * 40)
    blobs = tmp_path / "models--org--small" / "blobs"
    saved_family("olmoe", folder)
    _, state = trained(folder)
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(f"../../blobs/{number}")
    (folder / "copy.json").symlink_to("config.json")
    write_merged(folder, state, ALPHA / RANK, tmp_path / "out", whole=True)
    assert (tmp_path / "out" / "copy.json").read_bytes() == (folder / "config.json").read_bytes()
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


@pytest.mark.parametrize("place", ["snapshots/model", "models--x/snapshots/model"])
def test_a_folder_that_looks_like_the_cache_gives_no_more_than_its_blobs(place, key, tmp_path):
    folder = tmp_path / place
    folder.mkdir(parents=True)
    (folder / "a.txt").symlink_to(key)
    with pytest.raises(UserError, match="leads out"):
        refuse_links_out(folder)


def test_a_linked_model_folder_is_one(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    (tmp_path / "link").symlink_to(folder)
    refuse_links_out(tmp_path / "link")
    (folder / "b.txt").symlink_to(tmp_path)
    with pytest.raises(UserError, match="leads out"):
        refuse_links_out(tmp_path / "link")
