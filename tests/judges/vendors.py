"""What each vendor's API answers on the wire, so that one test can be put to all of them."""

from __future__ import annotations

import json
from typing import Any, Protocol

from judges.config import AnthropicJudge, OpenAIJudge, RemoteJudge
from tests.judges.stub import KEY_ENV, Step, Stub, chat, fails


class Vendor(Protocol):
    room: str
    """Name of the request's limit on output tokens."""

    def judge(self, stub: Stub, **settings: Any) -> RemoteJudge: ...

    def text(self, text: str | None) -> Step:
        """A whole reply."""
        ...

    def cut(self, text: str) -> Step: ...

    def refusal(self, words: str, text: str = "") -> Step: ...

    def error(self, status: int, message: str, code: str = "an_error", **headers: str) -> Step: ...


class Chat:
    room = "max_completion_tokens"

    def judge(self, stub: Stub, **settings: Any) -> RemoteJudge:
        return stub.judge(**settings)

    def text(self, text: str | None) -> Step:
        return chat(text)

    def cut(self, text: str) -> Step:
        return chat(text, finish="length")

    def refusal(self, words: str, text: str = "") -> Step:
        return chat(text, refusal=words)

    def error(self, status: int, message: str, code: str = "an_error", **headers: str) -> Step:
        return fails(status, message, code=code, **headers)


class Responses(Chat):
    room = "max_output_tokens"

    def judge(self, stub: Stub, **settings: Any) -> RemoteJudge:
        where = {"model": "judge", "base_url": stub.base_url, "api_key_env": KEY_ENV, "free": True}
        return OpenAIJudge(kind="openai", **(where | settings))

    def text(self, text: str | None) -> Step:
        return self._reply([{"type": "output_text", "text": text, "annotations": []}])

    def cut(self, text: str) -> Step:
        part = {"type": "output_text", "text": text, "annotations": []}
        return self._reply([part], status="incomplete", incomplete_details={"reason": "max_output_tokens"})

    def refusal(self, words: str, text: str = "") -> Step:
        return self._reply([{"type": "output_text", "text": text, "annotations": []}, {"type": "refusal", "refusal": words}])

    def _reply(self, parts: list[dict[str, Any]], **more: Any) -> Step:
        thought = {"type": "reasoning", "id": "rs_1", "summary": []}
        message = {"type": "message", "id": "m_1", "role": "assistant", "status": "completed", "content": parts}
        usage = {"input_tokens": 100, "input_tokens_details": {"cached_tokens": 40}, "output_tokens": 7, "total_tokens": 107}
        body = {"id": "chatcmpl-7", "object": "response", "created_at": 1, "model": "judge-2026-11-01", "status": "completed"}
        return Step(body=json.dumps(body | {"output": [thought, message], "usage": usage} | more).encode())


class Messages:
    room = "max_tokens"

    def judge(self, stub: Stub, **settings: Any) -> RemoteJudge:
        where = {"model": "judge", "base_url": stub.origin, "api_key_env": KEY_ENV, "free": True}
        return AnthropicJudge(kind="anthropic", **(where | settings))

    def text(self, text: str | None) -> Step:
        return self._reply([{"type": "text", "text": text}])

    def cut(self, text: str) -> Step:
        return self._reply([{"type": "text", "text": text}], stop_reason="max_tokens")

    def refusal(self, words: str, text: str = "") -> Step:
        said = [{"type": "text", "text": text}] if text else []
        return self._reply(said, stop_reason="refusal", stop_details={"category": "frontier_llm", "explanation": words})

    def error(self, status: int, message: str, code: str = "an_error", **headers: str) -> Step:
        body = {"type": "error", "error": {"type": code, "message": message}}
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return Step(status, json.dumps(body).encode(), {"content-type": "application/json", **named})

    def _reply(self, blocks: list[dict[str, Any]], **more: Any) -> Step:
        thought = {"type": "thinking", "thinking": 'perhaps {"rationale": "", "winner": "B"}', "signature": "s"}
        usage = {"input_tokens": 25, "cache_creation_input_tokens": 35, "cache_read_input_tokens": 40, "output_tokens": 7}
        body = {"id": "chatcmpl-7", "type": "message", "role": "assistant", "model": "judge-2026-11-01", "stop_reason": "end_turn"}
        return Step(body=json.dumps(body | {"content": [thought, *blocks], "usage": usage} | more).encode())


VENDORS: dict[str, Vendor] = {"openai_compatible": Chat(), "openai": Responses(), "anthropic": Messages()}
