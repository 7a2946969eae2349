"""Tool calls of families whose models talk in several ways: each template's own words, read by the talk it is known by."""

import json
from pathlib import Path
from random import Random

import pytest
from random_calls import drawn
from transformers.utils.chat_template_utils import render_jinja_template

from moesaic.families import FAMILIES, Talk
from moesaic.serve.local.chat import Reply
from moesaic.serve.local.text import Answer
from moesaic.serve.local.tools import shapes_of

TEMPLATES = Path(__file__).parent / "chat_templates"
TURNS = {  # template -> its family, what stands before an answer and after it, whether it writes thoughts
    "qwen3": ("qwen3_moe", "<|im_start|>assistant\n", "<|im_end|>\n", True),
    "qwen3_coder": ("qwen3_moe", "<|im_start|>assistant\n", "<|im_end|>\n", False),
    "glm4": ("glm4_moe", "<|assistant|>", "", True),
    "glm4_moe": ("glm4_moe", "<|assistant|>\n", "", True),
    "deepseek_v3": ("deepseek_v3", "<｜Assistant｜>", "<｜end▁of▁sentence｜>", True),
    "deepseek_v31": ("deepseek_v3", "<｜Assistant｜>", "<｜end▁of▁sentence｜>", True),
    "kimi_k2": ("kimi_k25", "<|im_assistant|>assistant<|im_middle|>", "<|im_end|>", True),
}
PARSERS = {
    "qwen3": ("hermes", "qwen3"), "qwen3_coder": ("qwen3_coder", ""), "glm4": ("glm47", "glm45"), "glm4_moe": ("glm45", "glm45"),
    "deepseek_v3": ("deepseek_v3", "deepseek_v3"), "deepseek_v31": ("deepseek_v31", "deepseek_v3"),
    "kimi_k2": ("kimi_k2", "kimi_k2"),
}  # fmt: skip
TEMPLATE = pytest.mark.parametrize("template", sorted(TURNS))


def talk_of(template: str) -> Talk:
    return FAMILIES[TURNS[template][0]].talk((TEMPLATES / f"{template}.jinja").read_text())


def written(template: str, message: dict) -> str:
    """What the model has to say after the prompt, for the template to write `message`."""
    text = (TEMPLATES / f"{template}.jinja").read_text()
    (found,), _ = render_jinja_template(conversations=[[{"role": "assistant", **message}]], chat_template=text)
    _, before, after, _ = TURNS[template]
    return found.split(before, 1)[1].removesuffix(after)


def asked(calls: list) -> list[dict]:
    return [{"type": "function", "function": {"name": name, "arguments": arguments}} for name, arguments in calls]


def read(template: str, tools: list[dict], pieces: list[str]) -> tuple[list, dict]:
    reply = Reply(Answer(talk_of(template), "content", shapes_of(tools)))
    for i, piece in enumerate(pieces):
        reply.add(piece, i + 1 == len(pieces))
    return [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in reply.calls], reply.message()


def cut(r: Random, text: str) -> list[str]:
    places = sorted(r.randint(0, len(text)) for _ in range(r.randint(0, 12)))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)])]


def round_trip(template: str, seed: int) -> None:
    tools, calls = drawn(seed, template)
    r = Random(seed)
    thinks = {"reasoning_content": "Let me see."} if TURNS[template][3] else {}
    text = written(template, {"content": "One moment.", "tool_calls": asked(calls), **thinks})
    for pieces in (cut(r, text), [text], [*text[:300], text[300:]]):
        found, message = read(template, tools, pieces)
        assert json.dumps(found) == json.dumps([list(c) for c in calls]), f"seed {seed}: {json.dumps(tools)}\n{text}"
        assert message["content"] == "One moment." and message.get("reasoning", "").strip() == (
            "Let me see." if thinks else ""
        )


@TEMPLATE
def test_round_trip(template):
    for seed in range(150):
        round_trip(template, seed)


@pytest.mark.long
@TEMPLATE
def test_round_trip_of_many(template):
    for seed in range(150, 5_150):
        round_trip(template, seed)


@TEMPLATE
def test_the_template_tells_the_talk(template):
    """Which is also what vLLM is told."""
    talk = talk_of(template)
    assert (talk.tool_parser, talk.reasoning_parser) == PARSERS[template]
    assert bool(talk.think[0]) == TURNS[template][3]


def test_r1_is_told_by_the_thought_that_its_template_begins():
    """vLLM's reader for R1 takes an answer without its end for thoughts alone, which would leave V3 without content."""
    template = (TEMPLATES / "deepseek_v3.jinja").read_text() + "{{ '<｜Assistant｜><think>\\n' }}"
    assert FAMILIES["deepseek_v3"].talk(template).reasoning_parser == "deepseek_r1"
    assert FAMILIES["deepseek_v3"].talk("").reasoning_parser == "deepseek_v3"


@pytest.mark.parametrize("family", sorted({family for family, *_ in TURNS.values()}))
def test_a_template_without_words_has_none(family):
    assert FAMILIES[family].talk("{% for m in messages %}{{ m.content }}{% endfor %}") == Talk()
    assert FAMILIES[family].talk("").tool_parser, "a bare config is the family's own model"


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"city": {"type": "string"}}}}}]
CUT = {
    "qwen3": ('<tool_call>\n{"name": "f", "arguments": {"city": "a"}}\n</tool_call>', '\n<tool_call>\n{"name": "f", "argum'),
    "qwen3_coder": ("<tool_call>\n<function=f>\n<parameter=city>\na\n</parameter>\n</function>\n</tool_call>",
                    "\n<tool_call>\n<function=f>\n<parameter=city>\nb"),
    "glm4": ("<tool_call>f<arg_key>city</arg_key><arg_value>a</arg_value></tool_call>",
             "<tool_call>f<arg_key>city</arg_key><arg_value>b"),
    "glm4_moe": ("<tool_call>f\n<arg_key>city</arg_key>\n<arg_value>a</arg_value>\n</tool_call>",
                 "\n<tool_call>f\n<arg_key>city</arg_key>\n<arg_value>b"),
    "deepseek_v3": ('<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{"city": "a"}\n```'
                    "<｜tool▁call▁end｜>",
                    "\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```js"),
    "deepseek_v31": ('<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{"city": "a"}<｜tool▁call▁end｜>',
                     '<｜tool▁call▁begin｜>f<｜tool▁sep｜>{"city'),
    "kimi_k2": ('<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{"city": "a"}'
                "<|tool_call_end|>", "<|tool_call_begin|>functions.f:1<|tool_call_argument_begin|>{"),
}  # fmt: skip


@TEMPLATE
def test_calls_before_the_cut_are_made(template):
    """What cannot be read whole is content, and so is what follows it."""
    whole, cut_off = CUT[template]
    for pieces in ([whole + cut_off], list(whole + cut_off)):
        found, message = read(template, TOOLS, pieces)
        assert found == [("f", {"city": "a"})] and message["content"].strip() == cut_off.strip()
    found, message = read(template, TOOLS, list(cut_off))
    assert not found and message["content"] == cut_off


@TEMPLATE
def test_without_tools_it_is_content(template):
    assert read(template, [], [CUT[template][0]]) == (
        [],
        {"role": "assistant", "content": CUT[template][0], "refusal": None},
    )


def test_what_is_required_tells_two_readings_apart():
    """Two calls of which one lacks a count, or one call with an odd city."""
    schema = {"properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city", "days"]}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    city = "a\n</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=f>\n<parameter=city>\nb"
    text = written("qwen3_coder", {"content": "", "tool_calls": asked([("f", {"city": city, "days": 3})])})
    assert read("qwen3_coder", tools, [text])[0] == [("f", {"city": city, "days": 3})]
