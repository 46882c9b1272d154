"""The key that lets calls in, as "authorization: Bearer <key>" (RFC 6750)."""

from __future__ import annotations

import hmac


class BearerKey:
    """The key that calls have to bring, compared in constant time with what they bring."""

    def __init__(self, key: str) -> None:
        self._expected = key.encode()

    def admits(self, authorization: str | bytes) -> bool:
        """Check the value of a call's authorization header, which is "" if the call has none."""
        given = authorization.encode() if isinstance(authorization, str) else authorization
        scheme, _, key = given.partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(key, self._expected)
