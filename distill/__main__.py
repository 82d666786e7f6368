"""`python -m distill ...` is the `distill` command (and what `accelerate launch -m distill` starts)."""

from distill.commands.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
