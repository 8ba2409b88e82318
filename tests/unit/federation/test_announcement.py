"""Lines before a run's first round: what an experiment loses is said."""

from types import SimpleNamespace

import pytest
import torch

from tests.support import tiny
from ubsmoe_ds.federation import announcement
from ubsmoe_ds.federation.announcement import warnings
from ubsmoe_ds.moe.router import Router


def client_with(normalize):
    """Stand for a client whose model's K weights sum to one, or not."""
    layer = SimpleNamespace(gate=SimpleNamespace(router=Router(normalize=normalize)))
    return SimpleNamespace(model=SimpleNamespace(layers=[layer]))


@pytest.fixture(autouse=True)
def unused(monkeypatch):
    """Return the names of the tensors that the model leaves out; the experiments here have no model folder."""
    names: list[str] = []
    monkeypatch.setattr(announcement, "left_out", lambda folder: names)
    return names


def test_tensors_that_are_not_used_are_told(unused):
    exp = tiny.experiment("unused", [{"budget": 1.0}])
    assert not any("MTP" in line for line in warnings(exp, client_with(False)))
    unused += ["model.layers.3.eh_proj.weight", "model.layers.3.enorm.weight"]
    (line,) = [line for line in warnings(exp, client_with(False)) if "MTP" in line]
    assert "2 tensors" in line and "first 'model.layers.3.eh_proj.weight'" in line


@pytest.mark.parametrize(
    ("normalize", "budget", "said"), [(True, 0.25, True), (True, 0.5, False), (False, 0.25, False)]
)
def test_a_router_that_learns_nothing_is_told(normalize, budget, said):
    exp = tiny.experiment("unused", [{"budget": 1.0}, {"budget": budget}])  # K_max 4
    lines = [line for line in warnings(exp, client_with(normalize)) if "K = 1" in line]
    assert len(lines) == said
    if said:
        assert "(c1)" in lines[0] and "learn nothing from the rows" in lines[0]


@pytest.mark.parametrize(("capability", "said"), [((8, 0), True), ((9, 0), False), ((10, 3), False), ((12, 0), True)])
def test_devices_that_compute_experts_one_by_one_are_told(capability, said, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    exp = tiny.variant(tiny.experiment("unused", [{"budget": 1.0}]), {"deepspeed": {"bf16": True}})
    exp = exp.model_copy(update={"accelerator": "auto"})
    assert any("one by one" in line for line in warnings(exp, client_with(False))) == said
