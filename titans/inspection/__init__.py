"""A memory at work on a text: measured, and shown as a page or as pictures (docs/inspect.md)."""
