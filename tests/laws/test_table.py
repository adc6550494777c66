"""The tables of `docs/laws.md`: whole, and what they say holds."""

from __future__ import annotations

import pytest

from tests.laws import table
from tests.laws.gallery_law import BOUND, PLACES, REDUCED, WHOLE, measured, reduced, whole
from tests.laws.recipes.gallery import FOLDER
from tests.ranks.pool import closing_pools

# In every run of the tests, in two ranks of either kind; all of them with `make laws`.
SAMPLE = ["WGAN-GP, fresh batches", "PCGrad", "SAM"]
RANKS = [place for place in PLACES if PLACES[place].ranks > 1]


@pytest.mark.parametrize(("name", "recipes"), [("reduced", REDUCED), ("whole", WHOLE)])
def test_page_has_a_row_for_every_recipe(name: str, recipes: dict[str, object]) -> None:
    assert table.rows(table.PAGE.read_text("utf-8"), name) == list(recipes)


def test_every_file_of_the_gallery_is_in_the_matrix() -> None:
    files = [path.stem for path in FOLDER.glob("[!_]*.py")]
    assert len(files) == len(REDUCED) - 1  # WGAN-GP is there twice


def test_table_is_written_between_its_marks_alone() -> None:
    page = "a\n<!-- t: made by make laws -->\nold\n<!-- end of t -->\nb\n"
    found = table.replaced(page, "t", {"x": {"c": 1.24e-15}}, ["c"])
    head, tail = "a\n<!-- t: made by make laws -->\n\n", "\n\n<!-- end of t -->\nb\n"
    assert found == f"{head}| recipe | c |\n|---|---|\n| x | 1e-15 |{tail}"
    assert table.replaced(found, "t", {"x": {"c": 1.24e-15}}, ["c"]) == found
    with pytest.raises(ValueError, match="marks of table 'other'"):
        table.replaced(page, "other", {}, [])


@pytest.mark.parametrize("place", RANKS)
def test_recipes_in_two_ranks_train_as_the_loop_by_hand(place: str) -> None:
    with closing_pools():
        assert max(measured(reduced, SAMPLE, place).values()) <= BOUND


@pytest.mark.parametrize("place", ["2 threads"])
@pytest.mark.parametrize("name", ["DCGAN", "diffusion"])
def test_whole_recipe_ends_where_one_device_does(name: str, place: str) -> None:
    assert whole(name, place) <= BOUND


@pytest.mark.full
@pytest.mark.parametrize("place", [place for place in PLACES if place != "one device"])
def test_every_whole_recipe_ends_where_one_device_does(place: str) -> None:
    with closing_pools():
        assert max(measured(whole, list(WHOLE), place).values()) <= BOUND
