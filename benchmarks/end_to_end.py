"""Whole runs by the command line: 40 documents at up to 1024 tokens, everything captured.

Against the same with nothing captured, and against plain transformers: a process that loads the model by it and puts
each document through the backbone (plain_loop.py).
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from sniffer.models import embedded

from benchmarks.measure import Figure, both, child, figure, whole_run

DOCUMENTS, MAX_TOKENS = 40, 1024
TEXT = ("dataset=pydoc", f"dataset.max_examples={DOCUMENTS}", f"dataset.max_tokens={MAX_TOKENS}")
NOTHING = ("sampler=log_uniform", "sampler.base_rate=0")
EVERYTHING = ("sampler=all",)
EMBEDDED = "SmolLM2-135M-Instruct"
STAGES = ("load", "inference", "write")

CPU_LIMIT = 0.83 * 97.5 / 77.7
"""Processor seconds of a run that captures everything, over those of plain transformers.

The target is 0.83 of the seconds of the best existing tool, which took 97.5 on a machine where it took 77.7 with
nothing captured. Plain transformers stands for those 77.7 here, on whatever machine this is. Our run is counted as it
is: it skips what follows the last layer's taps, batches short documents, and keeps freed memory (heap.py), which pays
for most of the writing. What writing alone adds, `everything / nothing captured` tells.
"""

IMPORTS = "import torch; from transformers import AutoModelForCausalLM, PreTrainedModel"
"""What loading any model takes. transformers imports lazily: without PreTrainedModel, which every model file imports,
half of its imports would be left for later, and ours, which come to the same point, would seem to be to blame."""

UP_TO_THE_MODEL = """
from hydra import compose, initialize_config_dir
from sniffer.config.resolve import conf_folder, register, resolve
register()
with initialize_config_dir(str(conf_folder()), version_base="1.3"):
    cfg = compose("config", overrides=["dataset=pydoc", "hydra.runtime.output_dir=."])
config = resolve(cfg)
config.model.check()
import sniffer.capture, sniffer.models.finder, sniffer.models.weights
from transformers import AutoModelForCausalLM
sniffer.capture.check(config)
"""


def measure(repeats: int) -> list[Figure]:
    of_plain, of_nothing, nothing_of_plain, memory, start_up, early, help_ = ([] for _ in range(7))
    plain_loop = (str(Path(__file__).with_name("plain_loop.py")), str(embedded.path(EMBEDDED)))
    stages: dict[str, list[float]] = {stage: [] for stage in STAGES}
    for _ in range(repeats):
        # A folder for each repeat: gigabytes of earlier ones would be in the way of what is written now.
        with TemporaryDirectory() as scratch:
            plain = child(*plain_loop, str(DOCUMENTS), str(MAX_TOKENS))
            nothing = whole_run(Path(scratch, "nothing"), *TEXT, *NOTHING)
            everything = whole_run(Path(scratch, "everything"), *TEXT, *EVERYTHING)
            captured, ended = everything.captured_bytes, everything.child
            of_plain.append(ended.spent / plain.spent)
            of_nothing.append(ended.spent / nothing.child.spent)
            nothing_of_plain.append(nothing.child.spent / plain.spent)
            memory.append((ended.peak - nothing.child.steady) / captured)
            for stage in STAGES:
                stages[stage].append(everything.seconds[stage] / ended.spent.wall)
            start_up.append(1 - sum(everything.seconds[stage] for stage in STAGES) / ended.spent.wall)
    for _ in range(max(repeats, 7)):
        imports = child("-c", IMPORTS)
        early.append(child("-c", UP_TO_THE_MODEL).spent / imports.spent)
        help_.append(child("-m", "sniffer", "--help").spent / imports.spent)
    size = f"{captured / 1e6:,.0f} MB captured"
    return [
        *both("everything captured / plain transformers", of_plain, cpu_limit=CPU_LIMIT),
        *both("nothing captured / plain transformers", nothing_of_plain),
        *both("everything / nothing captured", of_nothing),
        figure(f"peak memory above the model / bytes captured, {size}", memory, limit=1.3),
        figure("share of the run: start-up", start_up),
        *(figure(f"share of the run: {stage}", stages[stage]) for stage in STAGES),
        *both("all until the weights are read / importing torch and transformers", early, limit=1.3),
        *both("--help / importing torch and transformers", help_),
    ]
