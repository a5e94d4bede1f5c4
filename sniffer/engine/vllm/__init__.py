"""`engine=vllm`: vLLM runs the model, and its rows are those of any other engine.

    request     what such a run cannot be asked for, refused before anything is read
    engine      the engine and its worker: the model in transformers is asked for its facts, then vLLM takes its place
    model       vLLM in this process: requests in, vectors of picked positions out
    seam        in each of vLLM's own workers: what its attention layers are given
    steps       which tokens of a step are picked, from the requests and positions that it holds
    before      q_pre and k_pre: what was picked of q and k, turned back
    draws       generate=sample: our own law, which each request brings along
    drawing     and vLLM's sampler follows
    prove       the start-up proof: positions, order and heads are those of transformers' own forward

Nothing here imports vLLM before it is needed, and then in functions alone; but `drawing`, which only vLLM imports.
"""
