"""Verbs on finished and stopped runs: `python -m sniffer.runs VERB RUN`. One module per verb."""
