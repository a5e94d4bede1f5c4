"""QK-Sniffer captures the query and key vectors that a transformer attends with.

`open_run` reads what a run wrote, `torch_dataset` gives its rows to PyTorch; `sniff` captures from a model that is
loaded already. All are imported when first asked for, so that importing the package costs nothing.

models/ and experiments/ are parts of this package: `sniffer.models`, `sniffer.experiments`. The wheel has them inside,
a checkout beside it. Their bare names belong to whoever has a project with folders called so.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sniffer.notebook.sniffing import sniff
    from sniffer.reader.sweep import open_run
    from sniffer.reader.training.torch_dataset import torch_dataset

__all__ = ["open_run", "sniff", "torch_dataset"]

if not Path(__path__[0], "models").is_dir():
    __path__.append(str(Path(__path__[0]).parent))


def __getattr__(name: str) -> Any:
    if name == "open_run":
        from sniffer.reader.sweep import open_run

        return open_run
    if name == "sniff":
        from sniffer.notebook.sniffing import sniff

        return sniff
    if name == "torch_dataset":
        from sniffer.reader.training.torch_dataset import torch_dataset

        return torch_dataset
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
