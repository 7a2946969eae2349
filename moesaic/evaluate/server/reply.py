"""What a server tells of a prompt, token by token: which of its entries belongs to which token, and whether to believe it.

A server may put a token before the prompt (its own BOS), leave the first entry out, or read the prompt as other
tokens. The entries are laid on the tokens that were asked by their ids, where the server names them, else by their
words, else by the count of tokens that it says it has read. Leaves out the wire (client.py).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import InputError

Word = Callable[[int], str]  # a token id -> its text
ID = "token_id:"  # before the id where a token is named by it
SHIFTS = (0, 1, -1)  # entries before that of the first token asked
ALIKE = 0.9  # of a prompt's words; servers spell the odd one otherwise
NONE = -9999.0  # what vLLM says for minus infinity
SLACK = 0.01  # above zero, from rounding
SPACES = str.maketrans("\u0120\u2581\u010a", "  \n")  # how vocabularies write a space and an end of line


@dataclass(frozen=True)
class Told:
    """Of each token but the first: ln p, and whether it was the first choice. `before`: tokens put before the prompt."""

    tokens: tuple[tuple[float, bool], ...]
    before: int


def told(answer: Mapping[str, Any], ids: Sequence[int], word: Word, url: str) -> Told:
    """What an answer of /completions with `echo` says of the prompt `ids`. Raises `InputError` for what cannot be believed."""
    logprobs = choice_of(answer, url).get("logprobs")
    logprobs = logprobs if isinstance(logprobs, Mapping) else {}
    each, tops = logprobs.get("token_logprobs"), logprobs.get("top_logprobs")
    if not isinstance(each, list) or not isinstance(tops, list) or len(each) < len(ids) - 1:
        raise InputError(
            f"{url} tells {len(each) if isinstance(each, list) else 0} log-probabilities of a prompt of {len(ids)} tokens; "
            "wanted a server that honours echo and logprobs in /completions, as vLLM does"
        )
    shift = shift_of(answer, logprobs, ids, word, url)
    if shift + len(ids) > min(len(each), len(tops)):
        raise InputError(f"{url} stops telling log-probabilities at token {len(each) - shift} of {len(ids)}")
    return Told(tuple(entry(each, tops, shift + t, t, url) for t in range(1, len(ids))), max(0, shift))


def entry(each: Sequence[Any], tops: Sequence[Any], at: int, token: int, url: str) -> tuple[float, bool]:
    own, top = each[at], tops[at]
    values = list(top.values()) if isinstance(top, Mapping) else []
    for value in (own, *values):
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not NONE < value <= SLACK:
            raise InputError(
                f"{url} tells {value!r} of token {token} of the prompt, which is not a log-probability; "
                "the model's logits there are NaN or infinite, or the server leaves some out"
            )
    if not values:
        raise InputError(f"{url} does not name the likeliest token {token} of the prompt; wanted top_logprobs of each")
    return float(own), float(own) >= max(values)


def shift_of(answer: Mapping[str, Any], logprobs: Mapping[str, Any], ids: Sequence[int], word: Word, url: str) -> int:
    """Where the entry of the first token stands; -1 where it is left out."""
    names = logprobs.get("tokens")
    if isinstance(names, list) and names:
        scores = {shift: alike(names, ids, word, shift) for shift in SHIFTS}
        best = max(scores.values())
        found = [shift for shift in SHIFTS if scores[shift] == best]
        if best >= ALIKE and len(found) == 1:
            return found[0]
        if best < ALIKE:
            raise InputError(
                f"{url} read the prompt as other tokens than were asked ({str(names[:3])[:80]} …); "
                "wanted the model of this export, with its own tokenizer, and a server that takes token ids"
            )
    usage = answer.get("usage")
    count = usage.get("prompt_tokens") if isinstance(usage, Mapping) else None
    if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count - len(ids) <= 1:
        raise InputError(
            f"{url} says it read {count} tokens of a prompt of {len(ids)}"
            if count is not None
            else f"{url} names neither the tokens nor their count, so its log-probabilities may belong to others"
        )
    return count - len(ids)


def alike(names: Sequence[Any], ids: Sequence[int], word: Word, shift: int) -> float:
    """Share of the tokens asked that stand under their own name, from `shift` on. Of ids, all or none."""
    pairs = [(names[shift + t], id) for t, id in enumerate(ids) if 0 <= shift + t < len(names)]
    if len(pairs) < len(ids) - (shift < 0):
        return 0.0
    if all(isinstance(name, str) and name.startswith(ID) for name, _ in pairs):
        return float(all(name == f"{ID}{id}" for name, id in pairs))
    words = [(plain(name), plain(word(id))) for name, id in pairs]
    whole = [told == own for told, own in words if "\ufffd" not in own]  # a part of a character has no word of its own
    return sum(whole) / len(whole) if whole else 0.0


def plain(word: Any) -> str:
    return str(word).translate(SPACES)


def choice_of(answer: Mapping[str, Any], url: str) -> Mapping[str, Any]:
    """The first choice. Raises `InputError` where there is none."""
    choices = answer.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], Mapping):
        said = answer.get("error") or answer
        raise InputError(f"{url} answers without a choice: {str(said)[:200]}; wanted one, as OpenAI's API has it")
    return choices[0]
