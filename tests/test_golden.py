"""The schema of every kind of artifact, held to a file in tests/golden: a change that nobody meant fails here.

Recorded are the fields of what a few commands write on tiny models, with the type of each; names that follow from the
model (units, layers, tensors) are one "*". A meant change: remove the kind's file, run this test, which writes it anew
and fails once, and give the kind another name or say in docs/LOG.md what becomes of files that users have.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from safetensors.torch import save_file

import moesaic
from moesaic import artifact
from moesaic.cli import main

GOLDEN = Path(__file__).parent / "golden"
NAME = re.compile(r"[a-z][a-z_0-9]*")
TEXT = ("--tokens", 128, "--length", 32)

Shape = Any  # JSON: a type's word, a list of one shape, or fields


def shape(value: Any) -> Shape:
    """What kind of thing a value is, without which one it is."""
    if isinstance(value, dict):
        fields = {str(key): shape(one) for key, one in value.items()}
        if all(NAME.fullmatch(key) for key in fields):
            return dict(sorted(fields.items()))
        return {"*": merged(fields.values())}
    if isinstance(value, list | tuple):
        return [merged(map(shape, value))]
    if value is None or isinstance(value, bool):
        return "null" if value is None else "truth"
    return "number" if isinstance(value, int | float | np.number) else "text"


def merged(shapes: Any) -> Shape:
    """The shape of things that stand for each other: fields of any of them; null is anything that is missing."""
    found: Shape = "null"
    for one in shapes:
        if isinstance(found, dict) and isinstance(one, dict):
            keys = sorted({*found, *one})
            found = {k: merged(x[k] for x in (found, one) if k in x) for k in keys}
        elif isinstance(found, list) and isinstance(one, list):
            found = [merged((*found, *one))]
        elif found == "null":
            found = one
    return found


def differences(wanted: Shape, found: Shape, at: str = "") -> list[str]:
    """Where two shapes differ, in words; null goes with anything."""
    if "null" in (wanted, found) or wanted == found:
        return []
    if isinstance(wanted, dict) and isinstance(found, dict):
        return [
            line
            for key in sorted({*wanted, *found})
            for line in (
                differences(wanted[key], found[key], f"{at}.{key}")
                if key in wanted and key in found
                else [f"{at}.{key} is {'new' if key in found else 'gone'}"]
            )
        ]
    if isinstance(wanted, list) and isinstance(found, list):
        return differences(wanted[0], found[0], f"{at}[]")
    return [f"{at} was {json.dumps(wanted)} and is {json.dumps(found)}"]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Shape]:
    """Kind -> the shape of all its files that the commands below wrote."""
    folder, found, dumps = tmp_path_factory.mktemp("golden"), {}, artifact.dumps

    def record(body: dict[str, Any], tensors: dict[str, Any]) -> None:
        dtypes = {name: str(t.dtype).removeprefix("torch.") for name, t in tensors.items()}
        one = {**shape(body), "inputs": dict.fromkeys(sorted(body["inputs"]), "text")}
        one |= (
            {"tensors": {name if NAME.fullmatch(name) else "*": dtype for name, dtype in dtypes.items()}}
            if tensors
            else {}
        )
        found[body["kind"]] = merged((found.get(body["kind"], "null"), one))

    def dumped(value: Any, **options: Any) -> str:
        if isinstance(value, dict) and "kind" in value and "indent" in options:
            record(value, {})
        return dumps(value, **options)

    def saved(tensors: dict[str, Any], path: Path, metadata: dict[str, str]) -> None:
        record(artifact.loads(metadata["moesaic"]), tensors)
        save_file(tensors, path, metadata=metadata)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(artifact, "dumps", dumped)
        patch.setattr(artifact, "save_file", saved)
        commands(folder)
    return found


def commands(folder: Path) -> None:
    m2 = tiny.make(folder / "m2", "minimax_m2", layers=1, experts=4)
    m3 = tiny.make(folder / "m3", "minimax_m3_vl", layers=1, experts=4)
    data, rng = folder / "data", np.random.default_rng(0)
    data.mkdir()
    for name in ("sums", "products"):
        lines = (f"{a} and {b} make {a + b}, said {c}" for a, b, c in rng.integers(0, 10**6, (600, 3)))
        (data / f"{name}.txt").write_text("\n".join(lines))
    text = (*TEXT, "--data", data)

    def call(*words: Any) -> None:
        assert main([*map(str, words), "--quiet"]) == 0, words

    judged = ("--evaluation-tokens", 128)
    call("compress", m2, folder / "run", "--bits", 6, "--harm", "anchored", "--rounding", "gptq", "--experts", 3,
         "--formats", "source,int4_g32,int2_g32", *judged, *text)  # fmt: skip
    call("compress", m2, folder / "a4", "--format", "nvfp4_a4", *judged, *text)
    call("prune", m3, folder / "pruned", "--experts", 3, "--repair", "--until-stable", "--criterion", "auto", *text)
    call("quantize", m2, folder / "quantized", "--format", "int4_g32", *text)
    call("export", m2, folder / "other", "--to", "compressed_tensors")
    scored = ("--out", folder / "scores", "--cache", folder / "cache")
    call("evaluate", folder / "quantized", "--against", m2, *scored, *text)


def kinds() -> set[str]:
    """Kinds that the code names."""
    found = set()
    for file in Path(moesaic.__file__).parent.rglob("*.py"):
        code = file.read_text()
        found |= set(re.findall(r'write_(?:json|tensors)\(\s*[^\n]*?, "([a-z_-]+)",', code))
        found |= set(re.findall(r'^(?:KIND|KNOWN)(?:, \w+)* = "([a-z_-]+)"', code, re.MULTILINE))
    return found


def test_every_schema_is_the_golden_one(recorded):
    wrong = []
    for kind, found in sorted(recorded.items()):
        file = GOLDEN / f"{kind}.json"
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps(found, indent=1) + "\n")
            wrong.append(f"{file} was missing and is written; look at it and keep it")
        wrong += [f"{kind}{line}" for line in differences(json.loads(file.read_text()), found)]
    assert not wrong, "\n".join(wrong)


def test_every_kind_has_its_golden_file(recorded):
    golden = {file.stem for file in GOLDEN.glob("*.json")}
    assert kinds() - {"loops"} <= set(recorded) == golden, "loops takes too long to write"


def test_a_planted_change_is_seen():
    wanted = json.loads((GOLDEN / "plan.json").read_text())
    found = json.loads((GOLDEN / "plan.json").read_text())
    assert differences(wanted, found) == []
    found["kept"] = {"*": "number"}
    assert differences(wanted, found) == ['.kept.* was ["number"] and is "number"']
    del found["kept"]
    found["keeps"] = {}
    assert differences(wanted, found) == [".keeps is new", ".kept is gone"]
