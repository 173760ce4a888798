"""A server that fails now and then: a proxy before an S3 endpoint that goes wrong by plan.

What happens to a request follows from the seed and from the request's number. What the proxy lets
pass it passes unchanged, the Host that the client signed included.
"""

from __future__ import annotations

import http.client
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"

Answer = tuple[int, str, list[tuple[str, str]], bytes]  # status, reason, headers, body


@dataclass(frozen=True, kw_only=True)
class Faults:
    """The share of requests that meets each fault, and when the server goes away."""

    unavailable: float = 0.0  # 503
    dropped: float = 0.0  # closed unanswered, and the server not asked
    lost: float = 0.0  # the server asked, and its answer withheld
    cut: float = 0.0  # closed in the middle of the answer's body
    stalled: float = 0.0  # answered, but late
    stall: float = 1.0  # by so much [s]
    num_before_gone: float = float("inf")  # requests
    gone: str = "vanished"  # what becomes of the others: unavailable, or vanished (nobody listens any more)
    seed: int = 0

    def fault(self, number: int) -> str:
        """Return what is to happen to a request, or "passed"."""
        if number >= self.num_before_gone:
            return self.gone
        kinds = ("unavailable", "dropped", "lost", "cut", "stalled")
        shares = [getattr(self, kind) for kind in kinds]
        return random.Random(f"{self.seed} {number}").choices([*kinds, "passed"], [*shares, 1 - sum(shares)])[0]


class FaultyProxy(ThreadingHTTPServer):
    """Listens at `endpoint`; `counts` says what it has done to how many requests."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, upstream: str, faults: Faults) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream, self.faults = urlsplit(upstream).netloc, faults
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        self.counts: Counter[str] = Counter()
        self.gone_since: float | None = None  # time.monotonic()
        self.lock = threading.Lock()

    def next_fault(self) -> str:
        """Return what is to happen to the request that has come."""
        with self.lock:
            number = self.counts.total()
            if number >= self.faults.num_before_gone and self.gone_since is None:
                self.gone_since = time.monotonic()
            fault = self.faults.fault(number)
            self.counts[fault] += 1
            return fault

    def handle_error(self, request, client_address) -> None:
        """Say nothing: clients that give up are what is tested here."""


@contextmanager
def faulty_proxy(upstream: str, faults: Faults) -> Iterator[FaultyProxy]:
    """Run a proxy before an endpoint while the body runs."""
    with FaultyProxy(upstream, faults) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield proxy
        finally:
            proxy.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyProxy

    def handle_one_request(self) -> None:
        self.raw_requestline = self.rfile.readline()
        if not self.raw_requestline or not self.parse_request():
            self.close_connection = True
            return
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.server.next_fault()
        if fault == "unavailable":
            self._answer((503, "Service Unavailable", [("Content-Type", "application/xml")], SLOW_DOWN))
            return
        if fault == "stalled":
            time.sleep(self.server.faults.stall)
        if fault == "vanished":
            self.server.shutdown()
            self.server.server_close()
        answer = None if fault in ("dropped", "vanished") else self._ask(body)
        if answer is not None and fault != "lost":
            self._answer(answer, cut=fault == "cut")
        if fault in ("dropped", "lost", "cut", "vanished"):
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    def _ask(self, body: bytes) -> Answer:
        with closing(http.client.HTTPConnection(self.server.upstream, timeout=60)) as connection:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name != "Expect":  # the body is here already
                    connection.putheader(name, value)
            connection.endheaders(body)
            response = connection.getresponse()
            return response.status, response.reason, response.getheaders(), response.read()

    def _answer(self, answer: Answer, *, cut: bool = False) -> None:
        status, reason, headers, body = answer
        self.send_response_only(status, reason)
        if "Content-Length" not in dict(headers):  # it came in chunks, and is here whole
            headers = [("Content-Length", str(len(body))), *(one for one in headers if one[0] != "Transfer-Encoding")]
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
