"""Putting an export on the Hub: first what would be uploaded, then, if told, the upload. Never one that does not verify.

The weights go first and the card last, in a commit of its own, so that a page never describes what is not there.
An interrupted upload goes on when the same call is made again: huggingface_hub skips what has arrived.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.utils import validate_repo_id

from ..checkpoint import Checkpoint
from ..errors import CheckError, InputError
from ..verify import verify
from .card import eval_results
from .facts import WORK, Facts, places

BESIDE = ("report.html", "scores.json", "scores.csv", "plan.json")  # of a run: what the card refers to


@dataclass(frozen=True)
class Upload:
    """One file: where it lies and where it goes. `text` instead of a path where it lies nowhere yet."""

    to: str
    path: Path | None = None
    text: str = ""

    @property
    def bytes(self) -> int:
        return self.path.stat().st_size if self.path is not None else len(self.text.encode())


def uploads(facts: Facts) -> list[Upload]:
    """Every file that goes up: the export without the work of its making, then report and scores, then the card."""
    if facts.model is None:
        raise InputError(f"{facts.run} holds no export to upload; make one first")
    inside = [f for f in sorted(facts.model.rglob("*")) if f.is_file()]
    names = {f: f.relative_to(facts.model) for f in inside}
    weights = [
        Upload(str(name), file)
        for file, name in names.items()
        if name.parts[0] != WORK and not any(part.startswith(".") for part in name.parts) and str(name) != "README.md"
    ]
    work = places(Path(facts.run))[0]
    beside = [Upload(f"{WORK}/{name}", work / name) for name in BESIDE if (work / name).exists()]
    results = [Upload(name, text=text) for name, text in eval_results(facts).items()]
    return [*weights, *beside, *results, Upload("README.md", facts.model / "README.md")]


def push(
    facts: Facts, repository: str, files: Sequence[Upload], public: bool, api: Any = None, quiet: bool = False
) -> str:
    """Upload `files` to `repository`, private unless told; returns its address.

    The export is verified first, as it lies there now, against its source where that still stands. Raises
    `CheckError` when a check does not hold, and then nothing has been uploaded.
    """
    check_name(repository)
    assert facts.model is not None
    source = Checkpoint.open(Path(facts.source["model"])) if facts.before is not None else None
    verdict = verify(facts.model, source, quiet)
    if not verdict.holds:
        raise CheckError(
            f"{facts.model} does not verify: {verdict.findings[0]} ({len(verdict.findings)} findings); nothing was uploaded"
        )
    api = api or HfApi()
    api.create_repo(repository, private=not public, exist_ok=True)
    weights = [f.to for f in files if f.path is not None and f.path.is_relative_to(facts.model) and f.to != "README.md"]
    api.upload_folder(
        repo_id=repository,
        folder_path=facts.model,
        allow_patterns=[f for f in weights if not f.startswith(f"{WORK}/")],
        commit_message="Weights",
    )
    rest = [f for f in files if f.to not in weights or f.to.startswith(f"{WORK}/")]
    operations = [CommitOperationAdd(f.to, f.path if f.path is not None else f.text.encode()) for f in rest]
    api.create_commit(repository, operations, commit_message="Card, report and scores")
    return f"https://huggingface.co/{repository}"


def check_name(repository: str) -> None:
    """Raises `InputError` for what the Hub would not take as a name."""
    try:
        validate_repo_id(repository)
    except ValueError as error:
        raise InputError(f"{repository!r} is no name of a repository: {error}") from error
    if "/" not in repository:
        raise InputError(f"{repository!r} names no owner; write ORGANISATION/NAME")
