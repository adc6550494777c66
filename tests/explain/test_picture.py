"""The picture: well-formed, to scale, of no other file, whatever strings are in it."""

import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from composefit import Distributed, SingleDevice, Strategy, ThreadDataParallel, Trainer
from composefit.explain import Barrier, Part, Plan, Span
from composefit.explain.picture import LEFT, RIGHT, WIDTH
from tests.explain.steps import GAN, Contrastive, Everything

SVG = "{http://www.w3.org/2000/svg}"


def barrier(label: str, start: float, end: float, line: int = 1) -> Barrier:
    return Barrier("Update", label, "user.py", line, False, (), 0, (), None, start, end)


def plan(barriers: tuple[Barrier, ...], lanes: int = 2, **more: object) -> Plan:
    """Two shards in each lane, one after the other, of 4 ms each; 10 ms in all."""
    parts = tuple(Part(2 * i + j, i, j, 4) for i in range(lanes) for j in range(2))
    spans = tuple(
        Span(part.index, part.lane, kind, start + 4 * part.batch, start + 2 + 4 * part.batch, 0)
        for part in parts
        for kind, start in (("forward", 0.0), ("backward", 2.0))
    )
    found = Plan(
        module="GAN",
        strategy="threads",
        step=0,
        ranks=1,
        lanes=lanes,
        concurrent=True,
        sharded=False,
        device="cpu",
        precision="32",
        accumulate=2,
        microbatch=None,
        parts=parts,
        barriers=barriers,
        spans=spans,
        ready=0.0,
        duration=10.0,
        resident=100,
        peak=200,
    )
    return replace(found, **more)  # type: ignore[arg-type]


def blocks(svg: str) -> list[tuple[float, float]]:
    """Where the shards' blocks begin, and how wide they are."""
    found = [e for e in ET.fromstring(svg).iter(f"{SVG}rect") if e.find(f"{SVG}title") is not None]
    shards = [e for e in found if (e.findtext(f"{SVG}title") or "").startswith("shard")]
    return [(float(e.attrib["x"]), float(e.attrib["width"])) for e in shards]


def test_shards_are_to_scale_on_one_axis_of_time() -> None:
    svg = plan((barrier("critic", 8.0, 10.0),)).svg()
    per_ms = (RIGHT - LEFT) / 10
    expected = [(LEFT + t * per_ms, 2 * per_ms) for t in (0, 2, 4, 6)] * 2
    assert sorted(blocks(svg)) == [pytest.approx(one, abs=0.02) for one in sorted(expected)]


def test_a_barrier_lies_across_all_lanes_for_as_long_as_it_took() -> None:
    svg = plan((barrier("critic", 8.0, 9.5),), lanes=3).svg()
    boxes = list(ET.fromstring(svg).iter(f"{SVG}rect"))
    (band,) = (e for e in boxes if e.get("class") == "band teal")
    per_ms = (RIGHT - LEFT) / 10
    assert float(band.attrib["x"]) == pytest.approx(LEFT + 8 * per_ms, abs=0.1)
    assert float(band.attrib["width"]) == pytest.approx(1.5 * per_ms, abs=0.1)
    tracks = [e for e in boxes if e.get("class") == "track"]
    tops = [float(e.attrib["y"]) for e in tracks if float(e.attrib["width"]) > 100]
    assert float(band.attrib["y"]) <= min(tops)
    assert float(band.attrib["y"]) + float(band.attrib["height"]) >= max(tops) + 40


@pytest.mark.parametrize(
    "strategy",
    [
        SingleDevice("cpu"),
        SingleDevice("cpu", shards=3),
        ThreadDataParallel(2),
        Distributed(2, "cpu"),
    ],
)
@pytest.mark.parametrize("module", [GAN, Contrastive, Everything])
def test_pictures_of_measured_steps_show_every_effect_and_load_nothing(
    module: type[GAN], strategy: Strategy
) -> None:
    trainer = Trainer(strategy=strategy, seed=0, accumulate_grad_batches=2)
    found = trainer.explain(module(), torch.randn(8, 3), show=False)
    svg = found.svg()
    root = ET.fromstring(svg)
    texts = [e.text for e in root.iter(f"{SVG}text")]
    assert {b.label for b in found.barriers} <= set(texts)
    assert root.get("viewBox", "").startswith(f"0 0 {WIDTH} ")
    assert "prefers-color-scheme: dark" in svg
    assert not re.search(r"href|<script|<image|@import|url\((?!#wait)", svg)
    assert re.findall(r"https?://[^\"]+", svg) == ["http://www.w3.org/2000/svg"]


def test_strings_of_the_user_are_escaped() -> None:
    evil = '</text><script>alert("1")</script>&\x00\ud800'
    one = barrier(evil, 8.0, 9.0)
    svg = plan((one,), module=evil, strategy=evil, notes=(evil,)).svg()
    root = ET.fromstring(svg.encode())
    assert not list(root.iter(f"{SVG}script"))
    assert any("<script>" in (e.text or "") for e in root.iter(f"{SVG}text"))


def test_names_side_by_side_do_not_lie_on_one_another() -> None:
    crowded = tuple(barrier(f"optimizer {i}", 5 + i / 10, 5 + i / 10) for i in range(4))
    svg = plan(crowded).svg()
    chips = [e for e in ET.fromstring(svg).iter(f"{SVG}rect") if e.get("height") == "18"]
    boxes = [(float(e.attrib["x"]), float(e.attrib["y"]), float(e.attrib["width"])) for e in chips]
    assert len(boxes) == 4
    for i, (x, y, wide) in enumerate(boxes):
        for other_x, other_y, other_wide in boxes[i + 1 :]:
            assert y != other_y or x + wide <= other_x or other_x + other_wide <= x


def test_of_very_many_effects_numbers_stand_for_lines_of_the_step() -> None:
    many = tuple(barrier(f"name {i % 3}", i / 10, i / 10, line=i % 3) for i in range(60))
    svg = plan(many).svg()
    texts = [e.text or "" for e in ET.fromstring(svg).iter(f"{SVG}text")]
    assert "2 · update of name 1 at user.py:1, 20 times" in texts
    assert not any(text.startswith("name") for text in texts)


def test_names_that_are_too_long_end_in_dots() -> None:
    svg = plan((barrier("n" * 300, 8.0, 9.0),)).svg()
    texts = [e.text or "" for e in ET.fromstring(svg).iter(f"{SVG}text")]
    assert max(map(len, texts)) < 150
    assert any(text.startswith("nnn") and text.endswith("…") for text in texts)


@pytest.mark.parametrize("lanes", [1, 8, 64])
def test_any_number_of_lanes_has_its_place(lanes: int) -> None:
    root = ET.fromstring(plan((barrier("critic", 8.0, 10.0),), lanes=lanes).svg())
    height = float(root.attrib["height"])
    assert all(
        float(e.attrib["y"]) + float(e.attrib["height"]) <= height for e in root.iter(f"{SVG}rect")
    )
    assert len(blocks(ET.tostring(root, encoding="unicode"))) == 4 * lanes


def test_it_is_saved_as_it_is_drawn(tmp_path: Path) -> None:
    one = plan((barrier("critic", 8.0, 10.0),))
    path = one.save(tmp_path / "folder" / "step.svg")
    assert path.read_text("utf-8") == one.svg()
