"""Where each file of a run and of a sweep lies: the only place that spells their names.

outputs/RUN/
  config.yaml  rerun.yaml  .hydra/        the configuration, as resolved, to run again, as Hydra records it
  manifest.json  .manifest.json           what counts; its twin
  model_config.json                       the model's config, as its class resolved it
  examples.parquet  .examples.parquet     the documents; their twin, as of the last finished commit
  captures/layer=07/kind=q/part-00000.parquet
  tokens/part-00000.parquet               the token ids of the documents
  moments/part-00000.parquet              sums over all positions, where any are wanted
  .mirror.json                            how far its copy at a URL is, if it has one
  sniffer.log  .lock  experiments/        the log, who writes here now, results of analyses
"""

from __future__ import annotations

import re


class RunFolder:
    """Names in a run folder, with forward slashes, relative to it."""

    CONFIG = "config.yaml"
    RERUN = "rerun.yaml"
    MANIFEST = "manifest.json"
    MANIFEST_TWIN = ".manifest.json"
    """Written after the first, in case a kill or a bad disk hits that one."""
    MODEL_CONFIG = "model_config.json"
    EXAMPLES = "examples.parquet"
    EXAMPLES_TWIN = ".examples.parquet"
    CAPTURES = "captures"
    TOKENS = "tokens"
    MOMENTS = "moments"
    LOG = "sniffer.log"
    LOCK = ".lock"
    EXPERIMENTS = "experiments"
    MIRROR = ".mirror.json"
    """Of which manifest the run's copy at a URL is."""
    REPRODUCES = ".reproduces"
    """In a folder that `reproduce` made: the digest of the run that it repeats."""
    CARD = "README.md"
    ATTRIBUTES = ".gitattributes"
    """Of a published run, as is the card."""

    HYDRA = ".hydra"
    HYDRA_TELLING = ("hydra.yaml", "overrides.yaml")
    HYDRA_RECORD = ("config.yaml", *HYDRA_TELLING)
    """In that folder: what of it says that a job is Hydra's, and all of it."""
    HYDRA_OWN = ".hydra/hydra.yaml"
    OVERRIDES = ".hydra/overrides.yaml"

    MANIFESTS = (MANIFEST, MANIFEST_TWIN)
    DOCUMENTS = (EXAMPLES, EXAMPLES_TWIN)
    RECORDS = (*MANIFESTS, *DOCUMENTS)
    REPLACED = (*RECORDS, MODEL_CONFIG, CONFIG, RERUN, MIRROR)
    """Those that are written under another name and then take that of the last one."""
    BEFORE = (LOCK, MODEL_CONFIG, CONFIG, RERUN, LOG, HYDRA, REPRODUCES)
    """What a run leaves that was refused, or killed, before it had a manifest."""
    RESULTS = (*RECORDS, CAPTURES, TOKENS, MOMENTS, EXPERIMENTS)
    FOLDERS = (HYDRA, CAPTURES, TOKENS, MOMENTS, EXPERIMENTS)
    FILES = (*REPLACED, LOCK, LOG, REPRODUCES, CARD, ATTRIBUTES)

    @staticmethod
    def part(layer: int, kind: str, number: int, n_layers: int) -> str:
        """Where a part lies; layers are padded so that names sort as numbers."""
        width = max(2, len(str(n_layers - 1)))
        return f"captures/layer={layer:0{width}d}/kind={kind}/part-{number:05d}.parquet"

    @staticmethod
    def tokens(number: int) -> str:
        """Where token ids of documents lie."""
        return f"tokens/part-{number:05d}.parquet"

    @staticmethod
    def moments(number: int) -> str:
        """Where moments lie."""
        return f"moments/part-{number:05d}.parquet"

    @staticmethod
    def head(layer: int, head: int, kind: str) -> str:
        """Where the vectors of one head lie, in the layout of a file for each."""
        return f"l{layer:02d}h{head:02d}{kind}/data.parquet"

    @staticmethod
    def is_head(path: str) -> bool:
        return HEAD.fullmatch(path) is not None

    @staticmethod
    def is_part(path: str) -> bool:
        return PART.fullmatch(path) is not None

    @staticmethod
    def is_numbered_file(path: str) -> bool:
        """Whether a run may have written a file of this name, or begun to: a part, token ids, moments."""
        return RunFolder.is_part(path) or BESIDE.fullmatch(path) is not None

    @staticmethod
    def is_numbered(path: str) -> bool:
        """Whether a path ends as a part's does, wherever it lies."""
        return NUMBER.search(path) is not None

    @staticmethod
    def part_number(path: str) -> int:
        """Among the parts of its (layer, kind), as its name says."""
        found = NUMBER.search(path)
        assert found is not None
        return int(found[1])


PART = re.compile(r"captures/layer=[0-9]+/kind=\w+/part-[0-9]+\.parquet")
BESIDE = re.compile(r"(tokens|moments)/part-[0-9]+\.parquet")
NUMBER = re.compile(r"-([0-9]+)\.parquet$")
HEAD = re.compile(r"l[0-9]+h[0-9]+(q|k|v|q_pre|k_pre)/data\.parquet")


class SweepFolder:
    """Names in the folder of a sweep."""

    INDEX = "sweep.parquet"
    MULTIRUN = "multirun.yaml"
    """Hydra's record of the sweep."""
    FIGURES = ("sweep.png", "sweep.svg")
    SUBMITIT = ".submitit"
    FILES = (RunFolder.LOCK, INDEX, *FIGURES, MULTIRUN, SUBMITIT, RunFolder.EXPERIMENTS)
