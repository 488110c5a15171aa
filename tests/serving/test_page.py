"""The page works in a browser: by mouse and by keyboard, large and small, with no network but the service."""

import pathlib

import pytest
import services

pytest.importorskip("fastapi", reason="needs the extra serve")
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = pathlib.Path("/usr/bin/chromium")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.xdist_group("page"),
    pytest.mark.skipif(not CHROMIUM.exists(), reason="needs Debian's chromium"),
]


@pytest.fixture(scope="module")
def address(served):
    with services.running(served, "--objective-ms=20000", "--instances=all") as (_, address):
        yield address


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@pytest.mark.parametrize("size", [(1100, 900), (390, 844)], ids=["large", "phone"])
def test_an_image_is_classified_within_the_budget_that_the_keyboard_sets(browser, address, size, tmp_path):
    (tmp_path / "picture.png").write_bytes(services.encode(services.PICTURE))
    page = browser.new_page(viewport=dict(zip(("width", "height"), size)))
    faults, elsewhere = [], []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: message.type == "error" and faults.append(message.text))
    page.on(
        "request", lambda request: request.url.startswith((address, "blob:", "data:")) or elsewhere.append(request.url)
    )
    page.goto(address)
    page.wait_for_selector("#plot circle")
    assert page.locator("#plot circle").count() == 7
    page.set_input_files("#file", tmp_path / "picture.png")
    page.wait_for_function("document.querySelector('#status').textContent.startsWith('Instance full')")
    assert page.locator("#classes tr").count() == 5
    page.focus("#budget")
    page.keyboard.press("Home")
    page.wait_for_function("document.querySelector('#status').textContent.startsWith('Instance p01_r0.50')")
    page.wait_for_selector("#load circle")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")  # Nothing sticks out.
    assert not faults and not elsewhere
    page.close()
