"""Every error this project raises on purpose.

    SnifferError                 shown to the user as one line, exit code 1
    ├── ConfigError              a key has a value that cannot be used
    ├── DatasetError             text is missing, empty or wrongly identified
    │   └── UnreadableError      a file of it cannot be read, which dataset.skip_unreadable leaves out
    ├── CheckpointError          a model or tokenizer cannot be had
    ├── UnsupportedModelError    a model cannot be tapped soundly
    ├── CaptureError             a run cannot start or go on (memory, disk)
    └── RunError                 a run folder is broken, foreign, or already holds results

A message says what was found, what was wanted and what to do now, in one line. Hydra prints a
CompactHydraException without a traceback, which is why the root derives from it.
"""

from collections.abc import Mapping

from hydra.errors import CompactHydraException


class SnifferError(CompactHydraException):
    """Root of all errors meant for the person at the terminal."""


class ConfigError(SnifferError):
    """A configuration key has a value that cannot be used."""


class DatasetError(SnifferError):
    """Text is missing, empty or wrongly identified."""


class UnreadableError(DatasetError):
    """A file of the dataset cannot be read: damaged, no text, not of its format."""


class CheckpointError(SnifferError):
    """A model or tokenizer cannot be had: not found, gated, offline, incomplete."""


class UnsupportedModelError(SnifferError):
    """A model cannot be tapped soundly; nothing is captured from it."""


class CaptureError(SnifferError):
    """A run cannot start or go on, for want of memory or disk."""


class RunError(SnifferError):
    """A run folder is broken, foreign, or already holds results."""


def first_line(error: BaseException, lines: int = 1) -> str:
    """What an error of someone else's code says first, in one line; its class where it says nothing."""
    said = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(said[:lines]) or type(error).__name__


def unbroken(error: BaseException) -> str:
    """All that an error says, without its line breaks; nothing where it says nothing."""
    return " ".join(str(error).split())


def reason(error: OSError) -> str:
    """Why the system refused; libraries raise such errors with words of their own as well."""
    return error.strerror or first_line(error)


def first_cause(error: BaseException) -> BaseException:
    """What went wrong: fsspec takes most for a file that is not there, and has the reason behind it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
"""In the errors of torch's allocators: of the processor, CUDA, pinned memory, MPS and cuBLAS."""

FAILED = ("CUDA error", "HIP error", "CUBLAS_STATUS", "CUDNN_STATUS", "cuDNN error", "NVIDIA driver", "MPS backend")
"""In the errors of torch about a device that does not do, or no longer does, what it is asked."""

DEVICES = {"cuda": ("CUDA", "HIP", "CUBLAS", "CUDNN", "cuDNN", "NVIDIA"), "mps": ("MPS",), "xpu": ("XPU",)}
"""How errors call devices; what names none is of the processor."""

AT_START = {
    "cuda": "spread the model with model.device_map=auto, take another GPU (model.device=cuda:1) or the processor "
    "(model.device=cpu), or a narrower model.dtype",
    "cpu": "free some memory, or take a narrower model.dtype or a smaller model",
}
IN_A_FORWARD = {
    "cuda": "lower batch.max_tokens, or dataset.max_tokens where one document is too long; let "
    "model.attn_implementation be auto, spread the model with model.device_map=auto, or lower output.memory_limit "
    "where it is pinned memory",
    "cpu": "lower batch.max_tokens, dataset.max_tokens or output.memory_limit",
}
"""What helps where memory has run out, by device; other devices have the processor's advice."""


def out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in OUT_OF_MEMORY)


def of_a_device(error: BaseException) -> bool:
    """Whether an error is about what a device has or can, and not about the code that ran on it."""
    return out_of_memory(error) or any(sign in str(error) for sign in FAILED)


def device_trouble(error: BaseException, doing: str, advice: Mapping[str, str]) -> CaptureError | None:
    """One line about a device that has run out of memory, or failed; None for any other error.

    Args:
        doing: what it was asked for, such as "in a forward".
        advice: what helps where memory has run out, by device.
    """
    if isinstance(error, SnifferError) or not of_a_device(error):
        return None
    said = unbroken(error)[:200] or type(error).__name__
    device = next((name for name, words in DEVICES.items() if any(word in str(error) for word in words)), "cpu")
    if out_of_memory(error):
        told = CaptureError(f"out of memory {doing} ({said}): {advice.get(device, advice['cpu'])}")
    else:
        told = CaptureError(
            f"the device failed {doing} ({said}): a process that this has happened to cannot go on with it, so run the "
            "command again (or sniffer.runs resume); if it happens again, try model.sdpa_kernels=[math], another "
            "model.dtype, or model.device=cpu"
        )
    told.__cause__ = error
    return told
