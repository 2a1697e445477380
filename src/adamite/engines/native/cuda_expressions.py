"""An operation as an expression of CUDA C++.

A float32, bfloat16 or float16 is a float there, a uint32 is unsigned, a bool is a bool, any other integer is an int. A
narrow integer may have any upper bits until its value matters.
"""

import numpy as np

from adamite.engines.native.nodes import Node, Nodes
from adamite.engines.native.program import UnsupportedError

C_TYPES = {"float32": "float", "bfloat16": "float", "float16": "float", "bool": "bool", "uint32": "unsigned"}
"""Those of values; of all other dtypes it is int."""
SIZES = {
    "float32": 4, "int32": 4, "uint32": 4, "bfloat16": 2, "float16": 2, "int16": 2, "uint16": 2, "int8": 1, "uint8": 1,
}  # fmt: skip
"""Bytes of an element in memory."""
NARROW = {"int8": "(int)(signed char)", "uint8": "(int)(unsigned char)", "int16": "(int)(short)"}
NARROW["uint16"] = "(int)(unsigned short)"
SHORT = {"bfloat16": "bf16", "float16": "f16"}
LIMITS = {"int8": (-128, 127), "uint8": (0, 255), "int16": (-32768, 32767), "uint16": (0, 65535)}

FLOAT = {
    "add": "({0} + {1})", "sub": "({0} - {1})", "mul": "({0} * {1})", "div": "__fdiv_rn({0}, {1})", "neg": "(-{0})",
    "integer_pow:2": "({0} * {0})", "square": "({0} * {0})", "integer_pow:3": "(({0} * {0}) * {0})",
    "integer_pow:-1": "__fdiv_rn(1.0f, {0})", "sqrt": "__fsqrt_rn({0})", "sqrt_of_normal": "sqrt_of_normal({0})",
    "rsqrt": "__fdiv_rn(1.0f, __fsqrt_rn({0}))", "abs": "fabsf({0})", "sign": "sign({0})",
    "floor": "floorf({0})", "ceil": "ceilf({0})", "round:0": "roundf({0})", "round:1": "rintf({0})",
    "max": "larger({0}, {1})", "min": "smaller({0}, {1})", "larger_than": "larger({0}, {1})",
    "smaller_than": "smaller({0}, {1})", "smaller_or": "fminf({0}, {1})", "inverse_power": "inverse_power({0})",
    "is already": "{0}", "clamp": "smaller(larger({1}, {0}), {2})",
    "exp": "expf({0})", "exp2": "exp2f({0})", "expm1": "expm1f({0})", "log": "logf({0})", "log1p": "log1pf({0})",
    "tanh": "tanhf({0})", "logistic": "__fdiv_rn(1.0f, 1.0f + expf(-{0}))", "cbrt": "cbrtf({0})",
    "sin": "sinf({0})", "cos": "cosf({0})", "tan": "tanf({0})", "asin": "asinf({0})", "acos": "acosf({0})",
    "atan": "atanf({0})", "atan2": "atan2f({0}, {1})", "sinh": "sinhf({0})", "cosh": "coshf({0})",
    "asinh": "asinhf({0})", "acosh": "acoshf({0})", "atanh": "atanhf({0})", "erf": "erff({0})",
    "pow": "powf({0}, {1})", "rem": "fmodf({0}, {1})",
}  # fmt: skip
INTEGER = {
    "add": "({T})((unsigned){0} + (unsigned){1})", "sub": "({T})((unsigned){0} - (unsigned){1})",
    "mul": "({T})((unsigned){0} * (unsigned){1})", "neg": "({T})(0u - (unsigned){0})", "not": "({T})~{0}",
    "and": "({T})({0} & {1})", "or": "({T})({0} | {1})", "xor": "({T})({0} ^ {1})",
    "shift_left": "({T})((unsigned){0} << {1})", "shift_right_logical": "({T})((unsigned){0} >> {1})",
    "shift_right_arithmetic": "({T})((int){0} >> {1})", "max": "max({0}, {1})", "min": "min({0}, {1})",
    "abs": "abs({0})", "clamp": "min(max({1}, {0}), {2})", "half_product": "({T})((unsigned)({0} * {1}) >> 16)",
    "integer_pow:2": "({T})((unsigned){0} * (unsigned){0})", "square": "({T})((unsigned){0} * (unsigned){0})",
    "population_count": "__popc((unsigned){0})", "clz": "__clz((int){0})",
}  # fmt: skip
BOOL = {"and": "({0} & {1})", "or": "({0} | {1})", "xor": "({0} ^ {1})", "not": "(!{0})", "is_finite": "is_finite({0})"}
COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
EXACT = frozenset({"neg", "abs", "sign", "max", "min", "is already", "larger_than", "smaller_than", "smaller_or"})
"""Operations that make no digits: a result of 16 bits needs no rounding."""


def c_type(dtype: str) -> str:
    """The C type of values of a dtype."""
    return C_TYPES.get(dtype, "int")


def expression(node: Node, nodes: Nodes) -> str:
    """An operation, of values that have their names in the program."""
    types = [nodes[a].dtype if a in nodes else node.types[k] for k, a in enumerate(node.arguments)]
    arguments = [_argument(a, t, node.operation) for a, t in zip(node.arguments, types, strict=True)]
    operation, kind = node.operation, c_type(node.dtype)
    if operation == "iota:0":
        return "i"
    if operation in COMPARE:
        return f"{arguments[0]} {COMPARE[operation]} {arguments[1]}"
    if operation == "select_n" and types[0] == "bool":
        return f"{arguments[0]} ? {arguments[2]} : {arguments[1]}"
    if operation == "truncate":
        return f"to_int({arguments[0]})"
    if operation == "bitcast_convert_type":
        return _with_bits_of(arguments[0], types[0], node.dtype)
    if operation == "convert_element_type":
        return _converted(arguments[0], types[0], node.dtype)
    table = BOOL if node.dtype == "bool" else FLOAT if kind == "float" else INTEGER
    if operation not in table:
        raise UnsupportedError(f"no kernel does {operation} of {types[0] if types else node.dtype}")
    text = table[operation].format(*arguments, T=kind)
    return f"to_{SHORT[node.dtype]}({text})" if node.dtype in SHORT and operation not in EXACT else text


def _converted(x: str, source: str, target: str) -> str:
    if target in SHORT:
        return f"to_{SHORT[target]}({_converted(x, source, 'float32')})"
    if target == "float32":
        return x if c_type(source) == "float" else f"({x} ? 1.0f : 0.0f)" if source == "bool" else f"(float){x}"
    if target == "bool":
        return f"({x} != 0)"
    if c_type(source) == "float":
        if target == "uint32":
            raise UnsupportedError(f"no kernel does convert_element_type of {source} to uint32")
        low, high = LIMITS.get(target, (0, 0))
        return f"min(max(to_int({x}), {low}), {high})" if high else f"to_int({x})"
    return f"({c_type(target)}){x}"


def _with_bits_of(x: str, source: str, target: str) -> str:
    """A value of another dtype with the same bits."""
    if source in SHORT:
        x, source = f"(int){SHORT[source]}_bits({x})", "uint16"
    if target in SHORT:
        return f"__uint_as_float((unsigned){x} << 16)" if target == "bfloat16" else f"from_f16((unsigned){x})"
    kind = {"int": "int", "unsigned": "uint", "float": "float"}
    if c_type(source) == c_type(target) or "float" not in (c_type(source), c_type(target)):
        return f"({c_type(target)}){x}"
    return f"__{kind[c_type(source)]}_as_{kind[c_type(target)]}({x})"


def _argument(name: str, dtype: str, operation: str) -> str:
    if name in ("@base", "@number"):
        return name[1:]
    if name.startswith("$"):
        return "s" + name[1:]
    if name[0] in "iv":
        return f"{NARROW[dtype]}{name}" if dtype in NARROW and name[0] == "v" and operation != "select_n" else name
    return number(name, dtype)


def number(x: str, dtype: str) -> str:
    """A number as it is written, or a float by its bits after "#"."""
    if x.startswith("#"):
        value = np.uint32(int(x[1:])).view(np.float32)
        return f"{float(value).hex()}f" if np.isfinite(value) else f"__uint_as_float({x[1:]}u)"
    if dtype == "bool":
        return "true" if int(x) else "false"
    return f"{int(x) % 2**32}u" if dtype == "uint32" else f"({x})" if int(x) > -(2**31) else "(-2147483647 - 1)"
