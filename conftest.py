"""Eight CPU devices for every test and every example in the documentation."""

import jax

jax.config.update("jax_num_cpu_devices", 8)
