"""How log lines are written: as text, or as one JSON object each.

Herder's messages have one form, `what happened key=%s key=%d`, so that both can be made of the same record.
"""

from __future__ import annotations

import json
import logging
import re
from datetime import UTC, datetime
from typing import Literal

_CHATTY = ("PIL", "urllib3", "grpc")  # libraries that at DEBUG write several lines for each image or request
_TEXT = "%(asctime)s %(levelname)s %(name)s %(message)s"
_FIELD = re.compile(r"(\w+)=%\.?\d*\w")
_CONVERSION = re.compile(r"%\.?\d*[a-z]")


def set_up_logs(level: str, form: Literal["text", "json"]) -> None:
    """For this process, unless somebody has set them up already."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if form == "json" else logging.Formatter(_TEXT))
    logging.basicConfig(level=level, handlers=[handler])
    set_level(logging.getLogger().level)


def set_level(level: str | int) -> None:
    """From now on, this process logs at this level; libraries not below INFO."""
    root = logging.getLogger()
    root.setLevel(level)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(max(root.level, logging.INFO))


class JsonFormatter(logging.Formatter):
    """A record as a JSON object of `time`, `level`, `logger`, `event`, and what its message names by `key=`."""

    def format(self, record: logging.LogRecord) -> str:
        event, fields = _parts(record)
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname,
            "logger": record.name,
            "event": event,
            **fields,
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _parts(record: logging.LogRecord) -> tuple[str, dict[str, object]]:
    """The words before the first key, and the values by key; of a message in another form, the whole of it."""
    template, values = record.msg, record.args
    if not isinstance(template, str) or not isinstance(values, tuple):
        return record.getMessage(), {}
    names = _FIELD.findall(template)
    if not names or not len(names) == len(values) == len(_CONVERSION.findall(template)):
        return record.getMessage(), {}
    return template[: template.index(f"{names[0]}=")].strip(), dict(zip(names, values, strict=True))
