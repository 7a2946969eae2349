"""Machines as people write them: by card, by size, or not at all."""

import contextlib
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.errors import InputError
from moesaic.fit import CARDS, Machine

GIB = 2**30


@pytest.mark.parametrize(
    ("text", "name", "count", "device_bytes", "nodes"),
    [
        ("2x95GiB", "2 × 95 GiB", 2, 95 * GIB, 1),
        ("4xH100 NVL", "4 × H100 NVL", 4, 93 * GIB, 1),
        ("4xh100nvl", "4 × H100 NVL", 4, 93 * GIB, 1),
        (" 16 × h-200 ", "16 × H200", 16, round(139.8 * GIB), 2),
        ("12xA100", "12 × A100", 12, round(79.14 * GIB), 2),
        ("9xA100 40GB", "9 × A100 40GB", 9, round(39.39 * GIB), 3),
        ("2 x DGX Spark", "2 × DGX Spark", 2, round(121.69 * GIB), 2),
        ("Mac Studio 512 GB", "1 × Mac Studio 512 GB", 1, 384 * GIB, 1),
        ("80GB", "1 × 80 GB", 1, 80 * 10**9, 1),
        ("500MB", "1 × 500 MB", 1, 500 * 10**6, 1),
        ("8x1.5tib", "8 × 1.5 tib", 8, 3 * 2**39, 1),
    ],
)
def test_machines(text, name, count, device_bytes, nodes):
    machine = Machine.parse(text)
    assert (machine.name, machine.count, machine.card.bytes, machine.nodes) == (name, count, device_bytes, nodes)
    assert machine.nodes * machine.per_node == count


@pytest.mark.parametrize(
    ("text", "claimed"), [("2x95GiB@0.97", 0.97), ("DGX Spark @ .9", 0.9), ("h100@1", 1.0), ("h100", 0.92)]
)
def test_what_an_engine_claims(text, claimed):
    machine = Machine.parse(text)
    assert machine.requested_bytes == int(machine.card.bytes * claimed)


@pytest.mark.parametrize(
    "text",
    [
        "h100@",
        "h100@1.1",
        "h100@0.9@0.9",
        "@0.9",
        "",
        "x",
        "0xH100",
        "2x",
        "2xH1000",
        "-1xH100",
        "2x0GiB",
        "95",
        "5000xH100",
        "GiB",
    ],
)
def test_no_machines(text):
    with pytest.raises(InputError):
        Machine.parse(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("8xH1000", "did you mean H100, H200, H100 NVL? A size"),
        ("2xSpark", "did you mean DGX Spark? A size"),
        ("RTX5O90", "did you mean RTX 5090, RTX 4090? A size"),
        ("Mac Studio 500 GB", "did you mean Mac Studio 512 GB, "),
        ("4xMI300X", f"there are {', '.join(card.name for card in CARDS)}. A size will do too: 2x95GiB"),
        ("", "there are A100, "),
    ],
)
def test_a_device_that_is_not_known_gets_the_nearest(text, said):
    with pytest.raises(InputError, match=re.escape(f"{text!r} names no device; {said}")):
        Machine.parse(text)


def test_every_card_parses_by_its_own_name():
    for card in CARDS:
        assert Machine.parse(f"2x{card.name}").card is card


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=20))
def test_any_text_is_a_machine_or_an_input_error(text):
    with contextlib.suppress(InputError):
        assert Machine.parse(text).requested_bytes > 0
