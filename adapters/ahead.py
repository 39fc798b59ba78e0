"""Computing the beginning of a prompt ahead of its request: what vLLM is asked, and which prompts it can be told.

A prefix is a completion of one token for the first token ids of the prompt. vLLM keeps the KV of its whole blocks,
keyed by the ids, the LoRA adapter (a model's name) and the request's `cache_salt`, so the request itself finds it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import orjson

from adapters.contract import PromptIds, Unsupported
from adapters.monitored import positive_int, tokenize_question

_CHAT = "/v1/chat/completions"
_COMPLETIONS = "/v1/completions"
_KEYED = ("model", "cache_salt")
# Each makes of the prompt what /tokenize does not know of, or has vLLM not read its cache at all (prompt log
# probabilities). A wrong guess costs steps and no more: the cache is keyed by content.
_NOT_AHEAD = (
    *("documents", "reasoning_effort", "truncate_prompt_tokens", "prompt_embeds", "media_io_kwargs"),
    *("mm_processor_kwargs", "prompt_logprobs", "prompt_logprob_token_ids", "skip_reading_prefix_cache", "echo"),
)


def prompt_question(
    path: str, body: bytes, chat_fields: Sequence[str]
) -> tuple[dict[str, object] | tuple[int, ...], Mapping[str, object]]:
    """What to ask /tokenize for a request's token ids, or the ids themselves; and what its cache is keyed by.

    Raises Unsupported for what /tokenize cannot represent: other routes than chats and completions, several
    prompts, parts of messages that are no text, and the fields in `_NOT_AHEAD`.
    """
    if path not in (_CHAT, _COMPLETIONS):
        raise Unsupported(f"compute ahead: {path} has no token ids")
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Unsupported("compute ahead: the body is not JSON") from error
    if not isinstance(fields, dict):
        raise Unsupported("compute ahead: the body is not an object")
    for name in _NOT_AHEAD:
        if fields.get(name):
            raise Unsupported(f"compute ahead: {name} is not known to /tokenize, or the cache is not read with it")
    if fields.get("tools") and fields.get("tool_choice") == "none":
        raise Unsupported("compute ahead: whether tools are in the prompt depends on how the engine was started")
    keyed = {name: fields[name] for name in _KEYED if fields.get(name) is not None}
    if path == _CHAT:
        _check_texts(fields.get("messages"))
        return _whole(tokenize_question({"messages": [], **fields}, chat_fields)), keyed
    prompt = fields.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], list):
        prompt = prompt[0]
    if isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
        return tuple(prompt), keyed
    asked = {name: value for name, value in fields.items() if name not in ("messages", "input")}
    return _whole(tokenize_question({**asked, "prompt": prompt}, ())), keyed


def prefix_body(prompt: PromptIds, tokens: int) -> bytes:
    """The completion that leaves the first `tokens` in the cache."""
    return orjson.dumps({**prompt.keyed, "prompt": prompt.ids[:tokens], "max_tokens": 1, "temperature": 0})


def longest_of(answer: Mapping[str, object]) -> int:
    """The longest prompt and answer that /tokenize says the model takes."""
    return positive_int(answer.get("max_model_len")) or sys.maxsize


def _whole(question: dict[str, object] | int) -> dict[str, object]:
    if isinstance(question, int):
        raise Unsupported("compute ahead: the body has several prompts")
    return question


def _check_texts(messages: object) -> None:
    """Raises Unsupported when a message holds anything but text."""
    if not isinstance(messages, list) or not messages:
        raise Unsupported("compute ahead: the body has no messages")
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        if content is None or isinstance(content, str):
            continue
        parts = content if isinstance(content, list) else [content]
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in parts):
            raise Unsupported("compute ahead: a message holds more than text")
