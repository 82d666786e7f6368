"""Files that are whole or absent: written beside their place, synced, renamed; and what a full disk becomes.

    with replacing(path) as temporary: write(temporary)      # a reader, or a crash, sees the old file or the new one
    with writing(folder, needed=size): model.save_pretrained(folder)       # a full disk is one line, not a traceback
    remove_leftovers(folder)                                 # what killed processes did not get to rename

A temporary file or folder is named `.NAME.tmpPID`. Whoever holds the lock of a stage removes those of its folder;
elsewhere the next writer of NAME removes those whose process is gone.
"""

import difflib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distill.errors import RunError, UserError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CLOSED = (errno.EROFS, errno.EACCES, errno.EPERM)
_LEFT = re.compile(r"\..+\.tmp(\d+)$")


def temporary_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp{os.getpid()}")


@contextmanager
def replacing(path: Path, needed: int = 0, sweep: bool = True) -> Iterator[Path]:
    """A temporary path beside `path`; at the end of the block it is synced and takes the place of `path`.

    needed: bytes, for the line about a full disk. sweep: first remove what killed processes have left of this name;
    off for the many parts of a stage, whose `begin` has done so. Raises RunError where the disk does not take it;
    `path` is then as it was, and the temporary file is gone.
    """
    temporary = temporary_of(path)
    if sweep:
        remove_dead(path.parent, path.name)
    try:
        with writing(path.parent, needed):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
    except BaseException:
        remove(temporary)
        raise


def write_atomic(path: Path, text: str) -> None:
    """Write a text file so that a reader (or a crash) sees the old file or the new one, never half."""
    data = text.encode("utf-8")
    with replacing(path, len(data)) as temporary:
        temporary.write_bytes(data)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk itself and survive a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot sync folders
            raise
    finally:
        os.close(handle)


def sync_all(folder: Path) -> None:
    """`sync` of every file directly in a folder, and of the folder."""
    for path in folder.iterdir():
        if not path.is_dir():
            sync(path)
    sync(folder)


# ---- what the disk says ------------------------------------------------------------------------------


@contextmanager
def writing(folder: Path, needed: int = 0) -> Iterator[None]:
    """Turns what a disk refuses inside the block into a RunError of one line: the folder, the bytes, the fix."""
    try:
        yield
    except (RunError, UserError):
        raise
    except Exception as error:  # libraries in Rust have errors of their own around that of the system
        number = system_error(error)
        if number is None:
            raise
        raise RunError(refusal(folder, number, needed)) from None


def system_error(error: BaseException) -> int | None:
    """The errno in an exception, also in one of safetensors or tokenizers; None where there is none."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    found = re.search(r"\((?:os error|errno) (\d+)\)|\[[Ee]rrno (\d+)\]", str(error))
    return int(found[1] or found[2]) if found else None


def refusal(folder: Path, number: int, needed: int = 0) -> str:
    """One line: which folder, why, and what to do. needed: bytes, 0 where nobody knows."""
    why = os.strerror(number)
    if number in _FULL:
        asked = f"{needed:,} bytes needed in {folder}" if needed else f"in {folder}"
        return (
            f"cannot write {folder}: {why}; free some space and run again ({asked}, {_free(folder)} free), finished "
            "parts are kept"
        )
    if number in _CLOSED:
        size = f" ({needed:,} bytes)" if needed else ""
        return f"cannot write {folder}: {why}; make {folder} writable{size}, or choose another folder, and run again"
    return (
        f"cannot write {folder}: {why}; choose another path, or remove what stands in the way, and run again"
    )


def system_problem(error: Exception) -> str | None:
    """One line for an error of the system that nobody expected; None for one that is none."""
    if isinstance(error, MemoryError):
        return "out of memory; take smaller batches or a smaller model, or a larger machine, and run again"
    number = system_error(error)
    if number is None:
        return None
    name = getattr(error, "filename2", None) or getattr(error, "filename", None)
    if number in (*_FULL, *_CLOSED, errno.EIO):
        # Without a name it is a file that a library has opened: its temporary ones lie there.
        return refusal(Path(os.fsdecode(name)).parent if name else Path(tempfile.gettempdir()), number)
    what = f"{shown(os.fsdecode(name))}: " if isinstance(name, (str, bytes)) else ""
    return f"{what}{os.strerror(number)}; look at this path (-v shows where), and run again"


def _free(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(existing(folder)).free:,}"
    except OSError:
        return "nothing"


# ---- before work begins ------------------------------------------------------------------------------


def existing(path: Path) -> Path:
    """The nearest of the path and the folders above it that is there. Never raises."""
    for candidate in (path, *path.parents):
        if os.path.lexists(candidate):
            return candidate
    return Path(".")


def folder_problem(path: str | Path) -> str | None:
    """Why a folder cannot be made, or written to, at `path`, as the end of a sentence; None if it can."""
    if problem := _name_problem(str(path)):
        return problem
    there = existing(Path(path))
    if not os.path.isdir(there):
        return f"cannot be a folder: {there} is {'a file' if os.path.isfile(there) else 'no folder'}; give another path"
    if not os.access(there, os.W_OK | os.X_OK):
        return f"cannot be written: {there} is read-only for you; give another path"
    return None


def file_problem(path: str | Path) -> str | None:
    """The same for a file that is to be written. It may be there."""
    if problem := _name_problem(str(path)):
        return problem
    if os.path.isdir(path):
        return "is a folder; give the name of a file"
    if os.path.lexists(path) and not os.path.isfile(path):
        return "is no ordinary file; give another name"
    return folder_problem(Path(path).parent)


def _name_problem(text: str) -> str | None:
    if "\0" in text:
        return "has a NUL character in its name; give another path"
    if not text.strip():
        return "is empty; give a path"
    # Temporary files beside it have a longer name, and folders in it longer paths.
    if any(len(os.fsencode(part)) > 230 for part in Path(text).parts) or len(os.fsencode(text)) > 3800:
        return "is too long a name for a file system; give a shorter path"
    return None


def check_targets(**targets: str | Path | None) -> None:
    """Raises UserError with every path that cannot be written. `folder_KEY` or `file_KEY`; None asks nothing.

    check_targets(folder_out=arguments.out) speaks of --out.
    """
    problems = []
    for name, path in targets.items():
        kind, _, key = name.partition("_")
        problem = None if path is None else {"folder": folder_problem, "file": file_problem}[kind](path)
        if problem:
            problems.append(f"--{key.replace('_', '-')} {shown(path)} {problem}")
    if problems:
        raise UserError(*problems)


def like_it(path: str | Path) -> str:
    """`, did you mean 'NAME'?`, of what lies beside a path that is not there; "" for nothing like it, or if it is."""
    wanted = Path(path)
    try:
        beside = [p.name for p in wanted.parent.iterdir() if p.name != wanted.name]
    except (OSError, ValueError):
        return ""
    close = difflib.get_close_matches(wanted.name, beside, n=1, cutoff=0.7)
    return f", did you mean '{shown(wanted.parent / close[0])}'?" if close else ""


def shown(path: str | Path, most: int = 80) -> str:
    """A path for a message: printable, and not longer than a line. Of a long path the end says which it is."""
    text = "".join(c if c.isprintable() else "?" for c in str(path))
    if len(text) <= most:
        return text
    return f"...{text[3 - most :]}" if "/" in text else f"{text[: most - 3]}..."


# ---- leftovers ---------------------------------------------------------------------------------------


def is_leftover(path: Path) -> bool:
    """Whether this is a temporary file or folder that a killed process did not get to rename."""
    return bool(_LEFT.match(path.name))


def remove(path: Path) -> None:
    """A file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """All temporary files and folders below. Only for whoever holds the folder's lock, before any writer starts."""
    for path in sorted(folder.rglob(".*.tmp*")):
        if is_leftover(path):
            remove(path)


def remove_dead(folder: Path, name: str) -> None:
    """Those of the file `name`, in a folder that nobody locks, whose process is gone."""
    for path in folder.iterdir() if folder.is_dir() else ():
        found = _LEFT.match(path.name)
        if found and path.name == f".{name}.tmp{found[1]}":
            pid = int(found[1])
            if pid == os.getpid() or not _alive(pid):
                remove(path)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
