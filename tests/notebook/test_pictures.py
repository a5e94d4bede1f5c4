"""Images in models that give their tokens several positions: rows are known by their place in the text.

The witness is transformers' own attention function: what it is given in a call without sniff, column by column.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from sniffer.models import finder

import sniffer
from sniffer import open_run
from sniffer.errors import CaptureError, ConfigError, RunError
from sniffer.notebook.captured import Captured
from sniffer.runs.verify import verify
from tests.notebook.test_listener import received
from tests.tiny_families import tiny_config, tiny_model

finder.install()

pytestmark = pytest.mark.filterwarnings("ignore")

IMAGE, START, PAD = 2, 4, 0
WIDE = [10, 11, START, *[IMAGE] * 6, 12, 13, 14]
"""Text, an image of 2 x 3, and text."""
TALL = [10, START, *[IMAGE] * 6, 15, 16]
TEXT = [20, 21, 22, 23, 24, 25, 26, 27]
GRIDS = {"wide": [1, 4, 6], "tall": [1, 6, 4]}
NEW = 4


def call_of(model: Any, rows: list[list[int]], *grids: str, seed: int = 0) -> dict[str, Any]:
    """What a processor makes of texts, padded on the left, with an image for each of `grids`."""
    seq = max(map(len, rows))
    ids = torch.tensor([[PAD] * (seq - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (seq - len(row)) + [1] * len(row) for row in rows])
    vision = model.config.vision_config
    width = 3 * vision.temporal_patch_size * vision.patch_size**2
    patches = sum(int(np.prod(GRIDS[grid])) for grid in grids)
    pixels = torch.randn(patches, width, generator=torch.Generator().manual_seed(seed))
    told = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": (ids == IMAGE).int()}
    return {**told, "pixel_values": pixels, "image_grid_thw": torch.tensor([GRIDS[grid] for grid in grids])}


def generate(model: Any, said: dict[str, Any], **how: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.generate(**said, max_new_tokens=NEW, do_sample=False, pad_token_id=PAD, eos_token_id=-1, **how)


def check(captured: Captured, seen: list[tuple[torch.Tensor, ...]], rows: list[list[int]], seq: int) -> None:
    """Each row's vectors are those that attention was given in its columns: of queries all, of keys the last ones.

    Args:
        seq: columns of the prompts.
    """
    n_layers = len(captured.geometry)
    assert captured.documents == len(rows)
    for place, layer in enumerate(sorted(captured.geometry)):
        forwards = seen[place::n_layers]
        columns = {
            kind: torch.cat([one[at][:, :, -one[0].shape[2] :] for one in forwards], 2)
            for at, kind in enumerate(("q", "k"))
        }
        for kind, states in columns.items():
            for head in range(states.shape[1]):
                found = captured.vectors(layer=layer, head=head, kind=kind)
                for number, row in enumerate(rows):
                    n = len(row) - (states.shape[2] - seq)  # of the prompt
                    mine = found.example_ids == number
                    order = np.argsort(found.positions[mine], kind="stable")
                    assert found.positions[mine][order].tolist() == list(range(len(row)))
                    assert found.token_ids[mine][order].tolist() == row
                    theirs = states[number, head, seq - n :]
                    assert np.allclose(found.vectors[mine][order], theirs.float(), atol=2e-5)
                    sections = found.sections[mine][order].tolist()
                    told = [token == IMAGE and place < n for place, token in enumerate(row)]
                    assert [section == "image" for section in sections] == told


@pytest.mark.parametrize(
    "family", ["qwen2_vl", *(pytest.param(name, marks=pytest.mark.long) for name in ("qwen2_5_vl", "qwen3_vl"))]
)
@pytest.mark.parametrize("how", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
def test_texts_with_images_side_by_side(family: str, how: dict[str, Any]):
    model = tiny_model(tiny_config(family))
    said = call_of(model, [WIDE, TALL, TEXT], "wide", "tall")
    seq = said["input_ids"].shape[1]
    with received() as seen:
        expected = generate(model, said)
    with sniffer.sniff(model, sampler="all") as captured:
        assert torch.equal(generate(model, said, **how), expected)
    n_layers = len(captured.geometry)
    of_text = [one for one in seen if one[0].shape[0] == 3][-n_layers * NEW :]
    rows = [expected[row, seq - n : -1].tolist() for row, n in enumerate(map(len, (WIDE, TALL, TEXT)))]
    check(captured, of_text, rows, seq)
    assert not captured.notes


@torch.no_grad()
def test_one_forward_and_files_of_it(tmp_path: Path):
    model = tiny_model(tiny_config("qwen2_vl"))
    said = call_of(model, [WIDE], "wide")
    with received() as seen:
        model(**said)
    with sniffer.sniff(model, sampler="all", kinds=["q", "k", "q_pre"]) as captured:
        model(**said)
    check(captured, seen[-len(captured.geometry) :], [WIDE], len(WIDE))
    # Files tell no second position, so nothing turns their rows.
    run = open_run(captured.save(tmp_path / "run"))
    assert verify(run.folder)[1] == []
    with pytest.raises(RunError, match="RoPE"):
        run.rotary(0)


def test_images_that_differ_make_texts_of_their_own():
    """The same words about two pictures are two texts; of one picture, they are one, as beams of a prompt are."""
    model = tiny_model(tiny_config("qwen2_vl"))
    for same in (False, True):
        said = call_of(model, [WIDE, WIDE], "wide", "wide")
        if same:
            half = len(said["pixel_values"]) // 2
            said["pixel_values"][half:] = said["pixel_values"][:half]
        with sniffer.sniff(model, sampler="all") as captured:
            generate(model, said)
        assert captured.documents == (1 if same else 2)


def test_weight_on_images(tmp_path: Path):
    """By numpy, from queries and keys as attention is given them; and of beams, which part behind the image."""
    model = tiny_model(tiny_config("qwen2_vl"))
    said = call_of(model, [WIDE], "wide")
    how: dict[str, Any] = {"sampler": "all", "attention": ["section"], "attention_sections": ["image"]}
    with received() as seen:
        generate(model, said)
    with sniffer.sniff(model, **how) as captured:
        generate(model, said)
    n_layers = len(captured.geometry)
    steps = seen[-n_layers * NEW :][1::n_layers]  # of the second layer
    q = torch.cat([one[0] for one in steps], 2)[0].double().numpy()
    k = np.repeat(steps[-1][1][0].double().numpy(), q.shape[0] // steps[-1][1].shape[1], axis=0)
    logits = q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1])
    logits[:, ~np.tri(q.shape[1], dtype=bool)] = -np.inf
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    expected = weights[:, :, [place for place, token in enumerate(WIDE) if token == IMAGE]].sum(-1)
    for head in range(len(q)):
        found = captured.attention(layer=1, q_head=head).sort("position")
        assert np.allclose(np.array(found["section_mass"].to_list()).reshape(-1), expected[head], atol=1e-5)
    assert 0.2 < expected[:, 9:].mean() < 0.8
    run = open_run(captured.save(tmp_path / "run"))
    assert run.attention(layer=1, q_head=0)["section_mass"].to_list() == found_of(captured, 0)
    with sniffer.sniff(model, **how) as branched:
        generate(model, said, num_beams=2)
    assert branched.branches
    for number in branched.branches:
        rows = branched.attention(layer=1, q_head=0).filter(pl.col("example_id") == number)
        assert all(share > 0.05 for (share,) in rows["section_mass"].to_list())
    with (
        pytest.raises(ConfigError, match="have the section image alone"),
        sniffer.sniff(model, attention=["section"], attention_sections=["question"]),
    ):
        pass


def found_of(captured: Captured, head: int) -> list[Any]:
    return captured.attention(layer=1, q_head=head)["section_mass"].to_list()


def test_a_generation_has_images_too():
    """`generate` encodes them once, and hands on what they became."""
    config = tiny_config("gemma3")
    config.image_token_id, config.mm_tokens_per_image = 7, 4
    config.vision_config.image_size = 4 * config.vision_config.patch_size
    model = tiny_model(config)
    ids = torch.tensor([[10, 11, 7, 7, 7, 7, 12, 13]])
    said = {"pixel_values": torch.randn(1, 3, *[config.vision_config.image_size] * 2), "input_ids": ids}
    with sniffer.sniff(model, sampler="all") as captured:
        generate(model, {**said, "token_type_ids": (ids == 7).long()})
    found = captured.vectors(layer=0, head=0)
    assert found.sections.tolist() == ["image" if 2 <= place < 6 else "" for place in range(8 + NEW - 1)]


@torch.no_grad()
def test_several_positions_of_text_are_refused():
    model = tiny_model(tiny_config("qwen2_vl"))
    said = call_of(model, [WIDE], "wide")
    positions = torch.arange(len(WIDE)).expand(3, 1, -1).clone()
    positions[1, 0, -1] += 3
    with sniffer.sniff(model, sampler="all"), pytest.raises(CaptureError, match="several positions, as for images"):
        model(**said, position_ids=positions)
