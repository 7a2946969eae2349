"""A model as shapes alone: a few tens of kinds of tensors, how each is cut between devices, and what an engine refuses.

From headers, a bare config or a plan; pruned or rounded in a microsecond. Leaves out pipelines and data-parallel
copies, and what kernels add when they repack weights to their tiles.
"""

from collections import Counter
from dataclasses import dataclass, replace

from ..checkpoint import Checkpoint
from ..checkpoint.containers import Container, Packing, Part
from ..families import DTYPE_BYTES, FAMILIES, Serving, TensorInfo
from ..plan.blueprint import Blueprint

Model = Checkpoint | Blueprint  # on disk, or planned

VOCABULARY_MULTIPLE = 64  # vLLM pads to it, whatever the number of devices


@dataclass(frozen=True)
class Figure:
    """A number, and the formula that it follows with its operands: arithmetic, once words and commas are left out."""

    name: str
    value: int
    formula: str
    unit: str = "B"


@dataclass(frozen=True)
class Layout:
    """One copy of a model over `devices`: every matrix cut between them, or with `deal` experts dealt out whole."""

    devices: int
    deal: bool = False

    @property
    def name(self) -> str:
        return f"TP {self.devices}" + (" + EP" if self.deal else "")


@dataclass(frozen=True)
class Kind:
    """Tensors of one role, shape and format, which all lie alike: `count` of them, for each expert where `each`."""

    role: str
    what: str  # "gate, up"
    packing: Packing | None  # of matrices; None: one tensor of `dtype`
    dtype: str
    shape: tuple[int, ...]
    cut: str  # "rows", "kv", "columns", "vocabulary", "whole"
    kv_heads: int
    each: bool
    count: int = 0

    @property
    def format(self) -> str:
        return self.packing.format if self.packing else self.dtype

    @property
    def name(self) -> str:
        what = "" if self.what in ("", self.role) else f" {self.what}"
        return f"{self.role}{what} {self.format}"

    @property
    def axis(self) -> int:
        return 1 if self.cut == "columns" else 0

    @property
    def padded(self) -> int:
        """Rows or columns that are cut."""
        size = self.shape[self.axis]
        return size + (-size % VOCABULARY_MULTIPLE if self.cut == "vocabulary" else 0)

    def dealt(self, layout: Layout) -> bool:
        return layout.deal and self.role == "experts"

    def pieces(self, layout: Layout) -> int:
        """Into how many different pieces each tensor is cut."""
        if self.cut == "whole" or self.dealt(layout):
            return 1
        return min(layout.devices, self.kv_heads) if self.cut == "kv" else layout.devices

    def repeated(self, layout: Layout) -> bool:
        """Whether several devices hold the same piece."""
        return not self.dealt(layout) and self.pieces(layout) < layout.devices

    def local(self, layout: Layout) -> tuple[int, ...]:
        """The shape of one device's piece."""
        piece = -(-self.padded // self.pieces(layout))
        return (*self.shape[: self.axis], piece, *self.shape[self.axis + 1 :])

    def number(self, layout: Layout, experts: int) -> int:
        """How many such pieces the fullest device holds."""
        if not self.each:
            return self.count
        return self.count * (-(-experts // layout.devices) if self.dealt(layout) else experts)

    def parts(self, shape: tuple[int, ...]) -> list[Part]:
        return list(self.packing.parts(shape).values()) if self.packing else [Part("", self.dtype, shape)]

    def bytes(self, shape: tuple[int, ...]) -> int:
        """One tensor, or matrix with its scales, of that shape."""
        return sum(part.bytes for part in self.parts(shape))

    def device_bytes(self, layout: Layout, experts: int) -> int:
        """What the fullest device holds."""
        return self.number(layout, experts) * self.bytes(self.local(layout))

    def figure(self, layout: Layout, experts: int) -> Figure:
        """The same, with its formula."""
        sizes = [(*part.shape, DTYPE_BYTES[part.dtype]) for part in self.parts(self.local(layout))]
        terms = " + ".join(" × ".join(f"{n:,}" for n in size) + " B" for size in sizes)
        return Figure(self.name, self.device_bytes(layout, experts), f"{self.number(layout, experts):,} × ({terms})")

    def refusal(self, layout: Layout) -> str:
        """Why an engine would not cut it so; empty when it would. A piece holds whole blocks of its format."""
        pieces = self.pieces(layout)
        block = self.packing.number_format.block[self.axis] or 1 if self.packing else 1
        if pieces == 1 or self.padded % (pieces * block) == 0:
            return ""
        wanted = f"no whole blocks of {block}" if block > 1 else "not a whole number"
        axis = ("rows", "columns")[self.axis]
        return f"{self.name}: {self.padded:,} {axis} over {pieces} are {self.padded / pieces:g}, {wanted}"


@dataclass(frozen=True)
class Shapes:
    """All that fit has to know of a model."""

    kinds: tuple[Kind, ...]
    experts: int
    serving: Serving
    hidden: int
    inner: int  # of an expert
    vocab: int
    context: int
    top_k: int
    container: str
    counts: tuple[int, ...]  # of experts that a layer can keep, ascending

    @staticmethod
    def of(model: Model) -> "Shapes":
        serving, a = FAMILIES[model.architecture.family].engine.serving(model.config), model.architecture
        inner = next(n.shape[0] for n in a.linears if n.role == "experts" and n.projection == "gate")
        found = tuple(kinds(model, serving))
        return Shapes(
            kinds=found,
            experts=a.experts,
            serving=serving,
            hidden=a.hidden,
            inner=inner,
            vocab=a.vocab,
            context=a.context,
            top_k=a.top_k,
            container=model.container.name,
            counts=a.counts,
        )

    def pruned(self, experts: int) -> "Shapes":
        return replace(self, experts=experts)

    def rounded(self, packing: Packing) -> "Shapes":
        """With another format for the experts."""
        changed = (replace(k, packing=packing) if k.role == "experts" else k for k in self.kinds)
        return replace(self, kinds=tuple(changed))

    def carries(self, container: Container) -> bool:
        """Whether a container can carry all that are no routed experts."""
        return all(k.format in container.packings for k in self.served if k.packing and k.role != "experts")

    def carried(self, container: Container) -> "Shapes":
        """In another container; all but experts in BF16 where it cannot carry them as they are."""

        def packing(kind: Kind) -> Packing:
            kept = kind.format in container.packings and self.carries(container)
            return container.packing(kind.format if kept else "bf16")

        changed = (replace(k, packing=packing(k)) if k.packing else k for k in self.kinds)
        return replace(self, kinds=tuple(changed), container=container.name)

    @property
    def served(self) -> list[Kind]:
        """Those that a server holds: a layer for multi-token prediction it reads only when told to speculate."""
        return [kind for kind in self.kinds if kind.role != "mtp"]

    def figures(self, layout: Layout) -> list[Figure]:
        return [kind.figure(layout, self.experts) for kind in self.served]

    def weight_bytes(self, layout: Layout) -> int:
        """On the fullest device."""
        return sum(kind.device_bytes(layout, self.experts) for kind in self.served)

    def repeated_bytes(self, layout: Layout) -> int:
        """Those of them that other devices hold too."""
        return sum(k.device_bytes(layout, self.experts) for k in self.served if k.repeated(layout))

    @property
    def expert_bytes(self) -> int:
        """Of the experts' matrices, on disk."""
        one = Layout(1)
        return sum(k.device_bytes(one, self.experts) for k in self.kinds if k.role == "experts")

    @property
    def disk(self) -> Figure:
        """Payload of the model's files: whole tensors, no padding."""
        terms = [(k.number(Layout(1), self.experts), k.bytes(k.shape)) for k in self.kinds]
        return Figure("on disk", sum(n * size for n, size in terms), " + ".join(f"{n:,} × {b:,}" for n, b in terms))

    def indivisible(self, layout: Layout) -> list[str]:
        """Why no format would make vLLM start the model so laid out; empty when some would."""
        n, s = layout.devices, self.serving
        bad = []
        if s.heads % n:
            bad.append(f"{s.heads} attention heads do not divide by {n}")
        if max(n, s.kv_heads) % min(n, s.kv_heads):
            bad.append(f"{s.kv_heads} key/value heads and {n} devices do not divide")
        if n > self.experts:
            bad.append(f"{n} devices are more than {self.experts} experts")
        return bad

    def refusals(self, layout: Layout) -> list[str]:
        """Why vLLM would not start the model so laid out; empty when it would."""
        return self.indivisible(layout) or [why for kind in self.served if (why := kind.refusal(layout))]

    def layouts(self, devices: int) -> dict[Layout, list[str]]:
        """Every way to lie on so many devices, the preferred one first, with what speaks against it."""
        ways = [Layout(devices)] + ([Layout(devices, deal=True)] if devices > 1 else [])
        return {way: self.refusals(way) for way in ways}

    def layout(self, devices: int) -> Layout | None:
        """The first that nothing speaks against."""
        return next((way for way, refusals in self.layouts(devices).items() if not refusals), None)


def kinds(model: Model, serving: Serving) -> list[Kind]:
    """All tensors of a model: a few tens of kinds stand for tens of thousands."""
    a, kv_heads = model.architecture, serving.kv_heads
    linears = Counter(
        (n.role, model.formats[n.name], n.shape, n.expert is not None, n.projection, n.cut) for n in a.linears
    )
    counts: Counter[Kind] = Counter()
    names: dict[Kind, list[str]] = {}
    for (role, format, shape, each, projection, cut), n in linears.items():
        kind = Kind(
            role=role,
            what="",
            packing=model.container.packing(format),
            dtype="",
            shape=shape,
            cut=cut,
            kv_heads=kv_heads,
            each=each,
        )
        counts[kind] += n
        names.setdefault(kind, []).append(projection)
    for tensor in a.tensors:
        each = tensor.name in a.rows_of  # its rows are the experts'
        own = (tensor.shape[1:] or (1,)) if each else tensor.shape
        counts[
            Kind(
                role=tensor.role,
                what="",
                packing=None,
                dtype=tensor.dtype,
                shape=own,
                cut=cut_of(tensor, serving),
                kv_heads=kv_heads,
                each=each,
            )
        ] += tensor.shape[0] if each else 1
    return [
        replace(kind, what=", ".join(names.get(kind, [])), count=n // (a.experts if kind.each else 1))
        for kind, n in counts.items()
    ]


def cut_of(tensor: TensorInfo, serving: Serving) -> str:
    if tensor.role in ("embedding", "head"):
        return "vocabulary"
    return next((cut for ending, cut in serving.cuts.items() if tensor.name.endswith(ending)), "whole")
