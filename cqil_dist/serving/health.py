"""Is the service fit to be sent requests? Asks the coordinator, and remembers since when not."""

from __future__ import annotations

import asyncio
import logging
import time

from cqil_dist.client import AsyncClient
from cqil_dist.errors import LaunchError, RankUnavailable

logger = logging.getLogger(__name__)

_ANSWER_S = 2.0


class HealthWatch:
    """Follows the state of the engine.

    Args:
        bound_s: seconds that it may recover from a loss and still count as serving: requests wait
            meanwhile, and most recoveries are done before anybody else could help.

    Attributes:
        serving: whether requests are well sent here.
        detail: why not.
        failed: set once the engine has given up for good.
    """

    INTERVAL_S = 0.5

    def __init__(self, client: AsyncClient, bound_s: float) -> None:
        self._client = client
        self._bound_s = bound_s
        self._unwell_since: float | None = None
        self.serving = False
        self.detail = "starting"
        self.failed = asyncio.Event()

    async def look(self) -> None:
        """Ask; to be done every `INTERVAL_S`."""
        try:
            # Not wait_for, which on Python 3.11 may swallow that the watch is cancelled.
            async with asyncio.timeout(_ANSWER_S):
                status = await self._client.status()
            state, detail = str(status.state), status.state_detail
        except (LaunchError, RankUnavailable) as error:
            state, detail = "failed", str(error)  # it is gone for good
        except TimeoutError:
            state, detail = "recovering", "the coordinator does not answer"
        except Exception as error:  # whatever it is, it may pass, and the watch goes on
            state, detail = "recovering", f"{type(error).__name__}: {error}"
        self._note(state, detail)

    def _note(self, state: str, detail: str) -> None:
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
