"""Where data lie: at a path of this machine, or at a URL."""

from __future__ import annotations

import re


def is_url(place: str) -> bool:
    """Whether a place is a URL, such as https://host/file; a drive of Windows (C:\\) is none."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", place) is not None
