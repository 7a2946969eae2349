"""Artifacts: whole or not there, of one kind, made from these inputs. What is checked against: plain files and signals."""

import errno
import json
import math
import os
import signal
import stat
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from children import child
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from moesaic.artifact import (
    atomic,
    dumps,
    identity,
    loads,
    read_json,
    read_tensors,
    sweep_partials,
    write_json,
    write_tensors,
    writing,
)
from moesaic.cli import COMMANDS, main
from moesaic.errors import FileError, InputError, PlanError, StaleError
from moesaic.measure import Price, Prices
from moesaic.plan import Plan

MADE_FROM = {"source": "abc"}


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_json_and_tensors_come_back(tmp_path):
    write_json(tmp_path / "a.json", "note", {"x": [1, "é"]}, MADE_FROM)
    assert read_json(tmp_path / "a.json", "note", MADE_FROM)["x"] == [1, "é"]
    t = {"w": torch.arange(6).reshape(2, 3).t(), "b": torch.tensor([1.5])}
    write_tensors(tmp_path / "a.safetensors", "note", t, MADE_FROM, {"y": 2})
    found, body = read_tensors(tmp_path / "a.safetensors", "note", MADE_FROM)
    assert body["y"] == 2 and torch.equal(found["w"], t["w"]) and torch.equal(found["b"], t["b"])
    assert names(tmp_path) == ["a.json", "a.safetensors"]


def strictly(text: str) -> object:
    """JSON as other readers take it: by the standard, which has no infinity and no NaN."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_numbers_that_json_does_not_have_are_spelled_and_come_back(tmp_path):
    body = {"nats": [1.5, float("inf"), -float("inf")], "of": {"error": float("nan"), "float": "inf"}, "n": (2, None)}
    write_json(tmp_path / "a.json", "note", body, {})
    write_tensors(tmp_path / "a.safetensors", "note", {"w": torch.ones(1)}, {}, body)
    told = strictly((tmp_path / "a.json").read_text())
    assert told["nats"] == [1.5, {"float": "inf"}, {"float": "-inf"}] and told["of"]["error"] == {"float": "nan"}
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert strictly(file.metadata()["moesaic"])["nats"] == told["nats"]
    for found in (read_json(tmp_path / "a.json", "note"), read_tensors(tmp_path / "a.safetensors", "note")[1]):
        assert found["nats"] == body["nats"] and found["n"] == [2, None] and found["of"]["float"] == "inf"
        assert math.isnan(found["of"]["error"])


@given(st.recursive(st.none() | st.floats() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)))
def test_any_numbers_come_back(value):
    strictly(dumps(value))
    assert repr(loads(dumps(value))) == repr(value)


def test_infinite_prices_come_back(tmp_path):
    """What a format costs that gives values which are not finite; and an error that one row cannot tell."""
    rounded = {"layers.0.experts": {"int2_g32": Price(math.inf, math.nan), "mxfp4": Price(0.25, 0.5)}}
    Prices(rounded, {0: {}}, np.zeros((1, 4), np.int64), tokens=8).save(tmp_path / "costs.json", {})
    strictly((tmp_path / "costs.json").read_text())
    price = Prices.load(tmp_path / "costs.json").rounded["layers.0.experts"]["int2_g32"]
    assert math.isinf(price.nats) and math.isnan(price.error)


def test_what_the_command_line_prints_is_json(monkeypatch, capsys):
    facts = {"best": math.inf, "where": Path("x")}
    monkeypatch.setitem(COMMANDS, "demo", replace(COMMANDS["demo"], run=lambda a: facts))
    assert main(["demo", "run", "--json"]) == 0
    assert strictly(capsys.readouterr().out.splitlines()[-1]) == {"best": {"float": "inf"}, "where": "x"}


def test_same_content_same_bytes(tmp_path):
    t = {"b": torch.ones(3), "a": torch.zeros(2, dtype=torch.int32)}
    for name in ("one", "two"):
        write_json(tmp_path / f"{name}.json", "note", {"x": 1}, MADE_FROM)
        write_tensors(tmp_path / f"{name}.safetensors", "note", t, MADE_FROM)
    for suffix in ("json", "safetensors"):
        assert (tmp_path / f"one.{suffix}").read_bytes() == (tmp_path / f"two.{suffix}").read_bytes()


def test_new_files_have_the_users_usual_mode(tmp_path):
    (tmp_path / "plain").touch()
    write_tensors(tmp_path / "a.safetensors", "note", {"w": torch.ones(1)}, {})
    assert stat.filemode((tmp_path / "a.safetensors").stat().st_mode) == stat.filemode(
        (tmp_path / "plain").stat().st_mode
    )


def test_other_inputs_are_stale_and_name_both(tmp_path):
    write_json(tmp_path / "a.json", "note", {}, MADE_FROM)
    with pytest.raises(StaleError, match=r"a\.json was made from source abc, and this is xyz"):
        read_json(tmp_path / "a.json", "note", {"source": "xyz"})
    with pytest.raises(StaleError, match="made from tokens None"):
        read_json(tmp_path / "a.json", "note", {"tokens": "xyz"})


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b"null",
        b"\xff\xfe",
        b'{"kind": "note"}',
        b'{"kind": "note", "inputs": 3}',
        b"[" * 100_000,
    ],
)
def test_what_is_no_artifact_is_one_sentence(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.json"):
        read_json(tmp_path / "a.json", "note", MADE_FROM)
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.safetensors"):
        read_tensors(tmp_path / "a.safetensors", "note", MADE_FROM)


def test_another_kind_or_schema_is_refused(tmp_path):
    write_json(tmp_path / "a.json", "plan", {}, {})
    with pytest.raises(InputError, match="is a 'plan' file of schema 1, wanted 'note' of 1"):
        read_json(tmp_path / "a.json", "note")
    body = json.loads((tmp_path / "a.json").read_text()) | {"schema": 2}
    (tmp_path / "a.json").write_text(json.dumps(body))
    with pytest.raises(InputError, match="schema 2, wanted 'plan' of 1"):
        read_json(tmp_path / "a.json", "plan")


def test_a_failed_writer_leaves_the_old_file_and_nothing_else(tmp_path):
    write_json(tmp_path / "a.json", "note", {"x": 1}, {})
    with pytest.raises(KeyboardInterrupt), atomic(tmp_path / "a.json") as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert read_json(tmp_path / "a.json", "note")["x"] == 1 and names(tmp_path) == ["a.json"]


def test_a_killed_writer_leaves_the_old_file_and_a_leftover_that_is_swept(tmp_path):
    file = tmp_path / "sub" / "a.json"
    write_json(file, "note", {"x": 1}, {})

    def killed() -> None:
        with atomic(file) as partial:
            partial.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    assert child(killed) == -signal.SIGKILL
    assert read_json(file, "note")["x"] == 1
    assert len(names(tmp_path / "sub")) == 2, "the kill came too late to leave anything"
    sweep_partials(tmp_path)
    assert names(tmp_path / "sub") == ["a.json"]


def test_a_full_disk_is_one_sentence(tmp_path):
    with (
        pytest.raises(InputError, match="the disk is full; make room, then run the same command again to continue"),
        writing(tmp_path / "a"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if Path("/dev/full").exists():  # a device that is always full
        with (
            pytest.raises(InputError, match="the disk is full"),
            writing(tmp_path / "a"),
            open("/dev/full", "wb", 0) as f,
        ):
            f.write(b"x")


def test_a_source_that_cannot_be_read_is_not_blamed_on_what_is_written(tmp_path):
    """By its name where the system tells it, and by the sentence of who reads otherwise."""
    (tmp_path / "out").mkdir()
    target = tmp_path / "out" / "a.json"
    with pytest.raises(InputError, match=rf"^{tmp_path}/source cannot be read: No such file"), atomic(target):
        (tmp_path / "source").read_bytes()
    with pytest.raises(FileError, match="source is a FIFO"), atomic(target):
        raise FileError("source is a FIFO; fetch it again")
    with pytest.raises(InputError, match=rf"^{target} cannot be written: No such"), writing(target):
        (tmp_path / "out" / "missing" / "x").touch()
    assert names(tmp_path / "out") == []


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot be written: .*; make it writable"):
        write_json(tmp_path / "file" / "a.json", "note", {}, {})


@given(st.dictionaries(st.text(), st.integers() | st.text(), max_size=5))
def test_identity_is_of_facts_not_of_their_order(facts):
    backwards = dict(reversed(facts.items()))
    assert identity(facts) == identity(backwards) and len(identity(facts)) == 16
    assert identity(facts) != identity({**facts, "one more": 1})


# Plans ------------------------------------------------------------------------------------------------------------


def test_a_plan_comes_back(tmp_path):
    plan = Plan("mxfp8", {3: (0, 2), 5: (1, 4)}, {"layers.3.experts": "mxfp4"}, "rtn")
    plan.save(tmp_path / "plan.json", MADE_FROM)
    assert Plan.load(tmp_path / "plan.json", MADE_FROM) == plan and plan.experts(8) == 2 and Plan("fp8").experts(8) == 8


@pytest.mark.parametrize("ids", [(2, 1), (1, 1), (0.0, 1.0), ("0", "1")])
def test_ids_are_distinct_ascending_numbers(ids):
    with pytest.raises(PlanError, match="distinct ids in ascending order"):
        Plan("fp8", {0: ids})


def test_layers_keep_one_count():
    with pytest.raises(PlanError, match=r"\[1, 2\] experts"):
        Plan("fp8", {0: (1,), 1: (1, 2)})


@pytest.mark.parametrize("key", ["kept", "formats", "container", "rounding"])
@pytest.mark.parametrize("damage", [None, "gone"])
def test_a_damaged_plan_is_one_sentence(tmp_path, key, damage):
    Plan("fp8", {0: (1,)}).save(tmp_path / "plan.json", {})
    body = json.loads((tmp_path / "plan.json").read_text())
    body.pop(key) if damage == "gone" else body.update({key: damage})
    (tmp_path / "plan.json").write_text(json.dumps(body))
    with pytest.raises(PlanError, match="make it again"):
        Plan.load(tmp_path / "plan.json")
