"""The `distill` command: for each word a parser and a function."""
