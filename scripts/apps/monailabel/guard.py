"""What stands before all doors of MONAI Label's server: requests that are refused, and errors that keep to themselves.

The server is MONAI Label's own (``monailabel.app``). It loads the application when it has started, so the guard is put
before it then.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import jwt
from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from monailabel.config import settings
from monailabel.endpoints.user import auth
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from scripts.apps.monailabel.statuses import KINDS, clear_statuses
from scripts.apps.monailabel.uploads import check_new_name, check_tag, leads_elsewhere
from scripts.runtime.manifest import ROOT

ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")
"""Of tokens: those for the RSA key that a realm publishes."""

_NAMES = ("image", "id", "label", "session_id")
_ABSOLUTE = re.compile(r"(?<![\w.:/~])/(?:[^/\s'\"]+/)+")


class Guard:
    """ASGI middleware that refuses what no door should see.

    - other web sites' pages (``Origin``), unless ``MONAI_LABEL_CORS_ORIGINS`` names them;
    - ``..`` and the like in paths, ids and tags, however often they are encoded;
    - the doors that are of no use here and dangerous: ``/reload``, uploads of weights, ``/proxy`` without a DICOMweb
      server behind it, whole slide images.

    Args:
        app: what comes behind it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse, or pass on."""
        refused = _refusal(Request(scope)) if scope["type"] == "http" else None
        if refused is None:
            await self.app(scope, receive, send)
        else:
            status, reason = refused
            await JSONResponse({"detail": reason}, status)(scope, receive, send)


def protect(server: FastAPI) -> None:
    """Put the guard before a server that runs already; once is enough, however often it is called."""
    if any(layer.cls is Guard for layer in server.user_middleware):
        return
    if not settings.MONAI_LABEL_CORS_ORIGINS:  # MONAI Label lets every site read the predictions then
        server.user_middleware = [layer for layer in server.user_middleware if layer.cls is not CORSMiddleware]
    server.middleware_stack = None  # made again at the next request
    server.add_middleware(Guard)
    for kind in (*KINDS, HTTPException):
        server.add_exception_handler(kind, _respond)
    # PyJWT wants the algorithms by name, which MONAI Label 0.8.5 does not give
    auth.jwt = SimpleNamespace(decode=decode_token)


def decode_token(token: str, key: str, options: dict[str, Any]) -> dict[str, Any]:
    """What a token says, if the key signed it and it has not expired.

    Raises:
        jwt.InvalidTokenError: it did not, or it never expires.
    """
    return jwt.decode(token, key, algorithms=list(ALGORITHMS), options=options | {"require": ["exp"]})


def without_folders(text: str) -> str:
    """A text with file names where it had absolute paths."""
    own = {settings.MONAI_LABEL_STUDIES, settings.MONAI_LABEL_APP_DIR, str(ROOT), str(Path.home())}
    for folder in sorted({*own, tempfile.gettempdir()}, key=len, reverse=True):
        if folder.startswith("/") and folder != "/":
            text = text.replace(f"{folder.rstrip('/')}/", "")
    return _ABSOLUTE.sub("", text)


async def _respond(request: Request, error: Exception) -> JSONResponse:
    """Known errors by their status, without the folders of this machine."""
    try:
        with clear_statuses():
            raise error
    except HTTPException as known:
        detail = without_folders(known.detail) if isinstance(known.detail, str) else known.detail
        return JSONResponse({"detail": detail}, known.status_code, known.headers)


def _refusal(request: Request) -> tuple[int, str] | None:
    """Status and reason, or None."""
    prefix = request.scope.get("root_path", "").rstrip("/") + settings.MONAI_LABEL_API_STR
    path = _decoded(request.scope["path"])
    door = path.removeprefix(prefix).strip("/").split("/")
    origin = request.headers.get("origin")
    if origin and not _is_welcome(origin, request.headers.get("host", "")):
        return 403, "pages of other sites may not ask this server; MONAI_LABEL_CORS_ORIGINS names those that may"
    if not path.isprintable() or "\\" in path or ".." in path.split("/"):
        return 404, "Not Found"
    if door[0] == "reload" or door[:2] in (["infer", "wsi"], ["infer", "wsi_v2"]):
        return 404, "Not Found"
    if door[0] == "proxy" and not settings.MONAI_LABEL_STUDIES.startswith(("http://", "https://")):
        return 404, "the studies are not on a DICOMweb server"
    if door[0] == "model" and request.method == "PUT":
        return 405, "weights are made by training, or put into the application's folder by hand"
    adds = request.method == "PUT" and door in (["datastore"], ["datastore", "image"])
    for name, value in parse_qsl(request.scope["query_string"].decode("latin-1"), keep_blank_values=True):
        try:
            if name == "tag" and value:
                check_tag(value)
            if name == "image" and adds and value:
                check_new_name(value)
        except ValueError as error:
            return 422, str(error)
        if name in _NAMES and leads_elsewhere(value):
            return 404, f"no {name} of this name"
    return None


def _decoded(path: str) -> str:
    """A path as the last of several servers would read it."""
    while (decoded := unquote(path)) != path:
        path = decoded
    return path


def _is_welcome(origin: str, host: str) -> bool:
    allowed = {str(url).rstrip("/") for url in settings.MONAI_LABEL_CORS_ORIGINS}
    return urlsplit(origin).netloc == host or origin.rstrip("/") in allowed
