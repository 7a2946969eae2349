"""Rounding on text under way: a layer at a time, its groups rounded in the order in which they are multiplied."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...checkpoint.containers import siblings
from ...errors import FaultError
from ...families import Linear
from ...plan.blueprint import Blueprint, keeps_values
from ...rounding import Inputs, Rounding, round_members
from ...stream import LayerRun, LinearPass, Observer, Routing, Standing, State
from ...stream.state import ignore
from .experts import Experts, batch_of
from .group import Group, Members, format_of, is_written, read_facts, read_values, weights_of, write_group

TEXT = "text"  # the name of its states


def round_layer(
    work: "SequentialRounding", layer: int, at: Standing, *, told: Callable[[int], None] = ignore
) -> Standing:
    """A layer's groups rounded into the overlay, their facts added to the notes, and the states behind the rounded layer."""
    work = replace(work, facts=list(at.notes["groups"]), told=told)
    state = work.advance(layer, at.states[TEXT])
    return replace(at, states={TEXT: state}, notes={"groups": work.facts})


@dataclass
class SequentialRounding:
    """What is to be rounded, by what, and what came of it so far."""

    blueprint: Blueprint
    rounding: Rounding
    run: LayerRun
    folder: Path
    inputs: Mapping[str, str]
    facts: list[dict[str, Any]] = field(default_factory=list)
    told: Callable[[int], None] = ignore  # how many weights have been rounded

    def __post_init__(self) -> None:
        changed = [n for n in self.blueprint.architecture.linears if not keeps_values(self.blueprint, n)]
        self.groups = siblings(changed)
        self.by_origin = {self.blueprint.origin[n.name].name: group for group in self.groups for n in group}

    @torch.no_grad()
    def advance(self, layer: int, state: State) -> State:
        """Round a layer's groups, and advance `state` through the rounded layer."""
        run = self.run
        changed = {n.unit: self.change for g in self.groups for n in g if n.layer == layer}
        state = replace(state, changed=changed, observer=None)
        self.round_linears(self.of_layer(layer, "qkv", "o"), lambda watching: run.attention(layer, [watching]), state)
        (middle_BTD,) = run.attention(layer, [state])

        def feed_forward(watching: State) -> None:
            run.feed_forward(layer, [watching], [middle_BTD.clone()])

        self.round_linears(self.of_layer(layer, "dense"), feed_forward, state)
        watching = replace(state, observer=Observer(route=partial(self.round_experts, state)))
        (hidden_BTD,) = run.feed_forward(layer, [watching], [middle_BTD])
        return replace(state, hidden_BTD=hidden_BTD, changed={})

    def of_layer(self, layer: int, *roles: str) -> list[Group]:
        return [group for group in self.groups if group[0].layer == layer and group[0].role in roles]

    def round_experts(self, state: State, seen: Routing) -> None:
        """The shared expert and the routed ones, when it is known where tokens go and none of them has run."""

        def through_shared(watching: State) -> None:
            self.run.mlp(seen.layer, self.run.family.wiring.shared, [watching], [seen.x_TD])

        self.round_linears(self.of_layer(seen.layer, "shared"), through_shared, state)
        by_expert: dict[int | None, list[Group]] = {}
        for group in self.of_layer(seen.layer, "experts"):
            by_expert.setdefault(group[0].expert, []).append(group)
        experts = Experts(self.blueprint, self.rounding, self.run, seen)
        for batch in experts.batches(list(by_expert.values())):
            if all([self.is_done(group) for groups in batch for group in groups]):
                continue
            for group, members, facts in experts.round(batch):
                if not self.is_done(group):
                    self.write(group, members, facts)

    def round_linears(self, groups: Sequence[Group], forward: Callable[[State], Any], state: State) -> None:
        """Groups outside the routed experts, each by the inputs that `forward` shows when those before it are rounded."""
        for group in groups:
            if self.is_done(group):
                continue
            inputs, first = Inputs.empty(group[0].shape[1], self.run.device), self.blueprint.origin[group[0].name]
            forward(replace(state, observer=Observer(linear=partial(self.see, first, inputs))))
            if not inputs.vectors:
                raise FaultError(f"no input of {first.name} was seen")
            batch = batch_of([group], weights_of(self.blueprint, group, self.run.device)[None], [inputs])
            format = format_of(self.blueprint, group)
            (members,), facts = round_members(self.rounding, batch, [n.shape[0] for n in group], format)
            mine = {name: values[0] for name, values in facts.items()}
            self.write(group, members, {"tokens": int(inputs.vectors), "effective": inputs.tokens} | mine)

    def see(self, first: Linear, inputs: Inputs, seen: LinearPass) -> None:
        if first in seen.linears:
            inputs.add(seen.x_nI)

    def is_done(self, group: Group) -> bool:
        """Whether this rounding wrote the group before it was interrupted; if so, its facts are taken in."""
        if not is_written(self.folder, group):
            return False
        if group[0].name not in {facts["group"] for facts in self.facts}:
            self.record(read_facts(self.folder, group, self.inputs))
        return True

    def write(self, group: Group, members: Members, facts: Mapping[str, Any]) -> None:
        first, weights = group[0], sum(n.elements for n in group)
        whole = {"group": first.name, "layer": first.layer, "expert": first.expert, "weights": weights, **facts}
        self.record(write_group(self.folder, self.blueprint, group, members, self.inputs, whole))

    def record(self, facts: dict[str, Any]) -> None:
        self.facts.append(facts)
        self.told(facts["weights"])

    def change(self, linears: Sequence[Linear], values: Sequence[Tensor]) -> Sequence[Tensor]:
        """A `Change`: the values of matrices as far as they have been rounded."""
        found = {n.name: w_OI for n, w_OI in zip(linears, values)}
        for group in dict.fromkeys(self.by_origin[n.name] for n in linears if n.name in self.by_origin):
            if is_written(self.folder, group):
                found |= read_values(self.folder, self.blueprint, group, self.inputs)
        return [found[n.name].to(w_OI.device) for n, w_OI in zip(linears, values)]
