"""Golden folder 02_ttt_forward: forward with per-document adapters, gradients, AdamW steps, initial draws."""

import re

import pytest
import torch
from golden_tools import (
    GRADIENTS_REL,
    STEP_ABS,
    STEP_FRACTION,
    VALUES_REL,
    assert_close,
    assert_digest,
    beside,
    cases,
    digest,
    model_config,
    some,
)

FOLDER = "02_ttt_forward"
META = f"{FOLDER}/ttt_forward.json"
OUTPUTS = cases(f"{FOLDER}/outputs.safetensors")  # names of losses
DIGEST_REL = 1e-6  # initial A: the same float32 draws, summed in float64


class Setup:
    """Base model, inputs and adapters of the golden folder."""

    def __init__(self, tg, golden_file) -> None:
        self.tg, self.meta = tg, golden_file(META)
        files = ("inputs", "outputs", "lora", "lora_grads", "lora_after_adamw")
        self.files = {part: golden_file(f"{FOLDER}/{part}.safetensors") for part in files}
        self.config = self.settings()
        self.model = tg.GPT(self.config)
        self.model.load_state_dict(golden_file(beside(META, self.meta["base_weights"])))
        self.model.requires_grad_(False)
        self.input_ids = self.files["inputs"]["input_ids"].long()
        self.target_ids = self.files["inputs"]["target_ids"].long()

    def settings(self, **overrides):
        """Golden config with the folder's adapter and optimiser settings."""
        adamw = self.meta["adamw"]
        ttt = {
            "ttt_lora_rank": self.meta["rank"],
            "ttt_lora_alpha": self.meta["alpha"],
            "ttt_lora_lr": adamw["lr"],
            "ttt_beta1": adamw["betas"][0],
            "ttt_beta2": adamw["betas"][1],
            "ttt_weight_decay": adamw["weight_decay"],
        }
        adapters = dict.fromkeys(("ttt_k_lora", "ttt_mlp_lora", "ttt_o_lora"), True)
        return model_config(self.tg, self.meta["config"], **{**ttt, **adapters, **overrides})

    def adapters(self, config=None, stored: bool = True):
        """A BatchedLoRA of the golden sizes, filled from the file (only the names that it has)."""
        config = self.config if config is None else config
        lora = self.tg.BatchedLoRA(config, self.meta["batch"], self.meta["slots"])
        if stored:
            lora.load_state_dict({name: self.files["lora"][name] for name in lora.state_dict()})
        return lora

    def losses(self, lora, looping: bool = True) -> torch.Tensor:
        """Per-token losses [batch, seq]."""
        return self.model.losses(self.input_ids, self.target_ids, looping=looping, lora=lora)

    def objective(self, lora) -> torch.Tensor:
        """Sum over rows of active * mean loss of the row's chunk."""
        mask = self.meta["masked_mean"]
        chunk = slice(mask["chunk_offset"], mask["chunk_offset"] + mask["chunk_len"])
        return (torch.tensor(mask["active"]) * self.losses(lora)[:, chunk].mean(dim=1)).sum()

    @property
    def inactive(self) -> torch.Tensor:
        """Rows that take no part in the objective, as a mask."""
        return torch.tensor(self.meta["masked_mean"]["active"]) == 0

    def stepped(self, steps: int):
        """Adapters after the given number of AdamW steps, gradients recomputed for each."""
        lora = self.adapters()
        optimizer = self.tg.LoRAOptimizer(self.config, lora)
        for _ in range(steps):
            optimizer.step(self.objective(lora))
        return lora


@pytest.fixture(scope="module")
def setup(tg, golden_file) -> Setup:
    """The golden folder, loaded once."""
    return Setup(tg, golden_file)


def assert_stepped(actual: dict, expected: dict, lr: float, steps: int) -> None:
    """Within STEP_ABS for STEP_FRACTION of all elements; the rest (flipped signs) 2 * lr per step."""
    assert all(actual[name].shape == reference.shape for name, reference in expected.items())
    error = torch.cat(
        [(actual[name].double() - ref.double()).abs().flatten() for name, ref in expected.items()]
    )
    assert (error > STEP_ABS).sum().item() <= (1 - STEP_FRACTION) * error.numel()
    assert error.max().item() <= 2 * lr * steps + STEP_ABS


def stored_after(setup, step: int) -> dict[str, torch.Tensor]:
    """Stored adapters after the given optimiser step."""
    prefix, stored = f"after{step}/", setup.files["lora_after_adamw"]
    after = {name.removeprefix(prefix): ref for name, ref in stored.items() if name.startswith(prefix)}
    return some(after, f"{prefix}* in {FOLDER}/lora_after_adamw.safetensors")


def test_sizes(setup):
    tg, meta = setup.tg, setup.meta
    encoder, decoder = tg.layer_order(setup.config, True)
    assert encoder + decoder == meta["slot_to_layer"]
    assert tg.lora_slots(setup.config, True) == meta["slots"]
    shapes = {name: tensor.shape for name, tensor in setup.adapters(stored=False).state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in setup.files["lora"].items()}


@pytest.mark.parametrize("name", OUTPUTS)
def test_losses(setup, name):
    """Every output: all adapters with and without the loop, B at zero, some adapters absent, after a step."""
    expected, name = setup.files["outputs"][name], name.removeprefix("per_token_loss.")
    lora, looping = setup.adapters(), name != "loop_off"
    if absent := re.findall(r"(?:^|_)no_([a-z]+)", name):
        lora = setup.adapters(setup.settings(**{f"ttt_{kind}_lora": False for kind in absent}))
        kinds = {adapter.split(".")[0] for adapter in lora.state_dict()}
        stored_kinds = {adapter.split(".")[0] for adapter in setup.files["lora"]}
        assert kinds == stored_kinds - {f"{kind}_loras" for kind in absent}
    elif name == "zero_B":
        lora.reset_B()
    elif step := re.fullmatch(r"after_step(\d+)", name):
        lora = setup.stepped(int(step[1]))
    elif name not in ("loop_on", "loop_off"):
        pytest.skip(f"no test knows what {name} of {FOLDER}/outputs.safetensors is")
    with torch.no_grad():
        assert_close(setup.losses(lora, looping=looping), expected, VALUES_REL)


def test_losses_with_zero_b_are_the_base_model(setup):
    lora = setup.adapters()
    lora.reset_B()
    expected = setup.files["outputs"]["per_token_loss.zero_B"]
    assert_close(setup.losses(lora), expected, VALUES_REL)
    assert_close(setup.losses(None), expected, VALUES_REL)
    kept = {name: tensor for name, tensor in lora.state_dict().items() if name.endswith(".A")}
    assert all(torch.equal(tensor, setup.files["lora"][name]) for name, tensor in kept.items())


def test_gradients(setup):
    lora = setup.adapters()
    objective = setup.objective(lora)
    objective.backward()
    expected = torch.tensor(setup.meta["scalars"]["objective_before"])
    assert_close(objective, expected, VALUES_REL)
    grads = {f"grad/{name}": parameter.grad for name, parameter in lora.named_parameters()}
    assert grads.keys() == setup.files["lora_grads"].keys()
    for name, reference in setup.files["lora_grads"].items():
        assert_close(grads[name], reference, GRADIENTS_REL)
        assert not grads[name][setup.inactive].any(), name


def test_optimizer_settings(setup):
    """Two steps hardly show beta2, so the settings themselves are compared too."""
    lora, told = setup.adapters(), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup.tg, "adamw", lambda *lists, **settings: told.append((lists, settings)))
        optimizer = setup.tg.LoRAOptimizer(setup.config, lora)
        optimizer.step(setup.objective(lora))
    (((factors, *_), settings),) = told
    assert [factor.data_ptr() for factor in factors] == [p.data_ptr() for p in lora.parameters()]
    actual = settings | {"betas": [settings["beta1"], settings["beta2"]]}
    assert {key: actual[key] for key in setup.meta["adamw"]} == setup.meta["adamw"]
    assert settings["fused"] and not settings["amsgrad"] and not settings["maximize"]


def test_first_adamw_step(setup):
    lora = setup.stepped(1)
    lr, decay = setup.meta["adamw"]["lr"], setup.meta["adamw"]["weight_decay"]
    after, expected = lora.state_dict(), stored_after(setup, 1)
    assert after.keys() == expected.keys()
    assert_stepped(after, expected, lr, steps=1)
    for name, tensor in after.items():
        decayed = setup.files["lora"][name][setup.inactive] * (1 - lr * decay)
        assert torch.allclose(tensor[setup.inactive], decayed, rtol=1e-6, atol=0), name
    with torch.no_grad():
        objective = setup.objective(lora)
    assert_close(objective, torch.tensor(setup.meta["scalars"]["objective_after_step1"]), VALUES_REL)


def test_second_adamw_step(setup):
    lora = setup.stepped(2)
    lr, after = setup.meta["adamw"]["lr"], lora.state_dict()
    assert_stepped(after, stored_after(setup, 2), lr, steps=2)
    assert after.keys() == setup.meta["second_step_digest"].keys()
    for name, expected in setup.meta["second_step_digest"].items():
        actual, count = digest(after[name]), after[name].numel()
        flips = 1 + int((1 - STEP_FRACTION) * count)
        allowed = flips * 4 * lr
        assert actual["shape"] == expected["shape"]
        assert abs(actual["sum"] - expected["sum"]) <= count * STEP_ABS + allowed, name
        assert abs(actual["l2"] - expected["l2"]) <= count**0.5 * STEP_ABS + allowed, name
        assert abs(actual["absmax"] - expected["absmax"]) <= STEP_ABS + 4 * lr, name


def test_initial_draws(setup):
    meta = setup.meta
    generator = torch.Generator().manual_seed(meta["init_seed"])
    lora = setup.tg.BatchedLoRA(setup.config, meta["batch"], meta["slots"], generator)
    state = lora.state_dict()
    assert {name for name in state if name.endswith(".A")} == set(meta["draw_order"])
    for name, expected in meta["init_A_digest"].items():
        assert state[name].flatten()[:3].tolist() == pytest.approx(expected["first3"], rel=1e-6), name
        assert_digest(state[name], expected, DIGEST_REL)
    assert not any(tensor.any() for name, tensor in state.items() if name.endswith(".B"))


def test_draw_order(setup):
    """Each A consumes the generator in the listed order: redrawing that way gives the same numbers."""
    meta = setup.meta
    lora = setup.tg.BatchedLoRA(
        setup.config, meta["batch"], meta["slots"], torch.Generator().manual_seed(meta["init_seed"])
    )
    generator = torch.Generator().manual_seed(meta["init_seed"])
    for name in meta["draw_order"]:
        expected = torch.empty(meta["batch"], meta["rank"], setup.config.model_dim)
        bound = expected.shape[-1] ** -0.5
        expected.uniform_(-bound, bound, generator=generator)
        assert torch.equal(lora.state_dict()[name], expected), name


def test_draws_default_to_the_global_generator(setup):
    meta = setup.meta
    torch.manual_seed(meta["init_seed"])
    lora = setup.tg.BatchedLoRA(setup.config, meta["batch"], meta["slots"])
    name = meta["draw_order"][-1]
    assert_digest(lora.state_dict()[name], meta["init_A_digest"][name], DIGEST_REL)
