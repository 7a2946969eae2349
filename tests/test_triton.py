"""The card's kernels equal the reference to the bit: on a card where there is one, else in Triton's interpreter."""

import itertools
import os
import re
import subprocess
import sys

import pytest
import torch
from requantized import assert_equal_to_reference, awkward, real_like, same_bits, stored_as

from moesaic import kernels
from moesaic.checkpoint.containers import siblings
from moesaic.errors import PlanError
from moesaic.export import through_kernels
from moesaic.formats import FORMATS
from moesaic.formats.base import no_candidates
from moesaic.kernels import cpu
from moesaic.plan import Plan
from moesaic.plan.blueprint import Blueprint
from moesaic.recipes.quantize import formats_of

pytest.importorskip("triton", reason="Triton is for Linux alone")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # NumPy warns of what F32 is meant to do
CARD = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TARGETS = (
    "bf16",
    "fp8_channel",
    "mxfp8",
    "mxfp4",
    "nvfp4",
    "int2_g32",
    "int3_g32",
    "int4_g32",
    "int8_g32",
    "int8_channel",
)
MATRICES = {"ragged": real_like(4, 232, seed=2), "narrow": awkward(5, 40, seed=3)}
every_source = pytest.mark.parametrize("source", kernels.SOURCES)
every_target = pytest.mark.parametrize("target", [*TARGETS, "fp8_block"])


class Card:
    """`kernels.cuda`, given and giving tensors of the CPU."""

    twin = kernels.of(torch.device("cuda"))

    @classmethod
    def requantize(cls, source, weight, scales, target, *, shared=None, **options):
        scales = None if scales is None else scales.to(CARD)
        moved = None if shared is None else shared.to(CARD)
        done = cls.twin.requantize(source, weight.to(CARD), scales, target, shared=moved, **options)
        blocks = None if done.scales.blocks is None else done.scales.blocks.cpu()
        shared = None if done.scales.shared is None else shared if shared is not None else done.scales.shared.cpu()
        return kernels.Requantized(
            done.packed.cpu(), type(done.scales)(blocks, shared), done.amax, done.squared_error, done.squared_weight
        )


@pytest.mark.parametrize("w", MATRICES.values(), ids=MATRICES)
@pytest.mark.parametrize("target", TARGETS)
@every_source
def test_equal_to_the_reference_to_the_bit(source, target, w):
    fmt = FORMATS[target]
    assert_equal_to_reference(Card, source, fmt, w)
    if fmt.candidates is not no_candidates:
        assert_equal_to_reference(Card, source, fmt, w, True)


@every_source
def test_square_blocks_too(source):
    assert_equal_to_reference(Card, source, FORMATS["fp8_block"], awkward(131, 160))


@pytest.mark.long
@pytest.mark.parametrize("source, target", [*itertools.product(kernels.SOURCES, Card.twin.TARGETS)])
def test_every_pair_on_more_rows(source, target):
    for search in (False, True):
        assert_equal_to_reference(Card, source, FORMATS[target], awkward(131, 288, seed=5), search)


@every_target
def test_error_and_largest_are_those_of_the_cpu(target):
    weight, scales, _ = stored_as("mxfp8", MATRICES["ragged"])
    card, host = (
        k.requantize("mxfp8", weight, scales, FORMATS[target], search=True, measure=True) for k in (Card, cpu)
    )
    assert card.amax == host.amax and same_bits(card.packed, host.packed)
    assert card.squared_error == pytest.approx(host.squared_error, rel=1e-5, abs=1e-12)
    assert card.squared_weight == pytest.approx(host.squared_weight, rel=1e-5)


@every_source
def test_what_is_not_finite_is_refused(source):
    weight, scales, _ = stored_as(source, MATRICES["narrow"])
    broken = weight.contiguous().view(torch.int16 if source == "bf16" else torch.uint8).clone()
    broken[4, 39] = 0x7F80 if source == "bf16" else 0xFF
    for target in ("mxfp4", "nvfp4"):
        with pytest.raises(PlanError, match="infinities, NaNs"):
            Card.requantize(source, broken.view(weight.dtype), scales, FORMATS[target])
    with pytest.raises(PlanError, match="no kernel goes from"):
        Card.requantize(source, weight, scales, FORMATS["affine4_g64"])


def test_export_takes_the_kernels_of_the_device(m3, monkeypatch):
    """Two matrices of one expert share a second scale."""
    blueprint = Blueprint.of(m3, Plan("compressed_tensors", formats=formats_of(m3, "nvfp4", "experts", "source")))
    group = next(g for g in siblings(blueprint.architecture.linears) if g[0].expert == 0 and len(g) == 2)
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "device", lambda: torch.device("cpu"))
        by_cpu = list(through_kernels(blueprint, group, False))
    asked = []
    monkeypatch.setattr(kernels, "device", lambda: CARD)
    monkeypatch.setattr(kernels, "of", lambda device: asked.append(device) or Card.twin)
    by_card = list(through_kernels(blueprint, group, False))
    assert len(by_cpu) == len(by_card) > 0 and all(map(same_bits, by_cpu, by_card)) and asked == [CARD]


@pytest.mark.skipif(CARD.type == "cuda", reason="there is a card")
def test_without_a_card_triton_is_not_even_imported():
    check = "import sys; from moesaic import kernels; assert kernels.of(kernels.device()).__name__.endswith('cpu')"
    subprocess.run([sys.executable, "-c", f"{check}; assert 'triton' not in sys.modules"], check=True)


COMPILE = """
import re, sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from moesaic.kernels import tiles

names = tiles.requantize_tile.arg_names
types = dict.fromkeys(("rows", "columns", "blocks", "row_bytes"), "i32")
types |= dict.fromkeys(("low", "high", "half_range"), "fp32")
types |= dict.fromkeys(("shared_1", "changes", "squares"), "*fp32")
types |= {"stored": "*u8", "scales": "*u8", "packed": "*u8", "out_scales": "*u8", "top": "*i32"}
plain = dict(SOURCE_ROWS=1, SOURCE_N=32, POWERS=True, SQUARE=False, MEASURE=True)
for element, rule, bits, n, c in ((1, 2, 8, 32, 0), (2, 3, 4, 32, 2), (2, 4, 4, 16, 16), (3, 5, 3, 64, 8)):
    fixed = plain | dict(ELEMENT=element, RULE=rule, BITS=bits, R=2048 // n, N=n, C=c)
    signature = {name: "constexpr" if name in fixed else types[name] for name in names}
    source = ASTSource(tiles.requantize_tile, signature, {(names.index(k),): v for k, v in fixed.items()})
    text = compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False}).asm["ptx"]
    print(*re.findall(r"\\b(?:fma|div|mul|add|sub|sqrt|rcp)[.a-z0-9]*f32", text))
"""


@pytest.mark.long
def test_compiled_for_a_card_every_operation_is_correctly_rounded():
    """No card is needed for that: Triton brings its assembler along."""
    free = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=free, capture_output=True, text=True, check=True)
    operations = set(done.stdout.split())
    assert {"div.rn.f32", "mul.rn.f32", "add.rn.f32"} <= operations
    assert all(re.fullmatch(r"(add|sub|mul|div)\.rn\.f32", operation) for operation in operations)
