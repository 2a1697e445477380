"""Writes down what was traced, in a canonical form.

The step of a leaf is written in `jax.numpy`. Traced on a block of elements it is a list of operations; here they are
put in a canonical form, of which the text is hashed. So a kernel that was generated from a step is found again by the
name of its program, and no step is described twice. Canonical means:

1. A float that somebody sets, and every number that is computed outside, is a scalar operand ``$k``, one for each use:
   b1 = 0.9 and b1 = 0.95 are one program, and so are a learning rate and a schedule's. Floats under
   `numerics.constants` are nobody's to set and stand in the program, by their bits: ``#bits``.
2. Operations on scalars alone are not in it but done before (`Program.operands`), except on the leaf's number and the
   place of the block, which differ between leaves and blocks.
3. Nested calls are inlined; what changes no number (reshapes, casts to the same dtype) and what is never used is gone.
4. An array of the state that the step leaves alone is not in it.

A value is of one of three kinds: "scalar", the same everywhere; "block", one for each block; "element".
"""

import functools
import hashlib
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from adamite.engines.native.program import Equation, Input, Program, UnsupportedError
from adamite.numerics import are_constants

FORMAT = "adamite program 2"
"""First line of each text: change it when the meaning of a text changes."""

SAME = frozenset({"copy", "copy_p", "stop_gradient", "reshape", "squeeze", "expand_dims", "broadcast_in_dim"})
"""Operations that move elements of one block to where they are already."""

PARAMETERS = {"integer_pow": "y", "round": "rounding_method", "iota": "dimension"}
"""What else than its arguments an operation depends on; all others depend on nothing."""

FORGETTABLE = frozenset({"sharding", "out_sharding", "accuracy", "weak_type", "new_dtype", "axes", "dtype", "shape"})
"""Parameters that the values' dtypes and kinds say already, or that change no result here."""

OUTSIDE = ("literal", "constant", "outer")
"""Kinds of what is known before a kernel runs."""


def write(tile: Any, closed: ClosedJaxpr, numbers: int) -> Program:
    """The program of a jaxpr whose arguments are so many numbers, the leaf's number, the block's place, the arrays."""
    return _Writer(tile).write(closed, numbers)


class _Value(NamedTuple):
    """What a variable of the jaxpr is: a name in the program, or, outside of it, a literal or a number in `outer`."""

    kind: str  # also "literal", "constant" and "outer"
    dtype: str
    name: Any


class _Writer:
    """Turns a jaxpr into a program: a step of the block of `tile.block` elements, of `tile.arrays`."""

    def __init__(self, tile: Any) -> None:
        self.tile = tile
        self.equations: list[Equation] = []
        self.arguments: dict[str, list[_Value]] = {}  # of each equation
        self.outer_equations: list[Any] = []

    def write(self, closed: ClosedJaxpr, numbers: int) -> Program:
        jaxpr = closed.jaxpr
        values: dict[Any, _Value] = {}
        sources: list[Any] = []
        for var, const in zip(jaxpr.constvars, closed.consts, strict=True):
            if np.shape(const) != ():
                raise UnsupportedError("the step has a constant array in it")
            values[var] = _Value("outer", var.aval.dtype.name, var)
            sources.append(var)
        for var in jaxpr.invars[:numbers]:
            values[var] = _Value("outer", var.aval.dtype.name, var)
            sources.append(var)
        values[jaxpr.invars[numbers]] = _Value("scalar", "uint32", "@number")
        values[jaxpr.invars[numbers + 1]] = _Value("scalar", "uint32", "@base")
        places = jaxpr.invars[numbers + 2 :]
        for place, (var, (kind, dtype)) in enumerate(zip(places, self.tile.arrays, strict=True)):
            values[var] = _Value(kind, dtype, f"i{place}")
        self.run(jaxpr, values)
        return self.finish(closed, values, sources)

    def run(self, jaxpr: Jaxpr, values: dict[Any, _Value], constants: bool = False) -> None:
        for eqn in jaxpr.eqns:
            own = constants or are_constants(eqn)
            arguments = [self.read(x, values, own) for x in eqn.invars]
            inner = _inner(eqn)
            if inner is not None:
                nested = dict(zip(inner.jaxpr.invars, arguments, strict=True))
                for var, const in zip(inner.jaxpr.constvars, inner.consts, strict=True):
                    nested[var] = _literal(const, var.aval)
                self.run(inner.jaxpr, nested, own)
                for var, out in zip(eqn.outvars, inner.jaxpr.outvars, strict=True):
                    values[var] = self.read(out, nested, own)
                continue
            (var,) = eqn.outvars
            values[var] = self.one(eqn, arguments, var.aval)

    def read(self, x: Any, values: dict[Any, _Value], constants: bool = False) -> _Value:
        return _literal(x.val, x.aval, constants) if isinstance(x, Literal) else values[x]

    def one(self, eqn: Any, arguments: list[_Value], aval: Any) -> _Value:
        operation, dtype = eqn.primitive.name, aval.dtype.name
        known = all(x.kind in OUTSIDE for x in arguments) and operation != "iota"
        if operation in SAME and _moves_nothing(aval, self.tile.block) and len(arguments) == 1:
            return arguments[0]._replace(dtype=dtype)
        if operation == "slice" and aval.size == 1 and arguments[0].kind == "element":
            return self.first(arguments[0])
        if operation == "convert_element_type" and dtype == arguments[0].dtype:
            return arguments[0]
        if operation == "integer_pow" and eqn.params["y"] == 1:
            return arguments[0]
        if operation == "convert_element_type" and arguments[0].kind in ("literal", "constant"):
            return _literal(arguments[0].name, aval, arguments[0].kind == "constant")
        if known and aval.shape == ():
            name = ("outer", len(self.outer_equations))
            self.outer_equations.append((eqn, arguments))
            return _Value("outer", dtype, name)
        kind = self.kind(operation, aval)
        if operation in PARAMETERS:
            operation += f":{eqn.params[PARAMETERS[operation]]}"
        elif left := {k: v for k, v in eqn.params.items() if k not in FORGETTABLE and v is not None}:
            raise UnsupportedError(f"no kernel does {operation} with {sorted(left)}")
        return self.add(kind, dtype, operation, arguments)

    def first(self, x: _Value) -> _Value:
        """A value of the block's first element: the same operations again, of it alone."""
        if x.kind != "element":
            return x
        if x.name.startswith("i"):
            raise UnsupportedError("the step reads one element of a block")
        eqn = self.equations[int(x.name[1:])]
        if eqn.operation.startswith("iota"):
            return _literal(0, np.zeros((), eqn.dtype))
        arguments = [self.first(a) for a in self.arguments[x.name]]
        zeros = [a for a in arguments if a.kind == "literal" and a.name == 0]
        if eqn.operation == "add" and len(zeros) == 1:
            return next(a for a in arguments if a is not zeros[0])
        return self.add("scalar", eqn.dtype, eqn.operation, arguments)

    def add(self, kind: str, dtype: str, operation: str, arguments: list[_Value]) -> _Value:
        """The result of one operation more."""
        name = f"v{len(self.equations)}"
        used: Any = tuple(x if x.kind in OUTSIDE else x.name for x in arguments)
        self.equations.append(Equation(name, kind, dtype, operation, used))
        self.arguments[name] = arguments
        return _Value(kind, dtype, name)

    def kind(self, operation: str, aval: Any) -> str:
        if operation.startswith("reduce"):
            return "block"
        if aval.shape == ():
            return "scalar"
        if aval.size == 1:
            return "block"
        if aval.size == self.tile.block:
            return "element"
        raise UnsupportedError(f"no kernel does {operation} to an array of shape {aval.shape}")

    def finish(self, closed: ClosedJaxpr, values: dict[Any, _Value], sources: list[Any]) -> Program:
        inputs = {f"i{place}": (place, kind, dtype) for place, (kind, dtype) in enumerate(self.tile.arrays)}
        outputs = []
        for (place, kind, dtype), var in zip(self.tile.results, closed.jaxpr.outvars, strict=True):
            x = self.read(var, values)
            if x.name == f"i{place}":
                continue
            if x.kind != kind or x.dtype != dtype:
                raise UnsupportedError(f"the step makes a {x.kind} of {x.dtype}, and {kind}s of {dtype} are wanted")
            outputs.append((place, kind, dtype, x.name))
        needed = {name for *_, name in outputs}
        for eqn in reversed(self.equations):
            if eqn.name in needed:
                needed.update(x for x in eqn.arguments if isinstance(x, str))
        return self.canonical(
            [eqn for eqn in self.equations if eqn.name in needed],
            [inputs[name] for name in inputs if name in needed],
            outputs,
            closed,
            sources,
        )

    def canonical(self, equations: Any, inputs: Any, outputs: Any, closed: Any, sources: Any) -> Program:
        names = {f"i{place}": f"i{k}" for k, (place, _, _) in enumerate(inputs)}
        dtypes = {f"i{k}": dtype for k, (_, _, dtype) in enumerate(inputs)} | {"@base": "uint32", "@number": "uint32"}
        operands: list[_Value] = []
        written = []

        def argument(x: Any) -> str:
            if isinstance(x, str):
                return names.get(x, x)
            if x.kind in ("literal", "constant") and not jnp.issubdtype(x.dtype, jnp.inexact):
                return str(int(x.name))
            if x.kind == "constant" and x.dtype == "float32":
                return f"#{int(x.name.view(np.uint32))}"
            operands.append(x)
            dtypes[f"${len(operands) - 1}"] = x.dtype
            return f"${len(operands) - 1}"

        for k, eqn in enumerate(equations):
            arguments = tuple(argument(x) for x in eqn.arguments)
            names[eqn.name] = f"v{k}"
            dtypes[f"v{k}"] = eqn.dtype
            written.append(eqn._replace(name=f"v{k}", arguments=arguments))
        its_inputs = tuple(Input(place, kind, dtype, f"i{k}") for k, (place, kind, dtype) in enumerate(inputs))
        its_outputs = tuple(Input(place, kind, dtype, names[name]) for place, kind, dtype, name in outputs)
        if any(x.kind == "leaf" for x in (*its_inputs, *its_outputs)):
            raise UnsupportedError("the step reads an array of the state that is one number for the whole leaf")
        by_rows = any(x.kind == "block" for x in (*its_inputs, *its_outputs))
        read = {x.place: x.value for x in its_inputs}
        text = "\n".join(
            [
                f"{FORMAT}, block {self.tile.block}",
                *(f"{x.value} = read {x.kind} {x.dtype}" for x in its_inputs),
                *(f"{e.name} = {e.operation} {' '.join(e.arguments)} {e.kind} {e.dtype}" for e in written),
                *(f"write {x.value} over {read.get(x.place, 'nothing')} {x.kind} {x.dtype}" for x in its_outputs),
                "scalars " + " ".join(x.dtype for x in operands),
            ]
        )
        return Program(
            name=hashlib.sha256(text.encode()).hexdigest()[:16],
            text=text,
            equations=tuple(written),
            inputs=its_inputs,
            outputs=its_outputs,
            scalars=tuple(x.dtype for x in operands),
            literals=tuple(None if x.kind == "outer" else x.name for x in operands),
            dtypes=dtypes,
            outer=self.outer_program(closed, sources, [x for x in operands if x.kind == "outer"]),
            block=self.tile.block,
            by_rows=by_rows,
        )

    def outer_program(self, closed: ClosedJaxpr, sources: list[Any], wanted: list[_Value]) -> ClosedJaxpr:
        consts, equations = closed.consts, self.outer_equations

        def compute(*arrays: Any) -> list[Any]:
            given = dict(zip(sources, (*consts, *arrays), strict=True))

            @functools.cache
            def computed(k: int) -> Any:
                eqn, arguments = equations[k]
                return eqn.primitive.bind(*(value(x) for x in arguments), **eqn.params)

            def value(x: _Value) -> Any:
                if x.kind != "outer":
                    return jnp.asarray(x.name, x.dtype)
                return computed(x.name[1]) if isinstance(x.name, tuple) else given[x.name]

            return [value(x) for x in wanted]

        avals = [jax.ShapeDtypeStruct((), v.aval.dtype) for v in sources[len(consts) :]]
        return jax.make_jaxpr(compute)(*avals)


def _literal(x: Any, aval: Any, constant: bool = False) -> _Value:
    if np.shape(x) != ():
        raise UnsupportedError("the step has a constant array in it")
    return _Value("constant" if constant else "literal", aval.dtype.name, np.asarray(x).astype(aval.dtype)[()])


def _inner(eqn: Any) -> ClosedJaxpr | None:
    """The program that an operation is, if it is one."""
    inner = eqn.params.get("jaxpr") or eqn.params.get("call_jaxpr") or eqn.params.get("fun_jaxpr")
    if inner is None:
        return None
    if eqn.primitive.name not in ("jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call"):
        raise UnsupportedError(f"no kernel does {eqn.primitive.name}")
    return inner if isinstance(inner, ClosedJaxpr) else ClosedJaxpr(inner, ())


def _moves_nothing(aval: Any, block: int) -> bool:
    """Whether an array has one element or a whole block along its last axis or its only long one."""
    return math.prod(aval.shape) in (1, block)
