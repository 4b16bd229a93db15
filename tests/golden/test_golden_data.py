"""Golden 06: shards, validation stream, document segments, both loaders, documents, windows, batches."""

from itertools import pairwise

import golden_tools
import pytest
import torch
from golden_tools import cases, some
from house import packed_loader, shuffled_loader

PACKING_RUNS = cases("06_data/packing_loader.json", lambda settings: settings["runs"])
SHUFFLED_RUNS = cases("06_data/shuffled_loader.json", lambda settings: settings["runs"])
BOS = 1


@pytest.fixture(scope="module")
def shard_folder(golden_file):
    return golden_tools.shard_folder(golden_file)


@pytest.fixture(scope="module")
def packing(golden_file):
    settings = golden_file("06_data/packing_loader.json")
    return settings, golden_file("06_data/packing_loader.safetensors")


@pytest.fixture(scope="module")
def shuffled(golden_file):
    settings = golden_file("06_data/shuffled_loader.json")
    return settings, golden_file("06_data/shuffled_loader.safetensors")


def stream(tg, folder, split: str) -> torch.Tensor:
    """All tokens (or byte counts) of a split, shard after shard."""
    return torch.cat(
        [torch.from_numpy(tg.read_shard(path).astype("int64")) for path in paths(tg, folder, split)]
    )


def paths(tg, folder, split: str) -> list:
    found = tg.shard_paths(folder, split)
    assert found == sorted(found)
    return found


def test_shard_names(tg, golden_file, shard_folder):
    listed = golden_file("06_data/shards.json")
    base = shard_folder.parent
    assert paths(tg, shard_folder, "train") == [base / shard["file"] for shard in listed["train"]]
    assert paths(tg, shard_folder, "val") == [base / shard["file"] for shard in listed["val"]]
    assert paths(tg, shard_folder, "val_bytes") == [base / shard["sidecar"] for shard in listed["val"]]


def test_train_shards(tg, golden_file, shard_folder):
    for shard in some(golden_file("06_data/shards.json")["train"], "shards of 06_data/shards.json, train"):
        tokens = tg.read_shard(shard_folder.parent / shard["file"])
        assert tokens.dtype == "uint16"
        bos = (tokens == BOS).nonzero()[0]
        assert len(tokens) == shard["tokens"]
        assert (bos[0], len(bos)) == (shard["first_bos_index"], shard["num_bos"])
        assert tokens.sum(dtype="int64") == shard["sum"]
        assert tokens[:8].tolist() == shard["first8"]
        assert tokens[-8:].tolist() == shard["last8"]


def test_val_shards(tg, golden_file, shard_folder):
    for shard in some(golden_file("06_data/shards.json")["val"], "shards of 06_data/shards.json, val"):
        tokens = tg.read_shard(shard_folder.parent / shard["file"])
        sidecar = tg.read_shard(shard_folder.parent / shard["sidecar"])
        assert len(tokens) == len(sidecar) == shard["tokens"]
        assert tokens.sum(dtype="int64") == shard["sum"]
        assert sidecar.sum(dtype="int64") == shard["sidecar_sum"]


def test_val_stream(tg, golden_file, shard_folder):
    """Our stream is whole; the published evaluators see the prefix cut to full sequences (golden 6.1)."""
    rows = some(golden_file("06_data/val_tokens.json"), "rows of 06_data/val_tokens.json")
    tokens, sidecar = stream(tg, shard_folder, "val"), stream(tg, shard_folder, "val_bytes")
    val = tg.ValidationSet.from_sidecar(tokens, sidecar)
    assert torch.equal(val.tokens.long(), tokens)
    assert torch.equal(val.target_bytes, sidecar[1:])
    for row in rows:
        length = (len(tokens) - 1) // row["eval_seq_len"] * row["eval_seq_len"] + 1
        assert length == row["num_tokens"]
        assert tokens[:length].sum().item() == row["sum"]
        assert tokens[:length][-5:].tolist() == row["last5"]
        assert length == row["sidecar_len"]
        assert sidecar[:length].sum().item() == row["sidecar_sum"]
        assert sidecar[:length][-5:].tolist() == row["sidecar_last5"]


def test_document_segments(tg, golden_file):
    for case in some(golden_file("06_data/cu_seqlens.json"), "cases of 06_data/cu_seqlens.json"):
        segments = tg.document_segments(
            case["bos_positions"], case["total_len"], case["max_doc_len"], case["bucket_size"]
        )
        assert segments.cu_seqlens.dtype == torch.int32
        assert segments.cu_seqlens.tolist() == case["cu_seqlens"]
        assert segments.max_seqlen == case["max_seqlen"]


def test_document_segments_of_a_tensor(tg, golden_file):
    case = some(golden_file("06_data/cu_seqlens.json"), "cases of 06_data/cu_seqlens.json")[-1]
    bos = torch.tensor(case["bos_positions"])
    segments = tg.document_segments(bos, case["total_len"], case["max_doc_len"], case["bucket_size"])
    assert segments.cu_seqlens.tolist() == case["cu_seqlens"]


@pytest.mark.parametrize("run", PACKING_RUNS)
def test_packed_loader(tg, shard_folder, packing, run):
    settings, vectors = packing
    assert settings["cu_bucket_size"] == tg.SEGMENT_BUCKET
    case = settings["runs"][run]
    for rank in range(case["world_size"]):
        loader = packed_loader(
            tg,
            paths(tg, shard_folder, "train"),
            case["world_size"],
            rank,
            case["tokens_per_rank"],
            case["train_seq_len"],
        )
        expected = case["ranks"][str(rank)]
        key = f"{run}.rank{rank}"
        for batch, inputs in enumerate(vectors[f"{key}.inputs"]):
            x, y, segments = loader.next()
            assert x.dtype == y.dtype == torch.int64
            assert x.tolist() == [inputs.tolist()]
            assert y.tolist() == [packed_targets(vectors, key, batch, inputs)]
            assert segments.cu_seqlens.tolist() == vectors[f"{key}.cu.{batch}"].tolist()
            assert len(segments.cu_seqlens) == expected["cu_length"][batch]
            assert segments.max_seqlen == expected["max_seqlen"][batch]
        assert batch + 1 == len(expected["cu_length"])


def packed_targets(vectors: dict, key: str, batch: int, inputs: torch.Tensor) -> list[int]:
    """Stored targets, or for large runs the shifted inputs and the one target that is not among them."""
    if f"{key}.targets" in vectors:
        return vectors[f"{key}.targets"][batch].tolist()
    return [*inputs[1:].tolist(), vectors[f"{key}.last_target"][batch].item()]


@pytest.mark.parametrize("run", PACKING_RUNS)
def test_packed_loader_resumes(tg, shard_folder, packing, run):
    """A state taken between two batches continues the same stream, over a change of shard too."""
    case = packing[0]["runs"][run]
    sizes = case["world_size"], case["world_size"] - 1, case["tokens_per_rank"], case["train_seq_len"]
    arguments = (paths(tg, shard_folder, "train"), *sizes)
    loader = packed_loader(tg, *arguments)
    for _ in range(2):
        loader.next()
    state = loader.state()
    expected = [loader.next() for _ in range(4)]
    resumed = packed_loader(tg, *arguments)
    resumed.load_state(state)
    for x, y, segments in expected:
        again_x, again_y, again_segments = resumed.next()
        assert torch.equal(again_x, x) and torch.equal(again_y, y)
        assert torch.equal(again_segments.cu_seqlens, segments.cu_seqlens)


@pytest.mark.parametrize("run", SHUFFLED_RUNS)
def test_shuffled_loader(tg, shard_folder, shuffled, run):
    settings, vectors = shuffled
    case = settings["runs"][run]
    world, seq_len = case["world_size"], case["train_seq_len"]
    rows = case["global_tokens"] // (world * case["grad_accum_steps"]) // seq_len
    for rank in range(world):
        loader = shuffled_loader(tg, paths(tg, shard_folder, "train"), world, rank, seq_len)
        key = f"{run}.rank{rank}"
        reset = f"{key}.x" not in vectors
        for batch in range(len(vectors[f"{key}.x_first4" if reset else f"{key}.x"])):
            x, y = loader.next(rows)
            assert x.shape == y.shape == (rows, seq_len)
            assert torch.equal(x[:, 1:], y[:, :-1])
            if reset:
                first = vectors[f"{key}.x_first4"][batch]
                assert x[:, : first.shape[1]].tolist() == first.tolist()
                assert x.sum(dim=1).tolist() == vectors[f"{key}.x_rowsum"][batch].tolist()
            else:
                assert x.tolist() == vectors[f"{key}.x"][batch].tolist()
                assert y.tolist() == vectors[f"{key}.y"][batch].tolist()


def test_find_documents(tg, golden_file):
    """Better: where the published finder fails an assertion, a last lone BOS closes the document before."""
    for case in some(golden_file("06_data/find_docs.json"), "cases of 06_data/find_docs.json"):
        documents = [list(document) for document in tg.find_documents(torch.tensor(case["tokens"]))]
        if "error" in case:
            assert case["error"] == "assertion" and case["tokens"][-1] == BOS
            starts = [place for place, token in enumerate(case["tokens"]) if token == BOS]
            assert documents == [[start, end - start + 1] for start, end in pairwise(starts)]
        else:
            assert documents == case["docs"]


@pytest.mark.parametrize(("tokens", "documents"), [([1, 5, 6, 1], [[0, 4]]), ([1], [])])
def test_final_bos_is_no_document(tg, tokens, documents):
    assert [list(document) for document in tg.find_documents(torch.tensor(tokens))] == documents


def test_chunk_window(tg, golden_file):
    table = golden_file("06_data/chunk_window.json")
    for row in some(table["rows"], "rows of 06_data/chunk_window.json"):
        case = dict(zip(table["columns"], row, strict=True))
        window = tg.chunk_window(case["ci"], case["pred_len"], case["chunk_size"], case["eval_seq_len"])
        expected = (case["win_start"], case["win_len"], case["chunk_offset"], case["chunk_len"])
        assert (window.start, window.length, window.offset, window.targets) == expected, case


def test_ttt_batches(tg, golden_file):
    found = golden_file("06_data/ttt_batches.json")["batching"]
    for case in some(found, "cases of 06_data/ttt_batches.json, batching"):
        documents = [tuple(document) for document in case["docs"]]
        batches = tg.ttt_batches(list(enumerate(documents)), tg.Config(ttt_batch_size=case["batch_size"]))
        batches = sorted(batches) if case["ascending"] else batches
        actual = [[b.index, [[number, list(document)] for number, document in b.documents]] for b in batches]
        assert actual == case["batches"]


def test_select_documents(tg, golden_file):
    found = golden_file("06_data/ttt_batches.json")["doc_fraction"]
    for case in some(found, "cases of 06_data/ttt_batches.json, doc_fraction"):
        documents = [(10 * number, 11) for number in range(case["num_docs"])]
        selected = tg.select_documents(documents, case["val_doc_fraction"], case["seed"])
        assert selected == [documents[number] for number in case["selected"]]
