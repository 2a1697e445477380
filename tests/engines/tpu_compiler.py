"""Compile steps of the Pallas kernel for a TPU v5e, with none at hand, and print as JSON what came out, a line each."""

import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
from cases import ROUNDINGS, adamw
from hlo_bytes import moved
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from specs import SPECS

STORAGES = {"float32": "float32", "bfloat16": "bfloat16", "int8": "int8", "float8": ("int8", "float8")}
LARGE, SMALL = (16384, 16384), (256, 1024)
WHOLE_LEAF = {"stable_adamw", "adam_mini"}


def cases():
    """Name, optimizer, weights' dtype and shapes."""
    for storage, moments in STORAGES.items():
        for rounding in (None, *ROUNDINGS):
            dtype = jnp.bfloat16 if rounding else jnp.float32
            yield f"{storage}, {rounding}", adamw(moments, rounding), dtype, [LARGE]
    for spec in SPECS:
        if spec.full and spec.name not in WHOLE_LEAF and hasattr(spec.build(), "part"):
            yield spec.name, spec.build(moments="int8"), jnp.float32, [SMALL]
    for shape in [(3, 5, 300), (17, 257), (33, 127), (2, 3, 4, 640), (5, 1, 70), (8192,), (5000,), (7,), ()]:
        yield f"shape {shape}", adamw("int8", "residual8"), jnp.bfloat16, [shape]
    yield "small leaves", adamw("int8"), jnp.float32, [(64,), (3, 40), (7, 9, 130), (4096,)]
    yield "vectors", adamw(), jnp.float32, [(768,)] * 10


def main() -> None:
    """Compile all of them."""
    chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    mesh = Mesh(np.array(chips[:1]), ("chip",), (AxisType.Auto,))
    here = NamedSharding(mesh, PartitionSpec())

    def placed(tree):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), tree)

    for name, tx, dtype, shapes in cases():
        params = placed([jax.ShapeDtypeStruct(shape, dtype) for shape in shapes])
        state, n = placed(jax.eval_shape(tx.init, params)), sum(map(math.prod, shapes))
        step = jax.jit(lambda p, s, g, tx=tx: tx.step(g, s, p, engine="pallas"), donate_argnums=(0, 1))
        try:
            with jax.set_mesh(mesh):
                program = step.lower(params, state, params).compile()
            text = program.as_text()
            figures = {
                "leaves": len(shapes),
                "kernels": text.count('custom_call_target="tpu_custom_call"'),
                "texts": len(set(re.findall(r'"body":"([^"]*)"', text))),
                "moved": moved(text)[0] / n,
                "beside": program.memory_analysis().temp_size_in_bytes / n,
            }
        except Exception as error:
            figures = {"error": f"{type(error).__name__}: {error!s:.500}"}
        print(json.dumps({"case": name, **figures}), flush=True)


if __name__ == "__main__":
    main()
