"""engine=vllm captures what engine=local does: the same rows of the same positions, and vectors up to rounding.

In an environment of its own (`make vllm-test`), in which vLLM is installed. The witness is engine=local.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from sniffer.models import embedded

from sniffer import open_run
from sniffer.runs.compare import compare
from tests.eight_bits import save_in_eight_bits
from tests.tiny_run import save_checkpoint

EMBEDDED = ("model=checkpoint", "model.checkpoint=embedded:SmolLM2-135M-Instruct")
SMALL = ("dataset.max_examples=4", "dataset.max_tokens=300", "sampler.base_rate=4", "capture.layers=[0,13,29]")
ROWS = ("layer", "head", "example_id", "position", "bucket", "token_id")
CLOSE = 1e-4


EVERY_KIND = "capture.kinds=[q,k,v,q_pre,k_pre]"


def command(folder: Path, *words: str, engine: str = "vllm") -> list[str]:
    dtype = () if any(word.startswith("model.dtype=") for word in words) else ("model.dtype=float32",)
    common = (*dtype, "model.device=cpu", f"engine={engine}", f"hydra.run.dir={folder}")
    return [sys.executable, "-m", "sniffer", *common, *words]


def captured(folder: Path, *words: str, engine: str = "vllm") -> Path:
    done = subprocess.run(command(folder, *words, engine=engine), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def require_equal(local: Path, vllm: Path) -> pl.DataFrame:
    """Rows are the same, vectors up to rounding, documents with their tokens the same."""
    one, other = open_run(local), open_run(vllm)
    assert one.examples().equals(other.examples())
    assert one.all_captured == other.all_captured
    for kind in one.kinds:
        tables = [run.scan(kind=kind).select(*ROWS).sort(*ROWS).collect() for run in (one, other)]
        assert len(tables[0]) and tables[0].equals(tables[1])
    found = compare(one, other)
    assert found["largest"].max() < CLOSE
    assert not found.select("other_token", "only_first", "only_second").sum().sum_horizontal().item()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def local(folder: Path) -> Path:
    return captured(folder / "local", *EMBEDDED, *SMALL, "capture.kinds=[q,k,v]", engine="local")


@pytest.mark.parametrize(
    ("tokens", "texts"), [(64, 1), (64, 8), (256, 3), (None, None)], ids=["64-1", "64-8", "256-3", "as vLLM has it"]
)
def test_rows_are_those_of_the_local_engine(local: Path, tmp_path: Path, tokens: int | None, texts: int | None):
    how = [f"engine.max_num_batched_tokens={tokens}", f"engine.max_num_seqs={texts}"] if tokens else []
    require_equal(local, captured(tmp_path / "vllm", *EMBEDDED, *SMALL, "capture.kinds=[q,k,v]", *how))


def test_a_checkpoint_in_eight_bits(folder: Path, tmp_path: Path):
    """Weights and states are rounded to eight bits by other kernels: rows are the same, and vectors near."""
    packed = save_in_eight_bits(embedded.path("SmolLM2-135M-Instruct"), tmp_path / "packed", states=True)
    words = ("model=checkpoint", f"model.checkpoint={packed}", *SMALL, "model.dtype=bfloat16")
    one = open_run(captured(tmp_path / "local", *words, engine="local"))
    other = open_run(captured(tmp_path / "vllm", *words))
    found = compare(one, other)
    assert not found.select("other_token", "only_first", "only_second").sum().sum_horizontal().item()
    assert found["median"].max() < 0.2 and found["cosine"].min() > 0.8
    plain = compare(open_run(captured(tmp_path / "plain", *EMBEDDED, *SMALL, engine="local")), other)
    assert (plain["median"] > 3e-3).all()  # it was the rounded one that ran


GENERATE = ("generate=greedy", "generate.max_new_tokens=32", "generate.eos=none")


@pytest.mark.parametrize("live", ["true", "false"])
def test_what_is_generated_is_that_of_the_local_engine(folder: Path, tmp_path: Path, live: str):
    words = (*EMBEDDED, *SMALL, *GENERATE, f"generate.live={live}")
    local = captured(tmp_path / "local", *words, engine="local")
    vllm = captured(tmp_path / "vllm", *words, "engine.max_num_batched_tokens=256", "engine.max_num_seqs=3")
    require_equal(local, vllm)
    assert open_run(vllm).examples()["generated"].list.len().to_list() == [32] * 4


def test_texts_end_where_they_do_in_the_local_engine(tmp_path: Path):
    words = (*EMBEDDED, *SMALL, "generate=greedy", "generate.max_new_tokens=24", "generate.stop=[' the']")
    local = captured(tmp_path / "local", *words, engine="local")
    vllm = captured(tmp_path / "vllm", *words)
    require_equal(local, vllm)
    assert "stop" in open_run(vllm).examples()["end"].to_list()


def test_too_little_room_for_keys_computes_again_and_keeps_each_row_once(tmp_path: Path):
    """Texts of 370 tokens have three blocks of 128 each, and want a fourth as they are gone on with: six are there."""
    words = (*EMBEDDED, *SMALL, *GENERATE, "dataset.max_tokens=370", "capture.kinds=[q,k,v]")
    wanted = captured(tmp_path / "local", *words, engine="local")
    # A block is 30 layers of 3 heads of k and v, 64 numbers each in float32; one more is vLLM's own.
    tight = (f"engine.kv_cache={7 * 128 * 30 * 3 * 2 * 64 * 4}B", "engine.max_num_seqs=4", "batch.max_tokens=4096")
    run = captured(tmp_path / "vllm", *words, *tight)
    require_equal(wanted, run)
    assert "again for want of room" in (run / "sniffer.log").read_text(encoding="utf-8")


def test_texts_are_drawn_as_in_the_local_engine(tmp_path: Path):
    """By the number of each document and position, also where texts are put back and go on (room as above)."""
    drawn = ("generate=sample", "generate.max_new_tokens=32", "generate.eos=none", "generate.seed=3")
    words = (*EMBEDDED, *SMALL, *drawn, "generate.temperature=1.3", "generate.top_k=40", "generate.top_p=0.95")
    words = (*words, "dataset.max_tokens=370", EVERY_KIND)
    wanted = captured(tmp_path / "local", *words, engine="local")
    tight = (f"engine.kv_cache={7 * 128 * 30 * 3 * 2 * 64 * 4}B", "engine.max_num_batched_tokens=256")
    run = captured(tmp_path / "vllm", *words, *tight, "engine.max_num_seqs=4", "batch.max_tokens=4096")
    require_equal(wanted, run)
    assert "again for want of room" in (run / "sniffer.log").read_text(encoding="utf-8")
    texts = open_run(run).examples()["generated"].to_list()
    assert [len(text) for text in texts] == [32] * 4
    assert len({tuple(text) for text in texts}) == 4


def test_killed_and_resumed(local: Path, tmp_path: Path):
    run = tmp_path / "vllm"
    words = (*EMBEDDED, *SMALL, "capture.kinds=[q,k,v]", "output.checkpoint_every=1", "batch.max_tokens=300")
    process = subprocess.Popen(command(run, *words), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        manifest = run / "manifest.json"
        if manifest.is_file() and (json.loads(manifest.read_text()).get("parts")):
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.02)
    assert process.wait() == -signal.SIGKILL
    assert json.loads((run / "manifest.json").read_text())["status"] == "running"
    resume = [sys.executable, "-m", "sniffer.runs", "resume", str(run)]
    done = subprocess.run(resume, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    require_equal(local, run)


def test_heads_and_a_checkpoint_of_another_shape(tmp_path: Path):
    made = save_checkpoint(
        tmp_path / "model", num_attention_heads=8, num_key_value_heads=2, head_dim=32, hidden_size=64
    )
    words = ("model=checkpoint", f"model.checkpoint={made}", "dataset.max_examples=3", "dataset.max_tokens=200")
    words = (*words, "capture.heads=[1,5,6]", "sampler.base_rate=4")
    runs = (captured(tmp_path / name, *words, engine=name) for name in ("local", "vllm"))
    require_equal(*runs)


def test_another_model_is_refused(tmp_path: Path):
    """A witness that is off: what transformers shows is altered, as a wrong order of heads would."""
    script = (
        "import sniffer.engine.vllm.prove as p, sys\n"
        "import sniffer.engine.vllm.engine as e\n"
        "real = e.shown_by\n"
        "def wrong(*given, **named):\n"
        "    shown = real(*given, **named)\n"
        "    rows = shown.vectors[13, 'k']\n"
        "    shown.vectors[13, 'k'] = rows.view(len(rows), 3, -1).flip(1).flatten(1)\n"
        "    return shown\n"
        "e.shown_by = wrong\n"
        "from sniffer.__main__ import main\n"
        "sys.exit(main())\n"
    )
    words = command(tmp_path / "run", *EMBEDDED, *SMALL)[3:]
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "k of layer 13, head" in done.stderr and "engine=local" in done.stderr


def test_two_ranks(tmp_path: Path):
    made = save_checkpoint(
        tmp_path / "model", num_attention_heads=8, num_key_value_heads=4, head_dim=32, hidden_size=64
    )
    words = ("model=checkpoint", f"model.checkpoint={made}", "dataset.max_examples=3", "dataset.max_tokens=200")
    words = (*words, "capture.heads=[1,2,6]", "sampler.base_rate=4", EVERY_KIND)
    words = (*words, "generate=sample", "generate.max_new_tokens=16")
    local = captured(tmp_path / "local", *words, engine="local")
    require_equal(local, captured(tmp_path / "vllm", *words, "engine.tensor_parallel=2"))


SMALL_MODEL = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
FEW = ("model=checkpoint", "dataset.max_examples=2", "dataset.max_tokens=100", "sampler.base_rate=8")


def test_experts_and_windows(tmp_path: Path):
    """A layer of experts has a context in vLLM as a layer of attention has; texts are longer than the window."""
    made = save_checkpoint(tmp_path / "model", "gpt_oss", **SMALL_MODEL, intermediate_size=256, sliding_window=32)
    words = (*FEW, f"model.checkpoint={made}")
    require_equal(captured(tmp_path / "local", *words, engine="local"), captured(tmp_path / "vllm", *words))


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 512}
ROPES: dict[str, tuple[str, dict[str, Any]]] = {
    "an attention factor": ("llama", {"rope_parameters": YARN}),
    "half of the dimensions, side by side": ("glm4", {}),
    "a layer without RoPE": ("smollm3", {"no_rope_layers": [1, 0]}),
}


@pytest.mark.parametrize(("family", "config"), ROPES.values(), ids=list(ROPES))
def test_vectors_before_rope_are_those_of_the_local_engine(tmp_path: Path, family: str, config: dict[str, Any]):
    """And in bfloat16 they are, turned forth, q and k up to its rounding (`Run.rotary` looks)."""
    made = save_checkpoint(tmp_path / "model", family, **SMALL_MODEL, intermediate_size=256, **config)
    words = (*FEW, f"model.checkpoint={made}", EVERY_KIND)
    local, vllm = (captured(tmp_path / name, *words, engine=name) for name in ("local", "vllm"))
    require_equal(local, vllm)
    turns = [open_run(vllm).rotary(layer).turns for layer in (0, 1)]
    assert turns == [True, family != "smollm3"]
    if family == "llama":
        assert open_run(vllm).rope(0).attention_factor > 1.1
        rounded = captured(tmp_path / "bfloat16", *words, "model.dtype=bfloat16")
        assert open_run(rounded).rotary(0).proven == ("q", "k")
    if family == "smollm3":
        tables = [open_run(vllm).vectors(layer=1, head=0, kind=kind).vectors for kind in ("q", "q_pre")]
        assert len(tables[0]) and (tables[0] == tables[1]).all()


def test_a_window_that_only_vllm_heeds_is_refused(tmp_path: Path):
    made = save_checkpoint(tmp_path / "model", "granite", **SMALL_MODEL, sliding_window=32)
    words = command(tmp_path / "run", *FEW, f"model.checkpoint={made}")
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "looks back over 32 positions in vLLM, and over all in transformers" in done.stderr
