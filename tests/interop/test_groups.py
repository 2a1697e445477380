"""Torch's parameter groups, each with its own learning rate, betas, epsilon, decay and step."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import P
from jax.sharding import AxisType, NamedSharding

import adamite
from adamite import interop, partition
from adamite.checks import RefusedError
from adamite.sharding import zero1
from bits import assert_same_bits, trajectory, types
from interop.runs import FACTORS, MAPPING, NUMBERED, assert_same, gradients, nameless, state_dict, train, weights
from interop.test_torch import BOUND, far

PARAMS = weights("adamw_rates", 50)
LABELS = {"first": "body", "second": "head"}


def by_hand(**other):
    """The transformation of the run "adamw_rates", with other arguments for its second group."""
    head = {"learning_rate": 1e-2, "b1": 0.8, "b2": 0.99, "eps": 1e-6, "weight_decay": 0.0} | other
    return partition({"body": adamite.adamw(2e-3, weight_decay=0.3), "head": adamite.adamw(**head)}, LABELS)


def counts(state):
    """The step of each state of Adam, and what each schedule has counted."""
    kinds = (optax.ScaleByAdamState, optax.ScaleByScheduleState)
    nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kinds))
    return [[int(x.count) for x in nodes if isinstance(x, kind)] for kind in kinds]


class TestTorchOptimizer:
    def test_groups_are_told(self):
        told = interop.torch_optimizer(state_dict("adamw_rates"), PARAMS, MAPPING).identity["transforms"]
        assert list(told) == ["group0", "group1"]
        assert [part["name"] for part in told["group0"]["parts"]] == [
            "scale_by_adam",
            "add_decayed_weights",
            "scale_by_learning_rate",
        ]
        direction, rate = told["group1"]["parts"]
        assert (direction["b1"], direction["b2"], direction["eps"]) == (0.8, 0.99, 1e-6)
        assert rate["learning_rate"] == 1e-2

    def test_alike_but_for_decay_is_one_chain(self):
        tx = interop.torch_optimizer(state_dict("adamw_groups"), PARAMS, MAPPING)
        assert tx.identity["name"] == "chain"

    @pytest.mark.parametrize("argument", ["lr", "eps", "betas", "weight_decay", "amsgrad", "decoupled_weight_decay"])
    def test_each_setting_makes_a_partition(self, argument):
        found = state_dict("adamw_groups")
        found["state"] = {}
        body, head = found["param_groups"]
        head["weight_decay"] = 0.1
        head[argument] = (0.5, 0.5) if argument == "betas" else type(body[argument])(not body[argument] or 0.2)
        head[argument] = not body[argument] if isinstance(body[argument], bool) else head[argument]
        tx = interop.torch_optimizer(found, PARAMS, MAPPING)
        assert tx.identity["name"] == "partition"
        again = interop.to_torch(tx.init(PARAMS), tx, PARAMS, MAPPING)
        assert again["param_groups"] == found["param_groups"]

    def test_params_must_be_given(self):
        with pytest.raises(ValueError, match="params must be given, as torch's groups differ"):
            interop.torch_optimizer(state_dict("adamw_rates"))
        with pytest.raises(ValueError, match="params must be given, as frozen is; and a mapping"):
            interop.torch_optimizer(state_dict("adam"), frozen="first")

    def test_storage_and_rounding_are_those_of_each_group(self):
        params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
        tx = interop.torch_optimizer(
            state_dict("adamw_rates"), params, MAPPING, moments=("bfloat16", "float32"), rounding="residual8"
        )
        state = tx.init(params)
        found = [x.dtype.name for x in jax.tree.leaves(state) if x.ndim]
        assert sorted(found) == ["bfloat16"] * 4 + ["float32"] * 4 + ["int8"] * 4
        updates, _ = tx.update(params, state, params)
        assert {u.dtype.name for u in jax.tree.leaves(updates)} == {"float32"}  # rounded as weights, not as updates


class TestSchedules:
    def test_a_run_with_lambda_lr_goes_on(self):
        params, found = weights("adamw_scheduled", 50), state_dict("adamw_scheduled")
        tx = interop.torch_optimizer(found, params, MAPPING, lr_lambda=FACTORS)
        state = interop.from_torch(found, tx, params, MAPPING)
        assert counts(state) == [[50, 50], [50, 50]]
        again = interop.to_torch(state, tx, params, MAPPING, like=found)
        assert_same(again, found)
        after, _ = train(tx, params, state, 50, 150)
        print(far(after, weights("adamw_scheduled", 150)))
        assert far(after, weights("adamw_scheduled", 150)) <= BOUND
        wrong, _ = train(interop.torch_optimizer(found, params, MAPPING), params, state, 50, 150)
        assert far(wrong, weights("adamw_scheduled", 150)) > 100 * BOUND

    def test_one_function_multiplies_the_base_rate_of_each_group(self):
        found = state_dict("adamw_scheduled")
        tx = interop.torch_optimizer(found, PARAMS, MAPPING, lr_lambda=lambda count: 1 / (1 + count))
        again = interop.to_torch(interop.from_torch(found, tx, PARAMS, MAPPING), tx, PARAMS, MAPPING)
        assert [group["lr"] for group in again["param_groups"]] == pytest.approx([2e-3 / 51, 1e-2 / 51], rel=1e-6)

    def test_without_initial_lr_the_base_is_lr(self):
        tx = interop.torch_optimizer(state_dict("adam"), lr_lambda=lambda count: 0.5)
        assert tx.identity["parts"][1]["learning_rate"](3) == 5e-3

    def test_equal_rates_of_now_that_began_apart_are_two_groups(self):
        found = state_dict("adamw_groups")
        for group, base in zip(found["param_groups"], (1.0, 2.0), strict=True):
            group["initial_lr"] = base
        assert interop.torch_optimizer(found, PARAMS, MAPPING).identity["name"] == "chain"
        tx = interop.torch_optimizer(found, PARAMS, MAPPING, lr_lambda=lambda count: 1.0)
        assert tx.identity["name"] == "partition"

    @pytest.mark.parametrize(
        ("lr_lambda", "error", "message"),
        [
            (0.5, TypeError, "lr_lambda must be a function of the step count, or a list of some, got 0.5"),
            ([FACTORS[0], None], TypeError, "lr_lambda must be a function of the step count, or a list of some, got N"),
            (FACTORS[:1], ValueError, "lr_lambda must have a function for each of 2 groups, got 1"),
        ],
    )
    def test_what_is_no_lr_lambda(self, lr_lambda, error, message):
        with pytest.raises(error, match=re.escape(message)):
            interop.torch_optimizer(state_dict("adamw_rates"), PARAMS, MAPPING, lr_lambda=lr_lambda)

    def test_a_base_rate_that_is_none(self):
        found = state_dict("adamw_scheduled")
        found["param_groups"][1]["initial_lr"] = -1.0
        with pytest.raises(RefusedError, match=re.escape("param_groups[1]['initial_lr'] must be finite and >= 0")):
            interop.torch_optimizer(found, PARAMS, MAPPING, lr_lambda=FACTORS[0])


def on_mesh(tree):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    return jax.device_put(tree, NamedSharding(mesh, P())), mesh


WRAPPERS = {
    "skip_nonfinite": adamite.skip_nonfinite,
    "accumulate": lambda tx: adamite.accumulate(tx, 2),
    "clipped": lambda tx: adamite.chain(optax.clip_by_global_norm(1e9), tx),
    "all": lambda tx: adamite.with_telemetry(adamite.accumulate(adamite.skip_nonfinite(tx), 2)),
    "zero1": lambda tx: zero1(tx, on_mesh(())[1]),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_are_filled_through_and_compared_through(wrapper):
    found, wrap = state_dict("adamw_rates"), WRAPPERS[wrapper]
    params = on_mesh(PARAMS)[0] if wrapper == "zero1" else PARAMS
    tx = wrap(by_hand())
    state, born = interop.from_torch(found, tx, params, MAPPING), tx.init(params)
    assert types(state) == types(born)
    for x, like in zip(*map(jax.tree.leaves, (state, born)), strict=True):
        assert x.committed == like.committed
        assert x.sharding.is_equivalent_to(like.sharding, x.ndim)
    assert counts(state)[0] == [50, 50]
    assert_same(interop.to_torch(state, tx, params, MAPPING), found)
    assert_same(interop.to_torch(state, tx, params, MAPPING, like=found), found)
    with pytest.raises(RefusedError, match=re.escape("b1: torch has 0.8 for second.kernel, tx 0.7; allow=('b1',)")):
        interop.from_torch(found, wrap(by_hand(b1=0.7)), params, MAPPING)


def test_moments_of_any_storage():
    rng = np.random.default_rng(0)
    params = {"first": jnp.zeros((64, 128)), "second": jnp.zeros((64, 128))}
    wide = by_hand()
    g = jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), p.dtype), params)
    _, state = wide.update(g, wide.init(params), params)
    found = interop.to_torch(state, wide, params)
    lean = by_hand(moments="int8")
    kept = interop.from_torch(found, lean, params)
    assert types(kept) == types(lean.init(params))
    assert_same_bits(kept.inner_states["head"], adamite.convert_moments(state.inner_states["head"], "int8"))
    assert_same_bits(kept.inner_states["body"], state.inner_states["body"])
    assert_same_bits(interop.from_torch(interop.to_torch(kept, lean, params), lean, params), kept)


class TestSettings:
    @pytest.mark.parametrize(
        ("other", "message"),
        [
            ({"learning_rate": 1e-3}, "learning_rate: torch has 0.01 for second.kernel, tx 0.001"),
            ({"b2": 0.9}, "b2: torch has 0.99 for second.kernel, tx 0.9"),
            ({"eps": 1e-8}, "eps: torch has 1e-06 for second.kernel, tx 1e-08"),
            ({"weight_decay": 0.3}, "weight_decay: torch has 0.0 for second.kernel, tx 0.3"),
        ],
    )
    def test_each_group_is_compared_with_its_own(self, other, message):
        found = state_dict("adamw_rates")
        with pytest.raises(RefusedError, match=re.escape(message)):
            interop.from_torch(found, by_hand(**other), PARAMS, MAPPING)
        allowed = interop.from_torch(found, by_hand(**other), PARAMS, MAPPING, allow=list(other))
        assert_same_bits(allowed, interop.from_torch(found, by_hand(), PARAMS, MAPPING))
        if "learning_rate" not in other:
            with pytest.raises(RefusedError, match=re.escape(message.replace("torch", "like"))):
                interop.to_torch(allowed, by_hand(**other), PARAMS, MAPPING, like=found)

    def test_groups_that_changed_places(self):
        tx = partition({"body": adamite.adam(1e-2), "head": adamite.adam(2e-3)}, LABELS)
        with pytest.raises(RefusedError, match=r"learning_rate: torch has 0\.002 for first\.kernel, tx 0\.01"):
            interop.from_torch(state_dict("adamw_rates"), tx, PARAMS, MAPPING)

    @pytest.mark.parametrize(
        ("tx", "says"),
        [
            (adamite.adam(optax.linear_schedule(1e-2, 0.0, 100)), "one schedule for both"),
            (optax.adam(1e-2), "does not say its own"),
        ],
    )
    def test_one_schedule_for_rates_that_differ(self, tx, says):
        found = state_dict("adamw_rates")
        first, second = found["param_groups"]
        second |= {"betas": first["betas"], "eps": first["eps"]}
        first["weight_decay"] = 0.0
        message = f"learning_rate: torch has 0.002 for first.kernel, 0.01 for second.kernel, tx {says}; allow="
        with pytest.raises(RefusedError, match=re.escape(message)):
            interop.from_torch(found, tx, PARAMS, MAPPING)
        state = interop.from_torch(found, tx, PARAMS, MAPPING, allow="learning_rate")
        assert counts(state)[0] == [50]

    def test_optax_itself_is_filled_and_not_compared(self):
        groups = {"head": optax.adamw(1.0), "body": optax.adam(1.0)}
        tx, found = optax.partition(groups, LABELS), state_dict("adamw_rates")
        state = interop.from_torch(found, tx, PARAMS, MAPPING)
        assert types(state) == types(tx.init(PARAMS))
        assert_same(interop.to_torch(state, tx, PARAMS, MAPPING, like=found), found)
        with pytest.raises(ValueError, match="tx does not say its learning_rate: give like"):
            interop.to_torch(state, tx, PARAMS, MAPPING)

    def test_one_adam_and_a_rate_for_each_group(self):
        rates = partition({name: adamite.scale_by_learning_rate(x) for name, x in [("a", 1e-2), ("b", 0.5)]}, "a")
        apart = partition(
            {"a": adamite.scale_by_learning_rate(1e-2), "b": adamite.scale_by_learning_rate(0.5)},
            {"first": "a", "second": "b"},
        )
        found = state_dict("adam")
        for tx in (rates, apart):
            whole = adamite.chain(adamite.scale_by_adam(), tx)
            if tx is rates:
                interop.from_torch(found, whole, PARAMS, MAPPING)
            else:
                with pytest.raises(RefusedError, match=r"learning_rate: torch has 0\.01, tx 0\.5"):
                    interop.from_torch(found, whole, PARAMS, MAPPING)
        state = interop.from_torch(found, whole, PARAMS, MAPPING, allow="learning_rate")
        again = interop.to_torch(state, whole, PARAMS, MAPPING)
        assert [group["lr"] for group in again["param_groups"]] == [1e-2, 0.5]
        assert [group["params"] for group in again["param_groups"]] == [[0, 1], [2, 3]]


EXTRA = PARAMS | {"extra": {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.full(2, -1.0)}}


class TestFrozen:
    @pytest.mark.parametrize("run", ["adam", "adamw_groups", "adamw_rates"])
    @pytest.mark.parametrize("mapping", [MAPPING, MAPPING | {"extra.kernel": "unknown", "extra.bias": "too"}])
    def test_what_torch_has_not_stays_and_the_rest_goes_on(self, run, mapping):
        params, found = weights(run, 50) | {"extra": EXTRA["extra"]}, state_dict(run)
        tx = interop.torch_optimizer(found, params, mapping, frozen="extra")
        state = interop.from_torch(found, tx, params, mapping)
        assert types(state) == types(tx.init(params))
        assert_same(interop.to_torch(state, tx, params, mapping), found)
        assert_same(interop.to_torch(state, tx, params, mapping, like=found), found)
        g = jax.tree.map(lambda x: x[50], gradients()) | {"extra": jax.tree.map(jnp.ones_like, EXTRA["extra"])}
        updates, _ = tx.update(g, state, params)
        after = optax.apply_updates(params, updates)
        assert_same_bits(after["extra"], params["extra"])
        without = interop.torch_optimizer(found, weights(run, 50), MAPPING)
        kept = interop.from_torch(found, without, weights(run, 50), MAPPING)
        one, _ = without.update({k: g[k] for k in ("first", "second")}, kept, weights(run, 50))
        assert_same_bits({k: updates[k] for k in ("first", "second")}, one)

    def test_it_is_asked_for(self):
        found, mapping = state_dict("adam"), MAPPING | {"extra.kernel": "extra.weight", "extra.bias": "extra.bias"}
        tx = adamite.adam(1e-2)
        for use in (
            lambda: interop.torch_optimizer(state_dict("adamw_rates"), EXTRA, mapping),
            lambda: interop.from_torch(found, tx, EXTRA, mapping),
            lambda: interop.to_torch(tx.init(EXTRA), tx, EXTRA, mapping, like=found),
        ):
            with pytest.raises(RefusedError, match=r"torch no 'extra\.\w+', only .*frozen='extra\.\w+'"):
                use()
        with pytest.raises(ValueError, match=r"mapping must have an entry for each array of params, got none for 'e"):
            interop.from_torch(found, tx, EXTRA, MAPPING)

    @pytest.mark.parametrize(
        ("frozen", "message"),
        [
            (["extra", "ekstra"], "frozen has 'ekstra', but params has no such array or subtree, only 'extra.bias', '"),
            ("ext", "frozen has 'ext', but params has no such array or subtree"),
            ("extra.bias", "got none for 'extra.kernel'"),
        ],
    )
    def test_a_misspelled_name(self, frozen, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            interop.torch_optimizer(state_dict("adamw_rates"), EXTRA, MAPPING, frozen=frozen)

    def test_a_misspelled_mapping_is_refused_in_spite_of_it(self):
        found, wrong = state_dict("adam"), MAPPING | {"first.bias": "first.bia"}
        with pytest.raises(RefusedError, match=re.escape("params has 'first.bias', torch no 'first.bia', only")):
            interop.torch_optimizer(found, EXTRA, wrong, frozen="extra")
        tx = interop.torch_optimizer(found, EXTRA, MAPPING, frozen="extra")
        with pytest.raises(RefusedError, match=re.escape("params has 'first.bias', torch no 'first.bia', only")):
            interop.from_torch(found, tx, EXTRA, wrong)
        left_out = {path: there for path, there in MAPPING.items() if path != "first.bias"}
        with pytest.raises(ValueError, match=r"got none for 'first\.bias'"):
            interop.from_torch(found, tx, EXTRA, left_out)

    def test_what_torch_trains_is_not_frozen_by_accident(self):
        found = state_dict("adam")
        tx = interop.torch_optimizer(found, PARAMS, MAPPING, frozen="first.bias")
        with pytest.raises(RefusedError, match=r"torch has moments of first\.bias, tx leaves it out"):
            interop.from_torch(found, tx, PARAMS, MAPPING)
        left_out = {path: there for path, there in MAPPING.items() if path != "first.bias"}
        with pytest.raises(RefusedError, match="torch has a parameter 1, params none for it"):
            interop.from_torch(found, tx, PARAMS, left_out)

    def test_what_torch_has_and_does_not_train(self):
        found = state_dict("adamw_rates")
        del found["state"][1], found["state"][0]
        tx = interop.torch_optimizer(found, PARAMS, MAPPING)
        with pytest.raises(RefusedError, match=re.escape("freeze it: torch_optimizer(..., frozen='first.bias')")):
            interop.from_torch(found, tx, PARAMS, MAPPING)
        tx = interop.torch_optimizer(found, PARAMS, MAPPING, frozen=["first"])
        state = interop.from_torch(found, tx, PARAMS, MAPPING)
        assert_same(interop.to_torch(state, tx, PARAMS, MAPPING, like=found), found)
        assert [group["params"] for group in interop.to_torch(state, tx, PARAMS, MAPPING)["param_groups"]] == [[0, 1]]

    def test_by_hand(self):
        tx = optax.partition(
            {"a": adamite.adam(1e-2), "b": optax.set_to_zero()}, {"first": "a", "second": "a", "extra": "b"}
        )
        found = state_dict("adam")
        state = interop.from_torch(found, tx, EXTRA, MAPPING)
        assert_same(interop.to_torch(state, tx, EXTRA, MAPPING, like=found), found)


class TestSteps:
    def later(self, run="adamw_rates"):
        """Torch added the second group 30 steps after the first."""
        found = state_dict(run)
        for key in found["param_groups"][1]["params"]:
            found["state"][key]["step"] = np.asarray(np.float32(20))
        return found

    def test_each_group_has_its_own(self):
        found = self.later("adamw_scheduled")
        tx = interop.torch_optimizer(found, PARAMS, MAPPING, lr_lambda=FACTORS[0])
        state = interop.from_torch(found, tx, PARAMS, MAPPING)
        assert counts(state) == [[50, 20], [50, 50]]  # torch's scheduler has one count
        again = interop.to_torch(state, tx, PARAMS, MAPPING)
        assert [int(kept["step"]) for kept in again["state"].values()] == [50, 50, 20, 20]
        assert [g["lr"] for g in again["param_groups"]] == pytest.approx([2e-3 / 6, 1e-2 / 6])
        assert_same(interop.to_torch(state, tx, PARAMS, MAPPING, like=found), found)

    def test_groups_alike_at_other_steps_are_a_partition(self):
        found = self.later("adamw_groups")
        tx = interop.torch_optimizer(found, PARAMS, MAPPING)
        assert tx.identity["name"] == "partition"
        assert counts(interop.from_torch(found, tx, PARAMS, MAPPING))[0] == [50, 20]
        mask = jax.tree.map(lambda p: p.ndim > 1, PARAMS)
        with pytest.raises(RefusedError, match="all parameters that one Adam steps must be at one step"):
            interop.from_torch(found, adamite.adamw(1e-2, weight_decay=0.1, mask=mask), PARAMS, MAPPING)

    def test_a_group_is_at_one(self):
        found = state_dict("adamw_rates")
        found["state"][3]["step"] = np.asarray(np.float32(20))
        tx = interop.torch_optimizer(found, PARAMS, MAPPING)
        with pytest.raises(RefusedError, match=re.escape("one step, got second.bias at 20, second.kernel at 50")):
            interop.from_torch(found, tx, PARAMS, MAPPING)

    def test_before_the_first(self):
        found = state_dict("adamw_rates") | {"state": {}}
        tx = interop.torch_optimizer(found, PARAMS, MAPPING)
        fresh = interop.from_torch(found, tx, PARAMS, MAPPING)
        assert_same_bits(fresh, tx.init(PARAMS))
        assert_same(interop.to_torch(fresh, tx, PARAMS, MAPPING), found)


class TestNumbers:
    GROUPED = {"first.kernel": (2, (1, 0)), "first.bias": 3, "second.kernel": (0, (1, 0)), "second.bias": 1}  # noqa: RUF012

    def test_groups_are_in_the_order_of_their_numbers(self):
        state = interop.from_torch(state_dict("adamw_rates"), by_hand(), PARAMS, MAPPING)
        again = interop.to_torch(state, by_hand(), PARAMS, self.GROUPED)
        assert [group["params"] for group in again["param_groups"]] == [[0, 1], [2, 3]]
        assert [group["lr"] for group in again["param_groups"]] == [1e-2, 2e-3]
        assert_same_bits(interop.from_torch(again, by_hand(), PARAMS, self.GROUPED), state)

    def test_groups_are_in_the_order_of_the_partition(self):
        tx = partition(dict(reversed(by_hand_groups().items())), LABELS)
        state = interop.from_torch(state_dict("adamw_rates"), tx, PARAMS, MAPPING)
        again = interop.to_torch(state, tx, PARAMS, MAPPING)
        assert [group["param_names"] for group in again["param_groups"]] == [
            ["second.weight", "second.bias"],
            ["first.weight", "first.bias"],
        ]
        assert_same_bits(interop.from_torch(again, tx, PARAMS, MAPPING), state)

    def test_numbers_that_do_not_count_group_by_group(self):
        crossed = NUMBERED | {"first.bias": 2, "second.kernel": (1, (1, 0))}
        with pytest.raises(
            ValueError, match=re.escape("numbers that count group by group, as torch's do, got [0, 2, 1, 3]")
        ):
            interop.to_torch(by_hand().init(PARAMS), by_hand(), PARAMS, crossed)

    def test_names_given_to_groups_of_numbers(self):
        found = nameless(state_dict("adamw_rates"))
        tx = interop.torch_optimizer(found, PARAMS, NUMBERED, decoupled=True)
        numbered = interop.from_torch(found, tx, PARAMS, NUMBERED)
        for group, names in zip(
            found["param_groups"], (["first.weight", "first.bias"], ["second.weight", "second.bias"]), strict=True
        ):
            group["param_names"] = names
        assert_same_bits(interop.from_torch(found, tx, PARAMS, MAPPING), numbered)


def by_hand_groups():
    return {
        "body": adamite.adamw(2e-3, weight_decay=0.3),
        "head": adamite.adamw(1e-2, 0.8, 0.99, 1e-6, weight_decay=0.0),
    }


def test_amsgrad_in_one_group():
    found, other = state_dict("adamw_rates"), state_dict("adam_amsgrad")
    found["param_groups"][1]["amsgrad"] = True
    for key in (2, 3):
        found["state"][key]["max_exp_avg_sq"] = other["state"][key]["max_exp_avg_sq"]
    tx = interop.torch_optimizer(found, PARAMS, MAPPING)
    state = interop.from_torch(found, tx, PARAMS, MAPPING)
    assert_same(interop.to_torch(state, tx, PARAMS, MAPPING), found)
    with pytest.raises(RefusedError, match=r"amsgrad: torch has True for second\.kernel, tx False"):
        interop.from_torch(found, by_hand(), PARAMS, MAPPING)
    with pytest.raises(RefusedError, match=r"amsgrad: like has False for second\.kernel, tx True"):
        interop.to_torch(state, tx, PARAMS, MAPPING, like=state_dict("adamw_rates"))


def test_weights_are_saved_with_the_state_of_groups(tmp_path):
    tx = interop.torch_optimizer(state_dict("adamw_rates"), EXTRA, MAPPING, frozen="extra")
    interop.save_weights(tmp_path / "model", EXTRA, tx.init(EXTRA))
    assert_same_bits(interop.load_weights(tmp_path / "model", EXTRA), EXTRA)


class TestPartition:
    def test_it_is_optax_to_the_bit(self):
        for labels in (LABELS, lambda tree: {name: LABELS[name] for name in tree}):
            ours, theirs = partition(by_hand_groups(), labels), optax.partition(by_hand_groups(), labels)
            assert_same_bits(trajectory(ours, PARAMS, gradients()), trajectory(theirs, PARAMS, gradients()))

    def test_it_steps(self):
        tx, g = by_hand(), jax.tree.map(lambda x: x[0], gradients())
        state = tx.init(PARAMS)
        updates, kept = tx.update(g, state, PARAMS)
        assert_same_bits(tx.step(g, state, PARAMS), (optax.apply_updates(PARAMS, updates), kept))

    def test_one_inside_of_another(self):
        inner = partition(
            {"a": adamite.adam(0.1), "b": adamite.adam(0.2)},
            lambda tree: {"first": {"kernel": "a", "bias": "b"}, "second": "a"},
        )
        tx = partition({"out": adamite.adam(0.3), "in": inner}, {"first": "in", "second": "out"})
        state = tx.init(PARAMS)
        again = interop.to_torch(state, tx, PARAMS, MAPPING)
        assert [(g["lr"], g["param_names"]) for g in again["param_groups"]] == [
            (0.3, ["second.weight", "second.bias"]),
            (0.1, ["first.weight"]),
            (0.2, ["first.bias"]),
        ]

    def test_a_tree_that_can_be_called_is_a_tree(self):
        class Model(eqx.Module):
            w: jax.Array

            def __call__(self):
                raise AssertionError

        params = Model(jnp.ones(2))
        tx = partition({"a": adamite.adam(0.1)}, jax.tree.map(lambda _: "a", params))
        tx.update(params, tx.init(params))
        assert interop.to_torch(tx.init(params), tx, params)["param_groups"][0]["lr"] == 0.1

    @pytest.mark.parametrize(
        ("transforms", "labels", "error", "message"),
        [
            ({}, "a", TypeError, "transforms must be a dict of at least one transformation, got {}"),
            ([adamite.adam(0.1)], "a", TypeError, "transforms must be a dict of at least one transformation, got ["),
            ({"a": "adam"}, "a", TypeError, "transforms['a'] must be a gradient transformation, got 'adam'"),
            ({"a": adamite.adam(0.1)}, {"w": "b"}, ValueError, "param_labels must be of 'a', got 'b'"),
        ],
    )
    def test_wrong_arguments(self, transforms, labels, error, message):
        with pytest.raises(error, match=re.escape(message)):
            partition(transforms, labels)


def test_nnx():
    class Net(nnx.Module):
        def __init__(self):
            self.first = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
            self.second = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
            self.extra = nnx.Linear(2, 2, rngs=nnx.Rngs(0))

    model, found = Net(), state_dict("adamw_rates")
    params = nnx.state(model, nnx.Param)
    mapping = interop.flax_names(params)
    tx = interop.torch_optimizer(found, params, mapping, frozen="extra")
    state = interop.from_torch(found, tx, params, mapping)
    assert types(state) == types(tx.init(params))
    assert_same(interop.to_torch(state, tx, params, MAPPING), found)
    before = jax.tree.map(np.array, nnx.to_pure_dict(params))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    optimizer.update(model, nnx.grad(lambda m: jnp.sum(m.extra(m.second(m.first(jnp.ones((1, 3)))))))(model))
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert_same_bits(after["extra"], before["extra"])
    moved = [float(np.abs(after[name]["bias"] - before[name]["bias"]).max()) for name in ("first", "second")]
    assert moved == pytest.approx([2e-3, 1e-2], rel=1e-3)  # Adam's first step is the learning rate


def test_labels_of_other_parameters():
    tx = interop.torch_optimizer(state_dict("adamw_rates"), PARAMS, MAPPING)
    with pytest.raises(ValueError, match="params must be those that torch_optimizer was given, got 'third'"):
        tx.init(PARAMS | {"third": jnp.ones(2)})


def test_a_gradient_of_none_leaves_its_weight():
    tx = interop.torch_optimizer(state_dict("adamw_rates"), PARAMS, MAPPING)
    g = jax.tree.map(lambda x: x[0], gradients())
    g["first"]["bias"] = None
    updates, _ = tx.update(g, tx.init(PARAMS), PARAMS)
    assert updates["first"]["bias"] is None


def test_full_weights_of_rounded_groups_are_saved(tmp_path):
    """Each group has residuals of its own."""
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    tx = interop.torch_optimizer(state_dict("adamw_rates"), params, MAPPING, rounding="residual16")
    state = tx.init(params)
    for g in (jax.tree.map(lambda x: x[0], gradients()), jax.tree.map(lambda x: x[1], gradients())):
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
    full = adamite.full_weights(params, state)
    assert all((x != p.astype(jnp.float32)).any() for x, p in zip(*map(jax.tree.leaves, (full, params)), strict=True))
    interop.save_weights(tmp_path / "model.safetensors", params, state, MAPPING)
    assert_same_bits(interop.load_weights(tmp_path / "model.safetensors", full, MAPPING), full)
