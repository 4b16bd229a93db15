"""What a run needs, compared with what is there."""

import contextlib
import math
import os
import re
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from harness import packing
from harness.backends import (
    choose_attention,
    try_compiler,
    try_kernels,
    unused_attention,
)
from harness.effects import another_model, left_open, without_effect
from harness.hashes import NO_HASHES, Hashes
from harness.manifest import check_data
from systems.compiled import one_line
from train_gpt import (
    CONTEST_MICRO_BATCHES,
    KERNELS,
    Backends,
    Config,
    ConfigError,
    DataError,
    Ranks,
    Run,
    RunLog,
    ValidationSet,
    Watch,
    flatten_banks,
    kernel_names,
    lora_slots,
    micro_batches,
    plain_backends,
    scheme_of,
    shard_paths,
)

PEAK_FLOPS = {  # data sheets: dense bf16 FLOP/s with float32 sums; the first name that fits counts
    r"H100 PCIe": 756e12,
    r"H[12]00|GH200": 989e12,
    r"B200|B100": 2250e12,
    r"A100": 312e12,
    r"RTX 4090": 165e12,
    r"L40S": 362e12,
    r"A10\b": 125e12,
}
MOST_CODE = 1 << 16  # bytes: more than any code
PUBLISHED_SHARE = 0.26  # of the peak: the published run on eight H100s (96 ms a step, 143 ms looping)


def peak_flops(ranks: Ranks) -> float:
    """Peak FLOP/s of a rank's device by the data sheet; nan where it is not in the table."""
    name = torch.cuda.get_device_name() if ranks.on_gpu else ""
    return next((peak for pattern, peak in PEAK_FLOPS.items() if re.search(pattern, name)), math.nan)


def flops_per_token(cfg: Config, looping: bool, context: float) -> float:
    """Training FLOPs: 6 a weight that a token passes (head included), 12 D a token that it attends to."""
    matrices = 2 * cfg.model_dim**2 + 2 * cfg.num_kv_heads * cfg.head_dim * cfg.model_dim
    matrices += 2 * cfg.mlp_dim * cfg.model_dim
    layers = lora_slots(cfg, looping)
    linear = 6 * (layers * matrices + cfg.vocab_size * cfg.model_dim)
    return linear + 12 * cfg.model_dim * context * layers


def bank_parameters(cfg: Config) -> int:
    """Weights of banks, embedding and head, all but a thousandth of the model, before it is built."""
    layer = 2 * cfg.model_dim + 2 * cfg.num_kv_heads * cfg.head_dim + 2 * cfg.mlp_dim
    heads = cfg.vocab_size * (2 - cfg.tie_embeddings)
    return cfg.model_dim * (cfg.num_layers * layer + heads)


def adapter_bytes(cfg: Config, documents: int) -> int:
    """Memory of one batch of test-time training's adapters: factors, gradients and two moments, float32.

    With TTT_WARM_START_A there are factors for a full batch, whether there is one or not.
    """
    roles = cfg.ttt_q_lora + cfg.ttt_mlp_lora + cfg.ttt_o_lora
    widths = roles * 2 * cfg.model_dim
    widths += (cfg.ttt_k_lora + cfg.ttt_v_lora) * (cfg.model_dim + cfg.num_kv_heads * cfg.head_dim)
    widths = lora_slots(cfg, looping=True) * widths + cfg.model_dim + cfg.vocab_size
    rows = max(4 * min(cfg.ttt_batch_size, documents), cfg.ttt_batch_size * cfg.ttt_warm_start_a)
    return 4 * widths * cfg.ttt_lora_rank * rows


def free_memory(ranks: Ranks) -> int:
    """Bytes free on the device; on a CPU by the kernel and the container's limit."""
    if ranks.on_gpu:
        return torch.cuda.mem_get_info()[0]
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0]) if os.path.exists("/proc/self/statm") else 0
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    free = [1 << 62, *[limit - pages * resource.getpagesize()] * (limit >= 0)]
    with contextlib.suppress(OSError, TypeError, ValueError):
        text = Path("/proc/meminfo").read_text()
        free.append(1024 * int(re.search(r"MemAvailable:\s*(\d+)", text)[1]))
    with contextlib.suppress(OSError, ValueError):  # "max" where there is no limit
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        free.append(limit - used)
    return min(free)


def check_fit(run: Run) -> None:
    """Raise ConfigError where FIT_BYTES is surely too small, or larger than code and model can be.

    What is a little too small is found after training, by the trials: how small a model gets, only they tell.
    """
    cfg, ranks = run.cfg, run.ranks
    flat = flatten_banks(run.model.state_dict(), cfg.num_layers)
    matrices = [tensor for name, tensor in flat.items() if scheme_of(name, tensor, cfg).kind == "gptq"]
    names = f"FIT_BYTES={cfg.fit_bytes} FLOAT16_MAX_ELEMENTS={cfg.float16_max_elements}"
    if not matrices:
        raise ConfigError(f"{names}: no matrix has more elements, all stay float16: there is nothing to fit")
    least = sum(tensor.numel() for tensor in flat.values()) - sum(matrix.numel() for matrix in matrices)
    if cfg.fit_bytes < least:  # a float16 of a trained model is no less than a byte, however it is packed
        raise ConfigError(f"{names}: must be at least {least}, the numbers that stay float16")
    most = MOST_CODE + sum(2 * tensor.numel() for tensor in flat.values())
    most += sum(2 * sum(matrix.shape) - matrix.numel() for matrix in matrices)
    if cfg.fit_bytes > most:
        text = f"must be at most {most}: code, every matrix in int8, all else in float16"
        raise ConfigError(f"FIT_BYTES={cfg.fit_bytes}: {text}")
    if cfg.fit_bytes < MOST_CODE:  # not kept: the backends may still change
        arguments = cfg, run.backends, run.sources, ranks.on_gpu
        code = len(packing.packed_script(*arguments)[0]) if ranks.is_main else 0
        ranks.wait_for_all("code")
        code = ranks.gather(code)[0]
        if cfg.fit_bytes <= code:
            raise ConfigError(f"FIT_BYTES={cfg.fit_bytes}: must be above {code}, what the code alone takes")


class Preflight(Watch):
    """What a run needs, compared with what is there, before time is spent; its speed, before the clock runs.

    Every check raises ConfigError or DataError in one line, or adds to `facts`, the log line `preflight`.
    """

    def __init__(self, cfg: Config, ranks: Ranks, hashes: Hashes = NO_HASHES):
        self.cfg, self.ranks, self.facts, self.notices = cfg, ranks, {}, []
        self._hashes = hashes
        self.manifest: dict = {}
        self.pace: list[float] = []  # seconds of a step at the end of the warm-up, by layer order
        self._hashing: threading.Thread | None = None
        self._wrong: list[str] = []  # of this rank's training shards
        try:
            os.listdir(cfg.data_folder)
        except FileNotFoundError:  # `check_data` says how to get it
            pass
        except OSError as error:
            raise ConfigError(f"DATA_PATH={cfg.data_folder}: cannot be read ({error.strerror})") from None
        most = 4 * (os.cpu_count() or 1)  # far more than CPUs, and they wait for each other for minutes
        if cfg.cpu_threads > most:
            raise ConfigError(f"CPU_THREADS={cfg.cpu_threads}: must be at most {most} on this machine")
        if ranks.on_gpu:
            self._check_gpu()

    def _check_gpu(self) -> None:
        name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
        self.facts |= {"gpu": name, "gpus": torch.cuda.device_count()}
        self.facts["capability"] = "{}.{}".format(*capability)
        try:
            x = torch.ones(64, 64, device=self.ranks.device, dtype=torch.bfloat16)
            right = float((x @ x).sum()) == 64**3
        except RuntimeError as error:
            right, reason = False, str(error).split("\n")[0][:100]
        else:
            reason = "a product of ones is wrong"
        if not right:
            built = ", ".join(torch.cuda.get_arch_list())
            raise ConfigError(f"DEVICE=cuda: {name} does not compute ({reason}); this torch is for {built}")

    def backends(self) -> Backends:
        """The backends of the run, without those that fail on this machine, which is noted.

        Raises ConfigError where just one that fails was asked for.
        """
        cfg, ranks = self.cfg, self.ranks
        wished = plain_backends(cfg, ranks)
        names, compiler = wished.kernels.split(","), wished.compiler
        chosen = [name for name in names if name in KERNELS]  # those of a GPU; a CPU's are not tried
        wrong = {"compiler": try_compiler(compiler, ranks)} if compiler else {}
        try:
            wrong |= try_kernels(cfg, ranks) if chosen else {}
        except torch.OutOfMemoryError as error:
            raise ConfigError(f"DEVICE=cuda: no memory left for a single layer ({one_line(error)})") from None
        ranks.wait_for_all("backends")
        wrong = {name: text for part in ranks.gather(wrong) for name, text in part.items() if text}
        if text := wrong.get("compiler"):
            if cfg.compile_backend != "auto":
                raise ConfigError(f"COMPILE_BACKEND={cfg.compile_backend}: does not work here ({text})")
            self.notices.append(f"nothing is compiled, which is slow: {text}")
            compiler = ""
        for kernel in [name for name in chosen if name in wrong]:
            if chosen != kernel_names("1"):
                raise ConfigError(f"TRITON_KERNELS={cfg.triton_kernels}: {kernel}: {wrong[kernel]}")
            self.notices.append(f"fused kernel {kernel} is not used: {wrong[kernel]}")
        kernels = ",".join(name for name in names if name not in wrong)
        attention = choose_attention(cfg, ranks, compiler)
        return Backends(attention, kernels, compiler, wished.micro_batches)

    def see(self, kind: str, **facts: object) -> None:
        """Look at each thing as soon as it is known; say what was found once there is a log."""
        run = facts.get("run")
        if kind == "data":
            splits = ["train"] if run.trains or run.cfg.quantize_only else []
            self.manifest = check_data(run.cfg, splits)
        elif kind == "sizes":
            splits = ["train"] if run.trains or run.cfg.quantize_only else []
            if not run.val.target_bytes.any():
                what = "no target has bytes (documents of white space alone?), must be text"
                raise DataError(f"{run.cfg.data_folder}/fineweb_val_*: {what}")
            self.check_hashes(self.manifest, splits, wait=not run.trains)
            self.notices += [*without_effect(run.cfg, run.val), *left_open(run)]
            if not run.cfg.ttt_eval_only:
                self.check_memory(run.cfg, run.backends, run.trains, run.val)
        elif kind == "model":
            self.notices += another_model(self.cfg, run)
            if run.cfg.ttt_eval_only:  # the artifact knows the model's sizes
                self.check_memory(run.model.cfg, run.backends, False, run.val)
            self.check_disk(run.trains, run.val.num_targets)
            if run.cfg.fit_bytes and not (run.cfg.prequant_only or run.cfg.ttt_eval_only):
                check_fit(run)
        elif kind == "warm_up":
            self._time_step(facts["steps_left"], facts["steps"])
        elif kind == "warmed":
            self.wait_for_hashes()
            self.log_speed(run.log, run.backends)
        elif kind == "finished" and facts["stage"] == "train" and run.cfg.num_loops and not run.looping:
            told = "training ended before the loops turned on, so the model is scored without them"
            run.log.event("notice", text=f"{told} (so that others do: ENABLE_LOOPING_AT=1)")

    def report(self, run: Run) -> None:
        """Say in the run's log what was found before there was one."""
        run.log.event("preflight", **self.facts)
        if self.cfg.attention_backend == "auto" and run.ranks.on_gpu:
            self.notices += unused_attention(run.cfg, run.backends, run.ranks)
        for text in self.notices:
            run.log.event("notice", text=text)

    def _time_step(self, left: int, steps: int) -> None:
        """Measure the last ten steps of a warm-up, or half of them."""
        timed = min(10, (steps + 1) // 2)
        if left in (timed, 0):
            self.ranks.synchronize()
        if left == timed:
            self._since = time.perf_counter()
        elif left == 0:
            self.pace.append((time.perf_counter() - self._since) / timed)

    def check_disk(self, trains: bool, targets: int) -> None:
        """Room for all outputs, and whether a file can be written where they go. Rank 0's business."""
        cfg = self.cfg
        if not self.ranks.is_main:
            return
        weights, ended = bank_parameters(cfg), not cfg.prequant_only
        sizes = {"log": 1 << 20, cfg.model_path: 4 * weights * trains, "ledger": 12 * targets * cfg.audit}
        sizes[cfg.quantized_model_path] = weights * ended * (not cfg.ttt_eval_only)
        sizes["checkpoints"] = 3 * 16 * weights * trains * bool(cfg.checkpoint_seconds)
        wanted = Path(cfg.artifact_dir or "runs")
        if not (wanted.name or wanted.resolve().name):
            raise ConfigError(f"ARTIFACT_DIR={wanted}: must name a folder")
        try:
            whole = wanted.absolute()
            place = next(folder for folder in (whole, *whole.parents) if folder.exists())
            with tempfile.TemporaryFile(dir=place):
                room = os.statvfs(place)
        except OSError as error:
            raise ConfigError(f"ARTIFACT_DIR={wanted}: cannot write there ({error.strerror})") from None
        need, free = sum(sizes.values()), room.f_bavail * room.f_frsize
        if free < need:
            parts = ", ".join(f"{name} {size / 1e6:.1f}" for name, size in sizes.items() if size)
            raise ConfigError(f"ARTIFACT_DIR={wanted}: {free / 1e6:.1f} MB are free, needed: {parts} MB")
        self.facts |= {"disk_need_mb": need / 1e6, "disk_free_mb": free / 1e6}

    def check_memory(self, cfg: Config, backends: Backends, trains: bool, val: ValidationSet) -> None:
        """The least that the stages take: what passes may still take more, what does not cannot fit."""
        weights, ranks = bank_parameters(cfg), self.ranks
        row = min(cfg.val_batch_tokens // CONTEST_MICRO_BATCHES, val.num_targets)
        _, micro = micro_batches(cfg, backends, ranks.world_size)
        cuda = ranks.on_gpu
        micro = 0 if cuda else micro  # there `fit_memory` finds what fits
        named = "NUM_LAYERS MODEL_DIM MLP_MULT VOCAB_SIZE"
        needs = {
            f"{named} TRAIN_BATCH_TOKENS": (40 * weights + 8 * micro * cfg.vocab_size) * trains,
            f"{named} VAL_BATCH_TOKENS": 4 * weights + (2 if cuda else 4) * row * cfg.vocab_size,
        }
        if cfg.ttt_enabled and not cfg.ttt_sgd:
            adapters = adapter_bytes(cfg, len(val.documents))
            needs[f"{named} TTT_LORA_RANK TTT_BATCH_SIZE"] = 4 * weights + adapters
            needs["VOCAB_SIZE TTT_CHUNK_SIZE"] = 4 * weights + 4 * cfg.ttt_chunk_size * cfg.vocab_size
        free = free_memory(ranks) // (1 if cuda else ranks.world_size)
        for names, need in needs.items():
            if need > free:
                text = " ".join(f"{name}={getattr(cfg, name.lower())}" for name in names.split())
                raise ConfigError(f"{text}: take {need >> 20} MiB at least, {free >> 20} MiB are free")
        self.facts |= {"memory_need_mb": max(needs.values()) / 1e6, "memory_free_mb": free / 1e6}

    def check_hashes(self, manifest: dict, splits: Sequence[str], wait: bool) -> None:
        """Compare files with the manifest's SHA-256: validation at once, training shards in the background.

        Every rank reads the validation files and its share of the training shards. Raises DataError, or notes
        it in the manifest where ALLOW_UNVERIFIED_DATA=1.
        """
        folder, files = self.cfg.data_folder, manifest.get("files", {})
        hashes = {folder / name: entry.get("sha256") for name, entry in files.items()}
        expected = {path: hashes[path] for path in hashes if isinstance(hashes[path], str)}
        train, *evaluation = (
            [path for path in shard_paths(folder, split) if path in expected]
            for split in ("train", "val", "val_bytes")
        )
        train, val = train if splits else [], sum(evaluation, [])
        self.facts |= {"files": len(hashes), "hashed": len(train) + len(val)}
        mine = train[self.ranks.rank :: self.ranks.world_size]
        self._hashing = threading.Thread(target=self._compare, args=[mine, expected], daemon=True)
        self._compare(val, expected)
        wrong, self._wrong = self._wrong, []
        self._hashing.start()
        if self.cfg.allow_unverified_data:
            wrong = wrong + self.wrong_shards()
            manifest |= {"unverified": wrong[0]} if wrong else {}
        elif wrong:
            raise DataError(wrong[0])
        elif wait:
            self.wait_for_hashes()

    def _compare(self, paths: Sequence[Path], expected: Mapping[Path, str]) -> None:
        """Collect what is wrong."""
        for path in paths:
            try:
                if self._hashes.sha256(path) != expected[path]:
                    manifest = path.with_name("manifest.json")
                    self._wrong.append(f"{path}: its contents differ from the SHA-256 in {manifest}")
            except OSError as error:
                self._wrong.append(f"{path}: cannot be read ({error.strerror})")

    def wrong_shards(self) -> list[str]:
        """What is wrong with the training shards, the same on all ranks; waits until they have been read."""
        if self._hashing is None:
            return []
        self._hashing.join()
        self.ranks.wait_for_all("hashes")
        return sum(self.ranks.gather(self._wrong), [])

    def wait_for_hashes(self) -> None:
        """Raise DataError on all ranks when a training shard is not what the manifest says."""
        wrong = self.wrong_shards()
        if wrong and not self.cfg.allow_unverified_data:
            raise DataError(wrong[0])

    def log_speed(self, log: RunLog, backends: Backends) -> None:
        """Log what a step took in the warm-up and what follows; say where a known GPU is far too slow."""
        cfg, pace = self.cfg, self.pace
        if not pace or (backends.compiler and cfg.warmup_steps < 2):  # the first step compiles
            return
        plain, looping = pace[0], pace[-1]
        share = min(cfg.enable_looping_at, 1.0)
        if cfg.max_wallclock_seconds:
            seconds = cfg.max_wallclock_seconds - cfg.gptq_reserve_seconds
            steps = min(seconds * (share / plain + (1 - share) / looping), cfg.iterations)
            predicted = {"predicted_steps": int(steps)}
        else:
            predicted = {"predicted_seconds": cfg.iterations * (share * plain + (1 - share) * looping)}
        rate = flops_per_token(cfg, False, cfg.train_seq_len / 4) * cfg.train_batch_tokens / plain
        reached = rate / (peak_flops(self.ranks) * self.ranks.world_size)
        known = {} if math.isnan(reached) else {"mfu": reached}
        log.event("speed", step_ms=1e3 * plain, looping_step_ms=1e3 * looping, **predicted, **known)
        if reached < PUBLISHED_SHARE / 2:
            text = f"a step reaches {reached:.1%} of the GPU's peak, the published run {PUBLISHED_SHARE:.0%}"
            log.event("notice", text=f"{text}: another process on it, its clocks, ATTENTION_BACKEND?")
