"""A picture of an HTML page, by a headless Chromium:  python scripts/picture.py PAGE.html PICTURE.png

Needs Pillow, which comes with matplotlib: with a palette of 256 colours the file takes a third of the bytes.
"""

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

from PIL import Image

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
COLOURS = 256
LARGEST = 150_000  # bytes: a README loads it each time that it is opened


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--width", type=int, default=900, help="pixels")
    parser.add_argument("--height", type=int, default=1100, help="pixels; what is below is left out")
    parser.add_argument("--dark", action="store_true", help="as a browser in dark mode shows it")
    options = parser.parse_args()
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise SystemExit(f"no browser is installed: expected one of {', '.join(BROWSERS)}")
    call = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    call += [f"--window-size={options.width},{options.height}", *(["--force-dark-mode"] if options.dark else [])]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture.png"
        page = options.page.resolve().as_uri()
        subprocess.run([*call, f"--screenshot={path}", page], check=True, capture_output=True, timeout=120)
        with Image.open(path) as image:
            picture = image.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    picture.save(options.picture, optimize=True)
    size = options.picture.stat().st_size
    if size > LARGEST:
        raise SystemExit(f"{options.picture} takes {size} bytes, more than {LARGEST}; choose a smaller height")


if __name__ == "__main__":
    main()
