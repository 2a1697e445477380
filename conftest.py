"""Eight CPU devices for every test and every example in the documentation; and what is compiled is kept.

Many tests compile the same programs, in several processes: they find them in .pytest_cache/jax, as the next run does.
"""

import os
import pathlib

os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parent / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")

import jax

jax.config.update("jax_num_cpu_devices", 8)
