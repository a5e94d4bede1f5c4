"""Where text comes from, whose identity it has, and how it becomes batches of tokens.

    packages, files, tables, hub      sources of documents: (example_id, source_id, content); source has what they share
    remote                            files that a URL means, fetched
    compressed, records, columns      what a file or a row of a table has: unpacked, as JSON, by a path into it
    content, choosing                 what a row is: a text, token ids, a chat; and which rows are taken
    encoding                          a content as token ids, special tokens as they are wanted
    spans, labelled, roles            which tokens are of a section: by characters, columns, a chat's template
    packing, kept                     short texts in one document, each a section; sections that a sampler is to keep
    niah, needles, haystack           needles in haystacks: documents made from a seed and another dataset
    tokenizing -> feed -> batching    text to tokens and windows, chunks of documents, batches for one forward each

Configurations name the sources `sniffer.dataset.Sotu` and so on.
"""

from sniffer.dataset.files import TextFiles
from sniffer.dataset.niah import Niah
from sniffer.dataset.packages import Pydoc, Sotu
from sniffer.dataset.source import Source

__all__ = ["Niah", "Pydoc", "Sotu", "Source", "TextFiles"]
