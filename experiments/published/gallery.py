"""docs/gallery.md: every published figure in small, of a run and of a sweep. `make gallery`.

python -m sniffer.experiments.published.gallery RUN SWEEP FOLDER
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from sniffer.errors import ConfigError
from sniffer.terminal.command import exit_code
from sniffer.terminal.printing import line

from ..common.results import folder_of
from .catalogue import CATALOGUE, files

WIDTH, COLOURS = 720, 64
OF_RUN = (
    *("qk-pca_01", "qk-pca_02", "qk-pca_05", "qk-pca_06", "attention-plasticity_08"),
    *("qk-rotation_01", "qk-rotation_04", "qk-rotation_07", "qk-rotation_08"),
)
"""Files that show heads of one run, or of all runs together; others have a part for each run, and are of the sweep."""

HEAD = """# Published figures

Each figure of the studies that this was built for, drawn of the embedded model by one command. Your own runs:

    python -m sniffer.experiments published run=outputs/RUN                       # all that one run suffices for
    python -m sniffer.experiments published runs=outputs/SWEEP scores=FILE.csv    # all 32; also runs=[A,B,...]
    python -m sniffer.experiments published run=outputs/RUN figure=pc_roles       # one, by a part of its name

Names are those under which they were published, in
[msc_thesis/figures](https://github.com/viktor-shcherb/msc_thesis/tree/main/figures);
[published](../experiments/published/README.md) says what they are drawn from. `make gallery` makes this page:
SmolLM2-135M-Instruct reads six State of the Union addresses of up to 2048 tokens. Where runs are set beside one
another, it has read them as far as 512, 1024 and 2048 tokens, in place of a training's checkpoints; the scores of the
benchmark are made up.
"""


def write(run: Path, sweep: Path, folder: Path) -> int:
    """Pictures to FOLDER/gallery, the page to FOLDER/gallery.md; returns the pictures' bytes.

    Raises:
        ConfigError: a figure has not been drawn.
    """
    (folder / "gallery").mkdir(parents=True, exist_ok=True)
    page, size = [HEAD], 0
    for file, names in files().items():
        drawing = CATALOGUE[names[0]]
        picture = folder_of(run if file.startswith(OF_RUN) else sweep, "published") / f"{file}.png"
        if not picture.is_file():
            raise ConfigError(f"{picture} is not there: run `make gallery`")
        content = small(picture)
        (folder / "gallery" / f"{file}.png").write_bytes(content)
        size += len(content)
        known = ", ".join(f"`{name}`" for name in names)
        shows = drawing.shows[0].upper() + drawing.shows[1:]
        page.append(f"## {file.replace('_', ' ')}\n\n{shows} ({known}).\n\n![{drawing.shows}](gallery/{file}.png)\n")
    (folder / "gallery.md").write_text("\n".join(page), encoding="utf-8")
    return size


def small(picture: Path) -> bytes:
    """Narrower, and of few colours."""
    image = Image.open(picture).convert("RGB")
    image.thumbnail((WIDTH, WIDTH), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    image.quantize(COLOURS, dither=Image.Dither.NONE).save(content, format="PNG", optimize=True)
    return content.getvalue()


def main(arguments: Sequence[str]) -> int:
    def run() -> int:
        if len(arguments) != 3:
            raise ConfigError("give RUN SWEEP FOLDER")
        line(f"{write(*map(Path, arguments)):,} bytes of pictures")
        return 0

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
