"""Pictures in the terminal, as coloured half blocks."""

import io
from pathlib import Path

from PIL import Image
from rich.console import Console, ConsoleOptions, RenderResult
from rich.segment import Segment
from rich.style import Style

PREVIEW_COLUMNS = 48
PREVIEW_PIXELS_MAX = 2048 * 2048
PICTURE_PIXELS_MAX = 4096 * 4096


class HalfBlocks:
    """A picture as rows of upper half blocks: foreground and background colour make two pixels a character."""

    def __init__(self, picture: Image.Image, *, columns: int, rows: int) -> None:
        scale = min(columns / picture.width, 2 * rows / picture.height)
        width = max(1, round(picture.width * scale))
        height = max(2, round(picture.height * scale / 2) * 2)
        self._pixels = picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the rows."""
        width, height = self._pixels.size
        data = self._pixels.tobytes()

        def color(x: int, y: int) -> str:
            offset = (y * width + x) * 3
            return "#" + data[offset : offset + 3].hex()

        for y in range(0, height, 2):
            for x in range(width):
                yield Segment("▀", Style(color=color(x, y), bgcolor=color(x, y + 1)))
            yield Segment.line()


def decode_preview(jpeg: bytes) -> Image.Image | None:
    """The picture of a preview; None when it is not a JPEG of reasonable size: a preview is never worth an error."""
    try:
        picture = Image.open(io.BytesIO(jpeg), formats=["JPEG"])
        if picture.width * picture.height > PREVIEW_PIXELS_MAX:
            return None
        picture.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    return picture


def show_picture(path: Path) -> None:
    """Draw a saved picture on stderr, where that is a terminal that can."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal or console.color_system != "truecolor":
        return
    try:
        with Image.open(path) as picture:
            if picture.width * picture.height <= PICTURE_PIXELS_MAX:
                rows = max(4, min(PREVIEW_COLUMNS // 2, console.height - 4))
                console.print(HalfBlocks(picture, columns=PREVIEW_COLUMNS, rows=rows))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return  # it is saved and verified; a terminal that does not show it is no failure
