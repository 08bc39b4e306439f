"""The build hook: compiles the library while kvloom is installed or made into a wheel.

Knows: where hatchling wants the files, and how a wheel with compiled code is named.
Does not know: compilers; `kvloom/ops/native/compile.py` does, and is loaded without its package.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NATIVE = "ops/native"
INSTEAD = "kvloom is installed without its compiled library, and runs slower."


class NativeLibraryHook(BuildHookInterface):
    """Compiles in place for an editable install, and into the wheel otherwise."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and tell hatchling what came of it; called by hatchling before it builds."""
        self.scratch = None if version == "editable" else tempfile.TemporaryDirectory()
        compiling = self._compiling()
        folder = compiling.FOLDER if self.scratch is None else Path(self.scratch.name)
        built = self._compile(compiling, folder)
        if self.scratch is None or not built:
            return
        for path in built:
            build_data["force_include"][str(path)] = f"kvloom/{NATIVE}/lib/{path.name}"
        build_data["pure_python"] = False
        system = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{system}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what was compiled into a wheel; called by hatchling after it has built."""
        if self.scratch is not None:
            self.scratch.cleanup()

    def _compile(self, compiling: ModuleType, folder: Path) -> list[Path]:
        if sys.platform != "linux":
            self.app.display_warning(f"The library is for Linux only. {INSTEAD}")
            return []
        compiler = compiling.find_compiler(os.environ)
        if compiler is None:
            self.app.display_warning(f"No C++ compiler was found. {INSTEAD}")
            return []
        if not compiler.openmp:
            self.app.display_warning("This compiler's OpenMP is not torch's: one thread computes.")
        try:
            levels = compiling.levels_of(platform.machine())
            return list(compiling.compile_library(folder, compiler, levels))
        except compiling.CompileError as error:
            self.app.display_warning(f"The library was not compiled whole.\n{error}")
            return list(error.built)

    def _compiling(self) -> ModuleType:
        path = Path(self.root) / "src" / "kvloom" / NATIVE / "compile.py"
        spec = importlib.util.spec_from_file_location("kvloom_compile", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module
