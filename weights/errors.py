"""Errors that the user can correct: the command line prints their message, one line, and exits with code 2."""

import reprlib
import unicodedata

SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxlong = SHORT.maxother = 60  # characters
SHORT.maxdict = 2


def quote(value):
    """Return a value from a file as a message shows it: its repr, which is one line, cut to some 60 characters."""
    return SHORT.repr(value)


def printable(text):
    """Return the text with U+FFFD for characters that a terminal obeys: control and format characters, line separators.

    Line feed, tab and the two joiners, which scripts and emoji need, stay.
    """
    hidden = {c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")} - set("\n\t\u200c\u200d")
    return text.translate(dict.fromkeys(map(ord, hidden), "\N{REPLACEMENT CHARACTER}"))


class UserError(ValueError):
    """An error that the user can correct; the message says what is wrong, the numbers, and what to do."""


class CorruptFile(UserError):
    """A damaged file, found by its format, size or checksum. fault: the message without the remedy."""

    def __init__(self, path, reason, remedy="put a good copy in its place"):
        self.path, self.reason, self.fault = path, reason, f"{path} is corrupt ({reason})"
        super().__init__(f"{self.fault}; {remedy}")


class Mismatch(CorruptFile):
    """A file that does not match the others of its model; any of them may be the wrong one."""

    def __init__(self, path, fault, remedy):
        self.path, self.reason, self.fault = path, fault, fault
        UserError.__init__(self, f"{fault}; {remedy}")
