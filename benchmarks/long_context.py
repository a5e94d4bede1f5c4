"""Long documents through a small model of the embedded one's kind: memory, and what capturing adds.

Four layers at up to 32k tokens, two at 128k; a mask of (seq, seq) alone would take 1 GB and 17 GB. Of the last layer
nothing after its taps is computed, so one layer would not attend at all.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.measure import Figure, WholeRun, figure, slope, whole_run
from sniffer.dataset.packages import Pydoc

LENGTHS = (8_192, 16_384, 32_768)
LONGEST = 131_072
SHAPE = "hidden_size: 192, intermediate_size: 512, num_attention_heads: 3, num_key_value_heads: 1, head_dim: 64"
MORE = "vocab_size: 49152, max_position_embeddings: 131072"


def measure(repeats: int) -> list[Figure]:
    growth, share, inside, longest, mask = [], [], [], [], []
    with TemporaryDirectory() as scratch:
        text = Path(scratch, "long.txt")
        text.write_text("\n".join(str(text) for _, _, text in Pydoc().texts()) * 2, encoding="utf-8")
        for repeat in range(repeats):
            runs = [_run(Path(scratch, f"{repeat}-{n}"), text, n, n_layers=4) for n in (1_024, *LENGTHS)]
            base, *long = runs
            above = [run.child.peak - base.child.peak for run in long]
            growth.append(slope(LENGTHS, above))
            share.append(above[-1] / (4 * 192 * LENGTHS[-1]))
            inside.append((long[-1].seconds["sample"] + long[-1].seconds["capture"]) / long[-1].seconds["forward"])
        # 128k tokens take minutes here, and memory hardly varies: once is enough.
        small = _run(Path(scratch, "small"), text, 1_024, n_layers=2)
        large = _run(Path(scratch, "large"), text, LONGEST, n_layers=2)
        longest.append((large.child.peak - small.child.peak) / (4 * 192 * LONGEST))
        mask.append((large.child.peak - small.child.peak) / LONGEST**2)
    return [
        figure("slope of peak memory over 8k, 16k, 32k tokens", growth, limit=1.2),
        figure("peak memory at 32k above 1k tokens / the hidden states of one layer", share),
        figure("sampling and capture / forward, log_uniform, 32k tokens", inside, limit=0.01),
        figure("peak memory at 128k above 1k tokens / the hidden states of one layer", longest),
        figure("peak memory at 128k above 1k tokens / a boolean mask of (seq, seq)", mask, limit=0.1),
    ]


def _run(folder: Path, text: Path, n_tokens: int, n_layers: int) -> WholeRun:
    overrides = "{" + f"num_hidden_layers: {n_layers}, {SHAPE}, {MORE}" + "}"
    return whole_run(
        folder,
        "model=llama3",
        "model.weights=random",
        f"model.config_overrides={overrides}",
        "dataset=text",
        f"dataset.path={text}",
        f"dataset.max_tokens={n_tokens}",
    )
