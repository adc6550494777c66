"""How messages name a module or what belongs to it."""

from torch import nn


def path_of(owner: nn.Module, module: nn.Module, name: str = "") -> str:
    """The qualified name of a module in its owner's tree, or of something that it holds."""
    paths = (path for path, found in owner.named_modules() if found is module)
    return ".".join(filter(None, (next(paths, type(module).__name__), name))) or "the module"
