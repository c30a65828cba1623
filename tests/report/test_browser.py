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

from widekernel.cli.main import main
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
    return load(browser, file)


def load(browser: Any, file: Path) -> Any:
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


LOOKS = [(size, scheme) for size in SIZES for scheme in ("light", "dark")]


@pytest.mark.parametrize(("size", "scheme"), LOOKS)
def test_accessibility(opened: Any, size: str, scheme: str) -> None:
    assert_accessible(opened, size, scheme)


def assert_accessible(opened: Any, size: str, scheme: str) -> None:
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


@pytest.mark.full
@pytest.mark.parametrize("kind", ["demo", "sparse"])
def test_the_page_of_a_real_run(kind: str, browser: Any, tmp_path: Path) -> None:
    """Pages of runs that have learned something: the demo, and a sparse run beside it."""
    demo, page = tmp_path / "demo", tmp_path / "report.html"
    assert main(["demo", "--output", str(demo)]) == 0
    options = ["--output", str(page), "--seconds", "0.05"]
    if kind == "demo":
        assert main(["report", str(demo), *options]) == 0
    else:
        settings = ["--model.name", "slak_nano", "--data.name", "digits", "--data.workers", "0", "--schedule.epochs", "2"]
        settings += ["--schedule.warmup_epochs", "0", "--sparsity.method", "dynamic", "--loop.device", "cpu"]
        settings += ["--sparsity.dynamic.update_interval", "20", "--output", str(tmp_path / "sparse")]
        assert main(["train", *settings]) == 0
        assert main(["report", str(tmp_path / "sparse"), "--compare", str(demo), *options]) == 0
    load(browser, page)
    assert browser.get_log("browser") == []
    assert [address.rpartition("/")[2] for address in requests(browser)] == ["report.html"]
    missing = {section.get_attribute("id") for section in browser.find_elements("css selector", "section:has(> .missing)")}
    assert missing == ({"masks", "comparison"} if kind == "demo" else set())
    for size, scheme in LOOKS:
        assert_accessible(browser, size, scheme)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= SIZES[size][0]
