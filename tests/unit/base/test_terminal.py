"""Control characters never reach a terminal."""

import logging
import sys
import warnings

import pandas as pd
from hypothesis import given
from hypothesis import strategies as st

from launch import evaluate
from ubsmoe_ds.base.terminal import guard_libraries, lines_of, printable, say


@given(text=st.text())
def test_what_is_printed_is_printable_and_text_stays_as_it_is(text):
    shown = printable(text)
    assert shown.isprintable() and (shown == text) == text.isprintable()
    assert lines_of(text).split("\n") == [printable(line) for line in text.split("\n")]


def test_lines_of_both_streams_are_escaped(capsys):
    say("a\x1b[2Jé\nb\rc\x9b\u202e")
    say("\x07", error=True)
    assert capsys.readouterr() == ("a\\x1b[2Jé\nb\\rc\\x9b\\u202e\n", "\\x07\n")


def test_what_libraries_log_and_warn_of_is_escaped(capsys, monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    before = logging.getLogRecordFactory()
    try:
        guard_libraries()
        guard_libraries()
        handler = logging.StreamHandler(sys.stderr)
        logger = logging.getLogger("a library")
        logger.addHandler(handler)
        logger.warning("model type %s\n%d", "\x1b]0;title\x07", 3)
        assert capsys.readouterr().err == "model type \\x1b]0;title\\x07\n3\n"
        assert "\\x1b" in warnings.formatwarning(UserWarning("\x1b"), UserWarning, "file", 1)
    finally:
        logging.setLogRecordFactory(before)
        logger.removeHandler(handler)


def test_names_of_tasks_are_escaped_in_the_table_of_evaluate(monkeypatch, capsys):
    table = pd.DataFrame([{"k": 1, "task": "t\x1b[31m", "loss": 0.5}])
    monkeypatch.setattr(evaluate, "evaluate", lambda options: table)
    evaluate.show(evaluate.parse(["--model", "m", "--data", "synthetic"]))
    assert "t\\x1b[31m" in capsys.readouterr().out
