"""An adapter is put on a loaded model: low-rank additions to its weights, say, as the package peft has them.

Its tensors must be exactly those that its configuration asks for, and what it is put on has been held to its own
before. Merged, it is added to the weights once; unmerged, it is computed beside them in each forward, as peft does: the
vectors differ by rounding.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from sniffer.errors import CheckpointError, SnifferError, first_line

log = logging.getLogger(__name__)

SHOWN = 3
"""Names in a message."""


def put_on(model: PreTrainedModel, folder: Path, *, merge: bool) -> None:
    """Puts an adapter on a model, in place.

    Raises:
        CheckpointError: it is not whole, has what the model has no place for, or is another model's.
    """
    import peft

    title = f"the adapter in {folder}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is missing, which is an error here
            adapted = peft.PeftModel.from_pretrained(model, str(folder))
            _check(adapted, folder, title)
            if merge:
                adapted.merge_and_unload(safe_merge=True)
    except SnifferError:
        raise
    except Exception as error:  # of peft: any
        raise CheckpointError(f"{title} cannot be put on the model: {first_line(error, lines=2)}") from error
    log.info("%s is %s", title, "merged into the weights" if merge else "computed beside the weights")


def _check(adapted: Any, folder: Path, title: str) -> None:
    """Raises CheckpointError unless the adapter's file has exactly the tensors that it asks for."""
    import peft
    from peft.utils.save_and_load import load_peft_weights

    found = set(load_peft_weights(str(folder), device="cpu"))
    wanted = set(peft.get_peft_model_state_dict(adapted))
    for names, what in ((wanted - found, "lacks"), (found - wanted, "has, without a place in the model,")):
        if names:
            listed = "; ".join(sorted(names)[:SHOWN])
            more = f"; and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            raise CheckpointError(
                f"{title} {what} {len(names)} tensors ({listed}{more}): it is another model's, or incomplete"
            )
