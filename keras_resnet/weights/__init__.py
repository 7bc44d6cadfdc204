"""Weight files: read without torch, mapped by rule, proven, and written back."""
