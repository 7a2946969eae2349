"""The options of each command, and sizes and lists as people write them."""

import argparse
from pathlib import Path

UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def bytes_of(text: str) -> int:
    """Bytes as people write them: 90GB, 89GiB, 500_000_000."""
    number = text.rstrip("BbKkMmGgTtIi ")
    unit = text[len(number) :].strip().upper() or "B"
    try:
        return int(float(number.replace("_", "")) * UNITS[unit])
    except (ValueError, KeyError):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 90GB or 89GiB") from None


def seconds_of(text: str) -> float:
    """Hours, in seconds."""
    return 3600 * float(text)


def counts_of(text: str) -> list[int]:
    """Kept counts: 64, or 64,80,96."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no count of experts; write 64, or 64,80,96") from None


def names_of(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def shares_of(text: str) -> dict[str, float]:
    """Domains to be heard, with their shares where they are not alike: code,math or code=2,math=1."""
    try:
        pairs = (part.partition("=") for part in names_of(text))
        return {name.strip(): float(share or 1) for name, _, share in pairs}
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} names no shares of domains; write code,math or code=2,math=1"
        ) from None


def ranking_options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--policy", default="pooled",
        help="how domains are weighed: pooled, mean, union, intersection, quota (default %(default)s)",
    )  # fmt: skip
    p.add_argument(
        "--domains",
        type=shares_of,
        metavar="D=S,…",
        help="those to be heard, with shares: code=2,math=1 (default: all alike)",
    )
    p.add_argument(
        "--until-stable", action="store_true", help="begin with --tokens, and double until the choice stops moving"
    )


def resource_options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--memory", type=bytes_of, dest="memory_bytes", metavar="SIZE",
        help="that this may take: 16GB, 12GiB (default: what is available); changes what is held at once, never a result",
    )  # fmt: skip
    p.add_argument(
        "--threads", type=int, metavar="N",
        help="that products are cut over: part of a result (default: what the run began with, else one a core)",
    )  # fmt: skip


def text_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="text, one domain a file (code.txt, math.jsonl); else the text of this Python",
    )
    parser.add_argument(
        "--heldout",
        type=Path,
        metavar="DIR",
        help="text to judge by; else a part of --data that calibration never sees",
    )
    parser.add_argument(
        "--tokens", type=int, default=65_536, metavar="N", help="tokens to calibrate on (default %(default)s)"
    )
    parser.add_argument("--length", type=int, metavar="N", help="tokens a row (default 2048, or the model's context)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of rows (default %(default)s)")
    resource_options(parser)


def parallel_options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--tensor-parallel", type=int, metavar="N", help="devices to serve on: refuse what they would not load"
    )
    p.add_argument("--expert-parallel", action="store_true", help="with whole experts on each of them")


def rounding_option(p: argparse.ArgumentParser) -> None:
    rounding = p.add_mutually_exclusive_group()
    rounding.add_argument(
        "--rounding",
        help="how codes are chosen: rtn; search for better scales, weighted by inputs where --data is given; gptq, descent "
        "or autoround, which look at text (default rtn)",
    )  # fmt: skip
    rounding.add_argument(
        "--scale-search", action="store_const", const="search", dest="rounding", help="the same as --rounding search"
    )


def inspect_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", type=Path, help="a model folder, or one with a config.json alone")
    p.add_argument("--base", type=Path, metavar="MODEL", help="find which experts of this model were kept")


def prune_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", type=Path)
    p.add_argument("out", type=Path)
    p.add_argument("--experts", type=counts_of, required=True, metavar="K", help="experts to keep in every layer")
    p.add_argument(
        "--criterion", default="reap", help="reap, mass, …, or auto: the best by preview (default %(default)s)"
    )
    p.add_argument(
        "--preview", action="store_true", help="measure what cuts would cost (K may be 64,96), and write no model"
    )
    p.add_argument(
        "--loops", action="store_true", help="with --preview: let the best cuts write, and tell how it repeats"
    )
    p.add_argument(
        "--run", type=Path, metavar="RUN", help="rank by all that `calibrate RUN` has gathered there; no sweep"
    )
    ranking_options(p)
    p.add_argument(
        "--repair", action="store_true",
        help="let shared experts take over what dropped ones gave, if that helps on other text (M3)",
    )  # fmt: skip
    p.add_argument("--no-verify", action="store_false", dest="check", help="do not reopen and compare the result")
    text_options(p)


def quantize_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", type=Path)
    p.add_argument("out", type=Path)
    p.add_argument("--format", required=True, help="mxfp4, nvfp4, int4_g128, mxfp8, …")
    p.add_argument("--only", default="experts", help="experts or linears (default %(default)s)")
    p.add_argument("--rest", default="source", help="source or bf16 (default %(default)s)")
    p.add_argument(
        "--to", default="compressed_tensors", dest="container", metavar="CONTAINER", help="(default %(default)s)"
    )
    rounding_option(p)
    parallel_options(p)
    p.add_argument("--no-verify", action="store_false", dest="check", help="do not reopen and compare the result")
    text_options(p)


def calibrate_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", type=Path)
    p.add_argument(
        "run",
        type=Path,
        help="run folder; other text later adds to what is there; a line of .jsonl may name an `image`",
    )
    p.add_argument("--criterion", default="reap", help="what --until-stable watches (default %(default)s)")
    p.add_argument(
        "--experts",
        type=counts_of,
        metavar="K",
        help="kept counts that it watches (default: a half, and three quarters)",
    )
    ranking_options(p)
    text_options(p)


def budget_options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--fit",
        type=bytes_of,
        dest="budget_bytes",
        metavar="SIZE",
        help="bytes on disk, never exceeded: 90GB, 84GiB; finds the plan",
    )
    p.add_argument("--devices", metavar="NxSIZE", help="instead of --fit: 2x95GiB, 4xH100NVL, …; with --context")
    p.add_argument("--context", type=int, metavar="N", help="tokens that a request on --devices may have")
    p.add_argument("--bits", type=float, metavar="B", help="the same as stored bits per weight of the source")


def offer_options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--formats", type=names_of, metavar="F,F", help="what --fit may write units in, such as source,nvfp4,int3_g64"
    )
    p.add_argument(
        "--harm",
        default="measured",
        help="how options are priced: measured, each by running it; surrogate, all by one sweep backward; anchored, "
        "that with a few of them measured; trace, as PrismaQuant does (default %(default)s)",
    )
    p.add_argument(
        "--hours", type=seconds_of, dest="seconds", metavar="H", help="for measuring prices; the less, the fewer tokens"
    )
    p.add_argument(
        "--experts", type=int, metavar="K", help="experts to keep in every layer (default: all, or what fits)"
    )
    p.add_argument("--criterion", default="reap", help="what ranks experts (default %(default)s)")
    ranking_options(p)
    rounding_option(p)
    p.add_argument(
        "--to", default="compressed_tensors", dest="container", metavar="CONTAINER", help="(default %(default)s)"
    )
    parallel_options(p)
    text_options(p)


def measure_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", type=Path)
    p.add_argument("run", type=Path, help="run folder: run/costs.json is the result")
    p.set_defaults(budget_bytes=None, bits=None, devices=None, context=None)  # prices are the same whatever the size
    offer_options(p)


def allocate_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", type=Path)
    p.add_argument("run", type=Path, help="run folder: run/frontier.json is the result, and with a size run/plan.json")
    budget_options(p)
    offer_options(p)


def compress_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", type=Path)
    p.add_argument("run", type=Path, help="run folder: run/model is the result, run/report.html what it cost")
    budget_options(p)
    p.add_argument(
        "--format", default="source", help="of routed experts: mxfp4, nvfp4, int4_g128, … (default %(default)s)"
    )
    p.add_argument("--rest", default="source", help="of every other matrix: source, bf16, … (default %(default)s)")
    p.add_argument(
        "--evaluation-tokens", type=int, default=65_536, metavar="N", help="tokens to judge by (default %(default)s)"
    )
    offer_options(p)


def demo_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("run", type=Path, nargs="?", default=Path("moesaic-demo"), help="run folder (default %(default)s)")
    resource_options(p)


def machine_options(p: argparse.ArgumentParser, required: bool = True) -> None:
    p.add_argument("--devices", required=required, metavar="NxSIZE", help="2x95GiB, 4xH100NVL, DGX Spark, …")
    p.add_argument("--context", type=int, metavar="N", help="tokens a request may have (default 32768, or the model's)")
    p.add_argument("--kv", default="bf16", help="cache type: bf16 or fp8 (default %(default)s)")
    p.add_argument("--concurrency", type=int, metavar="N", help="requests at once (default 1; 256 for --engine local)")


def fit_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", type=Path, help="a model folder, or one with a config.json alone")
    machine_options(p)
    p.add_argument("--explain", action="store_true", help="the formula behind each number")


def serve_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("export", type=Path)
    p.add_argument(
        "--engine", choices=("vllm", "local"), default="vllm", help="local: ours, on this machine (default %(default)s)"
    )
    machine_options(p, required=False)
    p.add_argument(
        "--print",
        dest="way",
        metavar="WAY",
        help="command, compose, kubernetes or ray: write it instead of running vLLM",
    )
    p.add_argument("--host", default="127.0.0.1", help="(default %(default)s)")
    p.add_argument("--port", type=int, default=8000, help="(default %(default)s)")
    local = p.add_argument_group("with --engine local")
    local.add_argument(
        "--expert-memory",
        type=bytes_of,
        dest="expert_bytes",
        metavar="SIZE",
        help="for weights (default half of what is available)",
    )
    local.add_argument("--memory", type=bytes_of, dest="expert_bytes", help=argparse.SUPPRESS)  # its former name
    local.add_argument(
        "--cache", type=bytes_of, dest="cache_bytes", metavar="SIZE", help="for keys and values (default a 16th of it)"
    )
    local.add_argument("--key-file", type=Path, metavar="FILE", help="holds the key that requests must bring")
    local.add_argument(
        "--max-tokens",
        type=int,
        default=4096,
        dest="new_tokens",
        metavar="N",
        help="of an answer (default %(default)s)",
    )


def export_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", type=Path, help="a model folder, or a run folder with a plan")
    p.add_argument(
        "out", type=Path, nargs="?", help="(default MODEL-CONTAINER; of a run RUN/model, RUN/model-CONTAINER)"
    )
    p.add_argument(
        "--to", dest="container", metavar="CONTAINER", help="mlx, compressed_tensors, auto_round, gptq, unquantized, …"
    )
    parallel_options(p)
    p.add_argument("--no-verify", action="store_false", dest="check", help="do not reopen and compare the result")
    resource_options(p)


def report_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("run", type=Path, help="a run folder, or an export that prune, quantize or evaluate wrote into")
    p.add_argument("--devices", metavar="NxSIZE", help="2x95GiB, 4xH100NVL, …: how they would hold the export")
    p.add_argument("--context", type=int, metavar="N", help="tokens that a request on --devices may have")
    p.add_argument("--card", action="store_true", help="also write the export's model card, its README.md")
    p.add_argument("--base-model", metavar="ORG/NAME", help="the source's name on the Hub, for the card")
    p.add_argument("--unlicensed", action="store_true", help="write the card though the source has no licence file")
    p.add_argument("--push", metavar="ORG/NAME", help="write the card and show what would be uploaded there")
    p.add_argument("--yes", action="store_true", help="and upload it, once the export is verified again")
    p.add_argument("--public", action="store_true", help="make a new repository public (else it is private)")


def verify_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("export", type=Path)
    p.add_argument(
        "--source", type=Path, metavar="MODEL", help="compare every tensor with what the plan makes of this model"
    )
