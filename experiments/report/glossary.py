"""What the statistics mean, in a line each, and the order of the analyses on the page."""

from __future__ import annotations

ORDER = {
    name: place
    for place, name in enumerate(
        (
            "position_geometry",
            "attention_plasticity",
            "key_rank",
            "quantisation",
            "output_error",
            "rope_frequencies",
            "virtual_distance",
            "query_key_gap",
            "query_groups",
            "attention",
            "sampling_error",
        )
    )
}

NO_MEDIAN = ("rope_frequencies.most_fixed_pair", "rope_frequencies.strongest_pair")
"""Numbers that name something."""

ABOUT = {
    "position_geometry.pc1_explained": "share of variance on the leading component of queries and keys together",
    "position_geometry.pc1_r_q": "correlation of queries with position on the leading component",
    "position_geometry.pc1_r_k": "correlation of keys with position on the leading component",
    "position_geometry.linear_share": "share of variance, queries and keys pooled, that a line in position explains",
    "position_geometry.linear_share_q": "the same of queries alone, about their own mean",
    "position_geometry.linear_share_k": "the same of keys alone, about their own mean",
    "position_geometry.linear_share_pcs_q": "explained variance times squared r of queries, summed over ten components",
    "position_geometry.linear_share_pcs_k": "the same with r of keys",
    "position_geometry.r2_q": "share of each dimension of queries that a line in position explains, mean",
    "position_geometry.r2_k": "the same of keys",
    "position_geometry.separation_strength": "how much of queries minus keys lies on the separation axis",
    "position_geometry.separation_strength_notes": "the most that lies on any axis across the drift",
    "position_geometry.r_q": "correlation of queries with position on the drift axis",
    "position_geometry.r_k": "correlation of keys with position on the drift axis",
    "position_geometry.alpha_q": "drift of queries per position",
    "position_geometry.alpha_k": "drift of keys per position",
    "position_geometry.mu_q_a": "mean of queries on the drift axis",
    "position_geometry.mu_k_a": "mean of keys on the drift axis",
    "position_geometry.mu_q_b": "mean of queries on the separation axis",
    "position_geometry.mu_k_b": "mean of keys on the separation axis",
    "position_geometry.bias_strength": "change of q.k per position of the key; positive favours later keys",
    "position_geometry.bias_logits_per_1000": "the same in the logit, per 1000 positions",
    "position_geometry.variance_a": "share of variance on the drift axis",
    "position_geometry.variance_b": "share of variance on the separation axis",
    "position_geometry.variance_rest": "share of variance off the plane",
    "position_geometry.rope_planes": "pairs of components off the plane that mostly turn with position",
    "position_geometry.rope_share": "share of the variance off the plane that such turns explain",
    "position_geometry.residual_r": "largest correlation with position off the drift axis: zero but for rounding",
    "attention_plasticity.plasticity": "1: content decides which key wins; 0: it is settled beforehand",
    "attention_plasticity.first": "plasticity in the first fifth of the context (of other variants, the first bucket)",
    "attention_plasticity.last": "plasticity in the last fifth of the context (of other variants, the last bucket)",
    "attention_plasticity.drop": "the first minus the last: what the head loses over the context",
    "attention_plasticity.empirical": "plasticity counted over the real queries, without a model of them",
    "attention_plasticity.beyond_gaussian": "the same minus what Gaussian queries give",
    "attention.entropy": "mean entropy of a query's weights, in nats",
    "attention.relative_entropy": "the same over that of equal weights; 1: attends to everything alike",
    "attention.first": "mean weight of position 0",
    "attention.itself": "mean weight of the query's own position",
    "attention.sink": "mean weight of learned sinks",
    "attention.near": "mean weight of the keys a few positions away (settings: local)",
    "attention.distance": "mean of floor(log2(1 + distance)) over a query's weight",
    "attention.previous": "share of queries whose largest weight is on the token before",
    "attention.induction": "share of queries, of those that repeat a token, whose largest weight is on what followed",
    "attention.repeated": "how many queries repeat a token of their text",
    "attention.out_norm": "mean Euclidean norm of the head's output",
    "key_rank.rank": "principal components that hold most of the variance",
    "key_rank.effective_rank": "exponential of the entropy of the spectrum",
    **{
        f"quantisation.{per}_{bits}bit": f"relative error of keys in {bits} bits, with a scale for each {what}"
        for per, what in (("channel", "channel"), ("token", "token"))
        for bits in (2, 3, 4, 8)
    },
    "quantisation.outlier_channels": "channels far larger than the median one",
    "quantisation.largest_channel": "largest channel over the median one",
    **{
        f"output_error.{grid}_{bits}bit": f"relative error of the head's output, cache on {name} of {bits} bits"
        for grid, name in (("kivi", "even grids"), ("kvquant", "uneven grids with outliers kept"))
        for bits in (2, 3, 4, 8)
    },
    **{
        f"output_error.{kept}_{share}": f"relative error of the head's output with {share}% of the keys: {which}"
        for kept, which in (("recent", "the first and the latest"), ("heavy", "the latest and heavy hitters"))
        for share in (50, 25, 10)
    },
    "rope_frequencies.concentration": "1: all vectors point one way in each rotary pair; 0: they point anywhere",
    "rope_frequencies.largest_concentration": "the same of the most fixed pair",
    "rope_frequencies.most_fixed_pair": "which pair that is; RoPE turns pair 0 fastest",
    "rope_frequencies.strongest_pair": "the pair with the longest vectors",
    "rope_frequencies.strongest_share": "largest share of a pair in the energy",
    "virtual_distance.fall": "mean logit of pairs near each other minus that of pairs far apart",
    "virtual_distance.fall_rope": "what of it RoPE makes of one average content",
    "virtual_distance.fall_drift": "what of it is content that moves with position",
    "virtual_distance.fall_content": "what of it is content that near tokens of a text have in common",
    "virtual_distance.content_wins": "share of key pairs whose winner stays when they change places; 0: place decides",
    "query_key_gap.distance_q": "Mahalanobis distance of queries from keys, per root dimension",
    "query_key_gap.distance_k": "the same of keys left out of the fit",
    "query_key_gap.gap": "the first over the second",
    "query_key_gap.recall_q": "share of a query's best keys that an index finds in an eighth of its clusters",
    "query_key_gap.recall_k": "the same of a key's best keys",
    "query_groups.within_agreement": "correlation of scores with those of heads that search the same keys",
    "query_groups.between_agreement": "the same with heads of the layer that have other keys",
    "query_groups.within_beyond_position": "the first, without what is a straight line in position in the keys",
    "query_groups.between_beyond_position": "the second, likewise",
}
