"""`/metrics` for Prometheus and `/health` for whoever watches processes, on a port that is asked for."""

import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, Gauge, make_wsgi_app

from pipeline.errors import UsageError
from pipeline.telemetry.scalars import scalars

PORTS = 64
LARGEST_PORT = 65535
CLIENT_SECONDS = 5.0
"""after which a connection that says nothing is closed"""
Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class PrometheusSink:
    """Serves the newest numbers of a process until it is closed.

    `/health` answers 200 while the process has done something within `stall_seconds`, else 503; both with JSON.
    """

    def __init__(self, host: str, port: int, process: str, stall_seconds: float, ports: int = 1) -> None:
        """
        Args:
            port: 0 takes any free one.
            process: label of every number.
            ports: how many to try from `port` on, where several processes share a configuration.

        Raises:
            UsageError: none of them can be listened on.
        """
        self._process, self._stall_seconds = process, stall_seconds
        self._registry = CollectorRegistry()
        self._gauges: dict[str, Gauge] = {}
        self._state: dict[str, Any] = {}
        self._beat = time.monotonic()
        self._server = _listen(host, port, ports, self._application())
        self.address = f"http://{host}:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, name="prometheus", daemon=True).start()

    def write(self, row: Mapping[str, Any]) -> None:
        """The numbers of a finished step."""
        for name, value in scalars(row).items():
            self._gauge("rollahead_" + re.sub(r"[^a-zA-Z0-9_]", "_", name), value)
        self.alive(step=row.get("step"), policy_version=row.get("policy_version"))

    def alive(self, **state: Any) -> None:
        """The process advances; `state` is shown by /health."""
        self._beat = time.monotonic()
        self._state |= state

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _gauge(self, name: str, value: float) -> None:
        if name not in self._gauges:
            self._gauges[name] = Gauge(name, "see docs/telemetry.md", ["process"], registry=self._registry)
        self._gauges[name].labels(process=self._process).set(value)

    def _application(self) -> Application:
        metrics: Application = make_wsgi_app(self._registry)

        def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
            path = environ.get("PATH_INFO", "/")
            if path == "/metrics":
                return metrics(environ, start_response)
            if path == "/health":
                status, body = self._health()
            else:
                status, body = "404 Not Found", {"known": ["/metrics", "/health"]}
            start_response(status, [("Content-Type", "application/json")])
            return [json.dumps(body).encode()]

        return answer

    def _health(self) -> tuple[str, dict[str, Any]]:
        idle = time.monotonic() - self._beat
        healthy = not self._stall_seconds or idle < self._stall_seconds
        body = {"process": self._process, "healthy": healthy, "seconds_since_progress": round(idle, 3), **self._state}
        return ("200 OK" if healthy else "503 Service Unavailable"), body


class _Server(ThreadingMixIn, WSGIServer):
    """A thread a connection: one that is held open blocks neither the others nor the end."""

    daemon_threads = True
    block_on_close = False


class _Quiet(WSGIRequestHandler):
    timeout = CLIENT_SECONDS

    def handle(self) -> None:
        with suppress(TimeoutError, ConnectionError):
            super().handle()

    def log_message(self, format: str, *args: Any) -> None:
        """Scrapes are not news."""


def _listen(host: str, port: int, ports: int, application: Application) -> WSGIServer:
    reason = f"ports end at {LARGEST_PORT}"
    for candidate in range(port, min(port + (ports if port else 1), LARGEST_PORT + 1)):
        try:
            return make_server(host, candidate, application, _Server, _Quiet)
        except OSError as error:
            reason = error.strerror or str(error)
    raise UsageError(
        f"telemetry.prometheus_port = {port}: {host} cannot be listened on ({reason}); choose another port"
    )
