"""The error of everything that this package refuses, so that a refusal is told from a crash."""


class Refusal(ValueError):
    """What was asked cannot be done right: the message says got, expected, remedy."""
