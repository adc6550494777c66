"""Draws `lockstep.svg`: the shards of one GAN step, on two threads, with two accumulated batches.

python docs/pictures/lockstep.py
"""

from dataclasses import dataclass
from pathlib import Path

WIDTH, HEIGHT = 1100, 522
SAMPLE = 14  # the width of one sample's time on a thread, at scale 1
LANES = (172, 290)  # the top of each thread's track
TRACK = 84
SEGMENTS = ((236, 2.8), (682, 2.2))  # where a segment of the step begins, and its scale
BARRIERS = (590, 976)  # the middle of each yield

STYLE = """
  svg { --panel: #fbfaf7; --line: #e2dfd7; --ink: #2c3138; --soft: #747a84; --track: #f1efe9;
        --first: #4f7396; --second: #b78a45; --critic: #2f6f6a; --generator: #85587a;
        --on: #ffffff; }
  @media (prefers-color-scheme: dark) {
    svg { --panel: #171a20; --line: #2d323b; --ink: #dde1e7; --soft: #959daa; --track: #1f232b;
          --first: #5d84aa; --second: #b98d4b; --critic: #4f9d95; --generator: #b07fa2; }
  }
  text { font: 14px ui-sans-serif, system-ui, "Segoe UI", Helvetica, Arial, sans-serif;
         fill: var(--ink); }
  .code { font: 13px ui-monospace, "SF Mono", "DejaVu Sans Mono", Menlo, Consolas, monospace; }
  .soft { fill: var(--soft); font-size: 13px; }
  .on { fill: var(--on); }
  .title { font-size: 17px; font-weight: 600; }
  .first { fill: var(--first); }
  .second { fill: var(--second); }
  .critic { fill: var(--critic); }
  .generator { fill: var(--generator); }
  .middle { text-anchor: middle; }
  .strong { font-weight: 600; }
  .thin { fill: none; stroke: var(--soft); stroke-width: 1.2; }
  .kept { fill: none; stroke: var(--second); stroke-width: 1.8;
          stroke-dasharray: 1 5; stroke-linecap: round; }
"""


@dataclass(frozen=True)
class Shard:
    """A part of a batch: where it runs, and how many samples it holds."""

    index: int
    lane: int
    batch: str  # which batch it is cut from, as a colour
    samples: int


SHARDS = (
    Shard(0, 0, "first", 4),
    Shard(1, 1, "first", 3),
    Shard(2, 0, "second", 3),
    Shard(3, 1, "second", 3),
)
WORLD = sum(shard.samples for shard in SHARDS)


def text(x: float, y: float, words: str, kind: str = "") -> str:
    """A line of text, of these classes."""
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{words}</text>'


def box(x: float, y: float, width: float, height: float, fill: str, corner: float = 7) -> str:
    """A filled rectangle."""
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{corner:g}" '
        f'fill="var(--{fill})"/>'
    )


def samples(x: float, y: float, shard: Shard) -> str:
    """A shard's samples as small squares."""
    return "".join(box(x + 15 * i, y, 12, 12, shard.batch, 2.5) for i in range(shard.samples))


def batches() -> str:
    """On the left: the two loader batches, cut over the threads."""
    parts = [
        text(128, 120, "batch 1", "strong first"),
        text(128, 138, "batch 2", "strong second"),
    ]
    for lane, top in enumerate(LANES):
        middle = top + TRACK / 2
        held = sum(shard.samples for shard in SHARDS if shard.lane == lane)
        parts.append(text(40, middle - 2, f"thread {lane + 1}", "strong"))
        parts.append(text(40, middle + 17, f"{held} samples", "soft"))
        parts.append(f'<path class="thin" d="M196 {middle:g} h18 m-5 -4 l5 4 l-5 4"/>')
    for shard in SHARDS:
        below = 6 if shard.batch == "second" else -18
        parts.append(samples(128, LANES[shard.lane] + TRACK / 2 + below, shard))
    return "".join(parts)


def block(shard: Shard, start: float, scale: float) -> tuple[float, float]:
    """Where a shard's block begins and how wide it is: it runs after those before it."""
    earlier = sum(s.samples for s in SHARDS if s.lane == shard.lane and s.index < shard.index)
    return start + earlier * SAMPLE * scale + (6 if earlier else 0), shard.samples * SAMPLE * scale


def end_of(start: float, scale: float) -> float:
    """Where a segment's tracks end: as long as the longest lane takes."""
    return start + 7 * SAMPLE * scale + 14


def segment(start: float, scale: float, code: tuple[str, ...]) -> str:
    """What runs between two barriers: in each lane one shard after the other."""
    parts = [text(start, 138 - 18 * i, line, "code") for i, line in enumerate(reversed(code))]
    for top in LANES:
        parts.append(box(start - 8, top, end_of(start, scale) - start + 8, TRACK, "track", 10))
    for shard in SHARDS:
        x, wide = block(shard, start, scale)
        top = LANES[shard.lane] + 12
        parts.append(box(x, top, wide, TRACK - 24, shard.batch))
        parts.append(text(x + wide / 2, top + 35, f"shard {shard.index}", "on middle"))
    return "".join(parts)


def barrier(x: float, before: float, after: float, name: str) -> str:
    """A yield: gradients come from every lane, the reduced loss goes back to every lane."""
    top, bottom = LANES[0] - 14, LANES[1] + TRACK + 14
    parts = [
        box(x - 8, top, 16, bottom - top, name, 8),
        text(x, 120, "yield", f"code middle strong {name}"),
        text(x, 138, f'{{"{name}": loss}}', f"code middle {name}"),
    ]
    for lane in LANES:
        middle = lane + TRACK / 2
        for begin, end in ((before + 5, x - 13), (x + 13, after - 13)):
            parts.append(
                f'<path class="thin" d="M{begin:g} {middle:g} H{end:g} m-5 -4 l5 4 l-5 4"/>'
            )
    for i, line in enumerate(("gradients weighted, added up", "in order, checked, clipped")):
        parts.append(text(x, bottom + 56 + 19 * i, line, "soft middle"))
    parts.append(text(x, bottom + 100, f"the {name} steps once", f"middle strong {name}"))
    return "".join(parts)


def kept() -> str:
    """Below the lanes: a shard's local variables live on across the yield."""
    y = LANES[1] + TRACK - 8
    (a, wide_a), (b, wide_b) = (block(SHARDS[3], *segment) for segment in SEGMENTS)
    begin, end = a + wide_a / 2, b + wide_b / 2
    return (
        f'<path class="kept" d="M{begin:g} {y:g} v32 q0 14 14 14 H{end - 14:g} q14 0 14 -14 v-32"/>'
        + text(BARRIERS[0] + 20, y + 38, "fake stays with its shard", "soft")
    )


def picture() -> str:
    """The whole picture, as SVG."""
    weights = ", ".join(f"{shard.samples}/{WORLD}" for shard in SHARDS)
    (first, second), (critic, generator) = SEGMENTS, BARRIERS
    body = [
        box(0.5, 0.5, WIDTH - 1, HEIGHT - 1, "panel", 16),
        f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="16" fill="none" '
        'stroke="var(--line)"/>',
        text(40, 48, "One step: its shards advance together, from yield to yield", "title"),
        text(
            40,
            72,
            "Two batches are cut over two threads (space), and accumulated (time). A shard counts "
            f"by its samples: {weights}.",
            "soft",
        ),
        batches(),
        segment(*first, ("fake = generator(noise)", "critic(real), critic(fake)")),
        barrier(critic, end_of(*first), second[0] - 8, "critic"),
        segment(*second, ("critic(fake)",)),
        barrier(generator, end_of(*second), 1060, "generator"),
        kept(),
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'aria-label="The shards of two batches run on two threads from yield to yield; at each '
        'yield their gradients are added up and one optimizer steps once">\n'
        f"<style>{STYLE}</style>\n" + "\n".join(body) + "\n</svg>\n"
    )


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(picture(), encoding="utf-8")
