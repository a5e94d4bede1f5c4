"""Every decoder in the installed transformers, tapped and compared with the original: `make conformance`.

checks      what is proven of one family, each check an answer in words: empty if it holds
__main__    every model type in fresh processes; the counts; what is not covered, against expected.yaml
report      the results as docs/families.md
"""
