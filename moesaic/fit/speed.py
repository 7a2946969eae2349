"""An upper bound of tokens a second: what a decoding step has to move, by what memory and links are stated to move.

A step gives each request one token. Each device reads, once a step, its piece of the weights that those tokens select, and
of each request the cache of all tokens before. Then

    step, s      = (weights, B + requests × cache, B) / bandwidth, B/s + sums, B / link, B/s
    tokens a second = requests / step

This is the memory roof of the roofline model (Williams et al., 2009, doi:10.1145/1498765.1498785) for a step that reads
every operand once, with one term for links. Bytes are those of one device, the fullest. Reading and sending take turns,
because which experts are read is known only when the sum before them has arrived.

weights  all but the embedding (one row a token), images and layers for multi-token prediction; of the experts those that
         are selected: top_k for one token, for more of them E × (1 - (1 - top_k / E)^requests), as if each token chose
         evenly. Real routers prefer some and then read fewer, so this one term can be too high, for several requests.
         Of experts dealt out whole the fullest device has at least its even share.
cache    of `context` tokens in every layer that looks at all of them. A layer with an indexer reads the indexer's keys of
         all, and keys and values of as many as it selects. A latent is whole on every device.
sums     two a layer (after attention, after the experts), of BF16 hidden states: each device sends its own part once and
         receives the sum, which no algorithm does with less.

Leaves out everything else that takes time: arithmetic, launches, latencies of links, prompts, sampling, and what kernels
miss of the stated bandwidth. Leaves out speculative decoding too, which gives several tokens a step.
"""

from dataclasses import dataclass

from .footprint import KV_BYTES, SEQUENCES, Footprint
from .shapes import Figure, Kind

MICROSECONDS = 1_000_000
UNREAD = ("embedding", "vision")  # by a step that decodes text


@dataclass(frozen=True)
class Speed:
    """The bound for `requests` at once, each with the cache of `context` tokens."""

    requests: int
    context: int
    tokens_second: float  # of all requests together
    weight_bytes: int  # that one device reads in a step
    cache_bytes: int  # of one request
    lines: tuple[Figure, ...]  # how they come about


def speeds(at: Footprint, context: int, concurrency: int) -> list[Speed]:
    """For one request, and for as many as have their cache at once: those asked for, or as many as fit. None without a
    stated bandwidth."""
    if not at.machine.card.bandwidth:
        return []
    many = max(concurrency, min(at.requests(context), SEQUENCES[at.machine.card.engine]))
    return [speed(at, context, requests) for requests in dict.fromkeys((1, many))]


def speed(at: Footprint, context: int, requests: int) -> Speed:
    """Takes a machine with a stated bandwidth."""
    experts, cache, sums = experts_read(at, requests), cache_read(at, context), sums_sent(at, requests)
    weights = weights_read(at, experts.value)
    bandwidth, link = at.machine.card.bandwidth, at.machine.link
    step = (weights.value + requests * cache.value) / bandwidth * MICROSECONDS
    formula = f"({weights.value:,} + {requests} × {cache.value:,}) / {bandwidth:,} × {MICROSECONDS:,}"
    if sums.value:
        step += sums.value / link * MICROSECONDS
        formula += f" + {sums.value:,} / {link:,} × {MICROSECONDS:,}"
    if step < 1:  # of a model as small as those of tests; no device begins a step more often
        step, formula = 1, "1"
    least = Figure("a step takes at least", int(step), formula, "µs")
    rate = requests * MICROSECONDS / least.value
    most = Figure("tokens a second, at most", int(rate), f"{requests} × {MICROSECONDS:,} / {least.value:,}", "tokens")
    return Speed(
        requests=requests,
        context=context,
        tokens_second=rate,
        weight_bytes=weights.value,
        cache_bytes=cache.value,
        lines=(experts, weights, cache, *([sums] if sums.value else []), least, most),
    )


def experts_read(at: Footprint, requests: int) -> Figure:
    """Of a layer's, over all devices."""
    every, each = at.shapes.experts, at.shapes.top_k
    if requests == 1:
        return Figure("experts read in a layer", each, f"{each}", "experts")
    even = every * (1 - (1 - each / every) ** requests)
    return Figure(
        "experts read in a layer", int(even), f"{every} × (1 - (1 - {each} / {every}) ** {requests})", "experts"
    )


def weights_read(at: Footprint, experts: int) -> Figure:
    """By one device in a step that selects so many experts of a layer."""

    def figure(kind: Kind) -> Figure:
        return kind.figure(at.layout, experts if kind.role == "experts" else at.shapes.experts)

    found = [figure(kind) for kind in at.shapes.served if kind.role not in UNREAD]
    return Figure("weights read in a step", sum(f.value for f in found), " + ".join(f.formula for f in found))


def cache_read(at: Footprint, context: int) -> Figure:
    """By one device, for one token of a request of that length."""
    s, token = at.shapes.serving, at.token
    total, formula = token.value * context, f"{context:,} tokens × {token.value:,} B"
    if s.index_tokens and context > s.index_tokens:
        heads = max(1, s.kv_heads // at.layout.devices)
        width = KV_BYTES[at.kv]
        total -= (context - s.index_tokens) * s.index_layers * 2 * heads * s.head_width * width
        formula += (
            f" - ({context:,} - {s.index_tokens:,} tokens) × {s.index_layers} layers"
            f" × 2 × {heads} heads × {s.head_width} × {width} B"
        )
    return Figure("cache read for a token", total, formula)


def sums_sent(at: Footprint, requests: int) -> Figure:
    """By each device in a step; nothing where there is one."""
    if at.layout.devices == 1:
        return Figure("sums sent in a step", 0, "0")
    layers, hidden = at.shapes.serving.cached_layers, at.shapes.hidden
    formula = f"2 × {layers} layers × {requests} tokens × {hidden:,} × 2 B"
    return Figure("sums sent in a step", 2 * layers * requests * hidden * 2, formula)
