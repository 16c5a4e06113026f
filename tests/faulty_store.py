"""A store that has bad days: an HTTP proxy before a real S3 server, with faults of our choice.

What it does to a request is chosen by a plan, so that a test can repeat it: wait, answer 500 or 503
or 429 itself, cut the answer in the middle, take half of an upload, do what was asked and lose the
answer, trickle; and it can be away altogether.
"""

import http.client
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal, assert_never
from urllib.parse import urlsplit

from tests.servers import S3Store, with_endpoint

Kind = Literal["none", "wait", "status", "cut", "half_upload", "lost_answer", "trickle"]


@dataclass(frozen=True)
class Fault:
    """What happens to one request."""

    kind: Kind = "none"
    seconds: float = 0.0
    """Of `wait`: before it is passed on; of `trickle`: for each 64 KiB of the answer."""
    status: int = 503
    """Of `status`."""


@dataclass(frozen=True)
class Request:
    """A request as a plan sees it."""

    number: int
    """0 first, in the order of arrival."""
    method: str
    path: str


Plan = Callable[[Request], Fault]
NO_FAULT = Fault()


def no_faults(request: Request) -> Fault:
    """The plan of a good day."""
    return NO_FAULT


def random_faults(seed: int, share: float, seconds: float = 0.05) -> Plan:
    """Faults of all kinds for this share of the requests; what a request gets hangs on its number.

    Two neighbours have none, so that whoever asks again gets an answer.
    """
    kinds = (
        Fault("wait", seconds=seconds),
        *(Fault("status", status=status) for status in (429, 500, 503)),
        Fault("cut"),
        Fault("half_upload"),
        Fault("lost_answer"),
        Fault("trickle", seconds=seconds),
    )

    def plan(request: Request) -> Fault:
        draw = random.Random(f"{seed} {request.number}")
        return draw.choice(kinds) if draw.random() < share else NO_FAULT

    return plan


@dataclass
class FaultyStore:
    """A running proxy."""

    store: S3Store
    """The server behind it, at the address of the proxy."""
    plan: Plan = no_faults
    is_away: bool = False
    """True closes every connection without a word."""
    requests: int = 0
    refused: int = 0
    """Connections that were closed while it was away."""
    counts: Counter[str] = field(default_factory=Counter)
    """Requests by the kind of their fault."""


@contextmanager
def faulty_store(behind: S3Store, plan: Plan = no_faults) -> Iterator[FaultyStore]:
    """A proxy before a server, on a free port of loopback, until the block ends."""
    server = _Server(("127.0.0.1", 0), _Handler)
    faulty = FaultyStore(with_endpoint(behind, f"http://127.0.0.1:{server.server_port}"), plan)
    server.faulty, server.behind = faulty, urlsplit(behind.endpoint).netloc
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield faulty
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64
    faulty: FaultyStore
    behind: str

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hung up is no news here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def handle_one_request(self) -> None:
        self.close_connection = True
        super().handle_one_request()

    def do_GET(self) -> None:
        self._answer()

    do_PUT = do_POST = do_DELETE = do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Tests are quiet."""

    def _answer(self) -> None:
        faulty = self.server.faulty
        if faulty.is_away:
            faulty.refused += 1
            self.close_connection = True
            return
        request = Request(faulty.requests, self.command, self.path)
        faulty.requests += 1
        fault = faulty.plan(request)
        length = int(self.headers.get("Content-Length", 0))
        faulty.counts[fault.kind] += 1
        match fault.kind:
            case "wait":
                time.sleep(fault.seconds)
                self._pass_on(self.rfile.read(length))
            case "status":
                self.rfile.read(length)
                self._refuse(fault.status)
            case "half_upload" if length:
                self.rfile.read(length // 2)
                self.close_connection = True
            case "lost_answer":
                self._fetch(self.rfile.read(length))
                self.close_connection = True
            case "cut":
                self._pass_on(self.rfile.read(length), share=0.5)
            case "trickle":
                self._pass_on(self.rfile.read(length), pause_s=fault.seconds)
            case "none" | "half_upload":
                self._pass_on(self.rfile.read(length))
            case _:
                assert_never(fault.kind)

    def _pass_on(self, body: bytes, share: float = 1.0, pause_s: float = 0.0) -> None:
        status, headers, answer = self._fetch(body)
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        told = {name.lower(): value for name, value in headers}.get("content-length")
        self.send_header(
            "Content-Length",
            told if told is not None and self.command == "HEAD" else str(len(answer)),
        )
        self.end_headers()
        step = 1 << 16
        wanted = answer[: int(len(answer) * share)]
        for begin in range(0, len(wanted), step):
            time.sleep(pause_s)
            self.wfile.write(wanted[begin : begin + step])
        if share < 1:
            self.close_connection = True

    def _fetch(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(self.server.behind, timeout=60)
        try:
            connection.putrequest(
                self.command, self.path, skip_host=True, skip_accept_encoding=True
            )
            for name, value in self.headers.items():
                if name.lower() not in ("connection", "expect"):
                    connection.putheader(name, value)
            connection.endheaders(body or None)
            response = connection.getresponse()
            return response.status, response.getheaders(), response.read()
        finally:
            connection.close()

    def _refuse(self, status: int) -> None:
        code = {429: "TooManyRequests", 503: "SlowDown"}.get(status, "InternalError")
        text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>bad day</Message></Error>"
        answer = b"" if self.command == "HEAD" else text.encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)
