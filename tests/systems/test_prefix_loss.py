"""PREFIX_LOSS: the table of prefixes, the gradient against both targets' cross entropy, and where it ends."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_training import make_trainer, shard  # noqa: F401 - fixtures

from systems import prefix_loss

PIECES = [
    "<s>",
    "<unk>",
    "<0x74>",
    "▁",
    "t",
    "th",
    "▁the",
    "▁t",
    "the",
    "theory",
    "\ue001",
    "\ue001t",
    "▁theory",
]
OWN = list(range(len(PIECES)))


class Pieces:
    """A tokenizer of PIECES."""

    get_piece_size = staticmethod(lambda: len(PIECES))
    id_to_piece = staticmethod(PIECES.__getitem__)
    is_control = staticmethod(lambda i: i == 0)
    is_unknown = staticmethod(lambda i: i == 1)
    is_byte = staticmethod(lambda i: i == 2)
    is_unused = staticmethod(lambda i: False)


def test_a_prefix_is_the_longest_other_piece_that_begins_a_piece():
    table = prefix_loss.prefix_table(Pieces, len(PIECES) + 2)
    found = {PIECES[i]: PIECES[prefix] for i, prefix in enumerate(table[: len(PIECES)]) if prefix != i}
    assert found == {
        "th": "t",
        "the": "th",
        "theory": "the",
        "▁the": "▁t",
        "▁theory": "▁the",
    }, "no bare space, byte, control piece or operator has a prefix or is one"
    assert table[len(PIECES) :].tolist() == [len(PIECES), len(PIECES) + 1], "ids behind the pieces"


@pytest.fixture
def prefixes(tg, monkeypatch):
    monkeypatch.setattr(prefix_loss, "load_tokenizer", lambda cfg: Pieces)
    cfg = SimpleNamespace(vocab_size=len(PIECES), prefix_loss=0.25, logit_softcap=3.0)
    return prefix_loss.Prefixes(cfg, torch.device("cpu"))


def test_the_gradient_is_that_of_both_targets(tg, prefixes):
    drawn = torch.Generator().manual_seed(1)
    h, head = (torch.randn(*shape, 8, generator=drawn).requires_grad_() for shape in ((1, 9), (len(PIECES),)))
    targets = torch.tensor([[4, 5, 9, 6, 12, 0, 3, 10, 5]])
    second = torch.tensor([[4, 4, 8, 7, 6, 0, 3, 10, 4]])
    prefixes.fall(0.6)
    nats = tg.softcapped_cross_entropy(h @ head.mT, targets, 3.0)
    losses = prefixes(nats, h, head, targets)
    assert torch.equal(losses, nats), "the second target must not be in what is reported"
    logits = tg.softcap(h @ head.mT, 3.0).flatten(0, 1)
    other = F.cross_entropy(logits, second.flatten(), reduction="none").view(1, -1)
    expected = (nats + 0.25 * 0.4 * (second != targets) * other).mean()
    for ours, theirs in zip(
        *(torch.autograd.grad(loss, (h, head), retain_graph=True) for loss in (losses.mean(), expected)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_no_gradient_no_work(prefixes):
    nats = torch.ones(1, 2)
    with torch.no_grad():
        assert prefixes(nats, None, None, None) is nats


@pytest.mark.parametrize("kernels", ["plain", "eager"])
def test_it_changes_training_until_its_weight_is_0(tg, make_trainer, monkeypatch, kernels):  # noqa: F811
    """The first step's gradient is another, the last one's is not; the reported loss is the plain one."""
    if kernels == "plain":
        monkeypatch.setattr(tg, "has_part", lambda part: part != "eager")
    monkeypatch.setattr(prefix_loss, "load_tokenizer", lambda cfg: Pieces)
    trainers = [make_trainer(prefix_loss=share) for share in (0.0, 0.25)]
    norms = {}
    for frac in (0.0, 1.0):
        state = trainers[0].snapshot()
        reports = []
        for trainer in trainers:
            trainer.restore(state)
            reports.append(trainer.step(0, frac))
        assert reports[0].train_loss == reports[1].train_loss
        norms[frac] = [report.grad_norm for report in reports]
    assert norms[0.0][0] != pytest.approx(norms[0.0][1], rel=1e-4)
    assert norms[1.0][0] == pytest.approx(norms[1.0][1], rel=1e-6)
    assert trainers[0].model.prefixes is None
