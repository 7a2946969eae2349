"""Numbers on the command line: what is none, or beyond what it may be, is refused in one sentence before anything runs."""

import argparse
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.cli import COMMANDS, main, parser
from moesaic.cli.base.values import bytes_of, shares_of

NUMBERS = {  # option -> a command up to it, what is refused
    "--fit": ("compress m r", ("infGB", "nanGB", "-3GB", "0GB", "GB", "90", "9.5", "1e400GB", "ninety", "")),
    "--memory": ("compress m r", ("infGB", "16", "-16GB", "0B")),
    "--cache": ("serve e", ("infGB", "16", "-1GiB")),
    "--bits": ("compress m r", ("nan", "inf", "-4", "0", "four", "")),
    "--hours": ("measure m r", ("nan", "inf", "-2", "0", "two")),
    "--seed": ("evaluate e", ("-3", "1.5", "nan", "4294967296")),
    "--expert-memory": ("serve e", ("infGB", "16", "-1GiB")),
    "--port": ("serve e", ("99999", "0", "-1", "http", "8000.5")),
    "--experts": ("prune m o", ("0", "-64", "64,-1", "64,", "half", "nan")),
    "--tokens": ("calibrate m r", ("0", "-1", "1e5", "inf")),
    "--length": ("calibrate m r", ("0", "-1")),
    "--threads": ("demo", ("0", "-1", "nan")),
    "--context": ("fit m --devices 2x95GiB", ("0", "-1", "32k")),
    "--concurrency": ("fit m --devices 2x95GiB", ("0", "-1")),
    "--tensor-parallel": ("export m", ("0", "-2")),
    "--window": ("evaluate e", ("0", "-1")),
    "--stride": ("evaluate e", ("0", "-1")),
    "--lengths": ("evaluate e", ("0", "1024,-1")),
    "--limit": ("evaluate e", ("0", "-1")),
    "--evaluation-tokens": ("compress m r", ("0", "-1")),
    "--max-tokens": ("serve e", ("0", "-1")),
    "--domains": ("prune m o --experts 4", ("code=nan", "code=-1", "code=inf", "code=0", "=", ",")),
}


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        main(words)
    err = capsys.readouterr().err
    assert end.value.code == 2 and "Traceback" not in err
    return err.splitlines()[-1]


@pytest.mark.parametrize(("option", "text"), [(o, t) for o, (_, texts) in NUMBERS.items() for t in texts])
def test_what_is_no_such_number_is_refused(option, text, capsys):
    said = refused([*NUMBERS[option][0].split(), f"{option}={text}"], capsys)
    assert option in said and (repr(text) in said or any(repr(part) in said for part in text.split(",")))


def test_no_numeric_option_is_left_out():
    """Each option whose type makes a number of a text has its cases above."""
    there = set()
    for action in parser()._subparsers._group_actions[0].choices.values():  # type: ignore[union-attr]
        for option in action._actions:
            if option.type is not None and option.help != argparse.SUPPRESS and option.option_strings:
                try:
                    made = option.type("1GB" if option.type is bytes_of else "1")
                except argparse.ArgumentTypeError:
                    continue
                if isinstance(made, (int, float)) or (isinstance(made, list) and isinstance(made[0], int)):
                    there.add(option.option_strings[0])
    assert there <= NUMBERS.keys() and len(there) > 15


def test_a_size_without_a_unit_asks_for_one(capsys):
    said = refused(["compress", "m", "r", "--fit", "ninety"], capsys)
    assert said.endswith("argument --fit: 'ninety' is not a size; write 90GB or 89GiB")
    said = refused(["compress", "m", "r", "--fit", "90"], capsys)
    assert said.endswith("argument --fit: '90' has no unit; write 90GB, 90GiB or 90B")


@given(st.text(max_size=12) | st.from_regex(r"-?[0-9_.]{0,6} ?[KMGTkmgt]?i?[Bb]?", fullmatch=True))
@settings(max_examples=300, deadline=None)
def test_a_size_is_bytes_or_a_sentence(text):
    try:
        found = bytes_of(text)
    except argparse.ArgumentTypeError as error:
        assert repr(text) in str(error)
    else:
        assert isinstance(found, int) and 1 <= found < math.inf


@given(st.dictionaries(st.from_regex(r"[a-z]{1,5}", fullmatch=True), st.floats(allow_nan=True), min_size=1, max_size=3))
@settings(max_examples=200, deadline=None)
def test_shares_are_above_zero_or_refused(shares):
    text = ",".join(f"{name}={share}" for name, share in shares.items())
    if all(0 < share < math.inf for share in shares.values()):
        assert shares_of(text) == shares
    else:
        with pytest.raises(argparse.ArgumentTypeError):
            shares_of(text)


@pytest.mark.parametrize(("word", "near"), [("comprss", "compress"), ("quantise", "quantize"), ("evalute", "evaluate")])
def test_a_mistyped_command_gets_the_nearest(word, near, capsys):
    assert refused([word, "m"], capsys).endswith(f"unknown command {word!r}; did you mean {near}?")


def test_another_word_gets_the_list(capsys):
    assert refused(["xyzzy"], capsys).endswith(f"unknown command 'xyzzy'; choose from {', '.join(COMMANDS)}")


def test_evaluate_judges(capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "tokens for evaluation" in text and "tokens for calibration" not in text
