"""The words of an answer: around what it thinks, and around the tools that it calls.

Leaves out reading them (serve/local) and writing them, which is the chat template's.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Markup:
    """How a chat template writes the tool calls of an answer: a block of them, each with its values.

    In a tag {} stands for a name. A string is written as it is. Anything else is JSON, or where `nested`, elements
    as the values themselves are: an object's after its members but for null ones, a list's all called "item".
    """

    block: tuple[str, str]  # around all calls; empty where each stands by itself
    call: tuple[str, str]
    value: tuple[str, str] = ("", "")
    gaps: tuple[str, str, str, str] = ("", "", "", "")  # after an opened block or call, a closed value or call
    mark: str = ""  # that every tag begins with
    nested: bool = False
    json: bool = False  # a call holds one JSON object: its arguments, or if its tag has no {}, its name beside them
    numbered: bool = False  # a name is followed by a colon and the call's number


@dataclass(frozen=True)
class Talk:
    """How an answer says what it thinks and which tools it calls; by default a family has words for neither.

    sign              a word of the chat template by which models are known that talk so
    tool_parser       vLLM's name for the reader of these calls, and
    reasoning_parser  of thoughts; "" where there are none
    """

    think: tuple[str, str] = ("", "")  # the words around it
    calls: Markup = Markup(("", ""), ("", ""))
    sign: str = ""
    tool_parser: str = ""
    reasoning_parser: str = ""

    @property
    def words(self) -> str:
        """Every word of these, in one string."""
        return " ".join((*self.think, *self.calls.block, *self.calls.call, *self.calls.value))
