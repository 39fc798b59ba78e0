"""What of a request's prompt costs tokens, for every API's way to write a prompt."""

from __future__ import annotations

from collections.abc import Mapping

import orjson

from gateway.errors import InvalidRequest
from gateway.routes import Route
from gateway.sse import Api
from gateway.tokens import PromptText
from gateway.words import kind


def read_prompt(fields: Mapping[str, object], route: Route) -> PromptText:
    """The prompt's texts and sizes. Raises InvalidRequest."""
    text = PromptText()
    name = route.prompt_field
    prompt = fields.get(name)
    if prompt is None:
        raise InvalidRequest(f"{name}: this field is needed", param=name)
    if route.api in {Api.CHAT, Api.MESSAGES}:
        if not isinstance(prompt, list) or not prompt:
            raise InvalidRequest(
                f"messages: must be a list with at least one message, not {kind(prompt)}", param=name
            )
        _add_messages(text, prompt)
    elif route.api is Api.RESPONSES and isinstance(prompt, list):
        _add_items(text, prompt)
    else:
        _add_prompts(text, prompt, name)
    for extra in ("system", "instructions"):
        value = fields.get(extra)
        if isinstance(value, str):
            text.add_text(value)
        elif isinstance(value, list):
            _add_parts(text, value)
    tools = fields.get("tools")
    if isinstance(tools, list) and tools:
        text.add_text(_as_json(tools, "tools", param="tools"))
    return text


def _as_json(value: object, place: str, *, param: str) -> str:
    """A structure as the text that a chat template makes of it. Raises InvalidRequest."""
    try:
        return orjson.dumps(value).decode()
    except orjson.JSONEncodeError:  # orjson reads deeper nesting than it writes
        raise InvalidRequest(f"{place}: nested too deeply", param=param) from None


def _add_messages(text: PromptText, messages: list[object]) -> None:
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise InvalidRequest(f"messages[{index}]: must be an object, not {kind(message)}", param="messages")
        content = message.get("content")
        if isinstance(content, str):
            text.add_text(content)
        elif isinstance(content, list):
            _add_parts(text, content)
        elif content is not None:
            raise InvalidRequest(
                f"messages[{index}].content: must be a text or a list of parts, not {kind(content)}",
                param="messages",
            )
        calls = message.get("tool_calls")
        if isinstance(calls, list) and calls:
            text.add_text(_as_json(calls, f"messages[{index}].tool_calls", param="messages"))
        text.add_message()


def _add_parts(text: PromptText, parts: list[object]) -> None:
    for part in parts:
        if isinstance(part, str):
            text.add_text(part)
        elif isinstance(part, dict):
            inner = part.get("text", part.get("thinking", part.get("content")))
            if isinstance(inner, str):
                text.add_text(inner)
            elif isinstance(inner, list):
                _add_parts(text, inner)
            elif "image" in str(part.get("type")):
                text.add_image()


def _add_items(text: PromptText, items: list[object]) -> None:
    for item in items:
        if isinstance(item, dict):
            content = item.get("content", item.get("output", item.get("arguments")))
            if isinstance(content, str):
                text.add_text(content)
            elif isinstance(content, list):
                _add_parts(text, content)
            text.add_message()
        else:
            raise InvalidRequest(f"input: its items must be objects, not {kind(item)}", param="input")


def _add_prompts(text: PromptText, prompt: object, name: str) -> None:
    if isinstance(prompt, str):
        text.add_text(prompt)
        return
    if not isinstance(prompt, list) or not prompt:
        raise InvalidRequest(
            f"{name}: must be a text, a list of texts or token ids, not {kind(prompt)}", param=name
        )
    if all(type(item) is int for item in prompt):
        text.add_ids(len(prompt))
        return
    text.prompts = len(prompt)
    for item in prompt:
        if isinstance(item, str):
            text.add_text(item)
        elif isinstance(item, list) and all(type(token) is int for token in item):
            text.add_ids(len(item))
        else:
            raise InvalidRequest(f"{name}: a list must hold texts or token ids, not {kind(item)}", param=name)
