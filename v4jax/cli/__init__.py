"""The command line. Read `main.py` first; every verb is a module of its own.

A verb is a module `v4jax/cli/<verb>.py` with

    SUMMARY: str            one line for the list of verbs
    USAGE: str              what it does, with examples
    Flags: type             a frozen dataclass whose fields are the flags (`flags.py`)
    run(flags) -> int       does the work, returns the exit status
    HINT: str               optional: what to do about a word that is no flag

Only this package knows flags. A verb imports what it needs inside `run`: help must not load JAX.
"""
