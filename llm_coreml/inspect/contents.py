"""What is inside a bundle or a `.pte`, without running it.

contents(Path("out")).methods["forward"][0].model.ops["linear"]
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llm_coreml.artifact import pte
from llm_coreml.artifact.compatibility import compatibility
from llm_coreml.artifact.method_plan import Constant, Delegate, TensorSpec
from llm_coreml.artifact.mil import Feature, Function, TensorType
from llm_coreml.artifact.packages import BACKEND, Packages
from llm_coreml.bundle.folder import may_be_bundle, open_bundle
from llm_coreml.bundle.manifest import Manifest
from llm_coreml.inspect.broken_rules import BrokenRule, broken_rules

# Positions and the like are int32 and int64.
_WEIGHTS = ("float16", "float32", "int8")


@dataclass(frozen=True)
class ModelContents:
    """A Core ML model, as one delegate runs it.

    Attributes:
        files: Bytes of the files of its package, by path.
        function: The function that runs.
        specification_version: Core ML's version of the model.
        declared: The oldest systems that read the model, `iOS18`; "" if it is newer than is known.
        needed: The oldest systems that have all that it uses.
        inputs: Element type and shapes, by name.
        outputs: The same of what it gives.
        states: The same of what it remembers.
        ops: How many operations of each type the function has, the most frequent first.
    """

    files: Mapping[str, int]
    function: str
    specification_version: int
    declared: str
    needed: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    states: Mapping[str, str]
    ops: Mapping[str, int]


@dataclass(frozen=True)
class DelegateContents:
    """A part of a method that a backend runs.

    Attributes:
        backend: The backend's name.
        bytes: What it is given.
        model: What that is; None for another backend than Core ML, or if it is compiled.
    """

    backend: str
    bytes: int
    model: ModelContents | None

    def to_json(self) -> dict[str, Any]:
        """Return one object of all fields."""
        model = {} if self.model is None else asdict(self.model)
        return {"backend": self.backend, "bytes": self.bytes, **model}


@dataclass(frozen=True)
class Contents:
    """A bundle or a `.pte`.

    Attributes:
        path: Where it is.
        manifest: The bundle's; None of a bare `.pte`.
        bytes: Size of the `.pte`.
        constant_methods: What its constant methods give.
        methods: The delegates of each method that has any.
        rules: What the export passed over by force, or was warned of, by the rule's name.
        weights_outside: Bytes of numbers and codes that methods hold themselves, each once.
    """

    path: str
    manifest: Manifest | None
    bytes: int
    constant_methods: Mapping[str, Constant]
    methods: Mapping[str, tuple[DelegateContents, ...]]
    rules: Mapping[str, BrokenRule]
    weights_outside: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        manifest = {} if self.manifest is None else {"manifest": self.manifest.to_json()}
        rules = {name: asdict(rule) for name, rule in self.rules.items()}
        return {
            "path": self.path,
            **manifest,
            **({"rules": rules} if rules else {}),
            "bytes": self.bytes,
            **({"weights_outside": self.weights_outside} if self.weights_outside else {}),
            "constant_methods": dict(self.constant_methods),
            "methods": {
                name: [delegate.to_json() for delegate in delegates]
                for name, delegates in self.methods.items()
            },
        }


def contents(path: Path, checked: bool = True) -> Contents:
    """Describe the bundle or `.pte` at `path`.

    Args:
        path: Where it is.
        checked: Refuse a bundle whose files have changed since the export wrote them.

    Raises:
        ArtifactError: it is damaged, or neither of the two.
    """
    bundle = open_bundle(path, checked) if may_be_bundle(path) else None
    program = path if bundle is None else bundle.program
    container = pte.read(program)
    packages = Packages(container)
    constants = pte.constants_of(container)
    if bundle is not None and checked:
        bundle.manifest.description.check_constants(constants, program)
    # Who names the program asks for what it says of itself.
    manifest = bundle.manifest if bundle is not None and path.is_dir() else None
    rules = {} if manifest is None else _rules(manifest)
    return Contents(
        path=str(path),
        manifest=manifest,
        bytes=program.stat().st_size,
        constant_methods=constants,
        methods={
            name: tuple(_delegate(delegate, packages) for delegate in method.delegates)
            for name, method in container.methods.items()
            if method.delegates
        },
        rules=rules,
        weights_outside=_weights_outside(container),
    )


def _weights_outside(container: pte.Container) -> int:
    values = (value for method in container.methods.values() for value in method.values)
    held = {
        # Methods share what is equal, as places in the file.
        np.frombuffer(value.data, np.uint8).ctypes.data: len(value.data)
        for value in values
        if isinstance(value, TensorSpec) and value.data and value.dtype in _WEIGHTS
    }
    return sum(held.values())


def _rules(manifest: Manifest) -> dict[str, BrokenRule]:
    plan, states = manifest.quantization.plan, manifest.description.states_by_program
    return broken_rules(manifest.target, plan, states)


def _delegate(delegate: Delegate, packages: Packages) -> DelegateContents:
    readable = delegate.backend == BACKEND and not packages.find(delegate).folder.compiled
    model = _model(delegate, packages) if readable else None
    return DelegateContents(delegate.backend, len(delegate.data), model)


def _model(delegate: Delegate, packages: Packages) -> ModelContents:
    lowered = packages.open(delegate)
    model = lowered.package.model
    asked = compatibility(model)
    function, interface = model.functions[lowered.function], model.interfaces[lowered.function]
    return ModelContents(
        files={name: len(content) for name, content in lowered.package.files.items()},
        function=lowered.function,
        specification_version=model.specification_version,
        declared=asked.declared,
        needed=asked.needed,
        inputs=_shapes(interface.inputs),
        outputs=_shapes(interface.outputs, function),
        states=_shapes(interface.states),
        ops=dict(Counter(op.type for op in function.operations).most_common()),
    )


def _shapes(features: tuple[Feature, ...], function: Function | None = None) -> dict[str, str]:
    """Return type and shapes of each; a model does not describe those of outputs that vary."""
    types = {} if function is None else _output_types(function)
    return {feature.name: _shape(feature, types.get(feature.name)) for feature in features}


def _output_types(function: Function) -> dict[str, TensorType]:
    """Return what a function says of its outputs."""
    made = {output.name: output.type for op in function.operations for output in op.outputs}
    found = {name: made.get(name) for name in function.outputs}
    return {name: kind for name, kind in found.items() if isinstance(kind, TensorType)}


def _shape(feature: Feature, declared: TensorType | None) -> str:
    if not feature.shape and declared is not None:
        return str(declared).replace("[", " [", 1)
    shapes = feature.enumerated or (feature.shape,)
    return f"{feature.dtype} {' or '.join(str(list(shape)) for shape in shapes)}"
