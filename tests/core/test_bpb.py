"""Bits per byte by hand: the meter, the byte tables, and the evaluators on texts whose score is known."""

import math

import pytest
import torch
from golden_tools import score_standard
from house import plain_validation

WORD = "\u2581"


class Pieces:
    """Stands in for a SentencePiece model: the handful of methods that the byte tables need."""

    def __init__(self, pieces: list[str], control: set[int], unknown: int, byte_pieces: set[int]) -> None:
        self.pieces, self.control, self.unknown, self.byte_pieces = pieces, control, unknown, byte_pieces

    def vocab_size(self) -> int:
        return len(self.pieces)

    get_piece_size = GetPieceSize = __len__ = piece_size = vocab_size

    def id_to_piece(self, index: int) -> str:
        return self.pieces[index]

    IdToPiece = id_to_piece

    def piece_to_id(self, piece: str) -> int:
        return self.pieces.index(piece) if piece in self.pieces else self.unknown

    PieceToId = piece_to_id

    def is_control(self, index: int) -> bool:
        return index in self.control

    IsControl = is_control

    def is_unknown(self, index: int) -> bool:
        return index == self.unknown

    IsUnknown = is_unknown

    def is_unused(self, index: int) -> bool:
        return False

    IsUnused = is_unused

    def is_byte(self, index: int) -> bool:
        return index in self.byte_pieces

    IsByte = is_byte


PIECES = ["<pad>", "<s>", "</s>", "<unk>", "<0x0A>", WORD, WORD + "the", WORD + "caf", "é", "s", "!"]
ID = {piece: index for index, piece in enumerate(PIECES)}


@pytest.fixture
def tables(tg):
    return tg.ByteTables.from_sentencepiece(Pieces(PIECES, {0, 1, 2}, 3, {4}), len(PIECES))


def test_meter_by_hand(tg):
    """Four targets of one bit each over two bytes: two bits per byte."""
    meter = tg.BpbMeter()
    meter.add(torch.full((4,), math.log(2)), torch.tensor([1, 0, 1, 0]))
    assert (meter.tokens, meter.bytes) == (4, 2)
    assert meter.val_loss == pytest.approx(math.log(2), rel=1e-7)
    assert meter.val_bpb == pytest.approx(2.0, rel=1e-7)


def test_meter_adds_in_float64(tg):
    """A float32 sum would stop growing at 2^24."""
    meter = tg.BpbMeter()
    meter.add(torch.tensor([2.0**24]), torch.tensor([1]))
    for _ in range(64):
        meter.add(torch.ones(1), torch.ones(1, dtype=torch.int64))
    assert meter.loss_sum == 2**24 + 64
    big = tg.BpbMeter()
    big.add(torch.full((100_001,), 0.1), torch.ones(100_001, dtype=torch.int64))
    assert big.loss_sum == pytest.approx(100_001 * torch.tensor(0.1).item(), rel=1e-12)


def test_meter_is_independent_of_the_split(tg):
    losses = torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 5
    counts = torch.randint(0, 6, (1000,), generator=torch.Generator().manual_seed(1))
    whole, parts = tg.BpbMeter(), tg.BpbMeter()
    whole.add(losses, counts)
    for part in range(0, 1000, 37):
        parts.add(losses[part : part + 37], counts[part : part + 37])
    assert (whole.tokens, whole.bytes) == (parts.tokens, parts.bytes)
    assert whole.loss_sum == pytest.approx(parts.loss_sum, rel=1e-12)


def test_tables_by_hand(tables):
    assert tables.base_bytes.tolist() == [0, 0, 0, 0, 1, 0, 3, 3, 2, 1, 1]
    assert tables.has_leading_space.tolist() == [False] * 5 + [True] * 3 + [False] * 3
    assert tables.is_boundary.tolist() == [True] * 4 + [False] * 7


def test_bytes_of_a_known_text(tables):
    """ "the cafés\\n !" after BOS: every byte of the text is charged to exactly one token."""
    text = "the cafés\n !"
    pieces = ["<s>", WORD + "the", WORD + "caf", "é", "s", "<0x0A>", WORD, "!"]
    target_bytes = tables.target_bytes(torch.tensor([ID[piece] for piece in pieces]))
    assert target_bytes.tolist() == [3, 4, 2, 1, 1, 1, 1]
    assert target_bytes.sum().item() == len(text.encode())


def test_space_after_a_control_piece_is_no_byte(tables):
    tokens = torch.tensor([ID["<s>"], ID[WORD + "the"], ID["<s>"], ID[WORD + "the"], ID[WORD + "the"]])
    assert tables.target_bytes(tokens).tolist() == [3, 0, 3, 4]


def test_score_of_a_known_text(tg, tables):
    """A uniform model over 11 pieces on 7 targets and 13 bytes: 7 * log2(11) / 13 bits per byte."""
    pieces = ["<s>", WORD + "the", WORD + "caf", "é", "s", "<0x0A>", WORD, "!"]
    val = plain_validation(tg, torch.tensor([ID[piece] for piece in pieces]), tables)

    def uniform(x: torch.Tensor, y: torch.Tensor, segments) -> torch.Tensor:
        return torch.full(y.shape, math.log(11))

    for row_tokens in (1, 3, 7, 100):
        meter = score_standard(tg, uniform, val, row_tokens, 64)
        assert (meter.tokens, meter.bytes) == (7, 13)
        assert meter.val_loss == pytest.approx(math.log(11), rel=1e-6)
        assert meter.val_bpb == pytest.approx(7 * math.log2(11) / 13, rel=1e-6)


def test_model_that_knows_nothing_scores_log_vocab(tg):
    """Zero embeddings give a uniform distribution: the evaluator on a real model, by hand."""
    config = tg.Config(
        vocab_size=64, num_layers=2, model_dim=16, num_heads=2, num_kv_heads=1, mlp_mult=2.0, rope_dims=4,
        num_loops=0, parallel_start_layer=0, xsa_last_n=2, train_seq_len=16, eval_seq_len=16,
    )  # fmt: skip
    model = tg.GPT(config)
    with torch.no_grad():
        model.tok_emb.weight.zero_()
    tokens = torch.randint(2, 64, (50,), generator=torch.Generator().manual_seed(0))
    tokens[[0, 20]] = 1
    val = tg.ValidationSet.from_sidecar(tokens, torch.full((50,), 3))

    def score(x: torch.Tensor, y: torch.Tensor, segments) -> torch.Tensor:
        with torch.no_grad():
            return model.losses(x, y, segments, looping=False)

    meter = score_standard(tg, score, val, 32, config.eval_seq_len)
    assert (meter.tokens, meter.bytes) == (49, 147)
    assert meter.val_loss == pytest.approx(math.log(64), rel=1e-6)
    assert meter.val_bpb == pytest.approx(6 / 3, rel=1e-6)


def test_rows_see_their_own_tokens_only(tg):
    """Every target goes to `score` once, with its own predecessor, and documents become segments."""
    tokens = torch.randint(2, 64, (101,), generator=torch.Generator().manual_seed(2))
    tokens[[0, 10, 45, 46, 100]] = 1
    val = tg.ValidationSet.from_sidecar(tokens, torch.ones_like(tokens))
    pairs = []

    def score(x: torch.Tensor, y: torch.Tensor, segments) -> torch.Tensor:
        starts = set(segments.cu_seqlens.tolist())
        assert {p for p, token in enumerate(x[0].tolist()) if token == 1} <= starts
        assert segments.max_seqlen <= 16
        pairs.extend(zip(x[0].tolist(), y[0].tolist(), strict=True))
        return torch.zeros(y.shape)

    score_standard(tg, score, val, 24, 16)
    assert pairs == list(zip(tokens[:-1].tolist(), tokens[1:].tolist(), strict=True))


def test_sidecar_bytes_belong_to_the_target(tg):
    """The count of token i+1 is the count of target i; the first token is never a target."""
    val = tg.ValidationSet.from_sidecar(torch.tensor([1, 5, 6, 1, 7]), torch.tensor([0, 3, 4, 0, 9]))
    assert val.target_bytes.dtype == torch.int64
    assert val.target_bytes.tolist() == [3, 4, 0, 9]
