"""Tapped models: derived from the installed transformers at import, never pasted.

    derive      upstream source -> tapped syntax tree; anchors finds the calls, shadow and identity write the pre kinds
    finder      runs the derived module, or a local copy of yours, under the upstream name
    backbone    the config group `model`: a checkpoint that can be had
    weights     its weights, read or drawn, and the backbone in them (loaded)
    devices     where it goes; kernels which of attention's it may use; trouble what a device refuses
    selfcheck   proof at start-up that what is tapped is what attention receives; causality that padding needs no mask

A hand-edited models/<family>/modeling_<family>.py wins over the derived one. Importing this package
changes nothing; sniffer.models.finder.install() does.
"""
