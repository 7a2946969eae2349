"""One OpenAI-compatible server, over HTTP. Leaves out what its answers mean (scores.py), streaming and retries."""

import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InputError

PATIENCE_SECONDS = 3600.0  # a long prompt on a small machine


@dataclass(frozen=True)
class Server:
    """`url` is what comes before /completions: http://127.0.0.1:8000/v1."""

    url: str
    model: str
    key: str = ""

    @staticmethod
    def open(url: str, key: str = "") -> "Server":
        """Ask which model is served. Of several, the first. Raises `InputError` for no server, no model, speculative decoding."""
        server = Server(url.rstrip("/"), "", key)
        models = [str(entry["id"]) for entry in server.call("/models").get("data", [])]
        if not models:
            raise InputError(f"{url} serves no model; wanted one")
        if (drafts := server.speculation()) is not None:
            raise InputError(
                f"{url} decodes speculatively ({drafts}), and then a prompt's log-probabilities may be the draft model's; "
                "start it without"
            )
        return Server(server.url, models[0], key)

    def call(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """POST `body`, or GET. Raises `InputError` with the server's own words where it refuses."""
        try:
            return dict(json.loads(self.text(f"{self.url}{path}", body)))
        except urllib.error.HTTPError as error:
            words = error.read().decode(errors="replace")[:300]
            raise InputError(f"{self.url}{path} answers {error.code}: {words}") from error
        except (OSError, ValueError) as error:
            raise InputError(
                f"{self.url}{path} gives no answer that can be read ({error}); is the server up?"
            ) from error

    def text(self, url: str, body: Mapping[str, Any] | None = None) -> str:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, headers)
        with urllib.request.urlopen(request, timeout=PATIENCE_SECONDS) as answer:
            return str(answer.read().decode())

    def speculation(self) -> str | None:
        """The metric that betrays speculative decoding; None where there is none, or there are no metrics."""
        try:
            metrics = self.text(f"{self.url.removesuffix('/v1')}/metrics")
        except (OSError, ValueError):
            return None
        return next((line.split("{")[0] for line in metrics.splitlines() if line.startswith("vllm:spec_decode")), None)

    def prompt_logprobs(self, ids: Sequence[int]) -> list[tuple[float, bool]]:
        """ln p of each token but the first, and whether it was the first choice.

        Raises `InputError` for a server that does not tell them: some leave `echo` unread.
        """
        body = {
            "model": self.model,
            "prompt": list(ids),
            "max_tokens": 1,
            "echo": True,
            "logprobs": 1,
            "temperature": 0,
        }
        choice = self.call("/completions", body).get("choices", [{}])[0]
        told = choice.get("logprobs") or {}
        each, tops = told.get("token_logprobs") or [], told.get("top_logprobs") or []
        if len(each) < len(ids) or len(tops) < len(ids):
            raise InputError(
                f"{self.url} tells {len(each)} log-probabilities of a prompt of {len(ids)} tokens; wanted a server that "
                "honours echo and logprobs in /completions, as vLLM does"
            )
        return [(float(each[t]), float(each[t]) >= max(tops[t].values())) for t in range(1, len(ids))]

    def chat(self, messages: Sequence[Mapping[str, Any]], **more: Any) -> str:
        """The answer to a conversation: its text, and its tool calls as JSON behind it."""
        answer = self.call("/chat/completions", {"model": self.model, "messages": list(messages), **more})
        message = answer["choices"][0]["message"]
        calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls") or ()]
        thought = message.get("reasoning") or message.get("reasoning_content") or ""
        return "\n".join(part for part in (thought, message.get("content") or "", *calls) if part)

    def complete(self, prompt: str, **more: Any) -> str:
        return str(self.call("/completions", {"model": self.model, "prompt": prompt, **more})["choices"][0]["text"])
