"""What a model family is: every name, shape and rule of one architecture, as plain data.

A family states what it was written for and refuses the rest in the first second. It knows nothing
of number formats or of bits on disk: a `Linear` is a matrix [O, I] under a name, and the container
says in which tensors it lies. Leaves out arithmetic, but for the few symbols that no transformers
module owns (an expert's activation), and vision: those tensors are carried along untouched.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from .stated import Config
from .talk import Talk

DTYPE_BYTES = {
    "F64": 8,
    "F32": 4,
    "BF16": 2,
    "F16": 2,
    "F8_E4M3": 1,
    "F8_E8M0": 1,
    "U8": 1,
    "I8": 1,
    "I32": 4,
    "U32": 4,
    "I64": 8,
}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a safetensors file: its header entry, without the offsets."""

    name: str
    dtype: str  # as safetensors writes it: BF16, F8_E4M3, U8 …
    shape: tuple[int, ...]
    role: str = ""  # "embedding", "head", "norm", "router", "router_bias", "vision" where a family says so

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.elements * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Refusal:
    """What an engine would not load: a matrix in these formats of that container."""

    container: str
    formats: tuple[str, ...]  # empty: all but BF16
    why: str  # what follows "layers.3.qkv holds an indexer, which …"

    def meets(self, container: str, format: str) -> bool:
        return container == self.container and (format in self.formats or (not self.formats and format != "bf16"))


@dataclass(frozen=True)
class Stack:
    """A tensor [E, …] of a release that holds a matrix of each expert of a layer, often with others of them.

    tensor      its whole name on disk: most have no ".weight"
    rows        of an expert's own part, all matrices in it together: 2 · I where gate and up share it
    first       the matrix's first row in that part, and
    step        how many rows on its next one is: 2 where gate and up take turns
    transposed  whether an expert's part lies as [I, rows]
    """

    tensor: str
    rows: int
    first: int = 0
    step: int = 1
    transposed: bool = False

    @property
    def is_run(self) -> bool:
        """Whether an expert's matrix is one run of bytes."""
        return self.step == 1 and not self.transposed

    def part(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of an expert's part, of a matrix of that shape [O, I]."""
        return (shape[1], self.rows) if self.transposed else (self.rows, shape[1])


@dataclass(frozen=True)
class Linear:
    """One matrix [O, I] that a format may be chosen for. `name` is the module's, without ".weight".

    projection  what it is in its block: "q", "k", "v", "o", "index_q" …; of a MLP "gate", "up" and "down"
    cut         along what devices share it: "rows", "columns", "kv" (rows, and no finer than a key/value head), "whole"
    fused       a name for the matrices of its unit and expert that a server makes one of, because they multiply the
                same vectors; "" where it stands alone
    stack       where an unquantized release of the family keeps it, if not in a tensor of its own
    bias        of an expert's matrix, a small tensor with a row for each expert: [E, O], or [E, rows of the stack], from
                which its values are taken as its rows are from there
    """

    name: str
    shape: tuple[int, int]
    role: str  # "experts", "qkv", "o", "shared", "dense"; "mtp" of all in a layer for multi-token prediction
    unit: str  # matrices of one unit share one format, because one kernel reads them: "layers.12.experts"
    layer: int
    projection: str
    cut: str
    fused: str = ""
    expert: int | None = None
    refusals: tuple[Refusal, ...] = ()
    stack: Stack | None = None
    bias: str = ""

    @property
    def input(self) -> str:
        """A name for what it multiplies: "layers.3.qkv.qkv", or "layers.3.experts.gate_up" for all experts of a layer."""
        return f"{self.unit}.{self.fused or self.projection}"

    @property
    def elements(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Router:
    """How one layer's tokens find their experts: names of tensors on disk, any dtype, and the rule that they follow."""

    weight: str  # [E, D]
    rule: str  # one of those in stream/router.py
    correction: str = ""  # [E], added to the scores for the choice and not for the gates
    bias: str = ""  # [E], of the weight: part of scores and gates
    groups: int = 1  # experts come in so many groups of equal size,
    kept_groups: int = 1  # and a token's are all in so many of them

    @property
    def tensors(self) -> tuple[str, ...]:
        """All have one row an expert."""
        return tuple(name for name in (self.weight, self.correction, self.bias) if name)


@dataclass(frozen=True)
class Architecture:
    """One model of a family: counts, and every tensor it has, in the order of its modules."""

    family: str
    hidden: int
    vocab: int
    context: int
    layers: int
    routers: Mapping[int, Router]  # by MoE layer, in order
    experts: int
    top_k: int
    layer_prefix: str  # "model.layers."
    linears: tuple[Linear, ...]
    tensors: tuple[TensorInfo, ...]  # all that is no linear: norms, routers, embeddings, vision
    embedding: str
    norm: str
    head: str
    optional: frozenset[str] = frozenset()  # tensors that some releases of the family leave out

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(self.routers)

    @cached_property
    def groups(self) -> int:
        """Groups of experts that routers select within; 1 where there are none."""
        return max(router.groups for router in self.routers.values())

    @cached_property
    def has_mtp(self) -> bool:
        return any(linear.role == "mtp" for linear in self.linears)

    def refusal(self, kept: int, all_too: bool = False) -> str:
        """Why no layer can keep so many experts; empty where it can. To keep all of them is no cut, unless `all_too`.

        Of grouped experts each group keeps as many, and two at least: its score is a sum of its two best. Engines do not
        check that, and route otherwise than the source (transformers, vLLM's CUDA path) or fail (vLLM's CPU path).
        """
        if not self.top_k <= kept < self.experts + all_too:
            most = "no more" if all_too else "fewer"
            return (
                f"wanted at least {self.top_k}, which each token selects, and {most} than the {self.experts} there are"
            )
        if kept in self.counts:
            return ""
        near = sorted(self.counts[: None if all_too else -1], key=lambda count: (abs(count - kept), count))[:2]
        return (
            f"they are selected within {self.groups} groups, each of which has to keep as many; "
            f"the nearest that can be are {' and '.join(map(str, sorted(near)))}"
        )

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Experts that a layer can keep, ascending, up to all."""
        open_ = max(router.kept_groups for router in self.routers.values())
        return tuple(
            kept
            for kept in range(self.top_k, self.experts + 1)
            if self.groups == 1
            or (kept % self.groups == 0 and kept >= 2 * self.groups and kept // self.groups * open_ >= self.top_k)
        )

    @cached_property
    def by_name(self) -> dict[str, Linear]:
        return {linear.name: linear for linear in self.linears}

    @cached_property
    def units(self) -> dict[str, tuple[Linear, ...]]:
        """Linears by unit, in model order."""
        grouped: dict[str, list[Linear]] = {}
        for linear in self.linears:
            grouped.setdefault(linear.unit, []).append(linear)
        return {unit: tuple(members) for unit, members in grouped.items()}

    @cached_property
    def experts_of(self) -> dict[tuple[int, int], dict[str, Linear]]:
        """(layer, expert) -> its matrices by projection."""
        found: dict[tuple[int, int], dict[str, Linear]] = {}
        for linear in self.linears:
            if linear.expert is not None:
                found.setdefault((linear.layer, linear.expert), {})[linear.projection] = linear
        return found

    def absent(self, stored: Collection[str]) -> frozenset[str]:
        """Of what some releases leave out, what a model of these tensors has not: optional tensors, or all of MTP."""
        mtp = {tensor.name for tensor in self.tensors if tensor.role == "mtp"}
        found = {name for name in self.optional if name not in stored}
        if mtp and mtp.isdisjoint(stored):
            found |= mtp | {linear.name for linear in self.linears if linear.role == "mtp"}
        return frozenset(found)

    def without(self, names: Collection[str]) -> "Architecture":
        """This architecture, but for small tensors and matrices of these names."""
        if not names:
            return self
        linears = tuple(linear for linear in self.linears if linear.name not in names)
        return replace(self, linears=linears, tensors=tuple(t for t in self.tensors if t.name not in names))

    @cached_property
    def rows_of(self) -> dict[str, int]:
        """Small tensor that has one row for each expert of a layer -> that layer."""
        found = {name: layer for layer, router in self.routers.items() for name in router.tensors}
        return found | {linear.bias: linear.layer for linear in self.linears if linear.bias}


@dataclass(frozen=True)
class Serving:
    """What a server has to know of one model beyond its tensors: what it caches, how it cuts them, which words it wants.

    Between devices a tensor is cut along its "rows" or "columns" or not at all; one cut along "kv" rows is
    cut no finer than a key/value head. `cuts` says so of tensors that are no linears, by the end of their
    name; one that it does not name is whole on every device.
    """

    heads: int
    kv_heads: int
    head_width: int
    cached_layers: int  # layers that keep a key and a value of every kv head
    cuts: Mapping[str, str]
    latent_width: int = 0  # of what all heads' keys and values are made of, cached once and whole on every device (MLA)
    index_layers: int = 0  # layers that keep one indexer key besides, whole on every device
    index_width: int = 0
    index_tokens: int = 0  # of a request's, that such a layer reads at most for a new token; 0: all of them
    block_tokens: int = 0  # of a cache page; 0 leaves it to the server
    attention_backend: str = ""  # vLLM's name; "" leaves it to the server


@dataclass(frozen=True)
class Vision:
    """What it takes to see an image: transformers' modules, the words around it, and how large it may be."""

    tower_class: str
    projector_class: str
    modules: Mapping[str, str]  # start of a name on disk -> the same within {"tower": …, "projector": …}
    around: tuple[str, str]
    least_pixels: int
    most_pixels: int
    mean: tuple[float, float, float]  # of red, green and blue, from 0 to 1
    std: tuple[float, float, float]


@dataclass(frozen=True)
class Arithmetic:
    """What no transformers module owns, because experts are run one by one. Functions see the text config as on disk."""

    activate: Callable[[Config, Any, Any], Any]  # (text config, gate [.., I], up [.., I]) -> [.., I]
    routed_scale: Callable[[Config], float]  # what the sum over routed experts is multiplied by


@dataclass(frozen=True)
class Split:
    """Leave to run a layer in two halves, x + attention(norm(x)), then x + MLP(norm(x)): less memory, and no call twice.

    Of a MoE block the MLP's output is that of the experts, times the factor, then added that of the shared expert.
    """

    before_attention: str = "input_layernorm"  # the norms' modules
    before_mlp: str = "post_attention_layernorm"


@dataclass(frozen=True)
class Wiring:
    """transformers' classes for the rest, what fills their parameters, and where our experts go in.

    Modules are named from the decoder layer, `router` and `experts` from the MoE block, which is the MLP of its layers.
    """

    modeling: str  # the transformers module that holds the classes below
    configuration: str  # the transformers module and class of the whole config: "pkg.mod:Class"
    layer_class: str
    rotary_class: str
    norm_class: str
    # (architecture, layer) -> parameter of the decoder layer -> tensors on disk that make it, stacked by rows;
    # of a MoE block only the shared expert's
    parameters: Callable[[Architecture, int], dict[str, tuple[str, ...]]]
    attention: str = "self_attn"
    mlp: str = "mlp"
    router: str = "gate"
    experts: str = "experts"
    shared: str = ""  # the shared expert's; "" where the family has none
    block_scales: bool = (
        False  # whether the MoE block multiplies what experts give by the family's factor (else its router)
    )
    latent: bool = False  # whether attention caches what it makes keys and values of (MLA)
    split: Split | None = None  # None: the layer's own forward runs


@dataclass(frozen=True)
class Engine:
    """What serving engines have to be told."""

    name_of: Callable[[str], str]  # a module's name on disk -> the name vLLM's quantization config must match
    serving: Callable[[Config], Serving]


@dataclass(frozen=True)
class Family:
    """All facts of one family, in five parts beside its tensors. Functions see config.json as it is on disk."""

    name: str  # model_type
    reference: str
    read: Callable[[Config], Architecture]  # raises FamilyError for a value it was not written for
    text: Callable[[Config], Config]  # the part of config.json that describes the language model
    arithmetic: Arithmetic
    wiring: Wiring
    engine: Engine
    talks: tuple[Talk, ...]  # of its models; the last is that of a model without a chat template
    vision: Vision | None = None
    mtp_key: str = ""  # where config.json counts layers for multi-token prediction (role "mtp"), which 0 leaves out
    # suffix of a quantized matrix's tensor -> its dtype in the vendor's releases, where that is not the container's first
    dtypes: Mapping[str, str] = field(default_factory=dict)
    # config.json as a tool saved it -> as the vendor writes it, which every engine reads; raises FamilyError
    released: Callable[[Config], Config] = lambda config: config

    def talk(self, template: str) -> Talk:
        """That of a model with this chat template: the first whose sign is in it; of one with no sign in it, no words."""
        known = self.talks if template else self.talks[-1:]
        return next((talk for talk in known if not template or talk.sign in template), Talk())
