"""`-cd RUN -cn rerun`, in whatever spelling: of a run folder Hydra gets what rerun.yaml says, and nothing else.

Hydra composes what it finds on its search path, its own settings too, and does as they say: a file
hydra/sweeper/basic.yaml names what is to be called. A run folder may come from anyone, so it never comes on that path.
Its rerun.yaml is read as plain YAML and checked (trust.py), and Hydra knows it by name, in memory, as do the
processes of its launchers. A folder with configurations of the user's own is theirs to compose.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult, ConfigSource

from sniffer.config.resolve import conf_folder
from sniffer.config.trust import read_rerun
from sniffer.config.typed import typed_strings
from sniffer.errors import ConfigError, RunError
from sniffer.process.patched import patched
from sniffer.storage.layout import RunFolder, SweepFolder

NAME = "rerun"

TELLING = (*RunFolder.MANIFESTS, RunFolder.RERUN, SweepFolder.INDEX, SweepFolder.MULTIRUN)
"""Files that tell a run or a sweep."""


@contextmanager
def composable(arguments: Namespace) -> Iterator[Namespace]:
    """The command line as Hydra may have it, and `rerun_of`: the run that is run again, or None.

    Inside, no file of a run folder is composed.

    Args:
        arguments: as Hydra's own parser gives them.

    Raises:
        RunError: a rerun.yaml cannot be read or is no saved configuration, or the folder of a run, a sweep or a job
            was named as one of configurations.
        ConfigError: a pickle was named, or a configuration that one of ours would hide.
    """
    if arguments.experimental_rerun is not None:
        raise ConfigError("--experimental-rerun reads a pickle, which can run code: use -cd RUN -cn rerun")
    folder = _rerun_folder(arguments)
    with _no_file_of_a_run():
        if folder is None:
            _check_names(arguments)
            yield Namespace(**vars(arguments) | {"rerun_of": None})
            return
        with _stored(NAME, read_rerun(folder, arguments.overrides)):
            named = {"config_dir": None, "config_path": None, "config_name": NAME, "rerun_of": folder}
            yield Namespace(**vars(arguments) | named)


def _rerun_folder(arguments: Namespace) -> Path | None:
    """The folder whose rerun.yaml is meant, if that is what the command line asks for."""
    name = PurePosixPath((arguments.config_name or "").replace("\\", "/"))
    # Some file systems do not tell upper case from lower.
    if name.name.casefold() not in (NAME, f"{NAME}.yaml"):
        return None
    if arguments.config_path is not None or (arguments.config_dir is None and len(name.parts) < 2):
        raise ConfigError("a run is run again with -cd RUN -cn rerun: name its folder with -cd")
    return Path(arguments.config_dir or "", name.parent).absolute()


def _check_names(arguments: Namespace) -> None:
    """Refuses folders of runs, and a file that Hydra would not read since ours of that name comes first."""
    for folder in _search_folders(arguments):
        refuse_run_folder(folder)
    name = (arguments.config_name or "").removesuffix(".yaml")
    if not name or arguments.config_dir is None or arguments.config_path is not None:
        return
    theirs, ours = (Path(place, f"{name}.yaml").absolute() for place in (arguments.config_dir, conf_folder()))
    if theirs != ours and theirs.is_file() and ours.is_file():
        raise ConfigError(f"{theirs} would not be read, since {ours} comes first: give it another name")


def _search_folders(arguments: Namespace) -> Iterator[Path]:
    """The local folders that the command line puts on Hydra's search path."""
    searched = typed_strings(arguments.overrides, "hydra.searchpath")
    for place in (arguments.config_dir, arguments.config_path, *searched):
        if place is not None and (place.startswith("file://") or "://" not in place):
            yield Path(place.removeprefix("file://")).absolute()


def refuse_run_folder(folder: Path) -> None:
    """Raises RunError where a folder is that of a run, a sweep or a job's record: nothing there is to be composed."""
    run = folder.parent if all((folder / name).exists() for name in RunFolder.HYDRA_TELLING) else folder
    if run != folder or any((folder / name).exists() for name in TELLING):
        raise RunError(
            f"{folder} is the folder of a run or a sweep, from which no configuration is composed: `-cd RUN -cn rerun` "
            "runs a run again; keep configurations of your own in another folder"
        )


@contextmanager
def _no_file_of_a_run() -> Iterator[None]:
    """Has Hydra refuse such files, however it came to look for them."""
    Plugins.instance()  # registers what reads files
    files = SourcesRegistry.instance().resolve("file")
    honest = files.load_config

    def load_config(self: ConfigSource, config_path: str) -> ConfigResult:
        for folder in (Path(self.path), Path(self.path, config_path).resolve().parent):
            refuse_run_folder(folder)
        return honest(self, config_path)

    with patched(files, "load_config", load_config):
        yield


@contextmanager
def _stored(name: str, node: Any) -> Iterator[None]:
    """Makes a configuration known to Hydra, and to the processes of its launchers, by name."""
    store = ConfigStore.instance()
    store.store(name=name, node=node)
    try:
        yield
    finally:
        store.repo.pop(f"{name}.yaml", None)
