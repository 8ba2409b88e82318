"""Messages about rows say where the mistake is, and never what the row holds."""

import json

from hypothesis import given
from hypothesis import strategies as st

from launch import evaluate
from tests.unit.data.test_data import GOOD
from ubsmoe_ds.base.command_line import carry_out
from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.data.sources import evaluation_rows

SECRET = "5ecret"


def secrets_and_damage():
    """A row whose every text holds a secret, with one field changed, a field that stands twice, or a part cut off."""
    row = {key: f"{value} {SECRET}" if isinstance(value, str) else value for key, value in GOOD.items()}
    row |= {"choices": [SECRET, "two"], "labels": ["a", "b"], "answer": f"b {SECRET}"}
    texts = st.sampled_from([None, 3, True, "", " ", SECRET, [], [SECRET], [SECRET, SECRET], [SECRET, 1], {SECRET: 1}])
    changed = st.builds(lambda key, value: json.dumps(row | {key: value}), st.sampled_from([*row]), texts)
    cut = st.integers(0, len(json.dumps(row))).map(lambda end: json.dumps(row)[:end])
    twice = st.just(json.dumps(row)[:-1] + f', "{SECRET}": 1, "{SECRET}": 2}}')
    surrogate = st.just(json.dumps(row | {"question": f"{SECRET} \ud800"}))
    return st.one_of(changed, cut, twice, surrogate, st.just(json.dumps([SECRET])))


@given(line=secrets_and_damage())
def test_no_message_about_a_row_quotes_it(line, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "secret.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + line)
    for form in ("instruction", "cloze"):
        try:
            evaluation_rows(f"jsonl:{path}", None, 0, form)
        except UserError as error:
            assert SECRET not in str(error) and "secret.jsonl, line 2: " in str(error)


def test_what_a_bad_row_holds_is_shown_where_it_is_asked_for(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD | {"answer": f"{SECRET}\x1b[2J"}))
    for asked in (False, True):
        command = ["--model", "builtin:tiny_olmoe", "--data", f"jsonl:{path}", *(["--show-rows"] if asked else [])]
        assert carry_out(lambda command=command: evaluate.show(evaluate.parse(command))) == 2
        shown = capsys.readouterr().err
        assert (f"it holds '{SECRET}\\x1b[2J'" in shown) == asked and "line 1: field 'answer'" in shown
    assert SECRET in shown and "\x1b" not in shown
