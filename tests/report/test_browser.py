"""The page in Chromium: no error, no request, tables that sort, light and dark, and no serious accessibility fault.

Skipped without Chromium, its driver or Selenium. axe-core is part of the package axe-core-python.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from widekernel.report.page import SECTIONS

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install 'widekernel[browser]'")
CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
    pytest.mark.skipif(DRIVER is None, reason="chromedriver is not installed"),
    pytest.mark.slow,
]
SILENT = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (*SILENT, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}", "about:blank"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_page_load_timeout(60)
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture
def opened(browser: Any, page: str, tmp_path: Path) -> Any:
    """Return the browser after it has loaded the page from a file."""
    file = tmp_path / "report.html"
    file.write_text(page)
    browser.get("about:blank")
    browser.get_log("performance"), browser.get_log("browser")
    browser.get(file.as_uri())
    return browser


def requests(browser: Any) -> list[str]:
    """Return the addresses that the page has asked for since the last call; data in the page itself are not requests."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return [address for address in sent if not address.startswith("data:")]


def resize(browser: Any, size: str) -> None:
    width, height = SIZES[size]
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == "phone"}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def find(browser: Any, selector: str) -> Any:
    return browser.find_element("css selector", selector)


def test_the_page_opens_without_errors_and_requests(opened: Any) -> None:
    assert [heading.text for heading in opened.find_elements("css selector", "h2")] == list(SECTIONS.values())
    assert all(find(opened, f"#{name}").is_displayed() for name in SECTIONS)
    broken = "return [...document.images].filter(i => !i.complete || !i.naturalWidth).length"
    assert opened.execute_script(broken) == 0
    for control in (*opened.find_elements("css selector", "summary"), *opened.find_elements("css selector", "nav a")):
        control.send_keys("\n")
    assert not opened.find_elements("css selector", "details:not([open])")
    assert opened.get_log("browser") == []
    assert [address.rpartition("/")[2] for address in requests(opened)] == ["report.html"]
    assert opened.execute_script("return window.alerted") is None


def test_requests_would_be_seen_and_blocked(opened: Any) -> None:
    """Otherwise the test above could not fail."""
    requests(opened)
    opened.execute_script("const i = new Image(); i.src = 'file:///nothing.png'; document.body.append(i)")
    opened.execute_script(
        "const s = document.createElement('script'); s.text = 'window.alerted = 1'; document.body.append(s)"
    )
    assert opened.execute_script("return window.alerted") is None
    assert len([entry for entry in opened.get_log("browser") if "Content Security Policy" in entry["message"]]) >= 2


def test_a_table_sorts(opened: Any) -> None:
    table = find(opened, "#masks table")
    heads = table.find_elements("css selector", "thead th")
    place = next(number for number, head in enumerate(heads) if head.text.startswith("Weights"))

    def column() -> list[float]:
        cells = table.find_elements("css selector", f"tbody tr > :nth-child({place + 1})")
        return [float(cell.get_attribute("data-v")) for cell in cells]

    before = column()
    assert {head.get_attribute("aria-sort") for head in heads} == {"none"}
    for order, expected in (("ascending", sorted(before)), ("descending", sorted(before, reverse=True))):
        heads[place].find_element("css selector", "button").send_keys("\n")
        assert column() == expected != before
        assert [head.get_attribute("aria-sort") for head in heads].count("none") == len(heads) - 1
        assert heads[place].get_attribute("aria-sort") == order
    heads[0].find_element("css selector", "button").send_keys(" ")
    names = [cell.text for cell in table.find_elements("css selector", "tbody th")]
    assert names == sorted(names)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(opened: Any, scheme: str) -> None:
    def shade() -> int:
        color = opened.execute_script("return getComputedStyle(document.body).backgroundColor")
        return sum(int(part) for part in color.removeprefix("rgb(").removesuffix(")").split(","))

    features = [{"name": "prefers-color-scheme", "value": scheme}]
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    button = find(opened, "#theme")
    assert (shade() < 384) == (scheme == "dark")
    assert button.get_attribute("aria-pressed") == str(scheme == "dark").lower()
    button.send_keys("\n")
    assert (shade() < 384) == (scheme == "light")
    assert button.get_attribute("aria-pressed") == str(scheme == "light").lower()
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@pytest.mark.parametrize("size", SIZES)
def test_nothing_is_wider_than_the_window(opened: Any, size: str) -> None:
    resize(opened, size)
    assert opened.execute_script("return document.documentElement.scrollWidth") <= SIZES[size][0]


@pytest.mark.parametrize(("size", "scheme"), [("desktop", "light"), ("phone", "dark")])
def test_accessibility(opened: Any, size: str, scheme: str) -> None:
    checker = pytest.importorskip("axe_core_python.selenium", reason="axe-core-python is not installed")
    resize(opened, size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    opened.execute_script("for (const one of document.querySelectorAll('details')) one.open = true")
    found = checker.Axe().run(opened)
    assert len(found["passes"]) > 20
    serious = [each for each in found["violations"] if each["impact"] in ("serious", "critical")]
    assert [(each["id"], each["nodes"][0]["html"]) for each in serious] == []
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
