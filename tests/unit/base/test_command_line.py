"""Mistakes in options are one line and exit code 2."""

import argparse
import subprocess
import sys

import pytest

from ubsmoe_ds.base.command_line import Parser, carry_out, positive, whole
from ubsmoe_ds.base.errors import UserError


@pytest.mark.parametrize("text", ["2", "007", "10"])
def test_whole_numbers_within_bounds_are_read(text):
    assert whole(2, 10)(text) == int(text)


@pytest.mark.parametrize("text", ["1", "11", "2.0", "", "-", "٣", "+5", "1e1", " 3", "9" * 25])
def test_anything_else_is_no_whole_number(text):
    with pytest.raises(argparse.ArgumentTypeError):
        whole(2, 10)(text)


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "x", ""])
def test_only_finite_numbers_above_zero_are_positive(text):
    assert positive("1e-3") == 0.001
    with pytest.raises(argparse.ArgumentTypeError, match="must be a number above 0"):
        positive(text)


def test_a_mistake_in_an_option_is_one_line_and_exit_code_2(capsys):
    parser = Parser()
    parser.add_argument("--rounds", type=whole(1))
    assert carry_out(lambda: print(parser.parse_args(["--rounds", "3"]).rounds)) == 0
    assert carry_out(lambda: print(parser.parse_args(["--rounds", "0"]))) == 2
    out, err = capsys.readouterr()
    assert out == "3\n" and err == "error: argument --rounds: 0 must be 1 to 2147483647; see --help\n"


def test_a_commands_own_code_and_an_interruption_are_passed_on(capsys):
    def interrupted() -> None:
        raise KeyboardInterrupt

    assert carry_out(lambda: 7) == 7
    assert carry_out(interrupted) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_reader_that_leaves_ends_the_command_in_silence(lines):
    """As `evaluate.py | head` does; with few lines the writing fails only at the end."""
    program = (
        "import sys, time; from ubsmoe_ds.base.command_line import carry_out\n"
        f"sys.exit(carry_out(lambda: (sys.stdin.read(), print('line\\n' * {lines})) and None))"
    )
    command = [sys.executable, "-c", program]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    _, error = process.communicate("go on")
    assert (process.returncode, error) == (141, "")


def test_another_broken_connection_is_not_hidden(capfd):
    def broken() -> None:
        raise BrokenPipeError("of a socket")

    with pytest.raises(BrokenPipeError, match="of a socket"):
        carry_out(broken)


def test_a_defect_is_not_hidden():
    def broken() -> None:
        raise KeyError("defect")

    with pytest.raises(KeyError):
        carry_out(broken)
    with pytest.raises(UserError):
        Parser().parse_args(["--nonsense"])
