"""The tree of README.md and README.zh-CN.md: folders with their sentence, modules with the first line of theirs.

    python docs/generate/tree.py            # rewrites both; a test compares them with the sources

Nothing is imported: sentences are read from the docstrings. The folders stand in the order in which they may import
each other (tests/test_structure.py holds the code to it).
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "README.md", ROOT / "README.zh-CN.md")
FOLDERS = (
    "", "tasks", "config", "models", "moe", "data", "convert", "training", "training/losses", "evaluation", "report",
    "doctor", "bench", "cost", "play", "commands",
)  # fmt: skip
_WIDTH = 24  # of the column of names


def first_sentence(path: Path) -> str:
    """What a module or folder says of itself first, on one line and without its full stop."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=[^.])\.(?:\s|$)", paragraph)[0].rstrip(".")


def tree() -> str:
    """The block between the markers, as markdown."""
    lines = ["```"]
    for folder in FOLDERS:
        place = ROOT / "distill" / folder
        sentence = (
            "what all stand on, and the stages in order"
            if not folder
            else first_sentence(place / "__init__.py")
        )
        lines.append(f"{'distill/' + (folder + '/' if folder else ''):{_WIDTH + 2}}{sentence}")
        for path in sorted(place.glob("*.py")):
            if not path.name.startswith("__"):
                lines.append(f"  {path.name:{_WIDTH}}{first_sentence(path)}")
    return "\n".join([*lines, "```", ""])


def with_tree(text: str) -> str:
    """The page with the block between `<!-- tree -->` and `<!-- end of tree -->` written anew."""
    return re.sub(
        r"(<!-- tree -->\n).*?(<!-- end of tree -->)", lambda m: m[1] + tree() + m[2], text, flags=re.S
    )


def main() -> int:
    for page in PAGES:
        page.write_text(with_tree(page.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
