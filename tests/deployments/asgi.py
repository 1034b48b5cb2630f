"""An ASGI app called directly, because an HTTP client would take longer than the app."""

import asyncio

from starlette.types import ASGIApp, Message

from tests.deployments.fuzz import Call, Reply


class AsgiTarget:
    """Calls an app as a server does, also with requests that an HTTP client refuses to send."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def send(self, call: Call) -> Reply:
        """Send a request; with `leaves` the sender disconnects after that many pieces of the answer."""
        status, pieces, sent = 0, [], False
        gone = asyncio.Event()
        if call.leaves == 0:
            gone.set()

        async def receive() -> Message:
            nonlocal sent
            if not sent:
                sent = True
                return {"type": "http.request", "body": call.body, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                return
            pieces.append(message.get("body", b""))
            if call.leaves is not None and len(pieces) >= call.leaves:
                gone.set()

        await self._app(self._scope(call), receive, send)
        return Reply(status, b"".join(pieces))

    def _scope(self, call: Call) -> dict[str, object]:
        return {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": call.method,
            "scheme": "http",
            "path": call.path.partition("?")[0],
            "raw_path": call.path.encode(),
            "query_string": call.query.encode(),
            "root_path": "",
            "headers": list(call.headers),
            "server": ("azu.test", 80),
            "client": ("127.0.0.1", 4),
        }
