"""One forward pass of a tapped model: what is wanted of it, gathered on the device, copied back, kept as rows.

selection                which heads of which layers
passes -> observer       the tap is open while the backbone runs; each layer that passes by is gathered
gather, transfer         all heads at once, over to the host without waiting
attention/               what picked queries do with their keys, beside the model's own computation
rows, accumulator        what was gathered, by (layer, kind)
estimate                 what all of it will need
"""
