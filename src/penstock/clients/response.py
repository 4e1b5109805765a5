"""What an `HttpClient` returns."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from email.message import Message
from typing import Any, TypeAlias

from multidict import CIMultiDictProxy
from yarl import URL

from penstock.errors import NotJson

BODY_START_BYTES = 512
"""How much of a body an error shows. Arbitrary, because: holds the message of most APIs, and fits a log line."""

JsonLoads: TypeAlias = Callable[[bytes], Any]


@dataclass(frozen=True, slots=True)
class Response:
    """An answer with a status below 400, read fully; its connection is already back in the pool."""

    status: int
    headers: CIMultiDictProxy[str]
    body: bytes
    attempts: int
    """Requests sent for it: retries, redirects and the repetition after a 401 count. 1 means that the first worked."""
    elapsed: float
    """Seconds from sending the last attempt to the end of its body."""
    method: str = field(repr=False)
    request_url: URL = field(repr=False)
    json_loads: JsonLoads = field(repr=False)

    @property
    def url(self) -> str:
        """Where the answer came from, after redirects."""
        return str(self.request_url)

    def json(self) -> Any:
        """The body as JSON.

        Raises:
            NotJson: it is not; the error shows status, content type and the first bytes.
        """
        try:
            return self.json_loads(self.body)
        except (ValueError, RecursionError) as error:  # too deep for the parser is the server's doing as well
            content_type = self.headers.get("Content-Type", "")
            start = self.body[:BODY_START_BYTES]
            raise NotJson(
                self.method, masked(self.request_url), self.status, content_type, start, str(error)
            ) from error

    def text(self) -> str:
        """The body as text, in the charset of its content type, else UTF-8; what cannot be decoded is replaced."""
        content_type = Message()
        content_type["Content-Type"] = self.headers.get("Content-Type", "")
        charset = content_type.get_content_charset("utf-8")
        try:
            return self.body.decode(charset, errors="replace")
        except (LookupError, ValueError):  # unknown, or one like idna that is no charset for a body
            return self.body.decode("utf-8", errors="replace")


def masked(url: URL) -> str:
    """`url` without what may be secret: user info, fragment, and the values of its query."""
    names = "&".join(f"{name}=..." for name in url.query)
    return f"{url.with_user(None).with_query(None).with_fragment(None)}{'?' + names if names else ''}"


def masked_text(address: str) -> str:
    """As `masked`, for a text that may be no URL: without user info, query and fragment."""
    return re.sub(r"[^/]*@", "...@", re.split(r"[?#]", address)[0])
