"""A base in a GGUF file is dequantised once per node into a folder, which everything else loads like any other base.

Two folders lie in the node's cache, both named by the file's content: `description` (configuration and tokenizer,
enough to validate and to count) and one per dtype with the weights as well. The cache can be deleted at any time.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from pipelines.config.paths import is_gguf
from pipelines.config.sections import BaseModelConfig
from pipelines.data.node_cache import cache_folder, node_lock, published
from pipelines.errors import ConfigError, Problem, Unavailable
from pipelines.runs.identity import file_digest

BAD_FILE = 3  # exit code of the process that converts
FORMAT = 1  # of the folders; count up when they are written in another way
EXTRA = "pip install 'curlora[gguf]'"
PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)


def described(base: BaseModelConfig) -> BaseModelConfig:
    """The base with the path of a folder that holds its configuration and tokenizer; itself unless it is a GGUF file.

    Raises:
        ConfigError: there is no such file, the extra is not installed, or Transformers cannot read the file.
    """
    return _at(base, _description(Path(base.path))) if is_gguf(base.path) else base


def converted(base: BaseModelConfig) -> BaseModelConfig:
    """The base with the path of a folder that holds its dequantised weights in `base.dtype` as well.

    Raises:
        ConfigError: as `described`, or the file lacks weights.
        Unavailable: there is not enough memory or disk.
    """
    if not is_gguf(base.path):
        return base
    file = Path(base.path)
    described_in = _description(file)
    target = described_in.with_name(base.dtype)
    with node_lock(str(target)):
        if not target.exists():
            with published(target) as folder:
                shutil.copytree(described_in, folder)
                _convert(file, folder, base.dtype)
    return _at(base, target)


def _convert(file: Path, folder: Path, dtype: str) -> None:
    """`write_weights` in a process of its own: in a worker, Transformers saves on rank 0 alone, and this node may have
    none; nothing is partitioned there, and the memory is given back."""
    command = [sys.executable, "-m", __name__, str(file), str(folder), dtype]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TQDM_DISABLE": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode == BAD_FILE:
        raise _problem(file, done.stdout.strip())
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"its process ended with {done.returncode}"])[-1]
        raise Unavailable(f"'{file}' could not be dequantised ({last}); check memory and the disk of {folder.parent}")


def _at(base: BaseModelConfig, folder: Path) -> BaseModelConfig:
    return base.model_copy(update={"path": str(folder), "revision": None})


def _description(file: Path) -> Path:
    if not file.is_file():
        raise _problem(file, "no such file; check the path")
    if PART.search(file.name):
        raise _problem(file, "is one part of a split file; join the parts with llama-gguf-split --merge")
    stat = file.stat()
    target = cache_folder("gguf") / _key(str(file), stat.st_size, stat.st_mtime_ns) / "description"
    with node_lock(str(target)):
        if not target.exists():
            with published(target) as folder:
                write_description(file, folder)
    return target


@functools.lru_cache
def _key(file: str, size: int, modified: int) -> str:
    """Name of a file's folder: by its content, and by the library that reads it. Size and time end what is kept."""
    return f"{file_digest(Path(file))[:32]}-{FORMAT}-{importlib.metadata.version('transformers')}"


def write_description(file: Path, folder: Path) -> None:
    """Write configuration and tokenizer of a GGUF file into `folder`.

    Raises:
        ConfigError: the extra is not installed, or Transformers cannot read the file.
    """
    if importlib.util.find_spec("gguf") is None:
        raise _problem(file, f"reading a GGUF file needs the package gguf; {EXTRA} on every node")
    import gguf  # an extra
    import transformers  # slow

    try:
        reader = gguf.GGUFReader(file)
        config = transformers.AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        _check_positions(file, reader, config)
        tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except ConfigError:
        raise
    except (ValueError, KeyError, IndexError, OSError, NotImplementedError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise _problem(
            file, f"cannot be read ({reason}); name a folder with the model's safetensors instead"
        ) from error
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _check_positions(file: Path, reader, config) -> None:
    """Transformers reads no scaling of rotary positions from a GGUF file; the model would compute something else."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        return
    scaling = [name for name in reader.fields if name.endswith(".rope.scaling.type")]
    types = {reader.fields[name].contents() for name in scaling} - {"none"}
    factors = [tensor.name for tensor in reader.tensors if tensor.name.startswith("rope_f")]
    if types or factors:
        found = ", ".join([*sorted(types), *factors])
        reason = f"scales its rotary positions ({found}), which Transformers does not read from a GGUF file"
        raise _problem(file, f"{reason}; name a folder with the model's safetensors instead")


def write_weights(file: Path, folder: Path, dtype: str) -> int:
    """Write the dequantised weights into a folder that holds the description; returns the number of parameters.

    Raises:
        ConfigError: the file lacks weights of its own architecture.
    """
    import torch  # slow
    import transformers  # slow

    transformers.utils.logging.disable_progress_bar()
    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        dtype=getattr(torch, dtype),
        quantization_config=transformers.GgufConfig(dequantize=True),  # a model like any other, which can be saved
        output_loading_info=True,
    )
    if missing := sorted(found["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise _problem(file, f"lacks weights ({missing[0]}{more}); use a complete file")
    model.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", weights)  # safetensors lets nobody else on the node read them
    return sum(parameter.numel() for parameter in model.parameters())


def _problem(file: Path, message: str) -> ConfigError:
    return ConfigError([Problem("base_model.path", f"'{file}': {message}")])


if __name__ == "__main__":
    try:
        write_weights(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
    except ConfigError as error:
        print(error.problems[0].message.removeprefix(f"'{sys.argv[1]}': "))
        sys.exit(BAD_FILE)
