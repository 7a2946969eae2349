"""Kernels equal the reference path (decode, fit, search, round, pack) to the bit, from every source to every target."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moesaic.containers import CONTAINERS
from moesaic.errors import PlanError
from moesaic.formats import FORMATS, NumberFormat, Scales
from moesaic.formats.base import LARGEST
from moesaic.kernels.cpu import SOURCES, TARGETS, amax, requantize

every_source = pytest.mark.parametrize("source", SOURCES)
every_target = pytest.mark.parametrize("target", TARGETS)


def real_like(o: int, i: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(o, i, generator=g) * torch.exp(0.3 * torch.randn(o, 1, generator=g)) * 0.02
    return torch.where(torch.rand(o, i, generator=g) < 0.0005, 4 * w, w)


def awkward(o: int, i: int, seed: int = 1) -> Tensor:
    """Ties under power-of-two steps, zeros of both signs, empty blocks, subnormals, outliers, wildly different rows."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randint(-28, 29, (o, i), generator=g) / 4.0
    w = w * 2.0 ** torch.randint(-60, 60, (o, 1), generator=g)
    w[:, i // 4 : i // 2] *= 0.0  # keeps signs
    w[::2, -7] *= 1000.0
    w[1, : i // 4] = 1e-40 * torch.randn(i // 4, generator=g)
    w[2] = 1e-36 * torch.randn(i, generator=g)
    w[3] = LARGEST * torch.rand(i, generator=g)
    return w


MATRICES = {
    "real_like": real_like(130, 512),
    "awkward": awkward(130, 512),
    "ragged": real_like(131, 424, seed=2),
    "narrow": awkward(5, 40, seed=3),
}
every_matrix = pytest.mark.parametrize("w", MATRICES.values(), ids=MATRICES)


def stored_as(source: str, w: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """`w` as a checkpoint would hold it, and the F32 weights that it then stands for."""
    if source == "bf16":
        stored = w.clamp(-LARGEST, LARGEST).bfloat16()
        return stored, None, stored.float()
    fmt = FORMATS[source]
    w = w.clamp(-LARGEST / 2, LARGEST / 2)
    scales = fmt.scales(w)
    codes = fmt.encode(w, scales)
    return codes.view(torch.float8_e4m3fn), scales.blocks, fmt.decode(codes, scales)


def same_bits(ours: Tensor | None, theirs: Tensor | None) -> bool:
    if ours is None or theirs is None:
        return ours is theirs
    return (
        ours.dtype == theirs.dtype and ours.shape == theirs.shape and np.array_equal(as_bytes(ours), as_bytes(theirs))
    )


def as_bytes(x: Tensor) -> np.ndarray:
    return x.contiguous().view(torch.uint8).numpy()


def reference(
    fmt: NumberFormat, w: Tensor, shared: Tensor | None, search: bool, moments: Tensor | None
) -> tuple[Tensor, Scales]:
    scales = fmt.scales(w, shared)
    scales = fmt.search(w, scales, moments) if search else scales
    codes = fmt.encode(w, scales)
    return CONTAINERS["compressed_tensors"].packing(fmt.name).pack(codes, scales)["codes"], scales


@every_matrix
@every_target
@every_source
def test_equal_to_the_reference_to_the_bit(source, target, w):
    fmt = FORMATS[target]
    weight, weight_scales, decoded = stored_as(source, w)
    shared = None if fmt.share is None else fmt.share(1.25 * decoded.abs().max())
    moments = torch.rand(w.shape[1], generator=torch.Generator().manual_seed(0)) ** 4
    for search, known in ((False, None), (True, None), (True, moments)):
        done = requantize(source, weight, weight_scales, fmt, shared=shared, search=search, second_moments_I=known)
        packed, scales = reference(fmt, decoded, shared, search, known)
        assert same_bits(done.scales.blocks, scales.blocks)
        assert same_bits(done.packed, packed)
