"""Which checkpoints are sound: their state was evaluated, and its loss was finite."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ubsmoe_ds.checkpoint import storage
from ubsmoe_ds.checkpoint.progress import Progress, SavedProgress
from ubsmoe_ds.checkpoint.search import _content, newest_sound
from ubsmoe_ds.checkpoint.storage import Damaged


@pytest.mark.parametrize(
    ("progress", "sound"),
    [
        (Progress(), False),  # before the evaluation of round 0
        (Progress(round=1, merged=False, sound_round=0), True),
        (Progress(round=3, merged=False, sound_round=2), True),
        (Progress(round=3, merged=False, sound_round=1), False),  # round 2 was not evaluated
        (Progress(round=3, merged=True, sound_round=2), False),  # merged, and its evaluation is still to come
    ],
)
def test_a_state_is_sound_if_it_was_evaluated(progress, sound):
    assert SavedProgress.model_validate(progress.saved()).is_sound == sound


def test_the_newest_sound_checkpoint_is_found(tmp_path):
    """Of four checkpoints, after rounds 1 to 4, rounds 2 and 3 were evaluated; a damaged one is passed over."""
    assert newest_sound(tmp_path) is None
    folders = []
    for number, sound_round in enumerate([0, 2, 3, 3], start=1):
        storage.begin(tmp_path, number)
        progress = Progress(round=number + 1, merged=False, sound_round=sound_round).saved()
        content = {"progress": progress, "clients": {}, "config": {}, "data": ""}
        folders.append(storage.commit(tmp_path, number, f"round-{number}", {}, content))
    assert newest_sound(tmp_path) == folders[2]
    (folders[2] / storage.MANIFEST).write_text("damaged")
    assert newest_sound(tmp_path) == folders[1]


@given(layout=st.lists(st.one_of(st.integers(0, 5), st.just(10_000_000)), max_size=3))
def test_a_layout_that_no_run_of_so_many_files_had_is_damage(layout):
    """Ranks and expert parallelism, of a run that wrote 4 files: restoring would loop over the ranks that it names."""
    client = {"layout": layout, "lora_rank": 1, "steps_taken": 0, "steps": 0, "bad_steps": 0}
    files = {storage.rank_file(rank): {} for rank in range(4)}
    manifest = {"progress": Progress().saved(), "clients": {"a": client}, "config": {}, "data": "", "files": files}
    if layout in ([1, 1], [2, 1], [2, 2], [3, 1], [3, 3], [4, 1], [4, 2], [4, 4]):
        assert _content(manifest).clients["a"].layout == layout
    else:
        with pytest.raises(Damaged):
            _content(manifest)
