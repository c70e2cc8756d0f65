"""The one root error; every message says what, where, and what to do."""


class CondorError(Exception):
    """Something a host or participant can act on. The message is shown as it is, without a traceback."""


class ConfigError(CondorError):
    """The configuration can't be used. `problems` holds one sentence each, all found at once."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


class StartError(CondorError):
    """The environment does not let the game start: a port in use, a locked game, an unwritable folder."""


class InvalidAnswer(CondorError):
    """A model's answer is not what the round asked for. The message names the segment and the field."""


class StorageError(CondorError):
    """The database can't be opened or used."""


class StorageUnavailable(StorageError):
    """The database can't be used just now (locked, disk full). Nothing was written; it may be tried again."""


class QueryTimeout(StorageError):
    """A query of the report took too long and was given up."""

    def __init__(self, limit_s: float) -> None:
        super().__init__(
            f"the query took longer than {limit_s:g} s and was given up; ask for less, or try again later"
        )
