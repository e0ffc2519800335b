"""What a user can get wrong, as one tree of exceptions. Knows exit codes; prints nothing.

Each message says what happened and what to do next. The command line catches `DinosearchError` in one place.
"""


class DinosearchError(Exception):
    """A mistake or a circumstance that the user can mend; the message is one line."""

    exit_code = 1


class UsageError(DinosearchError):
    """The command line or an argument does not make sense."""

    exit_code = 2


class ModelNotFound(DinosearchError):
    """No model where one was named, or none at all."""


class IndexUnusable(DinosearchError):
    """The index is missing, stale, damaged or was made with another model."""

    exit_code = 4


class IndexNotFound(IndexUnusable):
    """No index where one was named, or none at all."""


class ModelMismatch(IndexUnusable):
    """The index holds vectors of another model than the one at hand."""


class IndexLocked(DinosearchError):
    """Another process is writing this index."""

    exit_code = 5


class ModelLocked(DinosearchError):
    """Another process is training this model."""

    exit_code = 5


class Interrupted(DinosearchError):
    """The user or the system asked to stop; what was done is saved."""

    exit_code = 130
