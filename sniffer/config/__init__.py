"""The configuration: what Hydra composes, checked once and turned into real objects.

    schema      the keys and their types, as dataclasses that check themselves
    build       from `_target_` and fields to an object
    resolve     from what Hydra composed to a Config; past it there is no DictConfig
    saving      what a run folder keeps of it; rerun and trust read that again, as anyone may have written it

Torch and transformers are not imported here: `--help` must answer at once.
"""
