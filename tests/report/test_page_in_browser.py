"""The page in headless Chromium, as `make page` renders it: no message on the console, light and dark."""

import pytest
from PIL import Image

from kd_accel.report.output import write_report
from tests.report.browser import PageError, program, render
from tests.report.runs import bench_file
from tests.report.test_page import complete_runs

needs_chromium = pytest.mark.skipif(program() is None, reason="Chromium is not installed")


@needs_chromium
@pytest.mark.slow
def test_a_report_is_rendered_without_messages_in_light_and_dark(tmp_path):
    runs = complete_runs(tmp_path)
    write_report(runs, out=tmp_path / "out", bench_file=bench_file(tmp_path, *((run, 2.0) for run in runs[:3])))
    corners = []
    for picture in render(tmp_path / "out/index.html", views=("light", "dark")):
        with Image.open(picture) as image:
            assert image.width == 1200 and image.height > 1500
            corners.append(image.convert("L").getpixel((2, 2)))
    assert corners[0] > 200 > 60 > corners[1]


@needs_chromium
@pytest.mark.slow
def test_a_request_of_the_page_fails_the_rendering(tmp_path):
    write_report(complete_runs(tmp_path), out=tmp_path / "out", bench_file=None)
    page = tmp_path / "out/index.html"
    page.write_text(page.read_text().replace("<main>", '<main><img src="http://127.0.0.1:9/x.png"><script>x.y</script>'))
    with pytest.raises(PageError, match="2 messages on the console") as error:
        render(page, views=("light",))
    assert "Content Security Policy" in str(error.value)


def test_missing_page_and_missing_browser_are_reported(tmp_path, monkeypatch):
    with pytest.raises(PageError, match="index.html not found; write a report first"):
        render(tmp_path / "index.html")
    (tmp_path / "index.html").write_text("x")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PageError, match="none of chromium, .* was found; install Chromium"):
        render(tmp_path / "index.html")
    assert program() is None
