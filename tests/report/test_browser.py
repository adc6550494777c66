"""The script of the page, in a real browser; skipped where there is none."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from composefit import report
from composefit.history import History
from composefit.report.numbers import number

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
pytestmark = [
    pytest.mark.skipif(BROWSER is None, reason="needs chromium"),
    pytest.mark.xdist_group("browser"),
]

VALUES = [1.0, 0.25, 123456.0, -3e-7, 0.001, 99999.4, 1e300, 5e-324, float("inf"), float("nan")]
HOLE = 60


def opened(path: Path, profile: Path) -> str:
    """The page's HTML after its scripts have run."""
    assert BROWSER is not None
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
    done = subprocess.run(
        [BROWSER, *options, "--dump-dom", path.as_uri()],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def with_script(path: Path, script: str) -> Path:
    """A copy of a page that runs a test's script as well, which the page's policy forbids."""
    text = path.read_text(encoding="utf-8")
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    copy = path.with_suffix(".test.html")
    copy.write_text(text.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    return copy


class Legend(HTMLParser):
    """The values that the page shows beside the names of its curves."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.values: list[str] = []
        self._inside = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag == "b"

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.values.append(data)
            self._inside = False


@pytest.fixture
def page(tmp_path: Path) -> Path:
    history = History()
    for step in range(100):
        metrics = {f"constant/{i}": value for i, value in enumerate(VALUES)}
        loss = float("nan") if step == HOLE else float(step)
        history.log_metrics({"loss": loss, "epoch": step // 10, **metrics}, step)
    return report.write(tmp_path / "report.html", history)


def test_the_pages_own_script_runs_under_its_policy(page: Path, tmp_path: Path) -> None:
    assert '<label id="smoothing" hidden>' in page.read_text(encoding="utf-8")
    assert '<label id="smoothing">' in opened(page, tmp_path / "profile")


def test_the_policy_stops_every_other_script(page: Path, tmp_path: Path) -> None:
    text = page.read_text(encoding="utf-8")
    intruder = "<script>document.title = 'intruded'</script><img src=x onerror='document.title=1'>"
    page.write_text(text.replace("</body>", f"{intruder}</body>"), encoding="utf-8")
    assert "<title>Training</title>" in opened(page, tmp_path / "profile")


def test_the_pointer_reads_the_values_of_the_nearest_step(page: Path, tmp_path: Path) -> None:
    script = """
        const plot = document.querySelector(".plot"), box = plot.getBoundingClientRect();
        const at = { clientX: box.left + (box.width * 42.4) / 99, clientY: box.top + 5 };
        plot.dispatchEvent(new PointerEvent("pointermove", at));
    """
    html = opened(with_script(page, script), tmp_path / "profile")
    assert re.search(r'class="when">step 42 · epoch 4 · 0 s<', html)
    # Written by the script now, as the page wrote them itself before.
    assert Legend(html).values == ["42", *map(number, VALUES)]


def test_smoothing_is_an_exponential_mean_without_a_bias_to_zero(
    page: Path, tmp_path: Path
) -> None:
    script = """
        const slider = document.querySelector("#smoothing input");
        slider.value = 0.9;
        slider.dispatchEvent(new Event("input"));
    """
    html = opened(with_script(page, script), tmp_path / "profile")
    path = re.search(r'<path class="smooth [^"]*" data-curve="0" d="([^"]*)"', html)
    low, high = (float(re.findall(rf'data-{end}="([^"]+)"', html)[0]) for end in ("low", "high"))
    assert path is not None
    drawn = {int(x): float(y) for x, y in re.findall(r"[ML](\d+) ([\d.]+)", path[1])}
    assert len(drawn) == 99
    for step in set(range(100)) - {HOLE}:
        weights = {i: 0.9 ** (step - i - (i < HOLE < step)) for i in range(step + 1) if i != HOLE}
        mean = sum(w * i for i, w in weights.items()) / sum(weights.values())
        expected = 600 * (1 - (mean - low) / (high - low))
        assert drawn[round(1200 * step / 99)] == pytest.approx(expected, abs=0.051)
