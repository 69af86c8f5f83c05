"""The one way to open a table that somebody else wrote, as CSV or with tabs, and what goes wrong with it, in words."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from paddlemix.errors import MissingFileError, UserError
from paddlemix.lfs import refuse_pointer


@contextlib.contextmanager
def opened_table(path: Path, longest_cell: int) -> Iterator[TextIO]:
    """The text of a table, for `csv.reader`.

    Args:
        path: UTF-8, with or without a byte order mark.
        longest_cell: characters; more is a quotation mark that is never closed.

    Raises:
        MissingFileError: the file does not exist or cannot be read.
        UserError: it is not UTF-8, or its cells cannot be told apart.
    """
    refuse_pointer(path, f"table '{path}'")
    # a limit for the whole process, the only way that `csv` offers
    csv.field_size_limit(longest_cell)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield file
    except FileNotFoundError as error:
        raise MissingFileError(f"table '{path}' does not exist (looked in {Path.cwd()})") from error
    except OSError as error:
        raise MissingFileError(f"table '{path}' cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"table '{path}' is not UTF-8 ({error.reason}); save it as UTF-8") from error
    except csv.Error as error:
        raise UserError(f"table '{path}' cannot be read: {error}; is a quotation mark missing?") from error
