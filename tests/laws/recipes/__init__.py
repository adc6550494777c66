"""All recipes, by name."""

from tests.laws.recipe import Recipe
from tests.laws.recipes import (
    adversarial,
    contrastive,
    distillation,
    gradients,
    language,
    layers,
    supervised,
)

RECIPES: dict[str, Recipe] = {
    **supervised.RECIPES,
    **language.RECIPES,
    **adversarial.RECIPES,
    **contrastive.RECIPES,
    **distillation.RECIPES,
    **layers.RECIPES,
    **gradients.RECIPES,
}
