"""Errors that the user can correct: the command line prints their message, one line, and exits with code 2."""


class UserError(ValueError):
    """An error that the user can correct; the message says what is wrong, the numbers, and what to do."""


class CorruptFile(UserError):
    """A damaged file, found by its format, size or checksum."""

    def __init__(self, path, reason):
        super().__init__(f"{path} is corrupt ({reason}); put a good copy in its place")
        self.path, self.reason = path, reason
