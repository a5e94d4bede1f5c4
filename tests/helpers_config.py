"""What tests write down of a composed configuration, as a job of the command line does."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from sniffer.config.saving import ONCE, plain_values, save_plain


def save_config(folder: Path, cfg: DictConfig) -> None:
    save_plain(folder, {key: value for key, value in plain_values(cfg).items() if key not in ONCE})
