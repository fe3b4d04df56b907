from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest
from test_triplet import make, values
from torch.utils.data import DataLoader
from web import Web, serve

import data_shards.stores.cache
import data_shards.stores.fetch
import data_shards.stores.local
from data_shards.dataset import ShardDataset
from data_shards.errors import UserError
from data_shards.scan import write_index
from data_shards.stores import LocalStore, RemoteStore, Store, open_store
from data_shards.stores.cache import default_cache
from data_shards.writer import ShardWriter

NAMES = ("shard-000000.tar", "shard-000001.tar")
SIZE = 200_000
SPANS = [(NAMES[number % 2], 512 * (1 + 20 * number), 3000 + 100 * number) for number in range(18)]


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No pauses, no proxy, a cache of the test's own, and a disk that is never nearly full."""
    monkeypatch.setattr(data_shards.stores.fetch, "_PAUSES", (0.01, 0.01, 0.01))
    monkeypatch.setattr(data_shards.stores.cache, "_RESERVE", (0.0, 0))
    monkeypatch.setenv("SAM_TRAINER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files of noise under the names of shards; stores do not look into them."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number, name in enumerate(NAMES):
        (folder / name).write_bytes(np.random.default_rng(number).bytes(SIZE))
    (folder / "index.npz").write_bytes(b"an index")
    return folder


@pytest.fixture
def web(folder: Path) -> Iterator[Web]:
    with serve(folder) as web:
        yield web


@pytest.fixture
def memory(folder: Path) -> Iterator[str]:
    """The files in fsspec's memory."""
    files = fsspec.filesystem("memory")
    for path in folder.iterdir():
        files.pipe_file(f"/corpus/{path.name}", path.read_bytes())
    yield "memory://corpus"
    files.store.clear()


def truth(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes()[offset : offset + size] for name, offset, size in SPANS]


def read_all(store: Store) -> list[bytes]:
    return [store.read(*span) for span in SPANS]


def cached(tmp_path: Path, ending: str = ".tar") -> list[Path]:
    return sorted((tmp_path / "cache").glob(f"*/*/*{ending}"))


def line(store: Store, *span: object) -> str:
    with pytest.raises(UserError) as caught:
        store.read(*(span or SPANS[0]))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Any store


@pytest.fixture(params=["local", "file", "memory", "http"])
def store(request: pytest.FixtureRequest, folder: Path) -> Store:
    if request.param == "http":
        return open_store(request.getfixturevalue("web").url)
    if request.param == "memory":
        return open_store(request.getfixturevalue("memory") + "/")
    return open_store(folder if request.param == "local" else f"file://{folder}")


def test_every_store_reads_the_same_bytes(store: Store, folder: Path) -> None:
    assert store.index_path().read_bytes() == b"an index" and store.index_path().name == "index.npz"
    for _ in range(2):
        assert read_all(store) == truth(folder)
        store.close()
    data = (folder / NAMES[1]).read_bytes()
    assert store.read(NAMES[1], SIZE - 10, 100) == data[-10:]
    assert store.read(NAMES[1], SIZE, 100) == store.read(NAMES[1], SIZE + 512, 4 * 10**9) == b""
    assert store.read(NAMES[1], 512, 0) == b""
    assert store.read(NAMES[1], 0, SIZE) == data
    with pytest.raises(FileNotFoundError) as caught:
        store.read("shard-000007.tar", 512, 100)
    assert caught.value.strerror == "No such file or directory"


def test_every_store_tells_what_is_missing(store: Store, folder: Path) -> None:
    names, sizes = [*NAMES, "shard-000002.tar"], [SIZE, SIZE - 1, 5]
    expected = [
        f"{store.root}/shard-000001.tar: the shard has 200000 bytes instead of 199999: copy it again, or build the "
        "corpus again",
        f"{store.root}/shard-000002.tar: the shard is missing: copy it again, or build the corpus again",
    ]
    assert list(store.missing(names, sizes)) == expected
    assert list(store.missing(NAMES, [SIZE, SIZE])) == []


@pytest.mark.parametrize("name", ["../cache/x.tar", "/etc/x.tar", "..", "index.npz", "a\\b.tar", "a\n.tar", ""])
def test_a_name_never_leads_out_of_the_folder(store: Store, name: str) -> None:
    assert "the index is damaged" in line(store, name, 512, 10)


def test_a_copy_by_pickle_reads_on(store: Store, folder: Path) -> None:
    assert read_all(store) == truth(folder)
    data = pickle.dumps(store)
    assert len(data) < 2000 and b"FileSystem" not in data
    copy = pickle.loads(data)
    store.close()
    assert read_all(copy) == truth(folder) and copy.index_path() == store.index_path()


def test_threads_may_share_it(store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_shards.stores.local, "_MAX_OPEN", 1)
    order = np.random.default_rng(0).integers(0, len(SPANS), 300).tolist()
    expected = truth(folder)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: store.read(*SPANS[number]), order))
    assert found == [expected[number] for number in order]


# Folders


def test_a_pipe_or_a_folder_in_place_of_a_shard_does_not_block(folder: Path) -> None:
    os.mkfifo(folder / "pipe.tar")
    (folder / "folder.tar").mkdir()
    for store in (open_store(folder), open_store(f"file://{folder}")):
        for name in ("pipe.tar", "folder.tar"):
            with pytest.raises(OSError) as caught:
                store.read(name, 512, 100)
            assert caught.value.strerror
        problems = list(store.missing(["pipe.tar", "folder.tar"], [1, 1]))
        assert len(problems) == 2 and all("not a file: copy the shard again" in problem for problem in problems)


def test_a_shard_that_is_replaced_is_read_on_until_it_is_forgotten(folder: Path) -> None:
    store, span = LocalStore(folder), SPANS[0]
    old = store.read(*span)
    (folder / "new").write_bytes(bytes(SIZE))
    store.forget(*span)
    assert store.read(*span) == old
    (folder / "new").rename(folder / NAMES[0])
    assert store.read(*span) == old
    store.forget(*span)
    assert store.read(*span) == bytes(span[2])
    (folder / NAMES[0]).unlink()
    store.forget(*span)
    with pytest.raises(FileNotFoundError):
        store.read(*span)


def test_files_are_closed_when_nobody_reads_them(folder: Path) -> None:
    def count() -> int:
        return sum(path.exists() and folder in path.resolve().parents for path in Path("/proc/self/fd").iterdir())

    store = LocalStore(folder)
    read_all(store)
    assert count() == 2
    store.close()
    assert count() == 0
    store.read(*SPANS[0])
    del store
    assert count() == 0


# URLs


@pytest.mark.parametrize(
    "url",
    ["pipe:cat x", "ftp://host/x", "zip::s3://b/x.zip", "simplecache::http://h/x", "s3:/b", "S3:", "http://", "gs:///",
     "http://h/x?a=b", "https://h/x#a", "github://a:b@c/"],
)  # fmt: skip
def test_other_urls_and_commands_are_refused(url: str) -> None:
    with pytest.raises(UserError) as caught:
        open_store(url)
    assert str(caught.value).startswith(f"'{url}'") and "\n" not in str(caught.value)


def test_a_folder_may_look_like_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ab:c").mkdir()
    assert isinstance(open_store("ab:c"), LocalStore) and isinstance(open_store("nothing/here"), LocalStore)
    assert (
        isinstance(open_store("S3://bucket/x/"), RemoteStore) and open_store("S3://bucket/x/").root == "s3://bucket/x"
    )


def test_a_driver_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    for url, extra in (("s3://bucket/x", "s3"), ("gs://bucket/x", "gs"), ("gcs://bucket/x", "gs")):
        with pytest.raises(
            UserError, match=rf"^{url}/index.npz: a driver is missing .*pip install 'sam-trainer\[{extra}"
        ):
            open_store(url).index_path()


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_cache("/given") == Path("/given") and default_cache() == tmp_path / "cache"
    monkeypatch.delenv("SAM_TRAINER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert default_cache() == Path("/xdg/sam-trainer")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/users/me")
    assert default_cache() == Path("/users/me/.cache/sam-trainer")


@pytest.mark.parametrize("limit", [-1, float("nan")])
def test_a_limit_that_is_none(limit: float) -> None:
    with pytest.raises(UserError, match="cache_gb"):
        open_store("memory://x", cache_gb=limit)


# Web servers


def test_what_was_read_is_not_fetched_again(web: Web, folder: Path) -> None:
    assert read_all(open_store(web.url)) == truth(folder)
    assert web.shards_asked() == len(SPANS)
    asked = [span for path, span in web.asked if path.endswith(".tar")]
    assert asked == [f"bytes={offset}-{offset + size - 1}" for _, offset, size in SPANS]
    assert read_all(open_store(web.url)) == truth(folder)
    assert web.shards_asked() == len(SPANS)


def test_requests_that_fail_are_tried_again(web: Web, folder: Path) -> None:
    web.failures = 2
    assert open_store(web.url).read(*SPANS[0]) == truth(folder)[0]
    assert web.shards_asked() == 3
    web.truncated = 2
    assert open_store(web.url).read(*SPANS[1]) == truth(folder)[1]
    web.short = 3
    assert open_store(web.url).read(*SPANS[2]) == truth(folder)[2]


@pytest.mark.parametrize(
    ("fault", "said"), [("failures", "status 503"), ("truncated", "ClientPayloadError"), ("short", "2993 bytes came")]
)
def test_a_request_that_always_fails_is_one_line(web: Web, tmp_path: Path, fault: str, said: str) -> None:
    setattr(web, fault, 100)
    message = line(open_store(web.url))
    assert message.startswith(f"{web.url}/{NAMES[0]}: cannot be fetched, tried 4× (") and said in message
    assert not cached(tmp_path)


def test_a_server_that_is_not_there_is_one_line(web: Web) -> None:
    store = open_store("http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"^http://127.0.0.1:9/index.npz: cannot be fetched, tried 4× \(ClientConn"):
        store.index_path()
    with pytest.raises(UserError, match="cannot be fetched"):
        list(store.missing(NAMES, [1, 1]))


def test_a_server_without_ranges_is_refused_and_never_read_wrongly(web: Web) -> None:
    store = open_store(web.url)
    store.index_path()
    web.ranges = False
    assert f"{NAMES[0]}: the server does not send parts of files (status 200" in line(store)
    assert f"{web.url}/index.npz: the server does not send parts" in line(open_store(web.url))
    web.ranges, web.shifted = True, 512
    assert "does not send parts of files" in line(store)


def test_who_may_not_read_is_told_so(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    web.password = "secret"
    message = line(open_store(web.url))
    assert message.startswith(f"{web.url}/index.npz: access denied (PermissionError: status 401): put user and")
    known = open_store(web.url.replace("://", "://me:secret@"))
    assert len(known.read(*SPANS[0])) == SPANS[0][2]
    assert "secret" not in known.root and "me" not in known.root
    assert not any(b"secret" in path.read_bytes() for path in (tmp_path / "cache").glob("*/remote.json"))
    with pytest.raises(FileNotFoundError) as caught:
        known.read("shard-000009.tar", 512, 10)
    assert "secret" not in str(caught.value)


def test_a_url_that_is_none_is_not_tried_again_and_hides_the_password() -> None:
    message = line(open_store("http://me:secret@host:x/corpus"))
    assert "tried 1×" in message and "secret" not in message


def test_a_missing_index_is_one_line(web: Web, folder: Path, memory: str) -> None:
    (folder / "index.npz").unlink()
    for url in (web.url, "memory://elsewhere", f"file://{folder}", f"file://{folder}/nowhere"):
        assert line(open_store(url)).startswith(f"{url}: no index.npz here: name the folder of one split")


def test_names_are_quoted(web: Web, folder: Path) -> None:
    name = "a %20b?c#d.tar"
    (folder / name).write_bytes(b"0123456789")
    assert open_store(web.url).read(name, 2, 5) == b"23456"


# The cache


def test_the_index_is_copied_only_when_it_changed(web: Web, folder: Path, tmp_path: Path) -> None:
    def copies() -> int:
        return sum(path == "/index.npz" and span == "bytes=0-7" for path, span in web.asked)

    first = open_store(web.url)
    first.read(*SPANS[0])
    assert first.index_path() == open_store(web.url).index_path() and copies() == 1
    first.index_path().write_bytes(b"damaged!")
    assert open_store(web.url).index_path().read_bytes() == b"an index" and copies() == 2
    old = first.index_path()
    (folder / "index.npz").write_bytes(b"another1")
    os.utime(folder / "index.npz", ns=(1, 1))
    (folder / NAMES[0]).write_bytes(bytes(SIZE))
    second = open_store(web.url)
    assert second.index_path().read_bytes() == b"another1" and copies() == 3
    assert second.read(*SPANS[0]) == bytes(SPANS[0][2]), "bytes of the corpus that was there before"
    assert not old.exists() and not list((tmp_path / "cache").glob("*/.*"))


def test_an_index_that_changes_while_it_is_copied(web: Web, folder: Path) -> None:
    def change(path: str) -> None:
        os.utime(folder / "index.npz", ns=(0, len(web.asked)))

    web.before = change
    with pytest.raises(UserError, match=r"index\.npz: changed while it was copied: start again"):
        open_store(web.url).index_path()


def test_kept_bytes_that_are_wrong_are_forgotten(web: Web, folder: Path, tmp_path: Path) -> None:
    store = open_store(web.url)
    expected = store.read(*SPANS[0])
    with cached(tmp_path)[0].open("r+b") as file:
        file.seek(SPANS[0][1] + 5)
        file.write(b"wrong")
    assert store.read(*SPANS[0]) != expected
    store.forget(*SPANS[0])
    assert store.read(*SPANS[0]) == expected == open_store(web.url).read(*SPANS[0])
    assert web.shards_asked() == 2
    os.truncate(cached(tmp_path)[0], SPANS[0][1] + 100)
    assert open_store(web.url).read(*SPANS[0]) == expected
    cached(tmp_path)[0].unlink()
    assert open_store(web.url).read(*SPANS[0]) == expected, "marks alone are no bytes"


def test_spans_that_overlap_or_begin_in_one_block(web: Web, folder: Path) -> None:
    store, data = open_store(web.url), (folder / NAMES[0]).read_bytes()
    spans = [(9000, 10), (512, 1000), (513, 1000), (512, 2000), (600, 10), (1024, 3000), (0, 5000), (1500, 100), (0, 1)]
    for offset, size in spans:
        assert store.read(NAMES[0], offset, size) == data[offset : offset + size]
    for offset, size in np.random.default_rng(0).permutation(spans * 4).tolist():
        assert store.read(NAMES[0], offset, size) == data[offset : offset + size]


def test_the_cache_is_sparse(web: Web, folder: Path, tmp_path: Path) -> None:
    (folder / "large.tar").write_bytes(bytes(50_000_000) + b"the end")
    assert open_store(web.url).read("large.tar", 50_000_000, 7) == b"the end"
    size = sum(path.stat().st_blocks * 512 for path in (tmp_path / "cache").rglob("*"))
    assert size < 100_000 and cached(tmp_path)[0].stat().st_size == 50_000_007


def test_a_full_cache_keeps_what_it_has(web: Web, folder: Path, tmp_path: Path) -> None:
    store = open_store(web.url, cache_gb=40e-6)
    with pytest.warns(UserWarning, match=r"cache: the cache of remote shards is full: .* raise cache_gb") as caught:
        assert read_all(store) == truth(folder)
    assert len(caught) == 1
    used = sum(path.stat().st_blocks * 512 for path in (tmp_path / "cache").rglob("*") if path.is_file())
    assert 20_000 < used < 60_000
    before = web.shards_asked()
    assert read_all(store) == truth(folder)
    kept = before - (web.shards_asked() - before)
    assert 3 <= kept < len(SPANS) - 3
    other = open_store(f"file://{folder}", cache_gb=40e-6)
    with pytest.warns(UserWarning, match="is full"):  # the limit is that of all corpora
        other.read(*SPANS[0])


def test_a_limit_of_nothing_keeps_nothing(web: Web, folder: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_all(open_store(web.url, cache_gb=0)) == truth(folder)
    assert not cached(tmp_path)


def test_room_on_the_disk_is_left(web: Web, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_shards.stores.cache, "_RESERVE", (1.0, 10**18))
    with pytest.warns(UserWarning, match="is full"):
        assert read_all(open_store(web.url)) == truth(folder)


def test_a_disk_that_fills_up_does_not_stop_the_run(
    web: Web, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, left = os.pwrite, [9]

    def pwrite(file: int, data: bytes, offset: int) -> int:
        left[0] -= 1
        if left[0] <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(file, memoryview(data)[: 1 + len(data) // 2], offset)  # in parts, as it may

    store = open_store(web.url)
    store.index_path()
    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.warns(UserWarning, match=r"cannot be written \(No space left on device\)") as caught:
        assert read_all(store) == truth(folder)
    assert len(caught) == 1
    monkeypatch.undo()
    assert read_all(store) == truth(folder)


def test_a_cache_that_cannot_be_written(web: Web, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = open_store(web.url, cache=tmp_path / "file")  # rights do not stop root, who may run the tests
    with pytest.warns(UserWarning, match=r"cannot be written \(Not a directory\)") as caught:
        assert read_all(store) == truth(folder) and store.index_path().read_bytes() == b"an index"
    assert len([item for item in caught if "index is copied" in str(item.message)]) == 1 and len(caught) <= 2


def test_a_cache_that_may_only_be_read_is_read(
    web: Web, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = open_store(web.url).read(*SPANS[0])
    real = os.open

    def read_only(path: str, flags: int, *mode: int) -> int:
        if flags & (os.O_RDWR | os.O_CREAT) and "cache" in str(path):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return real(path, flags, *mode)

    monkeypatch.setattr(os, "open", read_only)
    before = web.shards_asked()
    store = open_store(web.url)
    assert store.read(*SPANS[0]) == expected and web.shards_asked() == before
    with pytest.warns(UserWarning, match="Read-only file system"):
        assert store.read(*SPANS[1]) == truth(folder)[1]
    store.forget(*SPANS[0])
    assert store.read(*SPANS[0]) == expected and web.shards_asked() == before + 2


# Processes


def reader(url: str, seed: int, results: multiprocessing.Queue) -> None:
    store = open_store(url)
    order = np.random.default_rng(seed).permutation(len(SPANS) * 3) % len(SPANS)
    results.put({int(number): store.read(*SPANS[number]) for number in order})


def test_processes_share_a_cache(web: Web, folder: Path) -> None:
    context = multiprocessing.get_context("fork")
    results: multiprocessing.Queue = context.Queue()
    open_store(web.url).read(*SPANS[0])  # the parent has connections before they start
    processes = [context.Process(target=reader, args=(web.url, seed, results)) for seed in range(4)]
    for process in processes:
        process.start()
    expected = dict(enumerate(truth(folder)))
    assert all(results.get(timeout=60) == expected for _ in processes)
    for process in processes:
        process.join()
    before = web.shards_asked()
    assert before < 4 * len(SPANS)
    assert read_all(open_store(web.url)) == truth(folder) and web.shards_asked() == before


KILLED = """
import sys
from data_shards.stores import open_store
store = open_store(sys.argv[1])
print("begins", flush=True)
for name, offset, size in eval(sys.argv[2]) * 1000:
    store.read(name, offset, size)
    store.forget(name, offset, size)
"""


@pytest.mark.parametrize("seconds", [0.0, 0.02, 0.1])
def test_a_reader_that_is_killed_leaves_nothing_wrong(web: Web, folder: Path, seconds: float) -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED, web.url, repr(SPANS)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert read_all(open_store(web.url)) == truth(folder)


@pytest.mark.parametrize("last", [1, 2])
def test_a_write_that_is_cut_off_is_not_marked(
    web: Web, folder: Path, monkeypatch: pytest.MonkeyPatch, last: int
) -> None:
    class KilledError(BaseException):
        pass

    store, real, writes = open_store(web.url), os.pwrite, [0]

    def pwrite(file: int, data: bytes, offset: int) -> int:
        writes[0] += 1
        if writes[0] < last:
            return real(file, data, offset)
        real(file, memoryview(data)[: len(data) // 2], offset)
        raise KilledError

    for span, expected in zip(SPANS[::-1], truth(folder)[::-1], strict=True):  # later spans find the file long enough
        writes[0] = 0
        with monkeypatch.context() as patch, pytest.raises(KilledError):
            patch.setattr(os, "pwrite", pwrite)
            store.read(*span)
        assert open_store(web.url).read(*span) == expected


# Datasets


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three shards of a few samples."""
    with ShardWriter(tmp_path / "toy", 4, 2**20) as writer:
        for number in range(11):
            writer.write(f"toy-{number:03d}", make(np.roll(values("uint8"), number), masks=number % 3).encode())
    write_index(tmp_path / "toy")
    return tmp_path / "toy"


def test_forked_workers_read_from_the_web(shards: Path, tmp_path: Path) -> None:
    expected = [triplet.encode() for triplet in ShardDataset(shards)]
    with serve(shards) as web:
        dataset = ShardDataset(web.url)
        assert [dataset[number].encode() for number in range(4)] == expected[:4]  # connections before the workers start
        loader = DataLoader(dataset, None, num_workers=2, multiprocessing_context="fork")
        assert [triplet.encode() for triplet in loader] == expected
        before = web.shards_asked()
        assert before == len(expected) + len(list(shards.glob("*.tar")))
        assert [triplet.encode() for triplet in dataset] == [triplet.encode() for triplet in loader] == expected
        assert web.shards_asked() == before
        other = ShardDataset(web.url, cache=tmp_path / "other")  # the connections of the parent are still its own
        assert [triplet.encode() for triplet in other] == expected


def test_a_dataset_mends_its_cache_and_names_what_is_damaged_there(shards: Path, tmp_path: Path) -> None:
    with serve(shards) as web:
        dataset = ShardDataset(web.url)
        expected = [triplet.encode() for triplet in dataset]
        for path in cached(tmp_path):
            path.write_bytes(bytes(path.stat().st_size))
        assert [triplet.encode() for triplet in ShardDataset(web.url)] == expected
        assert [triplet.encode() for triplet in ShardDataset(web.url)] == expected
        assert web.shards_asked() == 2 * len(expected) + 3 * len(list(shards.glob("*.tar")))
        path = shards / "shard-000001.tar"
        path.write_bytes(bytes(path.stat().st_size))
        place = f"^{web.url}/shard-000001.tar: sample 'toy-005' is damaged, "
        assert dataset[5].encode() == expected[5]
        dataset = ShardDataset(web.url, cache=tmp_path / "empty")
        with pytest.raises(UserError, match=place + "its bytes changed since the build"):
            dataset[5]
        path.unlink()
        with pytest.raises(UserError, match=place + r"it cannot be read \(No such file"):
            dataset[5]
