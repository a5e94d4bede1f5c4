"""What a run needs to know of generation: whether it can be, with which model, and how long documents may become."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from sniffer.config.schema import Config
from sniffer.engine.base import Plan
from sniffer.engine.facts import Facts
from sniffer.errors import ConfigError
from sniffer.forward.generation.attention import require_steps
from sniffer.forward.generation.continuing import Decode
from sniffer.forward.generation.moments import require_told
from sniffer.forward.generation.request import Continuing
from sniffer.forward.generation.session import Generation
from sniffer.forward.passes import Passes
from sniffer.types import (
    BACKENDS,
    Answer,
    Backbone,
    Caching,
    Checkpoint,
    Document,
    LanguageModel,
    LengthClasses,
    Sections,
    Tokenize,
)

EACH_APART = LengthClasses(apart_from=1)
"""Documents share a batch if they are equally long."""


def check_generation(config: Config) -> None:
    """Meets what cannot be together with generation, before anything is read.

    Raises:
        ConfigError: naming the two keys.
    """
    if config.generate is None:
        return
    for key in ("window", "pack_to"):
        if getattr(config.dataset, key, None) is not None:
            raise ConfigError(f"dataset.{key} makes documents that are no prompts: leave it out, or set generate=none")
    if getattr(config.model, "compile", False):
        raise ConfigError("generate is not possible with model.compile=true: leave one of them out")
    check_cache(config.generate.caching)
    if not config.output.tokens:
        raise ConfigError(
            "generate keeps in examples.parquet which tokens were written: set output.tokens=true, or generate=none"
        )


def check_cache(caching: Caching) -> None:
    """Raises ConfigError where what quantises the cache is not installed, and names the package."""
    package = BACKENDS.get(caching.backend or "")
    if package is not None and not installed(package):
        raise ConfigError(
            f"generate.cache=quantized with {caching.backend} needs {package}: pip install {package}, or set "
            "generate.cache_backend=fp8, for which transformers needs nothing else"
        )


def installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def loaded_by(config: Config) -> Checkpoint:
    """What is loaded: the model, with its head where it is to go on with documents.

    Raises:
        ConfigError: a checkpoint class of a user's own that has no head.
    """
    if config.generate is None:
        return config.model
    with_head = getattr(config.model, "with_head", None)
    if with_head is None:
        raise ConfigError("generate needs a model._target_ with a method with_head: take one of ours, or generate=none")
    caching = config.generate.caching
    # A class of a user's own may know of one cache alone.
    headed: Checkpoint = with_head() if caching == Caching() else with_head(caching)
    return headed


def continuing_of(config: Config, model: Facts, tokenize: Tokenize, answer: Answer) -> Continuing | None:
    """How the model goes on with documents; None where it does not."""
    if config.generate is None:
        return None
    return Continuing.of(config.generate, model.eos, getattr(tokenize, "ending", None), answer)


def with_new(documents: Sequence[Document], continuing: Continuing | None) -> tuple[list[int], list[Sections | None]]:
    """Tokens and sections of documents as they may become: which tokens are of which section then, is not known."""
    lengths, sections = [one.n_tokens for one in documents], [one.sections for one in documents]
    if continuing is None:
        return lengths, sections
    new = continuing.how.max_new_tokens
    more = Sections.one(continuing.answer.known[0], new)
    joined = [None if found is None else Sections.joined([found, more]) for found in sections]
    return [n + new for n in lengths], joined


def language_model_of(backbone: Backbone) -> LanguageModel | None:
    """What goes on with documents; a backbone of a user's own may not have the name."""
    return getattr(backbone, "language_model", None)


def generation_of(plan: Plan, backbone: Backbone, passes: Passes, checkpoint: Checkpoint) -> Generation | None:
    """What goes on with the documents of a run; None where nothing does."""
    model = language_model_of(backbone)
    if plan.continuing is None or model is None:
        return None
    if plan.continuing.how.live and passes.attention is not None:
        require_steps(passes.attention, plan.continuing.answer)
    if plan.continuing.how.live and plan.moments is not None:
        require_told(plan.moments, plan.continuing.answer)
    decode = decoder_of(checkpoint, plan.continuing)
    return Generation(model, plan.continuing, passes, plan.picker, plan.selection, backbone.lengths, decode)


def decoder_of(checkpoint: Checkpoint, plan: Continuing | None) -> Decode:
    """Token ids to text, where texts end a document.

    Raises:
        CheckpointError: there is no tokenizer.
    """
    if plan is None or not plan.how.stop:
        return lambda _: ""
    tokenize, _ = checkpoint.load_tokenizer()
    decode: Decode = tokenize.decode  # type: ignore[attr-defined]
    return decode
