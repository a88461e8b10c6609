"""Bodies of answers: completions, chats, usage, log-probs in both of OpenAI's shapes, errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from headrace.errors import (
    AdapterError,
    EngineDeadError,
    HeadraceError,
    QueueFullError,
    RequestError,
    TokenizerError,
    UnknownModelError,
)
from headrace.openai_api.bodies import CHAT, COMPLETIONS, ENGINE_FIELDS, IDLE_FIELDS, REFUSED
from headrace.openai_api.calls import CallFilter, call_body
from headrace.openai_api.work import Work
from headrace.outputs import CompletionOutput, RequestOutput
from headrace.request import PositionLogprobs
from headrace.text.tokenizer import Tokenizer
from headrace.text.tools import ToolCall

LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot write."""
_FIELDS = frozenset([*COMPLETIONS, *CHAT, *ENGINE_FIELDS, *IDLE_FIELDS, *REFUSED])


def answer(
    work: Work, outputs: Sequence[RequestOutput], *, request_id: str, created: int, model: str
) -> dict[str, Any]:
    """The body of the answer. `outputs` are those of `work.prompts`, in that order; `created` in seconds since 1970.

    Raises the error of a sample that failed.
    """
    choices: list[dict[str, Any]] = []
    for output in outputs:
        for sample in output.outputs:
            if sample.finish_reason == "error" and sample.error is not None:
                raise sample.error
            index = {"index": len(choices)}
            if work.kind == "completions":
                made = _text_choice(work, output, sample)
            else:
                made = _chat_choice(work, sample, request_id, len(choices))
            choices.append(index | made | _extras(work, output, sample))
    return {
        "id": request_id,
        "object": "text_completion" if work.kind == "completions" else "chat.completion",
        "created": created,
        "model": model,
        "choices": choices,
        "usage": usage(
            sum(len(output.prompt_token_ids) for output in outputs),
            sum(len(sample.token_ids) for output in outputs for sample in output.outputs),
            sum(output.metrics.cached_tokens for output in outputs if output.metrics),
        ),
    }


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    """The tokens of a request."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def _extras(work: Work, output: RequestOutput, sample: CompletionOutput) -> dict[str, Any]:
    """What OpenAI's answers do not have: why exactly it stopped, the seed, token ids if asked for."""
    ids = {"prompt_token_ids": output.prompt_token_ids, "token_ids": sample.token_ids} if work.return_token_ids else {}
    return {"stop_reason": sample.stop_reason, "seed": output.seed, **ids}


def _text_choice(work: Work, output: RequestOutput, sample: CompletionOutput) -> dict[str, Any]:
    text, logprobs = sample.text, None
    ids, positions = sample.token_ids, list(sample.logprobs or [])
    if work.echo:
        head = prompt_text(work, output.prompt, output.prompt_token_ids)
        text = head + text
        ids = output.prompt_token_ids + ids
        positions = [*(output.prompt_logprobs or []), *positions]  # type: ignore[list-item]
    if work.top_logprobs is not None:
        logprobs = text_logprobs(ids, positions, work.tokenizer, 0)
    return {"text": text, "logprobs": logprobs, "finish_reason": sample.finish_reason}


def prompt_text(work: Work, text: str | None, ids: list[int]) -> str:
    """What `echo` shows of a prompt."""
    if text is not None:
        return text
    return "" if work.tokenizer is None else work.tokenizer.decode(ids, work.params.skip_special_tokens)


def _chat_choice(work: Work, sample: CompletionOutput, request_id: str, index: int) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": sample.text}
    reason, extra = sample.finish_reason, {}
    if work.tools is not None:
        calls = CallFilter(work.tools, work.hidden)
        found = calls.push(sample.text) + calls.finish()
        message["content"] = "".join(part for part in found if isinstance(part, str)) or None
        if calls.n_calls:
            made = [part for part in found if isinstance(part, ToolCall)]
            message["tool_calls"] = [call_body(call, request_id, index, place) for place, call in enumerate(made)]
            reason = calls_reason(reason)
        if calls.error is not None:
            extra = {"tool_call_error": str(calls.error)}
    logprobs = None
    if work.top_logprobs is not None:
        logprobs = chat_logprobs(sample.token_ids, sample.logprobs or [], work.top_logprobs, work.tokenizer)
    return {"message": message, "logprobs": logprobs, "finish_reason": reason, **extra}


def calls_reason(reason: str | None) -> str | None:
    """Why an answer with calls ended: for the calls, unless it was cut."""
    return "tool_calls" if reason == "stop" else reason


def text_logprobs(
    ids: Sequence[int], positions: Sequence[PositionLogprobs | None], tokenizer: Tokenizer | None, offset: int
) -> dict[str, Any]:
    """Log-probs as /v1/completions has them. `offset`: characters of the answer's text before the first token."""
    made: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token, position in zip(ids, positions, strict=False):
        # The first token of a prompt has no log-prob, and so no entry that names it.
        entry = position[token] if position else None
        text = (entry.decoded_token if entry else None) or _decoded(tokenizer, token)
        made["tokens"].append(_spelled(text, token, tokenizer))
        made["token_logprobs"].append(None if entry is None else _finite(entry.logprob))
        top: dict[str, float] | None = None
        if position:
            top = {}
            for other, one in sorted(position.items(), key=lambda item: item[1].rank):
                top.setdefault(_spelled(one.decoded_token or "", other, tokenizer), _finite(one.logprob))
        made["top_logprobs"].append(top)
        made["text_offset"].append(offset)
        offset += len(text)
    return made


def chat_logprobs(
    ids: Sequence[int], positions: Sequence[PositionLogprobs], top: int, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """Log-probs as chats have them."""
    content = []
    for token, position in zip(ids, positions, strict=False):
        ranked = sorted(position.items(), key=lambda item: item[1].rank)
        others = [_chat_entry(other, position, tokenizer) for other, one in ranked if one.rank <= top]
        content.append(_chat_entry(token, position, tokenizer) | {"top_logprobs": others})
    return {"content": content, "refusal": None}


def _chat_entry(token: int, position: PositionLogprobs, tokenizer: Tokenizer | None) -> dict[str, Any]:
    one = position[token]
    text = one.decoded_token or ""
    raw = _bytes(text, token, tokenizer)
    return {"token": text, "logprob": _finite(one.logprob), "bytes": list(raw)}


def _bytes(text: str, token: int, tokenizer: Tokenizer | None) -> bytes:
    """The bytes of a token, which may be a part of a character."""
    if tokenizer is None:
        return b""
    if tokenizer.is_byte_level:
        return tokenizer.token_bytes(token)
    value = tokenizer.byte_value(token)
    return text.encode() if value is None else bytes([value])


def _spelled(text: str, token: int, tokenizer: Tokenizer | None) -> str:
    """A token's text; of a part of a character its bytes, as OpenAI writes them: `bytes:\\xe2`."""
    if tokenizer is None:
        return f"token_id:{token}"
    if "\ufffd" not in text:
        return text
    raw = _bytes(text, token, tokenizer)
    return text if raw == text.encode() else "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _decoded(tokenizer: Tokenizer | None, token: int) -> str:
    return "" if tokenizer is None else tokenizer.decode([token], skip_special_tokens=False)


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)


# Errors


def status_of(error: BaseException) -> int:
    """The HTTP status of an error. 500 is for errors that no request can be blamed for."""
    if isinstance(error, UnknownModelError):
        return 404
    if isinstance(error, (RequestError, AdapterError, TokenizerError)):
        return 400
    if isinstance(error, QueueFullError):
        return 429
    if isinstance(error, EngineDeadError):
        return 503
    return 500


_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


def error_body(error: BaseException | str, status: int | None = None, code: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients read it. Messages begin with the name of the field, where one is to blame."""
    if status is None:
        status = 400 if isinstance(error, str) else status_of(error)
    if isinstance(error, (HeadraceError, str)):
        message = str(error)
    else:
        message = f"the server failed ({type(error).__name__}); its log says more"
    word = message.split(" ", 1)[0].split("[")[0].split(".")[0].rstrip(":,")
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    if code is None:
        code = {404: "model_not_found", 429: "queue_full"}.get(status) if not isinstance(error, str) else None
    return {"error": {"message": message, "type": kind, "param": word if word in _FIELDS else None, "code": code}}
