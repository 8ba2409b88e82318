"""Which checkpoints are sound: their state was evaluated, and its loss was finite."""

import pytest

from ubsmoe_ds.checkpoint import storage
from ubsmoe_ds.checkpoint.progress import Progress, SavedProgress
from ubsmoe_ds.checkpoint.search import newest_sound


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
