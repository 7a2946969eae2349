"""Our grids against other people's code, to the bit: compressed-tensors and ml_dtypes always, the others where installed.

Where a peer departs on purpose (its own scale rule, a tie broken another way) the test says so and holds the
rest. gguf, mlx and torchao are no dependency of ours: `pip install gguf "mlx[cpu]" torchao` runs those too.
"""

import numpy as np
import pytest
import torch
from torch import Tensor

from moesaic.formats import FORMATS, NumberFormat, Scales
from moesaic.formats.fp8 import E4M3, e4m3_round, e4m3_value
from moesaic.formats.mxfp4 import e2m1_round, e2m1_value
from moesaic.formats.mxfp8 import POWERS

ct_quant = pytest.importorskip("compressed_tensors.quantization")
ct_forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
ct_numbers = pytest.importorskip("compressed_tensors.quantization.utils")
ct_nvfp4 = pytest.importorskip("compressed_tensors.compressors.nvfp4")
ct_mx = pytest.importorskip("compressed_tensors.compressors.mx_utils")
ct_integer = pytest.importorskip("compressed_tensors.compressors.pack_quantized")
ml_dtypes = pytest.importorskip("ml_dtypes")

GROUPED_INTEGERS = [n for n in FORMATS if n.startswith("int") and not n.endswith("channel")]


def real_like(o: int = 256, i: int = 512, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(o, i, generator=g) * torch.exp(0.3 * torch.randn(o, 1, generator=g)) * 0.02
    return torch.where(torch.rand(o, i, generator=g) < 0.0005, 4 * w, w).bfloat16().float()


def awkward(o: int = 256, i: int = 512, seed: int = 1) -> Tensor:
    """Ties under power-of-two steps, zeros, empty blocks, subnormals, one huge outlier a row, wildly different rows."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randint(-28, 29, (o, i), generator=g) / 4.0
    w = w * 2.0 ** torch.randint(-60, 60, (o, 1), generator=g)
    w[:, 128:256] = 0.0
    w[::2, 300] *= 1000.0
    w[1, :128] = 1e-40 * torch.randn(128, generator=g)
    return w.bfloat16().float()


MATRICES = {"real_like": real_like(), "awkward": awkward()}
every_matrix = pytest.mark.parametrize("w", MATRICES.values(), ids=MATRICES)


def ct_args(fmt: NumberFormat):
    """The peer's name for one of our formats."""
    kind = "int" if fmt.name.startswith("int") else "float"
    common = {"num_bits": fmt.element_bits, "type": kind, "symmetric": True}
    match fmt.block:
        case (128, 128):
            return ct_quant.QuantizationArgs(**common, strategy="block", block_structure=[128, 128])
        case (1, 0):
            return ct_quant.QuantizationArgs(**common, strategy="channel")
        case (1, group):
            if fmt.name == "nvfp4":
                return ct_quant.QuantizationArgs(**common, strategy="tensor_group", group_size=group, scale_dtype=E4M3)
            dtype = {"scale_dtype": torch.uint8, "zp_dtype": torch.uint8} if fmt.name.startswith("mx") else {}
            return ct_quant.QuantizationArgs(**common, strategy="group", group_size=group, **dtype)


PEER = ["nvfp4", "mxfp4", "mxfp8", "fp8_block", "fp8_channel", "int8_channel", *GROUPED_INTEGERS]


@every_matrix
@pytest.mark.parametrize("name", PEER)
def test_codes_and_values_are_compressed_tensors_to_the_bit(name, w):
    fmt, args = FORMATS[name], ct_args(FORMATS[name])
    scales = fmt.scales(w)
    # MX scales live as bytes on disk and as powers of two in its arithmetic
    stored = POWERS[scales.blocks.int()] if name.startswith("mx") else scales.blocks.float()
    theirs = ct_forward.quantize(w, stored, None, args, global_scale=scales.shared)
    codes = fmt.encode(w, scales)
    ours = fmt.value(codes, *(torch.ones(()) for _ in fmt.steps(scales)))  # on the grid, before the step
    assert ours.equal(theirs)
    back = ct_forward.dequantize(theirs, stored, None, args, dtype=torch.float32, global_scale=scales.shared)
    assert fmt.decode(codes, scales).equal(back)


@every_matrix
@pytest.mark.parametrize("name", ["fp8_block", "fp8_channel", "int8_channel", *GROUPED_INTEGERS])
def test_scales_of_one_level_are_compressed_tensors(name, w):
    fmt = FORMATS[name]
    blocks = fmt.blocks(w)
    theirs, _ = ct_numbers.calculate_qparams(blocks.amin(-1), blocks.amax(-1), ct_args(fmt))
    ours = fmt.scales(w).blocks
    theirs = theirs.to(ours.dtype)
    # an empty block has no right scale (theirs is epsilon), one below BF16's subnormals has none to divide by; ours is 1
    live = (blocks.abs().amax(-1) > 0) & (theirs != 0)
    assert live.float().mean() > 0.3 and (ours[~live] == 1).all()
    assert ours[live].equal(theirs[live])


@every_matrix
def test_both_levels_of_nvfp4_are_compressed_tensors(w):
    fmt = FORMATS["nvfp4"]
    blocks, scales = fmt.blocks(w), fmt.scales(w)
    assert scales.shared.equal(ct_numbers.generate_gparam(w.min(), w.max()))
    theirs, _ = ct_numbers.calculate_qparams(blocks.amin(-1), blocks.amax(-1), ct_args(fmt), scales.shared)
    # where E4M3 underflows to 0 theirs becomes 1/8 and the block is lost; ours is the first subnormal
    alive = (blocks.abs().amax(-1) / 6 * scales.shared).to(E4M3).float() > 0
    assert alive.any() and scales.blocks.float()[alive].equal(theirs[alive])
    assert (scales.blocks.float()[~alive] == 2.0**-9).all()


@pytest.mark.parametrize("amax", [0.0, 1e-45, 1e-36, 7.9e-36, 8e-36, 1.0, 0.3, 3.3e38])
def test_the_shared_scale_is_compressed_tensors_at_every_size(amax):
    amax = torch.tensor(amax)
    assert FORMATS["nvfp4"].share(amax).equal(ct_numbers.generate_gparam(-amax, amax))


def test_mxfp8_scales_are_compressed_tensors_but_for_blocks_that_just_fit():
    fmt, w = FORMATS["mxfp8"], real_like(seed=3)
    w[0, 0], w[0, 1:32] = 448.0, 0.0  # theirs doubles the step although nothing would be clipped
    blocks = fmt.blocks(w)
    theirs = ct_mx.compress_mx_scale(
        ct_numbers.calculate_qparams(blocks.amin(-1), blocks.amax(-1), ct_args(fmt))[0], torch.uint8
    )
    ours = fmt.scales(w).blocks
    just_fits = torch.frexp(blocks.abs().amax(-1)).mantissa == 0.875
    assert just_fits[0, 0] and (theirs - ours)[just_fits].eq(1).all()
    assert ours[~just_fits].equal(theirs[~just_fits])


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_packed_fp4_is_compressed_tensors_own_packing(name):
    fmt, w = FORMATS[name], awkward()
    scales, args = fmt.scales(w), ct_args(fmt)
    stored = POWERS[scales.blocks.int()] if name == "mxfp4" else scales.blocks.float()
    packed = ct_nvfp4.quantize_and_pack_fp4(w, stored, scales.shared, group_size=args.group_size)
    codes = torch.stack([packed & 0xF, packed >> 4], -1).flatten(-2)
    ours = fmt.encode(w, scales)
    # −0 (stored, or w / step underflowed) loses its sign in their CPU path, and keeps it here and in their GPU kernel
    assert ((ours == codes) | ((ours == 8) & (codes == 0))).all()
    assert fmt.decode(ours, scales).equal(fmt.decode(codes, scales))


@pytest.mark.parametrize("name", GROUPED_INTEGERS)
def test_unsigned_integer_codes_are_what_compressed_tensors_packs(name):
    fmt, w = FORMATS[name], awkward()
    scales = fmt.scales(w)
    signed = ct_forward.quantize(w, scales.blocks.float(), None, ct_args(fmt), dtype=torch.int8)
    packed = ct_integer.pack_to_int32(signed, fmt.element_bits)
    stream = np.unpackbits(packed.numpy().view(np.uint8), axis=1, bitorder="little")
    bits = stream[:, : w.shape[1] * fmt.element_bits].reshape(*w.shape, fmt.element_bits)
    codes = (bits * (1 << np.arange(fmt.element_bits))).sum(-1)
    assert (codes == fmt.encode(w, scales).numpy()).all()


def everything_f32() -> Tensor:
    """All BF16 numbers, their F32 neighbours, and random bit patterns."""
    bf16 = torch.arange(65536).to(torch.uint16).view(torch.bfloat16).float()
    random = torch.randint(-(2**31), 2**31, (200_000,), generator=torch.Generator().manual_seed(0)).int()
    near = torch.randn(200_000, generator=torch.Generator().manual_seed(1)) * 8
    x = torch.cat([bf16, bf16.nextafter(2 * bf16), bf16.nextafter(0 * bf16), random.view(torch.float32), near])
    return x[x.isfinite()]


def test_elements_are_ml_dtypes_to_the_bit():
    x = everything_f32()
    fits = x[x.abs() < 448]
    assert (e4m3_round(fits).numpy() == fits.numpy().astype(ml_dtypes.float8_e4m3fn).view(np.uint8)).all()
    fits = x[x.abs() < 6]
    assert (e2m1_round(fits).numpy() == fits.numpy().astype(ml_dtypes.float4_e2m1fn).view(np.uint8)).all()
    fits = x[x.abs() <= torch.finfo(torch.bfloat16).max]
    bf16 = FORMATS["bf16"]
    assert (bf16.round(fits).numpy() == fits.numpy().astype(ml_dtypes.bfloat16).view(np.int16)).all()


def test_values_are_ml_dtypes_for_every_code():
    byte = np.arange(256, dtype=np.uint8)

    def same(ours: Tensor, theirs: np.ndarray) -> bool:
        return np.array_equal(ours.numpy().view(np.uint32), theirs.astype(np.float32).view(np.uint32))

    number = (byte & 0x7F) != 0x7F
    assert same(e4m3_value(torch.from_numpy(byte[number])), byte[number].view(ml_dtypes.float8_e4m3fn))
    assert e4m3_value(torch.from_numpy(byte[~number])).isnan().all()
    assert same(e2m1_value(torch.from_numpy(byte[:16])), byte[:16].view(ml_dtypes.float4_e2m1fn))
    assert same(POWERS[:255], byte[:255].view(ml_dtypes.float8_e8m0fnu)) and POWERS[255].isnan()


@every_matrix
@pytest.mark.parametrize("name", ["mxfp4", "mxfp8"])
def test_mx_codes_are_torchao_to_the_bit(name, w):
    ao = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    modes = pytest.importorskip("torchao.prototype.mx_formats.config").ScaleCalculationMode
    fmt = FORMATS[name]
    element = E4M3 if name == "mxfp8" else torch.float4_e2m1fn_x2
    mode = modes.RCEIL if name == "mxfp8" else modes.FLOOR
    scale, data = ao.to_mx(w, element, 32, scaling_mode=mode)
    scales = fmt.scales(w)
    theirs = scale.view(torch.uint8).reshape(scales.blocks.shape)
    normal = fmt.blocks(w).abs().amax(-1) > 2.0**-110
    assert scales.blocks[normal].equal(theirs[normal])
    data = data.view(torch.uint8)
    codes = data if name == "mxfp8" else torch.stack([data & 0xF, data >> 4], -1).flatten(-2)
    keep = fmt.spread((normal,), w.shape)[0]
    assert fmt.encode(w, scales)[keep].equal(codes.reshape(w.shape)[keep])


def test_nvfp4_is_torchao_but_for_ties_that_its_reciprocal_moves():
    ao = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    fmt, w = FORMATS["nvfp4"], real_like()
    scales = fmt.scales(w)
    scale, data = ao.nvfp4_quantize(w, 16, 1 / scales.shared)
    data = data.view(torch.uint8)
    theirs = torch.stack([data & 0xF, data >> 4], -1).flatten(-2).reshape(w.shape)
    assert scales.blocks.float().equal(scale.float().reshape(scales.blocks.shape))
    ours = fmt.encode(w, scales)
    tie = ours != theirs
    near, far = (fmt.decode(c, scales).double().sub(w).abs()[tie] for c in (ours, theirs))
    assert tie.float().mean() < 0.002 and ((far - near).abs() <= 1e-6 * w.abs()[tie]).all()


@every_matrix
def test_mxfp4_is_gguf_but_for_ties(w):
    gguf = pytest.importorskip("gguf.quants")
    fmt = FORMATS["mxfp4"]
    scales = fmt.scales(w)
    theirs = gguf.quantize(w.numpy(), gguf.GGMLQuantizationType.MXFP4)
    back = torch.from_numpy(gguf.dequantize(theirs, gguf.GGMLQuantizationType.MXFP4))
    ours = fmt.decode(fmt.encode(w, scales), scales)
    normal = fmt.spread((fmt.blocks(w).abs().amax(-1) > 2.0**-110,), w.shape)[0]
    bytes_ = theirs.reshape(*scales.blocks.shape, 17)[..., 0]
    assert (scales.blocks.numpy() == bytes_)[normal[:, ::32].numpy()].all()
    # it takes the first of two equally near points; nothing else differs
    differ = normal & (ours != back)
    assert ((ours.double() - w).abs() == (back.double() - w).abs())[differ].all()
    assert differ.float().mean() < 0.5 and (ours == back).any()


def mlx_array(mx, w: Tensor):
    return mx.array(w.float().numpy()).astype(mx.bfloat16 if w.dtype == torch.bfloat16 else mx.float32)


def mlx_codes(mx, packed, shape: torch.Size, bits: int) -> Tensor:
    """One little-endian bit stream a row."""
    stream = np.unpackbits(np.array(packed).view(np.uint8), axis=1, bitorder="little").reshape(*shape, bits)
    return torch.from_numpy((stream * (1 << np.arange(bits))).sum(-1).astype(np.uint8))


def f32(mx, x) -> Tensor:
    return torch.from_numpy(np.array(x.astype(mx.float32)))


AFFINE = [n for n in FORMATS if n.startswith("affine")]


@every_matrix
@pytest.mark.parametrize("name", AFFINE)
def test_affine_grids_are_mlx_to_the_bit(name, w):
    mx = pytest.importorskip("mlx.core")
    fmt = FORMATS[name]
    bits, group = fmt.element_bits, fmt.block[1]
    _, scale, offset = mx.quantize(mlx_array(mx, w.bfloat16()), group, bits)
    ours = fmt.scales(w)
    assert ours.blocks.float().equal(f32(mx, scale)) and ours.offsets.float().equal(f32(mx, offset))
    # its codes are rounded under the scale before BF16: in F32 both are one
    packed, scale, offset = mx.quantize(mlx_array(mx, w), group, bits)
    theirs = mlx_codes(mx, packed, w.shape, bits)
    steps = fmt.spread((f32(mx, scale), f32(mx, offset)), w.shape)
    assert fmt.round(w, *steps).equal(theirs)
    back = f32(mx, mx.dequantize(packed, scale, offset, group, bits))
    assert fmt.value(theirs, *steps).equal(back)


@pytest.mark.parametrize(("bits", "step"), [(2, 1.34375), (4, 0.26953125), (8, 0.01544189453125)])
def test_affine_scales_are_those_that_mlx_0_32_4_once_wrote(bits, step):
    """For machines without mlx: groups longer to either side, all alike, and too small for its least scale."""
    ramp = (torch.arange(32) * 37 % 64 - 20) / 16
    w = torch.stack([ramp, -ramp, torch.full((32,), 5.0), ramp * 1.6e-8]).bfloat16().float()
    scales = FORMATS[f"affine{bits}_g32"].scales(w)
    least = torch.tensor(1e-7).bfloat16().item()
    assert scales.blocks.float().flatten().tolist() == [-step, step, -least, -least]
    assert scales.offsets.float().flatten().tolist() == [2.6875, -2.6875, 5.0, 0.0]


@every_matrix
@pytest.mark.parametrize("name", ["mxfp4", "mxfp8", "nvfp4"])
def test_mlx_modes_decode_alike(name, w):
    mx = pytest.importorskip("mlx.core")
    fmt = FORMATS[name]
    packed, scale = mx.quantize(mlx_array(mx, w), fmt.block[1], fmt.element_bits, mode=name)
    codes = mlx_codes(mx, packed, w.shape, fmt.element_bits)
    blocks = torch.from_numpy(np.array(scale))
    if name == "nvfp4":
        blocks = blocks.view(E4M3)
    scales = Scales(blocks, torch.ones(1) if name == "nvfp4" else None)
    back = f32(mx, mx.dequantize(packed, scale, None, fmt.block[1], fmt.element_bits, mode=name, dtype=mx.float32))
    assert fmt.decode(codes, scales).equal(back)
