"""`--download` against a small local hub, which also breaks off, serves short files and wrong hashes."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import pytest
from patience import PATIENCE

import prepare_caseops_data as prepare
from dataprep.checking import check_folder
from dataprep.encoding import make_tokenizer
from dataprep.shards import locked, shard_bytes
from systems.layout import SOURCES, file_sha256

PUBLISHED = "fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model"
CASEOPS, PLAIN = SOURCES[False, 8192], SOURCES[True, 8192]
REVISION = "0123456789abcdef0123456789abcdef01234567"
SHARDS, TOKENIZERS = f"datasets/datasets/{CASEOPS.dataset}", "datasets/tokenizers"
SECOND = f"{SHARDS}/fineweb_train_000001.bin"


class Hub(ThreadingHTTPServer):
    """The few pages of a hub that listing and downloading need. Files by their path in the repository."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Page)
        self.files, self.repository = files, CASEOPS.repository
        self.faults: dict[str, list[str]] = {}  # by path, what goes wrong with the next answers
        self.sent, self.ranges = Counter(), []
        self.page = b""  # what is answered to everything, if anything
        self.url = f"http://127.0.0.1:{self.server_port}"


class Page(BaseHTTPRequestHandler):
    """One answer."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def do_GET(self, body: bool = True) -> None:
        path = urlparse(self.path).path
        repository = self.server.repository
        api = f"/api/datasets/{repository}"
        if self.server.page:
            self._send(self.server.page, "text/html")
        elif path.startswith(f"{api}/tree/"):
            self._json([self._entry(*item) for item in self.server.files.items()])
        elif path.startswith(api):
            self._json({"id": repository, "sha": REVISION})
        elif match := re.fullmatch(rf"/datasets/{repository}/resolve/{REVISION}/(.*)", path):
            self._file(match[1], body)
        else:
            self.send_error(404)

    def _entry(self, path: str, data: bytes) -> dict:
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        entry = {"type": "file", "path": path, "size": len(data), "oid": blob}
        if path.endswith(".bin"):
            sha256 = hashlib.sha256(data).hexdigest()
            entry["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 130}
        return entry

    def _json(self, value: object) -> None:
        self._send(json.dumps(value).encode(), "application/json")

    def _send(self, data: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _file(self, path: str, body: bool) -> None:
        data = self.server.files[path]
        faults = self.server.faults.get(path, [])
        fault = faults.pop(0) if body and faults else ""
        start = int(re.match(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        if fault == "gone":
            self.send_error(404)
            return
        if fault == "wrong":
            data = bytes(reversed(data))
        if fault == "short":
            data = data[:-10]
        part = data[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("ETag", f'"{hashlib.sha256(self.server.files[path]).hexdigest()}"')
        self.send_header("X-Repo-Commit", REVISION)
        self.send_header("Accept-Ranges", "bytes")
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if body:
            self.server.sent[path] += 1
            self.server.ranges += [(path, start)] if start else []
            self.wfile.write(part[: len(part) // 2] if fault == "breaks off" else part)
            self.close_connection = True


@pytest.fixture(scope="module")
def repository(tokenizer_dir, tmp_path_factory) -> dict[str, bytes]:
    """What the stub hub holds: a small prepared data set of three training shards, and other things."""
    folder = tmp_path_factory.mktemp("repository")
    tokenizer = make_tokenizer(PUBLISHED, (tokenizer_dir / PUBLISHED).read_bytes())
    texts = [f"Document number {n} of the Hub. {'The same words for all. ' * (n % 7)}" for n in range(400)]
    documents = [prepare.make_document(text, "") for text in texts]
    prepare.prepare(documents, tokenizer, folder, 20, shard_tokens=6000)
    files = {f"{SHARDS}/{path.name}": path.read_bytes() for path in sorted(folder.glob("*.bin"))}
    assert SECOND in files and len([name for name in files if "_train_" in name]) == 3
    files[f"{TOKENIZERS}/{PUBLISHED}"] = tokenizer.model
    return files | {"README.md": b"# Data\n", "datasets/manifest.json": b'{"datasets": []}'}


@pytest.fixture
def hub(repository):
    server = Hub(dict(repository))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def download(hub: Hub, place: Path, *arguments: object) -> subprocess.CompletedProcess:
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_ETAG_TIMEOUT": "2",
        "HF_HOME": str(place / "hf"),
    }
    environment |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, str(Path(prepare.__file__)), "--download", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE, cwd=place, env=environment
    )


@pytest.fixture
def here(hub, tmp_path, monkeypatch, capfd):
    """Function: the same in this process up to the first file; -> exit code, standard output and error.

    The library builds the addresses of files from what the environment was when it was imported.
    """
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        capfd.readouterr()
        code = prepare.main(["--download", "--workers", "1", *map(str, arguments)])
        return code, *capfd.readouterr()

    return run


def test_data_download_into_the_default_layout(hub, tmp_path, tg):
    result = download(hub, tmp_path)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    folder = tmp_path / CASEOPS.folder
    assert folder == tmp_path / tg.Config().data_folder
    expected = {name.rpartition("/")[2]: data for name, data in hub.files.items() if name.startswith(SHARDS)}
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    manifest = json.loads(found.pop("manifest.json"))
    assert found == expected
    tokenizer = tmp_path / CASEOPS.home / "tokenizers" / PUBLISHED
    assert tokenizer.read_bytes() == hub.files[f"{TOKENIZERS}/{PUBLISHED}"]
    assert manifest["origin"] == "downloaded" and manifest["revision"] == REVISION
    assert manifest["splits"]["val"]["documents"] == 20 and manifest["splits"]["train"]["documents"] == 380
    assert {n: e["sha256"] for n, e in manifest["files"].items()} == {
        name: hashlib.sha256(data).hexdigest() for name, data in expected.items()
    }
    cfg = tg.Config(data_dir=str(tmp_path / "data"))
    assert tg.check_data(cfg) == manifest
    assert tg.load_validation(cfg).target_bytes.sum() == manifest["splits"]["val"]["bytes"]
    sent = Counter(hub.sent)
    assert download(hub, tmp_path).returncode == 0
    assert hub.sent == sent  # what is here is not fetched again


def test_data_download_of_some_shards(hub, tmp_path):
    out = tmp_path / "out"
    assert download(hub, tmp_path, "--out", out, "--shards", 1).returncode == 0
    names = {path.name for path in out.iterdir()}
    assert (
        "fineweb_train_000000.bin" in names and "fineweb_train_000001.bin" not in names and PUBLISHED in names
    )
    assert download(hub, tmp_path, "--out", out, "--shards", 2).returncode == 0
    assert hub.sent[f"{SHARDS}/fineweb_train_000000.bin"] == 1
    assert len(json.loads((out / "manifest.json").read_text())["files"]) == 2 + len(
        [name for name in names if "_val_" in name]
    )
    result = download(hub, tmp_path, "--out", out, "--shards", 1)
    assert (
        result.returncode == 2 and "fineweb_train_000001.bin: is not part of this download" in result.stderr
    )


def test_data_download_goes_on_where_it_broke_off(hub, tmp_path):
    """The library keeps 10 MB at a time, so the file must be larger."""
    tokens = np.tile(np.frombuffer(hub.files[SECOND], "<u2", offset=1024), 2000)
    hub.files[SECOND] = shard_bytes(np.concatenate([[1], tokens])[:12_000_000])
    hub.faults[SECOND] = ["breaks off"]
    result = download(hub, tmp_path, "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out/fineweb_train_000001.bin").read_bytes() == hub.files[SECOND]
    assert hub.ranges == [(SECOND, 10 << 20)] or hub.ranges == [(SECOND, 10_000_000)]


@pytest.mark.parametrize("fault", ["short", "wrong"])
def test_data_download_of_a_file_that_is_not_what_the_hub_says(hub, tmp_path, fault):
    """Once: fetched again. Always: refused, nothing wrong under a final name, the next run completes it."""
    out = tmp_path / "out"
    hub.faults[SECOND] = [fault] * 50
    result = download(hub, tmp_path, "--out", out)
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert "run again to go on" in result.stderr
    assert not (out / "fineweb_train_000001.bin").exists() and not (out / "manifest.json").exists()
    hub.faults[SECOND] = ["wrong"] if fault == "wrong" else []
    first = hub.sent[f"{SHARDS}/fineweb_train_000000.bin"]
    assert download(hub, tmp_path, "--out", out).returncode == 0
    assert (out / "fineweb_train_000001.bin").read_bytes() == hub.files[SECOND]
    assert hub.sent[f"{SHARDS}/fineweb_train_000000.bin"] == first == 1


def test_data_download_replaces_a_damaged_file(hub, tmp_path):
    out = tmp_path / "out"
    assert download(hub, tmp_path, "--out", out).returncode == 0
    path = out / "fineweb_train_000001.bin"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert download(hub, tmp_path, "--out", out).returncode == 0
    assert path.read_bytes() == hub.files[SECOND]


def state(folder: Path) -> dict[Path, tuple[str, int]]:
    """All there is below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path: (file_sha256(path), path.stat().st_mtime_ns) for path in files}


@pytest.mark.parametrize(
    "other",
    [
        *("prepared", "no manifest", "unfinished", "one shard more", "tokenizer", "tokenizer since"),
        *("folder of arrivals", "link to nowhere"),
    ],
)
def test_data_download_leaves_other_data_alone(hub, here, tmp_path, other):
    """One line, exit code 2, and not a file is written, not even one that is missing or the same."""
    folder = tmp_path / CASEOPS.folder
    names = [name for name in hub.files if name.startswith(SHARDS) and name != SECOND]
    folder.mkdir(parents=True)
    for name in names:
        (folder / Path(name).name).write_bytes(hub.files[name])
    if other == "prepared":
        (folder / "manifest.json").write_text('{"format": "parameter-golf-data/1", "files": {}}')
    elif other == "no manifest":
        path = folder / "fineweb_val_bytes_000000.bin"
        path.write_bytes(path.read_bytes()[:-1] + b"!")
    elif other == "unfinished":
        (folder / ".unfinished.json").write_text("{}")
    elif other == "one shard more":
        (folder / "fineweb_train_000020.bin").write_bytes(hub.files[SECOND])
    elif other == "folder of arrivals":
        (folder / ".download").mkdir()
        (folder / ".download" / "notes.txt").write_text("mine")
    elif other == "link to nowhere":
        (folder / "manifest.json").symlink_to(tmp_path / "not mounted" / "manifest.json")
    else:
        if other == "tokenizer since":  # a download, to whose tokenizers another data set has come
            made = {"repository": CASEOPS.repository, "dataset": CASEOPS.dataset, "files": {}}
            made["tokenizer"] = {"sha256": hashlib.sha256(b"the hub's").hexdigest()}
            (folder / "manifest.json").write_text(json.dumps(made))
        (tmp_path / CASEOPS.home / "tokenizers").mkdir()
        (tmp_path / CASEOPS.home / "tokenizers" / PUBLISHED).write_bytes(b"mine")
    before = state(tmp_path)
    code, output, error = here()
    assert (code, output, error.count("\n")) == (2, "", 1), error
    assert str(CASEOPS.home) in error and state(tmp_path) == before and not hub.sent
    assert (folder / "manifest.json").is_symlink() == (other == "link to nowhere")


def test_data_download_keeps_what_is_the_hubs(hub, here, tmp_path):
    """Whoever put it here. What the hub has changed since is not replaced."""
    out = tmp_path / "out"
    out.mkdir()
    (out / Path(SECOND).name).write_bytes(hub.files[SECOND])
    (out / "notes.txt").write_text("mine")
    assert download(hub, tmp_path, "--out", out).returncode == 0
    assert hub.sent[SECOND] == 0 and (out / "notes.txt").exists()
    hub.files[SECOND] = hub.files[SECOND][:-2] + b"\7\0"
    before = state(out)
    code, _, error = here("--out", out)
    assert code == 2 and f"{Path(SECOND).name}: the hub has changed it since" in error
    assert state(out) == before


def test_data_download_of_plain_text(hub, here, tmp_path, tokenizer_dir, tg):
    """The set of the wanted vocabulary, of a repository that has others too, to the contest's place."""
    model = (tokenizer_dir / "fineweb_8192_bpe.model").read_bytes()
    tokenizer = make_tokenizer("fineweb_8192_bpe.model", model, plain=True)
    texts = [f"Plain document number {n}. {'The same words for all. ' * (n % 5)}" for n in range(60)]
    made = tmp_path / "made"
    prepare.prepare([prepare.make_document(text, "") for text in texts], tokenizer, made, 20)
    shards = {f"datasets/datasets/{PLAIN.dataset}/{path.name}": path for path in made.glob("*_000000.bin")}
    hub.repository = PLAIN.repository
    hub.files |= {name: path.read_bytes() for name, path in shards.items() if "val_bytes" not in name}
    hub.files["datasets/tokenizers/fineweb_8192_bpe.model"] = model
    result = download(hub, tmp_path, "--plain")
    assert result.returncode == 0, result.stderr
    assert {path.name for path in (tmp_path / PLAIN.folder).iterdir()} == {
        "fineweb_train_000000.bin", "fineweb_val_000000.bin", "manifest.json",
    }  # fmt: skip
    cfg = tg.Config(data_dir=str(tmp_path / "data"), caseops_enabled=False)
    assert tg.check_data(cfg)["repository"] == PLAIN.repository
    assert tg.load_validation(cfg).num_targets > 0
    (tmp_path / PLAIN.folder / "fineweb_val_000000.bin").unlink()
    problems, _ = check_folder(tmp_path / PLAIN.folder)
    assert problems[-1].endswith(f"--download --plain --shards 1 --out {tmp_path / PLAIN.folder}")
    code, _, error = here("--plain", "--vocab", 4096)
    assert code == 2 and "holds 0 tokenizer files of fineweb10B_sp4096" in error


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("--download --vocab 1024", "--vocab 1024: must be 8192 for CaseOps text (see --plain)"),
        ("--download --plain --vocab 7", "--vocab 7: must be 8192 or 4096 or 1024 for plain text"),
        ("--demo --vocab 1024", "--vocab: only with --download"),
        ("--download --overwrite", "--overwrite: not allowed with --download"),
        ("--download --sp m.model", "--sp: not allowed with --download"),
        ("--check data --plain", "--plain: not allowed with --check"),
    ],
)
def test_options_of_a_download(arguments, words, capsys):
    with pytest.raises(SystemExit) as left:
        prepare.parse_arguments(arguments.split())
    assert left.value.code == 2 and capsys.readouterr().err.endswith(f"error: {words}\n")


def test_data_download_errors(hub, tmp_path):
    del hub.files[f"{SHARDS}/fineweb_val_bytes_000000.bin"]
    result = download(hub, tmp_path)
    assert result.returncode == 2 and "holds 0 val_bytes files" in result.stderr
    hub.url = "http://127.0.0.1:9"
    result = download(hub, tmp_path)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert f"{CASEOPS.repository}: cannot be fetched from 127.0.0.1:9: " in result.stderr


def test_data_download_of_something_that_is_no_hub(hub, here, tmp_path, monkeypatch):
    """A login page of a network, a proxy that cannot be used: one line with the host, and no folder left."""
    from huggingface_hub import utils

    host = hub.url.removeprefix("http://")
    for page in (b"<html>Log in</html>", b"[1]", b"{}"):
        hub.page = page
        code, _, err = here()
        assert code == 2 and err.count("\n") == 1
        assert f"{CASEOPS.repository}: cannot be fetched from {host}: it does not answer as a hub does" in err
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv(
        "ALL_PROXY", "socks5://127.0.0.1:9"
    )  # its package may be missing, nobody listens there
    utils.close_session()
    code, _, err = here()
    utils.close_session()
    assert code == 2 and err.count("\n") == 1 and f"cannot be fetched from {host}: " in err
    assert not (tmp_path / "data").exists()


def test_data_download_waits_for_no_lock(here, tmp_path):
    with locked(tmp_path / CASEOPS.folder):
        code, _, err = here()
    assert code == 2 and f"{CASEOPS.folder}: another process writes there" in err
