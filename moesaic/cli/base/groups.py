"""Groups of options that several commands have: each with what it is given, and with what that comes to.

Imports nothing that takes time.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from . import Arguments
from .values import bytes_of, count_of, seed_of, shares_of

if TYPE_CHECKING:
    from ...calibrate.selection import Ranking
    from ...data.corpus import Corpus
    from ...fit import Layout


@dataclass(frozen=True, kw_only=True)
class ResourceArguments(Arguments):
    """Of every command that computes."""

    memory_bytes: int | None
    threads: int | None


def resource_options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--memory", type=bytes_of, dest="memory_bytes", metavar="SIZE",
        help="memory to use: 16GB, 12GiB (default: what is available); never changes a result",
    )  # fmt: skip
    p.add_argument(
        "--threads", type=count_of, metavar="N",
        help="CPU threads; results depend on the number (default: that of the run folder, else one per core)",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TextArguments(ResourceArguments):
    data: Path | None
    heldout: Path | None
    tokens: int
    length: int | None
    seed: int


def text_options(parser: argparse.ArgumentParser, tokens: str = "for calibration") -> None:
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder of text, one file per domain: code.txt, math.jsonl (default: the Python standard library, for trials only)",
    )
    parser.add_argument(
        "--heldout",
        type=Path,
        metavar="DIR",
        help="folder of text for evaluation (default: a part of --data that calibration does not see)",
    )
    parser.add_argument(
        "--tokens", type=count_of, default=65_536, metavar="N", help=f"number of tokens {tokens} (default %(default)s)"
    )
    parser.add_argument(
        "--length",
        type=count_of,
        metavar="N",
        help="tokens per row (default 2048, or the model's context if that is shorter)",
    )
    parser.add_argument(
        "--seed", type=seed_of, default=0, help="random seed for the choice of rows (default %(default)s)"
    )
    resource_options(parser)


def corpus(a: TextArguments) -> Corpus:
    from ...data.corpus import Corpus

    return Corpus(data=a.data, heldout=a.heldout, tokens=a.tokens, length=a.length, seed=a.seed)


@dataclass(frozen=True, kw_only=True)
class RankingArguments(Arguments):
    criterion: str
    policy: str
    domains: Mapping[str, float] | None
    until_stable: bool


def ranking_options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--policy", default="pooled",
        help="how domains are combined: pooled, mean, union, intersection or quota (default %(default)s)",
    )  # fmt: skip
    p.add_argument(
        "--domains",
        type=shares_of,
        metavar="D=S,…",
        help="domains to use, with weights: code=2,math=1 (default: all, with equal weights)",
    )
    p.add_argument(
        "--until-stable",
        action="store_true",
        help="start with --tokens, and double the text until the selection is stable",
    )


@dataclass(frozen=True, kw_only=True)
class CutArguments(RankingArguments):
    """Of commands that make a plan."""

    mtp: str


def cut_options(p: argparse.ArgumentParser) -> None:
    ranking_options(p)
    mtp_option(p)


def mtp_option(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--mtp", default="keep",
        help="layer for multi-token prediction: keep or drop; pruning needs drop (default %(default)s)",
    )  # fmt: skip


def ranking(a: RankingArguments, run: Path | None = None) -> Ranking:
    from ...calibrate.selection import Ranking

    return Ranking(
        criterion=a.criterion,
        policy=a.policy,
        domains=a.domains,
        until_stable=a.until_stable,
        run=run,
        mtp=a.mtp if isinstance(a, CutArguments) else "keep",
    )


@dataclass(frozen=True, kw_only=True)
class ParallelArguments(ResourceArguments):
    tensor_parallel: int | None
    expert_parallel: bool


def parallel_options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--tensor-parallel",
        type=count_of,
        metavar="N",
        help="number of devices that will serve the result; refuses a result that they could not load",
    )
    p.add_argument(
        "--expert-parallel", action="store_true", help="with --tensor-parallel: each device holds whole experts"
    )


def layout(a: ParallelArguments) -> Layout | None:
    from ...fit import layout_of

    return layout_of(a.tensor_parallel, a.expert_parallel)


@dataclass(frozen=True, kw_only=True)
class MachineArguments(Arguments):
    context: int | None
    kv: str
    concurrency: int | None


def machine_options(p: argparse.ArgumentParser, required: bool = True) -> None:
    p.add_argument(
        "--devices",
        required=required,
        metavar="NxSIZE",
        help="number and kind of devices: 2x95GiB, 4xH100NVL, DGX Spark, …",
    )
    p.add_argument(
        "--context",
        type=count_of,
        metavar="N",
        help="context length of a request, in tokens (default 32768, or the model's if that is shorter)",
    )
    p.add_argument("--kv", default="bf16", help="type of the KV cache: bf16 or fp8 (default %(default)s)")
    p.add_argument(
        "--concurrency",
        type=count_of,
        metavar="N",
        help="number of simultaneous requests (default 1; for serve --engine local 256)",
    )


def rounding_option(p: argparse.ArgumentParser) -> None:
    rounding = p.add_mutually_exclusive_group()
    rounding.add_argument(
        "--rounding",
        help="rounding method: rtn (to nearest), search (scale search), gptq, descent or autoround; the last three read "
        "text, and search does if --data is given (default rtn)",
    )  # fmt: skip
    rounding.add_argument(
        "--scale-search", action="store_const", const="search", dest="rounding", help="same as --rounding search"
    )
