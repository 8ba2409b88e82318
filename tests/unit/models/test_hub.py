"""Models of the hub: config and tokenizer come first, weights when they are loaded, and all of one commit."""

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest

from launch import plan
from tests.support.ranks import REPO
from ubsmoe_ds.models.conversion import UBSMoESpec, load
from ubsmoe_ds.models.hub import BUILTIN_MODELS, model_folder
from ubsmoe_ds.moe.gate import GateConfig

COMMITS = ["a" * 40, "b" * 40]  # `main` moves from the first to the second with every fetch


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that has the built-in model as org/tiny; returns the list of (revision, patterns) that were fetched."""
    fetched = []

    def snapshot_download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert name == "org/tiny"
        commit = revision if revision in COMMITS else COMMITS[min(len(fetched), 1)]
        fetched.append((revision, allow_patterns))
        folder = tmp_path / "snapshots" / commit
        folder.mkdir(parents=True, exist_ok=True)
        for path in stored.iterdir():
            if any(fnmatch(path.name, pattern) for pattern in allow_patterns):
                shutil.copy(path, folder)
        return str(folder)

    stored = tmp_path / "stored"
    shutil.copytree(BUILTIN_MODELS["builtin:tiny_olmoe"], stored)
    (stored / "consolidated.safetensors").touch()  # the same weights in another form

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    model_folder.cache_clear()
    yield fetched
    model_folder.cache_clear()


def has_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors"))


def test_planning_reads_no_weights(hub, monkeypatch, capsys):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    overrides = ["model.path=hub:org/tiny", "data.rows=40", "data.eval_rows=4", "train.rounds=1", "accelerator=cpu"]
    plan.show(plan.parse(["--config", str(REPO / "ds_configs" / "tiny.yaml"), *overrides]))
    assert "memory of a rank" in capsys.readouterr().out
    assert len(hub) == 1 and not has_weights(model_folder("hub:org/tiny"))


@pytest.mark.parametrize("revision", ["", "@main"])
def test_weights_are_of_the_commit_whose_config_was_read(hub, revision):
    folder = model_folder(f"hub:org/tiny{revision}")
    assert folder.name == COMMITS[0] and not has_weights(folder)
    assert model_folder(f"hub:org/tiny{revision}", weights=True) == folder and has_weights(folder)
    assert [asked for asked, _ in hub] == [revision.removeprefix("@") or None, COMMITS[0]]
    assert [path.name for path in folder.glob("*.safetensors")] == ["model.safetensors"]
    load(folder, UBSMoESpec(GateConfig(k=2, candidates=4)))


def test_of_a_model_in_shards_those_of_its_index_are_fetched(hub, tmp_path):
    (tmp_path / "stored" / "model.safetensors").rename(tmp_path / "stored" / "part.safetensors")
    names = {"weight_map": {"lm_head.weight": "part.safetensors", "model.norm.weight": "part.safetensors"}}
    (tmp_path / "stored" / "model.safetensors.index.json").write_text(json.dumps(names))
    folder = model_folder("hub:org/tiny", weights=True)
    assert [path.name for path in folder.glob("*.safetensors")] == ["part.safetensors"]
    load(folder, UBSMoESpec(GateConfig(k=2, candidates=4)))


def test_models_on_disk_are_never_fetched(hub, tmp_path):
    for path, folder in {"builtin:tiny_olmoe": BUILTIN_MODELS["builtin:tiny_olmoe"], str(tmp_path): tmp_path}.items():
        assert model_folder(path) == model_folder(path, weights=True) == folder
    assert hub == []
