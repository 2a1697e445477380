"""What needs torch is run by name only."""

collect_ignore = ["parity_interop.py"]
