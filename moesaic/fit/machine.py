"""Machines: devices by name or by size, and how much of their memory an engine may take.

A device's bytes are what the driver reports as its total (`torch.cuda.mem_get_info`), which is below the
number on the box and is what vLLM multiplies with --gpu-memory-utilization; of a Mac, what macOS lets
the GPU wire. Its bandwidth and its links are what the maker states, which no program reaches. Leaves out arithmetic.
"""

import difflib
import re
from dataclasses import dataclass, replace

from ..errors import InputError

GB, GIB = 10**9, 2**30
UNITS = {"MB": 10**6, "GB": GB, "GIB": GIB, "MIB": 2**20, "TB": 10**12, "TIB": 2**40}


@dataclass(frozen=True)
class Card:
    """One device. `utilization` is the part of its bytes that an engine should claim.

    Rates are bytes a second as the maker states them; of links those that one device sends at while it receives as much.

    bandwidth  of its memory; 0: not known
    link       to the other devices of its machine
    pair       the same where a bridge joins two
    network    to other machines, for each device
    """

    name: str
    bytes: int
    utilization: float = 0.92  # vLLM 0.32's own default
    per_node: int = 8  # devices behind one operating system, where a machine has more
    engine: str = "vllm"
    bandwidth: int = 0
    link: int = 0
    pair: int = 0
    network: int = 50 * GB  # ConnectX-7, 400 Gb/s, one a device in DGX H100, H200 and B200: the fastest that is usual


PCIE_4, PCIE_5 = 32 * GB, 64 * GB  # 16 lanes


def gib(name: str, total: float, bandwidth: int, link: int, pair: int = 0) -> Card:
    return Card(name, round(total * GIB), bandwidth=bandwidth * GB, link=link, pair=pair)


def mac(size: int) -> Card:
    """macOS lets a GPU wire three quarters of 64 GB and more; newer systems more yet (107.5 of 128 GiB measured,
    github.com/antirez/ds4/pull/893), and `sysctl iogpu.wired_limit_mb` as much as one dares.

    Each size has been sold with an Ultra, and M1, M2 and M3 Ultra have the same bandwidth (support.apple.com/122211: 819
    GB/s); those with a Max have half of it, or two thirds. The network is Thunderbolt 5, 80 Gb/s.
    """
    return Card(
        f"Mac Studio {size} GB", size * GIB * 3 // 4, utilization=1.0, per_node=1, engine="mlx",
        bandwidth=819 * GB, network=10 * GB,
    )  # fmt: skip


# Totals as PyTorch's out-of-memory messages give them in public reports; the least, where drivers differ.
# Bandwidths (GB/s) and links as NVIDIA's data sheet of each card gives them; the faster one, where a card comes in two
# forms. NVLink is stated both ways together, and counted here one way.
CARDS = (
    gib("A100", 79.14, 2039, 300 * GB),  # SXM, NVLink 600 GB/s; with PCIe 1,935
    gib("A100 40GB", 39.39, 1555, 300 * GB),
    gib("L40S", 44.40, 864, PCIE_4),
    gib("H100", 79.10, 3350, 450 * GB),  # SXM, NVLink 900 GB/s; with PCIe 2,000
    gib("H100 NVL", 93.00, 3938, PCIE_5, 300 * GB),  # bytes: github.com/ali-vilab/VACE/issues/56; a bridge 600 GB/s
    gib("H200", 139.80, 4800, 450 * GB),
    gib("B200", 178.35, 8000, 900 * GB),  # NVLink 1.8 TB/s
    gib("RTX 4090", 23.64, 1008, PCIE_4),  # bytes: github.com/ali-vilab/VGen/issues/104
    gib("RTX 5090", 31.36, 1792, PCIE_5),
    gib("RTX PRO 6000", 94.97, 1792, PCIE_5),  # Blackwell; its Server Edition 1,597
    # Shared with the system, so that the default does not start: github.com/vllm-project/recipes/pull/632.
    # 273 GB/s and ConnectX-7 at 200 Gb/s: docs.nvidia.com/dgx/dgx-spark/hardware.html
    Card("DGX Spark", round(121.69 * GIB), utilization=0.85, per_node=1, bandwidth=273 * GB, network=25 * GB),
    *(mac(size) for size in (64, 96, 128, 192, 256, 512)),
)


def plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


BY_NAME = {plain(card.name): card for card in CARDS}


def known(what: str) -> str:
    """What to write instead of a name that no card has: those that contain it or are near, all where there are none."""
    asked = plain(what)
    near = [name for name in BY_NAME if len(asked) > 2 and asked in name]
    near += [name for name in difflib.get_close_matches(asked, BY_NAME, 3) if name not in near]
    names = ", ".join(BY_NAME[name].name for name in near or BY_NAME)
    return f"did you mean {names}?" if near else f"there are {names}."


@dataclass(frozen=True)
class Machine:
    """`count` devices of one kind."""

    card: Card
    count: int

    @staticmethod
    def parse(text: str) -> "Machine":
        """Devices as people write them: `2x95GiB`, `4xH100 NVL`, `h200`, and `2 x DGX Spark@0.9` to claim so much of each.

        Raises `InputError` that names the cards.
        """
        found = re.fullmatch(r"\s*(?:(\d+)\s*[x×*]\s*)?([^@\s][^@]*?)\s*(?:@\s*(0?\.\d+|1|1\.0+)\s*)?", text)
        count, what = (int(found[1] or 1), found[2]) if found else (0, "")
        size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([GTM]i?B)", what, re.IGNORECASE)
        if size:
            total = int(float(size[1]) * UNITS[size[2].upper()])
            card = Card(f"{size[1]} {size[2]}", total)
        elif plain(what) in BY_NAME:
            card = BY_NAME[plain(what)]
        else:
            raise InputError(f"{text!r} names no device; {known(what)} A size will do too: 2x95GiB")
        if not 1 <= count <= 1024 or not card.bytes:
            raise InputError(f"{text!r} is {count} devices of {card.bytes:,} bytes; wanted 1 to 1024 that have memory")
        return Machine(replace(card, utilization=float(found[3])) if found and found[3] else card, count)

    @property
    def name(self) -> str:
        return f"{self.count} × {self.card.name}"

    @property
    def nodes(self) -> int:
        """Machines with an operating system of their own; each holds as many of the devices."""
        fewest = -(-self.count // self.card.per_node)
        return next(n for n in range(fewest, self.count + 1) if self.count % n == 0)

    @property
    def per_node(self) -> int:
        return self.count // self.nodes

    @property
    def link(self) -> int:
        """Bytes a second between its devices, one way; the slowest kind that there is."""
        if self.nodes > 1:
            return self.card.network
        return self.card.pair if self.count == 2 and self.card.pair else self.card.link

    @property
    def requested_bytes(self) -> int:
        """What the engine claims of each device, for weights, cache and reserve together."""
        return int(self.card.bytes * self.card.utilization)
