"""Columns of numbers in a CSV file, as spreadsheets and scripts write it; what could be misread is refused.

Read are UTF-8 with or without a byte order mark and UTF-16, commas, semicolons or tabs, quoted cells, and numbers as
programs write them: digits, a decimal point, an exponent. A decimal comma, a thousands separator or a percent sign
would be a guess.
"""

from __future__ import annotations

import codecs
import csv
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nepa_scale.config import ConfigError, nearest

_SEPARATORS = ",;\t"
_EXCEL_SEPARATOR = re.compile(r'"?sep=([,;\t])"?$', re.IGNORECASE)  # a first line that some spreadsheets write
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE | re.ASCII)
_LARGEST_EXPONENT = 40  # of a logarithm's number: nothing that is counted here is larger
_LISTED = 20  # columns, in the message for one that is missing


@dataclass(frozen=True)
class Row:
    """line: of the file, from 1."""

    line: int
    cells: list[str]


@dataclass(frozen=True)
class CsvFile:
    """A header and the rows below it, each of as many cells, stripped of blanks around them."""

    path: Path
    header: list[str]
    rows: list[Row]

    def require(self, column: str, option: str, otherwise: str = "") -> None:
        """
        Raises:
            ConfigError: there is no such column, or several; `option` is what names another, and `otherwise` says what
                else would do.
        """
        count = self.header.count(column)
        if count > 1:
            raise ConfigError(f"{self.path} has {count} columns '{column}': give each its own name")
        if not count:
            found = [name for name in self.header if name]
            listed = ", ".join(found[:_LISTED]) + (", ..." if len(found) > _LISTED else "")
            raise ConfigError(
                f"{self.path} has no column '{column}'{nearest(column, found)}: name one with {option} ({listed})"
                + otherwise
            )

    def numbers(self, column: str, *, log10: bool = False, hint: str = "") -> list[float]:
        """The column, row by row; of `log10` the numbers whose logarithms it holds.

        Raises:
            ConfigError: a cell is no number, or not a finite one that is larger than 0; its row is named, and `hint`
                says what to do about one that is not positive.
        """
        place = self.header.index(column)
        numbers = [self._number(at, row.cells[place], column, log10) for at, row in enumerate(self.rows)]
        for at, number in enumerate(numbers):
            if not 0 < number < math.inf:
                cell = self.rows[at].cells[place]
                raise ConfigError(f"{self.place(at)}: {column} is {cell}, and must be positive and finite{hint}")
        return numbers

    def require_different_rows(self) -> None:
        """
        Raises:
            ConfigError: a row repeats another in every cell, so that one run would count twice.
        """
        first: dict[tuple[str, ...], int] = {}
        for at, row in enumerate(self.rows):
            same = first.setdefault(tuple(row.cells), at)
            if same != at:
                raise ConfigError(
                    f"{self.place(at)} repeats row {same + 1} in every cell: take one out, or, if they are two runs, "
                    "add a column that tells them apart, as their seed"
                )

    def place(self, at: int) -> str:
        """The row of index `at`, for people: rows are counted from 1 below the header, lines with it."""
        return f"{self.path}, row {at + 1} (line {self.rows[at].line})"

    def _number(self, at: int, cell: str, column: str, log10: bool) -> float:
        if not cell:
            raise ConfigError(f"{self.place(at)}: {column} is empty")
        if not _NUMBER.fullmatch(cell):
            raise ConfigError(f"{self.place(at)}: {column} is '{cell}', {_what_is_wrong(cell)}")
        value = float(cell)
        if log10 and abs(value) > _LARGEST_EXPONENT:
            raise ConfigError(
                f"{self.place(at)}: {column} is {cell}, which is no logarithm: leave out --log10 {column}"
            )
        return 10.0**value if log10 else value


def read_csv_file(path: Path) -> CsvFile:
    """
    Raises:
        ConfigError: it cannot be read, is empty or no CSV, or a row has more or fewer cells than the header.
    """
    text = _text(path)
    if not text.strip():
        raise ConfigError(f"{path} is empty")
    if text.lstrip()[0] in "{[":
        raise ConfigError(f"{path} is JSON: give a CSV file with a header, or the run folders themselves")
    lines = _lines(path, text)
    header = lines[0].cells
    if len(header) == 1:
        raise ConfigError(f"{path} has one column only, '{header[0]}': separate columns by commas, semicolons or tabs")
    file = CsvFile(path, header, lines[1:])
    if not file.rows:
        raise ConfigError(f"{path} holds no rows below its header")
    for at, row in enumerate(file.rows):
        if len(row.cells) != len(header):
            comma = " (a comma inside a number?)" if len(row.cells) > len(header) else ""
            raise ConfigError(
                f"{file.place(at)} has {len(row.cells)} cells{comma}, and the header {len(header)}: mend the row"
            )
    return file


def _text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}, line {line} is not UTF-8 text: save the file as CSV in UTF-8") from error
    if "\0" in text:
        raise ConfigError(f"{path} is not text: save it as CSV in UTF-8")
    return text


def _lines(path: Path, text: str) -> list[Row]:
    """The header's and each row's; blank lines are none."""
    first = next(line for line in text.splitlines() if line.strip())
    told = _EXCEL_SEPARATOR.match(first.strip(" "))
    rows = []
    reader = csv.reader([first])
    try:
        separator = told[1] if told else max(_SEPARATORS, key=lambda mark: len(_split(first, mark)))
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True)
        for cells in reader:
            stripped = [cell.strip() for cell in cells]
            if len(stripped) > 1 or any(stripped):
                rows.append(Row(reader.line_num, stripped))
    except csv.Error as error:
        raise ConfigError(f"{path}, line {reader.line_num} is not CSV: {error}") from error
    return rows[1:] if told else rows


def _split(line: str, separator: str) -> Sequence[str]:
    """The line's cells; separators in quotes are none."""
    return next(csv.reader([line], delimiter=separator, skipinitialspace=True))


def _what_is_wrong(cell: str) -> str:
    if cell.endswith("%"):
        return "a percentage: write the share, 0.435 for 43.5%"
    if re.fullmatch(r"[+-]?[\d.,'_\s]*\d", cell):
        return "not a number: write it with a decimal point, and without separators of thousands"
    if cell.lower().lstrip("+-") in ("nan", "inf", "infinity"):
        return "not finite: take the row out"
    return "not a number"
