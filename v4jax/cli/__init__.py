"""The command line. Read `main.py` first; every other module is one verb.

A verb is a module `v4jax/cli/<verb>.py` with

    SUMMARY: str                                  one line for the list of verbs
    USAGE: str                                    what it does, with examples
    define(flags, values) -> None                 defines its absl flags on the FlagValues `values`
    run(values, positional) -> int                does the work, returns the exit status

Only this package knows flags. A verb imports what it needs inside `run`: help must not load JAX.
"""
