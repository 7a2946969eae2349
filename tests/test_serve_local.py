"""The local server, asked by OpenAI's own client: what it says is what the model says, and nothing breaks it.

Random tiny models, greedy, so that every answer can be known from `generate` or from a whole forward. Models that
say a script (local_server.py) for reasoning and tool calls.
"""

import asyncio
import contextlib
import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time

import openai
import pytest
import torch
from forward import final
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from local_server import KEY, Running, scripted, serving
from openai import AsyncOpenAI
from prometheus_client.parser import text_string_to_metric_families

from moesaic.checkpoint import Checkpoint
from moesaic.data.tokenizer import Tokenizer
from moesaic.errors import CheckpointError, InputError
from moesaic.generate import Decoder, Sampling, end_tokens, generate
from moesaic.serve.local import Room, local, read_key
from moesaic.stream import LayerRun, State

MEMORY = 64 << 20
PROMPT = "def add(a, b):\n    "


@pytest.fixture(scope="module")
def server(m2):
    with serving(local(m2, KEY, Room(MEMORY, 4 << 20, context=600, concurrency=120, new_tokens=200)), KEY) as running:
        yield running


def greedy(checkpoint: Checkpoint, prompt: str, new_tokens: int) -> str:
    """What the model says, by the plain function and the tokenizer."""
    tokenizer = Tokenizer.open(checkpoint.path)
    decoder, sampling = Decoder(checkpoint, device="cpu"), Sampling(stop=end_tokens(checkpoint))
    (found,) = generate(decoder, [tokenizer.encode(prompt).tolist()], new_tokens, sampling)
    return tokenizer.inner.decode(found.ids)


def post(server: Running, path: str, body: bytes, **headers: str) -> tuple[int, dict]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    said = {"Content-Type": "application/json", "Authorization": f"Bearer {server.key}"} | headers
    connection.request("POST", path, body, {k.replace("_", "-"): v for k, v in said.items()})
    response = connection.getresponse()
    raw = response.read()
    connection.close()
    return response.status, json.loads(raw) if response.headers["content-type"] == "application/json" else {"raw": raw}


def engine_of(server: Running):
    return server.app.user_middleware[0].kwargs["served"].engine


def quiet(server: Running, seconds: float = 20) -> bool:
    """Whether the engine comes to hold nothing of any request."""
    engine, until = engine_of(server), time.monotonic() + seconds
    while engine.places or engine.batch.live or engine.batch.waiting or engine.leaving:
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return engine.cache_bytes == 0


# Completions -----------------------------------------------------------------------------------------------------


def test_completions_say_what_the_model_says(server, m2):
    wanted = greedy(m2, PROMPT, 24)
    ids = Tokenizer.open(m2.path).encode(PROMPT).tolist()
    ask = server.client.completions.create
    for prompt in (PROMPT, ids, [PROMPT, ids]):
        answer = ask(model=m2.path.name, prompt=prompt, max_tokens=24, temperature=0)
        assert [choice.text for choice in answer.choices] == [wanted] * len(answer.choices)
        assert answer.usage.prompt_tokens == len(ids) * len(answer.choices)
        assert answer.usage.completion_tokens == 24 * len(answer.choices)
    chunks = list(
        ask(
            model=m2.path.name,
            prompt=PROMPT,
            max_tokens=24,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == wanted and len(chunks) > 5
    assert chunks[-1].usage.completion_tokens == 24 and chunks[-2].choices[0].finish_reason == "length"


def test_echoed_logprobs_are_the_models(server, m2):
    """As lm-eval asks for them: token ids, one new token, everything echoed."""
    ids = Tokenizer.open(m2.path).encode(PROMPT).tolist()
    run = LayerRun(m2, device="cpu")
    last = final(run, [State(run.embed(torch.tensor([ids])))])
    logprobs_TV = run.logits(last[0].hidden_BTD[0]).log_softmax(-1)
    body = {"prompt": ids, "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0, "seed": 1234}
    for more in ({}, {"return_tokens_as_token_ids": True}):
        status, answer = post(server, "/v1/completions", json.dumps(body | more).encode())
        told = answer["choices"][0]["logprobs"]
        assert status == 200 and answer["choices"][0]["text"].startswith(PROMPT)
        assert len(told["tokens"]) == len(ids) + 1 == len(told["text_offset"])
        assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None
        for at, (id, logprob) in enumerate(zip(ids[1:], told["token_logprobs"][1:])):
            assert logprob == pytest.approx(float(logprobs_TV[at, id]), abs=1e-4)
            assert max(told["top_logprobs"][at + 1].values()) == pytest.approx(float(logprobs_TV[at].max()), abs=1e-4)
    assert told["tokens"][:-1] == [f"token_id:{id}" for id in ids]


def test_stop_words_seeds_and_choices(server, m2):
    ask = server.client.completions.create
    text = greedy(m2, PROMPT, 40)
    word = next(text[i : i + 2] for i in range(5, 30) if "\N{REPLACEMENT CHARACTER}" not in text[i : i + 2])
    answer = ask(model=m2.path.name, prompt=PROMPT, max_tokens=40, temperature=0, stop=["never there", word])
    assert answer.choices[0].text == text[: text.find(word)] and answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens < 40
    drawn = [
        [
            choice.text
            for choice in ask(model=m2.path.name, prompt=PROMPT, max_tokens=12, temperature=2, seed=5, n=3).choices
        ]
        for _ in range(2)
    ]
    assert drawn[0] == drawn[1] and len(set(drawn[0])) == 3
    assert (
        len({ask(model=m2.path.name, prompt=PROMPT, max_tokens=12, temperature=2).choices[0].text for _ in range(3)})
        > 1
    )


# Chat ------------------------------------------------------------------------------------------------------------

WEATHER = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": WEATHER}}]
MARK = "]<]minimax[>["
SCRIPTS = {
    "minimax_m2": [
        "I should ", "ask.", "</think>", "One moment. ", "<minimax:tool_call>", '\n<invoke name="weather">\n',
        '<parameter name="city">', "Rome", "</parameter>", '\n<parameter name="days">', "3", "</parameter>\n", "</invoke>\n",
        "</minimax:tool_call>",
    ],
    "minimax_m3_vl": [
        "<mm:think>", "I should ", "ask.", "</mm:think>", "One moment. ", f"{MARK}<tool_call>\n",
        f'{MARK}<invoke name="weather">', f"{MARK}<city>", "Rome", f"{MARK}</city>", f"{MARK}<days>", "3",
        f"{MARK}</days>", f"{MARK}</invoke>\n", f"{MARK}</tool_call>",
    ],
}  # fmt: skip


@pytest.mark.parametrize("family", sorted(SCRIPTS))
def test_reasoning_and_tool_calls(family, tmp_path):
    """In one piece and as a stream, of either family; without tools the same words are content."""
    template_end = {"minimax_m2": "<think>\n", "minimax_m3_vl": "]~b]ai\n"}[family]
    path = scripted(tmp_path / "scripted", family, template_end, SCRIPTS[family])
    template = (path / "chat_template.jinja").read_text()
    if family == "minimax_m3_vl":
        (path / "chat_template.jinja").write_text(template.replace("<think>\n", ""))
    with serving(local(Checkpoint.open(path), None, Room(MEMORY))) as running:
        ask = {"model": "scripted", "messages": [{"role": "user", "content": "Rome?"}], "max_tokens": 60}
        create = running.client.chat.completions.create
        (choice,) = create(**ask, tools=TOOLS).choices
        assert choice.message.reasoning == choice.message.reasoning_content == "I should ask."
        assert choice.message.content == "One moment." and choice.finish_reason == "tool_calls"
        (call,) = choice.message.tool_calls
        assert call.function.name == "weather" and json.loads(call.function.arguments) == {"city": "Rome", "days": 3}

        deltas = [chunk.choices[0].delta for chunk in create(**ask, tools=TOOLS, stream=True)]
        assert deltas[0].role == "assistant"
        assert "".join(getattr(d, "reasoning", "") for d in deltas) == "I should ask."
        assert "".join(d.content or "" for d in deltas) == "One moment. "
        (streamed,) = [call for d in deltas for call in d.tool_calls or []]
        assert streamed.index == 0 and streamed.function.model_dump() == call.function.model_dump()

        (choice,) = create(**ask).choices
        assert "weather" in choice.message.content and choice.message.tool_calls is None
        assert choice.finish_reason == "stop"
        again = [*ask["messages"], {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]}]
        again.append({"role": "tool", "tool_call_id": call.id, "content": [{"type": "text", "text": "rain"}]})
        assert create(**{**ask, "messages": again}, tools=TOOLS).choices[0].message.tool_calls


def test_chat_says_what_the_template_and_the_model_say(server, m2):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}]
    written = "]~!b[]~b]system\nBe brief.[e~[\n]~b]user\n1 + 1?[e~[\n]~b]ai\n<think>\n"
    wanted = greedy(m2, written, 20)
    ask = server.client.chat.completions.create
    asked = {"model": m2.path.name, "messages": messages, "max_completion_tokens": 20, "temperature": 0}
    answer = ask(**asked, logprobs=True, top_logprobs=2, extra_body={"unheard_of": {"x": 1}})
    assert answer.choices[0].message.reasoning == wanted and answer.choices[0].message.content == ""
    content = answer.choices[0].logprobs.content
    assert len(content) == 20 and all(t.logprob == max(top.logprob for top in t.top_logprobs) for t in content)
    streamed = "".join(getattr(c.choices[0].delta, "reasoning", "") for c in ask(**asked, stream=True))
    assert streamed == wanted
    status, tokens = post(server, "/tokenize", json.dumps({"messages": messages}).encode())
    assert status == 200 and tokens["count"] == answer.usage.prompt_tokens == len(tokens["tokens"])
    status, back = post(server, "/detokenize", json.dumps({"tokens": tokens["tokens"]}).encode())
    assert back == {"prompt": written}


# Refusals --------------------------------------------------------------------------------------------------------


def test_without_the_key_nothing_is_said(server):
    for words in ("", "Bearer", "Bearer wrong", f"Bearer {KEY}x", "Basic x"):
        status, answer = post(server, "/v1/completions", b'{"prompt": "x"}', Authorization=words)
        assert status == 401 and answer["error"]["type"] == "authentication_error"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0).models.list()
    assert server.client.models.list().data[0].max_model_len == 600
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request("GET", "/health")
    assert connection.getresponse().status == 200


WRONG = [
    ("/v1/completions", {"prompt": "x" * 700}, "600 together"),
    ("/v1/completions", {"prompt": "x", "max_tokens": 201}, "200 new ones"),
    ("/v1/completions", {"prompt": [320]}, "token 320 is not in"),
    ("/v1/completions", {"prompt": []}, "a prompt of 0 tokens"),
    ("/v1/completions", {"prompt": ""}, "a prompt of 0 tokens"),
    ("/v1/completions", {"prompt": "x", "temperature": "hot"}, 'temperature is "hot"'),
    ("/v1/completions", {"prompt": "x", "model": "another"}, "unknown model 'another'"),
    ("/v1/completions", {"prompt": "x", "logit_bias": {"5": 1}}, "cannot follow"),
    ("/v1/completions", {"prompt": "x", "n": 128, "max_tokens": 2}, "at once"),
    ("/v1/chat/completions", {}, "messages is empty"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "text alone"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "tool_choice": "required"}, "force"),
    ("/v1/chat/completions", {"messages": [{"role": "user"}], "chat_template_kwargs": {"chat_template": "x"}}, "not the"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "words"), WRONG)
def test_what_is_wrong_is_said(server, path, body, words):
    status, answer = post(server, path, json.dumps(body).encode())
    assert status == 400 and words in answer["error"]["message"], answer
    assert answer["error"]["type"] == "invalid_request_error" and answer["error"]["code"] == 400


def test_what_never_reaches_a_model(server):
    assert post(server, "/v1/completions", b"{", Content_Type="application/json")[0] == 400
    assert post(server, "/v1/completions", b'{"prompt": "\\ud800"}')[0] == 400
    assert post(server, "/v1/completions", b"[" * 100_000)[0] == 400
    assert post(server, "/v1/completions", b'{"prompt": "x", "temperature": NaN}')[0] == 400
    assert post(server, "/v1/completions", b'{"prompt": "x"}', Content_Type="text/plain")[0] == 415
    assert post(server, "/v1/completions", b" " * (17 << 20))[0] == 413
    status, answer = post(server, "/v1/nothing", b"{}")
    assert status == 404 and answer["error"]["type"] == "not_found_error"
    assert post(server, "/v1/models", b"{}")[0] == 405


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
NAMES = (
    "model", "prompt", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "n", "seed",
    "stop", "stop_token_ids", "echo", "logprobs", "top_logprobs", "stream", "stream_options", "tools", "tool_choice",
    "chat_template_kwargs", "suffix", "logit_bias", "response_format", "ignore_eos", "add_special_tokens", "tokens",
)  # fmt: skip
message = st.fixed_dictionaries(
    {},
    optional={
        "role": anything | st.just("assistant"),
        "content": anything,
        "tool_calls": anything,
        "reasoning": anything,
    },
)
tool = st.fixed_dictionaries(
    {}, optional={"type": anything, "function": st.dictionaries(st.sampled_from(["name", "parameters"]), anything)}
)
bodies = st.fixed_dictionaries(
    {"max_tokens": st.just(2)},
    optional={name: anything for name in NAMES if name != "max_tokens"}
    | {
        "prompt": anything | st.lists(st.integers(-2, 330), max_size=4),
        "messages": st.lists(message, max_size=3) | anything,
        "tools": st.lists(tool, max_size=2) | anything,
    },
)


@pytest.mark.long
@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(
    path=st.sampled_from(["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"]),
    body=bodies.map(lambda body: json.dumps(body).encode())
    | anything.map(lambda x: json.dumps(x).encode())
    | st.binary(max_size=30),
)
def test_no_malformed_request_breaks_it(server, path, body):
    status, answer = post(server, path, body)
    assert status == 200 or (400 <= status < 500 and answer["error"]["message"]), (status, answer)


def working() -> list[str]:
    """Threads, but for the pool that every event loop keeps."""
    return sorted(thread.name for thread in threading.enumerate() if not thread.name.startswith("asyncio_"))


# Many clients ----------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_hundred_clients_some_cutting_off(server, m2):
    """Every answer that is waited for is the model's own; of those cut off nothing is left."""
    wanted = {f"{PROMPT}{i}": greedy(m2, f"{PROMPT}{i}", 10) for i in range(4)}
    threads = working()

    async def one(client: AsyncOpenAI, i: int) -> bool:
        prompt = f"{PROMPT}{i % 4}"
        asked = {"model": m2.path.name, "prompt": prompt, "temperature": 0}
        if i % 3 == 0:
            stream = await client.completions.create(**asked, max_tokens=200, stream=True)
            async for _ in stream:
                break
            await stream.close()
            return True
        if i % 3 == 1:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(client.completions.create(**asked, max_tokens=200), 0.3)
            return True
        return (await client.completions.create(**asked, max_tokens=10)).choices[0].text == wanted[prompt]

    async def all_of_them() -> list[bool]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=120) as client:
            return await asyncio.gather(*(one(client, i) for i in range(100)))

    assert all(asyncio.run(all_of_them()))
    assert quiet(server) and working() == threads


def test_more_than_the_server_takes_is_told_to_wait(server, m2):
    asked = json.dumps({"prompt": PROMPT, "max_tokens": 100, "n": 100, "ignore_eos": True, "stream": True}).encode()
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    connection.request("POST", "/v1/completions", asked, headers)
    assert connection.getresponse().status == 200  # its first token is out
    status, answer = post(server, "/v1/completions", asked)
    assert status == 429 and answer["error"]["type"] == "rate_limit_error"
    connection.close()
    assert quiet(server)


def test_weights_that_fail_are_a_server_error(m2, tmp_path, monkeypatch):
    with serving(local(m2, None, Room(8 << 20))) as running:

        def lost(*_: object) -> None:
            raise CheckpointError("a shard is gone")

        with monkeypatch.context() as patch:
            patch.setattr(LayerRun, "read_expert", lost)
            status, answer = post(running, "/v1/completions", b'{"prompt": "x"}')
            assert status == 500 and "a shard is gone" in answer["error"]["message"]
        assert post(running, "/v1/completions", b'{"prompt": "x"}')[0] == 200
        assert quiet(running)


def test_metrics_count_what_happened(server):
    def meters() -> dict[str, float]:
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        connection.request("GET", "/metrics", headers={"Authorization": f"Bearer {KEY}"})
        page = connection.getresponse().read().decode()
        return {s.name: s.value for family in text_string_to_metric_families(page) for s in family.samples}

    before = meters()
    server.client.completions.create(
        model="minimax_m2", prompt="abcd", max_tokens=5, temperature=0, extra_body={"ignore_eos": True}
    )
    after = meters()
    gained = {name: after[name] - before[name] for name in after}
    assert gained["moesaic_prompt_tokens_total"] == 4 and gained["moesaic_new_tokens_total"] == 5
    assert gained["moesaic_first_token_seconds_count"] == 1 and gained["moesaic_next_token_seconds_count"] == 4
    assert after["moesaic_weight_bytes"] > 0 and after["moesaic_running"] == 0


@pytest.mark.long
def test_the_command_serves_until_interrupted(m2, tmp_path):
    (tmp_path / "key").write_text(KEY)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "moesaic", "serve", str(m2.path), "--engine", "local", "--port", str(port)]
    words += ["--expert-memory", "64MB", "--context", "500", "--key-file", str(tmp_path / "key")]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    running, status = Running(port, None, KEY), None
    try:
        for _ in range(600):
            with contextlib.suppress(ConnectionError):
                body = b'{"prompt": "x", "max_tokens": 3, "ignore_eos": true}'
                status, answer = post(running, "/v1/completions", body)
                break
            time.sleep(0.2)
        assert status == 200 and answer["usage"]["completion_tokens"] == 3
        process.send_signal(signal.SIGINT)
        assert process.wait(60) in (0, 130) and "Traceback" not in process.stderr.read()
    finally:
        process.kill()  # does nothing to one that has ended
        process.wait()


def test_wrong_settings(m2, tmp_path):
    with pytest.raises(InputError, match="context of 5,000"):
        local(m2, room=Room(cache_bytes=4 << 20, context=5000))
    (tmp_path / "key").write_text(" \n")
    with pytest.raises(InputError, match="holds no key"):
        read_key(tmp_path / "key")
    (tmp_path / "key").write_text("abc\n")
    assert read_key(tmp_path / "key") == "abc"


@pytest.mark.long
def test_log_likelihoods_of_lm_eval_are_the_direct_ones(server, m2, monkeypatch):
    """Its own client of completion endpoints, which sends token ids, a batch at a time, and wants everything echoed."""
    completions = pytest.importorskip("lm_eval.models.openai_completions", reason="lm-eval is not installed")
    pytest.importorskip("tenacity", reason="lm-eval[api] is not installed")
    instances = pytest.importorskip("lm_eval.api.instance")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    lm = completions.LocalCompletionsAPI(
        base_url=f"{server.url}/v1/completions", model=m2.path.name, tokenizer=str(m2.path),
        tokenizer_backend="huggingface", batch_size=2, max_length=512,
    )  # fmt: skip
    pairs = [
        ("The cat sat", " on the mat"),
        ("def f(x):", "\n    return x"),
        ("1 + 1 =", " 2"),
        ("a", greedy(m2, "a", 1)),
    ]
    asked = [instances.Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    tokenizer, run = Tokenizer.open(m2.path), LayerRun(m2, device="cpu")
    for (context, continuation), (logprob, is_greedy) in zip(pairs, lm.loglikelihood(asked)):
        ids = tokenizer.encode(context + continuation).tolist()
        start = len(tokenizer.encode(context))
        last = final(run, [State(run.embed(torch.tensor([ids])))])
        logprobs_TV = run.logits(last[0].hidden_BTD[0]).log_softmax(-1)
        at = range(start, len(ids))
        assert logprob == pytest.approx(sum(float(logprobs_TV[t - 1, ids[t]]) for t in at), abs=1e-3)
        assert is_greedy == all(int(logprobs_TV[t - 1].argmax()) == ids[t] for t in at)
