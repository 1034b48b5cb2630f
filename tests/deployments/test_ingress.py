"""The app as a whole: what it serves without a key, and one shape for every error."""

import asyncio
from pathlib import Path

from deployments.ingress import contract
from tests.deployments.local import local_ingress


def test_the_contract_and_its_page_are_served_like_any_answer(redis_url: str, tmp_path: Path) -> None:
    async def ask() -> None:
        async with local_ingress(redis_url, tmp_path) as ingress, ingress.client() as client:
            document, docs, missing = [
                await client.get(path) for path in ("/openapi.json", "/docs", "/nowhere")
            ]
            wrong = await client.put("/health")
            assert document.json() == contract()
            assert docs.headers["content-type"].startswith("text/html")
            assert (missing.status_code, wrong.status_code) == (404, 405)
            assert missing.json()["error"]["code"] == "not_found"
            assert wrong.json()["error"]["type"] == "invalid_request_error"
            assert all(reply.headers["x-request-id"] for reply in (document, docs, missing, wrong))

    asyncio.run(asyncio.wait_for(ask(), 300))
