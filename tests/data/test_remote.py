"""Remote shards, against a real HTTP server on this machine that stalls, truncates and fails on purpose."""

from __future__ import annotations

import errno
import http.client
import http.server
import multiprocessing
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from nepa_scale.config import ConfigError, DataConfig
from nepa_scale.data.description import Description
from nepa_scale.data.index_files import find_index
from nepa_scale.data.remote import MissingRemote, Remote, RemoteError
from nepa_scale.data.shard_cache import ShardCache
from nepa_scale.data.shard_maker import make_shards
from nepa_scale.data.shard_set import BadSample, ShardSet
from nepa_scale.data.shard_writer import SourceSample, write_shard
from nepa_scale.data.tar_index import ShardIndex

SAMPLES = 40
Handler = http.server.BaseHTTPRequestHandler


@dataclass
class Server:
    """Serves `folder`; `faults[name]` are callables that answer the next requests for that file instead."""

    folder: Path
    url: str = ""
    faults: dict[str, list[Callable[[Handler, bytes], None]]] = field(default_factory=dict)
    requests: Counter[str] = field(default_factory=Counter)
    closing: threading.Event = field(default_factory=threading.Event)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    served = Server(tmp_path / "served")

    class Answer(Handler):
        def do_GET(self) -> None:
            name = self.path.lstrip("/")
            served.requests[name] += 1
            path = served.folder / name
            content = path.read_bytes() if path.is_file() else b""
            faults = served.faults.get(name) or served.faults.get("*")
            if faults:
                (faults.pop(0) if len(faults) > 1 or name in served.faults else faults[0])(self, content)
            elif not path.is_file():
                self.send_error(404)
            else:
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    listener = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    listener.daemon_threads = True
    served.url = f"http://127.0.0.1:{listener.server_port}"
    threading.Thread(target=listener.serve_forever, args=(0.05,), daemon=True).start()
    yield served
    served.closing.set()
    listener.shutdown()
    listener.server_close()


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    return DataConfig(cache=str(tmp_path / "cache"), timeout=1.0, retries=2)


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nepa_scale.data.remote._FIRST_PAUSE", 0.01)


def fill(folder: Path, shards: int = 3, described: bool = True) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    made = [
        write_shard(
            folder / f"s-{shard}.tar",
            [
                SourceSample(f"{shard}-{n}", b"\xff\xd8\xff" + bytes(1000) + f"{shard} {n}".encode(), n)
                for n in range(SAMPLES)
            ],
        )
        for shard in range(shards)
    ]
    if described:
        (folder / "dataset.json").write_text(Description(made, SAMPLES, None).to_json())


def check_all(shards: ShardSet, count: int = 3) -> None:
    assert len(shards) == count * SAMPLES
    for number in range(len(shards)):
        shard, place = divmod(number, SAMPLES)
        sample = shards.read(number)
        assert (sample.key, sample.label) == (f"{shard}-{place}", place)
        assert sample.image.endswith(f"{shard} {place}".encode())


def stall(server: Server, after: int) -> Callable[[Handler, bytes], None]:
    def answer(handler: Handler, content: bytes) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content[:after])
        handler.wfile.flush()
        server.closing.wait(20)

    return answer


def stay_silent(server: Server) -> Callable[[Handler, bytes], None]:
    return lambda _handler, _content: server.closing.wait(20) and None


def drip(server: Server) -> Callable[[Handler, bytes], None]:
    def answer(handler: Handler, content: bytes) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        for byte in content:
            if server.closing.wait(0.05):
                return
            try:
                handler.wfile.write(bytes([byte]))
                handler.wfile.flush()
            except OSError:
                return

    return answer


def drip_headers(server: Server) -> Callable[[Handler, bytes], None]:
    def answer(handler: Handler, _content: bytes) -> None:
        handler.wfile.write(b"HTTP/1.0 200 OK\r\n")
        while not server.closing.wait(0.05):
            try:
                handler.wfile.write(b"X")
                handler.wfile.flush()
            except OSError:
                return

    return answer


def truncate(handler: Handler, content: bytes) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content[: len(content) // 2])


def cut_without_length(handler: Handler, content: bytes) -> None:
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(content[: len(content) // 2])


def corrupt(handler: Handler, content: bytes) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content[:2000] + b"?" + content[2001:])


def fail(status: int) -> Callable[[Handler, bytes], None]:
    return lambda handler, _content: handler.send_error(status)


def hang_up(handler: Handler, _content: bytes) -> None:
    handler.connection.close()


def test_a_described_set_opens_without_fetching_shards(server: Server, data: DataConfig) -> None:
    fill(server.folder)
    for source in (server.url, f"{server.url}/", f"{server.url}/s-{{0..2}}.tar"):
        server.requests.clear()
        shards = ShardSet.open(source, data)
        assert (len(shards), shards.shard_sizes, shards.classes) == (3 * SAMPLES, [SAMPLES] * 3, SAMPLES)
        assert shards.remote
        assert server.requests == {"dataset.json": 1}
    shards.read(SAMPLES)
    assert server.requests == {"dataset.json": 1, "s-1.tar": 1}
    check_all(shards)
    check_all(ShardSet.open(server.url, data))
    assert [server.requests[f"s-{n}.tar"] for n in range(3)] == [1, 1, 1]


def test_an_undescribed_set_is_counted_by_its_indices(server: Server, data: DataConfig) -> None:
    fill(server.folder, described=False)
    shards = ShardSet.open(f"{server.url}/s-{{0..2}}.tar", data)
    assert (len(shards), shards.classes) == (3 * SAMPLES, SAMPLES)
    assert not any(name.endswith(".tar") for name in server.requests)
    check_all(shards)


def test_a_set_with_neither_is_fetched_to_be_counted(server: Server, data: DataConfig) -> None:
    fill(server.folder, described=False)
    for index in server.folder.glob("*.idx"):
        index.unlink()
    shards = ShardSet.open(f"{server.url}/s-{{0..2}}.tar", data)
    assert shards.classes == SAMPLES
    check_all(shards)
    assert [server.requests[f"s-{n}.tar"] for n in range(3)] == [1, 1, 1]


@pytest.mark.parametrize("fault", [truncate, cut_without_length, corrupt, hang_up, fail(500), fail(503), fail(429)])
def test_a_passing_fault_is_tried_again(
    server: Server, data: DataConfig, fault: Callable[[Handler, bytes], None]
) -> None:
    fill(server.folder)
    server.faults = {"dataset.json": [fail(500)], "s-0.tar": [fault, fault], "s-2.tar": [stall(server, 3000)]}
    check_all(ShardSet.open(server.url, data))
    assert [server.requests[f"s-{n}.tar"] for n in range(3)] == [3, 1, 2]


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        (lambda server: stay_silent(server), "silent"),
        (lambda server: stall(server, 0), "silent"),
        (lambda server: stall(server, 5000), "silent for 1 s after 5000 bytes"),
        (lambda server: drip(server), "fewer than 1024 bytes a second"),
        (lambda server: drip_headers(server), "silent"),
        (lambda _: truncate, "the connection ended after"),
        (lambda _: corrupt, "checksum"),
        (lambda _: hang_up, ""),
        (lambda _: fail(500), "HTTP 500"),
    ],
)
def test_a_lasting_fault_is_a_clear_error_in_time(
    server: Server, data: DataConfig, fault: Callable[[Server], Callable[[Handler, bytes], None]], why: str
) -> None:
    fill(server.folder)
    shards = ShardSet.open(server.url, data)
    server.faults = {"*": [fault(server)]}
    start = time.monotonic()
    with pytest.raises(RemoteError) as caught:
        shards.read(0)
    attempts = data.retries + 1
    assert time.monotonic() - start < attempts * 2 * data.timeout + 1
    assert f"{server.url}/s-0.tar" in str(caught.value)
    assert f"{attempts} attempts" in str(caught.value)
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)
    assert server.requests["s-0.tar"] == attempts
    copies = Path(str(data.cache)) / "copies"
    assert not [path for path in copies.iterdir() if path.suffix in (".tar", ".part")]
    server.faults = {}
    assert shards.read(0).key == "0-0", "nothing of the failure stays"


def test_nobody_listening_is_a_clear_error(data: DataConfig) -> None:
    with pytest.raises(RemoteError, match="refused"):
        ShardSet.open("http://127.0.0.1:9/s-{0..3}.tar", data)


def test_refusal_is_not_tried_again(server: Server, data: DataConfig) -> None:
    fill(server.folder)
    shards = ShardSet.open(server.url, data)
    server.faults = {"s-0.tar": [fail(403)]}
    with pytest.raises(RemoteError, match="403"):
        shards.read(0)
    assert server.requests["s-0.tar"] == 1


def test_a_missing_remote_shard_is_bad_samples(server: Server, data: DataConfig) -> None:
    fill(server.folder)
    (server.folder / "s-1.tar").unlink()
    shards = ShardSet.open(server.url, data)
    for number in range(SAMPLES, 2 * SAMPLES):
        with pytest.raises(BadSample, match="missing"):
            shards.read(number)
    assert server.requests["s-1.tar"] == 1
    assert shards.read(2 * SAMPLES).key == "2-0"


def test_an_undescribed_missing_shard_counts_as_one_bad_sample(server: Server, data: DataConfig) -> None:
    fill(server.folder, described=False)
    shards = ShardSet.open(f"{server.url}/s-{{0..3}}.tar", data)
    assert len(shards) == 3 * SAMPLES + 1
    with pytest.raises(BadSample, match="missing"):
        shards.read(3 * SAMPLES)


def test_nothing_there_names_the_source(server: Server, data: DataConfig) -> None:
    server.folder.mkdir()
    for source in (f"{server.url}/set", f"{server.url}/s-{{0..3}}.tar"):
        with pytest.raises(ConfigError, match="no shards are found"):
            ShardSet.open(source, data)


def _read_everything(url: str, data: DataConfig) -> int:
    shards = ShardSet.open(url, data)
    return sum(len(shards.read(number).image) for number in range(len(shards)))


def test_processes_share_one_copy(server: Server, data: DataConfig) -> None:
    fill(server.folder)
    with multiprocessing.get_context("forkserver").Pool(4) as pool:
        sums = pool.starmap(_read_everything, [(server.url, data)] * 4)
    assert len(set(sums)) == 1
    assert [server.requests[f"s-{n}.tar"] for n in range(3)] == [1, 1, 1]


def test_those_who_wait_for_a_dead_server_fail_together(server: Server, data: DataConfig) -> None:
    fill(server.folder)
    sets = [ShardSet.open(server.url, data) for _ in range(5)]
    server.faults = {"*": [stall(server, 10)]}
    errors: list[str] = []

    def read(shards: ShardSet) -> None:
        try:
            shards.read(0)
        except RemoteError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=read, args=(shards,)) for shards in sets]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 5
    assert time.monotonic() - start < 2 * (data.retries + 1) * data.timeout + 1
    assert server.requests["s-0.tar"] == data.retries + 1


def _cached(data: DataConfig) -> list[Path]:
    return sorted((Path(str(data.cache)) / "copies").glob("*.tar"))


def test_the_cache_keeps_to_its_limit_and_to_what_was_used_last(server: Server, data: DataConfig) -> None:
    fill(server.folder, shards=6)
    size = (server.folder / "s-0.tar").stat().st_size
    data.cache_gigabytes = 3.5 * size / 1e9
    data.open_shards = 2
    shards = ShardSet.open(server.url, data)
    for shard in (0, 1, 2, 0, 3):
        shards.ensure_local(shard)
    assert {path.name.partition("-")[2] for path in _cached(data)} == {"s-0.tar", "s-2.tar", "s-3.tar"}
    for number in range(0, len(shards), 7):
        shards.read(number)
        assert sum(path.stat().st_size for path in _cached(data)) <= 3.5 * size
    check_all(shards, 6)


def test_what_is_open_stays_readable_when_it_is_removed(server: Server, data: DataConfig) -> None:
    fill(server.folder, shards=2)
    data.cache_gigabytes = 1.5 * (server.folder / "s-0.tar").stat().st_size / 1e9
    first, second = ShardSet.open(server.url, data), ShardSet.open(server.url, data)
    assert first.read(0).key == "0-0"
    second.read(SAMPLES)
    assert len(_cached(data)) == 1
    assert first.read(1).key == "0-1"
    assert server.requests["s-0.tar"] == 1


def _read_at_random(url: str, data: DataConfig, seed: int) -> bool:
    shards = ShardSet.open(url, data)
    numbers = [(seed * 7919 + step * 104_729) % len(shards) for step in range(150)]
    return all(shards.read(n).key == f"{n // SAMPLES}-{n % SAMPLES}" for n in numbers)


def test_processes_that_remove_each_others_copies_still_read_right(server: Server, data: DataConfig) -> None:
    fill(server.folder, shards=6)
    data.timeout = 10.0
    data.cache_gigabytes = 2.5 * (server.folder / "s-0.tar").stat().st_size / 1e9
    data.open_shards = 1
    with multiprocessing.get_context("forkserver").Pool(3) as pool:
        assert all(pool.starmap(_read_at_random, [(server.url, data, seed) for seed in range(3)]))


def test_a_copy_that_is_removed_before_it_is_indexed_is_fetched_again(
    server: Server, data: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(server.folder)
    shards = ShardSet.open(server.url, data)
    removals = iter([True, True])

    def find_after_removal(shard: Path, cache: Path) -> tuple[Path, ShardIndex] | None:
        if next(removals, False):
            shard.unlink()
        return find_index(shard, cache)

    monkeypatch.setattr("nepa_scale.data.shard_set.find_index", find_after_removal)
    check_all(shards)
    assert server.requests["s-0.tar"] == 3


def test_a_cache_that_holds_one_shard_is_enough_to_count_them(server: Server, data: DataConfig) -> None:
    """Threads that fetch remove each other's copies, and meet files that come and go."""
    fill(server.folder, shards=12, described=False)
    for index in server.folder.glob("*.idx"):
        index.unlink()
    data.cache_gigabytes = 1.2 * (server.folder / "s-0.tar").stat().st_size / 1e9
    check_all(ShardSet.open(f"{server.url}/s-{{0..11}}.tar", data), 12)


def test_an_answer_that_comes_after_it_was_given_up_spoils_nothing(server: Server, data: DataConfig) -> None:
    """The first attempt's thread wakes while the second attempt is half way through the same file."""
    fill(server.folder, shards=1)
    whole = (server.folder / "s-0.tar").read_bytes()
    woke, step = threading.Event(), len(whole) // 4 + 1

    def late(handler: Handler, content: bytes) -> None:
        server.closing.wait(1.6 * data.timeout)
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)
        woke.set()

    def slow(handler: Handler, content: bytes) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content[:step])
        woke.wait(10)
        for start in range(step, len(content), step):
            server.closing.wait(0.1)
            handler.wfile.write(content[start : start + step])

    server.faults["s-0.tar"] = [late, slow]
    data.timeout = 1.0
    copy = ShardCache.from_config(data).local(f"{server.url}/s-0.tar")
    assert copy.read_bytes() == whole
    assert server.requests["s-0.tar"] == 2


def test_a_network_that_goes_away_is_tried_again(
    server: Server, data: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No route to host: neither a ConnectionError nor a TimeoutError, and not the disk's fault."""
    fill(server.folder)
    read, failures = http.client.HTTPResponse.read1, iter([True])

    def read_or_fail(response: http.client.HTTPResponse, size: int = -1) -> bytes:
        if next(failures, False):
            raise OSError(errno.EHOSTUNREACH, os.strerror(errno.EHOSTUNREACH))
        return read(response, size)

    monkeypatch.setattr(http.client.HTTPResponse, "read1", read_or_fail)
    check_all(ShardSet.open(server.url, data))


def test_a_shard_larger_than_the_cache_is_an_error(server: Server, data: DataConfig) -> None:
    fill(server.folder)
    data.cache_gigabytes = 1e-6
    with pytest.raises(ConfigError, match=r"data\.cache_gigabytes"):
        ShardSet.open(server.url, data).read(0)


def test_parts_of_killed_processes_make_room(server: Server, data: DataConfig) -> None:
    fill(server.folder)
    size = (server.folder / "s-0.tar").stat().st_size
    data.cache_gigabytes = 1.5 * size / 1e9
    cache = ShardCache.from_config(data)
    cache.folder.mkdir(parents=True)
    abandoned = cache.folder / f".abandoned.tar.{'0' * 32}.part"
    abandoned.write_bytes(bytes(size))
    cache.local(f"{server.url}/s-0.tar")
    assert not abandoned.exists()


def test_a_cache_that_cannot_be_written_is_an_error(server: Server, data: DataConfig, tmp_path: Path) -> None:
    fill(server.folder)
    (tmp_path / "file").touch()
    data.cache = str(tmp_path / "file")
    with pytest.raises(ConfigError, match=r"data\.cache"):
        ShardSet.open(server.url, data).read(0)


def test_pipes_need_permission(data: DataConfig, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    listed = tmp_path / "list.txt"
    listed.write_text(f"pipe:touch {marker}\n")
    for source in (f"pipe:touch {marker}", f"nowhere.tar::pipe:touch {marker}", str(listed)):
        with pytest.raises(ConfigError, match=r"data\.allow_pipe"):
            ShardSet.open(source, data)
    assert not marker.exists()


def test_a_pipe_runs_once_and_is_kept(data: DataConfig, tmp_path: Path) -> None:
    fill(tmp_path / "set", described=False)
    data.allow_pipe = True
    source = f"pipe:echo x >> {tmp_path}/runs; cat {tmp_path}/set/s-{{0..2}}.tar"
    check_all(ShardSet.open(source, data))
    check_all(ShardSet.open(source, data))
    assert (tmp_path / "runs").read_text() == "x\n" * 3


@pytest.mark.parametrize(("command", "why"), [("head -c 99 /dev/zero; exit 3", "status 3"), ("sleep 30", "silent")])
def test_a_failing_pipe_is_an_error(data: DataConfig, command: str, why: str) -> None:
    data.allow_pipe = True
    start = time.monotonic()
    with pytest.raises(RemoteError, match=why):
        ShardSet.open(f"pipe:{command}", data)
    assert time.monotonic() - start < 5


def test_other_protocols_go_through_fsspec(data: DataConfig, tmp_path: Path) -> None:
    import fsspec

    fill(tmp_path / "set")
    memory = fsspec.filesystem("memory")
    for path in (tmp_path / "set").iterdir():
        memory.pipe(f"/bucket/{path.name}", path.read_bytes())
    check_all(ShardSet.open("memory://bucket", data))
    memory.rm("/bucket/dataset.json")
    check_all(ShardSet.open("memory://bucket", data))
    check_all(ShardSet.open("memory://bucket/s-*.tar", data))
    check_all(ShardSet.open("memory://bucket/s-{0..2}.tar", data))
    memory.rm("/bucket", recursive=True)


def test_an_unknown_protocol_is_an_error(data: DataConfig) -> None:
    with pytest.raises(ConfigError, match="nosuch"):
        ShardSet.open("nosuch://bucket/a.tar", data)


def test_fetch_tells_missing_from_failed(server: Server, tmp_path: Path) -> None:
    server.folder.mkdir()
    with pytest.raises(MissingRemote):
        Remote(1.0, 2, False).fetch(f"{server.url}/nothing", tmp_path / "target")
    assert server.requests["nothing"] == 1
    assert not os.path.exists(tmp_path / "target")


def test_a_remote_set_larger_than_the_cache_cannot_be_made_into_new_shards(
    server: Server, data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(server.folder)
    monkeypatch.setattr("nepa_scale.data.ingest.DataConfig", lambda: data)
    assert make_shards(server.url, tmp_path / "all", workers=1).shards[0].samples == 3 * SAMPLES
    data.cache, data.cache_gigabytes = str(tmp_path / "small"), 1.5e-9 * (server.folder / "s-0.tar").stat().st_size
    with pytest.raises(ConfigError, match=r"is larger than the cache of .* copy the shards to a local folder"):
        make_shards(server.url, tmp_path / "none", workers=1)
