"""The batch APIs of both vendors on a real loopback socket, with everything that goes wrong there."""

from __future__ import annotations

import json
import random
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from judges.config import AnthropicJudge, ApiBatch, OpenAICompatibleJudge, OpenAIJudge, RemoteJudge
from tests.judges.stub import KEY_ENV, Step

JUDGES: dict[str, type[RemoteJudge]] = {
    "openai": OpenAIJudge,
    "openai_compatible": OpenAICompatibleJudge,
    "anthropic": AnthropicJudge,
}


@dataclass
class Batch:
    """looks: how often it is still running when it is looked at. What it will say is decided, and billed, when it is made: a vendor runs a batch
    whether or not anybody asks for it."""

    id: str
    lines: dict[str, dict[str, Any]]
    metadata: dict[str, str]
    looks: int
    made_at: float = field(default_factory=time.time)
    status: str = "in_progress"
    made: list[tuple[str, Step | None]] = field(default_factory=list)
    """None: did not run, since it expired or was cancelled."""

    @property
    def is_over(self) -> bool:
        return self.status != "in_progress"

    @property
    def rows(self) -> list[tuple[str, Step | None]]:
        return self.made if self.is_over else []


class BatchServer:
    """answer(line id, body) → a reply as of a direct call; a status other than 200 is an error row, None a line that expired.

    faults: taken one a request, in order: "drop" cuts the connection *after* the request was carried out, "torn" within the answer, "html" answers
    200 with a page, a number is a status before anything was done, "" is no fault. Each is for the requests that `fails_at` matches.
    """

    def __init__(self, kind: str, answer: Callable[[str, dict[str, Any]], Step | None]) -> None:
        self.kind, self.answer = kind, answer
        self.batches: list[Batch] = []
        self.looks = 1
        self.files: dict[str, bytes] = {}
        self.deleted: list[str] = []
        self.billed: Counter[str] = Counter()
        self.faults: list[str | int] = []
        self.fails_at = re.compile("POST .*batches$")
        self.refusals: list[str] = []
        """Codes with which whole batches fail, in order."""
        self.twist: Callable[[list[Any]], list[Any]] = lambda rows: rows
        """Of the rows as they are handed out: shuffled, twice, or missing."""
        self.hidden_looks = 0
        """For so many looks a batch that is over has no files yet."""
        self.is_hidden = 0
        """For so many listings the newest batch is not there yet."""
        self.created: Callable[[], None] = lambda: None
        """Called when a batch was made and nobody was told of it yet."""
        self.lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def judge(self, *, hand_over_s: float = 0.2, max_calls: int = 1_000, **settings: Any) -> RemoteJudge:
        origin = f"http://127.0.0.1:{self._server.server_address[1]}"
        where = {
            "kind": self.kind,
            "model": "judge",
            "base_url": origin if self.kind == "anthropic" else f"{origin}/v1",
            "api_key_env": KEY_ENV,
            "free": True,
            "batch": ApiBatch(gather_s=0.05, poll_s=0.02, hand_over_s=hand_over_s, max_calls=max_calls),
        }
        return JUDGES[self.kind](**(where | settings))

    def __enter__(self) -> BatchServer:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    # ------------------------------------------------------------------------------------------------------------ the work

    def create(self, lines: dict[str, dict[str, Any]], metadata: dict[str, str]) -> Batch:
        batch = Batch(f"batch_{len(self.batches):04}", lines, metadata, self.looks)
        self.batches.append(batch)
        if self.refusals:
            batch.status = f"failed:{self.refusals.pop(0)}"
        else:
            batch.made = [(line, self.answer(line, body)) for line, body in batch.lines.items()]
            self._bill(batch.made, 1)
        self.created()
        return batch

    def _bill(self, rows: list[tuple[str, Step | None]], times: int) -> None:
        for line, step in rows:
            if step is not None and step.status == 200:
                self.billed[line] += times

    def look(self, batch: Batch) -> Batch:
        batch.looks -= 1
        if batch.looks < 0 and not batch.is_over:
            batch.status = "expired" if any(step is None for _, step in batch.made) else "completed"
        return batch

    def cancel(self, batch: Batch) -> None:
        num_ran = len(batch.lines) // 2
        self._bill(batch.made[num_ran:], -1)
        batch.made = [(line, step if at < num_ran else None) for at, (line, step) in enumerate(batch.made)]
        batch.status = "cancelled"

    @property
    def times_sent(self) -> Counter[str]:
        """How many batches each line went into."""
        return Counter(line for batch in self.batches if not batch.status.startswith("failed") for line in batch.lines)

    def _listed(self) -> list[Batch]:
        shown = list(reversed(self.batches))
        if self.is_hidden > 0:
            self.is_hidden -= 1
            return shown[1:]
        return shown

    def route(self, method: str, path: str, body: bytes) -> bytes:
        path, _, query = path.partition("?")
        parts = path.strip("/").split("/")
        if parts[1] == "messages":
            return json.dumps(self._anthropic(method, parts, body)).encode() if "results" not in parts else self._results(parts[3])
        if parts[1] == "files" and method == "POST":
            name = f"file_{len(self.files)}"
            self.files[name] = max(body.split(b"\r\n\r\n"), key=len).rsplit(b"\r\n--", 1)[0]
            shown = {"id": name, "object": "file", "bytes": 1, "created_at": 1, "filename": "f", "purpose": "batch"}
            return json.dumps(shown | {"status": "processed"}).encode()
        if parts[1] == "files" and method == "DELETE":
            self.deleted.append(parts[2])
            return json.dumps({"id": parts[2], "object": "file", "deleted": True}).encode()
        if parts[1] == "files":
            return self.files[parts[2]]
        return json.dumps(self._openai(method, parts, body, query)).encode()

    def _openai(self, method: str, parts: list[str], body: bytes, query: str) -> dict[str, Any]:
        if method == "POST":
            asked = json.loads(body)
            lines = [json.loads(line) for line in self.files[asked["input_file_id"]].splitlines()]
            assert {line["url"] for line in lines} == {asked["endpoint"]}
            return self._openai_batch(self.create({line["custom_id"]: line["body"] for line in lines}, asked["metadata"]))
        if len(parts) == 2:
            found = [] if "after=" in query else [self._openai_batch(batch) for batch in self._listed()]
            return {"object": "list", "data": found, "has_more": False}
        return self._openai_batch(self.look(self._batch(parts[2])))

    def _openai_batch(self, batch: Batch) -> dict[str, Any]:
        shown: dict[str, Any] = {
            "id": batch.id,
            "object": "batch",
            "completion_window": "24h",
            "created_at": int(batch.made_at),
            "endpoint": "/v1/responses",
            "input_file_id": "file_0",
            "metadata": batch.metadata,
            "status": batch.status.split(":")[0],
            "request_counts": {"total": len(batch.lines), "completed": sum(s is not None for _, s in batch.rows), "failed": 0},
        }
        if batch.status.startswith("failed"):
            code = batch.status.split(":")[1]
            shown["errors"] = {"object": "list", "data": [{"code": code, "message": f"refused: {code}"}]}
        if batch.rows and self.hidden_looks > 0:
            self.hidden_looks -= 1
        elif batch.rows:
            rows = [self._openai_row(line, step) for line, step in self.twist(batch.rows)]
            self.files[f"{batch.id}-out"] = b"\n".join(row for row, is_error in rows if not is_error)
            self.files[f"{batch.id}-errors"] = b"\n".join(row for row, is_error in rows if is_error)
            shown |= {"output_file_id": f"{batch.id}-out", "error_file_id": f"{batch.id}-errors"}
        return shown

    def _openai_row(self, line: str, step: Step | None) -> tuple[bytes, bool]:
        if step is None:
            error = {
                "code": "batch_cancelled" if self._is_cancelled(line) else "batch_expired",
                "message": "This request could not be executed before the completion window expired.",
            }
            return json.dumps({"id": "r", "custom_id": line, "response": None, "error": error}).encode(), True
        response = {"status_code": step.status, "request_id": "r", "body": json.loads(step.body)}
        return json.dumps({"id": "r", "custom_id": line, "response": response, "error": None}).encode(), step.status != 200

    def _anthropic(self, method: str, parts: list[str], body: bytes) -> dict[str, Any]:
        if method == "POST":
            return self._anthropic_batch(self.create({one["custom_id"]: one["params"] for one in json.loads(body)["requests"]}, {}))
        if len(parts) == 3:
            found = [self._anthropic_batch(batch) for batch in self._listed()]
            return {"data": found, "has_more": False, "first_id": None, "last_id": None}
        return self._anthropic_batch(self.look(self._batch(parts[3])))

    def _anthropic_batch(self, batch: Batch) -> dict[str, Any]:
        unrun = "canceled" if batch.status == "cancelled" else "expired"
        kinds = Counter(unrun if step is None else "succeeded" if step.status == 200 else "errored" for _, step in batch.rows)
        counts = dict.fromkeys(("processing", "succeeded", "errored", "canceled", "expired"), 0) | kinds
        counts["processing"] = len(batch.lines) - len(batch.rows)
        when = datetime.fromtimestamp(batch.made_at, UTC).isoformat()
        return {
            "id": batch.id,
            "type": "message_batch",
            "processing_status": "ended" if batch.is_over else "in_progress",
            "request_counts": counts,
            "created_at": when,
            "expires_at": when,
            "ended_at": when if batch.is_over else None,
            "archived_at": None,
            "cancel_initiated_at": when if batch.status == "cancelled" else None,
            "results_url": f"http://127.0.0.1:{self._server.server_address[1]}/v1/messages/batches/{batch.id}/results",
        }

    def _results(self, name: str) -> bytes:
        return b"\n".join(self._anthropic_row(line, step) for line, step in self.twist(self._batch(name).rows))

    def _anthropic_row(self, line: str, step: Step | None) -> bytes:
        result: dict[str, Any]
        if step is None:
            result = {"type": "canceled" if self._is_cancelled(line) else "expired"}
        elif step.status == 200:
            result = {"type": "succeeded", "message": json.loads(step.body)}
        else:
            result = {"type": "errored", "error": json.loads(step.body)}
        return json.dumps({"custom_id": line, "result": result}).encode()

    def _is_cancelled(self, line: str) -> bool:
        return any(batch.status == "cancelled" and line in batch.lines for batch in self.batches)

    def _batch(self, name: str) -> Batch:
        found = {batch.id: batch for batch in self.batches}
        return found[name]


def shuffled(rows: list[Any]) -> list[Any]:
    return random.Random(3).sample(rows, len(rows))


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is part of the script."""


def _handler(server: BatchServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 65_536  # header and body in one packet: two would wait 40 ms for each other

        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            with server.lock:
                hit = server.fails_at.fullmatch(f"{self.command} {self.path.partition('?')[0]}")
                fault = server.faults.pop(0) if server.faults and hit else None
                if isinstance(fault, int):
                    self._send(fault, json.dumps({"type": "error", "error": {"type": "x", "message": "not now"}}).encode())
                    return
                try:
                    payload = server.route(self.command, self.path, body)
                except LookupError:
                    self._send(404, b'{"type": "error", "error": {"type": "not_found_error", "message": "no such batch"}}')
                    return
            match fault:
                case "drop":
                    self.connection.shutdown(socket.SHUT_RDWR)
                    self.close_connection = True
                case "html":
                    self._send(200, b"<html>", "text/html")
                case "torn":
                    self._send(200, payload[: len(payload) // 2], is_torn=True, length=len(payload))
                case _:
                    self._send(200, payload)

        do_GET = do_POST = do_DELETE = _serve

        def _send(
            self, status: int, payload: bytes, kind: str = "application/json", *, is_torn: bool = False, length: int = 0
        ) -> None:
            self.send_response(status)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(length or len(payload)))
            self.close_connection |= is_torn
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler
