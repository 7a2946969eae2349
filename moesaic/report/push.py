"""Putting an export on the Hub: first what would be uploaded, then, if told, the upload. Never one that does not verify.

The weights go first and the card last, in a commit of its own, so that a page never describes what is not there.
An interrupted upload goes on when the same call is made again: huggingface_hub skips what has arrived.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HTTPError  # of the HTTP library that this version of the client has
from huggingface_hub.utils import validate_repo_id

from ..checkpoint import Checkpoint
from ..errors import InputError
from ..files import walk
from ..plan.pieces import NOTE
from ..verify import verify
from .card import eval_results
from .facts import WORK, Facts, places

BESIDE = ("report.html", "scores.json", "scores.csv")  # of a run: what the card refers to
CARD = "README.md"


@dataclass(frozen=True)
class Upload:
    """One file: where it lies and where it goes. `text` instead of a path where it lies nowhere yet."""

    to: str
    path: Path | None = None
    text: str = ""
    is_first: bool = False  # of the model itself: everything else is about it, and follows

    @property
    def bytes(self) -> int:
        return self.path.stat().st_size if self.path is not None else len(self.text.encode())


def uploads(facts: Facts) -> list[Upload]:
    """Every file that goes up: the export without the work of its making, then report and scores, then the card."""
    if facts.model is None:
        raise InputError(f"{facts.run} holds no export to upload; make one first")
    model = [
        Upload(str(name), facts.model / name, is_first=True)
        for name in (f.relative_to(facts.model) for f in walk(facts.model, WORK))
        if str(name) != CARD
    ]
    work = places(Path(facts.run))[0]
    beside = [Upload(f"{WORK}/{name}", work / name) for name in BESIDE if (work / name).exists()]
    if (facts.model / NOTE).exists():
        beside.append(Upload(NOTE, facts.model / NOTE))
    results = [Upload(name, text=text) for name, text in eval_results(facts).items()]
    return [*model, *beside, *results, Upload(CARD, facts.model / CARD)]


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
    verdict.require(facts.model, "nothing was uploaded")
    api = api or HfApi()
    first = [f.to for f in files if f.is_first]
    rest = [CommitOperationAdd(f.to, f.path or f.text.encode()) for f in files if not f.is_first]
    try:
        api.create_repo(repository, private=not public, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=facts.model, allow_patterns=first, commit_message="Model")
        api.create_commit(repository, rest, commit_message="Card, report and scores")
    except (HTTPError, OSError) as error:
        raise InputError(
            f"the Hub did not take {repository} ({error}); log in with `hf auth login`, and the same call goes on"
        ) from error
    return f"https://huggingface.co/{repository}"


def check_name(repository: str) -> None:
    """Raises `InputError` for what the Hub would not take as a name."""
    try:
        validate_repo_id(repository)
    except ValueError as error:
        raise InputError(f"{repository!r} is not a valid repository name: {error}") from error
    if "/" not in repository:
        raise InputError(f"{repository!r} names no owner; write ORGANISATION/NAME")
