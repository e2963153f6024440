"""Makes docs/demo.png anew: trains the demo, and takes a picture of its report in a headless browser.

python docs/demo_picture.py                                   # about a minute of training
python docs/demo_picture.py --run lightning_logs/version_0    # of a run that has ended
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).parents[1]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
WIDTH, HEIGHT, SCALE = 1080, 1400, 1.5  # CSS pixels, and pixels of the picture for each


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--run", type=Path, help="the folder of a run; left out, the demo is trained")
    parser.add_argument("--output", type=Path, default=REPO / "docs" / "demo.png")
    given = parser.parse_args()
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit(f"none of these browsers is installed: {', '.join(BROWSERS)}")
    with tempfile.TemporaryDirectory() as folder:
        run = given.run or trained_demo(Path(folder))
        picture(browser, run / "report.html", given.output, Path(folder) / "profile")
    print(f"written: {given.output}")


def trained_demo(folder: Path) -> Path:
    """Trains the demo and returns the run's folder."""
    subprocess.run([sys.executable, REPO / "cli.py", "demo", "--trainer.default_root_dir", folder], check=True)
    return folder / "lightning_logs" / "version_0"


def picture(browser: str, page: Path, output: Path, profile: Path) -> None:
    """Writes the top of a page as a picture."""
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium refuses to run as root with one
    subprocess.run(
        [
            *(browser, "--headless=new", *sandbox, "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"),
            *(f"--window-size={WIDTH},{HEIGHT}", f"--force-device-scale-factor={SCALE}"),
            *(f"--screenshot={output.resolve()}", page.resolve().as_uri()),
        ],
        check=True,
        stderr=subprocess.DEVNULL,
    )


if __name__ == "__main__":
    main()
