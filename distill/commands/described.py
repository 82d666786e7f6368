"""What `distill describe` said before, kept on disk: counting takes the model's code, which is 5 s of imports.

    found, text = described("checkpoints/teacher")      # the keys of distill/models/describe.py, and the table of them

A description follows from config.json, from the code that counts and from the libraries that build the model. The name
of a kept one is the hash of all three, so that another config, another release or an edited module is counted anew.
They lie in `$XDG_CACHE_HOME/distill/describe` (`~/.cache` where that is not set), 1 kB each, the newest 200 of them.
One that does not fit its checksum is counted again, and where nothing can be written nothing is kept.

The folder itself is looked at every time, as `check_folder` does. Hub names, GGUF files and folders with a config for
each release of transformers (`configuration_files`) are read by the libraries and never kept.
"""

import contextlib
import os
from pathlib import Path
from typing import Any

from distill import console
from distill.errors import DistillError
from distill.integrity import write_sealed
from distill.models.folders import check_folder, read_object
from distill.stages import versions
from distill.storage import fingerprint, hash_file, read_json, resolve_model

_COUNTS = Path(__file__).resolve().parent.parent / "models"  # the code whose change makes another description
_MOST = 200  # descriptions kept


def described(name: str) -> tuple[dict[str, Any], str]:
    """(description, the same as a table for people) of a model folder, a hub name or a GGUF file. Raises UserError."""
    place = _place(name)
    if place and (kept := _kept(place)):
        return kept["description"], kept["table"]
    console.quiet_libraries()
    from distill.convert.gguf import gguf_config, is_gguf
    from distill.models.describe import describe, describe_config, format_description

    if is_gguf(name):
        found = describe_config(gguf_config(Path(name)))
    else:
        found = describe(resolve_model(name))
    table = format_description(found)
    if place:
        _keep(place, {"description": found, "table": table})
    return found, table


def _place(name: str) -> Path | None:
    """Where the description of this model is kept; None for what is never kept. Raises UserError for a bad folder."""
    if name.lower().endswith(".gguf"):
        return None
    folder = Path(resolve_model(name))
    config = folder / "config.json"
    if not config.is_file():
        return None
    check_folder(folder)
    if "configuration_files" in read_object(config):
        return None
    code = [hash_file(path) for path in sorted(_COUNTS.glob("*.py"))]
    key = fingerprint([hash_file(config), code, versions()])
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "distill" / "describe" / f"{key}.json"


def _kept(place: Path) -> dict[str, Any] | None:
    """What lies there, if it is whole."""
    try:
        kept = read_json(place)
    except (DistillError, OSError):
        return None
    return kept if isinstance(kept, dict) and {"description", "table"} <= kept.keys() else None


def _keep(place: Path, kept: dict[str, Any]) -> None:
    with contextlib.suppress(DistillError, OSError):
        write_sealed(place, kept)
        oldest = sorted(place.parent.glob("*.json"), key=lambda path: path.stat().st_mtime)[:-_MOST]
        for path in oldest:
            path.unlink(missing_ok=True)
