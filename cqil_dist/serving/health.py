"""The service's health: whether requests should be sent here, judged by the coordinator's state."""

from __future__ import annotations

import asyncio
import logging
import time

from cqil_dist.client import AsyncClient
from cqil_dist.errors import LaunchError, RankUnavailable

logger = logging.getLogger(__name__)

_ANSWER_S = 2.0


class HealthWatch:
    """The health of the service, updated by each call of `look`.

    Args:
        client: a client of the coordinator's service.
        bound_s: seconds that a recovery may take while the service still counts as serving:
            requests wait meanwhile, and most recoveries end before another server could help.

    Attributes:
        serving: whether requests should be sent to this service.
        detail: what the engine is waiting for, or why it has failed; "" while it serves.
        failed: an event that is set once the engine has given up for good.
    """

    INTERVAL_S = 0.5
    """Seconds between two calls of `look`."""

    def __init__(self, client: AsyncClient, bound_s: float) -> None:
        self._client = client
        self._bound_s = bound_s
        self._unwell_since: float | None = None
        self.serving = False
        self.detail = "starting"
        self.failed = asyncio.Event()

    async def look(self) -> None:
        """Ask the coordinator for its state, and update the attributes. Raises nothing."""
        try:
            # Not wait_for, which on Python 3.11 may swallow a cancellation.
            async with asyncio.timeout(_ANSWER_S):
                status = await self._client.status()
            state, detail = str(status.state), status.state_detail
        except (LaunchError, RankUnavailable) as error:
            state, detail = "failed", str(error)  # the coordinator is gone for good
        except TimeoutError:
            state, detail = "recovering", "the coordinator does not answer"
        except Exception as error:  # it may pass, so the service goes on asking
            state, detail = "recovering", f"{type(error).__name__}: {error}"
        self._update(state, detail)

    def _update(self, state: str, detail: str) -> None:
        now = time.monotonic()
        if state == "serving":
            self._unwell_since = None
        elif self._unwell_since is None:
            self._unwell_since = now
        unwell_s = 0.0 if self._unwell_since is None else now - self._unwell_since
        serving = state == "serving" or (state == "recovering" and unwell_s < self._bound_s)
        if self.serving and not serving:
            logger.warning("not serving: %s", detail)
        self.serving, self.detail = serving, detail
        if state == "failed":
            self.failed.set()
