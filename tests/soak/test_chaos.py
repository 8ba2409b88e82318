"""Short versions of the soaks in chaos.py."""

import pytest

from tests.soak import chaos

pytestmark = pytest.mark.extended


def test_three_faults_leave_no_trace(tmp_path):
    assert chaos.soak(tmp_path, faults=3, seed=0).startswith("3 faults (")


@pytest.mark.skipif(not chaos.OPEN_MPI.exists(), reason="no Open MPI: see tests/cluster/test_survival.py")
def test_the_ranks_left_after_two_kills_end_by_themselves(tmp_path):
    assert chaos.soak_shrinking(tmp_path, kills=2, seed=1).endswith("the remaining ranks ended every one")


def test_a_difference_would_be_found(tmp_path):
    """The comparison notices other rounds; a checkpoint within a round does not count that round as saved."""
    for name, text in (("whole", '{"round": 0, "metrics": {}}\n'), ("broken", '{"round": 0, "metrics": {"x": 1}}\n')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(text)
    with pytest.raises(chaos.Failure, match="rounds \\[0\\]"):
        chaos.compare(tmp_path / "whole", tmp_path / "broken")
    lines = "".join(f'{{"round": {number}, "metrics": {{}}}}\n' for number in range(chaos.ROUNDS + 1))
    for name in ("whole", "broken"):
        (tmp_path / name / "metrics.jsonl").write_text(lines)
    (tmp_path / "whole" / "clients.jsonl").write_text('{"round": 1, "client": "c0", "metrics": {}}\n')
    with pytest.raises(chaos.Failure, match="other figures of clients"):
        chaos.compare(tmp_path / "whole", tmp_path / "broken")
    for name in ("000001-round-3", "000002-within-round-5"):
        (tmp_path / "run" / "checkpoints" / name).mkdir(parents=True)
        assert chaos.last_saved(tmp_path / "run") == {"000001-round-3": 3, "000002-within-round-5": 4}[name]
