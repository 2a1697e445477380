"""What the native generator may leave out, on operations that no rule has: a shortcut must know its limits."""

from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from adamite.engines import Leaf, LeafStep
from adamite.engines.native.lowering import lower
from adamite.engines.native.program import Equation, Input
from adamite.engines.native.tracing import program
from adamite.numerics import constants


def lowered(given, dtype, *operations):
    """The operations that are left of these, whose results are v0, v1, ...; i0 is an array of the dtype `given`."""
    equations = [Equation(f"v{k}", "element", dtype, *operation) for k, operation in enumerate(operations)]
    last = Input(0, "element", dtype, equations[-1].name)
    dtypes = {"i0": given, **{e.name: e.dtype for e in equations}}
    nodes, _ = lower(SimpleNamespace(equations=equations, outputs=[last], dtypes=dtypes))
    return [node.operation for node in nodes.values()]


@pytest.mark.parametrize(("shift", "left"), [(15, True), (16, False), (17, False)])
def test_an_xor_is_left_out_only_where_none_of_its_bits_is_kept(shift, left):
    found = lowered(
        "uint32",
        "uint32",
        ("shift_right_logical", ("i0", str(shift))),
        ("xor", ("i0", "v0")),
        ("shift_right_logical", ("v1", "16")),
    )
    assert ("xor" in found) == left


@pytest.mark.parametrize(
    ("times", "factor", "halves"),
    [
        (100, 65_535, True),
        (257, 32_767, True),
        (257, 40_000, False),
        (300, 2, False),
        (4, 65_536, False),
        (4, -1, False),
    ],
)
def test_half_a_product_is_of_numbers_that_are_short_enough(times, factor, halves):
    found = lowered(
        "uint8",
        "int32",
        ("convert_element_type", ("i0",)),
        ("mul", ("v0", str(times))),
        ("mul", ("v1", str(factor))),
        ("shift_right_arithmetic", ("v2", "16")),
    )
    assert ("half_product" in found) == halves


def float_bits(x):
    return f"#{int(jnp.float32(x).view(jnp.uint32))}"


@pytest.mark.parametrize(("least", "most", "plain"), [(1e-20, 1.0, True), (1e-35, 1.0, False), (1e-20, 1e31, False)])
def test_a_root_needs_no_care_only_within_limits(least, most, plain):
    found = lowered(
        "float32",
        "float32",
        ("max", ("i0", float_bits(least))),
        ("lt", ("v0", float_bits(most))),
        ("select_n", ("v1", float_bits(most), "v0")),
        ("sqrt", ("v2",)),
    )
    assert found[-1] == ("sqrt_of_normal" if plain else "sqrt")


@pytest.mark.parametrize(("least", "left"), [(1.0, 1), (2.0, 1), (3.0, 2)])
def test_a_number_is_not_limited_to_what_it_is_within(least, left):
    """It is at most 5, and not NaN; and at least 2."""
    five = float_bits(5.0)
    limited = ("max", ("v1", float_bits(2.0))), ("max", ("v2", float_bits(least)))
    found = lowered("float32", "float32", ("lt", ("i0", five)), ("select_n", ("v0", five, "i0")), *limited)
    assert found.count("larger_than") == left


def program_of(setting, constant):
    """The program of ``u = setting g + constant``, of which only the constant belongs to a format."""

    def update(scalars, number, index, g, p, stored):
        u = setting * g
        with constants():
            return u + constant, stored

    leaf = Leaf(0, jnp.ones(256), None, (), jnp.dtype("float32"))
    return program(LeafStep(update, ends_with_weights=False), (), leaf)


def test_a_setting_is_an_operand_and_a_constant_stands_in_the_program():
    base = program_of(0.9, 3.0)
    assert program_of(0.8, 3.0).name == base.name
    assert program_of(0.9, 5.0).name != base.name
    assert base.scalars == ("float32",)
    assert [int(x) for x in base.operands(())] == [int(jnp.float32(0.9).view(jnp.uint32))]
