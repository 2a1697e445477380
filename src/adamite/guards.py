"""Steps that are left out: those that would leave a NaN or an infinity behind, and those of spiking gradients.

A guard tries a step and looks at all that it would change. If anything is wrong, nothing is changed: moments, counts,
residuals and schedules stay as they are, to the bit, and the updates are -0, which is what leaves every number as it
is (0 + -0 is 0, and -0 + -0 is -0). The guard counts, and tells in its state; it raises nothing, and it never lets a
NaN through, however many come.

    skip_nonfinite    every gradient, every update and every new number of the state is finite
    skip_spikes       and neither the gradients' norm nor, with loss=True, the loss is far above those of the last steps

How far is that of OLMo-core, the program that OLMo 2 was trained with (SkipStepOptimizer; Walsh et al. 2025,
arXiv:2501.00656, describe the models): a norm or a loss is a spike if it is above

    mean + 6 std        of the last 128, from half of them on

Deviations from that program:

1. It looks at the loss always, here an optimizer has to be told the loss; it also skips norms that are too small; and
   it waits for 20 norms at least.
2. Of a spike it records all; here only as much as is allowed, so that one spike does not hide the next. A norm that
   stays high is learnt in some tens of steps.
3. A std below a hundredth of the mean counts as a hundredth: steady norms differ by rounding.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adamite import checks, engines
from adamite.core.norms import norm
from adamite.core.optimizer import Optimizer, as_optimizer, optimizer
from adamite.core.ownership import owned
from adamite.core.placement import settle
from adamite.core.skipping import all_finite, no_updates, params_if, step_if
from adamite.core.spikes import Norms, Seen, nothing_seen, watched
from adamite.identity import described
from adamite.numerics import as_array, is_none, is_traced, over_devices


class SkipState(NamedTuple):
    """State of `skip_nonfinite` and `skip_spikes`."""

    skipped: Any  # int32, shape (): steps left out so far
    consecutive: Any  # int32, shape (): of these, the last in a row
    gave_up: Any  # bool, shape (): whether ever max_consecutive were left out in a row
    norms: Any  # Norms; with loss=True Seen; () for skip_nonfinite
    inner: Any  # the state of what is guarded, as if the skipped steps had never come


@described
def skip_nonfinite(
    tx: optax.GradientTransformation,
    max_consecutive: int | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Optimizer:
    """Leave out every step that holds a NaN or an infinity: in a gradient, an update, or what the state would become.

    A step left out changes no parameter and nothing of the state of `tx`, to the bit; the next is taken as if it had
    never come. (Parameters that are subnormal become 0 where a device flushes such numbers.) A gradient of 1e30, whose
    square is infinite in float32, would kill its second moment for ever, and is left out, too.

    Args:
        tx: any gradient transformation: the whole optimizer, best outermost; inside of `adamite.sharding.zero1`.
        max_consecutive: after so many in a row, >= 1, ``gave_up`` is True in the state, and stays so; steps are judged
            as before. None: never. Look at it now and then: what to do is yours to say.
        axis_name: the mesh axes, or pmap's, over which devices have different gradients or parts of them, inside of
            shard_map and pmap: they decide as one. Under jit, leave it out.

    Returns:
        The transformation. Its state is a `SkipState`. It tries each step once before it is taken: one pass more over
        gradients, parameters and state.

    Raises:
        TypeError: `tx` is no gradient transformation; an argument is the wrong kind of thing.
        ValueError: `max_consecutive` is < 1.

    Example:
        >>> from adamite import adam
        >>> tx, params = skip_nonfinite(adam(0.1)), jnp.ones(2)
        >>> state = tx.init(params)
        >>> for g in ([1.0, 1.0], [jnp.nan, 1.0], [1.0, 1.0]):
        ...     updates, state = tx.update(jnp.array(g), state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> print(f"{params[0]:.1f}", state.skipped, state.inner[0].count)
        0.8 1 2
    """
    return _guard(tx, None, max_consecutive, axis_name)


@described
def skip_spikes(
    tx: optax.GradientTransformation,
    *,
    window: int = 128,
    factor: float = 6.0,
    loss: bool = False,
    max_consecutive: int | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Optimizer:
    """Leave out steps whose gradients are far larger than those before, and all that `skip_nonfinite` leaves out.

    With ``loss=True`` each update is given the loss, ``tx.update(grads, state, params, loss=value)``, and so is
    ``tx.step``. Steps whose loss is far larger than those before are then left out, too, and those whose loss is not
    finite. Losses are judged as norms are. Inside of `adamite.accumulate` the loss is that of the micro-batch with
    which the step is due.

    Args:
        tx: see `skip_nonfinite`.
        window: a whole number >= 2, in steps: with how many of the last norms one is compared. The first half of them
            is recorded without judgement.
        factor: finite, >= 0: how many standard deviations above the mean are allowed.
        loss: True: each update needs the extra argument ``loss``, or ``value``, as optax's line searches call it: a
            real number, or an array of shape (). The extra arguments go on to `tx`. False: they only go on to `tx`.
        max_consecutive: see `skip_nonfinite`.
        axis_name: see `skip_nonfinite`; the norm is then of all devices' parts together, and the loss is the mean of
            the devices' losses.

    Returns:
        The transformation. Its state is a `SkipState`, with the norms, and with the losses.

    Raises:
        TypeError: `tx` is no gradient transformation; an argument is the wrong kind of thing; at update, the loss is
            missing or is no real number.
        ValueError: an argument is out of its range; at update, the loss is not of shape ().

    Example:
        >>> from adamite import adam
        >>> tx = skip_spikes(adam(0.1), window=4)
        >>> params = jnp.ones(2)
        >>> state = tx.init(params)
        >>> for scale in (1.0, 1.1, 0.9, 1.0, 50.0, 1.0):
        ...     _, state = tx.update(scale * jnp.ones(2), state, params)
        >>> print(state.skipped, state.inner[0].count)
        1 5
    """
    window = checks.whole("window", window, lowest=2)
    spikes = Spikes(window, checks.non_negative("factor", factor), checks.flag("loss", loss))
    return _guard(tx, spikes, max_consecutive, axis_name)


class Spikes(NamedTuple):
    """What `skip_spikes` looks for."""

    window: int
    factor: Any
    loss: bool


def _guard(tx: Any, spikes: Spikes | None, max_consecutive: Any, axis_name: Any) -> Optimizer:
    """Both guards."""
    inner = as_optimizer(checks.transformation("tx", tx))
    limit = None if max_consecutive is None else checks.whole("max_consecutive", max_consecutive, lowest=1)
    axes = checks.axis_name(axis_name)

    def init(params: optax.Params) -> SkipState:
        norms: Any = ()
        if spikes:
            norms = nothing_seen(spikes.window)
        if spikes and spikes.loss:
            norms = Seen(norms, nothing_seen(spikes.window))
        counts = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), jnp.zeros((), bool)
        return settle(SkipState(*counts, norms, inner.init(params)), params)

    def judged(gradients: Any, state: Any, updates: Any, stepped: Any, loss: Any) -> tuple[jax.Array, SkipState]:
        """Whether a step that was tried is good; and the state, but for the inner one."""
        good, norms = _all_good(gradients, state.inner, updates, stepped, axes), state.norms
        if spikes and spikes.loss:
            good, *rings = watched([norm(gradients, axes), loss], good & jnp.isfinite(loss), norms, spikes.factor)
            norms = Seen(*rings)
        elif spikes:
            good, norms = watched([norm(gradients, axes)], good, [norms], spikes.factor)
        skipped = jnp.where(good, state.skipped, optax.safe_increment(state.skipped))
        consecutive = jnp.where(good, 0, optax.safe_increment(state.consecutive))
        gave_up = state.gave_up if limit is None else state.gave_up | (consecutive >= limit)
        return good, SkipState(skipped, consecutive, gave_up, norms, state.inner)

    def trial(updates: Any, state: Any, params: Any, extra_args: dict[str, Any]) -> tuple[optax.Updates, Any]:
        """A step that is looked at only. XLA computes it within what looks at it, a kernel would write all of it."""
        with engines.asking("xla"):
            return inner.update(updates, state.inner, params, **extra_args)

    def check(updates: optax.Updates, state: Any) -> None:
        checks.differentiable(updates, "updates")
        if not isinstance(state, SkipState):
            raise TypeError(f"state must be a SkipState, got {type(state).__name__}")
        rings = state.norms if isinstance(state.norms, Seen) else (state.norms,)
        windows = [ring.values.size for ring in rings if isinstance(ring, Norms)]
        if windows != ([spikes.window] * (1 + spikes.loss) if spikes else []):
            kind = "skip_nonfinite, without norms"
            if spikes:
                losses = "losses" if spikes.loss else "no losses"
                kind = f"skip_spikes, with norms of window {spikes.window} and {losses}"
            raise TypeError(f"state must be one of {kind}")

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, SkipState]:
        check(updates, state)
        loss = _mean_loss(extra_args, axes) if spikes and spikes.loss else None
        do = functools.partial(inner.update, updates, state.inner, params, **extra_args)
        tried = trial(updates, state, params, extra_args)
        good, after = judged(updates, state, *tried, loss)
        again = do if is_traced(good) else lambda: tried
        new, kept = step_if(good, again, lambda: (no_updates(updates, tried[0]), state.inner), seldom_left_out=True)
        return new, after._replace(inner=kept)

    def take(grads: Any, state: Any, params: Any, engine: str, extra_args: Any) -> tuple[optax.Params, SkipState]:
        check(grads, state)
        loss = _mean_loss(extra_args, axes) if spikes and spikes.loss else None
        good, after = judged(grads, state, *trial(grads, state, params, extra_args), loss)
        do = functools.partial(inner.step, grads, state.inner, params, engine=engine, **extra_args)
        new, kept = params_if(good, do, lambda: (params, state.inner), grads, params)
        return new, after._replace(inner=kept)

    return optimizer(init, update, take)


def _all_good(gradients: Any, before: Any, updates: Any, after: Any, axes: tuple[str, ...]) -> jax.Array:
    """Whether all numbers are finite, on all devices.

    What belongs to one parameter is looked at together, so that it is computed and read in one pass, and not kept.
    All else may be infinite if it was before, as the best loss so far is at first.
    """
    leaves, structure = jax.tree.flatten(gradients, is_leaf=is_none)
    pairs = zip(leaves, structure.flatten_up_to(updates), strict=True)
    together = [[] if u is None else [as_array(g), u] for g, u in pairs]
    for (old, _, _), (new, _, owner) in zip(owned(before, structure), owned(after, structure), strict=True):
        if not jnp.issubdtype(getattr(new, "dtype", int), jnp.inexact):
            continue
        if owner is not None and together[owner] and new.shape == together[owner][0].shape:
            together[owner].append(new)
        else:
            together.append([jnp.where(jnp.isfinite(old), new, 0)])
    return all_finite([arrays for arrays in together if arrays], axes)


def _mean_loss(extra_args: dict[str, Any], axes: tuple[str, ...]) -> jax.Array:
    """The loss, a float32: the mean of those of all devices."""
    name = next((name for name in ("loss", "value") if extra_args.get(name) is not None), None)
    if name is None:
        raise TypeError(
            "loss is missing: skip_spikes was built with loss=True, so call update(grads, state, params, loss=value), "
            "or step(grads, state, params, loss=value)"
        )
    given = extra_args[name]
    dtype = jnp.result_type(type(given)) if isinstance(given, (int, float)) else getattr(given, "dtype", jnp.bool_)
    if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
        raise TypeError(f"{name} must be a real number or an array of shape (), got {given!r:.80}")
    if jnp.shape(given) != ():
        raise ValueError(f"{name} must be a real number or an array of shape (), got shape {jnp.shape(given)}")
    loss = jnp.asarray(given, jnp.float32)
    return jnp.asarray(over_devices(loss, loss, axes) / over_devices(1.0, loss, axes))
