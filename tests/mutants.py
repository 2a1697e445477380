"""Break each rule, one constant, operator or name at a time: the golden trajectories must notice. `make mutants`.

A mutant lives if its float64 trajectories equal the paper's for every set of flags and every point of the grid. Those
known to be equivalent are listed in EQUIVALENT with the reason; any other survivor fails the run.
"""

import ast
import copy
import importlib
import inspect
import pathlib
import sys
import types
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

sys.path[:0] = [str(pathlib.Path(__file__).parent), str(pathlib.Path(__file__).parent / "algorithms")]
from test_adam_is_the_paper import test_complex_is_the_paper_with_the_modulus  # noqa: E402 (found by the line above)
from test_golden import GOLDEN, error, ours, paper  # noqa: E402 (the same)

EQUIVALENT: dict[str, str] = {
    "return 1 - power(b1, t), 1 - power(b2, t), (1 - power(b1, optax.safe_increment(t))) if nesterov else 1"
    "   |   1 -> 2": ("the last scalar is read with Nesterov's momentum only"),
    "u = jnp.where(s > 0, jax.lax.rsqrt(s + eps), 0.0) * g   |   0.0 -> 1.0": ("s is 0 only where every g was"),
    "c1_next = (1 - power(b1, optax.safe_increment(t))) if nesterov else 1   |   1 -> 2": "the same",
    "squares = jnp.sum((jnp.abs(g) / jnp.maximum(s, eps)) ** 2)   |   jnp.abs(g) -> g": (
        "real numbers are squared; tests/algorithms/test_stable_adamw.py tells complex ones apart"
    ),
    "r = jnp.sqrt(jnp.where(trusted, square, 1))   |   1 -> 2": "r is read only where it is trusted",
}
"""What a mutant says of itself -> why no golden trajectory can tell it from the original."""

OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult}
COMPARISONS = {ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.Lt: ast.GtE, ast.LtE: ast.Gt}
NAMES = {"b1": "b2", "b2": "b1", "eps": "eps_root", "eps_root": "eps"}
CALLS = {"maximum": "minimum", "minimum": "maximum"}
DROPPED = {"sqrt", "abs", "sign"}
SHARED = {"adamite.numerics": ("update_moment", "_power", "power")}


def changes(node: ast.AST) -> Iterator[ast.AST]:
    """The mutants of one node."""
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        yield ast.BinOp(node.left, OPERATORS[type(node.op)](), node.right)
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
        yield ast.Compare(node.left, [COMPARISONS[type(node.ops[0])]()], node.comparators)
    elif isinstance(node, ast.IfExp):
        yield ast.IfExp(node.test, node.orelse, node.body)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield node.operand
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield ast.Constant(node.value + 1)
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in NAMES:
        yield ast.Name(NAMES[node.id], node.ctx)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        if node.func.attr in CALLS:
            yield ast.Call(ast.Attribute(node.func.value, CALLS[node.func.attr], ast.Load()), node.args, node.keywords)
        elif node.func.attr in DROPPED:
            yield node.args[0]


def functions(tree: ast.Module, names: tuple[str, ...]) -> list[ast.FunctionDef]:
    return [f for f in tree.body if isinstance(f, ast.FunctionDef) and (f.name in names or f.name.endswith("_rule"))]


def mutants(source: str, names: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Each mutant's description and its source."""
    original = ast.parse(source)
    lines = source.splitlines()
    for function, place in enumerate(functions(original, names)):
        known = {arg.arg for arg in [*place.args.args, *place.args.kwonlyargs]}
        nodes = [n for statement in place.body for n in ast.walk(statement)]
        for index, node in enumerate(nodes):
            if isinstance(node, ast.Name) and NAMES.get(node.id) not in known:
                continue
            for new in changes(node):
                tree = copy.deepcopy(original)
                body = [n for statement in functions(tree, names)[function].body for n in ast.walk(statement)]
                old = body[index]
                Replace(old, copy.deepcopy(new)).visit(tree)
                line = lines[node.lineno - 1].strip()
                yield (
                    f"{line}   |   {ast.unparse(node)} -> {ast.unparse(new)}",
                    ast.unparse(ast.fix_missing_locations(tree)),
                )


class Replace(ast.NodeTransformer):
    """Puts one node in another's place."""

    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> Any:
        return self.new if node is self.old else super().visit(node)


def load(name: str, source: str) -> types.ModuleType:
    module = types.ModuleType(name)
    exec(compile(source, f"<mutant of {name}>", "exec"), module.__dict__)
    return module


def lives(specs: list[Any]) -> bool:
    """Whether all trajectories are still the papers', one of complex numbers with them."""
    try:
        test_complex_is_the_paper_with_the_modulus()
    except Exception:
        return False
    for spec in specs:
        for index, flags in enumerate(spec.flags):
            try:
                path = ours(spec, flags, "constant", jnp.float64)
            except Exception:
                return False  # it does not even run
            if not (error(path, paper(spec.name, index, "constant")) < 1e-12).all():
                return False
    return True


def patched(module: types.ModuleType, mutant: types.ModuleType, names: tuple[str, ...]) -> Any:
    """Puts the mutant's functions in the place of the module's, wherever imported; gives back what undoes it."""
    undo = []
    for name in names:
        original = getattr(module, name)
        for other in [m for path, m in sys.modules.items() if path.startswith("adamite")]:
            if getattr(other, name, None) is original:
                undo.append((other, name, original))
                setattr(other, name, getattr(mutant, name))
    return undo


def is_own(value: Any, room: str) -> bool:
    return inspect.isfunction(value) and value.__module__ == room


def main() -> int:
    wanted = sys.argv[1:]
    rooms = sorted({s.make.__module__ for s in GOLDEN if s.make.__module__.startswith("adamite")}) + list(SHARED)
    alive, killed = [], 0
    jax.config.update("jax_enable_x64", True)
    for room in [r for r in rooms if not wanted or r.split(".")[-1] in wanted]:
        module = importlib.import_module(room)
        shared = SHARED.get(room, ())
        name = room.split(".")[-1]
        specs = [s for s in GOLDEN if s.make.__module__ == room or s.name.startswith(name + " ")]
        specs = specs or [s for s in GOLDEN if s.name == "adam"]
        count = 0
        for text, source in mutants(inspect.getsource(module), shared):
            mutant = load(room, source)
            undo = patched(module, mutant, shared or tuple(n for n, f in vars(module).items() if is_own(f, room)))
            own = [s._replace(make=getattr(mutant, s.make.__name__, s.make)) for s in specs]
            if lives(own):
                alive.append(text)
                print(f"  {'equivalent' if text in EQUIVALENT else 'SURVIVES'}: {text}", flush=True)
            for place, name, value in undo:
                setattr(place, name, value)
            count += 1
        killed += count
        print(f"{room}: {count} mutants", flush=True)
    unexplained = [text for text in alive if text not in EQUIVALENT]
    for text in set(alive) & set(EQUIVALENT):
        print(f"equivalent: {text}\n    because {EQUIVALENT[text]}")
    print(f"{killed} mutants, {killed - len(alive)} killed, {len(alive)} equivalent, {len(unexplained)} unexplained")
    return bool(unexplained)


if __name__ == "__main__":
    sys.exit(main())
