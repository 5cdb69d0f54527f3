"""A server on this machine that speaks OpenAI's protocol and vLLM's adapter calls, and fails as it is told."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Body = dict[str, Any]


def completion_for(body: Body) -> str:
    """What the server answers: it tells the prompt and the seed, so that each sample has an answer of its own."""
    prompt = body.get("prompt") or body["messages"][-1]["content"]
    return f"{prompt} / {body['seed']}"


class StandIn:
    """What a server was asked, and how it fails.

    Attributes:
        url: its address.
        fail: gets a request and how often it came before, and says how to fail: a status, "close", "cut", "broken",
            "empty", "slow"; None to answer.
        prompt_tokens: what it reports for a request.
        requests: path and body of everything it was asked, in the order of arrival.
        headers: of the last request.
        pause: seconds before each answer.
        adapters: names of loaded adapters and their folders.
        models: names that it lists besides.
        complete: what it answers to a request.
        most_at_once: the most requests that were under way at one time.
    """

    def __init__(self) -> None:
        self.url = ""
        self.fail: Callable[[Body, int], int | str | None] = lambda body, earlier: None
        self.prompt_tokens: Callable[[Body], int] = lambda body: 0
        self.requests: list[tuple[str, Body]] = []
        self.headers: dict[str, str] = {}
        self.pause = 0.0
        self.adapters: dict[str, str] = {}
        self.models: list[str] = []
        self.complete: Callable[[Body], str] = completion_for
        self.most_at_once = 0
        self._at_once = 0
        self._seen: Counter[str] = Counter()
        self._lock = threading.Lock()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["content-length"])))
        key = json.dumps([handler.path, body], sort_keys=True)
        with self._lock:
            self.requests.append((handler.path, body))
            self.headers = dict(handler.headers.items())
            earlier = self._seen[key]
            self._seen[key] += 1
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            self._reply(handler, body, earlier)
        finally:
            with self._lock:
                self._at_once -= 1

    def _reply(self, handler: BaseHTTPRequestHandler, body: Body, earlier: int) -> None:
        if handler.path.endswith("lora_adapter"):
            self._adapter(handler, body)
            return
        how = self.fail(body, earlier)
        time.sleep(self.pause)
        text = json.dumps(self._completion(handler.path, body)).encode()
        if how == "slow":
            time.sleep(3.0)
        elif how == "close":
            handler.close_connection = True
            return
        elif how == "cut":
            _send(handler, 200, text[: len(text) // 2], length=len(text))
            handler.close_connection = True
            return
        elif how == "broken":
            text = text[: len(text) // 2]
        elif how == "empty":
            text = json.dumps({"object": "chat.completion", "choices": []}).encode()
        elif isinstance(how, int):
            _send(handler, how, b'{"error": {"message": "no, sk-very-secret-key"}}', {"Retry-After": "0"})
            return
        _send(handler, 200, text)

    def _completion(self, path: str, body: Body) -> Body:
        text = self.complete(body)
        said = (
            {"message": {"role": "assistant", "content": text}}
            if path.endswith("chat/completions")
            else {"text": text}
        )
        reason = "length" if body["seed"] % 5 == 0 else "stop"
        usage = {"completion_tokens": len(text), "prompt_tokens": self.prompt_tokens(body)}
        return {"choices": [{"index": 0, "finish_reason": reason, **said}], "usage": usage}

    def _adapter(self, handler: BaseHTTPRequestHandler, body: Body) -> None:
        name = body["lora_name"]
        if handler.path.endswith("/unload_lora_adapter"):
            missing = self.adapters.pop(name, None) is None
            _send(handler, 404 if missing else 200, b"gone")
        elif name in self.adapters:
            _send(handler, 400, b"has already been loaded")
        else:
            self.adapters[name] = body["lora_path"]
            _send(handler, 200, b"Success: LoRA adapter added successfully.")


def _send(
    handler: BaseHTTPRequestHandler, status: int, text: bytes, headers: dict[str, str] | None = None,
    length: int | None = None,
) -> None:  # fmt: skip
    handler.send_response(status)
    for name, value in {"Content-Length": str(length or len(text)), **(headers or {})}.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(text)


@contextlib.contextmanager
def running() -> Iterator[StandIn]:
    """The server, on a free port until the end of the context."""
    stand_in = StandIn()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            listed = [{"id": name} for name in (*stand_in.models, *stand_in.adapters)]
            _send(self, 200 if self.path == "/v1/models" else 404, json.dumps({"data": listed}).encode())

        def do_POST(self) -> None:
            with contextlib.suppress(ConnectionError):
                stand_in.answer(self)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    stand_in.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield stand_in
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
