"""A hub of data sets on a loopback port: as much of its HTTP interface as `datasets` and `huggingface_hub` use."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

TOKEN = "hf_of_an_account_with_access"
Row = Mapping[str, Any]


@dataclass
class DataSet:
    """commits: revision → file → content."""

    commits: dict[str, dict[str, bytes]]
    gated: bool = False

    @classmethod
    def of_rows(cls, rows: Iterable[Row], *, revision: str, split: str, name: str = "default", gated: bool = False) -> DataSet:
        return cls({revision: files_of(rows, split=split, name=name)}, gated)


def files_of(rows: Iterable[Row], *, split: str, name: str = "default") -> dict[str, bytes]:
    card = f"---\nconfigs:\n- config_name: {name}\n  data_files:\n  - split: {split}\n    path: rows.jsonl\n---\n"
    return {"README.md": card.encode(), "rows.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode()}


@dataclass
class Hub:
    sets: dict[str, DataSet]
    url: str = ""
    asked: list[str] = field(default_factory=list)


@contextmanager
def hub_of(sets: dict[str, DataSet]) -> Iterator[Hub]:
    hub = Hub(sets)

    class Handler(_Handler):
        served = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    served: Hub

    def log_message(self, format: str, *args: Any) -> None:
        self.served.asked.append(f"{self.command} {self.path}")

    def do_HEAD(self) -> None:
        self._answer(b"")

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers["Content-Length"])))

    def _answer(self, body: bytes) -> None:
        match urlsplit(self.path).path.strip("/").split("/"):
            case ["datasets", owner, name, "resolve", revision, *file]:
                self._file(f"{owner}/{name}", revision, "/".join(file))
            case ["api", "datasets", owner, name, "revision", revision]:
                self._describe(f"{owner}/{name}", revision, lambda files: self._info(f"{owner}/{name}", revision, files))
            case ["api", "datasets", owner, name, "tree", revision, *_]:
                self._describe(f"{owner}/{name}", revision, _listed)
            case ["api", "datasets", owner, name, "paths-info", revision]:
                self._describe(f"{owner}/{name}", revision, lambda files: [f for f in _listed(files) if f["path"] in body.decode()])
            case ["api", "datasets", owner, name, "auth-check"]:
                found = self._set(f"{owner}/{name}")
                if found is not None and self._may_read(found):
                    self._send(200, b"{}")
            case _:
                self._send(404)

    def _set(self, repo: str) -> DataSet | None:
        if repo not in self.served.sets:
            self._send(401, headers={"X-Error-Code": "RepoNotFound"})
        return self.served.sets.get(repo)

    def _may_read(self, found: DataSet) -> bool:
        if not found.gated or self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self._send(403 if "Authorization" in self.headers else 401, headers={"X-Error-Code": "GatedRepo"})
        return False

    def _file(self, repo: str, revision: str, name: str) -> None:
        found = self._set(repo)
        if found is None or not self._may_read(found):
            return
        files = found.commits.get(revision)
        if files is None:
            self._send(404, headers={"X-Error-Code": "RevisionNotFound"})
        elif name not in files:
            self._send(404, headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": revision})
        else:
            etag = hashlib.sha1(files[name]).hexdigest()
            self._send(200, files[name], headers={"ETag": f'"{etag}"', "X-Repo-Commit": revision})

    def _describe(self, repo: str, revision: str, describe: Any) -> None:
        """What the hub tells everybody about a data set, a gated one too."""
        found = self._set(repo)
        if found is None:
            return
        if revision not in found.commits:
            self._send(404, headers={"X-Error-Code": "RevisionNotFound"})
        else:
            self._send(200, json.dumps(describe(found.commits[revision])).encode(), headers={"Content-Type": "application/json"})

    def _info(self, repo: str, revision: str, files: dict[str, bytes]) -> dict[str, Any]:
        siblings = [{"rfilename": name} for name in files]
        return {
            "id": repo,
            "sha": revision,
            "siblings": siblings,
            "private": False,
            "gated": self.served.sets[repo].gated,
            "tags": [],
        }

    def _send(self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _listed(files: dict[str, bytes]) -> list[dict[str, Any]]:
    return [{"type": "file", "oid": hashlib.sha1(b).hexdigest(), "size": len(b), "path": name} for name, b in files.items()]
