"""The networks: blocks, families, and what can be made of a model."""

import keras  # noqa: F401 (first: see _registration.py)
