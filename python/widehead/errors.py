"""widehead/errors.py -- the errors that Python code of widehead raises beside those of the core."""

from __future__ import annotations

from ._core import Error


class DataError(Error, ValueError):
    """A data file that cannot be read as what it claims to be. The message names the file, the line and the reason."""
