"""Golden 11: standard evaluation, document evaluation with given losses, byte tables.

The published evaluator drops a rank's last incomplete batch; ours scores every target. The tests apply the
published limits themselves and give our functions exactly the ranges on which both must agree.
"""

import re
from types import SimpleNamespace

import pytest
import torch
from golden_tools import cases, run_through, score_standard, some, tiny_config, tokenizer_model
from house import plain_validation

# 11_bpb: "relative 1e-9 (sums are exact sums of the stored float32 losses in float64)"
RELATIVE = 1e-9
# 06_data (segments of a row): "exact"

TABLES = ["base_bytes", "has_leading_space", "is_boundary"]
ACCOUNTING = "11_bpb/ttt_accounting.json"


def numbers(of_edges: bool):
    """Function: cases of the document evaluation -> places of its settings, or of its edge cases (noted)."""
    return lambda found: [number for number, case in enumerate(found) if ("note" in case) == of_edges]


def sizes(of: str):
    """Function: names -> the sizes in those that read `of` and a size."""
    return lambda names: [int(match[1]) for name in names if (match := re.fullmatch(of, name))]


SETTINGS = cases(ACCOUNTING, numbers(of_edges=False), "settings")
EDGES = cases(ACCOUNTING, numbers(of_edges=True), "edges")
PUBLISHED = cases("11_bpb/bpb.safetensors", sizes(r"sp(\d+)\.base_bytes"), "sp*.base_bytes")
BEYOND = cases("11_bpb/tables.json", sizes(r"table_size_when_vocab_(\d+)"), "table_size_when_vocab_*")


@pytest.fixture(scope="module")
def vectors(golden_file):
    return golden_file("11_bpb/bpb.safetensors")


@pytest.fixture(scope="module")
def tables(golden_file):
    return golden_file("11_bpb/tables.json")


@pytest.fixture(scope="module")
def sentencepiece_model(tokenizer_dir, golden_file):
    import sentencepiece

    model = tokenizer_model(tokenizer_dir, golden_file("10_caseops/meta.json"))
    return sentencepiece.SentencePieceProcessor(model_file=str(model))


def given_losses(previous: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Pseudo-losses of golden 11, computed in float64 and rounded to float32."""
    return (0.25 + 6 * ((37 * previous.long() + 101 * target.long() + 7) % 1009).double() / 1009).float()


def byte_tables(tg, vectors: dict, prefix: str):
    """`ByteTables` from stored vectors (booleans are stored as 0/1)."""
    base, space, boundary = (vectors[f"{prefix}.{name}"] for name in TABLES)
    return tg.ByteTables(base.long(), space.bool(), boundary.bool())


def validation_set(tg, vectors: dict, source: str, tokens: torch.Tensor, sidecar: torch.Tensor):
    if source == "sidecar":
        return tg.ValidationSet.from_sidecar(tokens.long(), sidecar.long())
    return plain_validation(tg, tokens.long(), byte_tables(tg, vectors, source))


def assert_meter(meter, expected: dict) -> None:
    """Sums and both results against a golden row; counts exact."""
    assert meter.tokens == expected["token_count"]
    assert meter.bytes == expected["byte_sum" if "byte_sum" in expected else "byte_count"]
    for key in ("loss_sum", "val_loss", "val_bpb"):
        assert getattr(meter, key) == pytest.approx(expected[key], rel=RELATIVE, abs=0), key


def test_given_losses_match_the_stored_ones(vectors):
    tokens = vectors["val_tokens"]
    assert torch.equal(given_losses(tokens[:-1], tokens[1:]), vectors["loss"])
    plain = vectors["plain.tokens"]
    assert torch.equal(given_losses(plain[:-1], plain[1:]), vectors["plain.loss"])


class RecordingScore:
    """`score` callback with the given losses that keeps the row sizes and segments it saw."""

    def __init__(self) -> None:
        self.rows: list[dict] = []

    def __call__(self, x: torch.Tensor, y: torch.Tensor, segments) -> torch.Tensor:
        assert x.shape == y.shape and x.shape[0] == 1
        cu = segments.cu_seqlens.tolist()
        boundaries = cu[: cu.index(x.shape[1]) + 1]
        self.rows.append(
            {
                "cu_seqlens": boundaries,
                "padded_len": len(cu),
                "max_seqlen": segments.max_seqlen,
                "tokens": x.shape[1],
            }
        )
        return given_losses(x, y)


def published_range(row: dict) -> tuple[int, int, int]:
    """(position of the first input, targets scored, targets per batch) of the published evaluator."""
    length, world = row["eval_seq_len"], row["world_size"]
    sequences = (row["num_val_tokens"] - 1) // length
    first = sequences * row["rank"] // world
    last = sequences * (row["rank"] + 1) // world
    per_batch = row["val_batch_tokens"] // (world * row["grad_accum_steps"]) // length
    batches = (last - first) // per_batch
    assert batches == row["batches"]
    return first * length, batches * per_batch * length, per_batch * length


def test_standard_evaluation(tg, golden_file, vectors):
    rows = [row for row in golden_file("11_bpb/standard_eval.json") if "error" not in row]
    for row in some(rows, "row of 11_bpb/standard_eval.json without an error"):
        start, targets, row_tokens = published_range(row)
        tokens = vectors["val_tokens"][start : start + targets + 1]
        sidecar = vectors["val_bytes"][start : start + targets + 1]
        val = validation_set(tg, vectors, row["byte_source"], tokens, sidecar)
        score = RecordingScore()
        meter = score_standard(tg, score, val, row_tokens, row["eval_seq_len"])
        assert_meter(meter, row)
        assert len(score.rows) == row["batches"]
        for seen, expected in zip(score.rows, row.get("first_batches_cu", []), strict=False):
            assert seen == expected


def test_standard_evaluation_scores_everything_where_the_published_one_fails(tg, golden_file, vectors):
    """Better: less than one batch (division by zero) or less than one sequence (value error) is no error."""
    failing = [row for row in golden_file("11_bpb/standard_eval.json") if "error" in row]
    for row in some(failing, "row of 11_bpb/standard_eval.json with an error"):
        assert row["error"] in ("division by zero", "value error")
        num_tokens = row.get("num_val_tokens", len(vectors["val_tokens"]))
        tokens, sidecar = vectors["val_tokens"][:num_tokens], vectors["val_bytes"][:num_tokens]
        val = validation_set(tg, vectors, row.get("byte_source", "sidecar"), tokens, sidecar)
        row_tokens = row["val_batch_tokens"] // (row["world_size"] * row["grad_accum_steps"])
        meter = score_standard(tg, RecordingScore(), val, row_tokens, row["eval_seq_len"])
        expected = vectors["loss"][: num_tokens - 1].double().sum().item()
        assert meter.tokens == num_tokens - 1
        assert meter.bytes == val.target_bytes.sum().item()
        assert meter.loss_sum == pytest.approx(expected, rel=RELATIVE, abs=0)


def test_whole_stream_has_no_dropped_tail(tg, golden_file, vectors):
    """Every batch size gives the number of the published row that happens to drop nothing."""
    rows = golden_file("11_bpb/standard_eval.json")
    targets = len(vectors["loss"])
    complete = [row for row in rows if row.get("token_count") == targets]
    whole = some(complete, "row of 11_bpb/standard_eval.json that drops nothing")[0]
    val = validation_set(tg, vectors, whole["byte_source"], vectors["val_tokens"], vectors["val_bytes"])
    length = whole["eval_seq_len"]
    for row_tokens in (length, 100, 333, targets, 2 * targets):
        assert_meter(score_standard(tg, RecordingScore(), val, row_tokens, length), whole)


class GivenLossModel(torch.nn.Module):
    """Stands in for the model: given losses, and adapters that see a gradient of zero."""

    def __init__(self) -> None:
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(()))

    def losses(
        self, input_ids, target_ids, segments=None, *, looping: bool, lora=None, scored=None, cache=None
    ) -> torch.Tensor:
        losses = given_losses(input_ids, target_ids)
        if scored is not None:
            losses = losses.gather(1, scored)
        if lora is not None:
            losses = losses + 0 * sum(factor.sum() for part in lora.maps() for factor in part.factors)
        return losses


def run_document_evaluation(tg, val, settings: dict):
    """Score-first evaluation of given losses without a global phase: (meter, events of kind -> list)."""
    config = tiny_config(
        tg,
        phased_ttt_prefix_docs=0,
        ttt_lora_rank=2,
        ttt_chunk_size=settings["ttt_chunk_size"],
        ttt_eval_seq_len=settings["ttt_eval_seq_len"],
        ttt_batch_size=settings["ttt_batch_size"],
    )
    events: dict[str, list[dict]] = {}

    def record(kind: str, **data) -> None:
        kept = {key: data[key] for key in ("batch_number", "chunk", "chunks", "part") if key in data}
        events.setdefault(kind, []).append(kept)

    generator = torch.Generator().manual_seed(0)
    model, watch = GivenLossModel(), SimpleNamespace(see=record)
    model.backends = tg.Backends()
    meter = run_through(tg.ScoreFirstTTT, model, val, config, looping=True, generator=generator, watch=watch)
    assert "global_sgd" not in events
    return meter, events


def assert_batches(case: dict, events: dict) -> None:
    """Order of batches and documents, and the documents' places in the stream."""
    assert [done["batch_number"] for done in events["batch_done"]] == [b["index"] for b in case["batches"]]
    first_chunks = [scored for scored in events["scored"] if scored["chunk"] == 0]
    for batch, scored in zip(case["batches"], first_chunks, strict=True):
        assert scored["batch_number"] == batch["index"]
        assert scored["part"].documents == [number for number, _ in batch["docs"]]
        assert [first for first, _ in scored["part"].spans] == [start for _, (start, _) in batch["docs"]]


def assert_chunks(case: dict, events: dict) -> None:
    """Increments of loss, bytes and tokens of every chunk step, and the targets scored in each."""
    steps = [step for done in events["batch_done"] for step in done["chunks"]]
    assert len(steps) == len(case["chunks"]) == len(events["scored"])
    for step, scored, expected in zip(steps, events["scored"], case["chunks"], strict=True):
        loss, byte_count, tokens = step
        assert loss == pytest.approx(expected["loss_sum"], rel=RELATIVE, abs=0)
        assert (byte_count, tokens) == (expected["byte_sum"], expected["tokens"])
        # Better: a finished document leaves the batch; published it stays as a row with nothing to score.
        assert [n for _, n in scored["part"].spans] == [n for n in expected["chunk_lens"] if n]


@pytest.mark.parametrize("case_number", SETTINGS)
def test_document_evaluation(tg, golden_file, vectors, case_number):
    case = golden_file(ACCOUNTING)[case_number]
    val = validation_set(tg, vectors, case["byte_source"], vectors["val_tokens"], vectors["val_bytes"])
    meter, events = run_document_evaluation(tg, val, case)
    assert_meter(meter, case)
    if case["batches"] is not None:
        assert_batches(case, events)
    if case["chunks"] is not None:
        assert_chunks(case, events)


def edge_stream(note: str, vectors: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, sidecar) that a note tells: [its tokens +] first N of val_tokens [and a BOS]."""
    told = re.search(r"(?:\[([\d, ]+)\] \+ )?first (\d+) of val_tokens( followed by a single BOS)?", note)
    if not told:
        pytest.skip(f"{ACCOUNTING} tells a stream in words unknown here: {note}")
    before = [int(token) for token in (told[1] or "").split(",") if token]
    after, count = [1] if told[3] else [], int(told[2])
    tokens = [*before, *vectors["val_tokens"][:count].tolist(), *after]
    sidecar = [*before, *vectors["val_bytes"][:count].tolist(), *(0 for _ in after)]
    return torch.tensor(tokens), torch.tensor(sidecar)


@pytest.mark.parametrize("case_number", EDGES)
def test_document_evaluation_edges(tg, golden_file, vectors, case_number):
    """Tokens before the first BOS belong to no document.

    Better: a stream that ends in BOS is scored to its end (published: assertion).
    """
    found = golden_file(ACCOUNTING)
    note, result = found[case_number]["note"], found[case_number]["result"]
    settings = some([case for case in found if "note" not in case], f"settings in {ACCOUNTING}")[-1]
    told = re.search(r"byte source (\w+)", note)
    tokens, sidecar = edge_stream(note, vectors)
    val = validation_set(tg, vectors, told[1] if told else settings["byte_source"], tokens, sidecar)
    meter, _ = run_document_evaluation(tg, val, settings)
    if "error" not in result:
        return assert_meter(meter, result)
    assert result == {"error": "assertion"} and tokens[-1] == 1
    tokens = tokens[tokens.tolist().index(1) :]
    assert meter.tokens == len(tokens) - 1
    expected = given_losses(tokens[:-1], tokens[1:]).double().sum().item()
    assert meter.loss_sum == pytest.approx(expected, rel=RELATIVE, abs=0)


@pytest.mark.parametrize("size", PUBLISHED)
def test_tables_of_the_published_tokenizer(tg, vectors, sentencepiece_model, size):
    built = tg.ByteTables.from_sentencepiece(sentencepiece_model, size)
    for name in TABLES:
        assert torch.equal(getattr(built, name).long(), vectors[f"sp{size}.{name}"].long()), name


@pytest.mark.parametrize("size", BEYOND)
def test_tables_beyond_the_tokenizer(tg, tables, sentencepiece_model, size):
    stored_size, base, space, boundary = tables[f"table_size_when_vocab_{size}"]
    built = tg.ByteTables.from_sentencepiece(sentencepiece_model, size)
    assert len(built.base_bytes) == len(built.has_leading_space) == len(built.is_boundary) == stored_size
    own = sentencepiece_model.get_piece_size()
    beyond = [getattr(built, name)[own:].sum().item() for name in TABLES]
    assert beyond == [base, space, boundary]


def test_plain_text(tg, tables, vectors, sentencepiece_model):
    """Tokens, bytes of each target and one evaluation of plain text without the case transform."""
    plain = tables["plain"]
    assert [len(text.encode()) for text in plain["texts"]] == plain["utf8_len"]
    tokens = [token for text in plain["texts"] for token in (1, *sentencepiece_model.encode(text))] + [1]
    assert tokens == vectors["plain.tokens"].tolist()
    byte_table = tg.ByteTables.from_sentencepiece(sentencepiece_model, sentencepiece_model.get_piece_size())
    target_bytes = byte_table.target_bytes(torch.tensor(tokens))
    assert torch.equal(target_bytes.long(), vectors["plain.token_bytes"].long())
    assert target_bytes.sum().item() == plain["table_total_bytes"]
    used = torch.tensor(tokens[: plain["tokens_used"]])
    val = plain_validation(tg, used, byte_table)
    meter = score_standard(tg, RecordingScore(), val, plain["eval_seq_len"], plain["eval_seq_len"])
    assert_meter(meter, plain["standard_eval"])
