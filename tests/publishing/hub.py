"""A stand-in of the Hub: the few endpoints that `create_repo` and `upload_folder` use, on a port of this machine.

It keeps what arrives in memory, checks the token, and fails where it is told to. `huggingface_hub` reads HF_ENDPOINT
when it is imported, so what talks to it runs in a process of its own.
"""

from __future__ import annotations

import base64
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_canaryTokenOfTheStandIn0123456789ab"


@dataclass
class Commit:
    message: str
    files: set[str]


@dataclass
class Hub:
    """A running server.

    Attributes:
        repos: what every repository was made with.
        files: contents by repository and path.
        commits: in order, by repository.
        requests: method and path of everything that was asked.
        fail: a path's beginning (after the host) and the status that it is answered with.
        credentials: `user:password@` in the address, or "".
    """

    token: str = TOKEN
    repos: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    commits: dict[str, list[Commit]] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    fail: dict[str, int] = field(default_factory=dict)
    credentials: str = ""
    blobs: dict[str, bytes] = field(default_factory=dict)
    lock: Any = field(default_factory=threading.Lock)

    def __enter__(self) -> Hub:
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._server.server_port}"

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to take this for the Hub. (Xet is a protocol of its own; LFS is spoken here.)"""
        return {
            "HF_ENDPOINT": f"http://{self.credentials}{self.address}",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
        }


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def _answer(self, method: str) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.split("?")[0]
        with self.hub.lock:
            self.hub.requests.append((method, path))
            for beginning, status in self.hub.fail.items():
                if path.startswith(beginning):
                    self._send(status, {"error": "told to fail"})
                    return
            self._route(method, path, body)

    def _route(self, method: str, path: str, body: bytes) -> None:
        hub = self.hub
        if method == "PUT" and path.startswith("/blobs/"):
            hub.blobs[path.removeprefix("/blobs/")] = body
            self._send(200, {})
            return
        if self.headers.get("Authorization") != f"Bearer {hub.token}":
            self._send(401, {"error": "Invalid username or password."})
            return
        if path == "/api/whoami-v2":
            self._send(200, {"type": "user", "name": "tester", "orgs": [], "auth": {}})
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'tester'}/{asked['name']}"
            if name in hub.repos:
                self._send(409, {"error": "exists", "url": f"http://{hub.address}/{name}"})
                return
            hub.repos[name] = asked
            hub.files[name], hub.commits[name] = {}, []
            self._send(200, {"url": f"http://{hub.address}/{name}", "name": name, "id": name})
        elif path == "/api/validate-yaml":
            text = json.loads(body)["content"]
            self._send(200 if text.startswith("---\n") else 400, {"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/[^/]+", path):
            self._preupload(json.loads(body))
        elif found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self._lfs(json.loads(body))
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/[^/]+", path):
            self._commit(found[1], body)
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+)?", path):
            if found[1] in hub.repos:
                self._send(200, {"id": found[1], "sha": "0" * 40, "private": False, "tags": [], "siblings": []})
            else:
                self._send(404, {"error": "Repository not found"})
        else:
            self._send(404, {"error": f"the stand-in knows no {method} {path}"})

    def _preupload(self, asked: dict[str, Any]) -> None:
        binary = (".safetensors", ".bin", ".pt", ".pth")
        self._send(
            200,
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(binary) else "regular",
                        "shouldIgnore": False,
                    }
                    for file in asked["files"]
                ]
            },
        )

    def _lfs(self, asked: dict[str, Any]) -> None:
        actions = [
            {
                "oid": thing["oid"],
                "size": thing["size"],
                "actions": {"upload": {"href": f"http://{self.hub.address}/blobs/{thing['oid']}"}},
            }
            for thing in asked["objects"]
        ]
        self._send(200, {"transfer": "basic", "objects": actions})

    def _commit(self, repo: str, body: bytes) -> None:
        message, files = "", {}
        for line in body.decode().splitlines():
            part = json.loads(line)
            value = part["value"]
            if part["key"] == "header":
                message = value["summary"]
            elif part["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif part["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        self.hub.files[repo].update(files)
        self.hub.commits[repo].append(Commit(message, set(files)))
        url = f"http://{self.hub.address}/{repo}/commit/{'1' * 40}"
        self._send(200, {"success": True, "commitUrl": url, "commitOid": "1" * 40})

    def _send(self, status: int, answer: dict[str, Any]) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
