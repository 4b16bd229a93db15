"""The tests of vectors on other folders of the same format: names, counts and parts are the folder's.

No name here says what `-k` chooses those tests by: on a foreign folder this file is not run.
"""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from house import ROOT

RENAMED = {  # stem of files -> case: its new name, in JSON and in names of tensors
    "01_model/variants": {"default": "plain", "edge_parallel_start_inside_loop": "comes_back"},
    "03_optim/newton_schulz": {"wide": "flat", "lowrank": "degenerate"},
    "03_optim/muon": {"wide": "flat"},
    "06_data/packing_loader": {"cross": "over_shards"},
    "06_data/shuffled_loader": {"w2_reset": "again"},
    "07_gptq/gate_int8": {"dense": "every_input"},
    "07_gptq/gptq": {"int7": "seven"},
    "07_gptq/lqer": {"a": "first"},
}
DROPPED = {  # file -> parts that it has no more
    "01_model/variants.json": r"rope_yarn|softcap_5",
    "02_ttt_forward/outputs.safetensors": r"per_token_loss\.zero_B",
    "03_optim/muon.safetensors": r"tall\..*",
    "03_optim/newton_schulz.safetensors": r".*\.out_steps3",
    "06_data/packing_loader.json": r"w4|wrap",
    "06_data/ttt_batches.json": "doc_fraction",
    "07_gptq/gptq.json": "tall",
    "07_gptq/lqer.json": "c",
    "08_hessians/hessians.safetensors": r"loop_off/.*|.*\.mlp\.proj\.weight",
    "11_bpb/bpb.safetensors": r"sp8192\..*",
    "11_bpb/tables.json": "plain",
    "12_phased_ttt/lut_noloop.json": "looping_active",
}
MISSING = ["04_ema", "06_data/find_docs.json", "13_train30", "12_phased_ttt/main_lora_A.safetensors"]
MOVED = {
    "01_model/small": "01_model/reused",
    "01_model/main": "01_model/deep",
    "12_phased_ttt/main": "12_phased_ttt/a",
}
LISTED = [  # what is said of them
    "vectors lacks 01_model/main.json, ",
    "no row of 11_bpb/standard_eval.json with an error",
    "02_ttt_forward/outputs.safetensors has no 'per_token_loss.zero_B'",
    "03_optim/muon.safetensors has no 'tall.param0'",
    "03_optim/newton_schulz.safetensors has no *.out_steps*",
    "04_ema/ema.json is not in",
    "06_data/find_docs.json is not in",
    "06_data/ttt_batches.json has no 'doc_fraction'",
    "no loop_off/* in 08_hessians/hessians.safetensors",
    "11_bpb/bpb.safetensors has no sp*.base_bytes",
    "11_bpb/tables.json has no 'plain'",
    "11_bpb/ttt_accounting.json has no edges",
    "12_phased_ttt/a_lora_A.safetensors is not in",
    "12_phased_ttt/lut_noloop.json has no 'looping_active'",
]


def json_file(path, change) -> None:
    """Rewrite a JSON file by a function of what it holds."""
    path.write_text(json.dumps(change(json.loads(path.read_text(encoding="utf-8")))), encoding="utf-8")


def with_names(part, name):
    """JSON with other keys, the last first: `name` gives a key's new name, or None where it goes."""
    if isinstance(part, list):
        return [with_names(item, name) for item in part]
    if not isinstance(part, dict):
        return part
    return {name(key): with_names(part[key], name) for key in reversed(part) if name(key) is not None}


def change_names(path, name) -> None:
    """Other names in a JSON file or a file of tensors."""
    if path.suffix == ".json":
        return json_file(path, lambda part: with_names(part, name))
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    save_file({name(key): tensor for key, tensor in tensors.items() if name(key) is not None}, path)


def fewer_cases_of_caseops(folder) -> None:
    """Every second line, and what the meta file counts."""
    path = folder / "10_caseops/cases.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()[::-2]
    path.write_text("\n".join(lines), encoding="utf-8")
    cases = [json.loads(line) for line in lines]
    counts = {
        "cases": len(cases),
        "cases_sum_equals_utf8_len": sum(case["sum_equals_utf8_len"] for case in cases),
        "cases_token_decode_equals_encoded": sum(c["decoded_tokens"] == c["encoded"] for c in cases),
    }
    json_file(folder / "10_caseops/meta.json", lambda meta: meta | counts)


@pytest.fixture(scope="module")
def variant(golden_dir, tmp_path_factory):
    """The given folder with other names, fewer cases in another order, and parts missing."""
    folder = tmp_path_factory.mktemp("other") / "vectors"
    shutil.copytree(golden_dir, folder, copy_function=shutil.copyfile)
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o700)  # those given may not be written
    for stem, names in RENAMED.items():
        for path in folder.glob(f"{stem}*.*"):
            change_names(
                path, lambda key, names=names: re.sub(r"^[^./]+", lambda m: names.get(m[0], m[0]), key)
            )
    for path, gone in DROPPED.items():
        change_names(folder / path, lambda key, gone=gone: None if re.fullmatch(gone, key) else key)
    for path in MISSING:
        shutil.rmtree(folder / path) if (folder / path).is_dir() else (folder / path).unlink()
    json_file(folder / "05_virtual_layers/virtual_layers.json", lambda cases: cases[::-2])
    json_file(folder / "06_data/cu_seqlens.json", lambda cases: cases[::-1])
    json_file(
        folder / "09_serialization/byte_shuffle.json", lambda file: file | {"compress": file["compress"][1:]}
    )
    json_file(folder / "11_bpb/standard_eval.json", lambda rows: [r for r in rows[::-1] if "error" not in r])
    json_file(folder / "11_bpb/ttt_accounting.json", lambda cases: cases[1:-2:2])
    fewer_cases_of_caseops(folder)
    for old, new in MOVED.items():
        for path in folder.glob(f"{old}*"):
            path.rename(str(path).replace(old, new))
        for path in folder.rglob("*.json"):
            path.write_text(path.read_text(encoding="utf-8").replace(f"{old}_", f"{new}_"), encoding="utf-8")
    return folder


def run_tests(folder, *chosen: str, **environment: str) -> subprocess.CompletedProcess:
    """`pytest -k golden` on a folder of vectors, by another process."""
    command = [sys.executable, "-m", "pytest", "-k", "golden", "-v", "-rs", "-p", "no:cacheprovider", *chosen]
    kept = {name: value for name, value in os.environ.items() if name != "CI"}
    environment = kept | {"GOLDEN_DIR": str(folder)} | environment
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_a_folder_with_other_names_and_parts(variant):
    """Nothing fails, what it has is tested by its own names, what it lacks is listed."""
    done = run_tests(variant, "tests/golden")
    assert done.returncode == 0, done.stdout[-5000:]
    for name in ("degenerate", "flat.rownorm_1", "over_shards", "again", "seven", "first", "comes_back"):
        assert re.search(rf"\[{re.escape(name)}\] PASSED", done.stdout), name
    for stem in ("01_model/deep", "01_model/reused", "12_phased_ttt/a"):
        assert f"{stem}.json" in done.stdout
    assert [said for said in LISTED if said not in done.stdout] == []


@pytest.mark.parametrize("environment", [{}, {"CI": "1"}])
def test_no_folder_at_all(tmp_path, environment):
    """Everything is skipped; in CI it fails."""
    done = run_tests(tmp_path / "none", "tests/golden/test_golden_data.py", **environment)
    told = f"GOLDEN_DIR={tmp_path / 'none'} is not a folder"
    assert told in done.stdout and bool(done.returncode) == bool(environment)
    assert ("SKIPPED" in done.stdout) != bool(environment)
