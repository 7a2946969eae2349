"""Conversations as a model's own chat template writes them: of data sets and of the local server's clients alike.

Rows are read as the field writes them: OpenAI's messages (content in parts, arguments as JSON text, `developer`,
`function_call`) and ShareGPT's (`from` and `value`), each with `tools`. A template may drop without a word what it
does not know, a role or tools, and may print an object as Python would. So every kind of conversation is rendered once
with marks in place of its words, and what does not come back is refused. Leaves out reading what a model answers.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import InputError

ROLES = {"developer": "system", "function": "tool"}  # OpenAI's names, newest and oldest, as templates know them
SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant", "bard": "assistant",
    "bing": "assistant", "model": "assistant", "system": "system", "tool": "tool", "observation": "tool",
    "function_response": "tool", "function_call": "assistant",
}  # fmt: skip
TEXT_PARTS = ("text", "input_text", "output_text")
REASONING = ("reasoning", "reasoning_content")  # vLLM's name and the older one; templates know either
MARK = "moesaicmark"
MOST_PROBES = 4096  # kinds of conversation that are remembered

PARAMETERS = {"type": "object", "properties": {}}  # of a tool in marks

Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """Messages and tools in the one form that templates expect: content a string, arguments and tools objects."""

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] = ()

    @staticmethod
    def of(messages: Any, tools: Any = None, system: Any = None) -> "Conversation":
        """Read what a row or a request holds; `system` is a message put first. Raises `InputError`."""
        if not isinstance(messages, list):
            raise InputError(f"the messages are {kind(messages)}; wanted a list of messages")
        if not messages:
            raise InputError("messages is empty; a conversation needs one at least")
        found = [read_message(message, f"message {n}") for n, message in enumerate(messages, 1)]
        if system is not None and not isinstance(system, str):
            raise InputError(f"`system` is {kind(system)}; wanted a string")
        if system and system.strip():
            found.insert(0, {"role": "system", "content": system})
        if not any(m["content"].strip() or m.get("tool_calls") or m.get(REASONING[0]) for m in found):
            raise InputError("no message says anything; remove the conversation or fill it")
        return Conversation(found, read_tools(tools))

    @property
    def shape(self) -> str:
        """Two conversations of one shape differ in their words alone."""
        messages = [
            (m["role"], bool(m["content"].strip()), len(m.get("tool_calls", ())), bool(m.get(REASONING[0])))
            for m in self.messages
        ]
        return json.dumps([messages, len(self.tools)])

    def marked(self) -> "Conversation":
        """The same with a mark in place of all words."""
        messages = []
        for n, message in enumerate(self.messages):
            marked: Message = {
                "role": message["role"],
                "content": mark("text", n) if message["content"].strip() else "",
            }
            marked |= {name: mark("thought", n) for name in REASONING if message.get(name)}
            if calls := message.get("tool_calls"):
                marked["tool_calls"] = [called(c, mark("call", n, i), {mark("key", n, i): mark("value", n, i)})
                                        for i, c in enumerate(calls)]  # fmt: skip
            marked |= {key: mark("id", n) for key in ("tool_call_id", "name") if isinstance(message.get(key), str)}
            messages.append(marked)
        tools = [{"type": "function", "function": {"name": mark("tool", i), "description": "", "parameters": PARAMETERS}}
                 for i in range(len(self.tools))]  # fmt: skip
        return Conversation(messages, tools)

    def with_json_arguments(self) -> "Conversation":
        """Arguments as JSON text, for templates that write them as they are."""
        messages = [dict(m) for m in self.messages]
        for message in messages:
            if calls := message.get("tool_calls"):
                message["tool_calls"] = [
                    called(c, c["function"]["name"], json.dumps(c["function"]["arguments"], ensure_ascii=False))
                    for c in calls
                ]
        return Conversation(messages, self.tools)


@dataclass(frozen=True)
class Probe:
    """What a template makes of one shape of conversation."""

    dropped: str = ""  # in words, the first thing that it leaves out; "" for nothing
    json_arguments: bool = False  # whether it wants arguments as JSON text


@dataclass(frozen=True)
class Renderer:
    """The chat template of a tokenizer of transformers, which holds it."""

    chat: Any
    probes: dict[str, Probe] = field(default_factory=dict)

    def render(self, conversation: Conversation, **options: Any) -> str:
        """The text of a conversation. Raises `InputError` with what the template says against it, or leaves out."""
        probe = self.probe(conversation, options)
        if probe.dropped:
            raise InputError(
                f"the model's chat template leaves out {probe.dropped}; change it, or remove the conversation"
            )
        text = self.apply(conversation.with_json_arguments() if probe.json_arguments else conversation, options)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"a message holds half a character ({error.reason}); write it in full") from error
        return text

    def apply(self, conversation: Conversation, options: Mapping[str, Any]) -> str:
        messages, tools = list(conversation.messages), list(conversation.tools) or None
        try:
            return str(self.chat.apply_chat_template(messages, tools=tools, tokenize=False, **options))
        except Exception as error:  # a template is a program: it may raise anything
            what = str(error) or type(error).__name__
            raise InputError(f"the chat template does not take these messages: {what}") from error

    def probe(self, conversation: Conversation, options: Mapping[str, Any]) -> Probe:
        key = conversation.shape + json.dumps(options, sort_keys=True, default=str)
        if key not in self.probes:
            if len(self.probes) >= MOST_PROBES:
                self.probes.clear()
            self.probes[key] = self.look(conversation.marked(), options)
        return self.probes[key]

    def look(self, marked: Conversation, options: Mapping[str, Any]) -> Probe:
        """Arguments are tried as objects first, then as JSON text."""
        found = []
        for as_json in (False, True) if any("tool_calls" in m for m in marked.messages) else (False,):
            try:
                text = self.apply(marked.with_json_arguments() if as_json else marked, options)
            except InputError:
                continue
            probe = Probe(next(dropped(marked, text.lower()), ""), as_json)
            if not probe.dropped:
                return probe
            found.append(probe)
        return found[0] if found else Probe()  # it takes no marks: the words themselves will show why


def dropped(marked: Conversation, text: str) -> Iterator[str]:
    """What is not in `text`, or stands there as Python writes objects."""
    for n, message in enumerate(marked.messages):
        if message["content"] and message["content"] not in text:
            yield f"message {n + 1}, of the role {message['role'][:80]!r}"
        for call in message.get("tool_calls", ()):
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            ((key, value),) = arguments.items()
            if name not in text or value not in text or f"'{key}': '{value}'" in text:
                yield f"the tool calls of message {n + 1}"
    for tool in marked.tools:
        name = tool["function"]["name"]
        if name not in text or f"'name': '{name}'" in text:
            yield "the tools"


def mark(what: str, *where: int) -> str:
    """A word that stands in no template."""
    return MARK + what + "x".join(map(str, where)) + "z"


def read_message(message: Any, where: str) -> Message:
    """A message with `role`, `content` as a string, and if it has them `tool_calls` with arguments as objects."""
    if not isinstance(message, Mapping):
        raise InputError(f"{where} is {kind(message)}; wanted an object with `role` and `content`")
    found = dict(message)
    if "role" not in found and "from" in found:
        found = of_speaker(found, where)
    if not isinstance(found.get("role"), str) or not found["role"].strip():
        raise InputError(f"{where} has no role; wanted system, user, assistant or tool")
    found["role"] = ROLES.get(found["role"], found["role"])
    calls, one = found.pop("tool_calls", None), found.pop("function_call", None)
    calls = [one] if one is not None and not calls else calls
    if calls is not None and not isinstance(calls, list):
        raise InputError(f"{where} has `tool_calls` that are {kind(calls)}; wanted a list")
    if calls:
        found["tool_calls"] = [read_call(call, where) for call in calls]
    thought = next((found[name] for name in REASONING if isinstance(found.get(name), str)), None)
    found |= {} if thought is None else {name: found.get(name) or thought for name in REASONING}
    if "content" not in found and not calls and thought is None:
        raise InputError(f"{where} has no `content`; wanted a string or a list of parts")
    found["content"] = text_of(found.get("content"), where)
    return found


def of_speaker(message: Message, where: str) -> Message:
    """ShareGPT's `from` and `value`, as role and content."""
    speaker, value = message.pop("from"), message.pop("value", None)
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        raise InputError(f"{where} is from {str(speaker)[:80]!r}; wanted one of {', '.join(SPEAKERS)}")
    found = {**message, "role": SPEAKERS[speaker]}
    if speaker == "function_call":
        calls = from_json(value, f"{where} is a function call that")
        return {**found, "content": "", "tool_calls": calls if isinstance(calls, list) else [calls]}
    return found if value is None else {**found, "content": value}


def text_of(content: Any, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise InputError(f"{where} has a `content` that is {kind(content)}; wanted a string or a list of parts")
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") not in TEXT_PARTS or not isinstance(part.get("text"), str):
            named = part.get("type") if isinstance(part, Mapping) else part
            raise InputError(f"{where} holds a part {str(named)[:40]!r}; text alone is read here")
    return "".join(part["text"] for part in content)


def read_call(call: Any, where: str) -> dict[str, Any]:
    """A tool call in OpenAI's form, or flat as Hermes' and Qwen's data have it."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise InputError(f"{where} has a tool call without a function's name; send it as it was received")
    what = f"the arguments of {function['name'][:80]!r} in {where}"
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = from_json(arguments, what) if arguments.strip() else {}
    if arguments is not None and not isinstance(arguments, Mapping):
        raise InputError(f"{what} are {kind(arguments)}; wanted one object")
    rest = dict(call) if "function" in call else {}
    return called({"type": "function", **rest, "function": dict(function)}, function["name"], dict(arguments or {}))


def called(call: Mapping[str, Any], name: str, arguments: Any) -> dict[str, Any]:
    """The call with that name and those arguments."""
    return {**call, "function": {**call["function"], "name": name, "arguments": arguments}}


def read_tools(tools: Any) -> list[dict[str, Any]]:
    """A list of tools, or its JSON, as some data sets keep it; each in OpenAI's form, or its function alone."""
    if isinstance(tools, str):
        tools = from_json(tools, "`tools`") if tools.strip() else None
    if tools is not None and not isinstance(tools, list):
        raise InputError(f"`tools` is {kind(tools)}; wanted a list")
    found = []
    for tool in tools or ():
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
            raise InputError("a tool has no function with a name; describe it as OpenAI's API does")
        parameters = function.get("parameters")
        if isinstance(parameters, str):
            parameters = from_json(parameters, f"the parameters of {function['name'][:80]!r}")
        if parameters is not None and not isinstance(parameters, Mapping):
            raise InputError(f"the parameters of {function['name'][:80]!r} are {kind(parameters)}; wanted an object")
        described = dict(function) if parameters is None else {**function, "parameters": parameters}
        found.append({"type": "function", **(tool if "function" in tool else {}), "function": described})
    return found


def from_json(text: Any, what: str) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{what} cannot be read as JSON ({error}); write it as JSON") from error


def kind(value: Any) -> str:
    """The JSON kind of a value, with its article."""
    names = {
        type(None): "null",
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
    }
    return names.get(type(value), "an object")
