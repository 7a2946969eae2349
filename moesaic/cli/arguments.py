"""What each command was given, typed: one frozen part for each group of options, named as where it goes.

A command's arguments are its parser's destinations, no more and no fewer (tests/test_cli_options.py). Imports nothing
that takes time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Of every command. `line` is the command as it was typed."""

    line: str
    json: bool
    quiet: bool


@dataclass(frozen=True, kw_only=True)
class ResourceArguments(Arguments):
    """Of every command that computes."""

    memory_bytes: int | None
    threads: int | None


@dataclass(frozen=True, kw_only=True)
class TextArguments(ResourceArguments):
    data: Path | None
    heldout: Path | None
    tokens: int
    length: int | None
    seed: int


@dataclass(frozen=True, kw_only=True)
class RankingArguments(Arguments):
    criterion: str
    policy: str
    domains: Mapping[str, float] | None
    until_stable: bool


@dataclass(frozen=True, kw_only=True)
class ParallelArguments(ResourceArguments):
    tensor_parallel: int | None
    expert_parallel: bool


@dataclass(frozen=True, kw_only=True)
class MachineArguments(Arguments):
    context: int | None
    kv: str
    concurrency: int | None


@dataclass(frozen=True, kw_only=True)
class Demo(ResourceArguments):
    run: Path


@dataclass(frozen=True, kw_only=True)
class Inspect(Arguments):
    model: Path
    base: Path | None


@dataclass(frozen=True, kw_only=True)
class Fit(MachineArguments):
    model: Path
    devices: str
    explain: bool


@dataclass(frozen=True, kw_only=True)
class Search(TextArguments, RankingArguments, ParallelArguments):
    """Of `measure` and `allocate`, and most of `compress`."""

    model: Path
    run: Path
    experts: int | None
    formats: tuple[str, ...] | None
    container: str
    budget_bytes: int | None
    bits: float | None
    devices: str | None
    context: int | None
    harm: str
    seconds: float | None
    rounding: str | None


@dataclass(frozen=True, kw_only=True)
class Compress(Search):
    format: str
    rest: str
    evaluation_tokens: int


@dataclass(frozen=True, kw_only=True)
class Calibrate(TextArguments, RankingArguments):
    model: Path
    run: Path
    experts: Sequence[int] | None


@dataclass(frozen=True, kw_only=True)
class Prune(TextArguments, RankingArguments):
    model: Path
    out: Path
    experts: Sequence[int]
    preview: bool
    loops: bool
    run: Path | None
    repair: bool
    check: bool


@dataclass(frozen=True, kw_only=True)
class Quantize(TextArguments, ParallelArguments):
    model: Path
    out: Path
    format: str
    only: str
    rest: str
    container: str
    rounding: str | None
    check: bool


@dataclass(frozen=True, kw_only=True)
class Export(ParallelArguments):
    model: Path
    out: Path | None
    container: str | None
    check: bool


@dataclass(frozen=True, kw_only=True)
class Verify(Arguments):
    export: Path
    source: Path | None


@dataclass(frozen=True, kw_only=True)
class Evaluate(TextArguments):
    export: Path
    against: Path | None
    scores: tuple[str, ...] | None
    activations: tuple[str, ...]
    text: Path | None
    window: int
    stride: int | None
    lengths: Sequence[int] | None
    tasks: tuple[str, ...]
    task_files: Path | None
    limit: int | None
    cache: Path | None
    server: str | None
    key_file: Path | None
    out: Path | None


@dataclass(frozen=True, kw_only=True)
class Report(Arguments):
    run: Path
    devices: str | None
    context: int | None
    card: bool
    base_model: str | None
    unlicensed: bool
    push: str | None
    yes: bool
    public: bool


@dataclass(frozen=True, kw_only=True)
class Serve(MachineArguments):
    export: Path
    engine: str
    devices: str | None
    way: str | None
    host: str
    port: int
    expert_bytes: int | None
    cache_bytes: int | None
    key_file: Path | None
    new_tokens: int
