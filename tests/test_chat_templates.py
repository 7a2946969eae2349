"""What the chat templates of tests write, word for word, through a tiny model's own tokenizer."""

import pytest
import replica
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

NUMBER = {"type": "integer", "description": "<a> number"}
ADD = {"name": "add", "description": "A sum.", "parameters": {"type": "object", "properties": {"a": NUMBER}}}
TOOLS = [{"type": "function", "function": ADD}]


def call(a: object) -> dict:
    return {"type": "function", "id": f"functions.add:{a}", "function": {"name": "add", "arguments": {"a": a}}}


TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello", "reasoning_content": "a greeting"},
    {"role": "user", "content": "1 + 2?"},
    {"role": "assistant", "content": "", "reasoning_content": "a sum", "tool_calls": [call(1), call(2)]},
    {"role": "tool", "content": "3", "tool_call_id": "functions.add:1"},
    {"role": "tool", "content": "4", "tool_call_id": "functions.add:2"},
]
# after the tools: what each writes
SAID = {
    "qwen3": (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
        "<|im_start|>user\n1 + 2?<|im_end|>\n<|im_start|>assistant\n<think>\na sum\n</think>\n\n"
        '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>\n'
        '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n3\n</tool_response>\n<tool_response>\n4\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    ),
    "qwen3_coder": (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
        "<|im_start|>user\n1 + 2?<|im_end|>\n<|im_start|>assistant\n"
        "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>\n"
        "<tool_call>\n<function=add>\n<parameter=a>\n2\n</parameter>\n</function>\n</tool_call><|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n3\n</tool_response>\n<tool_response>\n4\n</tool_response>\n<|im_end|>\n"
        "<|im_start|>assistant\n"
    ),
    "glm4": (
        "<|user|>Hi<|assistant|></think>Hello<|user|>1 + 2?<|assistant|><think>a sum</think>"
        "<tool_call>add<arg_key>a</arg_key><arg_value>1</arg_value></tool_call>"
        "<tool_call>add<arg_key>a</arg_key><arg_value>2</arg_value></tool_call>"
        "<|observation|><tool_response>3</tool_response><tool_response>4</tool_response><|assistant|><think>"
    ),
    "deepseek_v3": (
        "<｜User｜>Hi<｜Assistant｜>Hello<｜end▁of▁sentence｜><｜User｜>1 + 2?<｜Assistant｜><think>\na sum\n</think>\n\n"
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n{"a": 1}\n```<｜tool▁call▁end｜>\n'
        '<｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n{"a": 2}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
        "<｜end▁of▁sentence｜><｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>3<｜tool▁output▁end｜>\n"
        "<｜tool▁output▁begin｜>4<｜tool▁output▁end｜><｜tool▁outputs▁end｜>"
    ),
    "kimi_k2": (
        "<|im_user|>user<|im_middle|>Hi<|im_end|><|im_assistant|>assistant<|im_middle|>Hello<|im_end|>"
        "<|im_user|>user<|im_middle|>1 + 2?<|im_end|><|im_assistant|>assistant<|im_middle|><think>a sum</think>"
        '<|tool_calls_section_begin|><|tool_call_begin|>functions.add:1<|tool_call_argument_begin|>{"a": 1}'
        '<|tool_call_end|><|tool_call_begin|>functions.add:2<|tool_call_argument_begin|>{"a": 2}<|tool_call_end|>'
        "<|tool_calls_section_end|><|im_end|><|im_system|>tool<|im_middle|>## Return of functions.add:1\n3<|im_end|>"
        "<|im_system|>tool<|im_middle|>## Return of functions.add:2\n4<|im_end|><|im_assistant|>assistant<|im_middle|>"
    ),
}
FAMILIES = {"qwen3_moe": "qwen3", "glm4_moe": "glm4", "glm4_moe_lite": "glm4", "deepseek_v3": "deepseek_v3"}
FAMILIES |= {"kimi_k2": "kimi_k2", "kimi_k25": "kimi_k2"}


def rendered(name: str, talk: list[dict], **more: object) -> str:
    template = (replica.CONFIGS.parent / f"chat_templates/{name}.jinja").read_text()
    (text,), _ = render_jinja_template(conversations=[talk], chat_template=template, **more)
    return text


@pytest.mark.parametrize("name", SAID)
def test_turns(name):
    text = rendered(name, TALK, tools=TOOLS, add_generation_prompt=True)
    assert text.endswith(SAID[name])
    opening = text.removesuffix(SAID[name])
    described = "<a> number</description>" if name == "qwen3_coder" else '"<a> number"'
    assert opening.count("Be brief.") == 1 and opening.count(described) == 1
    bare = rendered(name, TALK, add_generation_prompt=True)
    assert bare.endswith(SAID[name]) and "number" not in bare and bare.count("Be brief.") == 1
    assert text.startswith(rendered(name, TALK[:2], tools=TOOLS))


@pytest.mark.parametrize("family", replica.TINY)
def test_the_tokenizer_reads_each_word_as_one_token(tmp_path, family):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(replica.make(tmp_path / "m", family, layers=1))
    text = tokenizer.apply_chat_template(TALK, tools=TOOLS, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text and max(ids) < 512
    if family in FAMILIES:
        assert text == rendered(FAMILIES[family], TALK, tools=TOOLS, add_generation_prompt=True)
        words = [id for id in ids if id >= 256]
        assert len(words) > 12 and tokenizer.eos_token in tokenizer.get_vocab()
        assert len(tokenizer.decode(ids, skip_special_tokens=True)) < len(text)
