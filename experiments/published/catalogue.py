"""The 32 published figures by name, and what draws each.

Source: the figures of github.com/viktor-shcherb/msc_thesis, whose names these are (figures/NAME), and what is told of
them there. Names that differ by the model alone that was drawn are one figure here, of your own runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from matplotlib.figure import Figure

from sniffer.errors import ConfigError

from .of_models import (
    Runs,
    bias_strength,
    bias_vs_separation,
    drift_bars,
    explained_variance,
    heatmap_rk,
    heatmap_rq,
    layer_heatmaps,
    pc_roles,
    rq_rk_scatter,
    slope_ratio,
    variance_decomposition,
)
from .of_plasticity import bucket_heatmap, component_weights, drop_vs_score, profile
from .of_training import (
    bias_decomposition,
    explained_evolution,
    phase_portraits,
    plasticity_trajectory,
    position_signal,
    taxonomy_evolution,
    trajectory,
)
from .of_vectors import complement_collage, component_collage, plane_collage


@dataclass(frozen=True)
class Asked:
    """What a figure may depend on beside its runs."""

    scores: str | None
    seed: int


@dataclass(frozen=True)
class Drawing:
    """`shows`: what is to be seen. `fewest`: runs that it takes. `over_training`: in the order of a training.

    `file`: what its file is called where several names are one figure. `plasticity`: it needs that of its runs.
    """

    shows: str
    draw: Callable[[Runs, Asked], Figure]
    fewest: int = 1
    over_training: bool = False
    file: str | None = None
    plasticity: bool = False


def plain(draw: Callable[[Runs], Figure], shows: str) -> Drawing:
    return Drawing(shows, lambda runs, _: draw(runs))


def over_training(draw: Callable[[Runs], Figure], shows: str) -> Drawing:
    return Drawing(shows, lambda runs, _: draw(runs), fewest=2, over_training=True)


def seeded(draw: Callable[[Runs, int], Figure], shows: str) -> Drawing:
    return Drawing(shows, lambda runs, asked: draw(runs, asked.seed))


HEATMAP = replace(
    plain(
        bucket_heatmap,
        "plasticity by how far two keys are from each other, and their middle from the query: a panel per run, bright "
        "where content decides which key wins, dark where position does",
    ),
    file="attention-plasticity_01-04_bucket_heatmap",
    plasticity=True,
)
PROFILE = replace(
    plain(profile, "plasticity of each head over the position of the query, and the mean of heads in red"),
    file="attention-plasticity_05-07_profile",
    plasticity=True,
)
BY_DEPTH_Q = "mean r of queries with position on the leading component, from the first layer to the last, a row per run"
BY_DEPTH_K = "the same of keys"

CATALOGUE: dict[str, Drawing] = {
    "attention-plasticity/01_bucket_heatmap_ministral3_14b": HEATMAP,
    "attention-plasticity/02_bucket_heatmap_qwen3_14b": HEATMAP,
    "attention-plasticity/03_bucket_heatmap_llama3.2_3b": HEATMAP,
    "attention-plasticity/04_bucket_heatmap_llama3.2_11b": HEATMAP,
    "attention-plasticity/05_profile_ministral3_3b": PROFILE,
    "attention-plasticity/06_profile_qwen3_4b": PROFILE,
    "attention-plasticity/07_profile_llama3.2_3b": PROFILE,
    "attention-plasticity/08_component_weights_qwen3_14b": plain(
        component_weights,
        "which dimensions of queries tell their position: r squared of each on position, as a share of their sum",
    ),
    "attention-plasticity/09_smollm3_trajectory": replace(
        over_training(
            plasticity_trajectory,
            "plasticity in the first and in the last fifth of the context, the drop between them, and bias strength",
        ),
        plasticity=True,
    ),
    "attention-plasticity/10_ap_drop_vs_lbp": Drawing(
        "a benchmark's scores (scores=FILE.csv) against what plasticity loses from the first to the last fifth",
        lambda runs, asked: drop_vs_score(runs, asked.scores),
        fewest=2,
        plasticity=True,
    ),
    "qk-pca/01_pc_roles": plain(
        pc_roles, "mean r of queries and of keys with position on each of the first ten components"
    ),
    "qk-pca/02_rq_vs_rk_scatter": plain(
        rq_rk_scatter, "each head by the r of its queries and of its keys on the leading component"
    ),
    "qk-pca/03_layer_heatmap_rq": plain(heatmap_rq, BY_DEPTH_Q),
    "qk-pca/04_layer_heatmap_rk": plain(heatmap_rk, BY_DEPTH_K),
    "qk-pca/05_explained_variance": plain(
        explained_variance, "the share of variance that each of the first ten components explains"
    ),
    "qk-pca/06_collage_example": seeded(
        component_collage,
        "four heads drawn at random: their vectors on the first two components, late ones darker",
    ),
    "qk-pca/07_smollm_position_signal": over_training(
        position_signal,
        "r of queries and keys on the leading component: the mean of heads and its deviation",
    ),
    "qk-pca/08_smollm_taxonomy_evolution": over_training(
        taxonomy_evolution, "how many heads go by which name, in the taxonomy of the notes"
    ),
    "qk-pca/09_smollm_explained_variance": over_training(
        explained_evolution,
        "the share of variance on the leading component: the mean of heads and its deviation",
    ),
    "qk-pca/10_smollm_layer_heatmap_rq": over_training(heatmap_rq, BY_DEPTH_Q),
    "qk-pca/11_smollm_layer_heatmap_rk": over_training(heatmap_rk, BY_DEPTH_K),
    "qk-pca/12_smollm_rq_rk_scatter_grid": over_training(
        phase_portraits, "each head by the r of its queries and of its keys, in up to six of the runs"
    ),
    "qk-rotation/01_ab_plane_collage": seeded(
        plane_collage,
        "the same four heads on their drift plane: a goes with position, b parts queries and keys",
    ),
    "qk-rotation/02_rq_rk_drift_bars": plain(
        drift_bars, "mean |r| of queries and of keys with position on the drift axis"
    ),
    "qk-rotation/03_variance_decomposition": plain(
        variance_decomposition,
        "how much of the variance lies on the drift axis, on the separation axis, elsewhere",
    ),
    "qk-rotation/04_bias_strength": plain(
        bias_strength, "how many heads have which bias strength, a panel per family of models"
    ),
    "qk-rotation/05_slope_ratio": plain(slope_ratio, "how many times faster keys drift than queries, median of heads"),
    "qk-rotation/06_layer_heatmaps": plain(
        layer_heatmaps, "|r| of keys on the drift axis, and bias strength, from the first layer to the last"
    ),
    "qk-rotation/07_bias_vs_separation": plain(
        bias_vs_separation, "bias strength against separation strength, a panel per family of models"
    ),
    "qk-rotation/08_complement_collage": seeded(
        complement_collage,
        "one head off its drift plane, in pairs of components, where RoPE's turns are rings",
    ),
    "qk-rotation/09_smollm_trajectory": over_training(
        trajectory, "four numbers of the planar model: the mean of heads, and quartiles"
    ),
    "qk-rotation/10_smollm_bias_decomposition": over_training(
        bias_decomposition,
        "bias strength and what it is made of: the mean of queries times the slope of keys",
    ),
}


def files() -> dict[str, list[str]]:
    """What there is to draw: a file's name, without its ending, and the published names that it stands for."""
    found: dict[str, list[str]] = {}
    for name in CATALOGUE:
        found.setdefault(file_of(name), []).append(name)
    return found


def file_of(name: str) -> str:
    return CATALOGUE[name].file or name.replace("/", "_")


def named(figure: str) -> dict[str, Drawing]:
    """Those that a name means: `all`, one, or all that have the text in their names.

    Raises:
        ConfigError: none.
    """
    found = {name: one for name, one in CATALOGUE.items() if figure == "all" or figure in name}
    if figure in CATALOGUE:
        found = {figure: CATALOGUE[figure]}
    if not found or not figure:
        raise ConfigError(f"no published figure is called {figure}: choose all or some of {', '.join(CATALOGUE)}")
    return found
