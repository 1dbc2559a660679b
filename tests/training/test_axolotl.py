"""The plugin of axolotl, by axolotl's own base class and manager of plugins.

`make install` installs axolotl without what it depends on: it pins older versions of torchao, PEFT
and transformers than the package needs, and many things that need a GPU. Its room of plugins
imports none of that.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llm_coreml import CoreMLExportCallback
from llm_coreml.errors import ConfigError, LlmCoreMLError
from llm_coreml.eval.gates import Gates
from llm_coreml.training.moments import Moments

base = pytest.importorskip("axolotl.integrations.base", reason="make install brings it")
DictDefault = pytest.importorskip("axolotl.utils.dict").DictDefault

NAME = "llm_coreml.training.axolotl_plugin.CoreMLPlugin"


@pytest.fixture
def manager() -> Any:
    found = base.PluginManager.get_instance()
    found.register(NAME)
    yield found
    found.plugins.pop(NAME)


def callbacks(manager: Any, tmp_path: Path, **coreml: Any) -> list[Any]:
    trainer = SimpleNamespace(args=SimpleNamespace(output_dir=str(tmp_path)))
    cfg = DictDefault({"plugins": [NAME], "output_dir": str(tmp_path)})
    if coreml:
        cfg.coreml = DictDefault(coreml)
    found: list[Any] = manager.add_callbacks_post_trainer(cfg, trainer)
    return found


def test_axolotl_finds_the_plugin_and_its_key(manager: Any) -> None:
    assert isinstance(manager.plugins[NAME], base.BasePlugin)
    [place] = manager.get_input_args()
    module, _, name = place.rpartition(".")
    args = getattr(__import__(module, fromlist=[name]), name)
    assert args(coreml={"when": [5, 10]}).model_dump(exclude_none=True) == {
        "coreml": {"when": [5, 10]}
    }
    with pytest.raises(ValueError, match=r"wehn\n +Extra inputs"):
        args(coreml={"wehn": 5})


def test_the_callback_is_as_the_yaml_says(manager: Any, tmp_path: Path) -> None:
    [plain] = callbacks(manager, tmp_path)
    assert isinstance(plain, CoreMLExportCallback)
    assert plain.best == tmp_path / "coreml" / "best"
    assert plain._exporter._task.config.bits == 4
    [asked] = callbacks(
        manager,
        tmp_path,
        output=str(tmp_path / "elsewhere"),
        when=25,
        best_by="gate",
        gates={"max_kl": 0.1},
        settings={"context": 64},
        bits=3,
        timeout=60,
        blocking=True,
    )
    config = asked._exporter._task.config
    assert (config.bits, config.context) == (3, 64)
    assert asked._moments == Moments(every=25) and asked._best._gates == Gates(max_kl=0.1)
    assert asked.best == tmp_path / "elsewhere" / "best" and asked._blocking
    assert asked._exporter._task.bounds.seconds == 60


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"bitz": 4}, r"coreml in axolotl's configuration is wrong: bitz; *Extra inputs"),
        ({"when": "evalute"}, "Did you mean 'evaluate'"),
        ({"gates": {"max_kl": -1.0}}, "--max-kl is -1"),
        ({"gates": {"max_kll": 1.0}}, "coreml in axolotl's configuration is wrong: .*'max_kll'"),
        ({"settings": {"context": "x"}}, "context"),
    ],
)
def test_what_is_wrong_is_told_before_the_training(
    wrong: dict[str, Any], told: str, manager: Any, tmp_path: Path
) -> None:
    with pytest.raises(LlmCoreMLError, match=told) as raised:
        callbacks(manager, tmp_path, **wrong)
    assert isinstance(raised.value, ConfigError)
