"""Training-time changes of pictures with torchvision's semantics."""
from __future__ import annotations


def repeated_length(n):
    return n


def repeated(order, repeats):
    return order.repeat(repeats)[:len(order)]
