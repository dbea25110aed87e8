"""What is wrong with a configuration, in one sentence that a user can act on."""

import difflib
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class ConfigError(ValueError):
    """A configuration to be mended: one sentence naming the key, the value and what is allowed."""

    exit_code, on_every_rank = 2, True


def closest(name: str, names: Iterable[str]) -> str:
    """` (did you mean X?)`, or nothing where no name is near."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


def about_stream(message: str, stream: str) -> str:
    """What is said of model's keys, said of those of one stream's.

    >>> about_stream("model.frozen=true needs weights: give model.weights=timm", "depth")
    'model.depth.frozen=true needs weights: give model.depth.weights=timm'
    """
    return re.sub(
        r"\bmodel\.(?=(name|kwargs|weights|partial|frozen)\b)", f"model.{stream}.", message
    )


def sentence(error: "ValidationError", tagged: dict[str, dict[str, list[str]]]) -> str:
    """The first refusal of a validation.  tagged: section -> names of which it is one."""
    first = error.errors()[0]
    key = ""
    for part in map(str, first["loc"]):
        if part not in tagged.get(key, ()) and not (part.isdigit() and key in tagged):
            key = f"{key}.{part}".lstrip(".")
    message = str(first["msg"]).removeprefix("Value error, ")
    message = re.sub(r"valid dictionary( or instance of \w+)?", "mapping of keys", message)
    if key.startswith("model."):
        message = about_stream(message, key.removeprefix("model."))
    if first["type"] == "value_error" and (not key or re.match(r"[\w.]+=", message)):
        return message
    if first["type"] == "missing":
        return f"{key} is required and missing"
    if first["type"] == "union_tag_not_found":
        return f"{key}.name is required and missing: it says which {key} is meant"
    return f"{key}={first['input']!r} is refused: {message[0].lower()}{message[1:]}"
