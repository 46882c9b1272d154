"""The key that lets calls in, as "authorization: Bearer <key>"."""

from __future__ import annotations

import hmac


class BearerKey:
    """Compares what a call brings with what it should, in constant time."""

    def __init__(self, key: str) -> None:
        self._expected = f"Bearer {key}".encode()

    def admits(self, authorization: str | bytes) -> bool:
        """Whether the value of a call's authorization header, "" if it has none, is right."""
        given = authorization.encode() if isinstance(authorization, str) else authorization
        return hmac.compare_digest(given, self._expected)
