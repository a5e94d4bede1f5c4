"""What sampled queries do with their keys: exact statistics of attention, from a layer's own logits.

softmax      what a mode of torch sees of a softmax, and of the product after it
calls        one call of attention, its arguments by what they mean; the same in steps, for a few queries alone
masks        rows of the very mask that attention was given
scores       logits of picked queries, from a call or from a softmax in a layer's own code
statistics   from logits to columns
prove        that softmax of these logits, times the values, is what attention returned
attending    all of it, layer by layer, while one batch goes through the model
"""
