"""Every decoder in the installed transformers, tapped and compared with the original: `make conformance`.

checks      what is proven of one family, each check an answer in words: empty if it holds
lengths     of these: how long a document may be, and with which others it may share a batch
__main__    every model type in fresh processes; the counts; what is not covered, against expected.yaml
report      the results as docs/families.md
"""
