"""Where the contest's scripts put data: found, or one line says what to set or to run, and that works."""

import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from test_smoke import TINY, VAL_DOCS, VOCAB, documents, make_data

import prepare_caseops_data as prepare
from dataprep.checking import check_folder
from dataprep.shards import read_shard, shard_bytes
from systems.layout import PREPARE, prepare_command

NAME = f"fineweb10B_sp{VOCAB}"
CASEOPS = f"{NAME}_lossless_caps_caseops_v1_reserved"
MODELS = {
    NAME: f"fineweb_{VOCAB}_bpe.model",
    CASEOPS: f"fineweb_{VOCAB}_bpe_lossless_caps_caseops_v1_reserved.model",
}
NESTED = f"data/datasets/{NAME}_caseops/datasets"
OTHER_VOCAB = {"VOCAB_SIZE": "8192"}
PLAIN = {"CASEOPS_ENABLED": "0"}


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, Path]:
    """Data as the contest's scripts leave them, by name: no manifest of ours, for plain text no sidecar."""
    folder = tmp_path_factory.mktemp("sets")
    make_data(folder / CASEOPS)
    texts = documents(150)
    model = prepare.train_tokenizer(texts, VOCAB, plain=True)
    tokenizer = prepare.make_tokenizer("tokenizer.model", model, lossless=True, plain=True)
    prepare.prepare(
        [prepare.make_document(text, "text") for text in texts], tokenizer, folder / NAME, VAL_DOCS
    )
    for path in [*folder.glob("*/manifest.json"), *folder.glob(f"{NAME}/fineweb_val_bytes_*")]:
        path.unlink()
    return {name: folder / name for name in (NAME, CASEOPS)}


@pytest.fixture
def put(sets, tmp_path, monkeypatch):
    """Function: a set by name, the folder above its `datasets` and that of its tokenizer -> it lies there.

    The working folder is an empty one; another tokenizer, and a manifest of another form, are there too.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DATA_DIR", raising=False)

    def place(name: str, home: str, model: str = "") -> None:
        folder, model = Path(home) / "datasets" / name, Path(model or f"{home}/tokenizers/{MODELS[name]}")
        shutil.copytree(sets[name], folder)
        model.parent.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.model").rename(model)
        (Path(home) / "manifest.json").write_text('{"datasets": [], "tokenizers": []}')
        (Path(home) / "tokenizers").mkdir(exist_ok=True)
        (Path(home) / "tokenizers" / "fineweb_1024_bpe.model").write_bytes(b"another")

    return place


def arrive(tg, capfd, environ: dict[str, str]) -> tuple[object, list[str]]:
    """Do what each message says until the data are found; the settings then, and what was done."""
    done = []
    while True:
        try:
            cfg = tg.read_settings(TINY | environ)
            tg.check_data(cfg)
            return cfg, done
        except (tg.ConfigError, tg.DataError) as error:
            message = str(error)
        assert len(done) < 2 and "\n" not in message, message
        if settings := re.search(r"(?:set|needs) ((?:[A-Z_]+=[^\s,)]+ ?)+)", message):
            done.append(settings[1])
            environ = environ | dict(pair.split("=") for pair in shlex.split(settings[1]))
        else:
            command = re.search(r"\S+ \S*prepare_caseops_data.py ([^;]*);", message)
            done.append(command[1])
            assert prepare.main(shlex.split(command[1])) == 0, capfd.readouterr()


def folder(name: str, home: str = "data") -> str:
    return f"{home}/datasets/{name}"


WRITE = "--check {} --write-manifest"
LAYOUTS = {  # where the set is, where its tokenizer, the environment, what is to be done
    "contest, plain": (NAME, "data", "", PLAIN, []),
    "contest elsewhere, plain": (NAME, "mnt/x", "", PLAIN | {"DATA_PATH": folder(NAME, "mnt/x")}, []),
    "contest, other settings": (
        NAME, "data", "", OTHER_VOCAB,
        [f"DATA_PATH={folder(NAME)} CASEOPS_ENABLED=0 VOCAB_SIZE={VOCAB}"],
    ),
    "contest, plain, taken for CaseOps": (
        NAME, "data", "", OTHER_VOCAB | {"DATA_PATH": folder(NAME)},
        [f"CASEOPS_ENABLED=0 VOCAB_SIZE={VOCAB}"],
    ),
    "contest, CaseOps": (CASEOPS, "data", "", {}, [WRITE.format(folder(CASEOPS))]),
    "contest, CaseOps, taken for plain": (
        CASEOPS, "data", "", PLAIN | {"DATA_PATH": folder(CASEOPS)},
        ["CASEOPS_ENABLED=1", WRITE.format(folder(CASEOPS))],
    ),
    "PR #1855's command": (
        CASEOPS, "data", "",
        {"DATA_PATH": f"./{folder(CASEOPS)}", "TOKENIZER_PATH": f"./data/tokenizers/{MODELS[CASEOPS]}"},
        [WRITE.format(folder(CASEOPS))],
    ),
    "contest, in a record's folder": (
        CASEOPS, ".", "", {"DATA_PATH": f"./{folder(CASEOPS, '.')}"}, [WRITE.format(f"datasets/{CASEOPS}")],
    ),
    "record": (CASEOPS, NESTED, "", {}, [WRITE.format(folder(CASEOPS, NESTED))]),
    "record, --out elsewhere": (
        CASEOPS, "my data", "", {"DATA_DIR": "my data"}, [WRITE.format(f"'{folder(CASEOPS, 'my data')}'")],
    ),
    "record, --out as DATA_PATH": (
        CASEOPS, "out", "", {"DATA_PATH": "out"},
        [f"DATA_PATH={folder(CASEOPS, 'out')}", WRITE.format(folder(CASEOPS, "out"))],
    ),
    "tokenizer under DATA_DIR only": (
        CASEOPS, "ssd", f"mnt/tokenizers/{MODELS[CASEOPS]}",
        {"DATA_DIR": "mnt", "DATA_PATH": folder(CASEOPS, "ssd")},
        [WRITE.format(folder(CASEOPS, "ssd")) + f" --sp mnt/tokenizers/{MODELS[CASEOPS]}"],
    ),
    "tokenizer elsewhere": (
        CASEOPS, "data", "models/mine.model", {"TOKENIZER_PATH": "models/mine.model"},
        [WRITE.format(folder(CASEOPS)) + " --sp models/mine.model"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_is_found_or_one_line_mends_it(tg, put, capfd, layout):
    name, home, model, environ, expected = LAYOUTS[layout]
    put(name, home, model)
    cfg, done = arrive(tg, capfd, environ)
    assert done == expected
    place, tokenizer = Path(folder(name, home)), Path(model or f"{home}/tokenizers/{MODELS[name]}")
    assert (cfg.data_folder.resolve(), tg.tokenizer_file(cfg).resolve()) == (
        place.resolve(),
        tokenizer.resolve(),
    )
    assert check_folder(place, write_manifest=True)[0] == []
    named = {"DATA_PATH": str(place), "CASEOPS_ENABLED": str(int(cfg.caseops_enabled))}
    cfg = tg.read_settings(TINY | named)
    assert tg.check_data(cfg)["origin"] == "scanned"
    assert tg.tokenizer_file(cfg).resolve() == tokenizer.resolve()


def test_validation_bytes_of_a_plain_layout(tg, put, sets):
    """The tokenizer of the set's name is taken, whatever else is there, so bytes are those of the text."""
    put(NAME, "data")
    Path("data/tokenizers/tokenizer.model").write_bytes((sets[CASEOPS] / "tokenizer.model").read_bytes())
    val = tg.load_validation(tg.read_settings(TINY | PLAIN))
    assert val.target_bytes.sum() == sum(len(text.encode()) for text in documents(150)[:VAL_DOCS])


def test_another_tokenizer_than_the_sets_own(tg, put, sets):
    """Plain data have no manifest that would tell."""
    put(NAME, "data")
    other = sets[CASEOPS] / "tokenizer.model"
    with pytest.raises(tg.DataError, match=f"TOKENIZER_PATH={other}: not the tokenizer that") as refused:
        tg.check_data(tg.read_settings(TINY | PLAIN | {"TOKENIZER_PATH": str(other)}))
    assert f"--check data/datasets/{NAME} --write-manifest --sp {other};" in str(refused.value)


FAULTS = {
    "vocabulary": (
        lambda tokens: np.append(tokens, VOCAB),
        f"holds token {VOCAB}, the tokenizer has {VOCAB}",
    ),
    "first token": (lambda tokens: tokens[1:], "does not begin with BOS"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_check_of_plain_data_finds(put, fault):
    put(NAME, "data")
    place = Path(folder(NAME))
    damage, words = FAULTS[fault]
    shard = place / "fineweb_train_000000.bin"
    shard.write_bytes(shard_bytes(damage(read_shard(shard))))
    problems, _ = check_folder(place, write_manifest=True)
    assert any(words in problem for problem in problems) and not (place / "manifest.json").exists()
    assert all("--plain" in problem for problem in problems if "--docs" in problem)


def test_check_of_plain_data_finds_leaks(put):
    put(NAME, "data")
    place = Path(folder(NAME))
    val, train = (place / f"fineweb_{split}_000000.bin" for split in ("val", "train"))
    train.write_bytes(shard_bytes(np.concatenate([read_shard(train), read_shard(val)])))
    assert any(
        f"{VAL_DOCS} of {VAL_DOCS} validation documents are training" in p for p in check_folder(place)[0]
    )


def test_check_without_a_tokenizer_says_so_in_one_line(put, capsys):
    put(CASEOPS, "data", "models/mine.model")
    assert prepare.main(["--check", folder(CASEOPS), "--write-manifest"]) == 2
    problem, last = capsys.readouterr().out.splitlines()
    assert problem.endswith(f"--check {folder(CASEOPS)} --write-manifest --sp MODEL") and "problems:1" in last
    assert prepare.main(["--check", folder(CASEOPS), "--write-manifest", "--sp", "no.model"]) == 2
    assert capsys.readouterr().err.endswith("error: --sp no.model: no such file\n")


def test_manifest_of_another_form_beside_the_shards(put, capsys):
    put(CASEOPS, "data")
    manifest = Path("data/manifest.json").rename(f"{folder(CASEOPS)}/manifest.json")
    earlier = Path(f"{manifest}.foreign")
    earlier.write_text("mine")
    assert prepare.main(["--check", folder(CASEOPS), "--write-manifest"]) == 2
    mend = capsys.readouterr().out.splitlines()[0].partition("mend: ")[2]
    move, _, check = mend.partition(" && ")
    shutil.move(*shlex.split(move)[1:])
    assert prepare.main(shlex.split(check)[2:]) == 0 and "scanned" in manifest.read_text()
    assert earlier.read_text() == "mine"


def test_data_of_the_working_folder(tg, put, capfd, monkeypatch):
    """DATA_PATH=. has no name by which to find the tokenizer; the set's folder has."""
    put(NAME, "data")
    monkeypatch.chdir(folder(NAME))
    cfg, done = arrive(tg, capfd, {"DATA_PATH": "."})
    model = tg.tokenizer_file(cfg)
    assert (done, str(model)) == (["CASEOPS_ENABLED=0"], f"../../tokenizers/{MODELS[NAME]}")


@pytest.mark.parametrize("place", ["root", "elsewhere"])
def test_printed_command_is_one_where_the_user_stands(tmp_path, monkeypatch, place):
    """Its files are there, seen from the working folder, or are found by PATH."""
    monkeypatch.chdir(PREPARE.parent if place == "root" else tmp_path)
    python, script = shlex.split(prepare_command())
    assert Path(script).samefile(PREPARE) and (place == "root") == (script == PREPARE.name)
    assert Path(shutil.which(python)).absolute() == Path(sys.executable)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    if Path(sys.executable).with_name("python").samefile(sys.executable):
        monkeypatch.setattr(sys, "executable", str(Path(sys.executable).with_name("python")))
        assert prepare_command().startswith("python ")
