"""What a CSV file says is read as it is meant, or refused with the column and the row at fault."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nepa_scale.config import ConfigError
from nepa_scale.scaling.csv_file import read_csv_file
from nepa_scale.scaling.direction import require_falling
from nepa_scale.scaling.points import Columns, Points, read_csv

COLUMNS = Columns("parameters", "samples", "loss")
GRID = [(n, d, 0.5 + 300 / n**0.35 + 900 / d**0.33) for n in (10**6, 10**7, 10**8) for d in (10**7, 10**8, 10**9)]
TABLE = "parameters,samples,loss\n" + "".join(f"{n},{d},{y}\n" for n, d, y in GRID)


@pytest.fixture
def points_of(tmp_path: Path) -> Callable[..., Points]:
    def read(content: str | bytes, columns: Columns = COLUMNS) -> Points:
        path = tmp_path / "points.csv"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_csv(path, columns)

    return read


@pytest.mark.parametrize(
    "content",
    [
        TABLE,
        b"\xef\xbb\xbf" + TABLE.encode(),
        TABLE.encode("utf-16"),
        TABLE.replace("\n", "\r\n"),
        TABLE.replace(",", ";"),
        "sep=;\n" + TABLE.replace(",", ";"),
        TABLE.replace(",", "\t"),
        TABLE.replace(",", ", "),
        "\n" + TABLE.replace("\n", "\n\n"),
        '"parameters","samples","loss"\n' + TABLE.split("\n", 1)[1],
        "note,parameters,samples,loss\n" + "".join(f'"a, b",{n},{d},{y}\n' for n, d, y in GRID),
    ],
    ids=[
        "plain",
        "bom",
        "utf16",
        "crlf",
        "semicolons",
        "sep",
        "tabs",
        "blanks",
        "blank lines",
        "quotes",
        "comma in text",
    ],
)
def test_what_spreadsheets_write_is_read_alike(content: str | bytes, points_of: Callable[..., Points]) -> None:
    points = points_of(content)
    assert list(zip(points.parameters, points.samples, points.loss, strict=True)) == GRID


def with_cell(text: str, separator: str = ",") -> str:
    """The table, its third row's loss written in another way."""
    lines = TABLE.replace(",", separator).splitlines()
    lines[3] = separator.join([*lines[3].split(separator)[:2], text])
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "is empty"),
        ("parameters,samples,loss\n", "no rows below its header"),
        ("parameters\n1\n", "one column only, 'parameters'"),
        ('{"parameters": [1]}', "is JSON"),
        (TABLE.encode() + b"1,2,\xff\n", "line 11 is not UTF-8"),
        (TABLE.encode() + b"\0", "is not text"),
        (TABLE.replace("samples", "smaples"), "has no column 'samples' (did you mean 'smaples'?)"),
        ("loss," + TABLE.replace("\n", "\n1,")[:-2], "has 2 columns 'loss'"),
        (with_cell("7,710"), "row 3 (line 4) has 4 cells (a comma inside a number?), and the header 3"),
        (with_cell("7,71", ";"), "row 3 (line 4): loss is '7,71', not a number: write it with a decimal point"),
        (with_cell('"7,710"'), "loss is '7,710', not a number"),
        (with_cell("1_0"), "loss is '1_0', not a number"),
        (with_cell("43.5%"), "loss is '43.5%', a percentage: write the share"),
        (with_cell(""), "row 3 (line 4): loss is empty"),
        (with_cell("nan"), "loss is 'nan', not finite"),
        (with_cell("-inf"), "loss is '-inf', not finite"),
        (with_cell("-0.995"), "loss is -0.995, and must be positive and finite: fit 1 + loss, or an error rate"),
        (with_cell("0"), "loss is 0, and must be positive"),
        (with_cell("1e999"), "loss is 1e999, and must be positive and finite"),
        ("parameters,samples,loss\n1e6,1e7\n", "row 1 (line 2) has 2 cells, and the header 3"),
        (TABLE + TABLE.splitlines()[2] + "\n", "row 10 (line 11) repeats row 2 in every cell"),
        (TABLE + '1,2,"3\n', "is not CSV"),
    ],
)  # fmt: skip
def test_what_could_be_misread_is_refused(content: str | bytes, why: str, points_of: Callable[..., Points]) -> None:
    with pytest.raises(ConfigError) as caught:
        points_of(content)
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)


def test_samples_follow_from_compute_where_that_is_asked_for(points_of: Callable[..., Points]) -> None:
    table = "parameters,flops,loss\n" + "".join(f"{n},{6 * n * d},{y}\n" for n, d, y in GRID)
    with pytest.raises(ConfigError, match=r"no column 'samples'.*--samples-from-flops 6ND"):
        points_of(table, Columns("parameters", "samples", "loss", "flops"))
    columns = Columns("parameters", None, "loss", "flops")
    points = points_of(table, columns)
    assert points.samples == [d for _, d, _ in GRID]
    assert points.names == ("parameters", "flops / (6 parameters)", "loss")
    broken = table.replace(str(6 * 10**13), "0", 1)
    with pytest.raises(ConfigError, match=r"row 1 \(line 2\): flops is 0, and must be positive"):
        points_of(broken, columns)


def test_logarithms_are_read_where_they_are_named_and_else_refused(points_of: Callable[..., Points]) -> None:
    table = "parameters,samples,loss\n" + "".join(f"{len(str(n)) - 1},{d},{y}\n" for n, d, y in GRID)
    with pytest.raises(ConfigError, match=r"parameters holds 6 to 8, which look like logarithms.*--log10 parameters"):
        points_of(table)
    points = points_of(table, Columns("parameters", "samples", "loss", log10=("parameters",)))
    assert points.parameters == [n for n, _, _ in GRID]
    with pytest.raises(ConfigError, match=r"row 1 \(line 2\): samples is 10000000, which is no logarithm"):
        points_of(table, Columns("parameters", "samples", "loss", log10=("parameters", "samples")))
    with pytest.raises(ConfigError, match="--log10 params is none of the columns that are read"):
        points_of(table, Columns("parameters", "samples", "loss", log10=("params",)))
    with pytest.raises(ConfigError, match="--samples and --parameters both name the column parameters"):
        points_of(table, Columns("parameters", "parameters", "loss"))


@pytest.mark.parametrize(
    ("loss", "what"),
    [
        (lambda n, _: 0.2 + n**0.05, "rises with parameters"),
        (lambda _, d: 0.2 + d**0.05, "rises with samples"),
        (lambda n, d: 1 - 300 / n**0.35 - 9 / d**0.33, "rises with parameters"),
    ],
    ids=["with N", "with D", "an accuracy"],
)
def test_a_quantity_that_rises_is_no_loss(loss: Callable[[int, int], float], what: str) -> None:
    n, d = [float(n) for n, _, _ in GRID], [float(d) for _, d, _ in GRID]
    require_falling(Points(n, d, [y for *_, y in GRID], None))
    with pytest.raises(ConfigError, match=f"accuracy {what}.*1 - accuracy"):
        require_falling(Points(n, d, [loss(n, d) for n, d, _ in GRID], None, ("parameters", "samples", "accuracy")))


def test_rows_are_counted_below_the_header(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("a,b\n\n1,2\n\n3,4\n")
    file = read_csv_file(tmp_path / "p.csv")
    assert [file.place(at).rpartition("/")[2] for at in range(2)] == ["p.csv, row 1 (line 3)", "p.csv, row 2 (line 5)"]
