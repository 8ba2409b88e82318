"""What passes between host and device: units and batches, in pinned copies, one for all units."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tests.support import reference, tiny
from ubsmoe_ds.aggregation.units import UnitStore
from ubsmoe_ds.data.batches import Example, collate


@pytest.fixture(params=[True, False], ids=["own masters", "others"])
def store(device, tmp_path, request):
    """Return the units of a tiny model on the device."""
    exp = tiny.experiment(tiny.save_model(tmp_path / "olmoe"), [{"budget": 0.5}])
    return UnitStore(reference.whole_model(exp).to(device), reference.Masters(request.param), lora_rank=3)


def copies(work) -> list[str]:
    """Return the names of the copies between host and device that this does."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        work()
        torch.cuda.synchronize()
    return [event.name for event in seen.events() if "Memcpy" in event.name and "DtoD" not in event.name]


def test_units_come_and_go_to_the_bit_in_one_pinned_copy(store):
    change = torch.randn(len(store.shared), generator=torch.Generator().manual_seed(0))
    before = store.shared.clone()
    written = copies(lambda: store.apply(change, 3, 3, round_number=1))
    assert len(written) == 1 and "HtoD" in written[0] and "Pinned" in written[0], written
    assert torch.equal(store.shared, before + change)
    read = copies(lambda: store.updates(3))
    assert len(read) == 1 and "DtoH" in read[0] and "Pinned" in read[0], read
    assert not store.updates(3).any()  # what was loaded is what is there


def test_a_lower_lora_rank_is_loaded_with_zeros_behind_it(store):
    store.begin_turn(2, 3, 2 / 3, round_number=1)
    for block in store.blocks:
        if block.base is not None:
            A, B = block.parameters.values()
            assert A[..., :2, :].any() and not A[..., 2:, :].any() and not B[..., 2:].any()


def test_a_batch_is_copied_from_pinned_memory(device):
    batch = collate([Example([2, 3, 4], [5, 6]), Example([7], [8, 9])], 0)
    batch.to(device)  # the first pins memory
    moved = copies(lambda: batch.to(device))
    assert len(moved) == 4 and all("Pinned" in name for name in moved), moved
    for here, there in zip(batch, batch.to(device), strict=True):
        assert here is there is None or torch.equal(here, there.cpu())
