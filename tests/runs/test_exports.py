"""What `runs export --layout NAME` writes of moments is what NumPy makes of all vectors, and what its readers load."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import PyTorchModelHubMixin
from safetensors import safe_open
from safetensors.numpy import load_file

from sniffer.errors import RunError
from sniffer.reader.run import Run
from sniffer.reader.sweep import open_run
from sniffer.runs.__main__ import LAYOUTS, main
from sniffer.runs.exports import kv_scales, triattention
from sniffer.runs.exports.formats import FORMATS, export_moments
from sniffer.runs.exports.measured import Measured
from sniffer.runs.exports.qfilters import filter_of
from sniffer.storage.manifest import Manifest
from sniffer.types import Moments, Rope, by_rope
from tests.helpers_runs import Runs
from tests.tiny_run import save_checkpoint, save_texts

KINDS = "q,k,v,q_pre,k_pre"
TEXTS = {f"doc-{n}": f"the cat number {n} sat on the mat. " * (1 + n * 5 % 7) for n in range(9)}
MOMENTS = f"capture.moments.kinds=[{KINDS}]"
LAYERS, Q_HEADS, K_HEADS, DIM = 2, 4, 2, 8


class AllRuns(Runs):
    """Runs that keep every vector."""

    def words(self) -> list[str]:
        kept = ("sampler=all", "sampler.bucket_size=64", f"capture.kinds=[{KINDS}]")
        return [*(word for word in super().words() if not word.startswith("sampler.base_rate")), *kept]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    place = tmp_path_factory.mktemp("exports")
    return AllRuns(save_checkpoint(place / "checkpoint"), save_texts(place / "texts.jsonl", TEXTS), place)


@pytest.fixture(scope="module")
def whole(runs: Runs) -> Run:
    """Every position of every vector, and the moments beside them."""
    return opened(runs.start("whole", MOMENTS))


def opened(folder: Path) -> Run:
    run = open_run(folder)
    assert isinstance(run, Run)
    return run


def vectors(run: Run, layer: int, head: int, kind: str) -> np.ndarray:
    """Of all positions, (n, dim) in float64; none of it from moments."""
    return run.vectors(layer=layer, head=head, kind=kind).vectors.astype(np.float64)


class Stats(torch.nn.Module, PyTorchModelHubMixin):
    """Parameters of the names, shapes and arguments that kvpress 0.5.5 has in its ExpectedAttentionStats."""

    def __init__(self, num_layers, num_heads, head_dim, dataset_name, model_name, num_samples, sample_seq_len, n_sink):
        super().__init__()
        self.query_mean = torch.nn.Parameter(torch.zeros(num_layers, num_heads, head_dim))
        self.query_cov = torch.nn.Parameter(torch.zeros(num_layers, num_heads, head_dim, head_dim))
        self.told = (dataset_name, model_name, num_samples, sample_seq_len, n_sink)


class Filters(torch.nn.Module, PyTorchModelHubMixin):
    """As those who load Q-Filters have them."""

    def __init__(self, num_layers, num_kv_heads, kv_head_dim):
        super().__init__()
        self.q_filters = torch.nn.Parameter(torch.zeros(num_layers, num_kv_heads, kv_head_dim))


def test_kvpress_loads_mean_and_covariance_of_queries_before_rope(runs: Runs, whole: Run, tmp_path: Path):
    told = export_moments(whole.folder, tmp_path / "out", "kvpress")
    assert "n_sink is 0" in told[0]
    stats = Stats.from_pretrained(tmp_path / "out", strict=True)
    assert stats.told == (str(runs.texts), str(runs.checkpoint), 9, whole.examples()["n_tokens"].max(), 0)
    assert stats.query_mean.shape == (LAYERS, Q_HEADS, DIM) and stats.query_cov.dtype == torch.float32
    for layer in range(LAYERS):
        for head in range(Q_HEADS):
            x = vectors(whole, layer, head, "q_pre")
            assert np.allclose(stats.query_mean[layer, head].detach(), x.mean(0), rtol=1e-5, atol=1e-6)
            covariance = np.cov(x, rowvar=False)
            assert np.allclose(stats.query_cov[layer, head].detach(), covariance, rtol=1e-4, atol=1e-6)


def test_qfilters_are_first_singular_vectors_that_rank_keys_as_queries_do(whole: Run, tmp_path: Path):
    export_moments(whole.folder, tmp_path / "out", "qfilters")
    filters = Filters.from_pretrained(tmp_path / "out", strict=True).q_filters.detach().numpy()
    assert filters.shape == (LAYERS, K_HEADS, DIM)
    for layer in range(LAYERS):
        for head in range(K_HEADS):
            group = range(head * Q_HEADS // K_HEADS, (head + 1) * Q_HEADS // K_HEADS)
            found = []
            for one in group:
                x = vectors(whole, layer, one, "q")
                v = np.linalg.svd(x, full_matrices=False)[2][0]
                found.append(v if (x @ v).mean() > 0 else -v)
            assert np.allclose(-filters[layer, head], np.mean(found, axis=0), atol=1e-4)


def test_readers_of_qfilters_keep_the_keys_that_queries_attend_to():
    """They score keys by minus the product. Queries here share a direction, as the method supposes."""
    random = np.random.default_rng(0)
    queries, keys = random.normal(0, 0.3, (500, DIM)) + np.arange(DIM), random.normal(0, 1, (300, DIM))
    mean, about = queries.mean(0), queries - queries.mean(0)
    squares, products = (about**2).sum(0), about.T @ about
    moments = Moments(len(queries), mean, queries.min(0), queries.max(0), 1.0, None, squares, products)
    attended = np.log(np.exp(queries @ keys.T).mean(0))
    assert np.corrcoef(-(filter_of([moments]) @ keys.T), attended)[0, 1] > 0.9


def test_triattention_has_centres_of_pairs(whole: Run, tmp_path: Path):
    export_moments(whole.folder, tmp_path / "out", "triattention")
    payload = torch.load(tmp_path / "out" / "stats.pt", weights_only=True)
    told, stats = payload["metadata"], payload["stats"]
    assert told["sampled_heads"] == [[layer, head] for layer in range(LAYERS) for head in range(Q_HEADS)]
    assert {f"layer{layer:02d}_head{head:02d}" for layer, head in told["sampled_heads"]} == set(stats)
    assert (told["head_dim"], told["rope_style"], told["rope_type"], told["dtype"]) == (
        DIM,
        "half",
        "default",
        "float32",
    )
    assert np.allclose(told["inv_freq"], 10_000.0 ** (-np.arange(0, DIM, 2) / DIM))
    for layer, head in told["sampled_heads"]:
        x = vectors(whole, layer, head, "q_pre")
        pairs, found = x[:, : DIM // 2] + 1j * x[:, DIM // 2 :], stats[f"layer{layer:02d}_head{head:02d}"]
        centres = found["q_mean_real"].numpy() + 1j * found["q_mean_imag"].numpy()
        assert found["q_abs_mean"].dtype == torch.float32
        assert np.allclose(centres, pairs.mean(0), rtol=1e-5, atol=1e-6)
        assert np.allclose(found["q_abs_mean"], np.abs(pairs).mean(0), rtol=1e-5)


def largest(run: Run, layer: int, kind: str) -> list[float]:
    return [np.abs(vectors(run, layer, head, kind)).max() for head in range(K_HEADS)]


@pytest.mark.parametrize("strategy", kv_scales.STRATEGIES)
def test_scales_are_named_for_modules_and_reach_the_largest_value(
    runs: Runs, whole: Run, tmp_path: Path, strategy: str
):
    from transformers import AutoModelForCausalLM

    export_moments(whole.folder, tmp_path / "out", "kv_scales")
    folder = tmp_path / "out" / strategy
    scales = load_file(folder / "kv_scales.safetensors")
    modules = dict(AutoModelForCausalLM.from_pretrained(runs.checkpoint).named_modules())
    attentions = [name for name, module in modules.items() if hasattr(module, "k_proj")]
    assert set(scales) == {f"{name}.{kind}_scale" for name in attentions for kind in "kv"}
    for layer in range(LAYERS):
        for kind in "kv":
            found, wanted = scales[f"model.layers.{layer}.self_attn.{kind}_scale"], largest(whole, layer, kind)
            assert found.dtype == np.float32 and found.shape == ((1,) if strategy == "tensor" else (K_HEADS, 1, 1))
            wanted = [max(wanted)] if strategy == "tensor" else wanted
            assert np.allclose(found.ravel() * torch.finfo(torch.float8_e4m3fn).max, wanted, rtol=1e-6)
    assert json.loads((folder / "weight_map.json").read_text()) == {
        "weight_map": dict.fromkeys(scales, "kv_scales.safetensors")
    }
    scheme = json.loads((folder / "quantization_config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    # What vLLM's CompressedTensorsKVCacheMethod asks of a scheme.
    assert (scheme["type"], scheme["num_bits"], scheme["symmetric"]) == ("float", 8, True)
    assert scheme["strategy"] in ("tensor", "attn_head")


@pytest.mark.parametrize("strategy", kv_scales.STRATEGIES)
def test_compressed_tensors_makes_a_place_of_that_shape(whole: Run, strategy: str):
    """0.20.1 finds no cache in the attention of transformers 5.24 by itself: its places are made one by one."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    config = quantization.QuantizationConfig.model_validate(kv_scales.quantization_config(strategy))
    attention = torch.nn.Module()
    for kind in "kv":
        observed = {"observed_shape": (K_HEADS, None, DIM), "observed_dtype": torch.float32}
        quantization.initialize_qparams(attention, kind, config.kv_cache_scheme, **observed, force_zero_point=False)
    scales = {f"{kind}_scale": torch.from_numpy(kv_scales.scale([1.0, 2.0], strategy)) for kind in "kv"}
    assert {name: value.dtype for name, value in attention.state_dict().items()} == dict.fromkeys(scales, torch.float32)
    attention.load_state_dict(scales, strict=True)


def test_safetensors_have_all_moments(whole: Run, tmp_path: Path):
    export_moments(whole.folder, tmp_path / "out", "safetensors")
    path = tmp_path / "out" / "moments.safetensors"
    tensors = load_file(path)
    with safe_open(path, "np") as file:
        told = json.loads(file.metadata()["moments"])
    assert told["layout"]["second"] == "full" and told["counts"]["examples"] == 9
    assert len(tensors) == LAYERS * (5 * 9 - 1)  # of v no pairs
    for layer in range(LAYERS):
        for kind in KINDS.split(","):
            of = {
                name.rpartition(".")[2]: value for name, value in tensors.items() if f"layers.{layer}.{kind}." in name
            }
            for place, head in enumerate(of["heads"]):
                x = vectors(whole, layer, int(head), kind)
                assert of["n"][place] == len(x)
                wanted = {"mean": x.mean(0), "minimum": x.min(0), "maximum": x.max(0), "variance": x.var(0)}
                wanted |= {"covariance": np.cov(x, rowvar=False, bias=True), "norm": np.linalg.norm(x, axis=1).mean()}
                for name, value in wanted.items():
                    assert of[name].dtype == np.float64
                    assert np.allclose(of[name][place], value, rtol=1e-4, atol=1e-6), (layer, kind, name)


def test_without_second_moments_there_are_fewer_tensors(runs: Runs, tmp_path: Path):
    run = runs.start("means", "capture.moments.kinds=[k]", "capture.moments.second=none", "capture.layers=[1]")
    export_moments(run, tmp_path / "out", "safetensors")
    names = set(load_file(tmp_path / "out" / "moments.safetensors"))
    assert names == {f"layers.1.k.{one}" for one in ("heads", "n", "mean", "minimum", "maximum", "norm", "pairs")}


def refused(folder: Path, name: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=told) as error:
        export_moments(folder, tmp_path / "out", name)
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []


def test_what_is_missing_is_told_by_name(runs: Runs, tmp_path: Path):
    plain = runs.start("plain")
    for name in FORMATS:
        refused(plain, name, r"has no moments.*capture.moments.kinds=\[", tmp_path)
    some = runs.start("some", "capture.moments.kinds=[q,k]", "capture.moments.second=diagonal")
    refused(some, "kvpress", r"needs moments of q_pre, .*kinds=\[q_pre\] capture.moments.second=full", tmp_path)
    refused(some, "qfilters", "needs covariances, and this run has second=diagonal", tmp_path)
    refused(some, "kv_scales", r"needs moments of v, .*kinds=\[k,v\]", tmp_path)
    heads = runs.start("heads", MOMENTS, "capture.heads=[0,3]")
    refused(heads, "kvpress", r"query head 1 of layer 0 has no moments of q_pre \(2 of 4 there\)", tmp_path)
    layers = runs.start("layers", MOMENTS, "capture.layers=[1]")
    refused(layers, "triattention", "query head 0 of layer 0 has no moments", tmp_path)
    refused(layers, "kv_scales", "key head 0 of layer 0 has no moments of k", tmp_path)


def changed(run: Run, **values) -> Run:
    return Run(run.folder, replace(run.manifest, **values))


def test_layers_that_differ_fit_no_single_tensor(whole: Run):
    first, second = whole.manifest.geometry
    wider = replace(second, dims={**second.dims, "q_pre": 16})
    measured = Measured(changed(whole, geometry=(first, wider)), "kvpress", ["q_pre"], full=True)
    with pytest.raises(RunError, match=r"vector lengths \[8, 16\] of q_pre: kvpress holds all layers in one tensor"):
        measured.same("dims", "q_pre")
    gap = Measured(changed(whole, geometry=(second,)), "kvpress", ["q_pre"], full=True)
    with pytest.raises(RunError, match=r"only layers \[1\] of the model have attention"):
        gap.require_numbered()


@pytest.mark.parametrize(
    ("second", "told"),
    [
        (Rope((1.0, 0.5)), "layer 1 turns 4 of 8 dimensions"),
        (Rope((1.0, 0.5, 0.2, 0.1)), "layer 1 turns otherwise than layer 0"),
        (Rope((1.0, 0.1, 0.01, 0.001), "interleaved_to_half"), "otherwise after RoPE than before"),
        (Rope((1.0, 0.1, 0.01, 0.001), until=100), "other frequencies in longer texts"),
        (Rope(missing="a reason"), "not known: a reason"),
    ],
)
def test_triattention_is_of_one_rope_of_whole_vectors(whole: Run, tmp_path: Path, second: Rope, told: str):
    with pytest.raises(RunError, match=told):
        triattention.write(changed(whole, rope=by_rope({0: whole.rope(0), 1: second})), tmp_path)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"kv_lora_rank": 4}, "MLA"),
        ({"architectures": None, "model_type": "odd"}, "of odd names its layers is not known"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "is not known here"),
        ({"architectures": ["NobodyKnowsForCausalLM"]}, "NobodyKnowsForCausalLM names its layers is not known"),
    ],
)
def test_scales_need_known_names(whole: Run, tmp_path: Path, config: dict, told: str):
    run = changed(whole)
    run.__dict__["model_config"] = whole.model_config | config
    with pytest.raises(RunError, match=told):
        kv_scales.write(run, tmp_path)


def test_the_command_line(whole: Run, capsys: pytest.CaptureFixture[str], monkeypatch, tmp_path: Path):
    assert set(LAYOUTS) == {"heads", *FORMATS}
    monkeypatch.chdir(tmp_path)
    run = str(whole.folder)
    assert main(["export", run, "--to", "kvpress"]) == 0
    beside = whole.folder.with_name("whole_kvpress")
    assert sorted(path.name for path in beside.iterdir()) == ["config.json", "model.safetensors"]
    assert "n_sink is 0" in capsys.readouterr().out
    assert main(["export", run, "--layout", "safetensors", "--to", "kvpress"]) == 0
    assert [path.name for path in (tmp_path / "kvpress").iterdir()] == ["moments.safetensors"]
    assert main(["export", run, "--to", "./qfilters"]) == 0
    assert (tmp_path / "qfilters" / "l00h00q").is_dir()
    capsys.readouterr()
    assert main(["export", run, "--to", "kvpress"]) == 1
    assert "exists already" in capsys.readouterr().err


def test_an_unfinished_run_says_so(runs: Runs, tmp_path: Path):
    folder = runs.start("stopped", MOMENTS, stop_after=3)
    assert Manifest.load(folder).status == "interrupted"
    told = export_moments(folder, tmp_path / "out", "kvpress")
    assert "is interrupted: these are of what it has so far" in told[-1]
