"""The programs of the native kernels: the same for every JAX, and missed where they should be there."""

import functools
import importlib.util
import pathlib
import warnings

import jax
import jax.numpy as jnp
import pytest

import adamite
from adamite import engines
from adamite.engines.native import cpu as native

ROOT = pathlib.Path(__file__).parents[2]
LIST = ROOT / "tests" / "fixtures" / "native_programs.txt"


def _load(path):
    """A file of a package that need not be installed."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


grid = _load(ROOT / "native" / "src" / "adamite_native" / "grid.py")


@functools.cache
def names():
    """The name of the program of each kind of step, as JAX traces them here."""
    return {str(step): step.program().name for step in grid.steps()}


def test_every_jax_traces_the_same_programs():
    """Else a library that was built with one JAX would not be found by another.

    A rule, a storage or a rounding that was changed changes programs, too. Then write the list anew:
    ``python tests/engines/test_programs.py``.
    """
    assert [f"{name}  {step}" for step, name in names().items()] == LIST.read_text().splitlines()


@pytest.mark.few(40)
@pytest.mark.parametrize("step", grid.steps(), ids=str)
def test_settings_change_no_program(step):
    assert step.program(1).name == names()[str(step)]


class Library:
    """As adamite_native, without any kernels, built with another JAX."""

    step_of = staticmethod(grid.step_of)

    def __init__(self, jax="0.1"):
        self.jax = jax

    def kernels(self):
        return {}

    def built_with(self):
        return {"adamite": "0.0", "jax": self.jax}

    def versions(self):
        return {"adamite": "0.0", "jax": "0.1.2"}

    def handler(self):
        raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: the handler's API version is incompatible")


@pytest.fixture
def use(monkeypatch):
    """Use such a library."""

    def replace(library, refused=""):
        monkeypatch.setattr(native, "library", lambda: library)
        native._warn_if_missing.cache_clear()
        if refused is not None:
            monkeypatch.setattr(native, "_refused", lambda: refused)
        else:
            monkeypatch.setattr(native, "_refused", functools.cache(native._refused.__wrapped__))

    yield replace
    native._warn_if_missing.cache_clear()


def trace(tx, count=1):
    """The engine of each leaf of a jitted step, why it is XLA, and all warnings."""
    one_device = jax.make_mesh((1,), ("here",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(one_device), engines.recorded() as choices, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        params = [jnp.ones((64, 256))] * count
        jax.jit(lambda p, s: tx.step(p, s, p, engine="native")).trace(params, tx.init(params))
    return [choice[1:] for choice in choices], [str(warning.message) for warning in caught]


def test_a_missing_kernel_is_told_once(use):
    use(Library())
    found, said = trace(adamite.adamw(1e-3, weight_decay=0.1, moments="int8"), 2)
    assert found == [("xla", "no kernel of adamite-native does this step")] * 2
    assert len(said) == 1
    assert "adamw, int8 moments, float32 weights, float32 gradients, rounding None" in said[0]
    assert "built with adamite 0.0 and jax 0.1, and here are adamite 0.0 and jax 0.1.2" in said[0]
    assert "pip install --force-reinstall" in said[0]
    assert trace(adamite.adamw(1e-3, weight_decay=0.1, moments="int8"))[1] == []


def test_a_step_that_never_had_a_kernel_is_not_told(use):
    use(Library())
    assert trace(adamite.adamax(1e-3)) == ([("xla", "no kernel of adamite-native does this step")], [])


def test_a_library_of_the_same_versions_has_what_there_is(use):
    use(Library(jax="0.1.2"))
    assert trace(adamite.adamw(1e-3))[1] == []


def test_a_library_that_jax_refuses_is_told_and_not_used(use):
    use(Library(), refused=None)
    found, said = trace(adamite.adam(1e-3), 2)
    why = "adamite-native was built with jax 0.1, which is too new for jax 0.1.2"
    assert found == [("xla", why)] * 2
    assert len(said) == 1
    assert said[0].startswith(f"{why}: XLA takes its steps. To build it anew: pip install")


if __name__ == "__main__":
    LIST.write_text("".join(f"{name}  {step}\n" for step, name in names().items()))
