"""The pages of a run and of a sweep in a headless Chromium, on a phone and a desk, light and dark."""

import json
import re
import shutil
import subprocess
from html import escape

import pytest

from lightning_compress.report import page
from lightning_compress.report.sweep import compare
from lightning_compress.report.sweep_jobs import read_jobs
from lightning_compress.report.sweep_page import write_page
from tests.report.test_page import FACTS, with_blocks
from tests.support.sweep_folders import summary_of, write_job

pytestmark = pytest.mark.browser

# Colours are as painted: of the nearest ancestor that has a background.
PROBE = """
<script>
const luminance = colour => {
  const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3)
    .map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const background = node => {
  for (; node; node = node.parentElement) {
    const colour = getComputedStyle(node).backgroundColor;
    if (!/, 0\\)$|transparent/.test(colour)) return colour;
  }
  return "rgb(255, 255, 255)";
};
const contrast = node => {
  const style = getComputedStyle(node);
  const pair = [luminance(node.ownerSVGElement ? style.fill : style.color), luminance(background(node))].sort();
  return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
};
const texts = [...document.querySelectorAll("body *")].filter(node => !["SCRIPT", "title"].includes(node.tagName)
  && [...node.childNodes].some(child => child.nodeType == 3 && child.data.trim()));
const charts = [...document.querySelectorAll("svg.chart")].map(svg => {
  const frame = svg.getBoundingClientRect();
  const inside = [...svg.querySelectorAll("text, circle, line.error")].map(node => node.getBoundingClientRect());
  return {
    width: frame.width, height: frame.height, points: svg.querySelectorAll("circle").length,
    letters: Math.min(...[...svg.querySelectorAll("text")].map(node => node.getBoundingClientRect().height)),
    outside: inside.filter(box => box.left < frame.left - 1 || box.right > frame.right + 1 || box.top < frame.top - 1
      || box.bottom > frame.bottom + 1).length,
  };
});
const low = texts.map(node => [contrast(node), node.textContent.trim().slice(0, 30)]).sort((a, b) => a[0] - b[0])[0];
top.document.title = JSON.stringify({
  wide: document.documentElement.scrollWidth, inner: innerWidth, charts, low, texts: texts.length,
  header: Math.max(...[...document.querySelectorAll("th")].map(cell => cell.offsetHeight)),
});
</script>
"""


@pytest.fixture
def pages(tmp_path):
    """A run of 20 modules and blocks; a sweep of four jobs and one that failed."""
    page.write(tmp_path / "run", with_blocks(20), FACTS)
    for name, job in enumerate([(2**21, 5.25), (2**20, 5.5), (2**20 + 9000, 5.75), (2**21 + 2**19, 5.125)]):
        write_job(tmp_path / "sweep" / str(name), [f"+compress=recipe_{name}"], summary_of(*job))
    write_job(tmp_path / "sweep" / "4", ["+compress=a_recipe_with_a_long_name"])
    write_page(compare(read_jobs(tmp_path / "sweep")), tmp_path / "sweep" / "sweep.html")
    return {"run": tmp_path / "run" / "index.html", "sweep": tmp_path / "sweep" / "sweep.html"}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("name", ["run", "sweep"])
def test_a_browser_draws_it_readable_and_without_scrolling_sideways(pages, tmp_path, name, width, scheme):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium on this machine")
    probed = escape(pages[name].read_text().replace("</body>", PROBE + "</body>"))
    file = tmp_path / "probed.html"  # in a frame, as no window of the browser is narrower than 500 pixels
    file.write_text(f'<title></title><iframe style="width: {width}px; height: 900px; border: 0" srcdoc="{probed}">')
    call = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,900"]
    call += ["--force-dark-mode"] if scheme == "dark" else []
    dumped = subprocess.run([*call, "--dump-dom", f"file://{file}"], capture_output=True, text=True, timeout=120)
    measured = json.loads(re.search(r"<title>(\{.*?\})</title>", dumped.stdout, re.DOTALL)[1])
    assert measured["inner"] == width
    assert measured["wide"] <= width
    assert measured["header"] < 80  # words are not broken letter by letter
    assert measured["texts"] > 30
    assert measured["low"][0] >= 4.5, measured["low"]  # as WCAG 2.1 asks for small text
    points = {"run": 20, "sweep": 4}
    assert [chart["points"] for chart in measured["charts"]] == [points[name]]
    for chart in measured["charts"]:
        assert 300 < chart["width"] <= width
        assert chart["height"] > 100
        assert chart["letters"] >= 9
        assert chart["outside"] == 0
    picture = tmp_path / "page.png"
    subprocess.run([*call, f"--screenshot={picture}", f"file://{file}"], capture_output=True, timeout=120, check=True)
    assert picture.stat().st_size > 10_000
