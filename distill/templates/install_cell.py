# Installs what the lessons need, in the versions the project pins; does nothing where it is installed.
import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

PINS = [
    "PINS",
]
REPOSITORY = "REPOSITORY_URL"  # only for a notebook opened without the project's folder: its git address


def project_folder() -> Path | None:
    here = Path.cwd()
    below = [p for p in sorted(here.iterdir()) if p.is_dir()]
    for folder in (here, *here.parents, *below):
        if (folder / "distill" / "lessons.py").is_file() and (folder / "checkpoints" / "teacher").is_dir():
            return folder
    return None


def install() -> None:
    for archive in Path.cwd().glob("distill*.zip") if project_folder() is None else ():
        zipfile.ZipFile(archive).extractall()
    if project_folder() is None and REPOSITORY:
        subprocess.run(["git", "clone", "--depth", "1", REPOSITORY, "distill-project"], check=True)
    folder = project_folder()
    if folder is None:
        raise SystemExit("Upload the project as distill.zip beside this notebook, or set REPOSITORY above.")
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *PINS], check=True)
    sys.path.insert(0, str(folder))


if importlib.util.find_spec("distill") is None:
    install()
