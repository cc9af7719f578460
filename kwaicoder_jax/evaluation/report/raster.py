"""Heat maps as small PNG images inside the SVG: one pixel a cell, transparent where there is nothing to say.

Transparency lets the page's own background be the neutral colour, light or dark.
"""

import base64
import struct
import zlib

import numpy as np

from kwaicoder_jax.evaluation.report.markup import Html
from kwaicoder_jax.evaluation.report.svg import number

BLUE, VERMILION = (0, 114, 178), (213, 94, 0)  # of Okabe and Ito's palette: told apart with any colour vision


def png(cells_HW4: np.ndarray) -> bytes:
    """Encodes uint8 [height, width, RGBA] as PNG (ISO/IEC 15948), without filters."""
    height, width, _ = cells_HW4.shape

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    rows = b"".join(b"\0" + row.tobytes() for row in np.ascontiguousarray(cells_HW4, dtype=np.uint8))
    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


def sequential(shares_HW: np.ndarray) -> np.ndarray:
    """From nothing (0) to full blue (1)."""
    return _coloured(np.clip(np.nan_to_num(shares_HW), 0, 1), np.ones(shares_HW.shape, bool))


def diverging(ratios_HW: np.ndarray) -> np.ndarray:
    """Ratios to a neutral 1, which is transparent: full blue at 0, full vermilion at 2 and above."""
    distance_HW = np.clip(np.nan_to_num(ratios_HW, nan=1.0) - 1, -1, 1)
    return _coloured(np.abs(distance_HW), distance_HW < 0)


def _coloured(strength_HW: np.ndarray, blue_HW: np.ndarray) -> np.ndarray:
    colour_HW3 = np.where(blue_HW[..., None], np.array(BLUE), np.array(VERMILION))
    return np.concatenate([colour_HW3, np.round(255 * strength_HW)[..., None]], -1).astype(np.uint8)


def image(cells_HW4: np.ndarray, x: float, y: float, width: float, height: float) -> Html:
    """The cells stretched over a rectangle, with sharp borders."""
    data = base64.b64encode(png(cells_HW4)).decode()
    place = f'x="{number(x)}" y="{number(y)}" width="{number(width)}" height="{number(height)}"'
    return Html(f'<image {place} preserveAspectRatio="none" class="cells" href="data:image/png;base64,{data}"/>')


def binned(values: np.ndarray, most: int) -> np.ndarray:
    """Means over neighbours along the last axis, so that at most `most` values are left."""
    length = values.shape[-1]
    if length <= most:
        return values
    parts = np.array_split(np.arange(length), most)
    return np.stack([values[..., part].mean(-1) for part in parts], -1)
