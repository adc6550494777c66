"""The ruler that the GAN is measured with."""

import pytest
import torch

from composefit.demo.digits import batches, real_digits
from composefit.demo.frechet import frechet_distance
from composefit.demo.measure import Ruler, picture_epochs
from composefit.demo.models import Classifier


def test_the_floor_is_one_half_of_the_digits_against_the_other() -> None:
    images, classifier = torch.rand(41, 1, 8, 8), Classifier()
    ruler = Ruler(classifier, images)
    features = classifier.features(images).detach()
    assert ruler.floor == pytest.approx(frechet_distance(features[:20], features[20:]))
    assert ruler.size == 21


def test_the_reference_itself_measures_nothing_and_other_images_more_than_the_floor() -> None:
    images = torch.rand(400, 1, 8, 8)
    ruler = Ruler(Classifier(), images)
    assert ruler.measure(images[:200]).distance == pytest.approx(0, abs=1e-8)
    assert ruler.measure(-images[200:]).distance > 10 * ruler.floor


def test_classes_without_an_image_are_counted_as_zero() -> None:
    classifier = Classifier()
    with torch.no_grad():
        classifier.head.bias[3] += 1e3
    assert Ruler(classifier, torch.rand(10, 1, 8, 8)).real.counts == [0, 0, 0, 5] + [0] * 6


@pytest.mark.parametrize("epochs", [1, 2, 3, 10, 64, 1000])
def test_pictures_are_kept_of_the_first_and_the_last_epoch(epochs: int) -> None:
    kept = picture_epochs(epochs)
    assert kept[0] == 0
    assert kept[-1] == epochs
    assert len(kept) <= 6


def test_the_halves_of_the_digits_differ_by_chance_alone() -> None:
    pixels = real_digits()[0].flatten(1)
    ours = frechet_distance(pixels[:898], pixels[898:])
    by_chance = []
    for _ in range(20):
        mixed = pixels[torch.randperm(len(pixels))]
        by_chance.append(frechet_distance(mixed[:898], mixed[898:]))
    assert ours < 1.2 * max(by_chance)  # in the order of the file, by writers: three times as much


def test_the_loader_shuffles_anew_in_each_epoch_and_alike_for_the_same_seed() -> None:
    images, labels = torch.arange(20.0), torch.arange(20)
    one, other = (batches(images, labels, batch_size=20, seed=5) for _ in range(2))
    (first,), (second,) = list(one), list(one)
    (again,) = list(other)
    assert not torch.equal(first[0], second[0])
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[0].long(), first[1])
