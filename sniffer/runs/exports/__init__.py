"""Exports that methods load: moments of a run, written as calibration files of KV-cache methods read them.

Each format is a file with a `write`, which takes a run and a folder, and gives what there is to tell about it.
"""
