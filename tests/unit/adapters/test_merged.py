"""Adapters merged into plain weights, against transformers reading the written folder."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.families import MODELS, ids_and_mask, saved_family, store, stored_tensors
from tests.unit.adapters.test_peft_format import ALPHA, RANK, trained
from tests.unit.models.test_conversion import rename, set_config
from ubsmoe_ds.adapters.merged import write_merged
from ubsmoe_ds.base.errors import UserError


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("family", MODELS)
def test_merged_weights_give_our_logits(family, stacked, tmp_path):
    saved_family(family, tmp_path / "base", stacked=stacked)
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    model, state = trained(tmp_path / "base")
    write_merged(tmp_path / "base", state, ALPHA / RANK, tmp_path / "out", whole=True)
    ids, used = ids_and_mask()
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(ids).logits
        assert (model(ids, used) - theirs).abs().max() < 1e-4
    written, stored = ({p.name for p in (tmp_path / name).iterdir()} for name in ("out", "base"))
    assert written == stored


def test_layers_that_predict_further_tokens_stay_as_they_are(tmp_path):
    """They lie beside the model's own layers and have experts, but no adapter."""
    saved_family("deepseek_v3", tmp_path / "base")
    _, state = trained(tmp_path / "base")
    name = "model.layers.3.mlp.experts.0.up_proj.weight"
    set_config(tmp_path / "base", num_nextn_predict_layers=1)
    store(tmp_path / "base", stored_tensors(tmp_path / "base") | {name: torch.full((12, 16), 3.0)})
    write_merged(tmp_path / "base", state, ALPHA / RANK, tmp_path / "out", whole=True)
    assert (stored_tensors(tmp_path / "out")[name] == 3).all()


def test_whole_weights_replace_those_of_the_base(tmp_path):
    """As FLoRA saves them, with adapters that do nothing; all other weights equal the base's to the bit."""
    hf = saved_family("olmoe", tmp_path / "base")
    torch.manual_seed(0)
    value = torch.randn(8, 12, 16)
    state = {
        "layers.1.experts.up.weight": value,
        "layers.1.experts.up.lora_A": torch.randn(8, 2, 16),
        "layers.1.experts.up.lora_B": torch.zeros(8, 12, 2),
    }
    write_merged(tmp_path / "base", state, 1.0, tmp_path / "out", whole=False)
    merged = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "out").named_parameters())
    for name, before in hf.named_parameters():
        after = merged[name]
        if name == "model.layers.1.mlp.experts.gate_up_proj":
            assert torch.equal(after[:, 12:], value) and torch.equal(after[:, :12], before[:, :12])
        else:
            assert torch.equal(after, before)


def test_what_does_not_fit_is_refused_and_nothing_is_left(tmp_path):
    saved_family("olmoe", tmp_path / "base")
    _, state = trained(tmp_path / "base")
    state["layers.7.router.weight"] = state["layers.0.router.weight"]
    with pytest.raises(UserError, match=r"no weight for 1 tensors of the adapter, first 'layers.7.router.weight'"):
        write_merged(tmp_path / "base", state, 1.0, tmp_path / "out", whole=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(UserError, match="is in use; name a new folder"):
        write_merged(tmp_path / "base", state, 1.0, tmp_path / "out", whole=True)


def test_shards_are_those_of_the_index(tmp_path):
    """A missing shard is named before anything is written; a file that is not in the index is not copied."""
    saved_family("olmoe", tmp_path / "base")
    _, state = trained(tmp_path / "base")
    (tmp_path / "base" / "consolidated.safetensors").write_bytes(b"not of the checkpoint")
    write_merged(tmp_path / "base", state, 1.0, tmp_path / "out", whole=True)
    assert not (tmp_path / "out" / "consolidated.safetensors").exists()
    rename(tmp_path / "base")
    with pytest.raises(UserError, match=r"base/model-0000\d-of-\d+.safetensors' is missing; it should hold '"):
        write_merged(tmp_path / "base", state, 1.0, tmp_path / "again", whole=True)
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    "lost", ["layers.1.experts.down.lora_B", "layers.0.router.weight", "layers.2.experts.gate.lora_A"]
)
def test_a_lost_tensor_is_named(lost, tmp_path):
    saved_family("olmoe", tmp_path / "base")
    _, state = trained(tmp_path / "base")
    del state[lost]
    with pytest.raises(UserError, match=f"adapter: tensor '{lost}' is missing, which other layers have"):
        write_merged(tmp_path / "base", state, 1.0, tmp_path / "out", whole=True)
    assert not (tmp_path / "out").exists()


def test_lost_whole_weights_are_named_even_if_their_factors_are_there(tmp_path):
    hf = saved_family("olmoe", tmp_path / "base")
    state = {}
    for layer in range(hf.config.num_hidden_layers):
        inside = f"layers.{layer}.experts.up."
        shapes = {"weight": (8, 12, 16), "lora_A": (8, 2, 16), "lora_B": (8, 12, 2)}
        state |= {inside + name: torch.zeros(shape) for name, shape in shapes.items()}
    del state["layers.1.experts.up.weight"]
    with pytest.raises(UserError, match=r"tensor 'layers\.1\.experts\.up\.weight' is missing"):
        write_merged(tmp_path / "base", state, 0.0, tmp_path / "out", whole=True)
