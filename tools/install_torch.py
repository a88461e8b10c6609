"""Install torch into the Python that runs this file: a CPU build where there is no GPU.

The usual Linux build brings gigabytes of CUDA libraries, which are useless on a machine without a GPU. The CPU builds
carry the label "+cpu" in their version, so asking for the label can never fetch the other kind. They are looked for
on PyTorch's own CPU index, then in the sources that pip is configured for. Needs the standard library only.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata

OLDEST_ACCEPTED = (2, 11)
TESTED_ON_CPU = "2.13.0"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def main() -> int:
    """Return 0 if an accepted torch is installed afterwards."""
    oldest = ".".join(map(str, OLDEST_ACCEPTED))
    installed = _installed_version()
    if installed is not None and tuple(map(int, re.findall(r"\d+", installed)[:2])) >= OLDEST_ACCEPTED:
        _say(f"torch {installed} is already installed")
        return 0
    if platform.system() != "Linux":  # the builds for other systems have no CUDA in them
        return _pip_install(f"torch>={oldest}")
    if _has_gpu():
        _say("nvidia-smi shows a GPU: installing torch with CUDA (several gigabytes)")
        return _pip_install(f"torch>={oldest}")
    _say(f"no GPU: installing the CPU build of torch {TESTED_ON_CPU} (about 200 MB)")
    wanted = f"torch=={TESTED_ON_CPU}+cpu"
    if _pip_install("--index-url", CPU_INDEX, "--retries", "0", "--timeout", "15", wanted) == 0:
        return 0
    _say(f"{CPU_INDEX} did not give it: trying the sources that pip is configured for")
    if _pip_install(wanted) == 0:
        return 0
    _say(
        f"no CPU build of torch {TESTED_ON_CPU} for Python {platform.python_version()} on {platform.machine()} is at "
        f"{CPU_INDEX} or in pip's configured sources. Check the network and run the same command again, or install "
        f"a torch >= {oldest} of your choice first: {sys.executable} -m pip install torch"
    )
    return 1


def _installed_version() -> str | None:
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return None


def _has_gpu() -> bool:
    """Whether nvidia-smi is there and lists at least one GPU (a driver may be installed where no GPU is)."""
    if shutil.which("nvidia-smi") is None:
        return False
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and "GPU " in listed.stdout


def _pip_install(*arguments: str) -> int:
    """pip's output goes straight to the terminal: a download of minutes must not look like a hang."""
    return subprocess.run([sys.executable, "-m", "pip", "install", *arguments], check=False).returncode


def _say(sentence: str) -> None:
    print(f"torch: {sentence}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
