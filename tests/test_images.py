import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PIL_Image
from torch import Tensor

from composefit.images import Image


def read(png: bytes) -> Any:
    return np.asarray(PIL_Image.open(io.BytesIO(png)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_level_of_eight_bits_arrives_exactly(dtype: torch.dtype) -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    pixels = torch.from_numpy(levels.astype(np.float64) / 255).to(dtype)
    for image in (Image(pixels), Image(torch.from_numpy(levels))):
        assert image.array().dtype == np.uint8
        for channel in range(3):
            assert np.array_equal(image.array()[..., channel], levels)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    pixels = torch.linspace(0, 1, 1000).to(dtype).reshape(10, 100)
    expected = [round(value * 255) for value in pixels.double().flatten().tolist()]
    assert Image(pixels).array()[..., 0].flatten().tolist() == expected


def test_values_outside_of_the_range_are_clamped_and_nan_is_black() -> None:
    pixels = torch.tensor([[-3.0, 0.0, 1.0, 3.0, math.inf, -math.inf, math.nan]])
    assert Image(pixels).array()[0, :, 0].tolist() == [0, 0, 255, 255, 255, 0, 0]


def test_channels_come_last_in_the_array() -> None:
    rgb = torch.arange(3 * 4 * 5, dtype=torch.uint8).reshape(3, 4, 5)
    assert np.array_equal(Image(rgb).array(), rgb.numpy().transpose(1, 2, 0))
    rgba = torch.arange(4 * 4 * 5, dtype=torch.uint8).reshape(4, 4, 5)
    assert np.array_equal(Image(rgba).array(), rgba.numpy().transpose(1, 2, 0))


def test_gray_is_the_same_in_all_channels() -> None:
    gray = torch.arange(20, dtype=torch.uint8).reshape(4, 5)
    expected = np.stack([gray.numpy()] * 3, axis=-1)
    assert np.array_equal(Image(gray).array(), expected)
    assert np.array_equal(Image(gray[None]).array(), expected)


@pytest.mark.parametrize(
    ("n", "rows", "columns"), [(2, 1, 2), (3, 2, 2), (4, 2, 2), (5, 2, 3), (10, 3, 4), (64, 8, 8)]
)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_batch_is_a_grid_in_reading_order_with_two_pixels_between(
    n: int, rows: int, columns: int, channels: int
) -> None:
    pixels = torch.randint(1, 256, (n, channels, 6, 7), dtype=torch.uint8)
    array = Image(pixels).array()
    assert array.shape == (rows * 8 + 2, columns * 9 + 2, 4 if channels == 4 else 3)
    for i in range(n):
        top, left = 2 + i // columns * 8, 2 + i % columns * 9
        tile = array[top : top + 6, left : left + 7]
        assert np.array_equal(tile, Image(pixels[i]).array())
        array[top : top + 6, left : left + 7] = 0
    assert not array.any()  # what is left is border


def test_a_batch_of_one_has_no_border() -> None:
    pixels = torch.rand(1, 3, 6, 7)
    assert np.array_equal(Image(pixels).array(), Image(pixels[0]).array())


def test_a_png_reads_back_as_the_same_pixels_with_the_caption(tmp_path: Path) -> None:
    for channels in (1, 3, 4):
        image = Image(torch.rand(channels, 9, 5), "fakes, ü <b>")
        assert np.array_equal(read(image.png()), image.array())
        with PIL_Image.open(io.BytesIO(image.png())) as file:
            assert file.format == "PNG"
            assert file.info["Description"] == "fakes, ü <b>"
    with PIL_Image.open(io.BytesIO(Image(torch.rand(2, 2)).png())) as file:
        assert file.info == {}


def test_pixels_are_detached_and_as_they_were_given() -> None:
    pixels = torch.rand(3, 4, 5, requires_grad=True)
    image = Image(pixels * 1)
    assert not image.pixels.requires_grad and image.pixels.grad_fn is None
    values = torch.rand(4, 5)
    assert Image(values).pixels.data_ptr() == values.data_ptr()
    before = values.clone()
    Image(values).array()[:] = 0
    assert torch.equal(values, before)


def test_pixels_of_any_strides_will_do() -> None:
    pixels = torch.rand(3, 4, 8)[..., ::2].flip(1)
    assert np.array_equal(Image(pixels).array(), Image(pixels.contiguous()).array())


@pytest.mark.parametrize(
    ("pixels", "error", "text"),
    [
        (np.zeros((4, 4)), TypeError, r"got ndarray: .*Image\(torch\.from_numpy\(array\)\)"),
        (torch.zeros(4, 4, dtype=torch.bool), TypeError, r"got torch\.bool: write mask\.float"),
        (torch.zeros(4, 4, dtype=torch.int64), TypeError, r"levels\.to\(torch\.uint8\)"),
        (torch.zeros(4), ValueError, r"got \(4,\)$"),
        (torch.zeros(1, 1, 1, 4, 4), ValueError, r"got \(1, 1, 1, 4, 4\)$"),
        (torch.zeros(2, 4, 4)[:, :, :2], ValueError, r"1, 3 or 4 channels, got \(2, 4, 2\)$"),
        (torch.zeros(8, 9, 3), ValueError, r"channels come first, write pixels\.movedim\(-1, 0\)"),
        (torch.zeros(2, 8, 9, 3), ValueError, r"write pixels\.movedim\(-1, 1\)"),
        (torch.zeros(0, 3, 4, 4), ValueError, r"got none: the shape is \(0, 3, 4, 4\)"),
    ],
)
def test_what_is_no_picture_is_refused(pixels: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        Image(pixels)


def test_the_advice_for_channels_that_come_last_works() -> None:
    single, batch = torch.rand(8, 9, 3), torch.rand(2, 8, 9, 3)
    assert Image(single.movedim(-1, 0)).array().shape == (8, 9, 3)
    assert Image(batch.movedim(-1, 1)).array().shape == (12, 24, 3)


def test_a_caption_is_text() -> None:
    with pytest.raises(TypeError, match="caption must be a str, got 3"):
        Image(torch.rand(2, 2), 3)  # type: ignore[arg-type]


def test_an_image_cannot_be_changed() -> None:
    image: Any = Image(torch.rand(2, 2))
    with pytest.raises(AttributeError):
        image.pixels = Tensor()
