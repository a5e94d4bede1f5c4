"""The things that travel through the pipeline, and the words for them.

A *position* is a token's place in its document, from 0. A *kind* names which vector of attention is
meant. A *draw* is one set of kept positions; kinds that describe the same token side share it. A
*bucket* is a range of positions that is sampled at one rate. A *section* is a part of a document that has a name.

This package needs numpy only, so that reading a run never imports torch.
"""

from sniffer.types.documents import (
    Chat,
    Content,
    Dataset,
    Document,
    LengthClasses,
    Picks,
    SectionedText,
    SectionedTokens,
    TokenBatch,
    described,
    has_sections,
)
from sniffer.types.generation import (
    ANSWER,
    ASSISTANT,
    BACKENDS,
    CACHES,
    ENDS,
    GENERATED,
    PROMPT,
    THINKING,
    Answer,
    Caching,
    Difference,
    Generated,
)
from sniffer.types.kinds import ALL_KINDS, ATTENTION, KIND, KINDS, MAIN_KINDS, Kind, draw_of
from sniffer.types.models import (
    Backbone,
    Checkpoint,
    FullTokenize,
    LanguageModel,
    LayerGeometry,
    ModelFacts,
    ModelLimits,
    Outline,
    Tokenize,
    WorkingMemory,
    by_number,
    first_key,
    key_head,
)
from sniffer.types.moments import MOMENTS, SECONDS, MomentRows, Moments, MomentsLayout
from sniffer.types.places import is_url
from sniffer.types.rope import ROPE_LAYOUTS, Rope, by_rope
from sniffer.types.rows import ROW_DTYPES, SECTION, UNKNOWN_TOKEN, Rows
from sniffer.types.sections import NONE, Names, Sections
from sniffer.types.statistics import ALL_STATISTICS, STATISTICS, AttentionLayout, Column, ScoreFacts, columns_of
from sniffer.types.values import COMPRESSIONS, WIDE, codec

__all__ = [
    "ALL_KINDS",
    "ALL_STATISTICS",
    "ANSWER",
    "ASSISTANT",
    "ATTENTION",
    "BACKENDS",
    "CACHES",
    "COMPRESSIONS",
    "ENDS",
    "GENERATED",
    "KIND",
    "KINDS",
    "MAIN_KINDS",
    "MOMENTS",
    "NONE",
    "PROMPT",
    "ROPE_LAYOUTS",
    "ROW_DTYPES",
    "SECONDS",
    "SECTION",
    "STATISTICS",
    "THINKING",
    "UNKNOWN_TOKEN",
    "WIDE",
    "Answer",
    "AttentionLayout",
    "Backbone",
    "Caching",
    "Chat",
    "Checkpoint",
    "Column",
    "Content",
    "Dataset",
    "Difference",
    "Document",
    "FullTokenize",
    "Generated",
    "Kind",
    "LanguageModel",
    "LayerGeometry",
    "LengthClasses",
    "ModelFacts",
    "ModelLimits",
    "MomentRows",
    "Moments",
    "MomentsLayout",
    "Names",
    "Outline",
    "Picks",
    "Rope",
    "Rows",
    "ScoreFacts",
    "SectionedText",
    "SectionedTokens",
    "Sections",
    "TokenBatch",
    "Tokenize",
    "WorkingMemory",
    "by_number",
    "by_rope",
    "codec",
    "columns_of",
    "described",
    "draw_of",
    "first_key",
    "has_sections",
    "is_url",
    "key_head",
]
