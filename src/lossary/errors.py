"""What a caller can put right: the command line prints it in one line and ends with status 2."""


class BadInput(ValueError):
    """A file, column, package or argument is not what is needed; the message names it and the remedy."""
