"""A scripted provider on a real loopback socket: the judge's client, time-outs and retries are the real ones."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from judges.config import OpenAICompatibleJudge

KEY_ENV = "DPO_LOOP_TEST_JUDGE_KEY"


@dataclass
class Step:
    """One answer of the server. drop: cut the connection instead; cut_short: cut it within the body; delay_s: wait first."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=lambda: {"content-type": "application/json"})
    delay_s: float = 0.0
    drop: bool = False
    cut_short: bool = False


@dataclass(frozen=True)
class Seen:
    key: str
    """The judge's id of the call."""
    authorization: str
    path: str
    body: dict[str, Any]
    at: float


def says(winner: str, *, rationale: str = "because", delay_s: float = 0.0) -> Step:
    return chat(json.dumps({"rationale": rationale, "winner": winner}), delay_s=delay_s)


def chat(content: str | None, *, finish: str = "stop", refusal: str | None = None, delay_s: float = 0.0) -> Step:
    message = {"role": "assistant", "content": content, "refusal": refusal}
    body = {
        "id": "chatcmpl-7",
        "object": "chat.completion",
        "created": 1,
        "model": "judge-2026-11-01",
        "choices": [{"index": 0, "message": message, "finish_reason": finish, "logprobs": None}],
        "usage": {
            "prompt_tokens": 100,
            "completion_tokens": 7,
            "total_tokens": 107,
            "prompt_tokens_details": {"cached_tokens": 40},
        },
    }
    return Step(body=json.dumps(body).encode(), delay_s=delay_s)


def fails(status: int, message: str, *, code: str | None = None, **headers: str) -> Step:
    body = {"error": {"message": message, "type": code, "code": code, "param": None}}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Step(status, json.dumps(body).encode(), {"content-type": "application/json", **named})


class Stub:
    """`script` is played in order; when it is used up, `policy(body)` answers every further request."""

    def __init__(self) -> None:
        self.script: list[Step] = []
        self.policy: Callable[[dict[str, Any]], Step] = lambda body: says("A")
        self.tokenizer: Step | None = None
        """Instead of one token for each sign."""
        self.seen: list[Seen] = []
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def base_url(self) -> str:
        return f"{self.origin}/v1"

    def judge(self, **settings: Any) -> OpenAICompatibleJudge:
        where = {"model": "judge", "base_url": self.base_url, "api_key_env": KEY_ENV, "free": True}
        return OpenAICompatibleJudge(kind="openai_compatible", **(where | settings))

    @property
    def keys(self) -> list[str]:
        return [seen.key for seen in self.seen]

    def __enter__(self) -> Stub:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, seen: Seen) -> Step:
        with self._lock:
            self.seen.append(seen)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            step = self.script.pop(0) if self.script else self.policy(seen.body)
        self._closing.wait(step.delay_s)
        with self._lock:
            self._at_once -= 1
        return step


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that gave up waiting is part of the script, not news."""


def _handler(stub: Stub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 65_536  # header and body in one packet: two would wait 40 ms for each other

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            if self.path == "/tokenize":
                each_sign = Step(body=json.dumps({"tokens": [ord(sign) for sign in body["prompt"]]}).encode())
                step = stub.tokenizer or each_sign
            else:
                headers = self.headers
                seen = Seen(headers["x-client-request-id"], headers["authorization"], self.path, body, time.monotonic())
                step = stub.answer(seen)
            if step.drop:
                # close() alone would leave the client waiting: the handler's own file objects keep the socket open.
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            self.send_response(step.status)
            for name, value in step.headers.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(step.body) + (1_000 if step.cut_short else 0)))
            self.close_connection |= step.cut_short
            self.end_headers()
            self.wfile.write(step.body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler
