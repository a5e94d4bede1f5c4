"""Which kernels torch's own attention (sdpa) may use, in probes as in passes.

On CUDA torch may choose cuDNN's, which makes a plan for each shape that it meets: 55 to 440 ms, and batches of real
documents have nearly all different shapes. Flash, efficient and math attention make none. So cuDNN's is left out unless
`model.sdpa_kernels` names it. What is allowed is written in the manifest, since kernels round each in their own way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from sniffer.errors import ConfigError

DEFAULT = ("flash", "efficient", "math")

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}

NONE_FITS = ("No available kernel", "No viable backend")
"""In torch's errors, where none of the kernels that may be used can do what is asked of it."""


@contextmanager
def allowed(kernels: Sequence[str] | None, device: torch.device) -> Iterator[None]:
    """Attention uses these kernels alone while open; all that there are where it is None.

    Raises:
        ConfigError: none of them can do what is asked of it.
    """
    if kernels is None:
        yield
        return
    # Devices of other makers bring their kernel under this name.
    others = [] if device.type == "cuda" else [SDPBackend.OVERRIDEABLE]
    with sdpa_kernel([*(BACKENDS[name] for name in kernels), *others]):
        try:
            yield
        except RuntimeError as error:
            if any(sign in str(error) for sign in NONE_FITS):
                raise ConfigError(
                    f"model.sdpa_kernels={list(kernels)}: none of them can attend on {device.type} in this model's "
                    "dtype and head size; add math, which always can"
                ) from error
            raise
