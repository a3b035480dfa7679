"""Many requests to one server at a time, patient with what passes and clear about what does not."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import httpx

from rlheals.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator, Sequence

    from rlheals.inference.server.address import Address

Result = TypeVar("Result")
WAITS = (0.5, 1.0, 2.0, 4.0)
"""Seconds before each further try of a request that met a passing failure."""
CONNECT, READ = 10.0, 600.0
"""Seconds for a connection, and for an answer: a busy server lets a request wait its turn."""
PASSING = (408, 425, 429, 500, 502, 503, 504)
"""Statuses that another try may cure."""
SHOWN = 300
"""Characters shown of what a server says."""
UNREACHABLE = "check that it runs and that inference.engine names its host and port, then run the same command again"


class Client:
    """Asks a server, at most ``connections`` requests at a time.

    Nothing is sent anywhere but to the address: redirects are not followed, and proxies of the environment are left
    out for this machine's own servers.

    Raises:
        UserError: the certificates that the environment names cannot be read.
    """

    def __init__(self, address: Address, connections: int) -> None:
        self.address, self.connections = address, connections
        self._ssl = self._certificates()

    def get(self, path: str, read: Callable[[bytes], Result]) -> Result:
        """What ``read`` makes of the reply to ``GET path``.

        Raises:
            UserError: see `post`.
        """
        return self._ask([("GET", path, None)], lambda place, content: read(content))[0]

    def post(self, path: str, bodies: Sequence[dict[str, Any]], read: Callable[[int, bytes], Result]) -> list[Result]:
        """What ``read`` makes of the place and reply of each JSON body posted to ``path``, in order.

        Raises:
            UserError: the server cannot be reached, refuses, fails again and again, or ``read`` raises it. Requests
                still under way are given up then.
        """
        return self._ask([("POST", path, body) for body in bodies], read)

    def _ask(
        self, requests: Sequence[tuple[str, str, dict[str, Any] | None]], read: Callable[[int, bytes], Result]
    ) -> list[Result]:
        results: dict[int, Result] = {}
        waiting = iter(enumerate(requests))

        async def work(client: httpx.AsyncClient) -> None:
            for place, (method, path, body) in waiting:
                results[place] = read(place, await self._patiently(client, method, path, body))

        async def work_together() -> None:
            async with self._open() as client, asyncio.TaskGroup() as group:
                for _ in range(min(len(requests), self.connections)):
                    group.create_task(work(client))

        try:
            _run(work_together())
        except ExceptionGroup as group:
            raise group.exceptions[0] from None
        return [results[place] for place in range(len(requests))]

    def _certificates(self) -> ssl.SSLContext:
        try:
            return httpx.create_ssl_context()
        except OSError as error:
            raise UserError(
                f"{self.address.url} cannot be asked: the certificates that the environment names cannot be read "
                f"({error.strerror or type(error).__name__}); check SSL_CERT_FILE, SSL_CERT_DIR and SSLKEYLOGFILE."
            ) from error

    def _open(self) -> httpx.AsyncClient:
        key = self.address.key
        try:
            return httpx.AsyncClient(
                headers={"Authorization": f"Bearer {key}"} if key else {},
                timeout=httpx.Timeout(READ, connect=CONNECT, pool=None),
                limits=httpx.Limits(max_connections=self.connections, max_keepalive_connections=self.connections),
                verify=self._ssl,
                trust_env=not self.address.loopback,
                follow_redirects=False,
            )
        except (ValueError, ImportError, httpx.InvalidURL) as error:  # not shown: a proxy may hold a password
            raise UserError(
                f"{self.address.url} cannot be asked: the environment names a proxy that is no address of an http "
                "proxy; check HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY."
            ) from error

    async def _patiently(self, client: httpx.AsyncClient, method: str, path: str, body: dict[str, Any] | None) -> bytes:
        """The content of a good reply, after a few more tries where a failure may pass."""
        url = self.address.url + path
        for wait in (*WAITS, None):
            try:
                response = await client.request(method, url, json=body)
            except httpx.RequestError as error:
                # After a time-out the server may still be at work on the request; another would only add to it.
                if wait is None or isinstance(error, httpx.ReadTimeout) or not _may_pass(error):
                    told = self._without_key(_told(error))
                    raise UserError(f"{self.address.url} {told}; {_advice(error)}.") from error
            else:
                if response.status_code == httpx.codes.OK:
                    return response.content
                if wait is None or response.status_code not in PASSING:
                    raise self._refused(response, path)
            await asyncio.sleep(wait)
        raise AssertionError("the last try returns or raises")

    def _refused(self, response: httpx.Response, path: str) -> UserError:
        """The sentence for a reply that is no answer."""
        status, where = response.status_code, self.address.url
        if status in (401, 403):
            sent = "with the key from the environment" if self.address.key else "without a key"
            return UserError(
                f"{where} refuses a request {sent} ({status}); set VLLM_API_KEY or OPENAI_API_KEY to the key that the "
                "server was started with."
            )
        if response.is_redirect:
            host = response.headers.get("location", "")
            return UserError(
                f"{where} sends elsewhere ({status}, to {self.clean(host) or 'nowhere'}), which is not followed; "
                "write the address of the server itself as inference.engine."
            )
        said = self.clean(_message(response))
        if status == httpx.codes.NOT_FOUND:
            return UserError(
                f"{where} has no {path} ({said or status}); inference.engine must be the address of an "
                "OpenAI-compatible API, usually http://host:8000/v1."
            )
        if status in PASSING:
            return UserError(
                f"{where} failed {len(WAITS) + 1} times, the last time with {status} ({said or 'nothing said'}); look "
                "at the server's log, start it again if it died, and run the same command again."
            )
        return UserError(
            f"{where} refuses a request ({status}: {said or 'nothing said'}); check that it serves the "
            "model asked for and is a server of vLLM (`vllm serve`), whose extensions of the protocol are needed."
        )

    def clean(self, text: str) -> str:
        """One short line of what a server said, without the key it may repeat."""
        return self._without_key(" ".join(text.split()))[:SHOWN]

    def _without_key(self, text: str) -> str:
        return text.replace(self.address.key, "***") if self.address.key else text


def _run(work: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine to its end, also in a notebook, whose thread has an event loop at work already."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(work)
        return
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, work).result()


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and what led to it."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__


def _may_pass(error: httpx.RequestError) -> bool:
    """Whether a transport failure may be gone at the next try."""
    lasting = (ssl.SSLError, httpx.UnsupportedProtocol, httpx.LocalProtocolError, httpx.DecodingError)
    return not any(isinstance(cause, lasting) for cause in _causes(error))


def _told(error: httpx.RequestError) -> str:
    """What happened, as the end of a sentence about the server."""
    causes = list(_causes(error))
    if any(isinstance(cause, socket.gaierror) for cause in causes):
        return "cannot be reached: the name of its host is not known"
    if secure := next((cause for cause in causes if isinstance(cause, ssl.SSLError)), None):
        return f"cannot be reached over https ({secure.reason or secure})"
    if isinstance(error, httpx.ConnectTimeout):
        return f"cannot be reached: no connection within {CONNECT:g} s"
    if isinstance(error, httpx.TimeoutException):
        return f"did not answer within {READ:g} s"
    if isinstance(error, httpx.ProxyError):
        return "cannot be reached through the proxy that the environment names"
    if isinstance(error, httpx.ConnectError):
        return "cannot be reached: the connection is refused or there is no way to its host"
    return f"broke off in the middle of an answer ({str(error)[:SHOWN] or type(error).__name__})"


def _advice(error: httpx.RequestError) -> str:
    if isinstance(error, httpx.ReadTimeout):
        return "lower inference.max_sequences, so that fewer conversations wait for each other, or use a faster server"
    return UNREACHABLE


def _message(response: httpx.Response) -> str:
    """What a server says is wrong: the message of an OpenAI-compatible error, or else the beginning of its page."""
    with contextlib.suppress(ValueError, TypeError, KeyError):
        content = json.loads(response.content)
        return str((content.get("error") or content)["message"]) if isinstance(content, dict) else ""
    return response.text if "html" not in response.headers.get("content-type", "") else ""
