"""Bad samples: each listed once whoever finds it, counted, and bounded."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest

from nepa_scale.data.bad_samples import LEAST, BadSampleLog, DataError
from nepa_scale.data.shard_set import BadSample


def bad(number: int, why: str = "truncated") -> BadSample:
    return BadSample("shard-0.tar", f"key{number}", why)


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_is_listed_once_with_shard_key_and_reason(tmp_path: Path) -> None:
    path = tmp_path / "run" / "bad_samples.jsonl"  # the folder need not be there yet
    log = BadSampleLog(path, 0.5)
    log.add(10, [])
    assert not path.exists()
    log.add(10, [bad(1), bad(2), bad(1)])
    log.add(10, [bad(2)])
    BadSampleLog(path, 0.5).add(10, [bad(1), bad(3)])  # a later run in the same folder
    log.add(10, [bad(3), bad(4)])
    assert [row["key"] for row in rows(path)] == ["key1", "key2", "key3", "key4"]
    assert rows(path)[0] == {"shard": "shard-0.tar", "key": "key1", "why": "truncated"}
    assert (log.read, log.bad) == (40, 6)


def test_a_torn_line_is_survived(tmp_path: Path) -> None:
    path = tmp_path / "bad_samples.jsonl"
    path.write_text('{"shard": "shard-0.tar", "key": "key1", "why": "x"}\n{"shard": "shard-0.tar", "ke')
    BadSampleLog(path, 0.5).add(9, [bad(1), bad(2)])
    BadSampleLog(path, 0.5).add(9, [bad(2)])
    lines = path.read_text().splitlines()
    assert len(lines) == 3
    assert json.loads(lines[2])["key"] == "key2"


def _report(path: Path, offset: int) -> None:
    log = BadSampleLog(path, 1.0)
    for number in range(60):
        log.add(10, [bad(number + offset)])


def test_processes_that_find_the_same_samples_list_them_once(tmp_path: Path) -> None:
    path = tmp_path / "bad_samples.jsonl"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_report, args=(path, 10 * rank)) for rank in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert sorted(row["key"] for row in rows(path)) == sorted(f"key{number}" for number in range(90))


def test_too_many_stop_the_run_with_a_summary(tmp_path: Path) -> None:
    path = tmp_path / "bad_samples.jsonl"
    log = BadSampleLog(path, 0.01)
    for number in range(10):
        log.add(1, [bad(number)])  # all of the first ten: forgiven, as 1% of the first thousand
    log.add(3 * LEAST, [])
    log.add(1, [bad(number, "no label") for number in range(20)])
    with pytest.raises(DataError) as raised:
        log.add(1, [bad(99, "number 99 is odd")])
    message = str(raised.value)
    for part in ("31 of 3012", "max_bad_fraction=0.01", "20 x no label", "10 x truncated", "key99", str(path)):
        assert part in message
    assert "\n" not in message


def test_none_are_allowed_where_none_is_the_limit() -> None:
    log = BadSampleLog(None, 0.0)
    log.add(10**6, [])
    with pytest.raises(DataError, match="1 of 1000001"):
        log.add(1, [bad(0)])


def test_a_list_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write"):
        BadSampleLog(tmp_path / "file" / "bad_samples.jsonl", 0.5).add(1, [bad(0)])
