"""The exception tree of dbf2gguf.

Every message says what failed, where, what was found, what was wanted and, where there is one,
the next step. Command-line programs print it as one line (`error: ...`) and exit with 1.
"""


class DbfError(Exception):
    """Superclass of all errors that a user can cause or repair. Never raised directly."""


class FormatError(DbfError):
    """A file is not what it claims to be: truncated, inconsistent, or of an unknown type."""


class UnsupportedModelError(DbfError):
    """A well-formed model uses an architecture or a feature that is not implemented."""


class BackendError(DbfError):
    """The compute backend is missing, was misused, or failed."""


class OptionError(DbfError):
    """An option's value is out of range or contradicts another."""


class ContextError(DbfError):
    """A prompt does not fit the context; raised before anything is computed."""


class TemplateError(DbfError):
    """A model's chat template is broken, forbidden something, or tried something forbidden."""


class QualityError(DbfError):
    """A conversion came out too far from the original to be written."""


def first_line(error: BaseException) -> str:
    """Of an error's message, for a message of ours; what kind of error it is if it has none."""
    return (str(error).strip().splitlines() or [repr(error)])[0]
