"""FlashAttention 4 for a GPU machine without a network; and do its kernels take the calls of train_gpt.py?

    python bench/fa4.py --carry carry                # carry/fa4.tar.xz: what Python 3.12, CUDA 13 lack
    python -m tarfile -e carry/fa4.tar.xz /opt       # there; bench/gpu_suite.sh does so by itself
    PYTHONPATH=$(python bench/fa4.py --path /opt/fa4) python bench/fa4.py --compile

`--compile` needs the package, g++ and no GPU: forward and backward are compiled for a pretended H100 on fake
tensors, as a training step, an evaluation and an adaptation call them. Nothing is computed.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import pretended_gpu

PACKAGES = (  # what the GPU machine lacks; einops, protobuf and CUDA's bindings are there
    "flash-attn-4==4.0.0b36",
    "quack-kernels==0.6.5",
    "nvidia-cutlass-dsl==4.8.1",
    "nvidia-cutlass-dsl-libs-base==4.8.1",
    "nvidia-cutlass-dsl-libs-core==4.8.1",
    "nvidia-cutlass-dsl-libs-cu13==4.8.1",
    "apache-tvm-ffi==0.1.15.post2",
    "torch-c-dlpack-ext==0.1.5",
)
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_24_x86_64", "manylinux2014_x86_64", "any")
SIZES = {  # tokens or rows; heads of queries; of keys and values
    "training step": ((98304,), 8, 4),
    "evaluation row": ((65536,), 8, 4),
    "adaptation": ((64, 2048), 8, 4),
    "adaptation, one row": ((1, 96), 8, 4),
}


def path_of(folder: Path) -> str:
    """What belongs on PYTHONPATH: the DSL's packages lie below a folder that only a .pth file names."""
    return f"{folder}:{folder / 'nvidia_cutlass_dsl' / 'dsl_packages'}"


def carry(folder: Path) -> None:
    """Download the wheels and pack what is in them, as small as it gets."""
    target = folder / "fa4.tar.xz"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        words = "-q --no-deps --no-compile --only-binary=:all: --python-version 3.12 --implementation cp"
        pip = [sys.executable, "-m", "pip", "install", *words.split(), "--target", f"{work}/fa4"]
        pip += [word for platform in PLATFORMS for word in ("--platform", platform)]
        subprocess.run([*pip, *PACKAGES], check=True)
        options = ["--exclude=include", "--exclude=iket", "--exclude=*.a", "-C", work, "-c", "fa4"]
        archive = subprocess.Popen(["tar", *options], stdout=subprocess.PIPE)
        with open(f"{work}/packed", "wb") as file:
            command = ["xz", "--x86", "--lzma2=preset=9e,dict=256MiB"]
            subprocess.run(command, stdin=archive.stdout, stdout=file, check=True)
        if archive.wait():
            raise OSError("tar failed")
        os.replace(f"{work}/packed", target)
    print(f"{target}: {target.stat().st_size:,} bytes")


def compile_calls() -> None:
    """Compile both passes of every form of call. Raises Unavailable, or ImportError without the package."""
    os.environ |= {
        "FLASH_ATTENTION_ARCH": "sm_90a",
        "CUTE_DSL_ARCH": "sm_90a",
        "FLASH_ATTENTION_NUM_SMS": "132",
    }
    warnings.simplefilter("ignore", UserWarning)  # of the DSL, at every kernel
    pretended_gpu.load()
    import common  # noqa: F401 - the house is found by it
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from systems.fa4 import _fa4_backward, _fa4_forward

    with pretended_gpu.pretended(), FakeTensorMode():
        for name, (size, heads, groups) in SIZES.items():
            q, k, v = (
                torch.empty(*size, n, 64, dtype=torch.bfloat16, device="cuda")
                for n in (heads, groups, groups)
            )
            cu_seqlens = torch.empty(65, dtype=torch.int32, device="cuda") if len(size) == 1 else None
            segments = cu_seqlens, 2048 if len(size) == 1 else 0
            y, lse = torch.empty_like(q), q.new_empty(*size[:-1], heads, size[-1], dtype=torch.float32)
            started = time.perf_counter()
            _fa4_forward(y, lse, q, k, v, *segments)
            grads = (torch.empty_like(x) for x in (q, k, v))
            _fa4_backward(*grads, q, k, v, y, y, lse, *segments)
            print(f"{name}: forward and backward compiled in {time.perf_counter() - started:.1f} s")


def main() -> None:
    """Pack, compile, or print a path."""
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    wanted = options.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--carry", type=Path, metavar="DIR", help="make DIR/fa4.tar.xz")
    wanted.add_argument("--path", type=Path, metavar="DIR", help="print PYTHONPATH for an unpacked archive")
    wanted.add_argument("--compile", action="store_true", help="compile all calls for an H100")
    args = options.parse_args()
    try:
        if args.compile:
            compile_calls()
        elif args.path:
            print(path_of(args.path))
        else:
            carry(args.carry)
    except (pretended_gpu.Unavailable, ImportError, OSError, subprocess.CalledProcessError) as error:
        print(f"bench/fa4.py: {str(error)[:300]}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
