"""Run train_gpt.py, or what uses it, as if here were an H100: all that asks for CUDA, computed by the CPU.

    DEVICE=cuda ATTENTION_BACKEND=plain COMPILE_BACKEND=off PRESET=demo python bench/rehearse.py
    ... python bench/rehearse.py bench/train_step.py --device cuda     # or another script that uses it

Tensors on `cuda` are CUDA's to torch (dispatch, autocast, types, no mixed devices) and lie in the
CPU's memory; operators run the CPU's kernels (rehearse.cpp, built here with g++), Triton kernels Triton's
interpreter. It finds what a CPU run cannot: mixed devices and types, branches for CUDA. It says nothing of
speed, of memory, of streams, or of what real kernels round.
"""

import contextlib
import os
import runpy
import sys
from pathlib import Path
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
import pretended_gpu  # noqa: E402


class Event:
    """Stands in for torch.cuda.Event: everything has happened when a call returns."""

    def __init__(self, enable_timing: bool = False):
        """The flag is for real ones."""

    def record(self) -> None:
        """Nothing is under way."""

    def synchronize(self) -> None:
        """Nothing is under way."""

    def elapsed_time(self, _: "Event") -> float:
        """No time is measured."""
        return 0.0


def main() -> int:
    """Run the script with its arguments; returns its exit code."""
    pretended_gpu.load(Path(__file__).with_suffix(".cpp"))
    import interpreter
    import torch

    interpreter.mend()
    memory = {"mem_get_info": (70 << 30, 80 << 30), "max_memory_allocated": 0, "empty_cache": None}
    answers = pretended_gpu.answers() | memory | {"reset_peak_memory_stats": None}
    with contextlib.ExitStack() as stack:
        for name, value in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, pretended_gpu.always(value)))
        stack.enter_context(mock.patch.object(torch.cuda, "Event", Event))
        stack.enter_context(mock.patch.object(torch.Tensor, "pin_memory", lambda tensor: tensor))
        join = torch.distributed.init_process_group
        gloo = lambda _, **options: join("cpu:gloo,cuda:gloo", **options)  # noqa: E731
        stack.enter_context(mock.patch.object(torch.distributed, "init_process_group", gloo))
        profile, activities = torch.profiler.profile, [torch.profiler.ProfilerActivity.CPU]
        on_cpu = lambda **_: profile(activities=activities)  # noqa: E731
        stack.enter_context(mock.patch.object(torch.profiler, "profile", on_cpu))
        import train_gpt

        if len(sys.argv) == 1:
            return train_gpt.main([], os.environ)
        sys.argv = sys.argv[1:]
        runpy.run_path(sys.argv[0], run_name="__main__")
        return 0


if __name__ == "__main__":
    sys.exit(main())
