"""A model goes on with prompts, token by token: how that is asked for, which token comes next, and when a text ends.

request     the config group `generate`          choosing   the next token, from logits
continuing  the prompts of a batch, and what a model writes after them
live        what is captured meanwhile (attention, moments); difference: how far it is from one forward over the whole
session     a worker's share: all of this for a batch
"""
