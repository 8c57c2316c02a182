"""The command lines. May import everything; only the `__main__` blocks of the programs, and the tests, import it."""
