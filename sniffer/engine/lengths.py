"""How long documents may be, as the configuration and the model's limits have it."""

from __future__ import annotations

from sniffer.config.schema import Config
from sniffer.errors import ConfigError
from sniffer.terminal.summary import to_extend
from sniffer.types import ModelLimits


def token_limit(config: Config, limits: ModelLimits) -> int | None:
    """The most tokens of a text: what the user says, else, unless it comes in windows, what the model was made for.

    Where a model goes on with texts, there is room left for what it writes.

    Raises:
        ConfigError: the user asks for more positions than the model has.
    """
    longest, window, pack = config.dataset.max_tokens, window_of(config), pack_of(config)
    key, wanted = ("max_tokens", longest) if window is None else ("window", window)
    if pack is not None:
        key, wanted, longest = "pack_to", pack, min(longest or pack, pack)
    possible, new = limits.max_positions, new_tokens(config)
    most = None if possible is None else max(possible, limits.reach or 0)
    if most is not None and most <= new:
        raise ConfigError(f"generate.max_new_tokens={new} leaves no room for a prompt in the model's {most} positions")
    if wanted is not None and most is not None and wanted + new > most:
        way = to_extend(limits, wanted + new)
        more = f" and generate.max_new_tokens={new} are" if new else " is"
        raise ConfigError(f"dataset.{key}={wanted}{more} more than the model's {most} positions: lower it, {way}")
    if longest is not None or window is not None or possible is None:
        return longest
    return max(possible, new + 1) - new if new else possible


def longest_document(config: Config, limits: ModelLimits) -> int | None:
    """Tokens that no document has more than; None where nothing says so."""
    known = (pack_of(config),) if pack_of(config) else (token_limit(config, limits), window_of(config))
    longest = min((n for n in known if n is not None), default=None)
    return None if longest is None else longest + new_tokens(config)


def new_tokens(config: Config) -> int:
    """Tokens that a model writes after a document, at most."""
    return 0 if config.generate is None else config.generate.max_new_tokens


def window_of(config: Config) -> int | None:
    """The tokens of a window; a dataset of a user's own may not have the key."""
    return getattr(config.dataset, "window", None)


def pack_of(config: Config) -> int | None:
    """The tokens that texts are packed into."""
    return getattr(config.dataset, "pack_to", None)
