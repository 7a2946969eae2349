"""Matrices, the slow way to requantize them, and what it takes to be equal to it: for the kernels of every device."""

from typing import Any

import torch
from torch import Tensor

from moesaic.checkpoint.containers import CONTAINERS
from moesaic.checkpoint.containers.base import Packing
from moesaic.formats import FORMATS, NumberFormat, Scales
from moesaic.formats.base import LARGEST, no_candidates


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
    return ours.dtype == theirs.dtype and ours.shape == theirs.shape and as_bytes(ours) == as_bytes(theirs)


def as_bytes(x: Tensor) -> bytes:
    return x.reshape(-1).view(torch.uint8).numpy().tobytes()


def reference(fmt: NumberFormat, w: Tensor, shared: Tensor | None, search: bool) -> tuple[Tensor, Scales]:
    search = search and fmt.candidates is not no_candidates
    scales = fmt.scales(w, shared)
    scales = fmt.search(w, scales) if search else scales
    codes = fmt.encode(w, scales)
    scales = fmt.unshrunk(w, codes, scales) if search else scales
    return packing_of(fmt).pack(codes, scales)["codes"], scales


def packing_of(fmt: NumberFormat) -> Packing:
    """The container's whose tensors a kernel gives."""
    return CONTAINERS["mlx" if fmt.name.startswith("affine") else "compressed_tensors"].packing(fmt.name)


def assert_equal_to_reference(kernels: Any, source: str, fmt: NumberFormat, w: Tensor, search: bool = False) -> None:
    weight, weight_scales, decoded = stored_as(source, w)
    shared = None if fmt.share is None else fmt.share(1.25 * decoded.abs().max())
    done = kernels.requantize(source, weight, weight_scales, fmt, shared=shared, search=search)
    packed, scales = reference(fmt, decoded, shared, search)
    assert same_bits(done.scales.blocks, scales.blocks) and done.scales.shared is shared
    assert same_bits(done.scales.offsets, scales.offsets)
    assert same_bits(done.packed, packed)
