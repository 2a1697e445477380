"""Eight CPU devices for every test and every example in the documentation; and nothing is compiled twice.

Many tests compile the same programs. Each process keeps its own for as long as it runs: JAX's cache is not written
atomically, so that a process that shared it could read, or be killed at, half an entry.
"""

import tempfile

import jax

COMPILED = tempfile.TemporaryDirectory(prefix="adamite-tests-")

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", COMPILED.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)


def pytest_unconfigure() -> None:
    """Remove what was compiled."""
    COMPILED.cleanup()
