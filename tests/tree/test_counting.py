from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from composefit.tree import batch_size, cut
from tests.tree.values import Pair, Record


@pytest.mark.parametrize(
    ("batch", "paths"),
    [
        ({"image": [torch.zeros(4)], "label": torch.zeros(5)}, ['["image"][0]', '["label"]', "45"]),
        ([torch.zeros(4, 2), torch.zeros(5)], ["[0]", "[1]", "45"]),
        (Pair(torch.zeros(4), {"a": np.zeros(5)}), [".x", '.y["a"]', "45"]),
        (Record(torch.zeros(4), torch.zeros(5)), [".x", ".y", "45"]),
        ((torch.zeros(4), {7: torch.zeros(5)}), ["[0]", "[1][7]", "45"]),
        ({"x": torch.zeros(4), "n": ["a", "b"]}, ['["x"]', '["n"]', "42"]),
        ({"n": [1, 2], "x": torch.zeros(4)}, ['["n"]', '["x"]', "24"]),
        ({"x": torch.zeros(4), "size": (224, 224)}, ['["x"]', '["size"]', "42"]),
        ({"x": torch.zeros(4), "meta": [{"id": 1}]}, ['["x"]', '["meta"]', "41"]),
        ({"x": torch.zeros(4), "s": [torch.tensor(1)] * 3}, ['["x"]', '["s"]', "43"]),
        ({"x": torch.zeros(4), "r": [torch.zeros(5), torch.zeros(6)]}, ['["x"]', '["r"]', "42"]),
        ({"x": torch.zeros(4), "m": [{"b": torch.zeros(5)}]}, ['["x"]', '["m"][0]["b"]', "45"]),
        (
            {"x": torch.zeros(4), "m": [[torch.zeros(3)] * 4, {"k": 1}]},
            ['["x"]', '["m"][0][0]', "43"],
        ),
        ({"y": torch.zeros(4), "x": [torch.zeros(3, 8)] * 4}, ['["y"]', '["x"][0]', "43"]),
        (
            (torch.zeros(4), [{"b": torch.zeros(5)}, {"b": torch.zeros(6)}]),
            ["[0]", "[1]", "42"],
        ),
    ],
)
def test_leaves_that_disagree_are_named_with_their_sizes(batch: Any, paths: list[str]) -> None:
    one, other, (size, other_size) = paths
    for function in (batch_size, lambda batch: cut(batch, [2, 2])):
        with pytest.raises(ValueError) as caught:
            function(batch)
        message = str(caught.value)
        assert f"batch{one} has {size} samples, but batch{other} has {other_size};" in message
        assert "LoopModule.scatter_batch" in message


@pytest.mark.parametrize("batch", [3, "text", {}, [], (None, 7), torch.tensor(1.0), Path("x")])
def test_batch_that_counts_no_samples_names_what_to_override(batch: Any) -> None:
    with pytest.raises(ValueError, match=r"dimension 0.*batch_size and LoopModule\.scatter_batch"):
        batch_size(batch)
