"""report.html, as a browser shows and prints it."""

import json
import re
import shutil
import subprocess
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image
from runs import PICTURES, SETTINGS, run
from shards import encoded, pack

from clipfix.results.compare import compare
from clipfix.results.compare.results import read

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
browser = pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on PATH")
PHONE = 390  # css pixels across

# A page of a phone's width around the report: a headless window does not get that narrow. It says what it saw.
FRAME = f"""<body><iframe id=f src=report.html width={PHONE} height=800 style="border: 0"></iframe><script>
const frame = document.getElementById("f");
frame.onload = () => {{
  const page = frame.contentDocument, told = document.createElement("pre");
  told.textContent = "told:" + JSON.stringify({{
    across: frame.contentWindow.innerWidth,
    needed: page.documentElement.scrollWidth,
    images: [...page.images].map(image => image.naturalWidth),
    boxed: [...page.querySelectorAll("table")].map(table => table.parentElement.scrollWidth > 0
      && getComputedStyle(table.parentElement).overflowX == "auto"),
    fetched: frame.contentWindow.performance.getEntriesByType("resource").map(one => one.name)
      .filter(name => !name.startsWith("data:")),
  }}) + ":end";
  document.body.append(told);
}};
</script>"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The report of two groups, with pictures from a real shard."""
    root = tmp_path_factory.mktemp("compared")
    samples = {
        f"{i:06d}": {
            "png": encoded(Image.new("RGB", (40, 40), (6 * i, 90, 200))),
            "txt": "short",
            "json": {"long": f"Picture {i}. A caption with a verylongwordthatdoesnotbreakbyitself{'x' * 60} in it."},
        }
        for i in range(PICTURES)
    }
    shard = str(pack(root / "test-00000.tar", samples))
    settings = SETTINGS | {"retrieval_long": SETTINGS["retrieval_long"] | {"shards": shard}}
    for seed in range(2):
        run(root / f"diva{seed}", seed=seed, benchmarks=settings)
        run(root / f"off{seed}", after=0.5, seed=seed, control="shuffled", benchmarks=settings)
    out = root / "out"
    told = {"benchmark": "pairs", "metric": "mean", "method": "diva", "backbone": "tiny", "by": "<DIVA>"}
    told |= {"before": None, "after": 25.9, "source": "2407.20171", "verified": True}
    results = [str(root / "diva*"), str(root / "off*")]
    pictures = compare(out, 0, [told], results, "pairs/mean", "zeroshot", 100, 0.95, examples=4)
    assert [path.stem for path in pictures] == ["radar", "forgetting", "lengths", "examples"]
    return out


def test_it_is_one_file_with_the_numbers_of_the_files(folder):
    page = (folder / "report.html").read_text()
    assert not re.search(r"<script|<link (?!rel=\"icon\")|@import|url\(", page)
    assert all(target.startswith("data:") for target in re.findall(r"(?:src|href)=\"([^\"]*)\"", page))
    results = [read(path) for path in sorted(folder.parent.glob("diva*/results.json"))]
    (row,) = re.findall(r"<th scope=\"row\" class=\"first\">retrieval long</th>(.*?)</tr>", page, re.DOTALL)
    told = [re.sub(r"<[^>]*>", "", cell).strip() for cell in re.findall(r"<td.*?</td>", row, re.DOTALL)]
    mean = sum(result.change("retrieval_long/mean") for result in results) / 2
    assert told[0] == f"{results[0].before['retrieval_long/mean']:.1f}"
    assert told[1].startswith(f"{mean:+.1f} ± ")
    assert len(told) == 1 + 2 * 2 + 2 + 1
    assert "&lt;DIVA&gt; <b>25.9</b>" in page
    assert ">0123456789 dirty<" in page  # the commit
    assert ">fedcba9876 ba98765432<" in page  # the weights, before and after
    assert "aa11" in page  # the data's hash


def test_examples_are_pictures_whose_rank_rose_and_fell(folder):
    page = (folder / "report.html").read_text()
    shown = re.findall(r"Picture (\d+)\. A caption", page.split('class="card example"', 1)[1])
    ranks = []
    for side in ("outcomes_before", "outcomes_after"):
        seeds = [
            getattr(read(path), side)["retrieval_long"]["image_to_text"].ranks
            for path in sorted(folder.parent.glob("diva*/results.json"))
        ]
        ranks.append((seeds[0] + seeds[1]) / 2)  # the median of two
    factor = [after / before for before, after in zip(*ranks, strict=True)]
    for n, picture in enumerate(dict.fromkeys(map(int, shown))):
        assert factor[picture] == pytest.approx(sorted(factor)[n] if n < 2 else sorted(factor)[-1 - (n - 2)])
    with Image.open(folder / "examples.png") as image:
        assert min(image.size) > 200


@browser
def test_on_a_phone_nothing_overflows_every_picture_shows_and_nothing_is_fetched(folder, tmp_path):
    (folder / "frame.html").write_text(FRAME)
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}/frame.html"
        dom = chromium(tmp_path, "--virtual-time-budget=10000", "--dump-dom", address)
    finally:
        server.shutdown()
    told = json.loads(dom.split("<pre>told:", 1)[1].split(":end", 1)[0].replace("&gt;", ">").replace("&amp;", "&"))
    assert told["across"] == PHONE
    assert told["needed"] <= PHONE
    assert len(told["images"]) == 3 + 4
    assert min(told["images"]) > 0
    assert told["boxed"] == [True] * 3
    assert told["fetched"] == []


@browser
def test_print_gives_pages_of_paper_with_the_tables(folder, tmp_path):
    printed = tmp_path / "report.pdf"
    chromium(tmp_path, "--no-pdf-header-footer", f"--print-to-pdf={printed}", (folder / "report.html").as_uri())
    content = printed.read_bytes()
    boxes = re.findall(rb"/MediaBox ?\[0 0 ([\d.]+) ([\d.]+)\]", content)
    assert 2 <= len(boxes) <= 8
    assert {(round(float(width)), round(float(height))) for width, height in boxes} == {(595, 842)}  # A4 in points
    assert len(re.findall(rb"/S ?/Table\b", content)) == 3


def chromium(folder: Path, *arguments: str) -> str:
    """What one start of the browser prints; whatever it would fetch on its own account is off."""
    assert BROWSER is not None
    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic"]
    alone = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={folder / 'profile'}"]
    command = [BROWSER, *alone, *quiet, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
