"""How far queries lie from the keys they search, and what that does to a nearest-neighbour index.

An index over keys is built on the keys' own distribution. Queries come from another projection and lie outside it,
so that the cells an index looks in first are not where a query's best keys are. Two measurements show it:
the Mahalanobis distance of queries from the keys' distribution, beside that of keys left out of the fit; and the
recall of a stock index, searched by queries and by keys left out of it.

Source: RetrievalAttention, Liu and others, 2024 (arXiv 2409.10516).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Float64

from sniffer.errors import RunError

from ..common.moments import Moments


def distance(vectors: Moments, keys: Moments, shrinkage: float) -> Float64[np.ndarray, " heads"]:
    """Root mean square Mahalanobis distance of vectors from keys, per root dimension: about 1 for other keys.

    With m and S the mean and covariance of the keys, n and C those of the vectors, the mean of (x - m)' S^-1 (x - m) is
    tr(S^-1 (C + (n - m)(n - m)')), so that no vector need be looked at again. S is shrunk towards a multiple of
    the identity with its trace, (1 - shrinkage) S + shrinkage (tr S / dim) I: directions in which keys do not vary
    then do not count as infinitely far.

    Raises:
        RunError: the keys of a head do not vary at all.
    """
    dim = keys.mean.shape[1]
    scale = keys.total_variance / dim
    if not (scale > 0).all():
        raise RunError("the keys of a head do not vary: there is no distribution to measure from")
    spread = (1 - shrinkage) * keys.covariance + shrinkage * scale[:, None, None] * np.eye(dim)
    gap = vectors.mean - keys.mean
    second = vectors.covariance + gap[:, :, None] * gap[:, None, :]
    squared = np.trace(np.linalg.solve(spread, second), axis1=1, axis2=2)
    return np.sqrt(np.maximum(squared, 0) / dim)


def recalls(
    keys: Float32[np.ndarray, "n dim"],
    searches: Sequence[Float32[np.ndarray, "_ dim"]],
    top: int,
    cells: int,
    probes: Sequence[int],
    seed: int,
) -> Float64[np.ndarray, "searches probes"]:
    """The share of the true `top` keys by inner product that an inverted-file index finds.

    The index (faiss, IndexIVFFlat) puts each key in one of `cells` clusters, and looks through the `probes` clusters
    whose centres have the largest inner product with what is searched for.

    Raises:
        RunError: faiss is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise RunError(
            "recall needs faiss, which is not installed: pip install 'qk-sniffer[experiments]', or set recall=false"
        ) from error

    faiss.omp_set_num_threads(1)
    keys = np.ascontiguousarray(keys)
    coarse = faiss.IndexFlatIP(keys.shape[1])
    index = faiss.IndexIVFFlat(coarse, keys.shape[1], cells, faiss.METRIC_INNER_PRODUCT)
    # The recommended clustering of faiss for inner products leaves the lengths of centres free.
    index.cp.seed, index.cp.min_points_per_centroid = seed, 1
    index.train(keys)
    index.add(keys)
    found = np.empty((len(searches), len(probes)))
    for row, search in enumerate(searches):
        true = np.argpartition(search @ keys.T, -top, axis=1)[:, -top:]
        for column, count in enumerate(probes):
            index.nprobe = min(count, cells)
            _, got = index.search(np.ascontiguousarray(search), top)
            found[row, column] = (true[:, :, None] == got[:, None, :]).any(2).mean()
    return found
