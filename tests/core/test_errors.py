"""Mistakes of the user's: one line that names the variable or file, exit code 2, before any training."""

import dataclasses
import io
import json
import pickle
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from test_smoke import TINY, VOCAB, make_data, write_shard

ARTIFACT, CHECKPOINT, MANIFEST = "final_model.int6.ptz", "final_model.pt", "manifest.json"
TRAIN, VAL, SIDECAR = (f"fineweb_{split}_000000.bin" for split in ("train", "val", "val_bytes"))
HEADER_BYTES = 1024
FOREIGN_CHECKPOINTS = "empty text zeros pickle bomb list tensor number nothing words integers nested"
DAMAGED_ARTIFACTS = "empty start half end longer bit last-bit version codec text torch pickle"


@pytest.fixture(scope="module")
def finished_run(tg, quick_packing, tmp_path_factory) -> Path:
    """A folder with a data set `data` and a finished run `run`."""
    folder = tmp_path_factory.mktemp("errors")
    make_data(folder / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        settings = {"DATA_PATH": "data", "ARTIFACT_DIR": "run", "RUN_ID": "first"}
        assert tg.main([], TINY | settings | {"ITERATIONS": "1", "TTT_ENABLED": "0"}) == 0
    return folder


@pytest.fixture
def work(finished_run, tmp_path, monkeypatch) -> Path:
    """A copy of the above to spoil, as the working folder."""
    shutil.copytree(finished_run, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture
def refused(tg, work, capfd):
    """Function: settings -> the one line of standard error, after all that holds for every mistake."""

    def run(**settings: object) -> str:
        given = {"DATA_PATH": "data", "ARTIFACT_DIR": "run"} | {k: str(v) for k, v in settings.items()}
        before = contents(work)
        capfd.readouterr()
        with warnings.catch_warnings(record=True) as warned:
            code = tg.main([], TINY | given)
        captured = capfd.readouterr()
        assert [str(warning.message) for warning in warned] == [], "warnings are lines on stderr, too"
        assert code == 2, captured.err
        assert len(captured.err.splitlines()) == 1, captured.err
        assert captured.err.startswith("train_gpt.py: error: ") and "Traceback" not in captured.err
        trained = [line for line in captured.out.splitlines() if line.split()[0] in ("train", "saved")]
        assert trained == [], "a mistake in the input must be found before the training"
        after = contents(work)
        assert {name: after.get(name) for name in before} == before, "an earlier file has changed"
        return captured.err.removeprefix("train_gpt.py: error: ").rstrip("\n")

    return run


# -- data


@pytest.mark.parametrize(
    "environ, words",
    [
        ({"PRESET": "demo"}, ["data/demo", "prepare_caseops_data.py --demo\n"]),
        ({"PRESET": "demo", "DATA_PATH": "my data"}, ["--demo --out 'my data'\n"]),
        ({}, ["lossless_caps_caseops_v1_reserved", "DATA_PATH", "prepare_caseops_data.py"]),
        ({"DATA_PATH": "elsewhere"}, ["elsewhere", "DATA_PATH"]),
        ({"CASEOPS_ENABLED": "0", "DATA_DIR": "mine"}, ["mine/datasets/fineweb10B_sp8192", "DATA_PATH"]),
    ],
)
def test_missing_data(tg, tmp_path, monkeypatch, capfd, environ, words):
    monkeypatch.chdir(tmp_path)
    assert tg.main([], environ | {"DEVICE": "cpu", "CPU_THREADS": "1"}) == 2
    captured = capfd.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1
    assert all(word in captured.err for word in words), captured.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [TRAIN, VAL, SIDECAR])
def test_missing_shards(work, refused, name):
    (work / "data" / name).unlink()
    assert f"no {name.replace('000000', '*')} there" in refused()


@pytest.mark.parametrize("name", [TRAIN, VAL, SIDECAR])
@pytest.mark.parametrize(
    "damage",
    [
        lambda blob: b"\0\0\0\0" + blob[4:],  # magic
        lambda blob: blob[:4] + b"\2\0\0\0" + blob[8:],  # version
        lambda blob: blob[:8] + b"\xff\xff\xff\xff" + blob[12:],  # number of tokens: -1
        lambda blob: blob[:-1],
        lambda blob: blob[: len(blob) // 2],
        lambda blob: blob[:HEADER_BYTES],
        lambda blob: blob[:100],
        lambda blob: b"",
        lambda blob: blob + b"\0\0",
    ],
    ids=["magic", "version", "count", "last byte", "half", "header only", "short header", "empty", "longer"],
)
def test_damaged_shard(work, refused, name, damage):
    path = work / "data" / name
    path.write_bytes(damage(path.read_bytes()))
    assert f"data/{name}: " in refused()


def test_sidecar_of_another_length(work, refused):
    tokens = np.fromfile(work / "data" / SIDECAR, "<u2", offset=HEADER_BYTES)
    write_shard(work / "data" / SIDECAR, tokens[:-3])
    (work / "data" / MANIFEST).unlink()
    message = refused()
    assert (
        "fineweb_val_bytes_*" in message and str(len(tokens)) in message and str(len(tokens) - 3) in message
    )


@pytest.mark.parametrize("token", [VOCAB, 65535])
def test_validation_token_beyond_the_vocabulary(work, refused, token):
    tokens = np.fromfile(work / "data" / VAL, "<u2", offset=HEADER_BYTES)
    tokens[len(tokens) // 2] = token
    write_shard(work / "data" / VAL, tokens)
    message = refused(VAL_LOSS_EVERY=0)
    assert f"VOCAB_SIZE={VOCAB}" in message and str(token) in message


@pytest.mark.parametrize("stage", [{}, {"QUANTIZE_ONLY": 1, "MODEL_PATH": "run/final_model.pt"}], ids=str)
@pytest.mark.parametrize("token", [VOCAB, 65535])
def test_training_token_beyond_the_vocabulary(work, refused, stage, token):
    tokens = np.fromfile(work / "data" / TRAIN, "<u2", offset=HEADER_BYTES)
    tokens[::100] = token
    write_shard(work / "data" / TRAIN, tokens)
    message = refused(**stage, ALLOW_UNVERIFIED_DATA=1)  # without it their hash is said to differ
    assert f"VOCAB_SIZE={VOCAB}" in message and str(token) in message


def test_validation_without_documents(work, refused):
    tokens = np.fromfile(work / "data" / VAL, "<u2", offset=HEADER_BYTES)
    tokens[tokens == 1] = 2
    write_shard(work / "data" / VAL, tokens)
    message = refused(VAL_LOSS_EVERY=0)
    assert "fineweb_val_*" in message and "BOS" in message


def test_batch_larger_than_every_shard(work, refused):
    message = refused(TRAIN_BATCH_TOKENS=2**20)
    tokens = (work / "data" / TRAIN).stat().st_size // 2 - HEADER_BYTES // 2
    group = 2 * (2**19 + 1)  # the spans of both micro-batches come from one shard
    assert "data" in message and str(group) in message and str(tokens) in message


def test_batch_that_does_not_divide(refused):
    assert "TRAIN_BATCH_TOKENS=257" in refused(TRAIN_BATCH_TOKENS=257)


# -- tokenizer and manifest


def test_missing_tokenizer(work, refused):
    (work / "data" / "tokenizer.model").unlink()
    assert "data/tokenizer.model: no such file" in refused()
    assert "TOKENIZER_PATH=elsewhere.model: no such file" in refused(TOKENIZER_PATH="elsewhere.model")
    assert "TOKENIZER_PATH=data: no such file" in refused(TOKENIZER_PATH="data")


@pytest.mark.parametrize("content", [b"", b"\0", b"not a model", bytes(range(256)) * 40])
def test_tokenizer_that_is_no_model(work, refused, content):
    (work / "other.model").write_bytes(content)
    message = refused(TOKENIZER_PATH="other.model", ALLOW_UNVERIFIED_DATA=1)
    assert "TOKENIZER_PATH=other.model: not a SentencePiece model" in message
    assert "TOKENIZER_PATH=other.model: not the tokenizer that" in refused(TOKENIZER_PATH="other.model")


def test_tokenizer_is_the_manifests_to_the_byte(work, refused):
    """So `data_sha256`, the manifest's, which each log and result has, is the tokenizer's as well."""
    own = (work / "data" / "tokenizer.model").read_bytes()
    (work / "other.model").write_bytes(own + b"\x18\0")  # SentencePiece reads the same from it
    said = "TOKENIZER_PATH=other.model: not the tokenizer that data/manifest.json was prepared with"
    assert said in refused(TOKENIZER_PATH="other.model")


def test_manifest_with_a_name_twice(work, refused):
    """Python takes the last of the two, other readers the first; nothing overrides that."""
    path = work / "data" / MANIFEST
    path.write_text('{"val_docs": 1,' + path.read_text().removeprefix("{"))
    message = refused(ALLOW_UNVERIFIED_DATA=1)
    assert "data/manifest.json: the name 'val_docs' stands there twice" in message


def test_manifest_that_says_nothing(work, refused):
    """It is there, and is not what the command that writes one where it is missing would replace."""
    (work / "data" / MANIFEST).write_text("{}")
    assert "data/manifest.json: not a manifest of prepare_caseops_data.py" in refused()


def test_truncated_tokenizer(work, refused):
    content = (work / "data" / "tokenizer.model").read_bytes()
    (work / "other.model").write_bytes(content[: len(content) // 2])
    assert "TOKENIZER_PATH=other.model" in refused(TOKENIZER_PATH="other.model")


def test_tokenizer_of_another_vocabulary(refused):
    message = refused(VOCAB_SIZE=VOCAB + 1)
    assert f"VOCAB_SIZE={VOCAB + 1}" in message and f"must be {VOCAB}, the pieces" in message


def test_plain_text_needs_a_bare_space_piece(work, refused):
    """A tokenizer without it cannot tell how many bytes its tokens stand for."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["aaaabbbb", "abcabcabc", "cabbac"] * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=270,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        pad_id=0,
        byte_fallback=True,
        add_dummy_prefix=False,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    size = processor.get_piece_size()
    assert processor.is_unknown(processor.piece_to_id("▁")), "the test needs a tokenizer without that piece"
    (work / "plain.model").write_bytes(model.getvalue())
    for name in (MANIFEST, "tokenizer.model"):
        (work / "data" / name).unlink()
    for name in (TRAIN, VAL):
        tokens = np.fromfile(work / "data" / name, "<u2", offset=HEADER_BYTES)
        write_shard(work / "data" / name, np.where(tokens < size, tokens, 5))
    message = refused(CASEOPS_ENABLED=0, TOKENIZER_PATH="plain.model", VOCAB_SIZE=size)
    assert "TOKENIZER_PATH" in message and "▁" in message


def edit_manifest(work: Path, *keys: str, value: object) -> None:
    path = work / "data" / MANIFEST
    manifest = part = json.loads(path.read_text(encoding="utf-8"))
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    path.write_text(json.dumps(manifest), encoding="utf-8")


@pytest.mark.parametrize(
    "keys, value, words",
    [
        (("files", TRAIN, "tokens"), 7, ["data/", TRAIN, "7"]),
        (("files", VAL, "tokens"), 7, ["data/", VAL, "7"]),
        (("files", SIDECAR, "tokens"), 7, ["data/", SIDECAR, "7"]),
        (("files", "fineweb_val_000001.bin"), {"tokens": 9}, ["data/fineweb_val_000001.bin", "missing"]),
        (("files", "fineweb_train_000001.bin"), {"tokens": 9}, ["data/fineweb_train_000001.bin", "missing"]),
        (("splits", "val", "tokens"), 7, [f"data/{MANIFEST}", "7"]),
        (("tokenizer", "sha256"), "0" * 64, ["TOKENIZER_PATH=data/tokenizer.model", f"data/{MANIFEST}"]),
        (("tokenizer", "file"), "other.model", ["data/other.model", "no such file"]),
        (("transform",), "none", ["CASEOPS_ENABLED=1", f"data/{MANIFEST}", "none"]),
    ],
)
def test_manifest_that_disagrees(work, refused, keys, value, words):
    edit_manifest(work, *keys, value=value)
    message = refused()
    assert all(word in message for word in words), message


def test_folder_without_manifest(work, refused):
    (work / "data" / MANIFEST).unlink()
    message = refused(TOKENIZER_PATH="data/tokenizer.model")
    assert f"data/{MANIFEST}: missing" in message
    assert "prepare_caseops_data.py --check data" in message and "ALLOW_UNVERIFIED_DATA=1" in message


def test_shard_that_is_not_in_the_manifest(work, refused):
    shard = (work / "data" / TRAIN).read_bytes()
    (work / "data" / "fineweb_train_000001.bin").write_bytes(shard)
    message = refused()
    assert "data/fineweb_train_000001.bin" in message and "ALLOW_UNVERIFIED_DATA=1" in message


def test_caseops_data_as_plain_text(refused):
    message = refused(CASEOPS_ENABLED=0)
    assert "CASEOPS_ENABLED=0" in message and "lossless_caps_caseops_v1" in message


@pytest.mark.parametrize("text", ["", "{", "not JSON", "[1]", '"text"', "7"])
def test_manifest_that_is_no_object(work, refused, text):
    (work / "data" / MANIFEST).write_text(text, encoding="utf-8")
    assert f"data/{MANIFEST}" in refused()


@pytest.mark.parametrize(
    "keys, value",
    [
        (("files",), [1]),
        (("files",), None),
        (("files", TRAIN), {}),
        (("files", TRAIN), 7),
        (("files", TRAIN, "tokens"), "many"),
        (("splits",), 7),
        (("splits",), None),
        (("splits", "val"), None),
        (("splits", "val"), 7),
        (("tokenizer",), "tokenizer.model"),
        (("tokenizer",), None),
        (("tokenizer", "file"), 7),
        (("tokenizer", "file"), ["tokenizer.model"]),
    ],
)
def test_manifest_of_another_form(work, refused, keys, value):
    edit_manifest(work, *keys, value=value)
    message = refused()
    assert f"data/{MANIFEST}" in message or keys[-1] == "tokens" and f"data/{TRAIN}" in message


# -- output folder, device, processes


@pytest.mark.parametrize("folder", ["occupied", "occupied/below", "x" * 300])
def test_impossible_output_folder(work, refused, folder):
    (work / "occupied").write_text("a file")
    assert f"ARTIFACT_DIR={folder}"[:60] in refused(ARTIFACT_DIR=folder)


def test_impossible_default_output_folder(work, refused):
    (work / "runs").write_text("a file")
    assert "runs" in refused(ARTIFACT_DIR="", RUN_ID="next")


@pytest.mark.parametrize("world_size", ["2", "0", "-1", "two", ""])
def test_world_size(refused, world_size):
    assert "WORLD_SIZE=" in refused(WORLD_SIZE=world_size)


@pytest.mark.parametrize("ranks", [{}, {"RANK": 0}, {"RANK": 1, "LOCAL_RANK": 0}], ids=str)
def test_several_processes_without_torchrun(refused, monkeypatch, ranks):
    """WORLD_SIZE alone tells no process where the others are; torchrun says it in MASTER_ADDR."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    message = refused(WORLD_SIZE=2, **ranks)
    assert "WORLD_SIZE=2" in message and "unset WORLD_SIZE, or start with torchrun" in message
    assert refused(LOCAL_RANK=1).startswith("LOCAL_RANK=1: without what torchrun sets beside it")


@pytest.mark.parametrize("ranks", [{"RANK": 2, "WORLD_SIZE": 2}, {"RANK": 1}, {"RANK": "x"}], ids=str)
def test_rank_that_does_not_exist(refused, ranks):
    assert f"RANK={ranks['RANK']}".replace("=x", "='x'") in refused(**ranks)


def test_mistake_that_only_another_rank_meets_is_said(tg, monkeypatch, capsys):
    """A damaged GPU, say. What all meet is said once: torchrun ends the others while they wait."""
    slept = []
    monkeypatch.setattr(tg.time, "sleep", slept.append)
    for rank in "10":
        assert tg.main([], {"NUM_LAYERS": "many", "LOCAL_RANK": rank}) == 2
        assert capsys.readouterr().err.startswith("train_gpt.py: error: NUM_LAYERS='many': must be")
    assert slept == [2]


def test_cuda_without_cuda(refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "DEVICE=cuda" in refused(DEVICE="cuda")


# -- checkpoints


class Bomb:
    """Unpickling this creates the file `exploded` in the working folder."""

    def __reduce__(self):
        return Path.write_text, (Path("exploded"), "boom")


def saved(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def state_of(work: Path) -> dict[str, torch.Tensor]:
    return torch.load(work / "run" / CHECKPOINT, weights_only=True)


STAGES = ["QUANTIZE_ONLY", "PREQUANT_ONLY"]


def test_missing_checkpoint(refused):
    message = refused(QUANTIZE_ONLY=1, MODEL_PATH="elsewhere.pt")
    assert "MODEL_PATH=elsewhere.pt: no such file" in message
    assert "MODEL_PATH=data: no such file" in refused(QUANTIZE_ONLY=1, MODEL_PATH="data")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a checkpoint",
        bytes(4096),
        pickle.dumps({"a": Bomb()}),
        saved({"a": Bomb()}),
        saved([torch.zeros(3)]),
        saved(torch.zeros(3)),
        saved(7),
        saved({}),
        saved({"tok_emb.weight": "text"}),
        saved({1: torch.zeros(3)}),
        saved({"model": {"tok_emb.weight": torch.zeros(3)}}),
    ],
    ids=FOREIGN_CHECKPOINTS.split(),
)
def test_foreign_checkpoint(work, refused, stage, content):
    (work / "foreign.pt").write_bytes(content)
    assert "MODEL_PATH=foreign.pt" in refused(**{stage: 1, "MODEL_PATH": "foreign.pt"})
    assert not (work / "exploded").exists(), "a checkpoint was allowed to run code"


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_truncated_checkpoint(work, refused, share):
    whole = (work / "run" / CHECKPOINT).read_bytes()
    (work / "short.pt").write_bytes(whole[: int(len(whole) * share)])
    assert "MODEL_PATH=short.pt" in refused(QUANTIZE_ONLY=1, MODEL_PATH="short.pt")


def test_checkpoint_of_another_shape(work, refused):
    message = refused(QUANTIZE_ONLY=1, MODEL_PATH="run/final_model.pt", MODEL_DIM=64)
    assert "MODEL_PATH=run/final_model.pt" in message and "does not fit" in message


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_checkpoint_with_other_tensors(work, refused, change):
    state = state_of(work)
    if change == "missing":
        del state["skip_weights"]
    else:
        state["skip_weights" if change == "shape" else "another"] = torch.zeros(3)
    torch.save(state, work / "other.pt")
    message = refused(QUANTIZE_ONLY=1, MODEL_PATH="other.pt")
    assert "MODEL_PATH=other.pt" in message
    assert ("another" if change == "extra" else "skip_weights") in message


def test_checkpoint_of_a_wrapped_model(tg, work):
    """`_orig_mod.` of torch.compile, `module.` of DDP, before the names or within them, are taken off."""
    state, taken = state_of(work), ["_orig_mod", "module"]
    names = {name: name.replace(".", "._orig_mod.", 1) if "." in name else f"module.{name}" for name in state}
    renamed = {f"module._orig_mod.{names[name]}": tensor for name, tensor in state.items()}
    assert tg.unwrapped(renamed) == (state, taken) and tg.unwrapped(state) == (state, [])


def test_checkpoint_that_holds_a_name_twice(work, refused):
    state = state_of(work)
    torch.save(state | {"module.skip_weights": state["skip_weights"]}, work / "twins.pt")
    message = refused(QUANTIZE_ONLY=1, MODEL_PATH="twins.pt")
    assert "MODEL_PATH=twins.pt" in message and "only by what wraps the model" in message


def test_checkpoint_that_is_not_finite(work, refused):
    """Quantising it would fail in the middle or give an artifact of nonsense."""
    state = state_of(work)
    state["mlp_up_bank"][0, 0, 0] = torch.nan
    torch.save(state, work / "nan.pt")
    message = refused(QUANTIZE_ONLY=1, MODEL_PATH="nan.pt")
    assert "MODEL_PATH=nan.pt" in message and "mlp_up_bank" in message


# -- artifacts


def test_missing_artifact(refused):
    message = refused(TTT_EVAL_ONLY=1, QUANTIZED_MODEL_PATH="elsewhere.ptz")
    assert "QUANTIZED_MODEL_PATH=elsewhere.ptz: no such file" in message


@pytest.mark.parametrize(
    "damage",
    [
        lambda blob: b"",
        lambda blob: blob[:10],
        lambda blob: blob[: len(blob) // 2],
        lambda blob: blob[:-1],
        lambda blob: blob + b"\0",
        lambda blob: blob[: len(blob) // 2] + bytes([blob[len(blob) // 2] ^ 1]) + blob[len(blob) // 2 + 1 :],
        lambda blob: blob[:-1] + bytes([blob[-1] ^ 128]),
        lambda blob: blob[:5] + b"\x09" + blob[6:],
        lambda blob: blob[:6] + b"\x09" + blob[7:],
        lambda blob: b"not an artifact" * 100,
        lambda blob: saved({"w": torch.zeros(3)}),
        lambda blob: pickle.dumps(Bomb()),
    ],
    ids=DAMAGED_ARTIFACTS.split(),
)
def test_damaged_artifact(work, refused, damage):
    (work / "bad.ptz").write_bytes(damage((work / "run" / ARTIFACT).read_bytes()))
    message = refused(TTT_EVAL_ONLY=1, QUANTIZED_MODEL_PATH="bad.ptz")
    assert "bad.ptz" in message
    assert not (work / "exploded").exists()


def make_artifact(tg, cfg, settings: dict[str, object]) -> bytes:
    """An artifact of random weights whose header tells other settings than those it was made with."""
    flat = tg.flatten_banks(tg.GPT(cfg).state_dict(), cfg.num_layers)
    hessians = {n: torch.eye(t.size(1)) for n, t in flat.items() if t.ndim == 2}
    records = tg.quantize_state({n: t.detach() for n, t in flat.items()}, hessians, cfg)

    class Told(tg.Config):
        def model_settings(self) -> dict[str, object]:
            return super().model_settings() | settings

    return tg.pack_artifact(records, Told(**dataclasses.asdict(cfg)))


@pytest.mark.parametrize(
    "made, told, word",
    [
        ({"vocab_size": 300}, {}, "VOCAB_SIZE=320"),
        ({}, {"num_layers": 3, "loop_end": 1}, "other.ptz"),
        ({}, {"num_layers": 0}, "other.ptz"),
        ({}, {"num_heads": "many"}, "other.ptz"),
        ({}, {"smear_gate_enabled": False}, "other.ptz"),
        ({}, {"not_a_setting_yet": 1}, "other.ptz"),
    ],
)
def test_artifact_of_other_settings(tg, work, refused, made, told, word):
    cfg = dataclasses.replace(tg.Config.from_env(TINY), **made)
    (work / "other.ptz").write_bytes(make_artifact(tg, cfg, told))
    assert word in refused(TTT_EVAL_ONLY=1, QUANTIZED_MODEL_PATH="other.ptz")


# -- nothing is lost, nothing is left


@pytest.mark.parametrize(
    "settings",
    [
        {"QUANTIZE_ONLY": 1, "MODEL_PATH": "elsewhere.pt"},
        {"TTT_EVAL_ONLY": 1, "QUANTIZED_MODEL_PATH": "elsewhere.ptz"},
        {"TRAIN_BATCH_TOKENS": 2**20},
        {"TRAIN_BATCH_TOKENS": 257},
        {"VOCAB_SIZE": VOCAB + 1},
        {"WORLD_SIZE": 2},
    ],
    ids=str,
)
def test_mistake_leaves_no_empty_run(work, refused, settings):
    before = contents(work)
    refused(**settings)
    assert contents(work).keys() == before.keys()


def test_outputs_without_a_log_are_not_overwritten(tg, work, quick_packing, capfd):
    """A folder with a model in it is in use, whoever made it."""
    (work / "mine").mkdir()
    for name in (CHECKPOINT, ARTIFACT, "result.json", "train_gpt.packed.py"):
        shutil.copy(work / "run" / name, work / "mine" / name)
    before = contents(work / "mine")
    given = {"DATA_PATH": "data", "ARTIFACT_DIR": "mine", "QUANTIZE_ONLY": "1", "TTT_ENABLED": "0"}
    assert tg.main([], TINY | given | {"MATRIX_BITS": "4"}) == 0
    after = contents(work / "mine")
    assert {name: after[name] for name in before} == before
