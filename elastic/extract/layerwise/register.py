"""Register the per-layer model with transformers as soon as both it and this package are imported,
in whichever order, without importing transformers for it.

Two steps, each as late as can be. The configuration is registered with AutoConfig when that has
been imported (here); the model, which takes torch and the modelling code, is registered with
AutoModelForCausalLM when the first such configuration is made (in `config`).
"""

import importlib.abc
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

from elastic.extract.layerwise import MODEL_TYPE

AUTO = "transformers.models.auto.configuration_auto"
"""Module of AutoConfig; transformers imports it when an Auto class is used."""

MODELS = "transformers.models.auto.modeling_auto"
"""Module of the models' Auto classes. It imports AUTO, and configurations need it whole."""

PARENT = "transformers.models.nemotron_h.configuration_nemotron_h"
"""Module of the configuration that ours is derived from; it imports AUTO before it is complete."""


def register() -> None:
    """Register the per-layer configuration with AutoConfig; may be called again."""
    from transformers.models.auto.configuration_auto import AutoConfig

    from elastic.extract.layerwise.config import NemotronHElasticConfig

    AutoConfig.register(MODEL_TYPE, NemotronHElasticConfig, exist_ok=True)


def register_on_import() -> None:
    """Register now if AutoConfig is there already, else as soon as it is."""
    if not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        watch = _Watch((AUTO, MODELS, PARENT), _register_or_warn)
        sys.meta_path.insert(0, watch)
        # Looked up after the watch is set, so that no import slips in between.
        if AUTO in sys.modules:
            watch.remove()
            _register_or_warn()


def _register_or_warn() -> None:
    """Register; a failure is a warning, so that the import of transformers does not fail."""
    try:
        register()
    except Exception as error:
        warnings.warn(
            f"elastic: AutoModelForCausalLM will not load checkpoints of model_type {MODEL_TYPE} "
            f"({type(error).__name__}: {error})",
            stacklevel=2,
        )


class _Watch(importlib.abc.MetaPathFinder):
    """Import hook: finds some modules where the other finders do, and calls `then`, once, when the
    first of them has been imported and none of the others is being imported.

    After a failed import the hook stays. importlib's lock per module keeps threads apart: no other
    thread gets the module before the call has returned.
    """

    def __init__(self, names: tuple[str, ...], then: Callable[[], None]) -> None:
        self.names = names
        self.then = then
        self.half_way: set[str] = set()
        self.there: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.names:
            return None
        for finder in list(sys.meta_path):
            find = None if isinstance(finder, _Watch) else getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find(fullname, path, target) if find else None
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Watched(spec.loader, self)
                return spec
        return None

    def execute(self, module: ModuleType, loader: importlib.abc.Loader) -> None:
        """Let its own loader execute a module, and look whether it was the last."""
        name = module.__name__
        self.half_way.add(name)
        try:
            loader.exec_module(module)
            self.there.add(name)
        finally:
            self.half_way.discard(name)
            if self.names[0] in self.there and not self.half_way and self.remove():
                self.then()

    def remove(self) -> bool:
        """Watch no longer; False if that is so already."""
        try:
            sys.meta_path.remove(self)
        except ValueError:
            return False
        return True


class _Watched(importlib.abc.Loader):
    """Wraps a module's loader for `_Watch`; the module itself has the original."""

    def __init__(self, loader: importlib.abc.Loader, watch: _Watch) -> None:
        self.loader = loader
        self.watch = watch

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        self.watch.execute(module, self.loader)
