"""The page at ``/``: an image in, its answer and what was found to look at, slice by slice.

Plain files, served by the server itself and asking it alone: no script, font or picture comes from another host, and
the policy in their headers has the browser hold to that.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI, Response

from medray.engines.ray.serve.refusal import RefusedError

_FOLDER = Path(__file__).parent / "web"
_MEDIA = {".html": "text/html; charset=utf-8", ".css": "text/css", ".js": "text/javascript"}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def add_page(app: FastAPI) -> None:
    """Its routes. What they give is the same for everyone, so they ask for no key."""
    files = {path.name: path.read_bytes() for path in _FOLDER.iterdir() if path.suffix in _MEDIA}

    def give(name: str) -> Response:
        if name not in files:
            raise RefusedError(404, "no-such-route", "the page has no such file")
        headers = {"Content-Security-Policy": _POLICY, "Referrer-Policy": "no-referrer"}
        return Response(files[name], media_type=_MEDIA[Path(name).suffix], headers=headers)

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return give("index.html")

    @app.get("/page/{name}", include_in_schema=False)
    async def file(name: str) -> Response:
        return give(name)
