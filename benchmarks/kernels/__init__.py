"""The TPU compiler's schedule of every kernel; read `__main__.py` first, then `cases/case.py`.

`schedule.py` compiles a case in a child process, `bundles.py` reads what the compiler wrote, and
`figures.py` counts cycles.
"""
