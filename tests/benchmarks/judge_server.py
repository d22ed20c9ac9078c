"""A judge's server for benchmarks: a process of its own, as little work a call as Python allows, so that the client is what is measured.

`python -m tests.benchmarks.judge_server --delay-ms 500 [--rate 100 --burst 10]` prints its port and serves until it is ended.

    POST .../chat/completions   after the delay, a fixed verdict that fits the judge's schema; over the rate at once 429 and when to come back
    GET /figures                {"refused": number of 429s, "billed": {id of the call: number of 200s}}

A call is billed when it is let in, whether or not the client still waits when the answer is ready: that is what a vendor does. It is
told by its `x-client-request-id`, which is the key of the ledger.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import re
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
BACKLOG = 1_024
"""All connections of a judge may arrive in one turn."""

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_ID = re.compile(rb"\r\nx-client-request-id: *(\w+)", re.IGNORECASE)

RATIONALE = (
    "Both answer the question. The first says why, names the exception and is no longer than it has to be; the second repeats itself. "
    * 2
)
_VERDICT = {
    "id": "chatcmpl-7",
    "object": "chat.completion",
    "created": 1,
    "model": "judge-2026-11-01",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": json.dumps({"rationale": RATIONALE, "winner": "A"}), "refusal": None},
            "finish_reason": "stop",
            "logprobs": None,
        }
    ],
    "usage": {"prompt_tokens": 900, "completion_tokens": 60, "total_tokens": 960, "prompt_tokens_details": {"cached_tokens": 0}},
}
_TOO_FAST = {"error": {"message": "Rate limit reached.", "type": "requests", "code": "rate_limit_exceeded", "param": None}}


def _response(status: str, body: object, **headers: str) -> bytes:
    payload = json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status}", "content-type: application/json", f"content-length: {len(payload)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + payload


_DECIDED = _response("200 OK", _VERDICT)


class Bucket:
    """Tokens that come at `rate` a second, `burst` at most; every call takes one."""

    def __init__(self, rate: float, burst: float) -> None:
        self._rate, self._burst, self._tokens, self._at = rate, burst, burst, time.monotonic()

    def wait_ms(self) -> int:
        """0 if the call is let in, else the milliseconds until one could be."""
        now = time.monotonic()
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self._rate)
        self._at = now
        if self._tokens >= 1:
            self._tokens -= 1
            return 0
        return math.ceil((1 - self._tokens) / self._rate * 1_000)


class _Desk:
    """What all connections share."""

    def __init__(self, delay_s: float, bucket: Bucket | None) -> None:
        self.delay_s, self.bucket = delay_s, bucket
        self.billed: Counter[str] = Counter()
        self.refused = 0


class _Connection(asyncio.Protocol):
    def __init__(self, desk: _Desk) -> None:
        self._desk = desk
        self._buffer = b""
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[:end]
            length = _LENGTH.search(head)
            whole = end + 4 + (int(length[1]) if length else 0)
            if len(self._buffer) < whole:
                return
            self._buffer = self._buffer[whole:]
            self._answer(head)

    def _answer(self, head: bytes) -> None:
        desk = self._desk
        if head.startswith(b"GET"):
            self._send(_response("200 OK", {"refused": desk.refused, "billed": desk.billed}))
            return
        wait_ms = desk.bucket.wait_ms() if desk.bucket else 0
        if wait_ms:
            desk.refused += 1
            self._send(_response("429 Too Many Requests", _TOO_FAST, retry_after_ms=str(wait_ms)))
            return
        call = _ID.search(head)
        desk.billed[call[1].decode() if call else ""] += 1
        asyncio.get_running_loop().call_later(desk.delay_s, self._send, _DECIDED)

    def _send(self, response: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(response)


@dataclass(frozen=True)
class Server:
    """For the client's side: a server that runs in another process."""

    origin: str

    @property
    def base_url(self) -> str:
        return f"{self.origin}/v1"

    def figures(self) -> tuple[dict[str, int], int]:
        """Billed calls by id, and the number of 429s."""
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{self.origin}/figures") as response:
            figures = json.load(response)
        return figures["billed"], figures["refused"]


@contextmanager
def served(*, delay_ms: float, rate: float = 0, burst: float = 1) -> Iterator[Server]:
    command = [
        sys.executable,
        "-m",
        "tests.benchmarks.judge_server",
        "--delay-ms",
        str(delay_ms),
        "--rate",
        str(rate),
        "--burst",
        str(burst),
    ]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield Server(f"http://127.0.0.1:{int(process.stdout.readline())}")
        finally:
            process.terminate()


async def _serve(desk: _Desk) -> None:
    server = await asyncio.get_running_loop().create_server(lambda: _Connection(desk), "127.0.0.1", 0, backlog=BACKLOG)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delay-ms", type=float, default=50)
    parser.add_argument("--rate", type=float, default=0, help="calls a second that are let in; 0: all")
    parser.add_argument("--burst", type=float, default=1, help="calls that may come at once after a rest")
    options = parser.parse_args()
    bucket = Bucket(options.rate, options.burst) if options.rate else None
    asyncio.run(_serve(_Desk(options.delay_ms / 1_000, bucket)))


if __name__ == "__main__":
    main()
