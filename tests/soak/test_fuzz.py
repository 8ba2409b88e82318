"""Some cases of `tests/soak/fuzz.py` on every surface; and the fuzz itself can find something."""

import pytest

from tests.soak import fuzz
from tests.soak.fuzz_cases import Bomb, Surface, Violation, accepts, reads_only
from ubsmoe_ds.base.errors import UserError

pytestmark = pytest.mark.extended

SURFACES = fuzz.surfaces()
CASES = 30


@pytest.mark.parametrize("name", SURFACES)
def test_bad_input_is_refused_in_one_line_and_costs_nothing(name):
    tally = fuzz.run_surface(SURFACES[name], CASES, seed_number=0)
    assert not tally.kinds, "\n".join(f"{place}: {k.message}\n  {k.case}" for place, k in tally.kinds.items())
    assert tally.cases >= CASES // 2 and tally.refused


def test_the_verdict_on_answers(tmp_path):
    """An answer can be wrong in each of these ways."""

    def refuse(text):
        def call():
            error = UserError("")
            error.args = (text,)  # the class itself would make it one short line
            raise error

        return call

    assert accepts(lambda: None) and not accepts(refuse("file x: is bad"), ["x"])
    for text in ("two\nlines", "a\x1b[2J", "x" * 5000, "", "names nothing"):
        with pytest.raises(Violation):
            accepts(refuse(text), ["the file"])
    with pytest.raises(ZeroDivisionError):
        accepts(lambda: 1 / 0)
    with pytest.raises(Violation, match="files changed"):
        reads_only((tmp_path / "left").touch, tmp_path)


def test_a_pickled_bomb_would_be_seen(tmp_path):
    import pickle

    data = pickle.dumps(Bomb(tmp_path / "marker"))
    with pytest.raises(Violation, match="marker"):
        reads_only(lambda: pickle.loads(data), tmp_path)


def test_violations_are_counted_and_cases_that_hang_are_ended(monkeypatch):
    from hypothesis import strategies as st

    def check(case, folder):
        if case == 1:
            raise ValueError("defect")
        while case == 2:
            pass
        return case == 3

    monkeypatch.setattr(fuzz, "SECONDS", 1)
    tally = fuzz.run_surface(Surface("x", st.integers(1, 4), check), 50, seed_number=0)
    assert (tally.cases, tally.accepted, tally.refused) == (4, 1, 1)
    messages = sorted(kind.message for kind in tally.kinds.values())
    assert messages == ["ValueError: defect", "Violation: took more than 1 s"]
