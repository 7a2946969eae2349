"""What a file of this folder holds: one part of the page, and where on the page it stands."""

from collections.abc import Callable
from dataclasses import dataclass

from ..blocks import Section
from ..facts import Facts


@dataclass(frozen=True)
class Part:
    """`section` makes the part of what a run has to tell; None where the run has nothing of the kind."""

    name: str
    place: int  # the least stands first
    section: Callable[[Facts], Section | None]
