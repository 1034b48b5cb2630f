"""The page's files are served from azu alone, and no other file is."""

import asyncio
import re
from types import SimpleNamespace
from urllib.parse import urljoin

import httpx
import pytest
from fastapi import FastAPI
from fastapi.responses import Response

from azu.errors import NotFound
from deployments import page

SVG = "http://www.w3.org/2000/svg"
FROM_STRINGS = re.compile(r"innerHTML\s*=|insertAdjacentHTML|document\.write|\beval\(|style=|onclick=")
VENDOR = "/page/vendor/"
CHAIN = "https://chain.test"


def get(path: str) -> httpx.Response:
    async def ask() -> httpx.Response:
        api = FastAPI(docs_url=None)
        api.state.services = SimpleNamespace(config=SimpleNamespace(chain_url=CHAIN))
        api.include_router(page.router)
        api.add_exception_handler(NotFound, lambda *_: Response(status_code=404))
        transport = httpx.ASGITransport(api)
        async with httpx.AsyncClient(transport=transport, base_url="http://azu.test") as client:
            return await client.get(path)

    return asyncio.run(ask())


def parts(*paths: str) -> dict[str, httpx.Response]:
    """Return these pages and every file that they load, directly or not, but not the OpenAPI document."""
    found, wanted = {}, [*paths]
    while wanted:
        path = wanted.pop()
        if path not in found:
            found[path] = get(path).raise_for_status()
            named = re.findall(r'(?:href|src)="(/[^"#]*)"', found[path].text)
            wanted += [name for name in named if name != "/openapi.json"]
            wanted += [urljoin(path, name) for name in re.findall(r'from "(\./[^"]+)"', found[path].text)]
    return found


def test_every_file_is_served_with_its_type() -> None:
    found = parts("/", "/docs")
    types = {path: answer.headers["content-type"].partition(";")[0] for path, answer in found.items()}

    assert types["/"] == "text/html"
    assert types["/page/style.css"] == "text/css"
    assert types["/page/app.js"] == types["/page/network.js"] == "text/javascript"
    assert types["/page/icon.svg"] == "image/svg+xml"
    assert types["/docs"] == "text/html"
    assert types["/page/vendor/marked.js"] == types["/page/vendor/noble/sha3.js"] == "text/javascript"
    assert types["/page/vendor/swagger-ui-bundle.js"] == types["/page/docs.js"] == "text/javascript"
    assert types["/page/vendor/swagger-ui.css"] == "text/css"


def test_no_file_loads_from_another_host_or_runs_a_string() -> None:
    for path, answer in parts("/", "/docs").items():
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'; script-src 'self'; " in policy
        assert f"connect-src 'self'{f' {CHAIN}' if path == '/' else ''}; " in policy
        assert ("unsafe" in policy) == (path == "/docs")
        if path.startswith(VENDOR):
            continue
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert not re.search(r"(https?:)?//\w", answer.text.replace(SVG, "").replace("// ", "")), path
        assert not FROM_STRINGS.search(answer.text)


def test_a_key_is_kept_in_its_tab_alone() -> None:
    own = {path: answer for path, answer in parts("/").items() if not path.startswith(VENDOR)}
    scripts = {path: answer.text for path, answer in own.items() if path.endswith(".js")}

    assert "sessionStorage" in scripts["/page/api.js"]
    of_all = "".join(scripts.values())
    # Another tab keeps no more of an account than the platform's address.
    assert not re.search(r"localStorage\.(?!(get|set)Item\(PLATFORM\b)|document\.cookie", of_all)
    # Chats are kept longer than a tab, the key is not among them.
    assert [path for path, text in scripts.items() if "indexedDB" in text] == ["/page/store.js"]
    assert not re.search(r"sessionStorage|api\.js|\bkey\b", scripts["/page/store.js"])


@pytest.mark.parametrize("name", ["..%2fnetwork.yaml", "network.yaml", "__init__.py", "%00", "app.js%2f.."])
def test_no_other_file_is_served(name: str) -> None:
    assert get(f"/page/{name}").status_code == 404
