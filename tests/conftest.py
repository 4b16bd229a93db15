"""Shared fixtures: the script loaded by path, golden vectors, published tokenizers, tiny configurations."""

import atexit
import gc
import importlib.util
import os
import sys
from pathlib import Path

# Read when torch is imported, here and in what tests start: several processes of several threads each, on two
# cores, spend most of their time waiting for each other.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["CONSOLE"] = "log"  # what runs print is read here, in the form that is kept for programs

import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

# An example may take as long as it does: on a busy machine any of them takes longer than hypothesis allows.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")
ROOT = Path(__file__).resolve().parents[1]
SHARES_RUNS = {
    "test_alone", "test_audit", "test_cheats", "test_errors", "test_golden_train30", "test_hopper",
    "test_ppm", "test_prequant", "test_ranks", "test_recompute", "test_rehearse", "test_report",
    "test_resume", "test_smoke", "test_tampering", "test_tilt_audit", "test_two_ranks",
}  # fmt: skip
sys.path.insert(0, str(ROOT))


def pytest_configure(config: pytest.Config) -> None:
    """Load torch where tests run: not in the process that hands them out, for which all others wait."""
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        return
    gc.disable()  # until all tests are found: what is loaded and made for that is no garbage
    import torch

    atexit.register(gc.freeze)  # else Python looks for garbage in all of torch when it ends: 0.5 s
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
        from bench import interpreter

        interpreter.mend()


def pytest_collection_finish() -> None:
    """From here on there is garbage, and none of it in what is there already."""
    gc.freeze()
    gc.enable()


def _outside_folder(variable: str, default: str) -> Path:
    """Folder named by an environment variable; tests that need it skip without it, but never in CI."""
    from golden_tools import outside_folder

    folder = outside_folder(variable, default)
    if not folder.is_dir():
        message = f"{variable}={folder} is not a folder"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    return folder


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Of several processes, one gets all tests of a file that shares long runs; other tests go one by one."""
    from xdist.scheduler import LoadScopeScheduling

    class ByRuns(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if Path(file).stem in SHARES_RUNS else nodeid

    return ByRuns(config, log)


@pytest.fixture(autouse=True)
def forget_graphs() -> None:
    """Each test compiles for itself: torch allows a function only so many graphs in a process."""
    if "torch._dynamo" in sys.modules:
        sys.modules["torch"].compiler.reset()


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Folder of the golden vectors (GOLDEN_DIR, default ../shared/golden)."""
    return _outside_folder("GOLDEN_DIR", "../shared/golden")


@pytest.fixture(scope="session")
def tokenizer_dir() -> Path:
    """Folder of the published tokenizers (TOKENIZER_DIR, default ../shared/tokenizer)."""
    return _outside_folder("TOKENIZER_DIR", "../shared/tokenizer")


@pytest.fixture(scope="session")
def golden_file(golden_dir):
    """Function: path below the golden folder -> parsed JSON, or {name: torch tensor}."""
    from golden_tools import read_golden

    return lambda path: read_golden(golden_dir, path)


@pytest.fixture(scope="session")
def tg():
    """The house: everything of `train_gpt.py`, harness/ and systems/ by name."""
    import torch
    from house import House

    torch.set_num_threads(1)  # the vectors were made on one thread; tests run beside each other
    return House()


@pytest.fixture(scope="module")
def quick_packing(tg):
    """Runs in this process fold no counted code: it takes seconds, and is another test's."""
    import quick_run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tg, "packed_script", quick_run.stub)
        yield


@pytest.fixture
def float64(monkeypatch):
    """AdamW's first steps have the size of the rate whatever the gradient's: rounding decides some signs."""
    import torch

    torch.set_default_dtype(torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def published_logs() -> Path:
    """Folder of the published logs (PUBLISHED_LOGS, default ../shared/published_logs)."""
    return _outside_folder("PUBLISHED_LOGS", "../shared/published_logs")
