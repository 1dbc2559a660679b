"""Builds the runner in C++ where it is first needed, against the installed ExecuTorch.

path = built_runner()

What is built is kept in the cache folder, under a hash of the sources, of the wheel that they are
linked to, and of the compiler.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

from llm_coreml.drafts import draft_folder
from llm_coreml.errors import ConfigError, OutputError
from llm_coreml.progress import Progress, Silent
from llm_coreml.quantize.cache import default_folder
from llm_coreml.quiet import is_loud

NAME = "llm-coreml-runner"
SOURCES = Path(__file__).parent
# The wheel's targets need it: older ones write its search paths wrongly.
_OLDEST = (3, 28)
_INSTALL = "pip install 'llm-coreml[cpp]'"


def built_runner(progress: Progress | None = None) -> Path:
    """Return the runner, which is built if this machine has none of these sources yet.

    Args:
        progress: Told where it is built.

    Raises:
        ConfigError: there is no CMake of 3.28 or newer, no compiler, or no ExecuTorch to link to;
            or it cannot be built.
        OutputError: the cache folder cannot be written to.
    """
    executorch, compiler = _executorch(), _compiler()
    folder = _folder()
    binary = folder / f"{NAME}-{_key(executorch, compiler)}"
    if binary.is_file():
        return binary
    (progress or Silent()).stage("build")
    cmake = _cmake()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with draft_folder(folder) as draft:
            _build(cmake, executorch, draft)
            (draft / NAME).replace(binary)
    except OSError as error:
        raise OutputError(
            f"The runner cannot be kept in '{folder}': {error.strerror or error}. Give another "
            "folder as $LLM_COREML_CACHE."
        ) from None
    return binary


def _folder() -> Path:
    """Return where runners are kept."""
    try:
        return default_folder()
    except ConfigError:
        raise ConfigError(
            "The runner is kept in your home folder, which is not known; give a folder as "
            "$LLM_COREML_CACHE."
        ) from None


def _key(executorch: Path, compiler: str) -> str:
    """Return a hash of all that the binary follows from."""
    digest = hashlib.sha256()
    for path in sorted([SOURCES / "CMakeLists.txt", *SOURCES.glob("src/*")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    # The binary finds the wheel's libraries by their path.
    version = importlib.metadata.version("executorch")
    digest.update(f"{executorch}\0{version}\0{compiler}\0{platform.platform()}".encode())
    return digest.hexdigest()[:16]


def _executorch() -> Path:
    """Return the folder of the installed ExecuTorch."""
    found = importlib.util.find_spec("executorch")
    for place in (found.submodule_search_locations or ()) if found else ():
        if (Path(place) / "share/cmake/executorch-config.cmake").is_file():
            return Path(place).resolve()
    raise ConfigError(
        "The installed executorch has no headers and libraries to build a runner with; install "
        "1.5 or newer from a wheel."
    )


def _compiler() -> str:
    """Return the C++ compiler that CMake will find."""
    named = os.environ.get("CXX", "").split()
    for name in named[:1] or ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            return path
    wanted = f"$CXX is '{named[0]}', which is not there" if named else "there is none here"
    raise ConfigError(
        f"The runner is built by a C++ compiler, and {wanted}; install one (apt install g++, or "
        "xcode-select --install on macOS)."
    )


def _tool(name: str) -> list[str]:
    """Return where a program is: on the path, and beside Python, where pip puts it."""
    places = (shutil.which(name), shutil.which(name, path=sysconfig.get_path("scripts")))
    return [place for place in places if place]


def _cmake() -> str:
    """Return a CMake that is new enough."""
    versions = []
    for place in _tool("cmake"):
        found = re.search(r"version (\d+)\.(\d+)", _said_by(place, "--version"))
        if found and (int(found[1]), int(found[2])) >= _OLDEST:
            return place
        versions.append(f"{found[1]}.{found[2]}" if found else "broken")
    there = f"the one here is {' or '.join(versions)}" if versions else "there is none here"
    raise ConfigError(
        f"The runner is built by CMake {_OLDEST[0]}.{_OLDEST[1]} or newer, and {there}; "
        f"get it by {_INSTALL}."
    )


def _said_by(*words: str) -> str:
    """Return what a program prints, '' if it cannot be started or prints no text."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except (OSError, UnicodeDecodeError):
        return ""
    return done.stdout


def _build(cmake: str, executorch: Path, folder: Path) -> None:
    """Configure and build in `folder`."""
    settings = {"CMAKE_BUILD_TYPE": "Release", "CMAKE_PREFIX_PATH": str(executorch)}
    generator: tuple[str, ...] = ()
    if ninja := _tool("ninja"):
        settings["CMAKE_MAKE_PROGRAM"], generator = ninja[0], ("-G", "Ninja")
    words = [f"-D{name}={value}" for name, value in settings.items()]
    _call([cmake, "-S", str(SOURCES), "-B", str(folder), *generator, *words])
    _call([cmake, "--build", str(folder), "--parallel", str(os.cpu_count() or 1)])


def _call(command: list[str]) -> None:
    # Where the user asked to hear it, it is heard while it works.
    if is_loud():
        done = subprocess.run(command, check=False, text=True)
        told = ""
    else:
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        told = _complaint(done.stdout + done.stderr)
    if done.returncode != 0:
        raise ConfigError(f"The runner cannot be built{told}; --verbose shows what the tools say.")


def _complaint(output: str) -> str:
    """Return the first line that tells of an error, as ` (...)`; empty if there is none."""
    lines = output.splitlines()
    for at, line in enumerate(lines):
        if re.search(r"\berror\b", line, re.IGNORECASE):
            # CMake says where in its first line, and what in the next one.
            told = " ".join(word.strip() for word in lines[at : at + 3] if word.strip())
            return f" ({told[:300]})"
    return ""
