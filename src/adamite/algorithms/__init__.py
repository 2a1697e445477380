"""One algorithm a file: its equations, its rule, its ``scale_by_*``, its recipes."""
