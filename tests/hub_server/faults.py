"""What can go wrong on the wire, as rules, and a log of what was asked. An ASGI wrapper around the server."""

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send


@dataclass(slots=True)
class Fault:
    """What happens to requests whose ``METHOD /path?query`` matches; counts its own strikes.

    Args:
        match: a regular expression, searched for in that line.
        times: how many requests are struck; -1 for all.
        skip: how many matching requests pass before the first is struck.
        status: answer this status, with `headers` and `body`, instead of doing the work …
        after: … or after doing it: the answer is lost. Without `status` the connection breaks instead.
        drop_after: break the connection after so many bytes of the body.
        drop_request_after: break the connection after so many bytes of the request's body.
        truncate_to: send so many bytes of the body, and declare no more: short but well formed.
        flip_at: invert the byte at this offset of the body.
        delay: seconds to wait first.
        bytes_per_s: throttle.
        trickle: seconds before each byte of the body.
        says: headers of the real answer, in the place of its own.
        whole: send the whole file, whatever range is asked for.
    """

    match: str
    times: int = 1
    skip: int = 0
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    after: bool = False
    drop_after: int | None = None
    drop_request_after: int | None = None
    truncate_to: int | None = None
    flip_at: int | None = None
    delay: float = 0.0
    bytes_per_s: float | None = None
    trickle: float = 0.0
    says: Mapping[str, str] = field(default_factory=dict)
    whole: bool = False
    hits: int = 0

    def strikes(self, line: str) -> bool:
        if self.times == 0 or not re.search(self.match, line):
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        self.times -= 1
        self.hits += 1
        return True

    def answer(self) -> Response:
        return Response(self.body, self.status or 500, dict(self.headers))


@dataclass(slots=True)
class Call:
    """One logged request."""

    line: str
    range: str | None
    authorized: bool
    status: int | None = None
    sent: int = 0
    received: int = 0
    struck: bool = False


class _Receiver:
    """Receives a request, counts its bytes and breaks off where the fault says."""

    def __init__(self, receive: Receive, call: Call, fault: Fault | None) -> None:
        self._receive, self._call = receive, call
        self._limit = fault.drop_request_after if fault else None

    async def __call__(self) -> Message:
        message = await self._receive()
        self._call.received += len(message.get("body", b""))
        if self._limit is not None and self._call.received > self._limit:
            raise ConnectionAbortedError
        return message


class _Sender:
    """Sends an answer, counts its bytes and bends it as the fault says."""

    def __init__(self, send: Send, call: Call, fault: Fault | None) -> None:
        self._send, self._call, self._fault = send, call, fault

    async def plain(self, message: Message) -> None:
        self._call.status = message.get("status", self._call.status)
        self._call.sent += len(message.get("body", b""))
        if self._fault is not None and self._fault.trickle:
            for byte in message.get("body", b""):
                await asyncio.sleep(self._fault.trickle)
                await self._send({**message, "body": bytes([byte]), "more_body": True})
            message = {**message, "body": b""} if "body" in message else message
        await self._send(message)

    async def __call__(self, message: Message) -> None:
        fault = self._fault
        if fault is None:
            await self.plain(message)
        elif message["type"] == "http.response.start":
            await self.plain({**message, "headers": self._headers(message["headers"], fault)})
        else:
            await self._body(message, fault)

    @staticmethod
    def _headers(headers: list[tuple[bytes, bytes]], fault: Fault) -> list[tuple[bytes, bytes]]:
        says = {key.lower().encode(): value.encode() for key, value in fault.says.items()}
        if fault.truncate_to is not None:
            says[b"content-length"] = str(fault.truncate_to).encode()
        return [(key, says.get(key, value)) for key, value in headers]

    async def _body(self, message: Message, fault: Fault) -> None:
        start, body = self._call.sent, bytearray(message.get("body", b""))
        if fault.flip_at is not None and start <= fault.flip_at < start + len(body):
            body[fault.flip_at - start] ^= 0xFF
        if fault.truncate_to is not None:
            del body[max(fault.truncate_to - start, 0) :]
        if fault.bytes_per_s:
            await asyncio.sleep(len(body) / fault.bytes_per_s)
        if fault.drop_after is not None and start + len(body) > fault.drop_after:
            await self.plain({**message, "body": bytes(body[: max(fault.drop_after - start, 0)]), "more_body": True})
            await asyncio.sleep(0.05)  # let the bytes leave before the connection breaks
            raise ConnectionAbortedError
        await self.plain({**message, "body": bytes(body)})


class FaultyWire:
    """An ASGI application whose requests are logged and struck by faults on their way to another."""

    def __init__(self, app: ASGIApp, faults: list[Fault], log: list[Call]) -> None:
        self._app, self._faults, self._log = app, faults, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request. The application sees the path as sent: ``refs%2Fpr%2F1`` is one segment."""
        if scope["type"] != "http":
            return
        path, query = scope["raw_path"].decode().split("?")[0], scope["query_string"].decode()
        headers = {key.decode(): value.decode() for key, value in scope["headers"]}
        line = f"{scope['method']} {path}" + (f"?{query}" if query else "")
        call = Call(line, headers.get("range"), "authorization" in headers)
        self._log.append(call)
        fault = next((rule for rule in self._faults if rule.strikes(line)), None)
        call.struck = fault is not None
        receiver = _Receiver(receive, call, fault)
        try:
            await self._serve({**scope, "path": path}, receiver, _Sender(send, call, fault), fault)
        except ConnectionAbortedError:
            transport = getattr(getattr(send, "__self__", None), "transport", None)  # of uvicorn's request cycle
            if transport is not None:
                transport.abort()

    async def _serve(self, scope: Scope, receive: Receive, sender: _Sender, fault: Fault | None) -> None:
        if fault is not None:
            await asyncio.sleep(fault.delay)
            if fault.after:
                await self._app(scope, receive, _nowhere)
                if fault.status is None:
                    raise ConnectionAbortedError
            if fault.whole:
                scope = {**scope, "headers": [pair for pair in scope["headers"] if pair[0] != b"range"]}
            if fault.status is not None:
                while not fault.after and (await receive()).get("more_body"):
                    pass  # an answer before the request is read would look like a broken connection
                await fault.answer()(scope, receive, sender.plain)
                return
        await self._app(scope, receive, sender)


async def _nowhere(message: Message) -> None:
    """Send nothing."""
