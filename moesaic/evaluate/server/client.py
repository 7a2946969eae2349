"""One OpenAI-compatible server, over HTTP. Leaves out what its answers mean (scores.py), streaming and retries."""

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import InputError
from .reply import Told, Word, choice_of, told

PATIENCE_SECONDS = 3600.0  # a long prompt on a small machine
MOST_BYTES = 1 << 30  # of an answer


@dataclass(frozen=True)
class Server:
    """`url` is what comes before /completions: http://127.0.0.1:8000/v1."""

    url: str
    model: str
    key: str = ""

    @staticmethod
    def open(url: str, key: str = "") -> "Server":
        """Ask which model is served. Of several, the first. Raises `InputError` for no server, no model, speculative decoding."""
        if not url.startswith(("http://", "https://")):
            raise InputError(f"{url} is not a server's address; wanted one like http://127.0.0.1:8000/v1")
        server = Server(url.rstrip("/"), "", key)
        found = server.call("/models").get("data")
        listed = found if isinstance(found, list) else []
        models = [entry.get("id") if isinstance(entry, Mapping) else None for entry in listed]
        if not models or not isinstance(models[0], str) or not models[0]:
            raise InputError(f"{url} serves no model; wanted one under an id in {url}/models")
        if (drafts := server.speculation()) is not None:
            raise InputError(
                f"{url} decodes speculatively ({drafts}), and then a prompt's log-probabilities may be the draft model's; "
                "start it without"
            )
        return Server(server.url, models[0], key)

    def call(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """POST `body`, or GET. Raises `InputError` with the server's own words where it refuses."""
        try:
            found = json.loads(self.text(f"{self.url}{path}", body))
        except urllib.error.HTTPError as error:
            words = error.read().decode(errors="replace")[:300]
            raise InputError(f"{self.url}{path} answers {error.code}: {words}") from error
        except (OSError, ValueError, RecursionError, http.client.HTTPException) as error:
            words = str(error) or type(error).__name__
            raise InputError(
                f"{self.url}{path} gives no answer that can be read ({words}); is the server up?"
            ) from error
        if not isinstance(found, dict):
            raise InputError(f"{self.url}{path} answers {json.dumps(found)[:80]}; wanted a JSON object")
        return found

    def text(self, url: str, body: Mapping[str, Any] | None = None) -> str:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, headers)
        with urllib.request.urlopen(request, timeout=PATIENCE_SECONDS) as answer:
            raw = answer.read(MOST_BYTES + 1)
        if len(raw) > MOST_BYTES:
            raise ValueError(f"more than {MOST_BYTES:,} bytes")
        return str(raw.decode())

    def speculation(self) -> str | None:
        """The metric that betrays speculative decoding; None where there is none, or there are no metrics."""
        try:
            metrics = self.text(f"{self.url.removesuffix('/v1')}/metrics")
        except (OSError, ValueError, http.client.HTTPException):
            return None
        return next((line.split("{")[0] for line in metrics.splitlines() if line.startswith("vllm:spec_decode")), None)

    def prompt_logprobs(self, ids: Sequence[int], word: Word) -> Told:
        """ln p of each token but the first, and whether it was the first choice. `word` gives the text of a token.

        Raises `InputError` for a server that does not tell them: some leave `echo` unread.
        """
        body = {
            "model": self.model,
            "prompt": list(ids),
            "max_tokens": 1,
            "echo": True,
            "logprobs": 1,
            "temperature": 0,
            "return_tokens_as_token_ids": True,  # vLLM's; others name tokens by their words
        }
        return told(self.call("/completions", body), ids, word, self.url)

    def chat(self, messages: Sequence[Mapping[str, Any]], **more: Any) -> str:
        """The answer to a conversation: its text, and its tool calls as JSON behind it."""
        answer = self.call("/chat/completions", {"model": self.model, "messages": list(messages), **more})
        message = choice_of(answer, self.url).get("message")
        if not isinstance(message, Mapping):
            raise InputError(
                f"{self.url}/chat/completions answers without a message; wanted one, as OpenAI's API has it"
            )
        calls = message.get("tool_calls")
        made = [call.get("function") for call in calls if isinstance(call, Mapping)] if isinstance(calls, list) else []
        thought = message.get("reasoning") or message.get("reasoning_content")
        parts = [thought, message.get("content"), *(json.dumps(call, ensure_ascii=False) for call in made if call)]
        return "\n".join(part for part in parts if isinstance(part, str) and part)

    def complete(self, prompt: str, **more: Any) -> str:
        answer = self.call("/completions", {"model": self.model, "prompt": prompt, **more})
        text = choice_of(answer, self.url).get("text")
        if not isinstance(text, str):
            raise InputError(f"{self.url}/completions answers without a text; wanted one, as OpenAI's API has it")
        return text
