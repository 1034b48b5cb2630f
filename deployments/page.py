"""The page at / and the API's documentation at /docs: plain files, from this origin alone."""

from urllib.parse import urlsplit

from fastapi import APIRouter
from fastapi.responses import Response

from azu.errors import NotFound
from azu.files import CONFIGS
from deployments.services import ServicesNow

router = APIRouter(include_in_schema=False)

_TYPES = {".css": "text/css", ".html": "text/html", ".js": "text/javascript", ".svg": "image/svg+xml"}
_OWN_ONLY = (
    "default-src 'none'; script-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; "
)
_POLICY = _OWN_ONLY + "style-src 'self'; require-trusted-types-for 'script'"
# Swagger UI sets styles on elements, draws icons from data URLs and writes sanitised HTML.
_DOCS_POLICY = _OWN_ONLY.replace("img-src", "img-src data:") + "style-src 'self' 'unsafe-inline'"
_HEADERS = {
    "cache-control": "no-cache",
    "content-security-policy": _POLICY,
    "cross-origin-opener-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def _read() -> dict[str, tuple[bytes, str]]:
    """Return the page's files and their types by name; a request never looks for a file on disk."""
    found, folder = {}, CONFIGS / "page"
    for file in folder.rglob("*"):
        if file.suffix in _TYPES:
            name = file.relative_to(folder).as_posix()
            found[name] = (file.read_bytes(), f"{_TYPES[file.suffix]}; charset=utf-8")
    return found


_FILES = _read()


@router.get("/")
async def page(services: ServicesNow) -> Response:
    """Return the page, which sends transfers that its user's wallet has signed to the chain itself."""
    response, chain = await part("index.html"), urlsplit(services.config.chain_url)
    policy = _POLICY.replace("connect-src 'self'", f"connect-src 'self' {chain.scheme}://{chain.netloc}")
    response.headers["content-security-policy"] = policy
    return response


@router.get("/docs")
async def docs() -> Response:
    """Return the page that documents the API."""
    response = await part("docs.html")
    response.headers["content-security-policy"] = _DOCS_POLICY
    return response


@router.get("/page/{name:path}")
async def part(name: str) -> Response:
    """Return one of the page's files."""
    if name not in _FILES:
        raise NotFound("the page has no such part")
    content, content_type = _FILES[name]
    return Response(content, headers=_HEADERS, media_type=content_type)
