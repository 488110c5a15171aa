"""Takes a picture of the service's page while it answers a load that changes: docs/service.png.

    python -m sdpoint_jax serve runs/cifar/sweep/artefact --objective-ms=100 &
    python benchmarks/screenshot.py --image=photo.png --output=docs/service.png

Needs playwright and Debian's chromium. `--rates` are requests a second, each kept for `--seconds`, one after the other.
"""

import argparse
import asyncio
import json
import pathlib
import threading
import urllib.request

import load
import numpy as np
from playwright.sync_api import sync_playwright


def send(url: str, rates: list[float], seconds: float) -> None:
    """Sends arrays of random numbers at those rates, one after the other."""
    service = json.load(urllib.request.urlopen(f"{url}/instances"))
    images = np.random.default_rng(0).integers(0, 256, (16, *service["image_shape"]), np.uint8)
    gaps = np.concatenate([np.full(int(rate * seconds), 1 / rate) for rate in rates])
    patience = service["objective_ms"] / 1e3
    asks = [load.Ask(at, number % len(images), "npy", patience) for number, at in enumerate(np.cumsum(gaps))]
    asyncio.run(load.send(url, asks, {"npy": [load.encode(image) for image in images]}))


def photograph(url: str, image: str, output: str, chromium: str, seconds: float) -> None:
    """Opens the page, classifies an image in it, waits, and takes the picture."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-dev-shm-usage"])
        page = browser.new_page(viewport={"width": 1000, "height": 800})
        page.goto(url)
        page.wait_for_selector("#plot circle")
        page.wait_for_timeout(1e3 * seconds)
        for _ in range(20):  # It may be refused.
            page.set_input_files("#file", [])
            page.set_input_files("#file", image)
            page.wait_for_timeout(1000)
            if page.inner_text("#status").startswith("Instance"):
                break
        else:
            raise SystemExit(f"error: not answered: {page.inner_text('#status')}")
        page.wait_for_timeout(1500)  # The load is drawn once a second.
        page.screenshot(path=output, full_page=True)
        browser.close()


def main() -> None:
    """Sends the load and takes the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the service, on this machine")
    parser.add_argument("--image", required=True, help="file to classify in the page")
    parser.add_argument("--output", default="docs/service.png", help="PNG file")
    parser.add_argument("--rates", default="20,100,300,50", help="requests a second, with commas between")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each rate")
    parser.add_argument("--chromium", default="/usr/bin/chromium", help="the browser's program")
    options = parser.parse_args()
    rates = [float(rate) for rate in options.rates.split(",")]
    sender = threading.Thread(target=send, args=(options.url, rates, options.seconds))
    sender.start()
    photograph(options.url, options.image, options.output, options.chromium, len(rates) * options.seconds - 5)
    sender.join()
    print(f"written: {options.output}, {pathlib.Path(options.output).stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
