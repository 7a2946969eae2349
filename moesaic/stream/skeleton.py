"""A decoder layer as transformers runs it, with stand-ins for its attention, its experts and its router.

The layer's own forward says where norms and residuals go, so that nobody here has to repeat it. It is called once for
what attention gives, once for what goes into the MLP, and once for what leaves the layer when the experts are done;
what is known by then is not computed again, so that the three cost one attention, one MLP, and three times the norms.
Leaves out the weights (layer), and families that allow a shorter way (`Wiring.split`).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..families import Linear, Wiring
from .memory import spans
from .state import Intake, LinearPass

COPIES = 8  # F32 tensors of [tokens, width] that norms and residuals make
ROUTER_GIVES = 3  # logits, gates and ids, in all of transformers' MoE blocks

Act = Callable[..., Any]


@contextmanager
def standing_in(acts: dict[nn.Module, Act]) -> Iterator[None]:
    """While it lasts, a call of each module is a call of its stand-in. Hooks of the module see what goes in as ever."""
    for module, act in acts.items():
        module.forward = act
    try:
        yield
    finally:
        for module in acts:
            del module.forward


@dataclass(frozen=True)
class Skeleton:
    """One layer whose norms, at least, have values. Rows of hidden states [B, T, D] pass a few at a time.

    Stand-ins ignore what they are called with but for the hidden states, so that the layer need not be told more.
    """

    block: Any
    wiring: Wiring
    block_bytes: int

    @property
    def attention(self) -> nn.Module:
        return self.module(self.wiring.attention)

    @property
    def mlp(self) -> nn.Module:
        return self.module(self.wiring.mlp)

    def module(self, name: str) -> nn.Module:
        found: nn.Module = self.block.get_submodule(name)
        return found

    def attended(self, hidden_BTD: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        """What attention gives [B, T, D], `attend` being asked with what goes into it."""
        found = []

        def attention(hidden_states: Tensor, **ignored: Any) -> tuple[Tensor, None]:
            found.append(attend(hidden_states))
            return found[-1], None

        with standing_in({self.attention: attention, self.mlp: torch.zeros_like}):
            for row in self.rows(hidden_BTD):
                self.block(hidden_BTD[row])
        return torch.cat(found)

    def entering(self, hidden_BTD: Tensor, attended_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """What goes into the MLP [B·T, D], and what would leave the layer [B, T, D] if nothing came out of it."""
        found, left = [], []

        def mlp(x_bTD: Tensor) -> Tensor:
            found.append(x_bTD.flatten(0, 1))
            return torch.zeros_like(x_bTD)

        with standing_in({self.attention: in_turn(attended_BTD, 1), self.mlp: mlp}):
            for row in self.rows(hidden_BTD):
                left.append(self.block(hidden_BTD[row]))
        return torch.cat(found), torch.cat(left)

    def leaving(self, hidden_BTD: Tensor, attended_BTD: Tensor, known: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What comes out of the MLP [B·T, D], and of the layer [B, T, D], where outputs of the modules in `known` are those."""
        wiring, found, left = self.wiring, list[Tensor](), list[Tensor]()
        acts: dict[nn.Module, Act] = {self.module(name): in_turn(out_TD) for name, out_TD in known.items()}
        if f"{wiring.mlp}.{wiring.experts}" in known:
            acts[self.module(f"{wiring.mlp}.{wiring.router}")] = lambda *a, **b: (None,) * ROUTER_GIVES
        hook = self.mlp.register_forward_hook(lambda _, inputs, out: found.append(out.flatten(0, 1)))
        try:
            with standing_in({self.attention: in_turn(attended_BTD, 1), **acts}):
                for row in self.rows(hidden_BTD):
                    left.append(self.block(hidden_BTD[row]))
        finally:
            hook.remove()
        return torch.cat(found), torch.cat(left)

    def rows(self, hidden_BTD: Tensor) -> Iterator[slice]:
        return spans(len(hidden_BTD), 4 * COPIES * hidden_BTD[0].numel(), self.block_bytes)


def in_turn(out: Tensor, more: int = 0) -> Act:
    """A stand-in that gives the next tokens of `out` (its last axis is the width), and `more` that nobody asks for."""
    out_TD, start = out.flatten(0, -2), 0

    def act(x: Tensor | None = None, *given: Any, hidden_states: Tensor | None = None, **ignored: Any) -> Any:
        nonlocal start
        like = x if x is not None else hidden_states
        assert like is not None
        first, start = start, start + like.shape[:-1].numel()
        found = out_TD[first:start].to(like.dtype).view_as(like)
        return (found, *[None] * more) if more else found

    return act


# Hooks of a module.


def take_in(rounded: Intake, projection: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x_nI = inputs[0].flatten(0, -2)
    return (rounded(x_nI, projection).view_as(inputs[0]), *inputs[1:])


def see_inputs(
    linears: tuple[Linear, ...], see: Callable[[LinearPass], None], module: nn.Module, inputs: tuple[Tensor, ...]
) -> None:
    see(LinearPass(linears, inputs[0].flatten(0, -2)))
