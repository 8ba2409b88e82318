"""What a rank decides before anything is imported that depends on it."""

import os

import pytest
import torch

from tests.support.ranks import REPO
from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.config.loading import load_experiment
from ubsmoe_ds.run import choose_accelerator


@pytest.fixture
def one_device(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    properties = type("Properties", (), {"uuid": "GPU-0"})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: properties)


@pytest.mark.parametrize("name", ["tiny.yaml", "compare_tiny.yaml"])
def test_what_make_demo_runs_needs_no_device_for_each_rank(name, one_device):
    exp = load_experiment(REPO / "ds_configs" / name)
    assert exp.world_size > 1 and choose_accelerator(exp.accelerator) == []
    assert os.environ["DS_ACCELERATOR"] == "cpu"


def test_auto_takes_the_devices_there_are(one_device):
    assert choose_accelerator("auto") == ["GPU-0"] and os.environ["DS_ACCELERATOR"] == "cuda"


def test_cuda_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="accelerator: cuda, but torch sees no CUDA device"):
        choose_accelerator("cuda")
