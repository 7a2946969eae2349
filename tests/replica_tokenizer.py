"""A tokenizer of one token a byte with the special words of a family, its chat template and generation_config.json.

Words that a release marks as special are special here, too, so skip_special_tokens drops the same ones.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

TEMPLATES = Path(__file__).parent / "chat_templates"
TOOL_WORDS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
# model_type -> begin, ends (the first is the config's), padding, further special words, words not special, template
WORDS: dict[str, tuple[str | None, tuple[str, ...], str, tuple[str, ...], tuple[str, ...], str]] = {
    "qwen3_moe": (None, ("<|im_end|>", "<|endoftext|>"), "<|endoftext|>", ("<|im_start|>",), TOOL_WORDS, "qwen3"),
    "olmoe": (None, ("<|endoftext|>",), "<|padding|>", (), (), "plain"),
    "mixtral": ("<s>", ("</s>",), "</s>", ("[INST]", "[/INST]"), (), "plain"),
    "glm4_moe": (
        None,
        ("<|endoftext|>", "<|user|>", "<|observation|>"),
        "<|endoftext|>",
        ("[gMASK]", "<sop>", "<|system|>", "<|assistant|>"),
        (*TOOL_WORDS, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "/nothink"),
        "glm4",
    ),
    "deepseek_v3": (
        "<｜begin▁of▁sentence｜>",
        ("<｜end▁of▁sentence｜>",),
        "<｜end▁of▁sentence｜>",
        (
            "<｜User｜>", "<｜Assistant｜>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>",
            "<｜tool▁call▁end｜>", "<｜tool▁sep｜>", "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>",
            "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>",
        ),
        ("<think>", "</think>"),
        "deepseek_v3",
    ),
    "kimi_k2": (
        "[BOS]",
        ("[EOS]", "<|im_end|>"),
        "[PAD]",
        (
            "<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>", "<|tool_calls_section_begin|>",
            "<|tool_calls_section_end|>", "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>",
            "<|media_begin|>", "<|media_content|>", "<|media_end|>", "<|media_pad|>",
        ),
        ("<think>", "</think>"),
        "kimi_k2",
    ),
}  # fmt: skip
SAME = {"glm4_moe_lite": "glm4_moe", "kimi_k25": "kimi_k2"}
PLAIN = (
    "{{ bos_token or '' }}{% for m in messages %}{{ '<|' ~ m.role ~ '|>\n' ~ m.content ~ '\n' }}{% endfor %}"
    "{{ '<|assistant|>\n' if add_generation_prompt else '' }}"
)


def write_tokenizer(path: Path, family: str, vocab: int) -> dict[str, Any]:
    """Write the files and return the ids that config.json has to name, under the keys it has for them."""
    begin, ends, padding, special, plain, template = WORDS[SAME.get(family, family)]
    words = list(dict.fromkeys((*ends, padding, *((begin,) if begin else ()), *special, *plain)))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(word, special=word not in plain, normalized=False) for word in words])
    assert tokenizer.get_vocab_size() <= vocab, (family, vocab)
    tokenizer.save(str(path / "tokenizer.json"))
    of = {word: tokenizer.token_to_id(word) for word in words}
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": ends[0],
        "pad_token": padding,
    }
    settings |= {"model_max_length": 4096} | ({"bos_token": begin} if begin else {})
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    chat = PLAIN if template == "plain" else (TEMPLATES / f"{template}.jinja").read_text()
    (path / "chat_template.jinja").write_text(chat)
    ids: dict[str, Any] = {"eos_token_id": of[ends[0]], "pad_token_id": of[padding]}
    ids |= {"bos_token_id": of[begin]} if begin else {}
    every = {"eos_token_id": [of[word] for word in ends]} if len(ends) > 1 else {}
    generation = ids | every | {"do_sample": True, "temperature": 0.7, "top_p": 0.95}
    (path / "generation_config.json").write_text(json.dumps(generation, indent=2))
    if template == "glm4":
        ids |= every
    if template == "kimi_k2":
        ids["media_placeholder_token_id"] = of["<|media_pad|>"]
    return ids
