"""What a number format is: a grid, a rule for its scales, and what both cost in bits.

A grid is three functions, and they are kept apart because GPTQ and scale search hold the scale
fixed while codes change, and because decode-then-encode has to be the identity:

    fit    (weights in blocks)   -> Scales   as they are stored
    round  (weight, *steps)      -> code     element by element, so a matrix, a block or a column will do
    value  (code, *steps)        -> weight   exactly what the server multiplies with

`steps` turns what is stored into what is multiplied: one F32 number a block, or two where the grid
is affine. Nothing else here, nor in `rounding/`, needs to know whether a scale has one level or two,
or whether its block is a row of 32 or a square of 128. Leaves out bits on disk: those are `containers/`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import PlanError

Steps = tuple[Tensor, ...]  # F32 [OB, IB] each: what a block's codes are multiplied by (and, if affine, offset with)

GAIN = (0.8, 1.6)  # bounds of the rescaling factor; outside them the block is mostly zeros
BAND = 1 << 18  # weights at a time on a CPU: what is made on the way stays in its cache
LARGEST = float(torch.finfo(torch.bfloat16).max)  # no checkpoint stores more; below it no format's arithmetic overflows


@dataclass(frozen=True)
class Scales:
    """What is stored beside the codes of one matrix [O, I] whose blocks are [OB, IB].

    blocks   one number a block, in the stored dtype: uint8 (E8M0), float8_e4m3fn, bfloat16, float32; None: no scales
    shared   float32 [1], a second level that the whole matrix (and its fused siblings) share; None: one level
    offsets  like `blocks`, for affine grids; None: the grid is symmetric
    """

    blocks: Tensor | None = None
    shared: Tensor | None = None
    offsets: Tensor | None = None


def no_candidates(scales: Scales) -> Sequence[Scales]:
    """A format whose scale rule leaves nothing to search."""
    return ()


@dataclass(frozen=True)
class NumberFormat:
    """One number format. `fit` sees F32 weights as [OB, IB, n], n = rows × columns of a block."""

    name: str
    block: tuple[int, int]  # rows, columns that share a scale; 0 is the whole axis: (1, 0) is per output channel
    element_bits: int
    scale_bits: int  # per block, all levels but `shared`
    fit: Callable[[Tensor, Tensor | None], Scales]  # w [OB, IB, n] F32, shared -> Scales
    steps: Callable[[Scales], Steps]
    round: Callable[..., Tensor]  # (w, *steps) -> codes uint8 (int16 where a code has 16 bits); broadcasts
    value: Callable[..., Tensor]  # (codes, *steps) -> F32
    reference: str
    share: Callable[[Tensor], Tensor] | None = None  # largest |w| over fused siblings -> `Scales.shared`
    candidates: Callable[[Scales], Sequence[Scales]] = no_candidates  # other scales worth trying, likeliest first
    times: Callable[[Scales, Tensor], Scales] | None = None  # blocks' values times factors [OB, IB]; None: too coarse
    wider: tuple[str, ...] = ()  # formats that hold all its values, the nearest in size first
    token_group: int | None = None  # values of a token that share a scale where engines round activations to it; 0: all
    offered: bool = False  # to every unit by `allocate`, unless --formats names others
    tabled: bool = False  # by `fit`, among the formats of experts
    version: int = 1  # goes up with any change to which scales or codes come of the same weights

    @property
    def bits_per_weight(self) -> float:
        """Stored bits a weight of a large matrix, scales included; whole-axis blocks count as free."""
        rows, columns = self.block
        return self.element_bits + (self.scale_bits / (rows * columns) if rows and columns else 0.0)

    def stored_bytes(self, shape: Sequence[int]) -> int:
        """Bytes of a matrix [O, I] and its scales, without what a container adds to fill a row's last word."""
        (o, i), (ob, ib) = shape, self.grid(shape)
        shared_bits = 32 if self.share else 0
        return -(-(o * i * self.element_bits + ob * ib * self.scale_bits + shared_bits) // 8)

    def grid(self, shape: Sequence[int]) -> tuple[int, int]:
        """Blocks [OB, IB] of a matrix [O, I]; a last, ragged block counts."""
        (o, i), (rows, columns) = shape, self.block
        return -(-o // (rows or o)), -(-i // (columns or i))

    def blocks(self, w_OI: Tensor) -> Tensor:
        """`w_OI` as [OB, IB, n]; ragged edges are filled with zeros, which no symmetric scale rule minds."""
        (o, i), (rows, columns) = w_OI.shape, self.block
        rows, columns = rows or o, columns or i
        ob, ib = self.grid(w_OI.shape)
        if (ob * rows, ib * columns) != (o, i):
            w_OI = torch.nn.functional.pad(w_OI, (0, ib * columns - i, 0, ob * rows - o))
        return w_OI.reshape(ob, rows, ib, columns).transpose(1, 2).reshape(ob, ib, rows * columns)

    def spread(self, steps: Steps, shape: Sequence[int]) -> Steps:
        """Each step [OB, IB] repeated so that every weight of [O, I] stands beside its own."""
        (o, i), (rows, columns) = shape, self.block
        return tuple(s.repeat_interleave(rows or o, 0)[:o].repeat_interleave(columns or i, 1)[:, :i] for s in steps)

    def scales(self, w_OI: Tensor, shared: Tensor | None = None) -> Scales:
        """Scales of `w_OI` by the standard rule. `shared` overrides the second level (fused siblings)."""
        w_OI = w_OI.float()
        amax = w_OI.abs().max()
        if not amax <= LARGEST:  # written as `not <=` so that NaN fails the test too
            raise not_finite(self.name, w_OI.shape)
        if shared is None and self.share is not None:
            shared = self.share(amax)
        found = [self.fit(self.blocks(w_OI[rows]), shared) for rows, _ in self.bands(w_OI)]
        blocks, offsets = (
            [part for s in found if (part := getattr(s, name)) is not None] for name in ("blocks", "offsets")
        )
        return Scales(_joined(blocks), found[0].shared, _joined(offsets))

    def search(self, w_OI: Tensor, scales: Scales, second_moments_I: Tensor | None = None) -> Scales:
        """`scales`, with each block's replaced by the candidate of least Σ second_moment · (value − w)².

        A candidate must be strictly better than all before it. Error terms are F32, (d · d) · moment,
        and added in the order of `block_sums`, so that a kernel can choose the same to the bit.
        """
        w = self.blocks(w_OI.float())
        moments = None if second_moments_I is None else self.blocks(second_moments_I.float().expand(w_OI.shape))
        best, least = scales, self.block_errors(w, scales, moments)
        for candidate in self.candidates(scales):
            error = self.block_errors(w, candidate, moments)
            better = error < least
            least = torch.where(better, error, least)
            blocks = _pick(better, candidate.blocks, best.blocks)
            best = Scales(blocks, scales.shared, _pick(better, candidate.offsets, best.offsets))
        return best

    def unshrunk(self, w_OI: Tensor, codes_OI: Tensor, scales: Scales) -> Scales:
        """`scales`, with each block's such that its values reach as far along its weights as those do: w · w / value · w.

        Scales of least error leave nearest values short of that by what they miss; small in each matrix, that adds up
        over experts. The same factor makes quantised gradients unbiased (Vargaftik et al., 2021). F32, in steps, so
        that nothing overflows, and added in the order of `block_sums`. Where scales are too coarse, nothing changes.
        """
        if self.times is None:
            return scales
        steps, found = self.steps(scales), list[Tensor]()
        for rows, blocks in self.bands(w_OI):
            w_oI, own = w_OI[rows].float(), tuple(s[blocks] for s in steps)
            value_oI = self.value(codes_OI[rows], *self.spread(own, w_oI.shape))
            w, value = (self.blocks(x_oI) / own[0].unsqueeze(-1) for x_oI in (w_oI, value_oI))
            found.append(gain(block_sums(w * w), block_sums(w * value)))
        return self.times(scales, torch.cat(found))

    def block_errors(self, w: Tensor, scales: Scales, moments: Tensor | None = None) -> Tensor:
        """Σ moment · (value − w)² of each block, F32 [OB, IB], of weights (and moments) in blocks [OB, IB, n]."""
        steps = tuple(s.unsqueeze(-1) for s in self.steps(scales))
        d = self.value(self.round(w, *steps), *steps) - w
        return block_sums(d * d if moments is None else d * d * moments)

    def encode(self, w_OI: Tensor, scales: Scales) -> Tensor:
        """Nearest codes [O, I] of `w_OI` under given scales."""
        steps, found = self.steps(scales), list[Tensor]()
        for rows, blocks in self.bands(w_OI):
            w_oI = w_OI[rows].float()
            found.append(self.round(w_oI, *self.spread(tuple(s[blocks] for s in steps), w_oI.shape)))
        return torch.cat(found)

    def bands(self, w_OI: Tensor) -> list[tuple[slice, slice]]:
        """Rows of `w_OI` to take at a time, and the rows of blocks that they are: whole blocks, of some `BAND` weights."""
        (o, i), height = w_OI.shape, self.block[0] or w_OI.shape[0]
        count = max(1, BAND // max(1, height * i)) if w_OI.device.type == "cpu" else -(-o // max(1, height))
        whole = range(0, max(1, self.grid(w_OI.shape)[0]), max(1, count))
        return [(slice(b * height, (b + count) * height), slice(b, b + count)) for b in whole]

    def decode(self, codes_OI: Tensor, scales: Scales) -> Tensor:
        """F32 weights [O, I]: exactly what a server multiplies with."""
        return self.value(codes_OI, *self.spread(self.steps(scales), codes_OI.shape))


def not_finite(name: str, shape: Sequence[int]) -> PlanError:
    """The refusal of weights beyond `LARGEST`, for whoever fits them."""
    return PlanError(
        f"a matrix {list(shape)} holds infinities, NaNs or magnitudes no BF16 reaches, and {name} has to be "
        "fitted to finite weights; check that the source is whole and was decoded with its scales"
    )


def quotient(x: Tensor, by: float) -> Tensor:
    """`x / by`, correctly rounded on every device: CUDA turns division by a Python number into a multiplication."""
    return x / torch.full_like(x, by)


def block_sums(terms: Tensor) -> Tensor:
    """Sum over the last axis from first to last, each step rounded to F32: an order that a kernel can keep."""
    total = terms[..., 0]
    for k in range(1, terms.shape[-1]):
        total = total + terms[..., k]
    return total


def gain(whole: Tensor, along: Tensor) -> Tensor:
    """whole / along, within `GAIN`; 1 where there is nothing to go by."""
    ratio = whole / along
    return torch.where((ratio > 0) & ratio.isfinite(), ratio.clamp(*GAIN), 1.0)


def _joined(parts: Sequence[Tensor]) -> Tensor | None:
    """Blocks of rows under each other. Through bytes, as torch has no `cat` on 8-bit floats."""
    if not parts:
        return None
    return torch.cat([part.view(torch.uint8) for part in parts]).view(parts[0].dtype)


def _pick(better: Tensor, ours: Tensor | None, theirs: Tensor | None) -> Tensor | None:
    """Block by block, `ours` where it is better. Through bytes, as torch has no `where` on 8-bit floats."""
    if ours is None or theirs is None:
        return theirs
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[theirs.element_size()]
    return torch.where(better, ours.view(bits), theirs.view(bits)).view(theirs.dtype)
