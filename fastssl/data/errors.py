"""What can be wrong with data: the user's to mend (DataError), or one item's alone (BadItem)."""


class DataError(ValueError):
    """The data cannot be used as asked.  The message is one sentence that says what to do."""

    exit_code = 2


class BadItem(ValueError):
    """One item cannot be read: `name` says which, `reason` why.  A loader lists it and goes on."""

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"
