"""A stand-in for a cluster's Jobs API: what Ray's own client asks for, answered from memory.

Jobs do not run: a test says with `end` how they ended and with `log` what they said.
"""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

TOKEN = "0123456789abcdef" * 4


@dataclass
class JobsServer:
    """A cluster that was asked for jobs."""

    token: str | None = TOKEN
    """Asked for at every request; None for a cluster that asks for none."""
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What each job was submitted with and how it is, by its id."""
    logs: dict[str, str] = field(default_factory=dict)
    packages: dict[str, bytes] = field(default_factory=dict)
    """Uploaded code by name, as zip."""
    doctor: str | None = None
    """What `querypatch doctor --json` says there; such jobs end at once."""
    cuts: int = 0
    """Followed logs whose connection is cut in the middle."""
    url: str = ""

    def end(self, id: str, status: str, log: str = "", message: str = "") -> None:
        """The job ends so, having said `log` as well."""
        self.logs[id] = self.logs.get(id, "") + log
        self.jobs[id] |= {"status": status, "message": message, "end_time": 1_700_000_100_000}

    async def version(self, _: web.Request) -> web.Response:
        return web.json_response({"version": "4", "ray_version": "2.60.0", "ray_commit": "x"})

    async def package(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if request.method == "PUT":
            self.packages[name] = await request.read()
        return web.Response(status=200 if name in self.packages else 404)

    async def submit(self, request: web.Request) -> web.Response:
        told = await request.json()
        id = told["submission_id"]
        if id in self.jobs:
            return web.Response(status=500, text=f"Job with submission_id {id} already exists. ")
        self.jobs[id] = {
            **told,
            "type": "SUBMISSION",
            "status": "RUNNING",
            "message": "Job is currently running.",
            "start_time": 1_700_000_000_000 + len(self.jobs),
        }
        if self.doctor is not None and " doctor " in told["entrypoint"]:
            self.end(id, "SUCCEEDED", self.doctor)
        return web.json_response({"job_id": id, "submission_id": id})

    async def all_jobs(self, _: web.Request) -> web.Response:
        return web.json_response(list(self.jobs.values()))

    async def info(self, request: web.Request) -> web.Response:
        return web.json_response(self.jobs[request.match_info["id"]])

    async def stop(self, request: web.Request) -> web.Response:
        self.end(request.match_info["id"], "STOPPED")
        return web.json_response({"stopped": True})

    async def whole_log(self, request: web.Request) -> web.Response:
        return web.json_response({"logs": self.logs.get(request.match_info["id"], "")})

    async def tail(self, request: web.Request) -> web.WebSocketResponse:
        id, sent = request.match_info["id"], 0
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        while True:
            text = self.logs.get(id, "")
            if text[sent:]:
                if self.cuts:
                    self.cuts -= 1
                    await socket.send_str(text[sent : sent + 5])
                    assert request.transport is not None
                    request.transport.abort()
                    break
                await socket.send_str(text[sent:])
                sent = len(text)
            if self.jobs[id]["status"] in ("SUCCEEDED", "FAILED", "STOPPED"):
                break
            await asyncio.sleep(0.02)
        await socket.close()
        return socket

    def routes(self) -> list[web.RouteDef]:
        package = "/api/packages/{protocol}/{name}"
        return [
            web.get("/api/version", self.version),
            web.get(package, self.package),
            web.put(package, self.package),
            web.post("/api/jobs/", self.submit),
            web.get("/api/jobs/", self.all_jobs),
            web.get("/api/jobs/{id}", self.info),
            web.post("/api/jobs/{id}/stop", self.stop),
            web.get("/api/jobs/{id}/logs", self.whole_log),
            web.get("/api/jobs/{id}/logs/tail", self.tail),
        ]


@contextmanager
def serving(server: JobsServer) -> Iterator[JobsServer]:
    """The server on a free port of loopback, in a thread, with its `url` filled in."""
    loop, over = asyncio.new_event_loop(), threading.Event()

    @web.middleware
    async def let_in(request: web.Request, handler: Any) -> web.StreamResponse:
        said = request.headers.get("Authorization")
        if server.token is not None and said is None:
            return web.Response(status=401, text="Unauthorized: Missing authentication token")
        if server.token is not None and said != f"Bearer {server.token}":
            return web.Response(status=403, text="Forbidden: Invalid authentication token")
        answer: web.StreamResponse = await handler(request)
        return answer

    async def serve() -> None:
        app = web.Application(middlewares=[let_in], client_max_size=64 << 20)
        app.add_routes(server.routes())
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
        server.url = f"http://127.0.0.1:{port}"
        started.set()
        while not over.is_set():
            await asyncio.sleep(0.02)
        await runner.cleanup()

    started = threading.Event()
    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), daemon=True)
    thread.start()
    assert started.wait(10)
    try:
        yield server
    finally:
        over.set()
        thread.join(10)
        loop.close()


def doctor_says(**findings: str) -> str:
    """A doctor's log with Ray's lines around it; a finding `state: text` or a text that is well."""
    told = []
    for name, said in findings.items():
        state, _, text = said.rpartition(": ")
        told.append({"name": name, "state": state or "well", "said": text})
    content = json.dumps({"broken": False, "findings": told}, indent=1)
    return f"Running entrypoint for job doctor-1: ...\n{content}\n"
