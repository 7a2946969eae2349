"""`moesaic verify`: an export reopened and held to its plan."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .base import Arguments, Command


@dataclass(frozen=True, kw_only=True)
class Verify(Arguments):
    export: Path
    source: Path | None


def options(p: argparse.ArgumentParser) -> None:
    p.add_argument("export", type=Path, help="folder of the export")
    p.add_argument(
        "--source", type=Path, metavar="MODEL", help="source model; compare every tensor with it, as the plan says"
    )


def run(a: Verify) -> dict[str, Any]:
    from ..checkpoint import Checkpoint
    from ..verify import verify

    verdict = verify(a.export, Checkpoint.open(a.source) if a.source else None, a.quiet)
    for note in verdict.notes:
        print(f"note: {note}")
    for finding in verdict.findings:
        print(f"FAIL  {finding}")
    print(
        ", ".join(f"{check} × {count:,}" for check, count in verdict.compared.items())
        + (": all hold" if verdict.holds else "")
    )
    facts = {
        "holds": verdict.holds,
        "compared": dict(verdict.compared),
        "findings": [vars(f) for f in verdict.findings],
        "notes": verdict.notes,
    }
    return facts | {"exit": 0 if verdict.holds else 1}


COMMAND = Command(
    name="verify",
    place=110,
    summary="reopen an export and check every tensor and file",
    example="moesaic verify M3-64e --source MiniMax-M3-MXFP8",
    options=options,
    arguments=Verify,
    run=run,
)
