"""What is inside a bundle or a `.pte`, without running it.

contents(Path("out"))["ops"]["linear"]
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from llm_coreml.artifact import pte
from llm_coreml.artifact.method_plan import Delegate
from llm_coreml.artifact.mil import Feature
from llm_coreml.artifact.packages import BACKEND, Packages
from llm_coreml.bundle.folder import PROGRAM, open_bundle
from llm_coreml.inspect.broken_rules import broken_rules


def contents(path: Path) -> dict[str, Any]:
    """Describe the bundle folder or `.pte` at `path`.

    A bundle that was forced past rules has `rules`, see `broken_rules`.

    Raises:
        ArtifactError: it is damaged, or neither of the two.
    """
    found: dict[str, Any] = {"path": str(path)}
    if path.is_dir():
        found["manifest"] = open_bundle(path).manifest
        if rules := broken_rules(found["manifest"]):
            found["rules"] = rules
        path = path / PROGRAM
    container = pte.read(path)
    found["bytes"] = path.stat().st_size
    found["constant_methods"] = pte.constants_of(container)
    packages = Packages(container)
    found["methods"] = {
        name: [_delegate(delegate, packages) for delegate in method.delegates]
        for name, method in container.methods.items()
        if method.delegates
    }
    return found


def _delegate(delegate: Delegate, packages: Packages) -> dict[str, Any]:
    described: dict[str, Any] = {"backend": delegate.backend, "bytes": len(delegate.data)}
    if delegate.backend != BACKEND:
        return described
    lowered = packages.open(delegate)
    model = lowered.package.model
    function, interface = model.functions[lowered.function], model.interfaces[lowered.function]
    described["files"] = {name: len(content) for name, content in lowered.package.files.items()}
    described["function"] = lowered.function
    described["specification_version"] = model.specification_version
    for kind in ("inputs", "outputs", "states"):
        features = getattr(interface, kind)
        described[kind] = {feature.name: _shape(feature) for feature in features}
    described["ops"] = dict(Counter(op.type for op in function.operations).most_common())
    return described


def _shape(feature: Feature) -> str:
    shapes = feature.enumerated or (feature.shape,)
    return f"{feature.dtype} {' or '.join(str(list(shape)) for shape in shapes)}"
