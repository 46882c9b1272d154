"""The service's logs on standard error: lines for people, or JSON objects for collectors."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime


class JsonFormatter(logging.Formatter):
    """A formatter that writes a JSON object a line: time (ISO 8601, UTC), level, logger, message.

    It adds the record's own `fields`, and the traceback of an exception, where there are any.
    """

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


def configure_logging(as_json: bool) -> None:
    """Show this package's log records from INFO up, and other libraries' from WARNING up."""
    handler = logging.StreamHandler()
    text = logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    handler.setFormatter(JsonFormatter() if as_json else text)
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("cqil_dist").setLevel(logging.INFO)
    # Its warnings are about malformed requests, which only their senders can mend.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
