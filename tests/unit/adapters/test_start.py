"""Start from an earlier adapter: its logits to begin with, also at other scalings, LoRA ranks and ranks of experts."""

import json
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.support import tiny
from tests.support.families import ids_and_mask, saved_family
from ubsmoe_ds.adapters import peft_format
from ubsmoe_ds.adapters.adapter import WEIGHTS, save_adapter
from ubsmoe_ds.adapters.start import start_from_adapter
from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.client.engine import client_spec
from ubsmoe_ds.models.conversion import load

RANK, ALPHA = 3, 6.0


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    return saved_family("olmoe", folder), folder


def experiment(base, start, clients=({"budget": 1.0},), **sections):
    lora = {"rank": RANK, "alpha": ALPHA, "attention": True, "from": str(start)} | sections.pop("lora", {})
    return tiny.experiment(str(base), list(clients), k_max=3, lora=lora, **sections)


def client_of(exp, number=0, rank=0):
    """What `start_from_adapter` sees of a client: its model, and masters that are the weights."""
    config = exp.clients[number]
    model = load(exp.weights_dir, client_spec(exp, config, rank)).eval()
    write = SimpleNamespace(write=lambda parameter, value: parameter.data.copy_(value))
    return SimpleNamespace(config=config, model=model, gradient_hook=SimpleNamespace(masters=write))


def logits(model):
    ids, used = ids_and_mask()
    with torch.no_grad():
        return model(ids, used)


@pytest.fixture(scope="module")
def stage_one(base, tmp_path_factory):
    """The adapter of a trained client, as a run writes it; its logits."""
    folder = tmp_path_factory.mktemp("stage") / "adapter"
    exp = experiment(base[1], "unused")
    client = client_of(exp)
    torch.manual_seed(3)
    state = {
        name: v for name, v in client.model.named_state().items() if not name.endswith(".weight") or "router" in name
    }
    for name, value in state.items():
        value.data += 0.05 * torch.randn_like(value) if "router" in name else 0.2 * torch.randn_like(value)
    about = {"run_id": "first", "round": "7"}
    values = {name: value.detach() for name, value in state.items()}
    save_adapter(exp, folder, values, lora_rank=RANK, scaling=ALPHA / RANK, k=3, about=about)
    return folder, logits(client.model)


@pytest.mark.parametrize("alpha", [ALPHA, 1.5])
def test_the_second_stage_begins_where_the_first_ended(alpha, base, stage_one):
    """Whatever alpha is: B is scaled so that s B A stays."""
    folder, expected = stage_one
    exp = experiment(base[1], folder, lora={"alpha": alpha})
    client = client_of(exp)
    assert (logits(client.model) - expected).abs().max() > 0.1
    about = start_from_adapter(exp, client)
    torch.testing.assert_close(logits(client.model), expected, atol=1e-5 if alpha != ALPHA else 0, rtol=0)
    assert about["run_id"] == "first" and about["round"] == "7" and about["folder"] == str(folder)
    assert len(about["digest"]) == 32


def test_ranks_get_their_experts_and_small_clients_the_first_lora_ranks(base, stage_one):
    exp = experiment(
        base[1],
        stage_one[0],
        [{"budget": 1.0, "ranks": 2, "expert_parallel": 2}, {"budget": 1.0, "lora_rank": 2}],
        merge={"rule": "zero_pad"},
    )
    whole = peft_format.read(stage_one[0], *_family(base[1]))[0]
    for rank in range(2):
        client = client_of(exp, 0, rank)
        start_from_adapter(exp, client)
        held = client.model.named_state()["layers.1.experts.up.lora_B"]
        assert torch.equal(held, whole["layers.1.experts.up.lora_B"][4 * rank : 4 * rank + 4])
    client = client_of(exp, 1)
    start_from_adapter(exp, client)
    A, B = (client.model.named_state()[f"layers.0.experts.down.lora_{factor}"] for factor in "AB")
    whole_A, whole_B = (whole[f"layers.0.experts.down.lora_{factor}"] for factor in "AB")
    torch.testing.assert_close(ALPHA / 2 * (B @ A), ALPHA / 3 * (whole_B[..., :2] @ whole_A[:, :2]))


def _family(folder):
    from ubsmoe_ds.models.families import read_facts

    family, config = read_facts(folder)
    return family, config[family.num_experts]


def test_an_adapter_of_peft_is_a_start(base, tmp_path):
    hf, folder = base
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    config.target_parameters = names
    torch.manual_seed(1)
    peft = get_peft_model(type(hf).from_pretrained(folder), config).eval()
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.2)
    peft.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(folder)}))
    exp = experiment(folder, tmp_path, dmr={"enabled": False})
    client = client_of(exp)
    start_from_adapter(exp, client)
    ids, _ = ids_and_mask()
    with torch.no_grad():
        assert (logits(client.model) - peft(input_ids=ids).logits).abs().max() < 1e-4


UNFIT = {
    "rank": ({"lora": {"rank": 4}}, "has LoRA rank 3; set lora.rank=3"),
    "attention": ({"lora": {"attention": False}}, "has LoRA on attention; set lora.attention=true"),
    "router": ({"router": {"trainable": False}}, "has trained routers; set router.trainable=true"),
    "phi": ({"dmr": {"enabled": False}}, "has phi, which is used with dmr.enabled=true only"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_does_not_fit_is_refused_by_name(name, base, stage_one):
    sections, message = UNFIT[name]
    exp = experiment(base[1], stage_one[0], **sections)
    client = client_of(exp)
    before = logits(client.model)
    with pytest.raises(UserError, match=f"^lora.from: '.*' {message}$"):
        start_from_adapter(exp, client)
    assert torch.equal(logits(client.model), before)


def test_another_base_is_refused_and_the_same_one_elsewhere_is_not(base, stage_one, tmp_path):
    saved_family("olmoe, clipped and scaled", tmp_path / "other")
    exp = experiment(tmp_path / "other", stage_one[0])
    with pytest.raises(UserError, match=r"was trained on .*, but model.path is .*; set one to fit the other"):
        start_from_adapter(exp, client_of(exp))
    saved_family("olmoe", tmp_path / "same")
    exp = experiment(tmp_path / "same", stage_one[0])
    client = client_of(exp)
    start_from_adapter(exp, client)
    assert torch.equal(logits(client.model), stage_one[1])


def test_whole_weights_and_a_missing_folder_are_refused(base, tmp_path):
    exp = experiment(base[1], tmp_path / "none")
    with pytest.raises(UserError, match="cannot be read"):
        start_from_adapter(exp, None)
    (tmp_path / WEIGHTS).touch()
    with pytest.raises(UserError, match=r"holds whole weights \(FLoRA's\), no adapter; export it with --merge"):
        start_from_adapter(experiment(base[1], tmp_path), None)
    with pytest.raises(ValueError, match=r"lora.from: .* does not work with merge.rule 'flora'"):
        experiment(base[1], tmp_path, merge={"rule": "flora"})
