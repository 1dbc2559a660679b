"""The page of a report: whole without JavaScript and network, safe, quick; and it is served."""

from __future__ import annotations

import builtins
import html
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from exported import in_process
from llm_coreml.errors import ConfigError, OutputError
from llm_coreml.eval.report.page import Sample, write_report
from llm_coreml.eval.results_file import append_result
from result_documents import document, write_failure

BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome")
BROWSER = next((found for name in BROWSERS if (found := shutil.which(name))), None)
NASTY = "</script><script>alert(1)</script>"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a dozen results, a regression, a damaged line and a failed cell among them."""
    folder = tmp_path_factory.mktemp("results") / "nightly"
    for at in range(12):
        bits, cost = (2, 4, 8)[at % 3], 2.4 - 0.1 * (at % 3) + (0.05 if at == 9 else 0.0)
        append_result(
            folder,
            document(
                f"run{at}",
                nll=(cost,) * 4,
                bits=bits,
                size=bits * 100,
                speed=40.0 / bits,
                target=("gpu", "ane")[at % 3 == 2],
                created=f"2026-01-{at + 1:02}T00:00:00Z",
            ),
        )
    append_result(folder, document(NASTY, model=NASTY, text=NASTY))
    with (folder / "results.jsonl").open("a") as lines:
        lines.write("{\n")
    write_failure(folder / "cell-1", NASTY, "It is refused.")
    return folder


@pytest.fixture(scope="module")
def page(results: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_report(results, path, "What is a list?", [Sample("a", "It is <b>."), Sample("b", "No.")])
    return path


class Reader(HTMLParser):
    """Counts elements, and collects what a page asks others for."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}
        self.asked: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        given = dict(attrs)
        self.asked += [str(given[name]) for name in ("src", "href") if name in given]


def without_scripts(page: Path) -> str:
    return re.sub(r"<script.*?</script>", "", page.read_text(), flags=re.DOTALL)


def test_all_is_in_the_page_without_javascript(page: Path) -> None:
    text = without_scripts(page)
    reader = Reader()
    reader.feed(text)
    assert reader.asked == []
    assert reader.counts["figure"] == 4 and reader.counts["tr"] == 14 + 2
    assert len(re.findall(r"<svg", text)) >= 4
    for told in ("What is a list?", "It is &lt;b&gt;.", "run3", "▲ +", "●", "1 could not be read"):
        assert told in text
    assert "Cells that failed" in text and "It is refused." in text
    # Filters need JavaScript, and are not shown without.
    assert '<form class="filters" hidden' in text


def test_foreign_names_stay_text(page: Path) -> None:
    text = page.read_text()
    assert NASTY not in text and "alert(1)" in text
    policy = html.unescape(
        str(re.findall(r'http-equiv="Content-Security-Policy" content="(.*?)"', text))
    )
    assert "default-src 'none'" in policy and "connect-src 'none'" in policy


def seen(page: Path, fragment: str = "", *words: str) -> str:
    """Return the page's elements after its scripts have run, where no name can be looked up."""
    assert BROWSER is not None
    options = (
        "--no-sandbox",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--virtual-time-budget=9000",
    )
    done = subprocess.run(
        [BROWSER, "--headless", *options, "--dump-dom", *words, page.as_uri() + fragment],
        capture_output=True,
        text=True,
        timeout=100,
    )
    return re.sub(r"<script.*?</script>", "", done.stdout, flags=re.DOTALL)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_a_browser_draws_and_filters(page: Path) -> None:
    whole = seen(page)
    assert 'data-ready="yes"' in whole and "13 shown" in whole
    assert whole.count("vega-embed") >= 4
    fewer = seen(page, "#format=int4+group+32&target=gpu")
    # Four runs of 4 bits, and one of another model.
    assert "5 shown" in fewer and fewer.count('hidden=""') == 8


def test_the_command_writes_a_page(
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    results: Path,
    bundle: Path,
    tmp_path: Path,
) -> None:
    path = tmp_path / "report.html"
    words = ("report", results, "-o", path)
    sample = ("--sample", bundle, "--prompt", "A program")
    done = in_process(capfd, monkeypatch, *words, *sample, "--format", "json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert told["results"] == 13 and len(told["left_out"]) == 1
    assert [name.split(" ")[0] for name in told["regressions"]] == ["run9"]
    assert "<h3>bundle</h3>" in path.read_text()
    for code, wrong in (
        (2, ("report", tmp_path / "gone", "-o", path)),
        (2, (*words, "--prompt", "x")),
        (6, ("report", results, "-o", tmp_path / "gone" / "page.html")),
        (7, (*words, "--sample", tmp_path / "gone", "--prompt", "x")),
    ):
        refused = in_process(capfd, monkeypatch, *wrong)
        assert refused.code == code and "Traceback" not in refused.err, refused.err


def test_a_page_that_cannot_be_written_is_told_of(results: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError):
        write_report(results, tmp_path)
    assert not list(tmp_path.iterdir())


def test_without_the_extra_a_sentence_says_how_to_get_it(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "vl_convert":
            raise ImportError("No module named 'vl_convert'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"llm-coreml\[report\]"):
        write_report(results, tmp_path / "page.html")


def test_ten_thousand_results_stay_small_and_bring_no_torch(tmp_path: Path) -> None:
    lines = []
    for at in range(100):
        lines.append(json.dumps(document(f"run{at}", nll=(2.0 + at / 100,) * 40, bits=2 + at % 7)))
    (tmp_path / "results.jsonl").write_text(100 * ("\n".join(lines) + "\n"))
    script = f"""
import sys
from pathlib import Path
from llm_coreml.eval.report.page import write_report
found = write_report(Path({str(tmp_path)!r}), Path({str(tmp_path / "page.html")!r}))
assert len(found.rows) == 10_000
assert "torch" not in sys.modules
status = Path("/proc/self/status")  # of this process alone, and not of what started it
lines = status.read_text().splitlines() if status.exists() else ["VmHWM: 0 kB"]
print(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 500_000
    assert (tmp_path / "page.html").stat().st_size < 12_000_000


def test_the_dashboard_shows_what_lands(tmp_path: Path) -> None:
    import asyncio

    import uvicorn

    from llm_coreml.eval.report.server import application

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        settings = uvicorn.Config(
            application(tmp_path), log_level="critical", lifespan="off", timeout_graceful_shutdown=1
        )
        server = uvicorn.Server(settings)
        thread = threading.Thread(
            target=lambda: asyncio.run(server.serve(sockets=[listening])), daemon=True
        )
        thread.start()
        try:
            address = f"http://127.0.0.1:{port}/"
            while not server.started:
                time.sleep(0.02)
            empty = urllib.request.urlopen(address, timeout=60).read().decode()
            assert "holds no results" in empty and 'data-live="0"' in empty
            news = urllib.request.urlopen(f"{address}events", timeout=60)
            append_result(tmp_path, document("fresh"))
            told = iter(news.readline, b"event: results\n")
            assert all(line.startswith(b":") or line == b"\n" for line in told)
            assert "fresh" in urllib.request.urlopen(address, timeout=60).read().decode()
            foreign = urllib.request.Request(address, headers={"Host": "evil.example"})
            with pytest.raises(urllib.error.HTTPError, match="400"):
                urllib.request.urlopen(foreign, timeout=60)
        finally:
            server.should_exit = True
            thread.join(20)
    assert not thread.is_alive()


def test_the_dashboard_refuses_in_a_sentence(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gone = in_process(capfd, monkeypatch, "dashboard", tmp_path / "gone")
    assert gone.code == 2 and "no folder" in gone.err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        refused = in_process(capfd, monkeypatch, "dashboard", tmp_path, "--port", port)
    assert refused.code == 2 and "another --port" in refused.err
