"""The numbers of a layer's heads that moments give, of all rows and of any draw of documents alike."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float64

from ..common.moments import Moments, ratio
from .pca import Components, linear_share, linear_share_of_components
from .plane import Plane, separation_strength

Numbers = Mapping[str, np.ndarray]
"""By name, one number per head; of draws (draws, heads)."""


def numbers(queries: Moments, keys: Moments, parts: Components, model: Plane, scaling: float | None) -> Numbers:
    """Keys have one head per query head; `scaling` is the factor on q.k before softmax, where it is known."""
    of_components = linear_share_of_components(parts)
    return {
        "pc1_explained": parts.explained[:, 0],
        "pc1_r_q": parts.r_q[:, 0],
        "pc1_r_k": parts.r_k[:, 0],
        "linear_share": linear_share(model.pooled),
        "linear_share_q": linear_share(queries),
        "linear_share_k": linear_share(keys),
        "linear_share_pcs_q": of_components[0],
        "linear_share_pcs_k": of_components[1],
        "r2_q": mean_r2(queries),
        "r2_k": mean_r2(keys),
        "r_q": model.r_q,
        "r_k": model.r_k,
        "alpha_q": model.alpha_q,
        "alpha_k": model.alpha_k,
        "mu_q_a": model.mu_q_a,
        "mu_k_a": model.mu_k_a,
        "mu_q_b": model.mu_q_b,
        "mu_k_b": model.mu_k_b,
        "bias_strength": model.bias_strength,
        "bias_logits_per_1000": model.bias_strength * 1000 * (np.nan if scaling is None else scaling),
        "separation_strength": separation_strength(queries, keys, model.b),
        "variance_a": model.variance_a,
        "variance_b": model.variance_b,
        "variance_rest": 1 - model.variance_a - model.variance_b,
    }


def mean_r2(moments: Moments) -> Float64[np.ndarray, " heads"]:
    """The share of its variance that a straight line in position explains, averaged over dimensions."""
    variance = np.diagonal(moments.covariance, axis1=1, axis2=2)
    return np.asarray(ratio(moments.covariance_t**2, variance * moments.variance_t).mean(1))
