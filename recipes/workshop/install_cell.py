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
        if (folder / "distill" / "lessons" / "__init__.py").is_file() and (
            folder / "checkpoints" / "teacher"
        ).is_dir():
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
    print(f"Installing into {sys.prefix}: a few minutes, 2 GB ...", flush=True)
    if subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *PINS]).returncode:
        raise SystemExit(
            "pip failed, as told above. Choose a kernel with an environment of its own: README.md."
        )
    sys.modules.pop("distill", None)  # a folder of that name without code, found a moment ago
    sys.path.insert(0, str(folder))


def installed() -> bool:
    try:
        return importlib.util.find_spec("distill.lessons") is not None
    except ModuleNotFoundError:
        return False


if not installed():
    install()
