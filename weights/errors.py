"""What can go wrong through no fault of the program. The command line prints the message and exits with code 2."""


class UserError(ValueError):
    """Something the person at the keyboard can mend: one line that says what is wrong, the numbers, the remedy."""


class CorruptFile(UserError):
    """A file of a model folder that is not what it should be."""

    def __init__(self, path, reason):
        super().__init__(f"{path} is corrupt ({reason}); put a good copy in its place")
        self.path, self.reason = path, reason
