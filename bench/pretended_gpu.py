"""An H100 that is not there: enough of one for torch to trace and compile for it; nothing can run on it.

    pretended_gpu.load()  # before the first import of torch
    with pretended_gpu.pretended(), FakeTensorMode(): ...

Torch asks in two places. Its C++ side wants hooks and a device guard for CUDA (pretended_gpu.cpp, built here
with g++ against torch's own headers). Its Python side wants the properties that decide which kernels are
generated, and Triton a driver that names its target. Works with the CPU build of torch and, where there is no
GPU, with a CUDA build. Nothing in train_gpt.py knows of this.
"""

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

H100 = SimpleNamespace(  # torch.cuda.get_device_properties of an H100 SXM
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 << 30,
    L2_cache_size=50 << 20,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    gcnArchName="",
    uuid="pretended",
)


def always(value: object) -> Callable:
    """A function that returns this, whatever it is asked."""
    return lambda *_, **__: value


def answers() -> dict[str, object]:
    """What functions of torch.cuda say of it. Of several ranks each has the device of its number."""
    import torch

    rank = int(os.environ.get("LOCAL_RANK", "0"))
    return {
        "is_available": True,
        "is_initialized": False,  # so nobody looks at its random numbers
        "device_count": int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        "current_device": rank,
        "get_device_properties": H100,
        "get_device_capability": (H100.major, H100.minor),
        "get_device_name": H100.name,
        "is_bf16_supported": True,
        "_lazy_init": None,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
        "set_device": None,
        "synchronize": None,
        "_exchange_device": rank,
        "_maybe_exchange_device": rank,
    }


class Unavailable(Exception):
    """This machine cannot pretend; the message says what is missing."""


def _built(sources: Sequence[Path], compiler: str, torch: Path) -> Path:
    """The library made of the sources, which is kept beside what Python itself compiles."""
    text = b"".join(source.read_bytes() for source in sources) + (torch / "version.py").read_bytes()
    target = (
        Path(__file__).parent / "__pycache__" / f"pretended_gpu-{hashlib.sha256(text).hexdigest()[:16]}.so"
    )
    if target.exists():
        return target
    target.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        made = Path(work) / target.name
        command = [compiler, "-std=c++20", "-shared", "-fPIC", f"-I{torch / 'include'}", *sources]
        command += ["-o", made, f"-L{torch / 'lib'}", f"-Wl,-rpath,{torch / 'lib'}", "-lc10", "-ltorch_cpu"]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if done.returncode:
            error = next((line for line in done.stderr.splitlines() if "error" in line), "no message")
            raise Unavailable(f"g++ cannot build {sources[-1].name} ({error})")
        made.replace(target)
    return target


def load(*more: Path) -> None:
    """Build and load the C++ side, with more sources. Before torch is imported: it takes hooks once.

    Raises Unavailable.
    """
    if "torch" in sys.modules:
        raise Unavailable("torch was imported before the pretended GPU")
    found, compiler = importlib.util.find_spec("torch"), shutil.which("g++")
    if not found or not compiler:
        raise Unavailable("needs g++" if found else "needs torch")
    sources = [Path(__file__).with_suffix(".cpp"), *more]
    library = _built(sources, compiler, Path(found.submodule_search_locations[0]))
    try:
        library = ctypes.CDLL(str(library))
    except OSError as error:
        raise Unavailable(f"{sources[-1].name}: {error}") from None
    import torch  # noqa: F401 - a CUDA build registers its own guard now

    library.register_guard()


def _move(module: object, *where: object) -> object:
    """`Module.to` for fake parameters, which cannot be exchanged in place."""
    import torch

    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = torch.nn.Parameter(parameter.detach().to(*where))
    return module


def _on_cpu(function: Callable) -> Callable:
    """The function with its tensors on the CPU: to fold constants, inductor computes them."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    def home(argument: object) -> object:
        return torch.device("cpu") if isinstance(argument, torch.device) else argument

    class OnCPU(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            kwargs = {name: home(value) for name, value in (kwargs or {}).items()}
            return operator(*map(home, args), **kwargs)

    def run(*args: object, **kwargs: object) -> object:
        with OnCPU():
            return function(*args, **kwargs)

    return run


def _attend(q: object, k: object, v: object, mask: object = None, **options: object) -> object:
    """Attention of padded rows by CUDA's kernels: to choose them, torch would ask the device."""
    import torch

    if mask is None and options.get("is_causal"):
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0]
    return torch.ops.aten._scaled_dot_product_attention_math(q, k, v, mask, **options)[0]


class TritonDriver:
    """What Triton and inductor ask of the driver of the pretended GPU."""

    def get_current_target(self) -> object:
        """The architecture to compile for."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 10 * H100.major + H100.minor, H100.warp_size)

    def get_current_device(self) -> int:
        """The only one."""
        return 0


@contextlib.contextmanager
def pretended() -> Iterator[None]:
    """Within the block the Python side of torch sees an H100 too. `load` comes first."""
    import torch
    import triton
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.fx_passes.joint_graph import UniformValueConstantFolder
    from torch._subclasses import fake_tensor

    interface = {"is_available": True, "get_compute_capability": 10 * H100.major + H100.minor}
    with contextlib.ExitStack() as stack:
        for name, value in answers().items():
            stack.enter_context(mock.patch.object(torch.cuda, name, always(value)))
        for name, value in interface.items():
            stack.enter_context(mock.patch.object(CudaInterface, name, staticmethod(always(value))))
        for place in (CudaInterface, CudaInterface.Worker):
            properties = staticmethod(always(H100))
            stack.enter_context(mock.patch.object(place, "get_device_properties", properties))
        stack.enter_context(mock.patch.object(torch.nn.Module, "to", _move))
        stack.enter_context(mock.patch.object(torch.Tensor, "pin_memory", lambda tensor: tensor))
        functional = torch.nn.functional
        stack.enter_context(mock.patch.object(functional, "scaled_dot_product_attention", _attend))
        folded = _on_cpu(UniformValueConstantFolder.run)
        stack.enter_context(mock.patch.object(UniformValueConstantFolder, "run", folded))
        # Fake tensors are to stay fake: else an empty tensor is put onto the GPU to wake it.
        stack.enter_context(mock.patch.object(fake_tensor, "init_gpu_context", always(None)))
        stack.enter_context(mock.patch.object(fake_tensor.FakeTensorMode, "avoid_device_init", True))
        stack.enter_context(mock.patch.object(triton.runtime.driver, "_active", TritonDriver()))
        yield
