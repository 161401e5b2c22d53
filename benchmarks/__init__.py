"""Benchmarks: run each as `python -m benchmarks.NAME`; `README.md` says what they measure."""
