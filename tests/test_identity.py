"""Every transformation of ours says what it is."""

import inspect

import optax
import pytest

import adamite
from adamite.identity import described
from adamite.sharding import offload
from specs import SPECS

WITHOUT = {"bias_correction", "update_moment", "convert_moments", "full_weights", "memory_report", "telemetry"}
WITHOUT |= {"adam_mini_partition", "identity", "map_with_path", "ema_params", "convert_weights"}
BUILDERS = [name for name in adamite.__all__ if inspect.isfunction(getattr(adamite, name)) and name not in WITHOUT]


@pytest.mark.parametrize("name", BUILDERS)
def test_builders_are_described_and_keep_their_signatures(name):
    build = getattr(adamite, name)
    assert build.__wrapped__.__name__ == name
    assert inspect.signature(build) == inspect.signature(build.__wrapped__)
    assert build.__doc__ == build.__wrapped__.__doc__


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.make.__name__ in BUILDERS], ids=str)
def test_all_arguments_are_told(spec):
    told = adamite.identity(spec.build(**spec.flags[-1]))
    assert told["name"] == spec.make.__name__
    assert set(told) == {"name", *inspect.signature(spec.make).parameters}
    for name, value in spec.flags[-1].items():
        assert told[name] == value


def test_nested():
    tx = adamite.skip_nonfinite(adamite.chain(optax.clip(1.0), adamite.cautious(adamite.scale_by_adam(0.8))))
    told = adamite.identity(tx)
    assert (told["name"], told["tx"]["name"], told["tx"]["parts"][0]) == (
        "skip_nonfinite",
        "chain",
        {"name": "optax.clip"},
    )
    assert told["tx"]["parts"][1]["tx"]["b1"] == 0.8
    assert adamite.identity(offload(adamite.sgd(0.1)))["tx"]["learning_rate"] == 0.1


def test_a_recipe_is_itself_and_not_what_it_calls():
    assert adamite.identity(adamite.nadamw(1e-3))["name"] == "nadamw"
    assert adamite.identity(adamite.nadamw(1e-3))["weight_decay"] == 1e-4


def test_what_is_given_is_a_copy_and_transformations_stay_as_they_are():
    tx = adamite.adam(1e-3)
    adamite.identity(tx)["b1"] = 0.5
    assert adamite.identity(tx)["b1"] == 0.9
    init, update = tx
    assert hash(tx) == hash(adamite.core.tree_pass.Leafwise(init, update))
    assert adamite.identity(optax.adam(1e-3)) == {"name": "optax.chain"}


def test_a_refused_argument_is_refused_as_before():
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'learning_rate'"):
        adamite.adam()

    @described
    def build(*, rate: float) -> optax.GradientTransformationExtraArgs:
        del rate
        return optax.with_extra_args_support(optax.identity())

    assert adamite.identity(build(rate=2.0)) == {"name": "build", "rate": 2.0}
