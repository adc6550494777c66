"""Where images stand in the pictures, and that files come out."""

from pathlib import Path

import matplotlib.image
import torch

from composefit.demo.pictures import by_class, grid, save_curves, save_samples


def flat_images(*values: float) -> torch.Tensor:
    """Images of 8 x 8 pixels, each of one value."""
    return torch.tensor(values).reshape(-1, 1, 1, 1).expand(-1, 1, 8, 8)


def test_rows_hold_the_first_images_of_their_class_in_order() -> None:
    images, classes = flat_images(0.1, 0.2, 0.3, 0.4, 0.5), torch.tensor([3, 0, 3, 9, 3])
    rows = by_class(images, classes, columns=2)
    assert rows.shape == (10, 2, 8, 8)
    torch.testing.assert_close(rows[3, :, 0, 0], torch.tensor([0.1, 0.3]))  # 0.5 has no place left
    torch.testing.assert_close(rows[0, 0], images[1, 0])
    torch.testing.assert_close(rows[9, 0], images[3, 0])


def test_places_without_an_image_are_empty() -> None:
    rows = by_class(flat_images(0.1), torch.tensor([4]), columns=2)
    filled = ~rows.isnan().all(-1).all(-1)
    assert filled.nonzero().tolist() == [[4, 0]]
    assert not rows[4, 0].isnan().any()


def test_a_grid_puts_each_image_at_its_row_and_column() -> None:
    rows = torch.arange(6.0).reshape(2, 3, 1, 1).expand(2, 3, 8, 8) / 10
    whole = grid(rows, scale=2, gap=3)
    assert whole.shape == (2 * 16 + 3, 3 * 16 + 2 * 3)
    for row in range(2):
        for column in range(3):
            top, left = row * 19, column * 19
            cell = whole[top : top + 16, left : left + 16]
            torch.testing.assert_close(cell, rows[row, column, :1, :1].expand(16, 16))
    assert whole[16:19].isnan().all()
    assert whole[:, 16:19].isnan().all()


def test_an_enlarged_image_stays_within_black_and_white() -> None:
    stripes = torch.ones(1, 1, 8, 8)
    stripes[..., ::2] = -1  # bicubic interpolation overshoots here
    whole = grid(stripes, scale=6, gap=0)
    assert whole.shape == (48, 48)
    assert whole.min() == -1
    assert whole.max() == 1


def test_the_samples_of_all_epochs_and_real_ones_stand_side_by_side(tmp_path: Path) -> None:
    images, classes = torch.rand(30, 1, 8, 8) * 2 - 1, torch.arange(30) % 10
    save_samples(tmp_path / "two.png", {0: images, 4: images}, classes, (images, classes))
    save_samples(tmp_path / "one.png", {0: images}, classes, (images, classes))
    two, one = (matplotlib.image.imread(tmp_path / name) for name in ("two.png", "one.png"))
    assert two.shape[0] == one.shape[0]
    assert abs(two.shape[1] / one.shape[1] - 3 / 2) < 0.01


def test_the_pixels_of_a_picture_are_those_of_the_images(tmp_path: Path) -> None:
    ink, paper = flat_images(*[1.0] * 10), flat_images(*[-1.0] * 10)
    classes = torch.arange(10)
    save_samples(tmp_path / "s.png", {0: ink}, classes, (paper, classes), columns=1)
    picture = matplotlib.image.imread(tmp_path / "s.png")[..., :3].mean(-1)
    wide = picture.shape[1]
    # The heading lies above; below it, the left half is the epoch's and the right one the real.
    left, right = picture[80:, : wide // 2], picture[80:, wide // 2 :]
    assert left.min() < 0.2
    assert right.min() > 0.9


def test_curves_are_drawn_even_for_a_single_epoch(tmp_path: Path) -> None:
    save_curves(tmp_path / "c.png", {"critic": [1.3], "generator": [0.7]}, [9.0, 3.0], floor=0.2)
    assert matplotlib.image.imread(tmp_path / "c.png").shape[:2] == (504, 1320)
