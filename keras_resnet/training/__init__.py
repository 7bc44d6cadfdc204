"""A folder of images in, a trained model out."""

import keras  # noqa: F401 (first, so that its import hook finds no room half furnished)
