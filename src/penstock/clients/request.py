"""What the user asks for, as what can be sent again and again: a URL, headers, a body as bytes."""

import ipaddress
import json as json_module
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias
from urllib.parse import urlencode

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from penstock.clients.auth import Headers
from penstock.clients.response import masked, masked_text
from penstock.errors import UsageError

QueryValue: TypeAlias = str | int | float
Params: TypeAlias = Mapping[str, QueryValue | list[QueryValue] | tuple[QueryValue, ...]] | str | None
Body: TypeAlias = bytes | str | Mapping[str, QueryValue | list[QueryValue] | tuple[QueryValue, ...]] | None


def checked_base(base_url: str) -> URL:
    """`base_url` as a URL.

    Raises:
        UsageError: no scheme, no host, or a query.
    """
    try:
        url = URL(base_url)
    except (TypeError, ValueError):
        url = URL()
    if url.scheme not in ("http", "https") or not url.host:
        raise UsageError(
            f"base_url={masked_text(str(base_url))!r}: expected an address with scheme and host. "
            f"Write HttpClient('https://host/path')."
        )
    if url.query_string or url.fragment:
        raise UsageError(
            f"base_url={masked(url)}: has a query or a fragment. Give the query with each request: params=."
        )
    return url


def user_info(base: URL) -> Headers:
    """User and password of a URL as the header that they stand for."""
    return {} if base.user is None else {"Authorization": aiohttp.encode_basic_auth(base.user, base.password or "")}


def is_ip_address(host: str | None) -> bool:
    """Whether a host is given by number."""
    try:
        ipaddress.ip_address(host or "")
    except ValueError:
        return False
    return True


def encoded(json: Any, data: Body) -> tuple[bytes | None, str | None]:
    """The body as bytes, which can be sent again, and its content type.

    Raises:
        UsageError: two bodies, or one that cannot be written or sent again.
    """
    if json is not None:
        if data is not None:
            raise UsageError("found both json= and data=, expected one body.")
        try:
            return json_module.dumps(json).encode(), "application/json"
        except (TypeError, ValueError, RecursionError) as error:
            raise UsageError(f"json={type(json).__name__}: cannot be written as JSON: {error}.") from error
    if data is None or isinstance(data, bytes):
        return data, None
    if isinstance(data, str):
        return data.encode(), "text/plain; charset=utf-8"
    if isinstance(data, Mapping):
        return urlencode(_form(data), doseq=True).encode(), "application/x-www-form-urlencoded"
    raise UsageError(
        f"data={type(data).__name__}: expected bytes, text or a mapping. A retry must be able to send it again, "
        f"so a stream or a file has to be read first."
    )


def _form(data: Mapping[str, Any]) -> Mapping[str, Any]:
    for name, value in data.items():
        parts = value if isinstance(value, list | tuple) else [value]
        if not all(isinstance(part, str | int | float) and not isinstance(part, bool) for part in parts):
            raise UsageError(f"data={{{name!r}: {reprlib.repr(value)}}}: expected text or numbers, or lists of them.")
    return data


def with_query(url: URL, params: Params) -> URL:
    """`url` with more parameters.

    Raises:
        UsageError: a value that cannot stand in a query.
    """
    try:
        return url.extend_query(params)
    except (TypeError, ValueError) as error:
        raise UsageError(f"params={_culprit(params)}: expected text or numbers, or lists of them.") from error


def _culprit(params: Params) -> str:
    """The first parameter that a URL refuses."""
    for name, value in params.items() if isinstance(params, Mapping) else ():
        try:
            URL().with_query({name: value})
        except (TypeError, ValueError):
            return f"{{{name!r}: {value!r:.80}}}"
    return type(params).__name__


def without(headers: Headers, unwanted: Callable[[str], bool]) -> Headers:
    """The headers but for those whose lower-case name is unwanted."""
    return CIMultiDict((name, value) for name, value in headers.items() if not unwanted(name.lower()))
