"""Models of another form: GGUF files as ordinary folders, and a folder's way back to GGUF."""
