"""Requests to an OpenAI-compatible endpoint: many at once, in order, repeated where the server or the line fails.

Needs `pip install "prefopt-trainer[server]"` (httpx and tenacity). An API key is read from the environment when it is
needed, and appears in no file and no message.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from prefopt.safety.errors import PrefoptError, UsageError
from prefopt.safety.redaction import redact, remember

logger = logging.getLogger(__name__)

T = TypeVar("T")

_BUSY = (408, 409, 425, 429)
"""Besides 5xx, the answers after which the same request may succeed."""
_LONGEST_WAIT = 60.0
CUT = ("length", "content_filter", "abort", "error")
"""What servers say of a completion that does not end where its model ended it."""


class ServerError(PrefoptError, RuntimeError):
    """A server did not answer as it should, after all attempts."""


class _Failed(Exception):
    """An attempt that is worth repeating; `wait` is what the server asks for, in seconds."""

    def __init__(self, reason: str, wait: float | None = None):
        super().__init__(reason)
        self.wait = wait


@dataclass(frozen=True)
class Endpoint:
    """Where a server is, and how to deal with it.

    Attributes:
        url: up to and with `/v1`, as in `http://localhost:8000/v1`.
        key_variable: the environment variable with the API key; nothing is sent if it is not set.
        concurrency: requests at once.
        timeout: seconds that an answer may take.
        attempts: of each request, before the run stops.
        first_wait: seconds before the second attempt; later ones wait up to twice as long each, or as long as the
            server asks for.
    """

    url: str
    key_variable: str = "OPENAI_API_KEY"
    concurrency: int = 16
    timeout: float = 600.0
    attempts: int = 8
    first_wait: float = 0.5


@dataclass(frozen=True)
class Completion:
    """What a reply to `chat/completions` or `completions` holds.

    Attributes:
        text: of the first choice; empty for a refusal or a call of a tool.
        finished: False if it was cut: at the maximum length, or by a filter of the server.
        tokens: of the completion; 0 if the server does not say.
        prompt_tokens: of the prompt; 0 if the server does not say.
    """

    text: str
    finished: bool
    tokens: int = 0
    prompt_tokens: int = 0


def read_completion(reply: str) -> Completion:
    """The completion in a reply; for `Client.post`."""
    fields = json.loads(reply)
    choice = fields["choices"][0]
    text = choice["message"].get("content") if "message" in choice else choice["text"]
    usage = fields.get("usage") or {}
    return Completion(
        "" if text is None else _as_text(text),
        choice.get("finish_reason") not in CUT,
        int(usage.get("completion_tokens") or 0),
        int(usage.get("prompt_tokens") or 0),
    )


def _as_text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"a {type(value).__name__} where the text should be")
    return value


class Client:
    """Sends requests to an endpoint from several threads.

    Args:
        endpoint: where to.
        say: called with a line for each attempt that failed.

    Raises:
        UsageError: without httpx and tenacity, or for an address that is none.
    """

    def __init__(self, endpoint: Endpoint, say: Callable[[str], None] = logger.warning):
        try:
            import httpx
            import tenacity
        except ImportError as error:
            raise UsageError(
                f'a server needs the package {error.name}: pip install "prefopt-trainer[server]"'
            ) from None
        if not endpoint.url.startswith(("http://", "https://")):
            raise UsageError(f"{endpoint.url!r} is no address of a server: it begins with http:// or https://")
        self._httpx, self._tenacity = httpx, tenacity
        self.endpoint, self._say = endpoint, say
        key = os.environ.get(endpoint.key_variable, "")
        remember(key)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limits = httpx.Limits(max_connections=endpoint.concurrency)
        self._client = httpx.Client(headers=headers, timeout=endpoint.timeout, limits=limits)

    def in_order(
        self, requests: Iterable[Any], answer: Callable[[Any], Any], ahead: int | None = None
    ) -> Iterator[Any]:
        """`answer(request)` of each request, in order, `concurrency` of them at once.

        If one fails, what was answered before it is yielded first, then the error is raised.

        Args:
            requests: taken as they are needed.
            answer: calls `post`; runs in threads.
            ahead: requests that may be under way or waiting to be yielded; four times the concurrency if left out.
        """
        ahead = ahead or 4 * self.endpoint.concurrency
        pending: deque[Future[Any]] = deque()
        threads = ThreadPoolExecutor(self.endpoint.concurrency, thread_name_prefix="endpoint")
        try:
            for request in requests:
                pending.append(threads.submit(answer, request))
                if len(pending) >= ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            threads.shutdown(wait=True, cancel_futures=True)

    def post(
        self, path: str, body: Mapping[str, Any], read: Callable[[str], T], accepted: Sequence[int] = (200,)
    ) -> T:
        """What `read` makes of the reply to a request.

        Args:
            path: behind the endpoint's address, as in `chat/completions`.
            body: sent as JSON.
            read: gets the reply's text. Where it raises ValueError, KeyError, TypeError, IndexError or AttributeError,
                the reply is broken, and the request is repeated.
            accepted: statuses of replies to read.

        Raises:
            UsageError: if the server refuses the request, with its words.
            ServerError: if it failed after all attempts.
        """
        tenacity, attempts = self._tenacity, self.endpoint.attempts
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_Failed),
            stop=tenacity.stop_after_attempt(attempts),
            wait=self._wait,
            before_sleep=lambda state: self._tell(path, state),
        )
        try:
            result: T = retrying(self._attempt, path, body, read, accepted)
        except tenacity.RetryError as error:
            reason = error.last_attempt.exception()
            raise ServerError(
                f"{self.endpoint.url}/{path}: {attempts} attempts failed, the last one with: {reason}. When the "
                "server answers again, start the command again: it continues"
            ) from None
        return result

    def wait_for_model(self, name: str | None, seconds: float) -> None:
        """Wait until the server answers and lists a model.

        Args:
            name: of the model; None for any answer.
            seconds: the longest wait.

        Raises:
            ServerError: if that takes longer.
        """
        address, end = f"{self.endpoint.url.rstrip('/')}/models", time.monotonic() + seconds
        while True:
            last = self._unlisted(address, name)
            if not last:
                return
            if time.monotonic() >= end:
                what = "does not answer" if name is None else f"does not list the model {name}"
                raise ServerError(f"{address} {what} after {seconds:g} s ({last})")
            time.sleep(min(1.0, self.endpoint.first_wait))

    def _unlisted(self, address: str, name: str | None) -> str:
        """Why a model is not listed; empty if it is."""
        try:
            response = self._client.get(address, timeout=10.0)
            listed = [str(model["id"]) for model in response.json()["data"]] if name and response.is_success else []
        except (self._httpx.TransportError, ValueError, KeyError, TypeError) as error:
            return f"{type(error).__name__}: {error}"
        if not response.is_success:
            return f"status {response.status_code}"
        return "" if name is None or name in listed else f"it lists {', '.join(listed) or 'nothing'}"

    def close(self) -> None:
        self._client.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _attempt(self, path: str, body: Mapping[str, Any], read: Callable[[str], T], accepted: Sequence[int]) -> T:
        try:
            response = self._client.post(f"{self.endpoint.url.rstrip('/')}/{path}", json=body)
        except self._httpx.TransportError as error:
            raise _Failed(f"{type(error).__name__}: {error}") from error
        status = response.status_code
        if status in _BUSY or status >= 500:
            raise _Failed(f"status {status}", _asked_wait(response.headers.get("retry-after")))
        if status not in accepted:
            words = " ".join(response.text.split())[:400]
            raise UsageError(f"{self.endpoint.url}/{path} refused the request (status {status}): {words}")
        try:
            return read(response.text)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise _Failed(f"a reply that is not as it should be: {error!r}, in {response.text[:80]!r}") from None

    def _wait(self, state: Any) -> float:
        first = self.endpoint.first_wait
        strategy = self._tenacity.wait_exponential(multiplier=first, max=_LONGEST_WAIT)
        usual = (strategy + self._tenacity.wait_random(0, first))(state)
        asked = state.outcome.exception().wait
        return float(usual if asked is None else max(usual, asked))

    def _tell(self, path: str, state: Any) -> None:
        what = f"attempt {state.attempt_number} of {self.endpoint.attempts} failed ({state.outcome.exception()})"
        self._say(redact(f"{self.endpoint.url}/{path}: {what}; the next one in {state.next_action.sleep:.1f} s"))


def _asked_wait(header: str | None) -> float | None:
    """Seconds that the server asks to wait; dates are not read."""
    try:
        return min(max(float(header or ""), 0.0), _LONGEST_WAIT)
    except ValueError:
        return None
