"""Eight CPU devices for every test, and hypothesis without a clock."""

import hypothesis
import jax

collect_ignore = ["parity_torch.py"]  # by name only: `make parity`

jax.config.update("jax_num_cpu_devices", 8)
hypothesis.settings.register_profile("adamite", deadline=None, derandomize=True, max_examples=40)
hypothesis.settings.load_profile("adamite")
