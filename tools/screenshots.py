"""Screenshots with headless Chromium: of a run's report for README.md, and of the documentation site to look at.

    python tools/screenshots.py RUN_FOLDER          # docs/images/report.png from RUN_FOLDER/report.html
    python tools/screenshots.py --site FOLDER       # the pages of site/ at 1200 and 390 pixels, into FOLDER

It needs Chromium (`apt install chromium`) and, if the picture is too large, ImageMagick (`apt install imagemagick`).
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
REPORT = ROOT / "docs" / "images" / "report.png"
MOST_BYTES = 150_000  # of the picture in README.md
WIDTHS = {"desktop": (1200, 1000), "phone": (390, 844)}
PAGES = ("index", "docs/first-run", "docs/installation", "docs/memory-and-planning", "docs/cli", "docs/troubleshooting")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def shot(page: Path, target: Path, *, width: int, height: int) -> None:
    """A PNG of the first `height` pixels of a local page, `width` pixels wide."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        sys.exit("There is no Chromium. Install one: apt install chromium.")
    with tempfile.TemporaryDirectory() as profile:
        # The layout of a window is at least 500 pixels wide, that of a frame is not.
        frame = Path(profile) / "frame.html"
        frame.write_text(
            "<!doctype html><style>body { margin: 0 } iframe { border: 0; display: block }</style>"
            f'<iframe src="{page.resolve().as_uri()}" width="{width}" height="{height}" scrolling="no"></iframe>'
        )
        address = frame.as_uri() if width < 500 else page.resolve().as_uri()
        command = [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars",
            "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic",
            "--allow-file-access-from-files", f"--user-data-dir={profile}/user", f"--window-size={width},{height}",
            f"--screenshot={target.resolve()}", "--virtual-time-budget=4000", address,
        ]  # fmt: skip
        target.unlink(missing_ok=True)
        subprocess.run(command, check=True, timeout=120, capture_output=True)


def smaller(picture: Path) -> None:
    """Reduces a PNG to 64 colors if it has more than MOST_BYTES. Exits with an error if it is still too large."""
    if picture.stat().st_size > MOST_BYTES:
        subprocess.run(["convert", picture, "-colors", "64", picture], check=True)
    if (size := picture.stat().st_size) > MOST_BYTES:
        sys.exit(f"{picture} has {size:,} bytes, more than {MOST_BYTES:,}: take a lower --height.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, help="the folder of a run, with report.html")
    parser.add_argument("--site", type=Path, help="the folder for screenshots of site/")
    parser.add_argument("--height", type=int, default=900, help="pixels of the report to show")
    arguments = parser.parse_args()
    if arguments.run is None and arguments.site is None:
        parser.error("name the folder of a run, or --site FOLDER")
    if arguments.run is not None:
        report = arguments.run / "report.html"
        if not report.is_file():
            parser.error(f"there is no {report}")
        REPORT.parent.mkdir(exist_ok=True)
        shot(report, REPORT, width=1000, height=arguments.height)
        smaller(REPORT)
    if arguments.site is not None:
        arguments.site.mkdir(parents=True, exist_ok=True)
        for name in PAGES:
            for device, (width, height) in WIDTHS.items():
                target = arguments.site / f"{name.replace('/', '-')}-{device}.png"
                shot(ROOT / "site" / f"{name}.html", target, width=width, height=height)


if __name__ == "__main__":
    main()
