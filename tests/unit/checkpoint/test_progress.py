"""The best evaluation so far and the patience left, by hand."""

import pytest

from ubsmoe_ds.checkpoint.progress import Progress, SavedProgress, restored
from ubsmoe_ds.config.training import TrainConfig

LOSSES = [3.0, 2.0, 2.5, 2.0, 1.5, 1.6, 1.7, 1.8]  # of rounds 0, 1, ...


def run(train: TrainConfig, progress: Progress) -> list[int]:
    """Evaluate round after round as `Federation.run` does; return the rounds that were evaluated."""
    rounds = []
    while not progress.is_over(train):
        rounds.append(progress.round)
        progress.note_evaluation({"eval/loss_weighted": LOSSES[progress.round]})
        progress.next_round()
    return rounds


@pytest.mark.parametrize(
    ("patience", "last", "best"), [(None, 7, (4, 1.5)), (1, 2, (1, 2.0)), (2, 3, (1, 2.0)), (3, 7, (4, 1.5))]
)
def test_a_run_ends_when_its_patience_does(patience, last, best):
    """Round 3 only equals round 1, which is no improvement; after round 4 nothing is better for three rounds."""
    train, progress = TrainConfig(rounds=7, patience=patience), Progress()
    assert run(train, progress) == list(range(last + 1))
    assert (progress.best_round, progress.best_loss) == best
    assert progress.is_out_of_patience(train) == (patience is not None)


@pytest.mark.parametrize("stop", range(1, 4))
def test_patience_goes_on_where_it_was_when_a_run_is_resumed(stop):
    whole, part = Progress(), Progress()
    patient = TrainConfig(rounds=7, patience=2)
    run(patient, whole)
    run(TrainConfig(rounds=stop, patience=2), part)
    resumed = restored(SavedProgress.model_validate(part.saved()), steps_taken=0)
    run(patient, resumed)
    assert resumed.saved() == whole.saved()


def test_less_patience_ends_a_resumed_run_only_between_two_rounds():
    """Two evaluations without improvement, then resumed with patience for one: within a round it is completed."""
    progress = Progress(round=3, merged=False, best_round=0, best_loss=1.0, stale=2)
    saved = SavedProgress.model_validate(progress.saved())
    patient = TrainConfig(rounds=7, patience=1)
    assert restored(saved, 0).is_over(patient)
    within = restored(saved, 0, within=True)
    assert not within.is_over(patient)
    within.next_round()
    assert within.is_over(patient)


def test_a_loss_that_is_not_finite_is_no_improvement():
    progress = Progress()
    progress.note_evaluation({"eval/loss_weighted": float("nan")})
    assert (progress.best_round, progress.best_loss, progress.stale) == (-1, None, 1)


def test_a_checkpoint_of_an_earlier_version_has_no_best_yet():
    old = {key: value for key, value in Progress(round=2, merged=False).saved().items() if "best" not in key}
    del old["stale"], old["started_from"]
    progress = restored(SavedProgress.model_validate(old), 0)
    assert (progress.best_round, progress.best_loss, progress.stale, progress.started_from) == (-1, None, 0, {})
