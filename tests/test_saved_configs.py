"""config.json as transformers 5 saves it: read as the vendor's, and exported as the vendor writes it, which engines read."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import saved
from forward import final

from moesaic.checkpoint import Checkpoint
from moesaic.errors import FamilyError
from moesaic.families import family_of
from moesaic.families.rope import plain_rope
from moesaic.recipes.quantize import Quantizing, quantize
from moesaic.stream import LayerRun, State
from moesaic.stream.layer import text_config

ADDED = {"transformers_version", "dtype", "torch_dtype"}  # keys that transformers writes anew


def part_of(found: Any, wanted: Any) -> bool:
    """Whether all that `wanted` says stands in `found`, at any depth."""
    if isinstance(wanted, dict):
        return isinstance(found, dict) and all(k in ADDED or part_of(found.get(k), v) for k, v in wanted.items())
    return bool(found == wanted)


def test_a_saved_config_is_read_as_the_vendors(source: Checkpoint, tmp_path: Path) -> None:
    raw = json.loads((saved(source, tmp_path / "saved") / "config.json").read_text())
    assert not part_of(raw, source.config)  # transformers does write another
    again = Checkpoint.open(tmp_path / "saved")
    assert part_of(again.config, source.config)
    assert again.architecture == source.architecture and again.formats == source.formats


def test_the_same_hidden_states(source: Checkpoint, tmp_path: Path) -> None:
    ids = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0))
    both = []
    for model in (source, Checkpoint.open(saved(source, tmp_path / "saved"))):
        run = LayerRun(model)
        both.append(final(run, [State(run.embed(ids))])[0].hidden_BTD)
    assert torch.equal(*both)


def test_exports_say_what_engines_read(source: Checkpoint, tmp_path: Path) -> None:
    """mlx-lm asks for rope_theta by that name, and for the vendor's names of sparse attention."""
    quantize(
        saved(source, tmp_path / "saved"),
        tmp_path / "out",
        Quantizing("affine4_g64", container="mlx", rest="bf16"),
        quiet=True,
    )
    wanted = {key: value for key, value in source.config.items() if key != "quantization_config"}
    assert part_of(json.loads((tmp_path / "out" / "config.json").read_text()), wanted)


def test_a_vendors_config_stays_as_it_is(source: Checkpoint) -> None:
    raw = json.loads((source.path / "config.json").read_text())
    assert family_of(raw).released(raw) == raw == source.config


HEAD, PARTIAL = {"head_dim": 32}, {"rope_theta": 1e4, "partial_rotary_factor": 0.5}
LINEAR = {"rope_type": "linear", "factor": 2.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
ROPES = [  # stated, and the same in single keys
    ({"rope_parameters": {"rope_theta": 5e6}}, {"rope_theta": 5e6}),
    ({"rope_parameters": {"rope_theta": 10000, "rope_type": "default"}}, {"rope_theta": 10000}),
    ({"rope_parameters": {"rope_theta": 10000}, "rope_theta": 10000}, {"rope_theta": 10000}),
    ({"rope_parameters": PARTIAL} | HEAD, PARTIAL | {"rotary_dim": 16} | HEAD),
    (
        {"rope_parameters": PARTIAL, "rotary_dim": 16} | HEAD,
        PARTIAL | {"rotary_dim": 16} | HEAD,
    ),
    ({"rope_parameters": PARTIAL}, PARTIAL),
    ({"rope_parameters": {"rope_theta": 1e4} | YARN}, {"rope_theta": 1e4, "rope_scaling": YARN}),
    (
        {"rope_parameters": {"rope_theta": 1e4} | LINEAR, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
    ),
    ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "axial"}}, {"rope_theta": 1e4}),
    ({"rope_theta": 1e4, "rope_scaling": None}, {"rope_theta": 1e4, "rope_scaling": None}),
    ({"rope_parameters": None, "rope_theta": 1e4}, {"rope_parameters": None, "rope_theta": 1e4}),
]  # fmt: skip
TWO = [
    ({"rope_parameters": {"rope_theta": 1e4}, "rope_theta": 5e6}, "rope_theta = 5000000.0 and rope_p"),
    ({"rope_parameters": PARTIAL, "partial_rotary_factor": 1.0}, "= 1.0 and rope_p"),
    ({"rope_parameters": PARTIAL, "rotary_dim": 32} | HEAD, "rotary_dim = 32.*is 16"),
    ({"rotary_dim": 8, "partial_rotary_factor": 0.5} | HEAD, "rotary_dim = 8.*is 16"),
    ({"rope_parameters": {"rope_theta": 1e4} | YARN, "rope_scaling": YARN | {"factor": 8.0}}, "rope_scaling.*say the same"),
    ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}, "rope_scaling": YARN}, "rope_scaling.*say the same"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "wanted one object"),
    ({"rope_parameters": [1e4]}, "wanted one object"),
    ({"rope_parameters": 1e4}, "wanted one object"),
]  # fmt: skip


@pytest.mark.parametrize(("stated", "plain"), ROPES)
def test_rope_in_single_keys(stated: dict[str, Any], plain: dict[str, Any]) -> None:
    assert plain_rope(stated) == plain
    assert plain_rope(plain) == plain


@pytest.mark.parametrize(("stated", "match"), TWO)
def test_two_values_that_differ_are_refused(stated: dict[str, Any], match: str) -> None:
    with pytest.raises(FamilyError, match=match):
        plain_rope(stated)


@pytest.mark.parametrize(
    "scaling", [YARN, {"rope_type": "linear", "factor": 2.0}, {"rope_type": "dynamic", "factor": 2.0}]
)
def test_transformers_takes_scaling_from_single_keys(scaling: dict[str, Any], m2: Checkpoint) -> None:
    """What is exported means to transformers what the object meant."""
    theirs = {k: v for k, v in m2.config.items() if k != "rope_theta"}
    theirs["rope_parameters"] = {"rope_theta": 12345.0, "partial_rotary_factor": 0.5} | scaling
    where = m2.family.wiring.configuration
    ours, stated = (text_config(where, c, "sdpa").rope_parameters for c in (plain_rope(theirs), theirs))
    assert {k: v for k, v in ours.items() if k != "type"} == stated and ours["rope_theta"] == 12345.0


def off_schedule(t: dict[str, Any]) -> None:
    t["moe_layer_freq"] = [1 - flag for flag in (0, 1, 1)]


def another_index(t: dict[str, Any]) -> None:
    t["sparse_attention_config"] = {"sparse_index_dim": 7}


def unknown_kind(t: dict[str, Any]) -> None:
    t["layer_types"][1] = "sliding_attention"


def kinds_in_a_word(t: dict[str, Any]) -> None:
    t["mlp_layer_types"] = "sparse"


def no_index(t: dict[str, Any]) -> None:
    del t["index_block_size"]


def unhashable_kind(t: dict[str, Any]) -> None:
    t["layer_types"][0] = ["full_attention"]


@pytest.mark.parametrize(
    ("fault", "match"),
    [
        (off_schedule, "moe_layer_freq = .*say"), (another_index, "sparse_attention_config = .*say"),
        (unknown_kind, "layer_types = .*wanted full_attention or"), (kinds_in_a_word, "mlp_layer_types = 'sparse'"),
        (no_index, "no 'index_block_size'"), (unhashable_kind, "layer_types"),
    ],
)  # fmt: skip
def test_half_of_a_saved_config_is_refused(
    fault: Callable[[dict[str, Any]], None], match: str, m3: Checkpoint, tmp_path: Path
) -> None:
    config = json.loads((saved(m3, tmp_path / "saved") / "config.json").read_text())
    broken = copy.deepcopy(config)
    fault(broken["text_config"])
    (tmp_path / "saved" / "config.json").write_text(json.dumps(broken))
    with pytest.raises(FamilyError, match=match):
        Checkpoint.open(tmp_path / "saved")
