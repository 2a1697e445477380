"""Hypothesis without a clock."""

import hypothesis

collect_ignore = ["parity_torch.py", "fixtures", "kernels/tpu_compiler.py"]  # run by name only

hypothesis.settings.register_profile("adamite", deadline=None, derandomize=True, max_examples=40)
hypothesis.settings.load_profile("adamite")
