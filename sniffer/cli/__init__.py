"""What `python -m sniffer` does: Hydra composes, each job is a run, a part of a sweep, or only planned.

    compose     Hydra, called as it calls itself, but with its errors let through to whoever tells them
    job         one job, from its composed configuration, in its folder; past this there is no DictConfig
    plan        `plan=true`: what a run would need

Torch and transformers are not imported before a configuration is known to be right: `--help` must answer at once.
"""
