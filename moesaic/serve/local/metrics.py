"""What Prometheus may ask: requests, tokens, latencies, and what the engine holds. Nothing about any text."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .engine import Engine

FIRST_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 180, 600, 1800)
TOKEN_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 180)


@dataclass(frozen=True)
class Metrics:
    """The meters of one server, in a registry of their own."""

    began: float  # seconds since the epoch
    registry: CollectorRegistry
    requests: Counter  # by endpoint and status
    prompt_tokens: Counter
    new_tokens: Counter
    first_token: Histogram
    next_token: Histogram

    @staticmethod
    def of(engine: Engine) -> "Metrics":
        registry = CollectorRegistry()
        resident = engine.decoder.resident
        for name, what, read in (
            ("running", "Texts being made.", lambda: len(engine.batch.live)),
            ("waiting", "Texts waiting for room.", lambda: len(engine.batch.waiting)),
            ("cache_bytes", "Keys and values held.", lambda: engine.cache_bytes),
            ("weight_bytes", "Weights held.", lambda: resident.pinned_bytes + resident.passing_bytes),
            ("expert_hits", "Uses of an expert that was in memory.", lambda: resident.hits),
            ("expert_misses", "Uses of an expert that was read from disk.", lambda: resident.misses),
        ):
            gauge(registry, name, what, read)
        return Metrics(
            began=time.time(),
            registry=registry,
            requests=Counter("moesaic_requests", "Requests answered.", ("endpoint", "status"), registry=registry),
            prompt_tokens=Counter("moesaic_prompt_tokens", "Tokens of prompts.", registry=registry),
            new_tokens=Counter("moesaic_new_tokens", "Tokens generated.", registry=registry),
            first_token=Histogram(
                "moesaic_first_token_seconds", "To a text's first token.", registry=registry, buckets=FIRST_SECONDS
            ),
            next_token=Histogram(
                "moesaic_next_token_seconds", "Between tokens.", registry=registry, buckets=TOKEN_SECONDS
            ),
        )

    def page(self) -> bytes:
        return generate_latest(self.registry)


def gauge(registry: CollectorRegistry, name: str, what: str, read: Callable[[], float]) -> None:
    Gauge(f"moesaic_{name}", what, registry=registry).set_function(read)
