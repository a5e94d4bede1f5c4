"""Where text comes from, whose identity it has, and how it becomes batches of tokens.

    packages, files, tables, hub      sources of documents: (example_id, source_id, text); source has what they share
    tokenizing -> feed -> batching    text to tokens and windows, chunks of documents, batches for one forward each

Configurations name the sources `sniffer.dataset.Sotu` and so on.
"""

from sniffer.dataset.files import TextFiles
from sniffer.dataset.packages import Pydoc, Sotu
from sniffer.dataset.source import Source

__all__ = ["Pydoc", "Sotu", "Source", "TextFiles"]
