"""The process, the disk and the backend's devices."""
