"""What is damaged, foreign or otherwise than asked for is refused, before anything is made of it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adamite
from adamite import interop
from adamite.checks import RefusedError
from interop.runs import MAPPING, NUMBERED, by_name, nameless, state_dict, weights

PARAMS = weights("adam", 50)
ADAM = adamite.adam(1e-2)


def changed(*path, to, run="adam"):
    """A run's state dict with one thing changed; without it, if that is KeyError."""
    found = node = state_dict(run)
    for key in path[:-1]:
        node = node[key]
    if to is KeyError:
        del node[path[-1]]
    else:
        node[path[-1]] = to
    return found


def without(key):
    return {name: x for name, x in state_dict("adam").items() if name != key}


def of(value):
    x = np.ones((4, 3), np.float32)
    x[1, 2] = value
    return x


def two_groups(**other):
    found = state_dict("adam")
    [group] = found["param_groups"]
    first, second = dict(group), dict(group)
    for part, cut in ((first, slice(0, 2)), (second, slice(2, 4))):
        part["params"], part["param_names"] = group["params"][cut], group["param_names"][cut]
    return {"state": found["state"], "param_groups": [first, second | other]}


G, S = ("param_groups", 0), ("state", 0)
DAMAGED = {
    "no state": (without("state"), "must have the keys 'state' and 'param_groups', got ['param_groups']"),
    "no groups": (without("param_groups"), "must have the keys 'state' and 'param_groups', got ['state']"),
    "a checkpoint": (
        {"model": {}, "optimizer": state_dict("adam")},
        "must have the keys 'state' and 'param_groups', got ['model', 'optimizer']",
    ),
    "groups no list": (changed("param_groups", to={}), "param_groups must be a list of at least one dict, got {}"),
    "groups empty": (changed("param_groups", to=[]), "param_groups must be a list of at least one dict, got []"),
    "group no dict": (changed(*G, to=7), "param_groups[0] must be a dict, got 7 of type int"),
    "state no dict": (changed("state", to=[]), "state must be a dict, got []"),
    "sgd": (changed(*G, "betas", to=KeyError), "param_groups[0] has no 'betas': is it of torch.optim.Adam or AdamW?"),
    "radam": (changed(*G, "amsgrad", to=KeyError), "param_groups[0] has no 'amsgrad': is it of torch.optim.Adam"),
    "no lr": (changed(*G, "lr", to=KeyError), "param_groups[0] has no 'lr'"),
    "lr negative": (changed(*G, "lr", to=-1.0), "param_groups[0]['lr'] must be finite and >= 0, got -1.0"),
    "lr NaN": (changed(*G, "lr", to=float("nan")), "param_groups[0]['lr'] must be finite and >= 0, got nan"),
    "lr text": (changed(*G, "lr", to="1e-3"), "param_groups[0]['lr'] must be a number"),
    "lr too large": (changed(*G, "lr", to=10**400), "param_groups[0]['lr'] must be a number that float64 holds"),
    "lr of shape (2,)": (
        changed(*G, "lr", to=np.ones(2)),
        "param_groups[0]['lr'] must be a number or an array of shape ()",
    ),
    "one beta": (changed(*G, "betas", to=(0.9,)), "param_groups[0]['betas'] must be a pair of numbers, got (0.9,)"),
    "beta 1": (changed(*G, "betas", to=(0.9, 1.0)), "param_groups[0]['betas'][1] must lie in [0, 1), got 1.0"),
    "eps": (changed(*G, "eps", to=-1e-8), "param_groups[0]['eps'] must be finite and >= 0, got -1e-08"),
    "decay": (changed(*G, "weight_decay", to=None), "param_groups[0]['weight_decay'] must be a number"),
    "amsgrad text": (changed(*G, "amsgrad", to="no"), "param_groups[0]['amsgrad'] must be True or False, got 'no'"),
    "decoupled 1": (
        changed(*G, "decoupled_weight_decay", to=1),
        "param_groups[0]['decoupled_weight_decay'] must be True or False, got 1",
    ),
    "maximize": (
        changed(*G, "maximize", to=True),
        "param_groups[0]['maximize'] must be False, got True: negate the grad",
    ),
    "params no list": (
        changed(*G, "params", to=4),
        "param_groups[0]['params'] must be a list of numbers or names, got 4",
    ),
    "params of floats": (
        changed(*G, "params", to=[0, 1, 2, 3.0]),
        "param_groups[0]['params'] must be a list of numbers",
    ),
    "params of flags": (changed(*G, "params", to=[0, True, 2, 3]), "must be a list of numbers or names, got True"),
    "twice": (changed(*G, "params", to=[0, 1, 2, 2]), "param_groups[0]['params'] has 2 a second time"),
    "twice over groups": (two_groups(params=[2, 1]), "param_groups[1]['params'] has 1 a second time"),
    "name twice": (
        changed(*G, "param_names", to=["a", "b", "c", "a"]),
        "param_groups[0]['param_names'] has 'a' a second time",
    ),
    "names too few": (
        changed(*G, "param_names", to=["a"]),
        "['param_names'] must be a list of a name for each of 'params'",
    ),
    "unknown in state": (changed("state", 9, to={}), "state has an entry 9, which is in no group"),
    "a flag as key": (changed("state", to={True: {}}), "state has an entry True, which is in no group"),
    "a float as key": (changed("state", to={1.0: {}}), "state has an entry 1.0, which is in no group"),
    "missing in groups": (changed(*G, "params", to=[0, 1, 2, 4]), "state has an entry 3, which is in no group"),
    "entry no dict": (changed(*S, to=3), "state[0] must be a dict, got 3"),
    "no moment": (
        changed(*S, "exp_avg_sq", to=KeyError),
        "state[0] must have the fields step, exp_avg, exp_avg_sq, got",
    ),
    "no step": (changed(*S, "step", to=KeyError), "state[0] must have the fields step, exp_avg, exp_avg_sq, got"),
    "nadam": (
        changed(*S, "mu_product", to=np.ones(())),
        "state[0] must have the fields step, exp_avg, exp_avg_sq, got",
    ),
    "no maximum": (
        changed(*S, "max_exp_avg_sq", to=KeyError, run="adam_amsgrad"),
        "must have the fields step, exp_avg, exp_avg_sq, max_exp_avg_sq, got",
    ),
    "a list": (changed(*S, "exp_avg", to=[1.0]), "state[0]['exp_avg'] must be a tensor, got [1.0]"),
    "two shapes": (
        changed(*S, "exp_avg", to=np.ones(3)),
        "state[0] must have moments of one shape, got [(3,), (4, 3)]",
    ),
    "step 1.5": (changed(*S, "step", to=1.5), "state[0]['step'] must be a whole number below 2^31, got 1.5"),
    "step 2^31": (changed(*S, "step", to=2**31), "state[0]['step'] must be a whole number below 2^31"),
    "step -1": (changed(*S, "step", to=-1), "state[0]['step'] must be finite and >= 0, got -1"),
    "step NaN": (changed(*S, "step", to=np.float32("nan")), "state[0]['step'] must be finite and >= 0, got nan"),
    "step True": (changed(*S, "step", to=True), "state[0]['step'] must be a number"),
    "NaN": (changed(*S, "exp_avg", to=of(np.nan)), "exp_avg of first.kernel must be finite, got nan"),
    "inf": (changed(*S, "exp_avg_sq", to=of(np.inf)), "exp_avg_sq of first.kernel must be finite, got inf"),
    "negative": (changed(*S, "exp_avg_sq", to=of(-0.5)), "exp_avg_sq of first.kernel must be >= 0, got -0.5"),
    "negative maximum": (
        changed(*S, "max_exp_avg_sq", to=of(-0.5), run="adam_amsgrad"),
        "max_exp_avg_sq of first.kernel must be >= 0, got -0.5",
    ),
    "float64": (
        changed(*S, "exp_avg", to=np.ones((4, 3))),
        "exp_avg of first.kernel must be at most float32, got float64: cast it first",
    ),
    "int32": (
        changed(*S, "exp_avg", to=np.ones((4, 3), int)),
        "exp_avg of first.kernel must be of a floating dtype, got int64",
    ),
    "complex": (changed(*S, "exp_avg", to=np.ones((4, 3), "c8")), "must be of a floating dtype, got complex64"),
    "objects": (changed(*S, "exp_avg", to=np.full((4, 3), None)), "must be of a floating dtype, got object"),
    "two steps": (
        changed(*S, "step", to=49),
        "all parameters that one Adam steps must be at one step, got first.bias at 50, first.kernel at 49",
    ),
    "one has not begun": (
        changed("state", 1, to={}),
        "torch has no moments of first.bias yet, but of others: if torch does not train it, freeze it",
    ),
    "two rates": (two_groups(lr=0.5), "learning_rate: torch has 0.5 for second.kernel, tx 0.01; allow="),
    "two betas": (two_groups(betas=(0.9, 0.5)), "b2: torch has 0.5 for second.kernel, tx 0.999; allow="),
    "two algorithms": (
        two_groups(amsgrad=True),
        "state[2] must have the fields step, exp_avg, exp_avg_sq, max_exp_avg_sq",
    ),
    "mapping of other names": (
        by_name(two_groups(params=[2, 3], param_names=["x", "y"])),
        "torch no 'second.weight', only",
    ),
    "no names": (nameless(state_dict("adam")), "state_dict has numbers and no names, and their order is not guessed"),
}


def transposed():
    found = state_dict("adam")
    for name in ("exp_avg", "exp_avg_sq"):
        found["state"][0][name] = found["state"][0][name].T
    return found


DAMAGED["transposed"] = (transposed(), "exp_avg of first.kernel must have shape (4, 3), got (3, 4)")


@pytest.mark.parametrize("case", DAMAGED)
def test_a_state_dict_is_refused_by_name(case, monkeypatch):
    found, message = DAMAGED[case]
    tx = ADAM if "max" not in message else adamite.amsgrad(1e-2, max_before_correction=True)

    def init(params):
        assert all(isinstance(p, jax.core.Tracer) for p in jax.tree.leaves(params)), "made before all was checked"
        return tx.init(params)

    looked_at = optax.GradientTransformationExtraArgs(init, tx.update)
    looked_at.identity = tx.identity
    with pytest.raises(RefusedError, match=re.escape(message)):
        interop.from_torch(found, looked_at, PARAMS, MAPPING)


@pytest.mark.parametrize("found", [None, 7, [], "adam.pt", b"bytes"])
def test_what_is_no_dict(found):
    for use in (lambda: interop.from_torch(found, ADAM, PARAMS), lambda: interop.torch_optimizer(found)):
        with pytest.raises(TypeError, match="state_dict must be a dict, got"):
            use()


OTHERS = {
    "learning_rate: torch has 0.01, tx 0.001": adamite.adam(1e-3),
    "b1: torch has 0.9, tx 0.8": adamite.adam(1e-2, 0.8),
    "b2: torch has 0.999, tx 0.99": adamite.adam(1e-2, b2=0.99),
    "eps: torch has 1e-08, tx 1e-06": adamite.adam(1e-2, eps=1e-6),
    "eps_root: torch has 0.0, tx 1e-08": adamite.adam(1e-2, eps_root=1e-8),
    "nesterov: torch has False, tx True": adamite.adam(1e-2, nesterov=True),
    "bias_correction: torch has True, tx False": adamite.adam(1e-2, bias_correction=False),
    "weight_decay: torch has 0.0, tx 0.1": adamite.adamw(1e-2, weight_decay=0.1),
    "amsgrad: torch has False for first.kernel, tx True": adamite.amsgrad(1e-2, max_before_correction=True),
}


@pytest.mark.parametrize("message", OTHERS)
def test_another_transformation_is_refused_unless_allowed(message):
    tx, name = OTHERS[message], message.split(":")[0]
    with pytest.raises(RefusedError, match=re.escape(message)):
        interop.from_torch(state_dict("adam"), tx, PARAMS, MAPPING)
    if name == "amsgrad":  # other moments
        with pytest.raises(ValueError, match="allow must be one of"):
            interop.from_torch(state_dict("adam"), tx, PARAMS, MAPPING, allow="amsgrad")
    else:
        interop.from_torch(state_dict("adam"), tx, PARAMS, MAPPING, allow=name)


@pytest.mark.parametrize(
    ("run", "tx", "message"),
    [
        ("adam_amsgrad", ADAM, "amsgrad: torch has True for first.kernel, tx False"),
        ("adam_amsgrad", adamite.amsgrad(1e-2), "max_before_correction: torch has True, tx False"),
        ("adamw", adamite.chain(adamite.add_decayed_weights(0.1), ADAM), "decoupled: torch has True, tx False"),
        ("adamw", adamite.adamw(1e-2, weight_decay=0.2), "weight_decay: torch has 0.1, tx 0.2"),
        (
            "adamw",
            adamite.chain(ADAM, adamite.add_decayed_weights(0.1, after_learning_rate=True)),
            "after_learning_rate: torch has False, tx True",
        ),
        ("adamw_groups", adamite.adamw(1e-2, weight_decay=0.1), "mask: tx decays first.bias, torch does not"),
        (
            "adamw",
            adamite.adamw(1e-2, weight_decay=0.1, mask={"first": True, "second": False}),
            "mask: torch decays second.kernel, tx does not",
        ),
    ],
)
def test_other_algorithms_are_refused(run, tx, message):
    with pytest.raises(RefusedError, match=re.escape(message)):
        interop.from_torch(state_dict(run), tx, PARAMS, MAPPING)


@pytest.mark.parametrize(
    ("tx", "message"),
    [
        (adamite.nadam(1e-2), "tx must be Adam, AdamW or AMSGrad, got nadam"),
        (adamite.lamb(1e-2), "tx must be Adam, AdamW or AMSGrad, got lamb"),
        (adamite.chain(adamite.add_decayed_weights(0.1), adamite.adamw(1e-2)), "tx must decay weights in one place"),
        (
            adamite.sgd(1e-2),
            "state of tx must have one ScaleByAdamState or ScaleByAmsgradState of each parameter, got none",
        ),
        (
            optax.chain(optax.adam(1e-2), optax.adam(1e-2)),
            "must have one ScaleByAdamState or ScaleByAmsgradState of each parameter, got two of first.bias",
        ),
    ],
)
def test_what_torch_has_not(tx, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        interop.from_torch(state_dict("adam"), tx, PARAMS, MAPPING, allow=["learning_rate"])
    with pytest.raises(ValueError, match=re.escape(message)):
        interop.to_torch(tx.init(PARAMS), tx, PARAMS, MAPPING)


HALF = {path: there for path, there in MAPPING.items() if path.startswith("first")}
MORE = PARAMS | {"third": jnp.ones(2)}
COMPLEX = jax.tree.map(lambda p: p.astype(jnp.complex64), PARAMS)


@pytest.mark.parametrize(
    ("params", "mapping", "message"),
    [
        (MORE, MAPPING | {"third": "third"}, "params has 'third', torch no 'third', only"),
        ({"first": PARAMS["first"]}, HALF, "torch has a parameter 2, params none for it"),
        (
            MORE,
            MAPPING | {"third": 1},
            "mapping must give each parameter another of torch's, got one by its number and",
        ),
        (PARAMS, NUMBERED | {"second.bias": 7}, "params has 'second.bias', torch no 7, only"),
        (COMPLEX, MAPPING, "params must be of real floating dtypes, got complex64 for first.kernel"),
    ],
)
def test_other_parameters(params, mapping, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        interop.from_torch(state_dict("adam"), ADAM, params, mapping)


def test_what_tx_leaves_out():
    tx = optax.masked(ADAM, {"first": {"kernel": True, "bias": False}, "second": True})
    with pytest.raises(RefusedError, match=r"torch has moments of first\.bias, tx leaves it out"):
        interop.from_torch(state_dict("adam"), tx, PARAMS, MAPPING)


def test_what_is_no_transformation():
    with pytest.raises(TypeError, match="tx must be a gradient transformation, got 'adam'"):
        interop.from_torch(state_dict("adam"), "adam", PARAMS, MAPPING)


class TestTorchOptimizer:
    def test_old_state_dicts_do_not_say_how_they_decay(self):
        found = nameless(state_dict("adamw"))
        with pytest.raises(ValueError, match=re.escape("decoupled must be True (AdamW) or False (Adam)")):
            interop.torch_optimizer(found)
        parts = [part["name"] for part in interop.torch_optimizer(found, decoupled=False).identity["parts"]]
        assert parts == ["add_decayed_weights", "scale_by_adam", "scale_by_learning_rate"]
        parts = [part["name"] for part in interop.torch_optimizer(found, decoupled=True).identity["parts"]]
        assert parts == ["scale_by_adam", "add_decayed_weights", "scale_by_learning_rate"]

    def test_a_contradiction(self):
        with pytest.raises(ValueError, match="decoupled must be True, as the state dict says, got False"):
            interop.torch_optimizer(state_dict("adamw"), decoupled=False)
        with pytest.raises(TypeError, match="decoupled must be True or False"):
            interop.torch_optimizer(state_dict("adamw"), decoupled="yes")

    def test_a_mask_needs_params(self):
        with pytest.raises(ValueError, match="params must be given, as torch's groups differ, in whether they decay"):
            interop.torch_optimizer(state_dict("adamw_groups"))

    def test_storage_and_rounding_are_passed_on(self):
        tx = interop.torch_optimizer(state_dict("adamw"), moments="int8", rounding="residual8")
        types = [x.dtype.name for x in jax.tree.leaves(tx.init({"w": jnp.ones((64, 256), jnp.bfloat16)}))]
        assert types.count("int8") + types.count("uint8") == 3


class TestToTorch:
    STATE = ADAM.init(PARAMS)

    @pytest.mark.parametrize(
        ("tx", "message"),
        [
            (adamite.adam(1e-2, nesterov=True), "nesterov must be False, torch has nothing else, got True"),
            (adamite.adam(1e-2, eps_root=1e-3), "eps_root must be 0.0, torch has nothing else, got 0.001"),
            (optax.adam(1e-2), "tx does not say its learning_rate: give like"),
            (adamite.scale_by_adam(), "tx does not say its learning_rate: give like"),
        ],
    )
    def test_what_torch_cannot_say(self, tx, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            interop.to_torch(tx.init(PARAMS), tx, PARAMS, MAPPING)

    def test_a_count_that_float32_does_not_hold(self):
        state = (self.STATE[0]._replace(count=jnp.int32(2**24 + 1)), *self.STATE[1:])
        with pytest.raises(ValueError, match="step must be a whole number that float32 holds, as torch counts in it"):
            interop.to_torch(state, ADAM, PARAMS, MAPPING)

    def test_a_state_of_other_parameters(self):
        _, state = ADAM.update({"w": jnp.ones(3)}, ADAM.init({"w": jnp.ones(3)}))
        with pytest.raises(ValueError, match=re.escape("mu of w must have shape (2,), got (3,)")):
            interop.to_torch(state, ADAM, {"w": jnp.ones(2)})
        with pytest.raises(ValueError, match="state must be of params, got moments of w"):
            interop.to_torch(state, ADAM, {"v": jnp.ones(3)})

    def test_like_of_another_optimizer(self):
        for run, message in (
            ("adam_amsgrad", "amsgrad: like has True for first.kernel, tx False"),
            ("adam_l2", "b1: like has 0.8, tx 0.9"),
        ):
            with pytest.raises(RefusedError, match=re.escape(message)):
                interop.to_torch(self.STATE, ADAM, PARAMS, MAPPING, like=state_dict(run))
        with pytest.raises(TypeError, match="like must be a dict"):
            interop.to_torch(self.STATE, ADAM, PARAMS, MAPPING, like=[])
