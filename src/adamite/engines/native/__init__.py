"""Compiled steps: the program of a step, printed as C++ for CPUs.

program.py     traces a step on one block of a leaf
writing.py     writes down what was traced, in a canonical form
nodes.py       operations, and what is known of their results
lowering.py    fewer and faster operations in their place
phases.py      in which loop over a block each operation stands, on CPUs
cpp.py         prints C++, when adamite-native is built
cpu.py         calls it
library.py     adamite-native, if that is installed
"""
