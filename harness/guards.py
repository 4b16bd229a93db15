"""What watches over a run and may step in: memory, an artifact that is too large, eager graphs."""

import dataclasses
import hashlib
import importlib.util
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from harness.backends import fit_memory
from harness.manifest import check_command
from harness.preflight import MOST_CODE, Preflight
from harness.settings import show_settings
from systems.compiled import one_line
from train_gpt import (
    CPU,
    LARGEST_HALF,
    SIZE_LIMIT,
    TRAIN_LIMIT,
    Config,
    Ranks,
    Run,
    RunError,
    RunLog,
    UserError,
    Watch,
    factorise_all,
    pack_artifact,
    quantize_state,
)


def command_output(*command: str) -> str:
    """What a command prints; empty where it fails or is not there."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def write_head(run: Run) -> None:
    """What a reader needs to trust a log: settings, sources, hardware, versions, commit and hashes."""
    log, (source, *_), hashes = run.log, run.sources.values(), {}
    log.text(f"{show_settings(run.cfg)}\n{'=' * 80}\n{source.decode(errors='backslashreplace')}\n{'=' * 80}")
    for name, text in list(run.sources.items())[1:]:
        hashes[name] = hashlib.sha256(text).hexdigest()
        log.text(f"==== {name} sha256:{hashes[name]}\n{text.decode(errors='backslashreplace')}")
    hardware = command_output("nvidia-smi" if run.ranks.on_gpu else "lscpu")
    log.text(f"==== end\n{hardware}")
    cpu, manifest = re.search(r"Model name:\s*(.*)", hardware), run.cfg.data_folder / "manifest.json"
    device = torch.cuda.get_device_name() if run.ranks.on_gpu else cpu[1] if cpu else platform.machine()
    folder = str(Path(__file__).resolve().parents[1])
    environment = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": device,
        "threads": torch.get_num_threads(),
        "ranks": run.ranks.world_size,
        **dataclasses.asdict(run.backends),
        "commit": command_output("git", "-C", folder, "rev-parse", "HEAD"),
        "source_sha256": hashlib.sha256(source).hexdigest(),
        "data_sha256": hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest.is_file() else "",
    }
    log.event("start", run=log.run_id, folder=str(log.folder), **environment)
    run.result["environment"] = environment | {"house_sha256": hashes}


class Guard(Watch):
    """Completes the log's head, makes smaller what does not fit, and says what a user should know."""

    def __init__(self, preflight: Preflight):
        self._preflight = preflight

    def see(self, kind: str, **facts: object) -> None:
        """Step in where a run is at a place that is watched."""
        step_in = getattr(self, f"_{kind}", None)
        if step_in:
            step_in(**facts)
        # What the part that ended leaves free between its tensors is no use to the next one (on a CPU).
        if kind == "finished" and (memory := sys.modules.get("systems.memory")):
            memory.trim_heap()

    def _opened(self, run: Run) -> None:
        write_head(run)
        log, manifest, cfg = run.log, self._preflight.manifest, run.cfg
        self._log = log
        if not manifest:
            lacks = f"{cfg.data_folder} has no manifest.json: its split is not verified"
            log.event("notice", text=f"{lacks}; to verify it: {check_command(cfg, manifest)}")
        if unverified := manifest.get("unverified"):
            run.result["unverified_data"] = unverified
            log.event("notice", text=f"unverified data: {unverified}")
        if taken := run.result.get("names_without"):
            log.event("notice", text=f"MODEL_PATH={cfg.model_path}: {', '.join(taken)} taken off its names")
        reserve = cfg.gptq_reserve_seconds
        if run.trains and cfg.max_wallclock_seconds - reserve > TRAIN_LIMIT - 4:
            text = f"GPTQ_RESERVE_SECONDS={reserve:g}: calibration may end too late, PRESET=pr1868 keeps 8"
            log.event("notice", text=text)
        gpus = self._preflight.facts.get("gpus", 0)
        if gpus > run.ranks.world_size:
            start = f"torchrun --standalone --nproc_per_node={gpus} train_gpt.py"
            log.event("notice", text=f"{run.ranks.world_size} of {gpus} GPUs used; all: {start}")
        if importlib.util.find_spec("python_minifier") is None:
            log.event("notice", text="python-minifier is missing: the code will count in full")
        self._preflight.report(run)

    def _result(self, run: Run) -> None:
        """Say why a run that keeps all limits is not legal."""
        if not run.result.get("artifact_bytes"):
            run.log.event("notice", text="legal:False, for there is no artifact (PREQUANT_ONLY=1)")

    def _memory(self, run: Run) -> None:
        """Smaller micro-batches, and a loader for them, where the device's memory asks for them.

        A model that the compiler fails on is trained without it, unless it was asked for.
        """
        if not run.ranks.on_gpu:
            return
        try:
            fitted = fit_memory(run.cfg, run.model, run.ranks)
        except Exception as error:  # compilers raise anything
            asked = run.cfg.compile_backend != "auto" or isinstance(error, (UserError, RunError))
            if asked or not run.backends.compiler:
                raise
            run.log.event("notice", text=f"the model is not compiled, which is slow: {one_line(error)}")
            run.backends = dataclasses.replace(run.backends, compiler="")
            run.result["environment"]["compiler"] = ""
            run.model = run.new_model(run.cfg)
            fitted = fit_memory(run.cfg, run.model, run.ranks)
        if fitted != run.backends:
            text = f"GRAD_ACCUM_STEPS={fitted.micro_batches}: {run.backends.micro_batches} do not fit"
            run.log.event("notice", text=text)
            run.backends = run.model.backends = fitted
            run.result["environment"]["micro_batches"] = fitted.micro_batches
            run.loader = run.new_loader()

    def _warmed(self, run: Run) -> None:
        """Pack the script before the clock starts: after training is too late to find that it fails."""
        if run.ranks.is_main and not run.cfg.prequant_only:
            run.packed_code  # noqa: B018 - kept by the run

    def _finished(self, stage: str, run: Run) -> None:
        """Refuse weights that no scheme can store, before they are quantised: a score may not show them."""
        if stage != "prequant" or run.cfg.prequant_only:
            return
        for name, tensor in run.model.state_dict().items():
            if not tensor.half().isfinite().all():
                told = f"{name} holds values that are not finite, or above {LARGEST_HALF:g}"
                raise RunError(f"{told}: they cannot be stored")

    def _artifact(self, run: Run, flat: Mapping[str, Tensor], hessians: Mapping[str, Tensor]) -> None:
        """An artifact over the limit is made again, smaller."""
        if run.cfg.fit_bytes or len(run.artifact) <= SIZE_LIMIT - MOST_CODE:
            return
        code = len(run.packed_code[0]) if run.ranks.is_main else 0
        budget = SIZE_LIMIT - run.ranks.gather(code)[0]
        if len(run.artifact) > budget:
            with run.clock.stage("fallback"):
                options = {"looping": run.looping, "ranks": run.ranks}
                run.artifact, said = fall_back(
                    flat, hessians, run.cfg, budget, run.artifact, run.log, **options
                )
            run.result |= said

    def _adapting(self, run: Run) -> None:
        """Forms of a batch that no graph fits, so that they run eagerly, are noted."""
        eager = self._eager = set()
        forward = run.model.forward

        def noted(*batch: object, **options: object) -> Tensor:
            if not torch.compiler.is_compiling():  # a graph leaves this out
                eager.add(batch[0].shape)
            return forward(*batch, **options)

        run.model.forward = noted  # a hook would take the graph apart

    def _global_sgd(self, phase: int, tokens: Tensor, grad_norms: Sequence[float], **_: object) -> None:
        """Note each time that adaptation has trained the base weights."""
        self._log.event("ttt_phase", phase=phase, tokens=len(tokens), sgd_steps=len(grad_norms))

    def _adapted(self, run: Run) -> None:
        """Say how many forms ran eagerly."""
        del run.model.forward
        counts = run.ranks.gather(len(self._eager))
        if run.model.backends.compiler:
            run.log.event("graphs", eager_shapes=sum(counts))


FALLBACK = [(1.03, True), *((factor, False) for factor in (1.03, 1.1, 1.25, 1.5, 2.0))]  # clips, LQER


def fall_back(
    flat: Mapping[str, Tensor],
    hessians: Mapping[str, Tensor],
    cfg: Config,
    budget: int,
    artifact: bytes,
    log: RunLog,
    *,
    looping: bool,
    ranks: Ranks = CPU,
) -> tuple[bytes, dict[str, object]]:
    """An artifact of at most `budget` bytes: coarser and coarser steps, then without correction.

    The given one, which is too large, comes back where nothing fits. Returns with it what to say of it.
    """
    log.event("fallback", bytes_left=budget - len(artifact))
    factors = factorise_all(hessians)
    clip_names = [name for name in dataclasses.asdict(cfg) if name.endswith("_clip_sigmas")]
    for factor, lqer in FALLBACK:
        if lqer > cfg.lqer_enabled:
            continue
        clips = {name: factor * getattr(cfg, name) for name in clip_names}
        attempt = dataclasses.replace(cfg, lqer_enabled=lqer, **clips)
        records = quantize_state(flat, factors, attempt, ranks)
        ranks.wait_for_all("fall back")
        smaller = ranks.gather(pack_artifact(records, attempt, looping) if ranks.is_main else b"")[0]
        said = {"clip_factor": factor, "lqer": int(lqer)}
        log.event("fallback", bytes_left=budget - len(smaller), **said)
        if len(smaller) <= budget:
            return smaller, {"fallback": said}
    return artifact, {}
