"""The papers' algorithms in float64 NumPy, written from the papers and independent of `src`."""
