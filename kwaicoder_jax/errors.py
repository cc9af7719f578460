"""The one error type for mistakes in what a user handed us."""


class UserError(ValueError):
    """A bad input: a config field, a file, a shape that was asked for.

    Commands print it as one line and exit with status 2; a library caller sees an ordinary ValueError.

    Args:
      what: what is wrong, with the value that was seen.
      where: the config field or the file, as in "upcycle.granularity" or a path.
      remedy: what would be right.
    """

    def __init__(self, what: str, *, where: str = "", remedy: str = ""):
        self.what, self.where, self.remedy = what, where, remedy
        super().__init__(": ".join(part for part in (where, what) if part) + (f"; {remedy}" if remedy else ""))
