"""An error as the one line that a person reads."""

from __future__ import annotations

import re

from omegaconf.errors import OmegaConfBaseException

from sniffer.errors import SnifferError
from sniffer.printing import printable


def one_line(error: BaseException) -> str:
    """An error's message without Hydra's line breaks, and without what only helps Hydra's developers."""
    if isinstance(error, OSError) and error.strerror:
        place = "" if error.filename is None else f"{error.filename}: "
        return printable(f"{place}{error.strerror}; check that the folder is there, may be written to and has room")
    message = str(error)
    if unknown := re.match(r"Could not override '(.+?)'\.\s+To append [^{]+$", message):
        return f"there is no key {unknown[1]}: `python -m sniffer --cfg job` shows those that exist"
    kept = re.split(r"\n\s*(?:Config search path|full_key|See https?):?", message)[0]
    lines = [re.sub(r"\n\s+", ", ", kept.replace(":\n\t", ": ").replace("\n\t", ", "))]
    # Hydra says which key it could not set; only its cause says why.
    if not isinstance(error, SnifferError) and isinstance(error.__cause__, OmegaConfBaseException):
        lines.append(one_line(error.__cause__))
    # OmegaConf adds the key to errors of Python's own as well.
    if isinstance(error, OverflowError) and (key := re.search(r"\n\s*full_key: (\S+)", message)):
        lines.insert(0, key[1])
    return printable(": ".join(" ".join(line.split()) for line in lines if line.strip()) or type(error).__name__)
