"""conversations.py: every way in which the field writes a conversation, what is refused, and what a template drops.

The template below is written from the words of a released one: it knows four roles, and leaves out what it does not
know without a word. The property test holds the reader to a slow plain one, written here: that template by hand.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.data.conversations import Conversation
from moesaic.data.corpus import Corpus
from moesaic.data.texts import read_texts
from moesaic.data.tokenizer import Tokenizer
from moesaic.errors import InputError
from moesaic.serve.local.model import Served

TEMPLATE = (
    "{% if tools %}[tools]{{ tools | tojson }}{{ LF }}{% endif %}"
    "{% for m in messages %}"
    "{% if m.role == 'system' %}[system]{{ m.content }}{{ LF }}"
    "{% elif m.role == 'user' %}[user]{{ m.content }}{{ LF }}"
    "{% elif m.role == 'assistant' %}[ai]"
    "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<{{ c.function.name }}"
    "{% for k, v in c.function.arguments.items() %} {{ k }}={{ v | tojson }}{% endfor %}>{% endfor %}{{ LF }}"
    "{% elif m.role == 'tool' %}[tool]{{ m.content }}{{ LF }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}[ai]{% endif %}"
).replace("LF", r"'\n'")


def tokenizer(folder: Path, template: str) -> Tokenizer:
    """A token a byte, with a chat template."""
    folder.mkdir(exist_ok=True)
    tiny.write_tokenizer(folder, 320)
    (folder / "chat_template.jinja").write_text(template)
    return Tokenizer.open(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tokenizer(tmp_path_factory.mktemp("model"), TEMPLATE)


def read(data: Path, model: Tokenizer, *rows: Any) -> str:
    data.mkdir(exist_ok=True)
    (data / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (text,) = read_texts(data, model)
    return text.joined


USER = {"role": "user", "content": "Rome?"}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome", "days": 3}'}}
FLAT = {"name": "weather", "arguments": {"city": "Rome", "days": 3}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALLED = '[user]Rome?\n[ai]<weather city="Rome" days=3>\n'
TOLD = '[tools][{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]\n[user]Rome?\n'


def calling(call: Any, **more: Any) -> dict[str, Any]:
    return {"messages": [USER, {"role": "assistant", "tool_calls": [call], **more}]}


@pytest.mark.parametrize(
    "row, wanted",
    [
        (calling(CALL), CALLED),  # arguments as JSON text, as OpenAI stores them
        (calling(CALL, content=None), CALLED),
        (calling(CALL, content=""), CALLED),
        (calling(CALL | {"function": FLAT}), CALLED),
        (calling(FLAT), CALLED),  # flat, as Hermes and Qwen have it
        (calling({"function": {"name": "now", "arguments": ""}}), "[user]Rome?\n[ai]<now>\n"),
        (calling({"function": {"name": "now"}}), "[user]Rome?\n[ai]<now>\n"),
        (calling({"function": {"name": "now", "arguments": None}}), "[user]Rome?\n[ai]<now>\n"),
        (calling(CALL, content="Wait."), CALLED.replace("[ai]", "[ai]Wait.")),
        (calling(CALL, reasoning="Hm."), CALLED.replace("[ai]", "[ai](Hm.)")),
        (calling(CALL, reasoning_content="Hm."), CALLED.replace("[ai]", "[ai](Hm.)")),
        ({"messages": [USER, {"role": "assistant", "content": None, "function_call": FLAT}]}, CALLED),
        ({"messages": [USER], "tools": [TOOL]}, TOLD),
        ({"messages": [USER], "tools": json.dumps([TOOL])}, TOLD),
        ({"messages": [USER], "tools": [TOOL["function"]]}, TOLD),
        ({"messages": [USER], "tools": []}, "[user]Rome?\n"),
        ({"messages": [USER], "tools": None}, "[user]Rome?\n"),
        ({"messages": [USER], "tools": ""}, "[user]Rome?\n"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Ro"}, {"type": "text", "text": "me?"}]}]},
         "[user]Rome?\n"),
        ({"messages": [{"role": "user", "content": [{"type": "input_text", "text": "Rome?"}]}]}, "[user]Rome?\n"),
        ({"messages": [{"role": "developer", "content": "Brief."}, USER]}, "[system]Brief.\n[user]Rome?\n"),
        ({"messages": [USER, {"role": "function", "name": "f", "content": "rain"}]}, "[user]Rome?\n[tool]rain\n"),
        ({"conversations": [{"from": "human", "value": "Rome?"}, {"from": "gpt", "value": "Yes."}]},
         "[user]Rome?\n[ai]Yes.\n"),
        ({"conversations": [{"from": "human", "value": "Rome?"}], "system": "Brief."}, "[system]Brief.\n[user]Rome?\n"),
        ({"conversations": [{"from": "system", "value": "Brief."}, {"from": "user", "value": "Rome?"}]},
         "[system]Brief.\n[user]Rome?\n"),
        ({"conversations": [{"from": "human", "value": "Rome?"}, {"from": "function_call", "value": json.dumps(FLAT)},
                            {"from": "observation", "value": "rain"}]}, CALLED + "[tool]rain\n"),
        ({"messages": [{"from": "human", "value": "Rome?"}]}, "[user]Rome?\n"),
        ({"messages": [USER], "text": ""}, "[user]Rome?\n"),
        ({"messages": [USER], "text": "plain"}, "plain"),
        ({"text": "plain", "messages": None}, "plain"),
        ({"messages": [{"role": "user", "content": "a\u2028b {'c': 1}"}]}, "[user]a\u2028b {'c': 1}\n"),
    ],
)  # fmt: skip
def test_read_as_the_field_writes_it(tmp_path, model, row, wanted):
    assert read(tmp_path, model, row) == wanted


def nested(depth: int) -> str:
    return '{"a": ' * depth + "1" + "}" * depth


@pytest.mark.parametrize(
    "row, message",
    [
        ({"messages": []}, "messages is empty"),
        ({"messages": {}}, "the messages are an object"),
        ({"messages": "Rome?"}, "the messages are a string"),
        ({"messages": ["Rome?", "Yes."]}, "message 1 is a string"),
        ({"messages": [USER, None]}, "message 2 is null"),
        ({"messages": [[USER]]}, "message 1 is a list"),
        ({"messages": [{"content": "Rome?"}]}, "message 1 has no role"),
        ({"messages": [{"role": 7, "content": "Rome?"}]}, "message 1 has no role"),
        ({"messages": [{"role": "user"}]}, "message 1 has no `content`"),
        ({"messages": [{"role": "user", "text": "Rome?"}]}, "message 1 has no `content`"),
        ({"messages": [{"role": "user", "content": {"text": "Rome?"}}]}, "message 1 has a `content` that is an object"),
        ({"messages": [{"role": "user", "content": 5}]}, "message 1 has a `content` that is a number"),
        ({"messages": [{"role": "user", "content": True}]}, "message 1 has a `content` that is true or false"),
        ({"messages": [{"role": "user", "content": ["Rome?"]}]}, "message 1 holds a part 'Rome"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "holds a part 'image_url'; text alone"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]}, "holds a part 'text'"),
        ({"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": " \n"}]}, "no message says"),
        ({"messages": [{"role": "user", "content": None}]}, "no message says anything"),
        ({"messages": [{"role": "critic", "content": "Bad."}]}, "leaves out message 1, of the role 'critic'"),
        ({"messages": [USER, {"role": "User", "content": "Rome?"}]}, "leaves out message 2, of the role 'User'"),
        ({"messages": [USER, {"role": "ipython", "content": "Rome?"}]}, "leaves out message 2, of the role 'ipython'"),
        ({"messages": [{"role": "user", "tool_calls": [FLAT], "content": "x"}]}, "leaves out the tool calls of message 1"),
        ({"messages": [USER], "tools": "weather"}, "`tools` cannot be read as JSON"),
        ({"messages": [USER], "tools": {"name": "weather"}}, "`tools` is an object"),
        ({"messages": [USER], "tools": ["weather"]}, "a tool has no function with a name"),
        ({"messages": [USER], "tools": [{"type": "function"}]}, "a tool has no function with a name"),
        ({"messages": [USER], "tools": [{"name": "f", "parameters": 5}]}, "the parameters of 'f' are a number"),
        (calling({"function": {"name": "f", "arguments": "{'city': 'Rome'}"}}), "the arguments of 'f' in message 2 cannot be"),
        (calling({"function": {"name": "f", "arguments": "[1]"}}), "the arguments of 'f' in message 2 are a list"),
        (calling({"function": {"name": "f", "arguments": 5}}), "the arguments of 'f' in message 2 are a number"),
        (calling({"function": {"name": "f", "arguments": nested(100_000)}}), "the arguments of 'f' in message 2 cannot be"),
        (calling({"function": {"arguments": "{}"}}), "a tool call without a function's name"),
        (calling("weather(Rome)"), "a tool call without a function's name"),
        ({"messages": [{"role": "assistant", "tool_calls": "weather"}]}, "`tool_calls` that are a string"),
        ({"conversations": [{"from": "wizard", "value": "x"}]}, "message 1 is from 'wizard'"),
        ({"conversations": [{"from": "human"}]}, "message 1 has no `content`"),
        ({"conversations": [{"from": "function_call", "value": "weather"}]}, "a function call that cannot be read"),
        ({"conversations": [{"from": "human", "value": "x"}], "system": 5}, "`system` is a number"),
        ({"messages": [{"role": "user", "content": "half \ud83d"}]}, "half a character"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "half \udc00"}]}]}, "half a character"),
        ({"text": "half \ud83d"}, "half a character"),
        ({"text": ["a"]}, "neither `text` nor `messages`"),
        ({"prompt": "a", "completion": "b"}, "neither `text` nor `messages`"),
    ],
)  # fmt: skip
def test_refused_in_a_sentence_with_file_and_line(tmp_path, model, row, message):
    with pytest.raises(InputError, match=message) as raised:
        read(tmp_path, model, {"text": "before"}, row)
    assert str(raised.value).startswith(f"{tmp_path / 'a.jsonl'} line 2") and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "template, message",
    [
        ("{{ raise_exception('roles must alternate') }}", "does not take these messages: roles must alternate"),
        ("{{ messages[7].content }}", "does not take these messages"),
        ("{{ messages[0].content + 5 }}", "does not take these messages"),
        ("{{ 1 / 0 }}", "does not take these messages: division by zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "does not take these messages: maximum recursion"),
        ("{{ messages | nothing }}", "does not take these messages: No filter named 'nothing'"),
        ("{% for m in messages %}", "does not take these messages: Unexpected end of template"),
        ("You are a helpful assistant.", "leaves out message 1, of the role 'user'"),
        ("{{ messages[0].content }}", "leaves out message 2"),
        ("{% for m in messages if m.role != 'tool' %}{{ m.content }}{{ m.tool_calls }}{% endfor %}",
         "leaves out the tool calls of message 2"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "leaves out the tool calls of message 2"),
        ("{{ tools }}{% for m in messages %}{{ m.content }}{{ (m.tool_calls or []) | tojson }}{% endfor %}",
         "leaves out the tools"),
        ("{% for m in messages %}{{ m.content }}{{ (m.tool_calls or []) | tojson }}{% endfor %}", "leaves out the tools"),
    ],
)  # fmt: skip
def test_what_a_template_raises_drops_or_writes_as_python_is_refused(tmp_path, template, message):
    row = calling(CALL, content="Wait.") | {"tools": [TOOL]}
    with pytest.raises(InputError, match=message) as raised:
        read(tmp_path / "data", tokenizer(tmp_path / "model", template), row)
    assert "a.jsonl line 1" in str(raised.value)


def test_a_template_that_wants_json_text_has_it(tmp_path):
    """Joined as strings: with objects it raises, or writes Python's form of them."""
    for expression in ("c.function.name + c.function.arguments", "c.function.name ~ c.function.arguments"):
        template = (
            f"{{% for m in messages %}}{{{{ m.content }}}}{{% for c in m.tool_calls or [] %}}{{{{ {expression} }}}}"
        )
        model = tokenizer(tmp_path / "model", template + "{% endfor %}{% endfor %}")
        assert read(tmp_path / "data", model, calling(CALL)) == 'Rome?weather{"city": "Rome", "days": 3}'


def test_words_that_stand_elsewhere_do_not_hide_a_dropped_message(tmp_path, model):
    """ "user" is in every prompt, and the words of message 2 are those of message 1."""
    for words in ("user", "Rome?", "[user]Rome?"):
        with pytest.raises(InputError, match="leaves out message 2, of the role 'critic'"):
            read(tmp_path, model, {"messages": [USER, {"role": "critic", "content": words}]})


def test_a_template_may_shape_what_it_writes(tmp_path):
    """Thoughts of earlier turns left out, text trimmed or in capitals: the model's own ways, and nothing dropped."""
    template = "{% for m in messages %}[{{ m.content.split('</think>')[-1] | trim | upper }}]{% endfor %}"
    row = {"messages": [USER, {"role": "assistant", "content": "<think>Hm.</think> Yes. "}]}
    assert read(tmp_path / "data", tokenizer(tmp_path / "model", template), row) == "[ROME?][YES.]"


@pytest.mark.parametrize(
    "messages, wanted",
    [
        ([{"role": "developer", "content": "Brief."}, USER], "[system]Brief.\n[user]Rome?\n[ai]"),
        ([USER, {"role": "critic", "content": "Bad."}], "leaves out message 2, of the role 'critic'"),
        ([USER, {"role": "tool", "content": [{"type": "text", "text": "rain"}]}], "[user]Rome?\n[tool]rain\n[ai]"),
        ([USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}], CALLED + "[ai]"),
        ([{"role": "user", "content": 5}], "message 1 has a `content` that is a number"),
    ],
)
def test_the_server_renders_as_calibration_does(model, messages, wanted):
    """The same text, up to where an answer begins; and refused alike."""
    served = SimpleNamespace(tokenizer=model, name="model")
    if wanted.startswith("["):
        assert Served.render(served, messages, [], {}) == wanted
        assert model.renderer.render(Conversation.of(messages)) == wanted.removesuffix("[ai]")
        return
    with pytest.raises(InputError, match=wanted):
        Served.render(served, messages, [], {})


def test_kinds_are_probed_once(model):
    model.renderer.probes.clear()
    for i in range(50):
        model.renderer.render(Conversation.of([{"role": "user", "content": f"number {i}"}]))
    assert len(model.renderer.probes) == 1
    model.renderer.render(Conversation.of([{"role": "user", "content": "x"}]), add_generation_prompt=True)
    assert len(model.renderer.probes) == 2


def test_the_case_that_failed(m2, tmp_path):
    """Arguments as a JSON string, from the command's side: rows of tokens, and no Python in them."""
    row = {"messages": [{"role": "user", "content": "The quick brown fox. " * 20},
                        {"role": "assistant", "content": None, "tool_calls": [CALL]},
                        {"role": "tool", "tool_call_id": "c1", "content": "rain " * 20}]}  # fmt: skip
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row | {"id": i}) for i in range(12)))
    corpus = Corpus(tmp_path, heldout=tmp_path, tokens=256, length=32)
    assert corpus.calibration(m2, tmp_path / "tokens.safetensors").rows == 8
    (text,) = read_texts(tmp_path, Tokenizer.open(m2.path))
    assert '{"name": "weather", "arguments": {"city": "Rome", "days": 3}}' in text.joined and "{'" not in text.joined


words = st.text(
    st.characters(exclude_categories=["Cs"]) | st.sampled_from("{}'\"\\\n\u2028"), min_size=1, max_size=8
).filter(lambda text: text.strip())
arguments = st.dictionaries(
    st.text("abc", min_size=1, max_size=3), st.integers() | words | st.lists(words, max_size=2), max_size=2
)
calls = st.lists(st.tuples(st.text("fgh", min_size=1, max_size=4), arguments), max_size=2)
ROLES = ("system", "user", "assistant", "tool")
turns = st.lists(st.tuples(st.sampled_from(ROLES), words, calls, st.none() | words), min_size=1, max_size=4)


def plain(turns: list[Any], tools: list[str]) -> str:
    """The template by hand."""
    dumps = lambda value: json.dumps(value, ensure_ascii=False)  # noqa: E731
    out = f"[tools]{dumps([{'type': 'function', 'function': {'name': name}} for name in tools])}\n" if tools else ""
    for role, content, calls, thought in turns:
        out += {"system": "[system]", "user": "[user]", "assistant": "[ai]", "tool": "[tool]"}[role]
        if role == "assistant":
            out += f"({thought})" if thought else ""
        out += content
        for name, values in calls if role == "assistant" else ():
            out += f"<{name}" + "".join(f" {k}={dumps(v)}" for k, v in values.items()) + ">"
        out += "\n"
    return out


def as_written(draw: Any, turn: Any) -> dict[str, Any]:
    """One of the ways to write a message."""
    role, content, calls, thought = turn
    if role != "assistant" and draw(st.booleans()):
        return {"from": {"user": "human", "tool": "observation"}.get(role, role), "value": content}
    at = draw(st.integers(0, len(content)))
    parts = [{"type": "text", "text": content[:at]}, {"type": "text", "text": content[at:]}]
    found = {"role": "developer" if role == "system" and draw(st.booleans()) else role}
    found["content"] = parts if draw(st.booleans()) else content
    if role == "assistant":
        found |= {draw(st.sampled_from(["reasoning", "reasoning_content"])): thought} if thought else {}
        flat = [{"name": n, "arguments": json.dumps(v) if draw(st.booleans()) else v} for n, v in calls]
        found |= {"tool_calls": [c if draw(st.booleans()) else {"type": "function", "function": c} for c in flat]}
    return found


def agrees(data: Any, model: Tokenizer, turns: list[Any], names: list[str]) -> None:
    tools: Any = [
        {"name": n} if data.draw(st.booleans()) else {"type": "function", "function": {"name": n}} for n in names
    ]
    tools = json.dumps(tools) if data.draw(st.booleans()) else tools
    conversation = Conversation.of([as_written(data.draw, turn) for turn in turns], tools)
    assert model.renderer.render(conversation) == plain(turns, names)


@settings(max_examples=40, deadline=None)
@given(st.data(), turns, st.lists(st.text("fgh", min_size=1, max_size=4), max_size=2))
def test_rendered_as_by_hand(model, data, turns, names):
    agrees(data, model, turns, names)


@pytest.mark.long
@settings(max_examples=5000, deadline=None)
@given(st.data(), turns, st.lists(st.text("fgh", min_size=1, max_size=4), max_size=2))
def test_rendered_as_by_hand_at_length(model, data, turns, names):
    agrees(data, model, turns, names)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["role", "content", "from", "value", "tool_calls", "function", "name", "arguments", "type", "text"]),
        inner, max_size=4), max_leaves=12,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(json_values, json_values, json_values)
def test_anything_is_read_or_refused(model, messages, tools, system):
    """Never a traceback, and never a text without a word of the messages."""
    try:
        text = model.renderer.render(Conversation.of(messages, tools, system))
    except InputError as error:
        assert "\n" not in str(error).split(": ")[0]
    else:
        assert text
