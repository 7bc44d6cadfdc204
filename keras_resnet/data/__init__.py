"""Images: found in folders, read, prepared, augmented, and fed as batches."""
