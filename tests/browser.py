"""Debian's Chromium without a window, driven by selenium; the fixture `chromium` is in conftest.py."""

import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
needs_chromium = pytest.mark.skipif(
    not (CHROMIUM and CHROMEDRIVER), reason="needs Debian's chromium and chromium-driver"
)

SWITCHES = (
    "--headless=new", "--disable-gpu", "--disable-quic", "--no-first-run", "--no-proxy-server",
    "--no-sandbox",  # which Chromium requires of root, and which shows it nothing but our own page here
    "--disable-dev-shm-usage",  # containers give 64 MB of shared memory; it needs more
    # Nothing but the page may use the network.
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)


def emulate(driver, width, height, scheme="light"):
    """A window of this size, on a phone if it is narrow, of a user who prefers this color scheme."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)


def save_picture(driver, name, otherwise):
    """What the browser shows now, in the directory that WSQUEUE_ARTEFACTS names, or in the other one."""
    directory = Path(os.environ.get("WSQUEUE_ARTEFACTS") or otherwise)
    directory.mkdir(parents=True, exist_ok=True)
    driver.save_screenshot(str(directory / (re.sub(r"[^\w.-]+", "-", name) + ".png")))


@contextmanager
def run_chromium(profile):
    """A browser that keeps what it has to keep in the directory; it is gone when the block ends."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for switch in (*SWITCHES, f"--user-data-dir={profile}"):
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(executable_path=CHROMEDRIVER))
    try:
        yield driver
    finally:
        driver.quit()
