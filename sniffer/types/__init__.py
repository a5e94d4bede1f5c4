"""The things that travel through the pipeline, and the words for them.

A *position* is a token's place in its document, from 0. A *kind* names which vector of attention is
meant. A *draw* is one set of kept positions; kinds that describe the same token side share it. A
*bucket* is a range of positions that is sampled at one rate.

This package needs numpy only, so that reading a run never imports torch.
"""

from sniffer.types.documents import Chat, Content, Dataset, Document, LengthClasses, Picks, TokenBatch
from sniffer.types.kinds import KIND, KINDS, MAIN_KINDS, Kind, draw_of
from sniffer.types.models import (
    Backbone,
    Checkpoint,
    FullTokenize,
    LayerGeometry,
    ModelFacts,
    ModelLimits,
    Outline,
    Tokenize,
    WorkingMemory,
    by_number,
    key_head,
)
from sniffer.types.rows import ROW_DTYPES, Rows
from sniffer.types.values import COMPRESSIONS, WIDE, codec

__all__ = [
    "COMPRESSIONS",
    "KIND",
    "KINDS",
    "MAIN_KINDS",
    "ROW_DTYPES",
    "WIDE",
    "Backbone",
    "Chat",
    "Checkpoint",
    "Content",
    "Dataset",
    "Document",
    "FullTokenize",
    "Kind",
    "LayerGeometry",
    "LengthClasses",
    "ModelFacts",
    "ModelLimits",
    "Outline",
    "Picks",
    "Rows",
    "TokenBatch",
    "Tokenize",
    "WorkingMemory",
    "by_number",
    "codec",
    "draw_of",
    "key_head",
]
