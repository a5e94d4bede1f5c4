"""Analyses of captures. They may import anything; nothing imports them."""
