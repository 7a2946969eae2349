"""What one device of a machine holds: weights, a reserve, and in what is left the pages of the cache.

By vLLM's rules: a part of each device is claimed, weights and the reserve come off, the rest becomes pages; one
page is never used. The reserve is the one estimate here, and carries its band.
"""

from dataclasses import dataclass

from ..errors import InputError
from .machine import GIB, Machine
from .shapes import Figure, Layout, Shapes

KV_BYTES = {"bf16": 2, "fp8": 1}
BLOCK_TOKENS = 16  # of a page, where a model leaves it to vLLM
INDEX_BYTES = 2  # indexer keys stay BF16 beside an FP8 cache

# The reserve, as low, typical and high, in GiB. Public starts of these families, less their weights and cache, left
# 1.2 GiB (eager, two RTX PRO 6000) to 6.5 GiB (two MI300X, defaults); a DGX Spark profiled 5.1 GiB of graphs alone.
CONTEXT_GIB = (0.5, 0.75, 1.5)  # the driver's context, NCCL's buffers, fragments
GRAPHS_GIB = (0.0, 1.0, 5.0)  # captured CUDA graphs; none when eager
ACTIVE = (0.5, 1.0, 1.5)  # how much of the activations below is alive at once
STEP_TOKENS = {"vllm": 8192, "mlx": 2048}  # --max-num-batched-tokens; --prefill-step-size
SEQUENCES = {"vllm": 256, "mlx": 1}  # --max-num-seqs


@dataclass(frozen=True)
class Band:
    """An estimate, and between what it may turn out to be."""

    low: int
    typical: int
    high: int


@dataclass(frozen=True)
class Footprint:
    """What one device of `machine` holds of a model that lies on all of them. All in bytes of one device."""

    machine: Machine
    layout: Layout
    shapes: Shapes
    kv: str
    token: Figure  # cache of one token
    activations: Figure
    reserve: Band
    weight_bytes: int

    @staticmethod
    def of(shapes: Shapes, machine: Machine, layout: Layout, kv: str = "bf16", concurrency: int = 1) -> "Footprint":
        """Raises `InputError` for a cache format that is not known."""
        if kv not in KV_BYTES:
            raise InputError(f"a cache in {kv!r} is not known; name {' or '.join(KV_BYTES)}")
        token, activations = token_figure(shapes, layout, kv), activation_figure(shapes, machine, layout, concurrency)
        weights = shapes.weight_bytes(layout)
        return Footprint(
            machine=machine,
            layout=layout,
            shapes=shapes,
            kv=kv,
            token=token,
            activations=activations,
            reserve=reserve(activations, machine),
            weight_bytes=weights,
        )

    @property
    def repeated_bytes(self) -> int:
        return self.shapes.repeated_bytes(self.layout)

    @property
    def page_tokens(self) -> int:
        return self.shapes.serving.block_tokens or BLOCK_TOKENS

    @property
    def page_bytes(self) -> int:
        return self.token.value * self.page_tokens

    def cache_bytes(self, reserved: int) -> int:
        """What is left for the cache when so much is reserved; below zero, what is missing."""
        return self.machine.requested_bytes - reserved - self.weight_bytes

    def request_pages(self, context: int) -> int:
        return -(-context // self.page_tokens)

    def longest(self, reserved: int, concurrency: int = 1) -> int:
        """Tokens that each of `concurrency` requests may have, no more than the model's own context."""
        usable = max(0, self.pages(reserved) - 1)
        return min(self.shapes.context, usable // concurrency * self.page_tokens)

    def requests(self, context: int) -> int:
        """How many of that length have their cache at once, with the reserve at its typical value."""
        return max(0, self.pages(self.reserve.typical) - 1) // self.request_pages(context)

    def pages(self, reserved: int) -> int:
        return max(0, self.cache_bytes(reserved) // self.page_bytes)

    def lines(self, context: int, concurrency: int) -> list[Figure]:
        """How each number comes about."""
        card, weights = self.machine.card, self.shapes.figures(self.layout)
        requested, reserved = self.machine.requested_bytes, self.reserve.typical
        held = self.request_pages(context)
        cache, pages, fixed = self.cache_bytes(reserved), self.pages(reserved), reserved - self.activations.value
        lines = [
            self.shapes.disk,
            *weights,
            Figure("Model loading took", self.weight_bytes, " + ".join(f"{f.value:,}" for f in weights)),
            Figure("memory asked for", requested, f"{card.bytes:,} × {card.utilization:g}"),
            self.activations,
            Figure("reserve", reserved, f"activations {self.activations.value:,} + context and graphs {fixed:,}"),
            Figure("KV cache memory", cache, f"{requested:,} - reserve {reserved:,} - weights {self.weight_bytes:,}"),
            self.token,
            Figure("a page", self.page_bytes, f"{self.page_tokens} tokens × {self.token.value:,}"),
            Figure("a request", held, f"({context:,} + {self.page_tokens - 1}) // {self.page_tokens}", "pages"),
            Figure("cache of a request", held * self.page_bytes, f"{held:,} pages × {self.page_bytes:,}"),
        ]  # fmt: skip
        if pages:
            length = (pages - 1) // concurrency * self.page_tokens
            formula = f"({pages:,} - 1) // {concurrency} requests × {self.page_tokens}"
            lines.append(Figure("pages", pages, f"{cache:,} // {self.page_bytes:,}", "pages"))
            lines.append(Figure("room for a length of", length, formula, "tokens"))
        return lines


def token_figure(shapes: Shapes, layout: Layout, kv: str) -> Figure:
    """Heads are cut down to one a device and no further; a latent, and an indexer's keys, are whole on every device."""
    s, width = shapes.serving, KV_BYTES[kv]
    heads = max(1, s.kv_heads // layout.devices)
    total = s.cached_layers * 2 * heads * s.head_width * width
    formula = f"{s.cached_layers} layers × 2 × {heads} heads × {s.head_width} × {width} B"
    if s.latent_width:
        total = s.cached_layers * s.latent_width * width
        formula = f"{s.cached_layers} layers × {s.latent_width} × {width} B"
    if s.index_layers:
        total += s.index_layers * s.index_width * INDEX_BYTES
        formula += f" + {s.index_layers} indexers × {s.index_width} × {INDEX_BYTES} B"
    return Figure("cache of a token", total, formula)


def activation_figure(shapes: Shapes, machine: Machine, layout: Layout, concurrency: int) -> Figure:
    """The largest step: four hidden states, queries twice, the experts' two workspaces in BF16; logits in F32 and BF16."""
    n, s = (1 if layout.deal else layout.devices), shapes
    tokens, sequences = STEP_TOKENS[machine.card.engine], max(SEQUENCES[machine.card.engine], concurrency)
    queries, inner = s.serving.heads * s.serving.head_width // layout.devices, s.inner // n
    first, second = max(2 * inner, s.hidden), max(inner, s.hidden)
    return Figure(
        "activations",
        tokens * (4 * s.hidden + 2 * queries + s.top_k * (first + second)) * 2 + sequences * s.vocab * 10,
        f"{tokens:,} tokens × (4 × {s.hidden:,} + 2 × {queries:,} + {s.top_k} × ({first:,} + {second:,})) × 2 B"
        f" + {sequences} sequences × {s.vocab:,} × 10 B",
    )


def reserve(activations: Figure, machine: Machine) -> Band:
    graphs = GRAPHS_GIB if machine.card.engine == "vllm" else (0.0, 0.0, 0.0)
    return Band(
        *(
            round(active * activations.value + (context + graph) * GIB)
            for active, context, graph in zip(ACTIVE, CONTEXT_GIB, graphs)
        )
    )
