"""The second picture of README's first screen: one problem, three models, a token that was clicked; light and dark.

    python docs/generate/answers.py      # docs/pictures/answers-light.png and -dark.png, and -zh of each

It is what lesson 0 of the workshop shows (distill/lessons/shown.py), opened by a headless Chromium of this machine
(`chromium` on the PATH) and photographed. Bytes differ from one Chromium to the next, so no test compares them.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from distill.errors import UserError
from distill.lessons.shown import answer, players, show
from distill.storage import PROJECT_ROOT

FOLDER = PROJECT_ROOT / "docs" / "pictures"
QUESTION = "What is 7235 + 8131?"
COLOURS = {"light": ("#ffffff", "#1f2328"), "dark": ("#0d1117", "#f0f6fc")}
SIZE = (1120, 478)


def photograph(browser: str, shown: str, colours: tuple[str, str], path: Path) -> None:
    """The HTML as a PNG of 128 colours."""
    back, ink = colours
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        page.write_text(
            f"<!doctype html><meta charset='utf-8'><body style='margin:8px;background:{back};color:{ink}'>{shown}",
            encoding="utf-8",
        )
        size = ",".join(map(str, SIZE))
        words = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={size}"]
        command = [browser, *words, f"--screenshot={path}", page.as_uri()]
        subprocess.run(command, check=True, capture_output=True)
    Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)


def main() -> int:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        raise UserError("no Chromium on the PATH; install it, or keep the pictures that are there")
    playground = players("recipes/workshop/demo")
    asked = answer(playground, QUESTION)
    for language, ending in (("en", ""), ("zh", "-zh")):
        shown = show(asked, playground, language)
        for name, colours in COLOURS.items():
            photograph(browser, shown, colours, FOLDER / f"answers-{name}{ending}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
