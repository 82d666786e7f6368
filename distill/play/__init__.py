"""`distill play`: ask checkpoints side by side on a local page."""
