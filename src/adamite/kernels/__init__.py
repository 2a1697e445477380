"""Steps as programs, and the compiled kernels that run them."""
