"""Building the runner: found tools, clear refusals, and nothing left behind."""

from __future__ import annotations

import shutil
import stat
import sysconfig
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import pytest

from llm_coreml.cpp import cmake_build
from llm_coreml.cpp.cmake_build import built_runner
from llm_coreml.errors import ConfigError, OutputError

try:
    import tomllib
except ModuleNotFoundError:
    import tomli as tomllib  # type: ignore[no-redef, import-not-found, unused-ignore]

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that leaves nothing on the path but the scripts that it is given."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("LLM_COREML_CACHE", str(tmp_path / "cache"))
    # Where pip puts scripts.
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "none"))

    def script(**scripts: str) -> Path:
        for name, text in scripts.items():
            place = folder / name
            place.write_text(f"#!/bin/sh\n{text}\n")
            place.chmod(place.stat().st_mode | stat.S_IXUSR)
        return folder

    return script


def test_what_is_built_is_found_again(cpp_runner: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cmake_build, "_build", None)
    assert built_runner() == cpp_runner
    assert [entry.name for entry in cpp_runner.parent.iterdir()] == [cpp_runner.name]
    # Another compiler, or other sources, make another one.
    keys = {cmake_build._key(Path("/a"), compiler) for compiler in ("/g++", "/g++", "/clang++")}
    assert len(keys) == 2


def test_without_a_compiler(path: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"a C\+\+ compiler, and there is none here; install one"):
        built_runner()
    monkeypatch.setenv("CXX", "/no/such/compiler -O2")
    with pytest.raises(ConfigError, match=r"\$CXX is '/no/such/compiler', which is not there"):
        built_runner()


@pytest.mark.parametrize(
    ("scripts", "told"),
    [
        ({}, "there is none here"),
        ({"cmake": "echo cmake version 3.25.1"}, "the one here is 3.25;"),
        ({"cmake": "echo cmake version 2.30.0"}, "the one here is 2.30;"),
        ({"cmake": "exit 1"}, "the one here is broken;"),
    ],
)
def test_without_a_new_enough_cmake(
    path: Callable[..., Path], scripts: dict[str, str], told: str, tmp_path: Path
) -> None:
    path(**{"c++": "true"}, **scripts)
    with pytest.raises(ConfigError) as refused:
        built_runner()
    assert "built by CMake 3.28 or newer, and " + told in str(refused.value)
    assert "pip install 'llm-coreml[cpp]'" in str(refused.value)


def test_a_cmake_that_cannot_be_started(path: Callable[..., Path]) -> None:
    folder = path(**{"c++": "true", "cmake": "true"})
    (folder / "cmake").write_bytes(b"\x7fELF no program")
    with pytest.raises(ConfigError, match="the one here is broken;"):
        built_runner()


def test_a_cmake_beside_python_is_found(
    path: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = path(cmake="echo cmake version 4.1.0")
    moved = Path(shutil.copytree(folder, tmp_path / "scripts"))
    path(cmake="echo cmake version 3.25.1")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(moved))
    assert cmake_build._cmake() == str(moved / "cmake")


def test_what_cannot_be_built_leaves_nothing_behind(
    path: Callable[..., Path], tmp_path: Path
) -> None:
    says = "echo 'CMake Error at CMakeLists.txt:9:' >&2; echo '  It is broken.' >&2; exit 1"
    path(**{"c++": "true", "cmake": f'case "$1" in --version) echo version 4.0;; *) {says};; esac'})
    with pytest.raises(ConfigError, match=r"cannot be built \(CMake Error .*It is broken\.\); --v"):
        built_runner()
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_that_is_no_folder(path: Callable[..., Path], tmp_path: Path) -> None:
    path(**{"c++": "true", "cmake": "echo cmake version 4.1.0"})
    (tmp_path / "cache").write_text("")
    with pytest.raises(OutputError, match=r"cannot be kept in .*cache.*\$LLM_COREML_CACHE"):
        built_runner()


def test_an_installed_package_holds_all_sources() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = settings["package-data"]["llm_coreml.cpp"]
    files = [path for path in cmake_build.SOURCES.rglob("*") if path.is_file()]
    names = [str(path.relative_to(cmake_build.SOURCES)) for path in files]
    assert len([name for name in names if name.startswith("src/")]) > 10
    for name in names:
        assert name.endswith((".py", ".pyc")) or any(fnmatch(name, each) for each in patterns), name


def test_every_source_is_built_and_short() -> None:
    text = (cmake_build.SOURCES / "CMakeLists.txt").read_text()
    for path in cmake_build.SOURCES.glob("src/*"):
        assert path.suffix == ".h" or f"src/{path.name}\n" in text, path.name
        lines = path.read_text().splitlines()
        assert len(lines) <= 400 and max(map(len, lines)) <= 100, path.name
