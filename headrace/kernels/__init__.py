"""One folder an operation: `reference.py` is the definition in plain torch, the other files are fast forms of it."""
