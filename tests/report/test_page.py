import base64
import hashlib
import json
import math
import os
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from composefit import report
from composefit.history import History
from composefit.images import Image
from composefit.report.data import unpacked

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><script>alert(2)</script>",
    '"><img src=x onerror=alert(3)>',
    "' onmouseover='alert(4)",
    "</title></style><!-- & &amp; &#60;b&#62; -->",
    "{{x}} \\u003cb\\u003e \u2028 \u202e",
    "javascript:alert(5)",
]


class Page(HTMLParser):
    """What a reader of the page's HTML finds in it."""

    EMPTY = frozenset({"meta", "img", "input", "path"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self.open[-1] if self.open else "", []).append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")

    def all(self, tag: str, kind: str = "") -> list[dict[str, str | None]]:
        """The attributes of the elements of a tag, and of a class."""
        found = (attributes for name, attributes in self.elements if name == tag)
        return [one for one in found if not kind or kind in (one.get("class") or "").split()]

    @property
    def text(self) -> str:
        visible = (text for tag, texts in self.texts.items() if tag != "script" for text in texts)
        return "\n".join(visible)

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.texts["script"][0])  # type: ignore[no-any-return]


def history(**curves: list[float]) -> History:
    made = History()
    for name, values in curves.items():
        for step, value in enumerate(values):
            made.log_metrics({name: value, "epoch": step // 10}, step)
    return made


def write(tmp_path: Path, made: History, *arguments: Any, **named: Any) -> Page:
    return Page(report.write(tmp_path / "report.html", made, *arguments, **named))


# -- nothing of what is written is run or loaded -----------------------------------------------


@pytest.mark.parametrize("text", HOSTILE)
def test_text_in_any_field_is_shown_and_not_obeyed(text: str, tmp_path: Path) -> None:
    def fill(text: str) -> Page:
        made = history(**{text: [1.0, 2.0], f"lr/{text}": [1.0], f"{text}_loss": [math.nan]})
        made.log_image(text, Image(torch.rand(2, 2), caption=text), 1)
        made.finalize(text)
        settings = {"trainer": {text: text, "list": [text]}, "optimizers": {text: {text: text}}}
        return write(tmp_path, made, settings | {text: {text: text}}, {text: text}, title=text)

    page, harmless = fill(text), fill("harmless")
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in harmless.elements]
    for (_, there), (_, expected) in zip(page.elements, harmless.elements, strict=True):
        assert there.keys() == expected.keys()
    assert page.text.count(text) == harmless.text.count("harmless")
    assert text in [curve["name"] for curve in page.data["curves"]]


def test_a_page_loads_nothing(tmp_path: Path) -> None:
    made = history(loss=[1.0, 2.0])
    made.log_image("p", Image(torch.rand(2, 2)), 1)
    page = write(tmp_path, made, {"trainer": {"max_epochs": 3}}, report.environment())
    assert not re.search(r"https?:|//cdn|@import|url\(|@font-face", page.source)
    loading = {"src", "href", "srcset", "data", "action", "poster", "background", "xlink:href"}
    targets = [
        str(value) for _, attrs in page.elements for name, value in attrs.items() if name in loading
    ]
    assert targets
    assert all(target.startswith(("#s", "data:image/png;base64,")) for target in targets)
    assert page.all("link") == page.all("iframe") == page.all("object") == []


def test_the_policy_of_the_page_lets_its_own_script_run_alone(tmp_path: Path) -> None:
    page = write(tmp_path, history(loss=[1.0]))
    (policy,) = (str(one["content"]) for one in page.all("meta") if "http-equiv" in one)
    _, script = page.texts["script"]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none';")
    assert not any(name.startswith("on") for _, attrs in page.elements for name in attrs)


def test_text_without_bytes_or_glyphs_can_be_written(tmp_path: Path) -> None:
    page = write(tmp_path, history(**{"a\0b\ud800": [1.0]}))
    assert "\0" not in page.source
    assert page.data["curves"][0]["name"] == "a\0b\ud800"


def test_secrets_among_the_settings_are_not_shown(tmp_path: Path) -> None:
    settings = {
        "hyperparameters": {
            "wandb": {"api_key": "s3cret-1"},
            "password": "s3cret-2",
            "database": "db://me:s3cret-3@host/x",
            "tokenizer": "shown",
        }
    }
    page = write(tmp_path, history(loss=[1.0]), settings)
    assert "s3cret" not in page.source
    assert "shown" in page.text
    assert "wandb.api_key" in page.text


# -- the numbers -------------------------------------------------------------------------------


def test_embedded_numbers_are_the_historys(tmp_path: Path) -> None:
    random.seed(0)
    made = History(limit=64)
    for step in range(300):
        metrics = {
            "double": random.random(),
            "single": float(torch.rand(())),
            "bad": [math.nan, math.inf, -math.inf, 0.1][step % 4],
            "large": 1e300 * random.random(),
            "epoch": step // 30,
        }
        made.log_metrics(metrics, step * 10)
    page = write(tmp_path, made)
    columns = [unpacked(text) for text in page.data["columns"]]
    curves = {curve["name"]: curve for curve in page.data["curves"]}
    assert list(curves) == ["double", "single", "bad", "large"]
    for name, (steps, values) in made.curves().items():
        there = {kind: columns[curves[name][kind]].tolist() for kind in ("step", "epoch", "value")}
        assert there["step"] == steps.tolist()
        assert there["epoch"] == made.tracks[name].column("epoch").tolist()
        assert repr(there["value"]) == repr(values.tolist())
    assert page.data["columns"][curves["single"]["value"]].startswith("f4 ")
    assert page.data["x"] == [0, 2990]


def test_the_head_of_the_page_tells_how_a_run_ended(tmp_path: Path) -> None:
    made = history(loss=[0.5] * 1999 + [0.123456], val_loss=[3.0])
    made.finalize("failed")
    made._before = 4980.0
    page = write(tmp_path, made, title="digits")
    assert page.texts["title"] == page.texts["h1"] == ["digits"]
    terms = dict(zip(page.texts["dt"], page.texts["dd"], strict=True))
    assert terms == {
        "duration": "1 h 23 min",
        "steps": "1,999",
        "epochs": "200",
        "loss": "0.1235",
        "val_loss": "3",
    }
    (status,) = page.all("span", "status")
    assert status["class"] == "status failed"


def test_the_table_tells_last_lowest_and_highest_of_each_metric(tmp_path: Path) -> None:
    made = history(a=[2.0, math.nan, -1.0, 5.0, 3.0], b=[math.nan])
    page = write(tmp_path, made)
    assert page.texts["td"] == ["3", "-1 ", "5 ", "5", "NaN", "none", "none", "1"]
    assert page.texts["small"] == ["at 2", "at 3"]


def test_settings_and_environment_are_shown(tmp_path: Path) -> None:
    settings = {
        "trainer": {"max_epochs": 3, "callbacks": ["EMA(decay=0.9)", "Stop()"]},
        "optimizers": {"critic": {"lr": 0.1, "nested": {"deep": {"er": None}}}},
        "seed": 7,
    }
    page = write(tmp_path, history(loss=[1.0]), settings, {"python": "3.11"})
    terms = dict(zip(page.texts["dt"], page.texts["dd"], strict=True))
    assert terms["callbacks"] == "EMA(decay=0.9), Stop()"
    assert terms["nested.deep.er"] == "None"
    assert (terms["max_epochs"], terms["seed"], terms["python"]) == ("3", "7", "3.11")
    assert page.texts["h3"] == ["loss", "trainer", "optimizers · critic"]


def test_pictures_are_in_the_page(tmp_path: Path) -> None:
    image = Image(torch.rand(3, 4, 5), caption="four by five")
    made = history(loss=[1.0])
    made.log_image("samples", image, 12)
    page = write(tmp_path, made)
    (there,) = page.all("img")
    kind, _, data = str(there["src"]).partition(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(data) == image.png()
    assert there["alt"] == "four by five"


# -- edges -------------------------------------------------------------------------------------


def test_a_history_of_nothing_makes_a_page(tmp_path: Path) -> None:
    page = write(tmp_path, History())
    assert "Nothing was logged." in page.text
    assert page.all("svg") == []


def test_one_point_makes_a_plot(tmp_path: Path) -> None:
    made = History()
    made.log_metrics({"loss": 0.25}, 0)
    page = write(tmp_path, made)
    (plot,) = page.all("div", "plot")
    assert float(str(plot["data-low"])) < 0.25 < float(str(plot["data-high"]))
    (dot,) = page.all("path", "dots")
    assert re.fullmatch(r"M0 \d+h0", str(dot["d"]))


def test_fifty_metrics_of_two_thousand_points_stay_below_three_megabytes(tmp_path: Path) -> None:
    random.seed(0)
    made = History()
    for step in range(2000):
        made.log_metrics({f"metric {i}": 1 + 1e3 * random.random() for i in range(50)}, step)
    path = report.write(tmp_path / "report.html", made)
    assert path.stat().st_size < 3e6
    assert len(Page(path).all("figure", "chart")) == 50


def test_a_report_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "runs" / "report.html"  # folders are made
    before = report.write(path, history(loss=[1.0])).read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            report.write(path, history(loss=[2.0]))
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["report.html"]
