"""served/: our own sweep is the truth for what a server tells; servers that cannot be believed are refused."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from test_evaluate import text_rows

from moesaic.artifact import read_tensors
from moesaic.checkpoint import Checkpoint
from moesaic.errors import InputError, StaleError
from moesaic.evaluate import Reading, evaluate
from moesaic.evaluate.needle import haystacks
from moesaic.served import Server, read, score, writer
from moesaic.served import swept as swept_values
from moesaic.spots import PROMPTS
from moesaic.stream import LayerRun, State
from moesaic.tokenizer import Tokenizer

Answer = Callable[[str, dict[str, Any] | None], Any]


@contextmanager
def serving(answer: Answer) -> Iterator[str]:
    """A server on a free port of loopback whose every answer is `answer(path, body)`; a str is sent as it is."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply(None)

        def do_POST(self) -> None:
            self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def reply(self, body: dict[str, Any] | None) -> None:
            found = answer(self.path, body)
            sent = (found if isinstance(found, str) else json.dumps(found)).encode()
            self.send_response(404 if found is None else 200)
            self.end_headers()
            self.wfile.write(sent)

        def log_message(self, *ignored: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def streaming(checkpoint: Checkpoint) -> Answer:
    """Prompt log-probabilities as vLLM tells them, from a real forward pass."""
    lock = threading.Lock()

    def answer(path: str, body: dict[str, Any] | None) -> Any:
        if path == "/v1/models":
            return {"data": [{"id": "it"}]}
        if path != "/v1/completions" or body is None or not (body["echo"] and body["max_tokens"] == 1):
            return None
        with lock:
            run, ids = LayerRun(checkpoint, "cpu"), torch.tensor(body["prompt"])
            *_, (_, after) = run.sweep([State(run.embed(ids[None]))])
            log_p = run.logits(after[0].hidden_BTD[0]).log_softmax(-1)
        each, tops = [None], [None]
        for t in range(1, len(ids)):
            best, own = int(log_p[t - 1].argmax()), int(ids[t])
            each.append(float(log_p[t - 1, own]))
            tops.append({f"id {i}": float(log_p[t - 1, i]) for i in {best, own}})
        return {
            "choices": [
                {"text": "", "logprobs": {"token_logprobs": [*each, -1.0], "top_logprobs": [*tops, {"x": -1.0}]}}
            ]
        }

    return answer


def test_what_a_server_tells_is_what_a_sweep_gives(m3: Checkpoint, tmp_path: Path) -> None:
    a, tokenizer = m3.architecture, Tokenizer.open(m3.path)
    readings = [Reading.of(text_rows(m3))]
    readings += haystacks(tokenizer, [260], vocab=a.vocab, context=a.context, depths=(0.5,), samples=1)
    swept = evaluate(m3, m3, readings, tmp_path, floor=False, device="cpu", quiet=True)
    values, _ = read_tensors(tmp_path / "scores.safetensors", "token_scores")
    with serving(streaming(m3)) as url:
        server = Server.open(url)
        found = score(readings, read(server, readings, quiet=True), values)
        left = swept_values(tmp_path / "scores.safetensors", m3, readings)
        assert left.keys() == {name for name in values if "@" not in name} and len(left) > 10
        other = replace(readings[0], ids_BT=readings[0].ids_BT.flip(0))
        left = swept_values(tmp_path / "scores.safetensors", m3, [other, readings[1]])
        assert left and all(name.startswith(readings[1].name) for name in left)
        assert swept_values(tmp_path / "none.safetensors", m3, readings) == {}
        with pytest.raises(StaleError, match="was made from export"):
            swept_values(tmp_path / "scores.safetensors", replace(m3, config={}), readings)
    assert server.model == "it"
    served = {(s.name, s.part): s for s in found}
    ppl = swept.find("ppl_export")
    assert ppl is not None and served["ppl_served", ""].value == pytest.approx(ppl.value, rel=1e-4)
    assert (
        served["ppl_served", ""].error == pytest.approx(ppl.error, rel=1e-3)
        and served["ppl_served", ""].tokens == ppl.tokens
    )
    delta = served["served_delta_nll", ""]
    assert abs(delta.value or 0) < 1e-5 and delta.tokens == ppl.tokens and delta.activations == "served"
    for part in ("depth 50%", "control"):
        ours = swept.find("needle_log_p_export", part)
        assert ours is not None and served["needle_log_p_served", part].value == pytest.approx(ours.value, abs=1e-4)
        same = swept.find("needle_found_export", part)
        assert same is not None and served["needle_found_served", part].value == same.value


def told(**logprobs: Any) -> Answer:
    choices = {"choices": [{"text": "hm", "logprobs": logprobs or None}]}
    return lambda path, body: {"data": [{"id": "it"}]} if path == "/v1/models" else choices if body else None


def test_servers_that_cannot_be_believed_are_refused() -> None:
    with serving(told()) as url, pytest.raises(InputError, match="tells 0 log-probabilities of a prompt of 3"):
        Server.open(url).prompt_logprobs([1, 2, 3])
    short = told(token_logprobs=[-1.0], top_logprobs=[{"a": -1.0}])
    with serving(short) as url, pytest.raises(InputError, match="honours echo"):
        Server.open(url).prompt_logprobs([1, 2, 3])
    with serving(lambda path, body: {"data": []}) as url, pytest.raises(InputError, match="serves no model"):
        Server.open(url)
    drafts = {"/v1/models": {"data": [{"id": "it"}]}, "/metrics": "# x\nvllm:spec_decode_num_drafts_total{a=1} 3\n"}
    with serving(lambda path, body: drafts.get(path)) as url, pytest.raises(InputError, match="speculatively"):
        Server.open(url)
    with pytest.raises(InputError, match="is the server up"):
        Server.open("http://127.0.0.1:9/v1")


def test_spot_checks_go_by_chat_with_tools_or_by_completion() -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def answer(path: str, body: dict[str, Any] | None) -> Any:
        if body is None:
            return {"data": [{"id": "it"}]} if path == "/v1/models" else None
        asked.append((path, body))
        if path.endswith("/chat/completions"):
            call = {"type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Lisbon"}'}}
            return {"choices": [{"message": {"content": None, "reasoning": "hm", "tool_calls": [call]}}]}
        return {"choices": [{"text": " plain"}]}

    tool = [p for p in PROMPTS if p.tools]
    with serving(answer) as url:
        by_chat, by_completion = (writer(Server.open(url), chat)(tool, 7, 0.0) for chat in (True, False))
    assert "get_weather" in by_chat[0] and by_completion == [" plain"]
    assert asked[0][1]["tools"][0]["function"]["name"] == "get_weather" and asked[0][1]["max_tokens"] == 7
    assert asked[1][0] == "/v1/completions" and asked[1][1]["prompt"] == tool[0].text
