"""`moesaic report`: the page of a run again, the model card, and the upload."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .base import Arguments, Command
from .base.values import count_of


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


def options(p: argparse.ArgumentParser) -> None:
    p.add_argument("run", type=Path, help="run folder, or the folder of an export")
    p.add_argument(
        "--devices", metavar="NxSIZE", help="also report how these devices hold the export: 2x95GiB, 4xH100NVL, …"
    )
    p.add_argument(
        "--context", type=count_of, metavar="N", help="with --devices: context length of a request, in tokens"
    )
    p.add_argument("--card", action="store_true", help="also write the model card of the export (README.md)")
    p.add_argument("--base-model", metavar="ORG/NAME", help="name of the source on the Hub, for the card")
    p.add_argument("--unlicensed", action="store_true", help="write the card even if the source has no licence file")
    p.add_argument(
        "--push", metavar="ORG/NAME", help="write the card, and list what would be uploaded to this Hub repository"
    )
    p.add_argument("--yes", action="store_true", help="with --push: verify the export again, then upload")
    p.add_argument("--public", action="store_true", help="with --push: make a new repository public (default: private)")


def run(a: Report) -> dict[str, Any]:
    from ..checkpoint.inspect import size
    from ..report import Naming, gather, push, report, uploads, write_card

    page = report(a.run, devices=a.devices or "", context=a.context)
    print(f"report   {page}")
    facts: dict[str, Any] = {"report": str(page)}
    if not a.card and not a.push:
        return facts
    known = gather(a.run, devices=a.devices or "", context=a.context)
    card = write_card(known, Naming(base_model=a.base_model or "", repository=a.push or "", unlicensed=a.unlicensed))
    print(f"card     {card}")
    facts["card"] = str(card)
    if a.push:
        files = uploads(known)
        for file in files:
            print(f"{file.bytes:>18,}  {file.to}")
        print(f"{len(files):,} files, {size(sum(f.bytes for f in files))}")
        facts["files"] = {f.to: f.bytes for f in files}
        if a.yes:
            facts["address"] = push(known, a.push, files, public=a.public, quiet=a.quiet)
        print(facts.get("address") or f"nothing was uploaded to {a.push}; add --yes to upload")
    return facts


COMMAND = Command(
    name="report",
    place=130,
    summary="write the report of a run again; write or upload its model card",
    example="moesaic report run",
    options=options,
    arguments=Report,
    run=run,
)
