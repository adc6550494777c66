"""Pictures that can be logged."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy
import torch
from numpy.typing import NDArray
from PIL import Image as PIL_Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

#: Pixels around each picture of a grid.
BORDER = 2


@dataclass(frozen=True, eq=False)
class Image:
    """A picture, or several side by side, as `self.log(name, Image(x))` takes it.

    Args:
        pixels: shape (H, W), (C, H, W) or (N, C, H, W), with C of 1 (gray), 3 (RGB) or 4 (RGB and
            opacity). Either uint8, or floating point from 0 to 1; what lies outside is clamped,
            and NaN is black. N pictures make a nearly square grid, in reading order. The tensor is
            detached, but neither copied nor moved before the picture is written.
        caption: a text that loggers with a place for it show.

    Raises:
        TypeError: `pixels` is no tensor or has another dtype, or `caption` is no str.
        ValueError: another shape, or no pixels at all.

    Example:
        >>> Image(torch.rand(10, 1, 8, 8)).array().shape
        (32, 42, 3)
    """

    pixels: Tensor
    caption: str = ""

    def __post_init__(self) -> None:
        pixels = self.pixels
        if not isinstance(pixels, Tensor):
            raise TypeError(
                f"Image expects a tensor, got {type(pixels).__name__}: for an array write "
                "Image(torch.from_numpy(array))"
            )
        if not isinstance(self.caption, str):
            raise TypeError(f"an Image's caption must be a str, got {self.caption!r}")
        if not pixels.is_floating_point() and pixels.dtype is not torch.uint8:
            raise TypeError(
                f"Image expects floating point from 0 to 1, or uint8, got {pixels.dtype}: write "
                "mask.float(), or levels.to(torch.uint8)"
            )
        shape = tuple(pixels.shape)
        if not 2 <= len(shape) <= 4 or (len(shape) > 2 and shape[-3] not in (1, 3, 4)):
            last = len(shape) in (3, 4) and shape[-1] in (1, 3, 4)
            hint = f": the channels come first, write pixels.movedim(-1, {len(shape) - 3})"
            raise ValueError(
                "Image expects the shape (H, W), (C, H, W) or (N, C, H, W) with 1, 3 or 4 "
                f"channels, got {shape}{hint if last else ''}"
            )
        if not pixels.numel():
            raise ValueError(f"Image expects pixels, got none: the shape is {shape}")
        object.__setattr__(self, "pixels", pixels.detach())

    def array(self) -> NDArray[numpy.uint8]:
        """The picture in memory, of shape (height, width, 3 or 4); waits for the device."""
        pixels = self.pixels.cpu()
        if pixels.dtype is not torch.uint8:
            # In at least single precision: in half, neighbouring levels would become one.
            pixels = pixels.to(torch.promote_types(pixels.dtype, torch.float32))
            pixels = pixels.nan_to_num(0.0).clamp(0.0, 1.0).mul(255.0).round().to(torch.uint8)
        if pixels.dim() == 2:
            pixels = pixels[None]
        if pixels.shape[-3] == 1:
            pixels = torch.cat([pixels] * 3, dim=-3)
        picture = _grid(pixels) if pixels.dim() == 4 else pixels
        return picture.permute(1, 2, 0).contiguous().numpy()

    def png(self) -> bytes:
        """The picture as the content of a PNG file, the caption as its description."""
        file = io.BytesIO()
        about = PngInfo()
        if self.caption:
            about.add_itxt("Description", self.caption)
        PIL_Image.fromarray(self.array()).save(file, format="PNG", pnginfo=about)
        return file.getvalue()


def _grid(pixels: Tensor) -> Tensor:
    """(N, C, H, W) -> (C, height, width); one picture alone has no border."""
    n, channels, height, width = pixels.shape
    if n == 1:
        return pixels[0]
    columns = math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    high, wide = height + BORDER, width + BORDER
    grid = pixels.new_zeros(channels, rows * high + BORDER, columns * wide + BORDER)
    for i, picture in enumerate(pixels):
        top, left = i // columns * high + BORDER, i % columns * wide + BORDER
        grid[:, top : top + height, left : left + width] = picture
    return grid
