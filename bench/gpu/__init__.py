"""The commands that need a GPU: `python -m bench launches`, `variants`, `counters`, `verdict`."""
