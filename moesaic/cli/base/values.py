"""Sizes, times, counts and lists as people write them on the command line."""

import argparse

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
