"""One self-contained page of a run's or a sweep's results; see README.md here.

Everything is inside the file: data as JSON, style, script, tables as data: URLs. Its content security policy
forbids the browser to fetch anything, so that it shows the same in ten years and without a network.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sniffer import open_run
from sniffer.errors import ConfigError, RunError
from sniffer.reader.run import Run
from sniffer.storage.remote import RemotePath, folder_at
from sniffer.terminal.printing import say

from ..common import results
from ..common.entry import destination, make, opened, overrides
from ..common.results import PAGE
from .collect import collect
from .comparison import comparison
from .glossary import ABOUT

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Report:
    """What the page holds.

    Attributes:
        title: None takes the folder's name.
        table_limit: tables larger than so many bytes are named in the page, but not put into it.
        groups: of documents, each measured alone, that intervals rest on; 0 for none but those that analyses left.
    """

    title: str | None = None
    table_limit: int = 500_000
    groups: int = 6

    def __post_init__(self) -> None:
        if self.groups < 0:
            raise ConfigError(f"report.groups={self.groups} must be 0 or more")
        if self.table_limit < 0:
            raise ConfigError(f"report.table_limit={self.table_limit} must be 0 bytes or more")

    def page(self, path: str, left: Path | None = None) -> str:
        """The page of a run folder, or of a sweep folder, as HTML.

        Args:
            left: where the results of a run's analyses are, a folder for each; None for where they lie usually.

        Raises:
            RunError: not a run, or no analysis has been run yet.
        """
        runs = opened(path)
        if left is not None and len(runs) > 1:
            raise ConfigError(f"results={left} would be those of {len(runs)} jobs: give one job as run")
        folder = folder_at(path)
        found = open_run(path)
        labels = {} if isinstance(found, Run) else found.overrides
        how = self.table_limit, self.groups, left
        jobs = [collect(run, dict(labels.get(run.folder.name, {})), *how) for run in runs]
        compared = comparison(folder, runs, lambda analysis, name: ABOUT.get(f"{analysis}.{name}", ""))
        if compared is None and not any(job["findings"] for job in jobs):
            analysis = f"python -m sniffer.experiments position_geometry run={path}"
            if isinstance(folder, RemotePath) or left is not None:
                analysis += f" out={left or 'FOLDER'}/position_geometry"
                raise RunError(
                    f"{left or folder} has no results to report: run an analysis first, such as `{analysis}`, and give "
                    f"results={left or 'FOLDER'}"
                )
            raise RunError(f"{folder} has no results to report: run an analysis first, such as `{analysis}`")
        return assemble({"title": self.title or folder.name, "jobs": jobs, "comparison": compared})


def assemble(data: dict[str, Any]) -> str:
    """Puts style, script and data into the page."""
    # "<" could end the script element early, whatever a text in the data says.
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    page = (HERE / "page.html").read_text(encoding="utf-8")
    for name, content in (("css", _read("page.css")), ("js", _read("page.js")), ("data", text)):
        page = page.replace(f"/*{name}*/", content, 1)
    return page


def write(name: str, words: Sequence[str]) -> None:
    """The command line: one page for all jobs of a sweep, in the folder that was given."""
    settings = overrides(words)
    run, out, left = (settings.pop(key, None) for key in ("run", "out", "results"))
    if not isinstance(run, str):
        raise ConfigError(f"no run is given: python -m experiments.{name} run=outputs/RUN")
    report = make(name, settings)
    assert isinstance(report, Report)
    left = None if left is None else Path(str(left)).expanduser().absolute()
    # Beside the results, as in a run's folder.
    out = str(left / name) if out is None and left is not None else out
    page = report.page(run, left)
    folder = destination(out, folder_at(run), name)
    results.put(folder, PAGE, page.encode())
    say(f"One page of {len(page) / 1e6:.1f} MB; open it in any browser, it needs no network.")
    say(folder / PAGE, style="bold")


def _read(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")
