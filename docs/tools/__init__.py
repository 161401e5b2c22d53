"""Commands that write parts of the pages: `compiled.py` and `efficiency.py`."""
