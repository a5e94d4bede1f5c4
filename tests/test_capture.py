"""The whole pipeline on a tiny model: what is read back is what attention received, whatever the batching."""

from __future__ import annotations

import sys
import types
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from sniffer.models.backbone import Checkpoint
from sniffer.models.provenance import packages_in_use

from sniffer import open_run
from sniffer.engine import worker
from sniffer.errors import CaptureError, CheckpointError, ConfigError, DatasetError
from sniffer.forward import estimate, passes
from sniffer.forward.estimate import Estimate, Room, commit_bytes, device_warning, refuse_if_too_large
from sniffer.reader.run import Run
from sniffer.storage.manifest import Manifest
from sniffer.types import WorkingMemory
from tests.helpers_storage import codecs
from tests.tiny_run import TEXTS, save_texts

EVERYTHING = ("sampler=all", "capture.kinds=[q,k,v,q_pre,k_pre]")


def table(run: Run) -> pl.DataFrame:
    """All rows in a fixed order."""
    order = ["layer", "kind", "head", "example_id", "position"]
    return run.scan().collect().sort(order)


def received(checkpoint: Path, text: str, dtype: torch.dtype) -> list[dict[str, torch.Tensor]]:
    """What each layer's attention function is called with, by wrapping it, without any of our taps."""
    from transformers import AutoModel, AutoTokenizer
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = AutoModel.from_pretrained(checkpoint, dtype=dtype, attn_implementation="sdpa").eval()
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]
    calls: list[dict[str, torch.Tensor]] = []

    def wrapped(module, query, key, value, *args, **kwargs):
        calls.append({"q": query.clone(), "k": key.clone(), "v": value.clone()})
        return original(module, query, key, value, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = wrapped
    try:
        with torch.inference_mode():
            model(input_ids=torch.tensor([AutoTokenizer.from_pretrained(checkpoint)(text).input_ids]))
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = original
    return calls


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rows_are_exactly_what_attention_receives(run, checkpoint: Path, dtype: str):
    captured = run(*EVERYTHING, f"model.dtype={dtype}", "batch.max_tokens=1")
    names = dict(captured.examples().select("source_id", "example_id").iter_rows())
    assert set(names) == set(TEXTS)
    for source_id, text in TEXTS.items():
        for layer, calls in enumerate(received(checkpoint, text, getattr(torch, dtype))):
            for kind, states in calls.items():
                for head in range(states.shape[1]):
                    found = captured.vectors(layer=layer, head=head, kind=kind)
                    mine = found.example_ids == names[source_id]
                    order = np.argsort(found.positions[mine])
                    expected = states[0, head].float().numpy()
                    assert np.array_equal(found.vectors[mine][order], expected)


def test_the_manifest_counts_what_is_there(run):
    captured = run(*EVERYTHING)
    manifest = captured.manifest
    tokens = sum(len(text.encode()) for text in TEXTS.values())
    assert manifest.status == "complete" and manifest.reason is None
    llama = "transformers.models.llama.modeling_llama"
    code = {llama: f"sha256:{sha256(Path(str(sys.modules[llama].__file__)).read_bytes()).hexdigest()}"}
    assert manifest.backbone == {
        "attn_implementation": "sdpa",
        "sdpa_kernels": ["flash", "efficient", "math"],
        "skipped_layers": [],
        "shared_keys": {},
        "code": code,
        "packages": packages_in_use(torch.nn.Linear(2, 2)),
    }
    assert manifest.counts == {"examples": 3, "skipped_empty": 0, "truncated": 0, "tokens": tokens}
    assert manifest.rows_by_kind == {
        "q": tokens * 2 * 4,
        "k": tokens * 2 * 2,
        "v": tokens * 2 * 2,
        "q_pre": tokens * 2 * 4,
        "k_pre": tokens * 2 * 2,
    }
    assert manifest.rows == len(table(captured))


def test_a_batch_may_have_any_size(run):
    """Where it is larger than all text, all documents are one batch."""
    assert table(run("batch.max_tokens=1000000")).equals(table(run(f"batch.max_tokens={10**400}")))


@pytest.mark.parametrize("change", ["batch.max_tokens=100000", "batch.max_tokens=300", "dataset.max_tokens=2048"])
def test_batching_changes_no_position_and_vectors_only_by_rounding(run, change: str):
    sampler = ("sampler.base_rate=40", "sampler.min_bucket_size=16")
    alone, together = table(run(*sampler, "batch.max_tokens=1")), table(run(*sampler, change))
    assert len(alone) > 100
    keys = [column for column in alone.columns if column != "vector"]
    assert alone.select(keys).equals(together.select(keys))
    difference = alone["vector"].to_numpy() - together["vector"].to_numpy()
    assert np.abs(difference).max() < 1e-4


@pytest.fixture
def tokenizes(monkeypatch: pytest.MonkeyPatch):
    """Gives the checkpoint another pad token, and adds something to all tokens."""
    honest = Checkpoint.load_tokenizer

    def change(pad: int, add: int = 0) -> None:
        def load_tokenizer(self: Checkpoint):
            tokenize, _ = honest(self)
            return lambda text: tokenize(text) + add, pad

        monkeypatch.setattr(Checkpoint, "load_tokenizer", load_tokenizer)

    return change


def test_any_pad_token_serves_also_one_without_a_row_in_the_embedding(run, texts: Path, tokenizes):
    save_texts(texts, {"long": "a cat sat on the mat and looked at us", "short": "a cat sat on the mat and looked at"})
    whole = table(run(*EVERYTHING))
    for pad in (7, 256, 257, 10**6, -1):
        tokenizes(pad)
        assert table(run(*EVERYTHING)).equals(whole)


def test_a_token_without_a_row_in_the_embedding_is_named_with_its_document(run, tokenizes):
    tokenizes(pad=0, add=1000)
    with pytest.raises(CheckpointError, match=r"document 'first' has token 1\d{3} at position \d+, .* has 257 rows"):
        run()


def test_truncation_only_leaves_rows_out(run):
    sampler = ("sampler.base_rate=40", "sampler.min_bucket_size=16")
    whole, cut = run(*sampler), run(*sampler, "dataset.max_tokens=100")
    keys = ["layer", "kind", "head", "example_id", "position", "bucket", "token_id"]
    kept = table(whole).filter(pl.col("position") < 100).select(keys)
    assert len(kept) > 50 and kept.equals(table(cut).select(keys))
    assert cut.manifest.counts["truncated"] == 2


def test_shards_together_are_the_single_run(run):
    sampler = ("sampler.base_rate=40", "batch.max_tokens=1")
    single = table(run(*sampler))
    shards = [table(run(*sampler, f"dataset.shard.index={i}", "dataset.shard.count=3")) for i in range(3)]
    assert all(len(shard) for shard in shards)
    order = ["layer", "kind", "head", "example_id", "position"]
    assert pl.concat(shards).sort(order).equals(single)


def test_a_selection_leaves_the_rest_as_it_is(run):
    everything = table(run("sampler.base_rate=40"))
    some = run("sampler.base_rate=40", "capture.layers=[1]", "capture.heads=[2]", "capture.kinds=[k]")
    wanted = everything.filter((pl.col("layer") == 1) & (pl.col("head") == 1) & (pl.col("kind") == "k"))
    assert len(wanted) and table(some).equals(wanted)


def test_the_same_configuration_gives_the_same_digest(run):
    first, second, other = run(), run(), run("seed=1")
    assert first.manifest.digest == second.manifest.digest != other.manifest.digest


def test_nothing_kept_is_a_valid_run(run):
    empty = run("sampler.base_rate=0")
    assert empty.manifest.rows == 0 and empty.manifest.status == "complete"
    assert empty.scan().collect().is_empty()
    assert empty.vectors(layer=0, head=0, kind="q").vectors.shape == (0, 8)


def test_empty_documents_are_skipped_and_counted(run, texts: Path):
    save_texts(texts, {**TEXTS, "nothing": "", "blank": "  \n"})
    captured = run()
    assert captured.manifest.counts["skipped_empty"] == 2
    assert set(captured.examples()["source_id"]) == set(TEXTS)


def test_only_empty_documents_are_refused(run, texts: Path):
    save_texts(texts, {"nothing": "", "blank": " "})
    with pytest.raises(DatasetError, match="all 2 texts are empty"):
        run()


def test_what_memory_cannot_hold_is_refused_with_advice(run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(worker, "available_memory", lambda: 1000)
    with pytest.raises(CaptureError, match="of RAM.*lower sampler.base_rate"):
        run()


@pytest.mark.parametrize(("free", "warned"), [(1000, True), (1 << 40, False), (None, False)])
def test_a_batch_that_may_not_fit_on_its_device_is_told_before_the_first(
    run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, free: int | None, warned: bool
):
    monkeypatch.setattr(worker, "free_memory", lambda device: free)
    run("batch.max_tokens=64")
    lines = [line for line in caplog.messages if "1000 bytes is free" in line or "needs about" in line]
    assert bool(lines) == warned
    assert all("lower batch.max_tokens or dataset.max_tokens" in line for line in lines)


def test_masks_that_fill_a_device_come_with_the_attention_that_makes_none():
    needed = WorkingMemory(rows=1, tokens=1000, peak=1000, mask=500)
    assert "flash_attention_2" in str(device_warning(needed, 0, 999))
    assert "flash_attention_2" not in str(device_warning(replace(needed, mask=100), 0, 999))
    assert device_warning(needed, 0, 1000) is None and device_warning(needed, 1, 1000) is not None


def test_more_tokens_than_positions_are_refused(run):
    with pytest.raises(ConfigError, match="dataset.max_tokens=4096 is more than the model's 2048 positions"):
        run("dataset.max_tokens=4096")


def test_an_exception_keeps_what_was_captured(run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    forward, seen = passes.Observer.__call__, []

    def failing(self, seen_inputs):
        seen.append(self.batch)
        if len({id(batch) for batch in seen}) == 3:
            raise RuntimeError("out of luck")
        return forward(self, seen_inputs)

    monkeypatch.setattr(passes.Observer, "__call__", failing)
    with pytest.raises(RuntimeError, match="out of luck"):
        run("sampler=all", "batch.max_tokens=1")
    manifest = Manifest.load(tmp_path / "run-0")
    assert manifest.status == "interrupted" and manifest.reason == "RuntimeError: out of luck"
    kept = open_run(tmp_path / "run-0")
    assert 1 <= len(kept.examples()) <= 2
    assert kept.manifest.rows == len(table(kept)) > 0


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("out of memory"),
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory.\nTried 3 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
    ],
)
def test_running_out_of_memory_is_one_line_and_keeps_the_rest(
    run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception
):
    gather, observers = passes.Observer.__call__, []

    def failing(self, seen):
        observers.append(self)
        if len({id(observer) for observer in observers}) == 3:
            raise error
        return gather(self, seen)

    monkeypatch.setattr(passes.Observer, "__call__", failing)
    with pytest.raises(CaptureError, match="out of memory.*lower batch.max_tokens") as caught:
        run("sampler=all", "batch.max_tokens=1")
    assert "\n" not in str(caught.value)
    manifest = Manifest.load(tmp_path / "run-0")
    assert manifest.status == "interrupted" and "out of memory" in str(manifest.reason)
    assert manifest.counts["examples"] == 2 and manifest.rows > 0


@pytest.mark.parametrize(
    ("compression", "codec"), [("auto", "UNCOMPRESSED"), ("zstd", "ZSTD"), ("none", "UNCOMPRESSED")]
)
def test_vectors_are_compressed_as_asked_and_rows_stay(run, compression: str, codec: str):
    asked = run("sampler=all", f"output.compression={compression}")
    assert codecs(asked.folder) == {codec}
    assert asked.manifest.digest == run("sampler=all").manifest.digest


def test_a_full_disk_is_refused_before_it_starts(run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(estimate.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1000))
    with pytest.raises(CaptureError, match="of disk, 1000 bytes is free"):
        run("sampler=all")


def test_two_batches_in_pinned_memory_are_counted_on_cuda():
    expected = Estimate({}, ram_bytes=1000.0, batch_bytes=10.0, file_bytes=0.0, exact_lengths=True)
    rooms = [Room.of(1e9, 100, torch.device(name)) for name in ("cpu", "cuda:1", "mps")]
    needed = [estimate.peak_ram(expected, room.limit, room.pinned) for room in rooms]
    assert needed == pytest.approx([1.3 * 120, 1.3 * 120 + 4 * 10, 1.3 * 120])


def test_a_memory_limit_makes_room(run, texts: Path, monkeypatch: pytest.MonkeyPatch):
    """What does not fit in memory as a whole is captured all the same, as long as two batches do."""
    save_texts(texts, {f"text {n}": TEXTS["first"] for n in range(12)})
    everything = run("sampler=all", "batch.max_tokens=1")
    monkeypatch.setattr(worker, "available_memory", lambda: 1_500_000)
    with pytest.raises(CaptureError, match="of RAM"):
        run("sampler=all", "batch.max_tokens=1", "output.memory_limit=1GB")
    limited = run("sampler=all", "batch.max_tokens=1", "output.memory_limit=1kB")
    assert limited.manifest.digest == everything.manifest.digest


def test_of_a_run_whose_parts_leave_one_commit_has_to_fit_on_the_disk(tmp_path: Path):
    expected = Estimate({}, ram_bytes=2e15, batch_bytes=10.0, file_bytes=1e15, exact_lengths=True)
    room = Room(available=1e12, limit=1e9)
    assert commit_bytes(expected, 1000, 10, 1e18) == 1e13  # a hundredth of the documents
    assert commit_bytes(expected, 1000, None, 1e9) == 3e9  # six times the memory limit, which takes half on disk
    assert commit_bytes(expected, 5, 10, 1e18) == 1e15
    refuse_if_too_large(expected, tmp_path, room, passing=1e3)
    with pytest.raises(CaptureError, match=r"a commit needs about .* of disk, .*: lower output.checkpoint_every"):
        refuse_if_too_large(expected, tmp_path, room, passing=1e15)
    with pytest.raises(CaptureError, match=r"the captures need about .* of disk"):
        refuse_if_too_large(expected, tmp_path, room)
