"""Golden folder 08_hessians: sums of x^T x over calibration rows without document segments."""

import pytest
import torch
from golden_tools import HESSIANS_REL, assert_close, assert_digest, beside, cases, model_config, some

META = "08_hessians/hessians.json"
LOOPS = cases(META, lambda meta: [f"loop_{loop}" for loop in meta["names"]])
HEAD = "tok_emb.weight"


@pytest.fixture(scope="module")
def golden(golden_file) -> tuple:
    """(meta, upper triangles, batches [2, rows, seq], base weights)."""
    meta = golden_file(META)
    batches = golden_file("08_hessians/inputs.safetensors")["batches"].long()
    assert list(batches.shape) == [meta["num_batches"], *meta["batch_shape"]]
    weights = golden_file(beside(META, meta["weights"]))
    return meta, golden_file("08_hessians/hessians.safetensors"), batches, weights


def collect(tg, config, weights: dict, batches: torch.Tensor, looping: bool) -> dict[str, torch.Tensor]:
    """Hessians of a model over the batches, plain rows."""
    model = tg.GPT(config).eval()
    model.load_state_dict(weights)
    collector = tg.HessianCollector()
    with torch.no_grad():
        for input_ids in batches:
            model.hidden(input_ids, looping=looping, on_input=collector.on_input)
    return collector.hessians(len(batches))


@pytest.fixture(scope="module", params=LOOPS)
def collected(request, tg, golden) -> tuple:
    """(loop, Hessians) of the golden model."""
    meta, _, batches, weights = golden
    config = model_config(tg, meta["config"])
    return request.param, collect(tg, config, weights, batches, looping=request.param == "loop_on")


def stored_triangles(triangles: dict, loop: str) -> dict[str, torch.Tensor]:
    """The upper triangles that the folder has of a model with or without its loop."""
    prefix = f"{loop}/"
    stored = {key.removeprefix(prefix): ref for key, ref in triangles.items() if key.startswith(prefix)}
    return some(stored, f"{prefix}* in 08_hessians/hessians.safetensors")


class Windows:
    """Calibration loader that deals the golden rows in order."""

    def __init__(self, batches: torch.Tensor) -> None:
        self.rows = batches.flatten(0, 1)

    def next(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The next `rows` windows as inputs; targets take no part in a calibration."""
        dealt, self.rows = self.rows.split([rows, len(self.rows) - rows])
        return dealt, dealt


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("loop", LOOPS)
def test_calibration(tg, golden, loop, split):
    """The stage of a run gives the golden Hessians, also where a batch is split into micro-batches."""
    meta, triangles, batches, weights = golden
    count, rows, length = batches.shape
    micro_batches = rows if split else 1
    sizes = {"train_seq_len": length, "train_batch_tokens": rows * length, "gptq_calibration_batches": count}
    config = model_config(tg, meta["config"], **sizes, grad_accum_steps=micro_batches)
    model, windows = tg.GPT(config, tg.Backends(micro_batches=micro_batches)), Windows(batches)
    model.load_state_dict(weights)
    hessians = tg.calibrate(model, config, windows, looping=loop == "loop_on")
    assert len(windows.rows) == 0
    assert sorted(hessians) == meta["names"][loop.removeprefix("loop_")]
    for name, reference in stored_triangles(triangles, loop).items():
        hessian = hessians[name]
        assert_close(hessian[torch.triu_indices(*hessian.shape).unbind()], reference, HESSIANS_REL)


def test_names(golden, collected):
    loop, hessians = collected
    assert sorted(hessians) == golden[0]["names"][loop.removeprefix("loop_")]


def test_upper_triangles(golden, collected):
    _, triangles, _, _ = golden
    loop, hessians = collected
    for name, reference in stored_triangles(triangles, loop).items():
        rows, columns = torch.triu_indices(*hessians[name].shape)
        assert hessians[name].dtype == torch.float32
        assert_close(hessians[name][rows, columns], reference, HESSIANS_REL)


def test_digests(golden, collected):
    loop, hessians = collected
    digests = {
        key.removeprefix(f"{loop}/"): expected
        for key, expected in golden[0]["digest"].items()
        if key.startswith(f"{loop}/")
    }
    assert digests.keys() == hessians.keys()
    for name, expected in digests.items():
        assert_digest(hessians[name], expected, HESSIANS_REL)


def test_symmetric_and_shared_by_q_k_v(collected):
    _, hessians = collected
    for name, hessian in hessians.items():
        assert torch.allclose(hessian, hessian.T, rtol=1e-5, atol=1e-5 * hessian.abs().max().item()), name
        if name.endswith(".attn.c_q.weight"):
            for other in ("c_k", "c_v"):
                assert torch.equal(hessian, hessians[name.replace("c_q", other)])


def test_looped_layers_accumulate_over_their_visits(tg, golden):
    """Trace = sum of squared inputs: a layer visited three times holds three visits, the others one."""
    meta, _, batches, weights = golden
    config = model_config(tg, meta["config"])
    hessians = collect(tg, config, weights, batches, looping=True)
    model = tg.GPT(config)
    model.load_state_dict(weights)
    squares: dict[str, list[float]] = {}

    def count(name: str, x: torch.Tensor) -> None:
        squares.setdefault(name, []).append(x.double().square().sum().item())

    with torch.no_grad():
        for input_ids in batches:
            model.hidden(input_ids, looping=True, on_input=count)
    for layer in range(config.num_layers):
        visits = config.num_loops + 1 if config.loop_start <= layer <= config.loop_end else 1
        name = f"blocks.{layer}.attn.proj.weight"
        assert len(squares[name]) == visits * len(batches)
        assert hessians[name].trace().item() == pytest.approx(sum(squares[name]) / len(batches), rel=1e-5)


def test_untied_head_has_its_own_hessian(tg, golden):
    """Published code has none for either matrix when untied (a late failure); ours has the head's."""
    meta, _, batches, weights = golden
    if not meta["config"]["tie_embeddings"]:
        pytest.skip(f"the model of {META} is untied")
    tied = collect(tg, model_config(tg, meta["config"]), weights, batches, looping=True)
    untied_config = model_config(tg, meta["config"], tie_embeddings=False)
    untied_weights = {**weights, "lm_head.weight": torch.randn_like(weights[HEAD])}
    untied = collect(tg, untied_config, untied_weights, batches, looping=True)
    assert set(untied) - set(tied) == {"lm_head.weight"}
    assert HEAD not in untied
    assert torch.equal(untied["lm_head.weight"], tied[HEAD])  # its input does not depend on the head itself
