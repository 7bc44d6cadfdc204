"""Pages that people look at: a run, or runs side by side."""
