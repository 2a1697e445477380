"""Compiled steps: the program of a step, printed as C++ for CPUs and as CUDA C++ for NVIDIA's GPUs.

program.py             what a program is
tracing.py             traces a step on one block of a leaf
writing.py             writes down what was traced, in a canonical form
nodes.py               operations, and what is known of their results
lowering.py            fewer and faster operations in their place
phases.py              in which phase of a step each operation stands

loops.py               in which loop over a block, on CPUs
cpp.py                 prints C++, when adamite-native is built
cpu.py                 calls it

cuda_expressions.py    an operation in CUDA C++
cuda_tables.py         functions of an integer of few values
cuda.py, cuda.cuh      print a kernel, when a step is traced; what stands before each
gpu.py                 calls it

calls.py, rows.py      the arrays of a call; how the rows of a leaf lie
library.py             adamite-native, if that is installed
"""
