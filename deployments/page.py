"""The page at /: plain files, from this origin alone."""

from fastapi import APIRouter
from fastapi.responses import Response

from azu.errors import NotFound
from azu.files import CONFIGS

router = APIRouter(include_in_schema=False)

_TYPES = {".css": "text/css", ".html": "text/html", ".js": "text/javascript", ".svg": "image/svg+xml"}
_HEADERS = {
    "cache-control": "no-cache",
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def _read() -> dict[str, tuple[bytes, str]]:
    """Return the page's files and their types by name; what is not among them is never looked for on disk."""
    found = {}
    for file in (CONFIGS / "page").iterdir():
        suffix = file.name[file.name.rfind(".") :]
        if suffix in _TYPES:
            found[file.name] = (file.read_bytes(), f"{_TYPES[suffix]}; charset=utf-8")
    return found


_FILES = _read()


@router.get("/")
async def page() -> Response:
    """Return the page."""
    return await part("index.html")


@router.get("/page/{name}")
async def part(name: str) -> Response:
    """Return one of the page's files."""
    if name not in _FILES:
        raise NotFound("the page has no such part")
    content, content_type = _FILES[name]
    return Response(content, headers=_HEADERS, media_type=content_type)
