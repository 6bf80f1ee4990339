"""How the models' libraries are imported: what is not used of them waits, and the garbage collector with it.

Two thirds of the time that the engine's import took went into packages whose `__init__` imports all that they have,
for the one name that somebody wants, and into collections of garbage that looked in vain through a million new
functions and classes. `import sdxl_lab` calls `install`, which asks Python's import system for two things:

- The packages of `LATE` do not run when they are imported. A name that their `__init__` takes from one module by
  `from .module import name` is imported from that module when it is asked for; anything else runs the package as it
  would have run at first. So every name is there, and is the same object. `importlib.util.LazyLoader` of the standard
  library does this for modules whose names nobody imports with `from`; PEP 810 brings it into the language.
- While a module of `COLLECTED_AFTER` is imported, and all that it imports, no garbage is collected.
"""

import ast
import atexit
import gc
import importlib
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any

# What is imported, by whom, and what it is not used for here. Each only imports: none registers anything.
LATE = {
    "accelerate.commands.config": "accelerate, for one function: it imports boto3 where that is installed",
    "diffusers.hooks": "diffusers' loaders, for one class: offloading and caches of other models",
    "diffusers.models.autoencoders": "diffusers, for AutoencoderKL: forty other autoencoders",
    "diffusers.models.transformers": "the UNet's blocks, for two classes: eighty other models",
    "diffusers.models.unets": "diffusers, for UNet2DConditionModel: ten other UNets",
    "scipy.integrate": "diffusers' schedulers, for the coefficients of LMS",
    "scipy.optimize": "transformers' losses of object detection, for linear_sum_assignment",
    "scipy.stats": "diffusers' schedulers, for sigmas from a beta distribution",
    "transformers.models": "every module of a model: it reads the source of all models, as transformers has done before",
}
COLLECTED_AFTER = ("diffusers", "sdxl_lab", "torch", "transformers")


def install() -> None:
    """Once for a process. It changes nothing for what is imported already."""
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder())
        # The interpreter's last collection goes through everything once more, for seconds. An image was saved long ago.
        atexit.register(gc.freeze)


@contextmanager
def without_collection() -> Iterator[None]:
    """Collect no garbage meanwhile, and take what is there at the end for old: it stays, and younger collections need
    not go through it."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            if not gc.get_freeze_count():  # what somebody else has frozen stays so
                gc.freeze()
                gc.unfreeze()  # into the oldest generation
            gc.enable()


class Finder(MetaPathFinder):
    """Finds what Python's own finder finds, and has it loaded as this module says."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        late = fullname in LATE
        if not late and (fullname.partition(".")[0] not in COLLECTED_AFTER or not gc.isenabled()):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or type(spec.loader) is not SourceFileLoader:
            return spec
        spec.loader = (Late if late else Uncollected)(fullname, spec.loader.path)
        return spec


class Uncollected(SourceFileLoader):
    """Runs a module without collections."""

    def exec_module(self, module: ModuleType) -> None:
        with without_collection():
            super().exec_module(module)


class LatePackage(ModuleType):
    """A package that has not run yet, or that put another module in its place when it ran."""

    def __getattr__(self, name: str) -> Any:
        # Of the names that Python itself looks for everywhere, only this one says what a package has.
        if name.startswith("__") and name != "__all__":
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        assert self.__spec__ is not None and isinstance(self.__spec__.loader, Late)
        return self.__spec__.loader.attribute(self, name)

    def __dir__(self) -> list[str]:
        assert self.__spec__ is not None and isinstance(self.__spec__.loader, Late)
        return dir(self.__spec__.loader.run(self))


class Late(SourceFileLoader):
    """Runs a package when a name is asked for that cannot be had without."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return LatePackage(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        tree = ast.parse(self.get_data(self.path), self.path)
        module.__doc__ = ast.get_docstring(tree, clean=False)
        self._sources = sources(tree)
        self._lock = threading.RLock()  # as `importlib.util.LazyLoader` has it
        self._running = False

    def attribute(self, module: ModuleType, name: str) -> Any:
        """A name's value. Raises `AttributeError`."""
        if name in self._sources and not self._running:
            source, original = self._sources[name]
            value = getattr(importlib.import_module(f"{module.__name__}.{source}"), original)
            vars(module).setdefault(name, value)
            return value
        return getattr(self.run(module), name)

    def run(self, module: ModuleType) -> ModuleType:
        """Run the package as it would have run when it was imported; the module that stands for it then."""
        with self._lock:
            if type(module) is LatePackage and not self._running and sys.modules.get(module.__name__) is module:
                self._running = True
                try:
                    with without_collection():
                        super().exec_module(module)
                finally:
                    self._running = False
                self._replace(module)
        found = sys.modules[module.__name__]
        if found is module and type(module) is LatePackage:  # its own modules, while it runs
            raise AttributeError(f"partially initialized module {module.__name__!r}")
        return found

    def _replace(self, module: ModuleType) -> None:
        found = sys.modules[module.__name__]
        if found is module:
            module.__class__ = ModuleType
        else:
            parent, _, child = module.__name__.rpartition(".")
            setattr(sys.modules[parent], child, found)


def sources(tree: ast.Module) -> dict[str, tuple[str, str]]:
    """Each name that a package takes from one of its modules, and binds nowhere else: the module, the name there."""
    bound: dict[str, tuple[str, str]] = {}
    twice: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(level=1, module=str(module), names=names):
                for alias in names:
                    name = alias.asname or alias.name
                    if bound.setdefault(name, (module, alias.name)) != (module, alias.name):
                        twice.add(name)
            case ast.Name(id=name, ctx=ast.Store() | ast.Del()):
                twice.add(name)
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                twice.add(name)
            case ast.Import(names=names) | ast.ImportFrom(names=names):
                twice.update(alias.asname or alias.name for alias in names)
    return {name: source for name, source in bound.items() if name not in twice and name != "*"}
