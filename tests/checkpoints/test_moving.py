"""A run that goes on elsewhere: another rounding, another mesh, parameters more or fewer, or weights only."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import adamite
from adamite.checkpoint import RefusedError, restore, save
from adamite.sharding import offload, zero1
from bits import assert_same_bits

BFLOAT16 = jnp.bfloat16
ROUNDINGS = [None, "nearest", "stochastic", "residual8", "residual16"]
MOVES = [
    (None, "residual8"), ("residual8", None), ("residual8", "residual16"), ("residual16", "residual8"),
    ("stochastic", "residual8"), (None, "residual16"), ("residual16", None), (None, "stochastic"),
    ("residual8", "stochastic"), ("stochastic", "nearest"), (None, "nearest"), ("nearest", None),
]  # fmt: skip


def draw(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return {"w": jnp.asarray(rng.standard_normal((64, 256)), dtype), "b": jnp.asarray(rng.standard_normal(8), dtype)}


def make(rounding, **options):
    return adamite.adamw(1e-2, rounding=rounding, **options)


def dtype_of(rounding):
    return BFLOAT16 if rounding else jnp.float32


def train(tx, params, steps=2):
    state, update = tx.init(params), jax.jit(tx.update)
    for seed in range(steps):
        g = jax.tree.map(lambda p: jnp.sin(p.astype(jnp.float32) + seed), params)  # noqa: B023 (called at once)
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def mesh_of(count=8):
    return jax.sharding.Mesh(np.array(jax.devices()[:count]), ("data",))


def on(mesh, params):
    return jax.device_put(params, NamedSharding(mesh, P()))


def assert_laid(ours, like):
    assert jax.tree.structure(ours) == jax.tree.structure(like)
    for x, its in zip(*map(jax.tree.leaves, (ours, like)), strict=True):
        assert (x.shape, x.dtype) == (its.shape, its.dtype)
        assert x.sharding.is_equivalent_to(its.sharding, x.ndim)


class TestWeights:
    """`allow="weights"` gives what `convert_weights` gives."""

    @pytest.mark.few(3)
    @pytest.mark.parametrize("spread", ["one device", "zero1", "to zero1"])
    @pytest.mark.parametrize(("before", "after"), MOVES)
    def test_from_rounding_to_rounding(self, tmp_path, before, after, spread):
        tx, target = make(before), make(after)
        params, like = draw(dtype_of(before)), draw(dtype_of(after))
        if spread == "zero1":
            params, tx = on(mesh_of(), params), zero1(tx, mesh_of())
        if spread != "one device":
            like, target = on(mesh_of(), like), zero1(target, mesh_of())
        tree, like = train(tx, params), (like, target.init(like))
        save(tmp_path, 2, tree, tx)
        with pytest.raises(RefusedError, match="allow 'weights'"):
            restore(tmp_path, like, target, allow="mesh")
        allow = ["weights"] if spread != "to zero1" else ["weights", "mesh"]
        found = restore(tmp_path, like, target, allow=allow).tree
        assert_laid(found, like)
        wanted = adamite.convert_weights(*tree, make(after), dtype_of(after))
        assert_same_bits(jax.device_get(found), jax.device_get(wanted))

    def test_with_storage_and_abstract_targets(self, tmp_path):
        tx, target = make(None), make("residual8", moments="int8")
        tree = train(tx, draw())
        save(tmp_path, 2, tree, tx)
        like = jax.eval_shape(lambda: (draw(BFLOAT16), target.init(draw(BFLOAT16))))
        for allow in ("weights", "storage", "dtype"):
            with pytest.raises(RefusedError):
                restore(tmp_path, like, target, allow=allow)
        params, state = restore(tmp_path, like, target, allow=["weights", "storage"]).tree
        moments = adamite.convert_moments(tree[1], "int8")
        wanted = adamite.convert_weights(tree[0], moments, target, BFLOAT16)
        assert_same_bits((params, state), wanted)
        train(target, params, steps=1)

    @pytest.mark.parametrize("moments", ["bfloat16", "int8"])
    def test_moments_are_no_weights(self, tmp_path, moments):
        """Though they have the weights' dtype and shapes, and are nearer to the residuals."""
        tx, target = make(None, moments=moments), make("residual8", moments=moments)
        tree = train(tx, draw())
        save(tmp_path, 2, tree, tx)
        found = restore(tmp_path, (draw(BFLOAT16), target.init(draw(BFLOAT16))), target, allow="weights").tree
        assert_same_bits(found, adamite.convert_weights(*tree, target, BFLOAT16))

    def test_differences_say_weights(self, tmp_path):
        tx, target = make(None), make("residual8")
        save(tmp_path, 2, train(tx, draw()), tx)
        with pytest.raises(RefusedError) as error:
            restore(tmp_path, (draw(BFLOAT16), target.init(draw(BFLOAT16))), target)
        assert str(error.value).splitlines()[1:] == [
            "  optimizer.rounding: saved null, now \"residual8\" (allow 'weights')",
            "  tree[1][3]: saved nothing, now RoundingState (allow 'weights')",
            "  tree[1][3].residual: saved nothing, now dict (allow 'weights')",
            "  tree[0]['b']: saved float32[8], now bfloat16[8] (allow 'weights')",
            "  tree[0]['w']: saved float32[64, 256], now bfloat16[64, 256] (allow 'weights')",
            "  tree[1][3].count: saved nothing, now int32[] (allow 'weights')",
            "  tree[1][3].residual['b']: saved nothing, now int8[8] (allow 'weights')",
            "  tree[1][3].residual['w']: saved nothing, now int8[64, 256] (allow 'weights')",
        ]

    def test_a_residual_is_not_one_of_another_dtype(self, tmp_path):
        """It counts in the spacings of the weight's dtype: a cast alone would make another weight of it."""
        tx = make("residual8")
        tree = train(tx, draw(BFLOAT16))
        save(tmp_path, 2, tree, tx)
        like = draw(jnp.float16), tx.init(draw(jnp.float16))
        with pytest.raises(RefusedError, match=r"tree\[0\]\['b'\]: saved bfloat16\[8\], now float16\[8\] \(allow 'wei"):
            restore(tmp_path, like, tx, allow="dtype")
        found = restore(tmp_path, like, tx, allow="weights").tree
        for x, y in zip(
            *map(jax.tree.leaves, (adamite.full_weights(*tree), adamite.full_weights(*found))), strict=True
        ):
            np.testing.assert_allclose(x, y, rtol=2**-17, atol=2**-24)

    @pytest.mark.few(2)
    @pytest.mark.parametrize(
        "wrapper", ["partition", "masked", "guard", "train state", "two models", "with an average"]
    )
    def test_trees_of_all_kinds(self, tmp_path, wrapper):
        labels = {"w": "a", "b": "b"}

        def tree(rounding):
            params, own = draw(dtype_of(rounding)), make(rounding)
            tx = {
                "partition": lambda: optax.partition({"a": own, "b": make(rounding)}, labels),
                "masked": lambda: optax.masked(own, {"w": True, "b": False}),
                "guard": lambda: adamite.skip_nonfinite(own),
            }.get(wrapper, lambda: own)()
            if wrapper == "train state":
                return TrainState.create(apply_fn=None, params=params, tx=own)
            if wrapper == "two models":
                other = jax.tree.map(lambda p: p * 3, params)
                return [{"gen": (params, tx.init(params))}, {"dis": (other, tx.init(other))}]
            if wrapper == "with an average":
                return {"params": params, "average": draw(), "state": tx.init(params)}
            return params, tx.init(params)

        wide, lean = tree(None), tree("residual16")
        if wrapper == "train state":
            lean = lean.replace(tx=wide.tx)  # its static field
        save(tmp_path, 1, wide)
        found = restore(tmp_path, lean, allow="weights").tree
        assert_laid(jax.tree.map(jnp.asarray, found), jax.tree.map(jnp.asarray, lean))
        save(tmp_path, 2, found)
        back = restore(tmp_path, wide, allow="weights", step=2).tree
        if wrapper == "masked":  # what it leaves out has no residual
            np.testing.assert_allclose(back[0].pop("b"), wide[0].pop("b"), rtol=2**-8)
        assert_same_bits(back, wide)

    def test_weights_that_cannot_be_told(self, tmp_path):
        """Two trees of the same shapes and dtypes: the residuals could be of either."""
        tx, target = make(None), make("residual8")
        save(tmp_path, 1, {"params": draw(), "average": draw(), "state": tx.init(draw())})
        short = draw(BFLOAT16)
        like = {"params": short, "average": short, "state": target.init(short)}
        text = "the residuals of tree['state'][3] could be those of tree['average'] or tree['params']: restore what was"
        with pytest.raises(RefusedError, match=re.escape(text)):
            restore(tmp_path, like, allow="weights")
        save(tmp_path, 2, like)  # where nothing changes nothing need be told
        assert_same_bits(restore(tmp_path, like, allow="weights").tree, like)

    def test_models_of_nnx(self, tmp_path):
        def run(rounding):
            model = nnx.Linear(64, 64, param_dtype=dtype_of(rounding), rngs=nnx.Rngs(0))
            optimizer = nnx.Optimizer(model, make(rounding), wrt=nnx.Param)
            return nnx.state(model, nnx.Param), optimizer.opt_state

        wide, lean = run(None), run("residual16")
        save(tmp_path, 1, wide)
        found = restore(tmp_path, lean, allow="weights").tree
        assert jax.tree.structure(found) == jax.tree.structure(lean)
        save(tmp_path, 2, found)
        assert_same_bits(*(jax.tree.leaves(tree) for tree in (restore(tmp_path, wide, allow="weights").tree, wide)))

    def test_a_rounding_as_the_last_part_of_a_chain(self, tmp_path):
        def chained(rounding):
            parts = [adamite.scale_by_adam(), adamite.scale_by_learning_rate(1e-2)]
            return adamite.chain(*parts, *([adamite.round_weights(rounding)] if rounding else []))

        tx, target = chained(None), chained("residual8")
        save(tmp_path, 1, train(tx, draw()), tx)
        restore(tmp_path, (draw(BFLOAT16), target.init(draw(BFLOAT16))), target, allow="weights")


class TestMesh:
    """`allow="mesh"` is enough where only the devices differ, and `zero1`."""

    @pytest.mark.parametrize("before", [None, 4, 8])
    @pytest.mark.parametrize("after", [None, 4, 8])
    def test_zero1_comes_and_goes(self, tmp_path, before, after):
        def run(count):
            if count is None:
                return make("residual8"), draw(BFLOAT16)
            return zero1(make("residual8"), mesh_of(count)), on(mesh_of(count), draw(BFLOAT16))

        tx, params = run(before)
        tree = train(tx, params)
        save(tmp_path, 2, tree, tx)
        target, params = run(after)
        like = params, target.init(params)
        if before != after:
            with pytest.raises(RefusedError, match="allow 'mesh'") as error:
                restore(tmp_path, like, target)
            assert "weights" not in str(error.value)
            assert "dtype" not in str(error.value)
        found = restore(tmp_path, like, target, allow="mesh").tree
        assert_laid(found, like)
        assert_same_bits(jax.device_get(found), jax.device_get(tree))

    def test_what_else_differs_is_still_refused(self, tmp_path):
        tx, target = adamite.adamw(1e-2), zero1(adamite.adamw(1e-3), mesh_of())
        params = on(mesh_of(), draw())
        save(tmp_path, 1, (params, tx.init(params)), tx)
        like = params, target.init(params)
        with pytest.raises(RefusedError) as error:
            restore(tmp_path, like, target, allow="mesh")
        text = "optimizer.learning_rate: saved 0.01, now 0.001 (allow 'optimizer.learning_rate')"
        assert str(error.value).splitlines()[1:] == [f"  {text}"]
        with pytest.raises(RefusedError, match=re.escape('optimizer: saved "adamw", now "zero1" (allow \'mesh\')')):
            restore(tmp_path, like, target)
        restore(tmp_path, like, target, allow=["mesh", "optimizer.learning_rate"])

    def test_arguments_of_zero1_are_the_mesh(self, tmp_path):
        two = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
        params = on(two, draw())
        shardings = jax.tree.map(lambda p: p.sharding, params)
        tx, target = zero1(make(None), two, "data"), zero1(make(None), two, "model", param_shardings=shardings)
        save(tmp_path, 1, (params, tx.init(params)), tx)
        like = params, target.init(params)
        with pytest.raises(RefusedError) as error:
            restore(tmp_path, like, target)
        assert all(line.endswith("(allow 'mesh')") for line in str(error.value).splitlines()[1:])
        assert_laid(restore(tmp_path, like, target, allow="mesh").tree, like)

    def test_inside_of_others_and_offloaded(self, tmp_path):
        mesh = mesh_of()
        params = on(mesh, draw())
        tx, target = make(None), offload(zero1(make(None), mesh))
        save(tmp_path, 1, (params, tx.init(params)), tx)
        assert_laid(restore(tmp_path, (like := (params, target.init(params))), target, allow="mesh").tree, like)
        tx, target = (adamite.skip_nonfinite(x) for x in (make(None), zero1(make(None), mesh)))
        save(tmp_path, 2, (params, tx.init(params)), tx)
        restore(tmp_path, (params, target.init(params)), target, allow="mesh")
        with pytest.raises(RefusedError, match=re.escape('optimizer.tx: saved "adamw", now "zero1" (allow \'mesh\')')):
            restore(tmp_path, (params, target.init(params)), target)


class TestOnly:
    """A part of what was saved."""

    def test_the_weights_of_a_run(self, tmp_path):
        tx = make("residual8", moments="int8")
        tree = train(tx, draw(BFLOAT16))
        save(tmp_path, 1, tree, tx, record={"epoch": 1})
        step, found, record = restore(tmp_path, draw(BFLOAT16), only="tree[0]")
        assert_same_bits(found, tree[0])
        assert (step, record) == (1, {"epoch": 1})
        assert_same_bits(restore(tmp_path, tree[0]["w"], only="tree[0]['w']").tree, tree[0]["w"])
        assert_same_bits(restore(tmp_path, tree[1], tx, only="tree[1]").tree, tree[1])
        with pytest.raises(RefusedError, match=r"optimizer\.learning_rate"):
            restore(tmp_path, tree[1], adamite.adamw(1e-3, moments="int8", rounding="residual8"), only="tree[1]")

    def test_checks_are_as_strict(self, tmp_path):
        tx = make(None)
        save(tmp_path, 1, train(tx, draw()), tx)
        for like, text in (
            ({"w": draw()["w"]}, "tree[0]['b']: saved float32[8], now nothing (allow \"tree[0]['b']\")"),
            (draw() | {"c": jnp.ones(2)}, "tree[0]['c']: saved nothing, now float32[2]"),
            (draw(BFLOAT16), "tree[0]['b']: saved float32[8], now bfloat16[8] (allow 'dtype')"),
            (tuple(draw().values()), "tree[0]: saved dict, now tuple"),
        ):
            with pytest.raises(RefusedError, match=re.escape(text)):
                restore(tmp_path, like, only="tree[0]")
        assert restore(tmp_path, draw(BFLOAT16), only="tree[0]", allow="dtype").tree["w"].dtype == BFLOAT16
        assert [*restore(tmp_path, {"w": draw()["w"]}, only="tree[0]", allow="tree[0]['b']").tree] == ["w"]

    def test_no_other_array_is_read(self, tmp_path, monkeypatch):
        import adamite.checkpoint.reading as reading

        asked = []
        target = reading.target
        monkeypatch.setattr(reading, "target", lambda leaf: asked.append(leaf) or target(leaf))
        save(tmp_path, 1, train(make(None), draw()))
        restore(tmp_path, draw(), only="tree[0]")
        assert len(asked) == 2

    @pytest.mark.parametrize("only", ["tree[2]", "[0]", "", "tree[0]['v']", "params", "tree[0", "tree[1][0].m"])
    def test_parts_that_were_not_saved(self, tmp_path, only):
        save(tmp_path, 1, train(make(None), draw()))
        text = f"only must name a part that was saved, such as tree[0], tree[1], got {only!r}"
        with pytest.raises(RefusedError, match=re.escape(text)):
            restore(tmp_path, draw(), only=only)

    def test_a_part_is_a_string(self, tmp_path):
        with pytest.raises(TypeError, match=r"only must be None or a string such as 'tree\[0\]', got 0 of type int"):
            restore(tmp_path, draw(), only=0)


BODY = {"body": {"w": jnp.ones((64, 256))}}
HEAD = {"head": {"w": jnp.full((256, 4), 2.0), "b": jnp.zeros(4)}}
TX = adamite.adamw(1e-2)


def trained(tree, tx=TX):
    params, state = train(tx, tree)
    return {"params": params, "state": state}


class TestPlaces:
    """Parameters that are new, are gone or have another shape."""

    def test_one_that_is_new_keeps_the_value_of_like(self, tmp_path):
        saved = trained(BODY)
        save(tmp_path, 1, saved, TX)
        like = trained(BODY | HEAD)
        with pytest.raises(RefusedError, match=re.escape("now float32[4] (allow \"tree['params']['head']['b']\")")):
            restore(tmp_path, like, TX)
        found = restore(tmp_path, like, TX, allow="['head']").tree
        for name, its in (("head", like), ("body", saved)):
            assert_same_bits(found["params"][name], its["params"][name])
            for moment in ("mu", "nu"):
                assert_same_bits(getattr(found["state"][0], moment)[name], getattr(its["state"][0], moment)[name])
        assert found["state"][0].count == 2
        places = ["tree['params']['head']", "tree['state'][0].mu['head']", "tree['state'][0].nu['head']"]
        assert_same_bits(restore(tmp_path, like, TX, allow=places).tree, found)
        with pytest.raises(RefusedError, match=re.escape("tree['state'][0].nu['head']")):
            restore(tmp_path, like, TX, allow=places[:2])

    def test_one_that_is_gone_is_not_read(self, tmp_path):
        saved = trained(BODY | HEAD)
        save(tmp_path, 1, saved, TX)
        found = restore(tmp_path, trained(BODY), TX, allow="['head']").tree
        assert_same_bits(found["params"], {"body": saved["params"]["body"]})
        assert [*found["state"][0].mu] == ["body"]

    def test_one_of_another_shape_is_new(self, tmp_path):
        """With its moments, though one of them has the old shape."""
        tx = adamite.adam_mini(1e-2)
        saved = trained(BODY | HEAD, tx)
        save(tmp_path, 1, saved, tx)
        other = {"head": {"w": jnp.ones((256, 7)), "b": jnp.zeros(4)}}
        like = trained(BODY | other, tx)
        with pytest.raises(RefusedError, match=re.escape('saved float32[256, 4], now float32[256, 7] (allow "tree[')):
            restore(tmp_path, like, tx)
        found = restore(tmp_path, like, tx, allow="['head']").tree
        assert_same_bits(found["params"]["head"]["w"], like["params"]["head"]["w"])
        assert_same_bits(found["params"]["head"]["b"], saved["params"]["head"]["b"])
        assert_same_bits(found["state"][0].nu["head"]["w"], like["state"][0].nu["head"]["w"])
        assert_same_bits(found["state"][0].nu["body"], saved["state"][0].nu["body"])

    def test_codes_and_scales_are_of_one_moment(self, tmp_path):
        """Scales of the same shape as before are new where the codes are."""
        tx = adamite.adamw(1e-2, moments="int8")
        saved, like = (trained(BODY | {"head": jnp.full((64, n), float(n))}, tx) for n in (256, 200))
        save(tmp_path, 1, saved, tx)
        found = restore(tmp_path, like, tx, allow=["tree['params']['head']", "tree['state'][0]"]).tree
        for moment in ("mu", "nu"):
            ours, its = (getattr(tree["state"][0], moment) for tree in (found, like))
            assert_same_bits((ours.codes["head"], ours.scales["head"]), (its.codes["head"], its.scales["head"]))

    def test_no_other_difference_is_excused(self, tmp_path):
        saved = trained(BODY | HEAD)
        save(tmp_path, 1, saved, TX)
        like = trained(BODY | {"head": jax.tree.map(lambda p: p.astype(BFLOAT16), HEAD["head"])})
        with pytest.raises(RefusedError, match=re.escape("saved float32[4], now bfloat16[4] (allow 'dtype')")):
            restore(tmp_path, like, TX, allow="['head']")
        like = trained({"other": BODY["body"]})
        with pytest.raises(RefusedError, match=re.escape("tree['params']['body']['w']: saved float32[64, 256]")):
            restore(tmp_path, like, TX, allow=["['head']", "['other']"])
        with pytest.raises(RefusedError, match=re.escape("optimizer.learning_rate")):
            restore(tmp_path, trained(BODY), adamite.adamw(1e-3), allow="['head']")

    def test_a_value_is_needed(self, tmp_path):
        save(tmp_path, 1, trained(BODY), TX)
        like = jax.eval_shape(lambda: trained(BODY | HEAD))
        text = "tree['params']['head']['b']: new, but like has no value for it: like must hold an array there"
        with pytest.raises(RefusedError, match=re.escape(text)):
            restore(tmp_path, like, TX, allow="['head']")

    @pytest.mark.parametrize("reverse", [False, True])
    def test_with_another_storage_and_rounding(self, tmp_path, reverse):
        """All at once: what is new is as `like` has it, all else is converted."""
        lean, wide = adamite.adamw(1e-2, moments="int8", rounding="residual8"), TX
        runs = {}
        for number, (tx, dtype) in enumerate(((wide, jnp.float32), (lean, BFLOAT16))):
            for tree in (BODY, BODY | HEAD):
                runs[number, len(tree)] = trained(jax.tree.map(lambda p: p.astype(dtype), tree), tx)  # noqa: B023
        before, after = (1, 0) if reverse else (0, 1)
        tx = lean if reverse else wide
        save(tmp_path, 1, runs[before, 1], tx)
        allow = ["['head']", "storage", "weights"]
        found = restore(tmp_path, runs[after, 2], (wide, lean)[after], allow=allow).tree
        alone = restore(tmp_path, runs[after, 1], (wide, lean)[after], allow=allow).tree

        def of(name, tree):
            return [
                x for path, x in jax.tree_util.tree_leaves_with_path(tree) if f"'{name}'" in jax.tree_util.keystr(path)
            ]

        assert_same_bits(of("head", found), of("head", runs[after, 2]))
        assert_same_bits(of("body", found), of("body", alone))
        assert len(of("head", found)) == (6 if reverse else 12)
        save(tmp_path, 2, runs[before, 2], tx)
        gone = restore(tmp_path, runs[after, 1], (wide, lean)[after], allow=allow, step=2).tree
        assert_same_bits(
            of("body", gone),
            of("body", restore(tmp_path, runs[after, 2], (wide, lean)[after], allow=allow, step=2).tree),
        )

    def test_a_group_of_a_partition(self, tmp_path):
        def run(tree, labels):
            groups = {name: make(None) for name in {*labels.values()}}
            return trained(tree, optax.partition(groups, labels))

        saved = run(BODY, {"body": "a"})
        save(tmp_path, 1, saved)
        like = run(BODY | HEAD, {"body": "a", "head": "b"})
        with pytest.raises(RefusedError, match=re.escape("(allow \"tree['state'].inner_states['b']\")")):
            restore(tmp_path, like, allow="['head']")
        found = restore(tmp_path, like, allow=["['head']", "tree['state'].inner_states['b']"]).tree
        assert_same_bits(found["params"]["body"], saved["params"]["body"])
        assert_same_bits(found["state"].inner_states["b"], like["state"].inner_states["b"])
        save(tmp_path, 2, like)
        back = restore(tmp_path, saved, allow=["['head']", "tree['state'].inner_states['b']"]).tree
        assert_same_bits(back["params"]["body"], like["params"]["body"])

    def test_attributes_are_keys(self, tmp_path):
        saved = TrainState.create(apply_fn=None, params=BODY, tx=TX)
        save(tmp_path, 1, saved, TX)
        like = TrainState.create(apply_fn=None, params=BODY | HEAD, tx=TX)
        found = restore(tmp_path, like, TX, allow="['head']").tree
        assert_same_bits(found.params["head"], like.params["head"])
        places = ["tree.params['head']", "tree.opt_state[0].mu['head']", "tree.opt_state[0].nu['head']"]
        assert_same_bits(restore(tmp_path, like, TX, allow=places).tree.params, found.params)

    @pytest.mark.parametrize(
        "name", ["tree", "[0]", "[3]['head']", "head", "", "['head", "tree head", "treehouse", "['a'] "]
    )
    def test_names_that_are_no_places(self, tmp_path, name):
        with pytest.raises(ValueError, match=r"allow must hold storage, dtype, mesh, weights, optimizer.ARGUMENT or a"):
            restore(tmp_path, {}, allow=name)
