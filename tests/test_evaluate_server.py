"""served/: our own sweep is the truth for what a server tells; servers that cannot be believed are refused."""

import json
import math
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import local_server
import pytest
import torch
from forward import final
from test_evaluate import text_rows

from moesaic.artifact import read_tensors
from moesaic.checkpoint import Checkpoint
from moesaic.cli import main
from moesaic.data.tokenizer import Tokenizer
from moesaic.errors import InputError, StaleError
from moesaic.evaluate import Conditions, Reading, evaluate
from moesaic.evaluate.samples import PROMPTS
from moesaic.evaluate.scores.needle import haystacks
from moesaic.evaluate.server import Server, read, score, writer
from moesaic.evaluate.server import swept as swept_values
from moesaic.serve.local import local
from moesaic.stream import LayerRun, State

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


def streaming(checkpoint: Checkpoint, bos: tuple[int, ...] = (), as_ids: bool = True) -> Answer:
    """Prompt log-probabilities as vLLM tells them, from a real forward pass; `bos` goes before every prompt."""
    lock, tokenizer = threading.Lock(), Tokenizer.open(checkpoint.path)

    def name(id: int) -> str:
        return f"token_id:{id}" if as_ids else tokenizer.inner.decode([id], skip_special_tokens=False)

    def answer(path: str, body: dict[str, Any] | None) -> Any:
        if path == "/v1/models":
            return {"data": [{"id": "it"}]}
        if path != "/v1/completions" or body is None or not (body["echo"] and body["max_tokens"] == 1):
            return None
        with lock:
            run, ids = LayerRun(checkpoint, "cpu"), torch.tensor([*bos, *body["prompt"]])
            after = final(run, [State(run.embed(ids[None]))])
            log_p = run.logits(after[0].hidden_BTD[0]).log_softmax(-1)
        each, tops = [None], [None]
        for t in range(1, len(ids)):
            best, own = int(log_p[t - 1].argmax()), int(ids[t])
            each.append(float(log_p[t - 1, own]))
            tops.append({f"id {i}": float(log_p[t - 1, i]) for i in {best, own}})
        logprobs = {
            "tokens": [*map(name, ids.tolist()), "x"],
            "token_logprobs": [*each, -1.0],
            "top_logprobs": [*tops, {"x": -1.0}],
        }
        return {"choices": [{"text": "", "logprobs": logprobs}], "usage": {"prompt_tokens": len(ids)}}

    return answer


def test_what_a_server_tells_is_what_a_sweep_gives(m3: Checkpoint, tmp_path: Path) -> None:
    readings = [Reading.of(text_rows(m3))]
    readings += haystacks(m3, [260], depths=(0.5,), samples=1)
    swept = evaluate(m3, m3, readings, tmp_path, Conditions(floor=False, device="cpu"), quiet=True)
    values, _ = read_tensors(tmp_path / "scores.safetensors", "token_scores")
    with serving(streaming(m3)) as url:
        server = Server.open(url)
        divergences, before = read(server, readings, words(m3), quiet=True)
        found = score(readings, divergences, values)
        assert before == 0
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


def words(checkpoint: Checkpoint) -> Callable[[int], str]:
    tokenizer = Tokenizer.open(checkpoint.path)
    return lambda id: str(tokenizer.inner.decode([id], skip_special_tokens=False))


@pytest.mark.parametrize("as_ids", [True, False])
def test_a_token_that_the_server_puts_before_the_prompt_is_passed_over(m3: Checkpoint, as_ids: bool) -> None:
    """What it tells of each token then is what a sweep of the rows with that token gives."""
    plain = Reading.of(text_rows(m3))
    bos = 7
    run = LayerRun(m3, "cpu")
    ids_BT = torch.cat([torch.full((len(plain.ids_BT), 1), bos), plain.ids_BT], 1)
    after = final(run, [State(run.embed(ids_BT))])
    log_p = torch.stack([run.logits(hidden_TD) for hidden_TD in after[0].hidden_BTD]).log_softmax(-1)
    wanted = -log_p[:, 1:-1].gather(-1, plain.ids_BT[:, 1:, None])[..., 0]
    with serving(streaming(m3, (bos,), as_ids)) as url:
        (found,), before = read(Server.open(url), [plain], words(m3), quiet=True)
    assert before == 1
    torch.testing.assert_close(torch.as_tensor(found["nll_export"]).float(), wanted.float(), rtol=1e-4, atol=1e-4)


def test_our_own_server_tells_what_a_sweep_gives(m3: Checkpoint, tmp_path: Path) -> None:
    reading = Reading.of(text_rows(m3))
    conditions = Conditions(floor=False, device="cpu")
    swept = evaluate(m3, m3, [reading], tmp_path, conditions, quiet=True)
    values, _ = read_tensors(tmp_path / "scores.safetensors", "token_scores")
    with local_server.serving(local(m3)) as running:
        divergences, before = read(Server.open(f"{running.url}/v1"), [reading], words(m3), quiet=True)
    served = {s.name: s for s in score([reading], divergences, values) if not s.part}
    ppl = swept.find("ppl_export")
    assert ppl is not None and served["ppl_served"].value == pytest.approx(ppl.value, rel=1e-4)
    assert before == 0 and abs(served["served_delta_nll"].value or 0) < 1e-5


def test_the_command_asks_our_own_server(m3: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "squares.txt").write_text("\n".join(f"{i} and {i * i}" for i in range(3000)))
    with local_server.serving(local(m3)) as running:
        words = ["evaluate", m3.path, "--server", f"{running.url}/v1", "--data", tmp_path / "data", "--length", 32]
        assert main([*map(str, words), "--tokens", "64", "--out", str(tmp_path / "out"), "--json", "--quiet"]) == 0
    assert "ppl_served" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "served.json").read_text())["tokens_before"] == 0


# Servers that misbehave -----------------------------------------------------------------------------------------------

ASKED = [1, 2, 3]  # the words b, c and d
GOOD = {
    "tokens": ["b", "c", "d", "!"],
    "token_logprobs": [None, -1.0, -2.0, -0.5],
    "top_logprobs": [None, {"c": -1.0}, {"x": -0.5, "d": -2.0}, {"!": -0.5}],
}
RIGHT = ((-1.0, True), (-2.0, False))


def letter(id: int) -> str:
    return "abcdefgh"[id]


def ask(found: Any, ids: list[int] = ASKED) -> Any:
    """What a server whose every completion is `found` is read as."""
    models = {"data": [{"id": "it"}]}
    with serving(lambda path, body: models if path == "/v1/models" else found if body else None) as url:
        return Server.open(url).prompt_logprobs(ids, letter)


def saying(usage: Any = None, **changed: Any) -> dict[str, Any]:
    logprobs = {name: value for name, value in (GOOD | changed).items() if value != "absent"}
    return {"choices": [{"text": "hm", "logprobs": logprobs}]} | ({"usage": usage} if usage else {})


def shifted(*before: Any) -> dict[str, Any]:
    return {name: [one, *GOOD[name]] for name, one in zip(GOOD, before)}


ALIGNED = [
    (saying(), 0),
    (saying(tokens=["token_id:1", "token_id:2", "token_id:3", "token_id:9"]), 0),
    (saying(**shifted("<s>", None, None)), 1),
    (saying(**shifted("token_id:8", None, None) | {"tokens": [f"token_id:{i}" for i in (8, 1, 2, 3, 9)]}), 1),
    (saying({"prompt_tokens": 4}, **shifted("", None, None) | {"tokens": "absent"}), 1),
    (saying({"prompt_tokens": 3}, tokens="absent"), 0),
    (saying(**{name: values[1:] for name, values in GOOD.items()}), 0),  # without the first, which has none
    (saying(**{name: values[:-1] for name, values in GOOD.items()}), 0),  # without the new token
    (saying(token_logprobs=[-3.0, -1.0, -2.0, -0.5]), 0),
]


@pytest.mark.parametrize(("answer", "before"), ALIGNED)
def test_entries_are_laid_on_the_tokens_that_were_asked(answer: Any, before: int) -> None:
    told = ask(answer)
    assert told.tokens == RIGHT and told.before == before


def test_a_prompt_of_one_word_repeated_needs_a_count() -> None:
    same = {
        "tokens": ["b"] * 5,
        "token_logprobs": [None, -9.0, -1.0, -2.0, -0.5],
        "top_logprobs": [None, *({"c": -0.5} for _ in range(4))],
    }
    assert ask(saying({"prompt_tokens": 4}, **same), [1, 1, 1]).tokens == ((-1.0, False), (-2.0, False))
    with pytest.raises(InputError, match="names neither the tokens nor their count"):
        ask(saying(**same), [1, 1, 1])


REFUSED = [
    ({}, "answers without a choice"),
    ({"choices": []}, "answers without a choice"),
    ({"choices": None}, "answers without a choice"),
    ({"choices": [None]}, "answers without a choice"),
    ({"error": {"message": "out of memory"}}, "out of memory"),
    ([], r"answers \[\]; wanted a JSON object"),
    ("null", "answers null; wanted a JSON object"),
    ("hm", "no answer that can be read"),
    ("[" * 100_000, "no answer that can be read"),
    ({"choices": [{"text": "hm"}]}, "tells 0 log-probabilities of a prompt of 3"),
    ({"choices": [{"logprobs": None}]}, "tells 0 log-probabilities"),
    ({"choices": [{"logprobs": []}]}, "tells 0 log-probabilities"),
    (saying(token_logprobs=None), "tells 0 log-probabilities"),
    (saying(top_logprobs=None), "honours echo and logprobs"),
    (saying(token_logprobs=[-1.0]), "tells 1 log-probabilities of a prompt of 3 tokens"),
    (
        saying(token_logprobs=[None, -1.0], top_logprobs=[None, {"c": -1.0}]),
        "stops telling log-probabilities at token 2 of 3",
    ),
    (
        saying(token_logprobs=[None, None, -2.0, -1.0]),
        "tells None of token 1 of the prompt, which is not a log-probability",
    ),
    (saying(token_logprobs=[None, -9999.0, -2.0, -1.0]), "tells -9999.0 of token 1"),
    (saying(token_logprobs=[None, -1.0, math.nan, -1.0]), "tells nan of token 2"),
    (saying(token_logprobs=[None, -1.0, -math.inf, -1.0]), "tells -inf of token 2"),
    (saying(token_logprobs=[None, 0.5, -2.0, -1.0]), "tells 0.5 of token 1"),
    (saying(token_logprobs=[None, "-1", -2.0, -1.0]), "tells '-1' of token 1"),
    (saying(token_logprobs=[None, True, -2.0, -1.0]), "tells True of token 1"),
    (saying(top_logprobs=[None, {}, {"d": -1.0}, {}]), "does not name the likeliest token 1"),
    (saying(top_logprobs=[None, None, {"d": -1.0}, {}]), "does not name the likeliest token 1"),
    (saying(top_logprobs=[None, {"c": None}, {"d": -1.0}, {}]), "tells None of token 1"),
    (saying(tokens=["bcd", "x", "y", "z"]), "read the prompt as other tokens than were asked"),
    (saying(tokens=[f"token_id:{i}" for i in (1, 2, 4, 5)]), "read the prompt as other tokens"),
    (saying(tokens="absent"), "names neither the tokens nor their count"),
    (saying({"prompt_tokens": 7}, tokens="absent"), "says it read 7 tokens of a prompt of 3"),
    (saying({"prompt_tokens": None}, tokens=[]), "names neither the tokens nor their count"),
]


@pytest.mark.parametrize(("answer", "reason"), REFUSED)
def test_servers_that_cannot_be_believed_are_refused(answer: Any, reason: str) -> None:
    """In one sentence, whatever they say."""
    with pytest.raises(InputError, match=reason) as refused:
        ask(answer)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "models",
    [{"data": []}, {}, {"data": None}, {"data": "it"}, {"data": [None]}, {"data": [{}]}, {"data": [{"id": 5}]}],
)
def test_a_server_without_a_model_is_refused(models: Any) -> None:
    with serving(lambda path, body: models) as url, pytest.raises(InputError, match="serves no model"):
        Server.open(url)


def test_other_servers_are_refused() -> None:
    drafts = {"/v1/models": {"data": [{"id": "it"}]}, "/metrics": "# x\nvllm:spec_decode_num_drafts_total{a=1} 3\n"}
    with serving(lambda path, body: drafts.get(path)) as url, pytest.raises(InputError, match="speculatively"):
        Server.open(url)
    with pytest.raises(InputError, match="is the server up"):
        Server.open("http://127.0.0.1:9/v1")
    with pytest.raises(InputError, match="not a server's address"):
        Server.open(Path(__file__).as_uri())
    with socket.create_server(("127.0.0.1", 0)) as babble:
        threading.Thread(target=lambda: babble.accept()[0].sendall(b"SSH-2.0-babble\r\n"), daemon=True).start()
        with pytest.raises(InputError, match="no answer that can be read"):
            Server.open(f"http://127.0.0.1:{babble.getsockname()[1]}/v1")


@pytest.mark.parametrize(
    "answer", [{}, {"choices": [{"message": None}]}, {"choices": [{"message": "x", "text": None}]}]
)
@pytest.mark.parametrize("chat", [True, False])
def test_a_sample_needs_an_answer(answer: Any, chat: bool) -> None:
    with (
        serving(
            lambda path, body: {"data": [{"id": "it"}]} if path == "/v1/models" else answer if body else None
        ) as url,
        pytest.raises(InputError, match="answers without a"),
    ):
        writer(Server.open(url), chat)(PROMPTS[:1], 7, 0.0)


def test_samples_go_by_chat_with_tools_or_by_completion() -> None:
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
