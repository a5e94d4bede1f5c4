"""How alike two query heads are: in which keys they prefer, and in their statistics.

Two heads agree at a position as far as their scores of the same tokens go together. Head i scores a token by
q_i.k_g(i), where g(i) is its key head, so that over the tokens of the captured keys

    r_ij = q_i' C_g(i)g(j) q_j / sqrt(q_i' C_g(i)g(i) q_i  q_j' C_g(j)g(j) q_j),   C_gh = Cov(k_g, k_h)

is Pearson's correlation of the two heads' scores, in closed form; its mean over queries is their agreement. Heads with
keys of their own are compared likewise, by what each thinks of the same token. Less the part of the keys that is a
straight line in position, which all heads of a model may prefer, it is their agreement beyond position.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float64, Int

from ..common.moments import moments, ratio
from ..common.rows import LayerVectors


def key_covariance(keys: LayerVectors, *, beyond_position: bool) -> Float64[np.ndarray, "keys keys dim dim"]:
    """Covariances of each two key heads over the same rows; without what is a straight line in position, if asked."""
    heads, n, dim = keys.vectors.shape
    joined = keys.vectors.swapaxes(0, 1).reshape(1, n, heads * dim)
    found = moments(joined, keys.positions, keys.weights)
    covariance = found.covariance[0]
    if beyond_position:
        covariance = covariance - ratio(
            np.outer(found.covariance_t[0], found.covariance_t[0]), np.float64(found.variance_t)
        )
    return covariance.reshape(heads, dim, heads, dim).swapaxes(1, 2)


def agreement(
    queries: Float[np.ndarray, "heads n dim"],
    places: Int[np.ndarray, " heads"],
    covariance: Float64[np.ndarray, "keys keys dim dim"],
) -> Float64[np.ndarray, "pairs n"]:
    """r of each two heads, first < second as np.triu_indices has them, at each query; `places`: of their key heads."""
    q = queries.astype(np.float64)
    norms = np.sqrt(
        np.stack([np.einsum("nd,de,ne->n", one, covariance[g, g], one) for one, g in zip(q, places, strict=True)])
    )
    found = []
    for first in range(len(q)):
        turned = {int(g): q[first] @ covariance[places[first], g] for g in np.unique(places[first + 1 :])}
        for second in range(first + 1, len(q)):
            product = np.einsum("nd,nd->n", turned[int(places[second])], q[second])
            found.append(ratio(product, norms[first] * norms[second]))
    return np.stack(found) if found else np.empty((0, queries.shape[1]))


@dataclass(frozen=True)
class Groups:
    """The heads that have a number, by layer and by group: numbers from 0, of which those of a group share a layer."""

    layer: Int[np.ndarray, " heads"]
    group: Int[np.ndarray, " heads"]


def intraclass(
    values: Float64[np.ndarray, "draws heads"], of: Groups, times: Float64[np.ndarray, "draws layers"] | None = None
) -> Float64[np.ndarray, " draws"]:
    """The intraclass correlation of heads within groups, within layers.

    1 where heads of a group have one value, 0 where they are as different as any of the layer, below 0 where more so.

    By one-way analysis of variance of groups nested in layers (Shrout and Fleiss, 1979, ICC(1,1)): (between - within) /
    (between + (m - 1) within) of the mean squares, for m heads per group, of unequal groups Donner's mean. nan where
    nothing varies, or no layer has two groups. `times`: how often each draw counts each layer.
    """
    layers, groups = int(of.layer.max()) + 1, int(of.group.max()) + 1
    size = np.bincount(of.group, minlength=groups).astype(np.float64)
    home = np.zeros(groups, dtype=np.int64)
    home[of.group] = of.layer
    in_group, in_layer = np.eye(groups)[of.group], np.eye(layers)[of.layer]
    group_mean = values @ in_group / size
    layer_mean = values @ in_layer / in_layer.sum(0)
    counts = np.ones((1, layers)) if times is None else times
    between = ((group_mean - layer_mean[:, home]) ** 2 * size) @ np.eye(layers)[home]
    within = ((values - group_mean[:, of.group]) ** 2) @ in_layer
    free_between = np.bincount(home, minlength=layers) - 1.0
    free_within = in_layer.sum(0) - np.bincount(home, minlength=layers)
    squares = np.bincount(home, size**2, minlength=layers) / in_layer.sum(0)
    m = ratio(counts @ (in_layer.sum(0) - squares), counts @ free_between)
    one = ratio((between * counts).sum(1), np.broadcast_to(counts @ free_between, len(values)))
    other = ratio((within * counts).sum(1), np.broadcast_to(counts @ free_within, len(values)))
    below = one + (m - 1) * other
    return np.where(below > 0, ratio(one - other, below), np.nan)


def shuffled(
    values: Float64[np.ndarray, " heads"], of: Groups, shuffles: int, rng: np.random.Generator
) -> Float64[np.ndarray, "shuffles heads"]:
    """The values dealt anew to the heads of each layer."""
    drawn = np.empty((shuffles, len(values)))
    for layer in np.unique(of.layer):
        mine = np.flatnonzero(of.layer == layer)
        order = rng.random((shuffles, len(mine))).argsort(axis=1)
        drawn[:, mine] = values[mine][order]
    return drawn


def same_group(places: Int[np.ndarray, " heads"]) -> Bool[np.ndarray, " pairs"]:
    """Of each two heads, whether they share a key head."""
    first, second = np.triu_indices(len(places), 1)
    return np.asarray(places[first] == places[second])
