"""Texts for people: an error as one line, bytes, durations, and names made harmless."""

from __future__ import annotations

import re
from typing import Any

from omegaconf.errors import OmegaConfBaseException

from sniffer.errors import SnifferError

CODES = re.compile(
    "[\x00-\x1f\x7f-\x9f"  # control codes, the escape character among them
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # the direction of writing, which can put text where it is not
    "\u2028\u2029\ufeff"  # separators of lines, and a mark without width
    "\ud800-\udfff]"  # half a character
)
BLANK = "\t\n\r"
NO_KEY = "there is no key {}: `python -m sniffer --cfg job` shows those that exist"
MOST = 4000
"""Characters of one thing: a manifest may hold a name of many megabytes."""


def printable(text: Any, keep: str = "", most: int = MOST) -> str:
    """A text without codes: blanks become spaces, other codes how Python would spell them.

    Args:
        keep: characters that may stay, such as the line breaks of a traceback.
        most: characters to show.
    """
    whole = str(text)
    shown = whole if len(whole) <= most else f"{whole[:most]}... ({len(whole):,} characters)"
    return CODES.sub(lambda found: found[0] if found[0] in keep else _spelt(found[0]), shown)


def _spelt(code: str) -> str:
    return " " if code in BLANK else f"\\x{ord(code):02x}" if ord(code) < 256 else f"\\u{ord(code):04x}"


def one_line(error: BaseException) -> str:
    """An error's message without Hydra's line breaks, and without what only helps Hydra's developers."""
    if isinstance(error, OSError) and error.strerror:
        place = "" if error.filename is None else f"{error.filename}: "
        return printable(f"{place}{error.strerror}; check that the folder is there, may be written to and has room")
    message = str(error)
    if unknown := re.match(r"Could not override '(.+?)'\.\s+To append [^{]+$", message):
        return NO_KEY.format(unknown[1])
    if unknown := re.match(r"In '(.+?)': ConfigKeyError raised while composing config:\s+Key '(.+?)' not in", message):
        where = key[1].rpartition(".")[0] if (key := re.search(r"full_key: (\S+)", message)) else ""
        return f"{unknown[1]}.yaml: {NO_KEY.format(f'{where}.{unknown[2]}'.strip('.'))}"
    kept = re.split(r"\n\s*(?:Config search path|full_key|See https?):?", message)[0]
    lines = [re.sub(r"\n\s+", ", ", kept.replace(":\n\t", ": ").replace("\n\t", ", "))]
    # Hydra says which key it could not set; only its cause says why.
    if not isinstance(error, SnifferError) and isinstance(error.__cause__, OmegaConfBaseException):
        lines.append(one_line(error.__cause__))
    # OmegaConf adds the key to errors of Python's own as well.
    if isinstance(error, OverflowError) and (key := re.search(r"\n\s*full_key: (\S+)", message)):
        lines.insert(0, key[1])
    return printable(": ".join(" ".join(line.split()) for line in lines if line.strip()) or type(error).__name__)


def size(n_bytes: float) -> str:
    """Bytes for people, in the largest unit that leaves a whole number in front."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if n_bytes >= 2**power:
            return f"{n_bytes / 2**power:.1f} {unit}"
    return f"{n_bytes:.0f} bytes"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
