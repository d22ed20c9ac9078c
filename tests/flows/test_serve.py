"""Reports over real HTTP: what they need to be read, and nothing else of the run."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpo_loop.errors import InputError
from dpo_loop.exchange import JUNIT
from dpo_loop.layout import RunDir
from dpo_loop.types import GateState
from flows.serve import ReportServer, is_loopback
from flows.steps import read_run_config
from flows.summary import write_index_page
from tests.flows.runs import judged_round, played_round, started_run

COMMAND = "from flows.shipping import serve_report; serve_report()"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Two rounds have ended, a third waits for a person; beside the reports lies what nobody is to read over HTTP."""
    run = started_run(tmp_path_factory.mktemp("served") / "run")
    played_round(run, 1, GateState.PASS)
    played_round(run, 2, GateState.FAIL)
    judged_round(run, 3, GateState.NEEDS_REVIEW)
    (run.round(1).stage("gate") / JUNIT).write_text("<testsuites/>")
    write_index_page(run, read_run_config(run))
    run.ledger.write_bytes(b"secret")
    (run.round(1).stage("report") / "grades.jsonl").write_text("secret")
    return run


@pytest.fixture(scope="module")
def server(run: RunDir) -> Iterator[ReportServer]:
    with serving(run) as server:
        yield server


class serving(ReportServer):
    """Answers from a thread while it is open."""

    def __init__(self, run: RunDir, host: str = "127.0.0.1") -> None:
        super().__init__(run, host, 0)

    def __enter__(self) -> ReportServer:
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.thread.join()
        super().__exit__(*error)


class Reply:
    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status, self.body, self.headers = response.status, response.read(), response.headers


def ask(server: ReportServer, path: str, *, method: str = "GET", host: str | None = None) -> Reply:
    """The path goes out as it is: http.client does not tidy it."""
    connection = http.client.HTTPConnection("127.0.0.1" if server.host != "::1" else "::1", server.server_port, timeout=20)
    try:
        connection.request(method, path, headers={} if host is None else {"Host": host})
        return Reply(connection.getresponse())
    finally:
        connection.close()


def test_the_pages_of_a_run_are_served_as_they_are(server: ReportServer, run: RunDir) -> None:
    for path, file, kind in (
        ("/", run.index_page, "text/html; charset=utf-8"),
        ("/index.html?from=mail", run.index_page, "text/html; charset=utf-8"),
        ("/rounds/001/report/report.html", run.round(1).report_page, "text/html; charset=utf-8"),
        ("/rounds/001/gate/gate_report.json", run.round(1).gate_report, "application/json"),
        ("/rounds/001/gate/junit.xml", run.round(1).stage("gate") / JUNIT, "application/xml; charset=utf-8"),
    ):
        reply = ask(server, path)
        assert (reply.status, reply.body, reply.headers["Content-Type"]) == (200, file.read_bytes(), kind)


def test_the_links_of_the_index_lead_to_what_is_served(server: ReportServer) -> None:
    links = re.findall(rb'href="([^"#]+)"', ask(server, "/").body)
    assert len(links) == 3
    for link in links:
        page = ask(server, f"/{link.decode()}")
        assert page.status == 200
        assert b'href="../../../index.html"' in page.body


def test_the_newest_report_is_one_redirect_away_also_of_a_round_that_waits(server: ReportServer) -> None:
    reply = ask(server, "/latest")
    assert (reply.status, reply.headers["Location"]) == (302, "/rounds/003/report/report.html")
    assert ask(server, reply.headers["Location"]).status == 200


@pytest.mark.parametrize(
    "path",
    [
        "/run.json",
        "/current.json",
        "/ledger.sqlite",
        "/rounds",
        "/rounds/",
        "/rounds/001/",
        "/rounds/001/report/",
        "/rounds/001/report/manifest.json",
        "/rounds/001/report/grades.jsonl",
        "/rounds/001/round.json",
        "/rounds/001/train/policy.json",
        "/rounds/009/report/report.html",
        "/rounds/001/report/report.html/../../../../run.json",
        "/rounds/../run.json",
        "/../run/run.json",
        "/..%2frun.json",
        "/%2e%2e/run/run.json",
        "/rounds/001/report/report.html%00.json",
        "/rounds/001/report/..%5creport%5creport.html",
        "/index.html/",
        "/./index.html",
        "/rounds/1/report/report.html",
        "/rounds/001/report/reportXhtml",
        "/favicon.ico",
    ],
)
def test_nothing_else_of_the_run_is_there(server: ReportServer, path: str) -> None:
    reply = ask(server, path)
    assert reply.status == 404
    assert b"secret" not in reply.body
    assert b"there is nothing here" in reply.body


def test_a_link_that_leads_out_of_the_run_is_not_followed(tmp_path: Path) -> None:
    run = started_run(tmp_path / "run")
    played_round(run, 1, GateState.PASS)
    (tmp_path / "secret.html").write_text("secret")
    run.index_page.symlink_to(tmp_path / "secret.html")
    run.round(1).report_page.unlink()
    run.round(1).report_page.symlink_to(tmp_path / "secret.html")
    with serving(run) as server:
        assert [ask(server, path).status for path in ("/", "/rounds/001/report/report.html", "/latest")] == [404, 404, 404]


def test_a_link_to_another_file_of_the_run_is_not_followed_either(tmp_path: Path) -> None:
    """report.html that led to run.json, and gate_report.json that led to the graded answers, were served."""
    run = started_run(tmp_path / "run")
    played_round(run, 1, GateState.PASS)
    here = run.round(1)
    grades = here.path / "grade" / "grades.jsonl"
    grades.parent.mkdir()
    grades.write_text("secret")
    for file, target in ((here.report_page, run.config), (here.gate_report, grades), (run.index_page, run.config)):
        file.unlink(missing_ok=True)
        file.symlink_to(target)
    run.round(2).path.symlink_to(here.path)
    (here.stage("gate") / JUNIT).write_text("<testsuites/>")
    with serving(run) as server:
        for path in (
            "/",
            "/latest",
            "/rounds/001/report/report.html",
            "/rounds/001/gate/gate_report.json",
            "/rounds/002/gate/junit.xml",
        ):
            assert ask(server, path).status == 404, path
        assert ask(server, "/rounds/001/gate/junit.xml").status == 200


def test_a_run_that_is_reached_by_a_link_is_served(run: RunDir, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(run.path)
    with serving(RunDir(tmp_path / "link")) as server:
        assert ask(server, "/rounds/001/report/report.html").status == 200


def test_a_run_without_a_report_says_so(tmp_path: Path) -> None:
    with serving(started_run(tmp_path / "run")) as server:
        assert b"lists the rounds once one has ended" in ask(server, "/").body
        assert ask(server, "/latest").body == b"this run has no report yet\n"


def test_every_answer_carries_what_protects_a_reader(server: ReportServer) -> None:
    page = ask(server, "/rounds/001/report/report.html")
    policy = page.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert policy.endswith("; frame-ancestors 'none'")
    assert "unsafe" not in policy
    assert "&" not in policy
    for path, method in (("/", "GET"), ("/rounds/001/gate/gate_report.json", "GET"), ("/nothing", "GET"), ("/", "POST")):
        headers = ask(server, path, method=method).headers
        assert headers["Content-Security-Policy"].endswith("frame-ancestors 'none'")
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cache-Control"] == "no-store"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert "Python" not in headers["Server"]
    assert ask(server, "/nothing").headers["Content-Security-Policy"] == "default-src 'none'; frame-ancestors 'none'"


def test_it_can_only_be_read(server: ReportServer, run: RunDir) -> None:
    before = run.index_page.read_bytes()
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
        reply = ask(server, "/index.html", method=method)
        assert (reply.status, reply.body) == (501, b"Not Implemented\n")
    head = ask(server, "/index.html", method="HEAD")
    assert (head.status, head.body, head.headers["Content-Length"]) == (200, b"", str(len(before)))
    assert run.index_page.read_bytes() == before


def test_a_site_whose_name_was_made_to_point_here_is_refused(server: ReportServer) -> None:
    port = server.server_port
    for host in ("evil.example", f"evil.example:{port}", f"127.0.0.1.evil.example:{port}", "127.0.0.1:1", "127.0.0.1", "", "null"):
        reply = ask(server, "/", host=host)
        assert (reply.status, reply.body) == (403, b"this server answers to its own address only, as it was given with --host\n")
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", f"LocalHost:{port}", f"[::1]:{port}", f"[0:0:0:0:0:0:0:1]:{port}"):
        assert ask(server, "/", host=host).status == 200


def test_a_request_with_two_hosts_is_refused(server: ReportServer) -> None:
    """The first was believed; whatever stands in between may believe the second."""
    ours, other = f"Host: 127.0.0.1:{server.server_port}", "Host: evil.example"
    for lines in ((ours, other), (other, ours), (ours, ours)):
        with socket.create_connection(("127.0.0.1", server.server_port), timeout=20) as connection:
            connection.sendall("\r\n".join(("GET / HTTP/1.1", *lines, "Connection: close", "", "")).encode())
            with connection.makefile("rb") as file:
                assert b" 403 " in file.readline()


def test_a_request_without_a_host_or_without_sense_is_refused(server: ReportServer) -> None:
    for words, status in ((b"GET / HTTP/1.0\r\n\r\n", b"403"), (b"GET /<script> to me HTTP/1.1\r\n\r\n", b"400")):
        with socket.create_connection(("127.0.0.1", server.server_port), timeout=20) as connection:
            connection.sendall(words)
            with connection.makefile("rb") as file:
                reply = file.read()
        assert status in reply
        assert b"<script>" not in reply


def test_on_all_addresses_only_addresses_in_numbers_are_answered(run: RunDir) -> None:
    """A name can be made to point here by somebody else (DNS rebinding); any name was answered."""
    with serving(run, "0.0.0.0") as server:
        port = server.server_port
        for host in (f"10.0.0.5:{port}", f"127.0.0.1:{port}", f"[fe80::1]:{port}", f"localhost:{port}", f"0.0.0.0:{port}"):
            assert ask(server, "/", host=host).status == 200, host
        for host in (f"gpu-box.lan:{port}", f"evil.example:{port}", "evil.example", "10.0.0.5:1", f"10.0.0.5.evil.example:{port}"):
            assert ask(server, "/", host=host).status == 403, host


def test_on_one_address_only_that_and_the_name_that_was_given_are_answered(run: RunDir) -> None:
    with serving(run, "127.0.0.1") as server:
        # As on a machine that is called so: this one may have no address but loopback.
        server.host, server.server_address = "GPU-box.lan", ("10.0.0.5", server.server_port)
        port = server.server_port
        for host in (f"gpu-box.lan:{port}", f"GPU-BOX.LAN:{port}", f"10.0.0.5:{port}"):
            assert server.knows([host]), host
        for host in (
            f"localhost:{port}",
            f"127.0.0.1:{port}",
            f"10.0.0.6:{port}",
            f"evil.example:{port}",
            f"gpu-box.lan.evil:{port}",
        ):
            assert not server.knows([host]), host
        assert not server.knows([])


def test_which_addresses_are_loopback() -> None:
    assert [is_loopback(host) for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost", "Localhost")] == [True] * 5
    assert [is_loopback(host) for host in ("0.0.0.0", "::", "10.0.0.1", "gpu-box")] == [False] * 4


def test_the_loopback_of_ipv6_is_one_too(run: RunDir) -> None:
    try:
        server = serving(run, "::1")
    except InputError:
        pytest.skip("this machine has no IPv6")
    with server:
        assert server.url == f"http://[::1]:{server.server_port}/"
        assert ask(server, "/", host=f"[::1]:{server.server_port}").status == 200
        assert ask(server, "/", host=f"evil.example:{server.server_port}").status == 403


def test_where_it_cannot_listen_the_ways_out_are_said(run: RunDir, server: ReportServer) -> None:
    with pytest.raises(
        InputError, match=r"cannot listen on 127.0.0.1 port \d+: Address already in use.*--port \(0 takes a free one\)"
    ):
        ReportServer(run, "127.0.0.1", server.server_port)
    with pytest.raises(InputError, match=r"cannot listen on 192\.0\.2\.1"):
        ReportServer(run, "192.0.2.1", 0)
    with pytest.raises(InputError, match=r"cannot listen on no\.such\.host\.invalid"):
        ReportServer(run, "no.such.host.invalid", 0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_prints_its_address_and_ends_cleanly_when_told_to(run: RunDir, number: signal.Signals) -> None:
    words = [sys.executable, "-c", COMMAND, str(run.path), "--json"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        url = json.loads(process.stdout.readline())["url"]
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", url)
        connection = http.client.HTTPConnection(url.removeprefix("http://").rstrip("/"), timeout=20)
        connection.request("GET", "/")
        assert connection.getresponse().read() == run.index_page.read_bytes()
        os.kill(process.pid, number)  # while a connection is kept alive
        assert process.wait(timeout=20) == 0
        assert process.stderr.read() == ""
        connection.close()


def test_serving_others_is_warned_of(run: RunDir) -> None:
    words = [sys.executable, "-c", COMMAND, str(run.path), "--host", "0.0.0.0"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert re.match(r"http://0\.0\.0\.0:\d+/  \(Ctrl-C ends it\)", process.stdout.readline())
        process.terminate()
        assert process.wait(timeout=20) == 0
        assert "warning: whoever reaches 0.0.0.0 can read these reports" in process.stderr.read()
