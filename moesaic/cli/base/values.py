"""Sizes, times, counts and lists as people write them on the command line."""

import argparse
import math

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
    """Bytes as people write them: 90GB, 89GiB, 500_000_000B. A bare number is refused: of what it would be is a guess."""
    number = text.rstrip("BbKkMmGgTtIi ")
    unit = text[len(number) :].strip().upper()
    try:
        found = float(number.replace("_", "")) * UNITS[unit or "B"]
    except (ValueError, KeyError):
        found = math.nan
    if not unit and 0 < found < math.inf:
        raise argparse.ArgumentTypeError(
            f"{text!r} has no unit; write {text.strip()}GB, {text.strip()}GiB or {text.strip()}B"
        )
    if not 1 <= found < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 90GB or 89GiB")
    return int(found)


def number_of(text: str, what: str, example: str) -> float:
    """A finite number above zero."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}; wanted a number above 0, such as {example}")
    return found


def seconds_of(text: str) -> float:
    """Hours, in seconds."""
    return 3600 * number_of(text, "a count of hours", "1.5")


def bits_of(text: str) -> float:
    """Stored bits a weight."""
    return number_of(text, "a count of bits", "4.25")


def whole(text: str, least: int, most: float = math.inf) -> int:
    """An integer within bounds."""
    try:
        found = int(text)
    except ValueError:
        found = least - 1
    if not least <= found <= most:
        above = f"from {least} to {most}" if most < math.inf else f"of {least} or more"
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {above}")
    return found


def count_of(text: str) -> int:
    return whole(text, 1)


def seed_of(text: str) -> int:
    return whole(text, 0, 2**32 - 1)


def port_of(text: str) -> int:
    return whole(text, 1, 65_535)


def counts_of(text: str) -> list[int]:
    """Kept counts: 64, or 64,80,96."""
    return [count_of(part) for part in text.split(",")]


def names_of(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def shares_of(text: str) -> dict[str, float]:
    """Domains to be heard, with their shares where they are not alike: code,math or code=2,math=1."""
    try:
        pairs = (part.partition("=") for part in names_of(text))
        found = {name.strip(): float(share or 1) for name, _, share in pairs}
    except ValueError:
        found = {}
    if not found or not all(name and 0 < share < math.inf for name, share in found.items()):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of domains with weights above 0; write code,math or code=2,math=1"
        )
    return found
