"""Write into a bench file which commit each claim's text first stood in, as `registered`.

    git commit recipes/claims.yaml -m "..."  &&  python recipes/register.py  &&  git commit -am "Registered"

A commit cannot hold its own hash, so this is the commit after. Nothing else of the file is changed. A claim whose text
in the working tree is not the one committed is left alone, and named. See distill/bench/claims.py.
"""

import re
import sys
from pathlib import Path

from distill.bench.claims import History, first_stood, texts
from distill.storage import PROJECT_ROOT, write_atomic


def with_registrations(content: str, commits: dict[str, str]) -> str:
    """`content` with `registered: COMMIT` under the id of every claim of `commits`, in place of an older one."""
    for claim, commit in commits.items():
        pattern = rf"(?m)^(\s*)- id: {re.escape(claim)}\n(?:\s+registered: .*\n)?"
        content = re.sub(pattern, rf"\1- id: {claim}\n\1  registered: '{commit[:12]}'\n", content)
    return content


def main() -> int:
    path = sys.argv[1] if len(sys.argv) > 1 else "recipes/claims.yaml"
    history, file = History(PROJECT_ROOT), Path(PROJECT_ROOT, path)
    if not history.available:
        print("distill: this is no whole checkout, so no commit can be named", file=sys.stderr)
        return 2
    content = file.read_text(encoding="utf-8")
    today, committed = texts(content), texts(history.text("HEAD", path) or "")
    stood = first_stood(history, path)
    known = {claim: commit for claim, commit in stood.items() if today.get(claim) == committed[claim]}
    write_atomic(file, with_registrations(content, known))
    left = sorted(set(today) - set(known))
    print(f"{len(known)} of {len(today)} claims name their commit")
    if left:
        print(f"not committed as they are now, so not registered: {', '.join(left)}", file=sys.stderr)
    return 1 if left else 0


if __name__ == "__main__":
    raise SystemExit(main())
