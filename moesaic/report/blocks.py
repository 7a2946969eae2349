"""What a section of the page is made of: a few kinds of blocks. How each is set in type is blocks.html's."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from markupsafe import Markup

Text = str | Markup  # a str is escaped, a Markup is taken as it is


@dataclass(frozen=True)
class Heading:
    text: Text
    kind: ClassVar[str] = "heading"


@dataclass(frozen=True)
class Words:
    """A paragraph. `tone` is "", "good" or "bad"."""

    text: Text
    tone: str = ""
    kind: ClassVar[str] = "words"


@dataclass(frozen=True)
class Drawing:
    """A plot or a mosaic, and what it shows."""

    svg: Markup
    caption: Text = ""
    kind: ClassVar[str] = "drawing"


@dataclass(frozen=True)
class Table:
    """Rows of text under `head`. A narrow page leaves out the columns `optional`; `chosen` is a row to stress."""

    head: Sequence[Text]
    rows: Sequence[Sequence[Text]]
    optional: Sequence[int] = ()
    left: Sequence[int] = (0,)  # columns of words; all others are of figures
    chosen: int | None = None
    has_total: bool = False  # the last row is the sum
    kind: ClassVar[str] = "table"


@dataclass(frozen=True)
class Items:
    """A list of sentences."""

    texts: Sequence[Text]
    plain: bool = False
    kind: ClassVar[str] = "items"


@dataclass(frozen=True)
class Pairs:
    """Names and what they stand for."""

    rows: Sequence[tuple[Text, Text]]
    kind: ClassVar[str] = "pairs"


@dataclass(frozen=True)
class Code:
    text: str
    kind: ClassVar[str] = "code"


@dataclass(frozen=True)
class Beside:
    """Texts side by side, under one line: a prompt, and what each model made of it."""

    title: Text
    texts: Sequence[tuple[Text, Text]]
    note: Text = ""
    kind: ClassVar[str] = "beside"


Block = Heading | Words | Drawing | Table | Items | Pairs | Code | Beside


@dataclass(frozen=True)
class Section:
    """One part of the page: its name and what it means at the left, what it shows at the right."""

    title: str
    aside: Sequence[Text]
    blocks: Sequence[Block]

    @property
    def anchor(self) -> str:
        return "-".join(self.title.lower().replace(",", "").replace(":", "").split())


def two_lines(first: Text, second: Text) -> Markup:
    """A cell whose second line is small."""
    return Markup("{}<small>{}</small>").format(first, second) if second else Markup.escape(first)
