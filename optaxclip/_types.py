"""The nouns of the library: NamedTuples of pure functions, or of arrays.

    clip = scope  x  norm  x  threshold rule  x  response

A method is one choice of each, given to `optaxclip.clip`. Nothing here is
registered and nothing is inherited: a new part is a new value of these types.

Words used everywhere: a *group* is a set of numbers that share one *size* (what
is measured) and one *limit* (what the size may be). A *block* is one array of
sizes: `[groups]` where groups are made of whole leaves, and one array per leaf,
shaped to broadcast against it, where a leaf holds many groups.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from optaxclip._naming import is_known, numbers

Axes = tuple[int, ...]
"""Axes of one leaf, counted from the front."""

Response = Callable[..., Array]
"""`(gradient, size, limit) -> gradient` on one leaf, where size and limit broadcast.

A response with a `target` tells the size after clipping. After any other response the gradient is
measured again; where every element is a group, the response is applied to the sizes themselves.
"""

Partials = tuple[Any, ...]
"""The partial results of a norm, each an array or a list of arrays."""

Join = Callable[[Any], Any]
"""The sum or the maximum over the parts of a whole, of every array in a tree."""


class Scope(NamedTuple):
    """Which numbers share one size.

    Attributes:
        group: `path -> name`. Leaves of one name are measured jointly; `None` as a
            name leaves the leaf alone. Without it, every leaf is a group.
        axes: `(path, leaf) -> axes measured together`, for scopes finer than a leaf;
            `None` as axes leaves the leaf alone. Without it, leaves are measured whole.
        where: `path -> bool`, which leaves are measured and clipped; all without it.
        batch: `(path, leaf) -> axes` along which a leaf is a stack of layers, for groups of leaves:
            each layer of a group has a size.
        by_shape: whether `axes` goes by the lengths of a leaf's axes, so that it can't be trusted
            with one device's part of a leaf.
        key: `path -> key` of a dict of thresholds, None for the path; for scopes without `group`.
        name: how it prints.
    """

    group: Callable[[str], str | None] | None = None
    axes: Callable[[str, Any], Axes | None] | None = None
    where: Callable[[str], bool] | None = None
    batch: Callable[[str, Any], Axes] | None = None
    by_shape: bool = False
    key: Callable[[str], str | None] | None = None
    name: str = ""

    def __repr__(self) -> str:
        return self.name or "Scope()"


class Norm(NamedTuple):
    """How large an array is, computed from *partials*: sums or maxima that can be combined.

    Attributes:
        partials: `(magnitudes, axes) -> partials`, a tuple of reductions over the axes of one leaf,
            which are kept with length 1.
        join: `(partials, total, largest) -> partials` of a whole from those of its parts.
            `total(x)` and `largest(x)` are the sum and the maximum over the parts, of every array
            in a tree `x`. Zeros add nothing.
        root: `(*partials) -> sizes`.
        fast: the same by fewer operations, for where float64 is at hand. In float64 it is right for
            all numbers in float32, in float32 for sizes from 2^-30 to the root of the largest
            float, and infinite above.
        magnitude: how large one element is: real, not negative, and NaN for NaN.
        uses_params: whether `magnitude` is `(element, parameter) -> magnitude`.
        name: how it prints.
    """

    partials: Callable[[Array, Axes], tuple[Array, ...]]
    join: Callable[[Partials, Join, Join], Partials]
    root: Callable[..., Array]
    fast: "Norm | None" = None
    magnitude: Callable[..., Array] = jnp.abs
    uses_params: bool = False
    name: str = ""

    def __repr__(self) -> str:
        return self.name or "Norm()"


class Context(NamedTuple):
    """What a rule may know besides the sizes.

    Attributes:
        step: int32 scalar, updates completed so far.
        param_sizes: the parameters measured by the same scope and norm, a block like
            `sizes`; None unless the rule says `uses_params`.
        blocks: all sizes of the tree, a block for each leaf if a leaf holds many groups; in a dict
            of thresholds those of the groups whose rules say `joint`, and empty for all others.
        extra: the extra arguments of this `update`, by name: `update(..., value=loss)`.
    """

    step: Array
    param_sizes: Any = None
    blocks: tuple[Array, ...] = ()
    extra: Mapping[str, Any] = {}


class Threshold(NamedTuple):
    """How large a size may be: a rule, written once for a block of any shape.

    Every array in the rule's state ends in the block's shape. The engine keeps what
    was learned clean: where a size is zero or not finite, `learn` changes nothing.

    Attributes:
        init: `sizes -> state`; only the shape and dtype of `sizes` mean anything.
        limit: `(sizes, state, context) -> limits`, that broadcast against `sizes`. `inf` means do
            not clip.
        learn: `(sizes, clipped_sizes, state, context) -> state`, where the clipped sizes are those
            after the response; of a group that it drops, as `responses.drop` does, they are the
            limit.
        uses_params: whether `context.param_sizes` is needed.
        name: how it prints.
        joint: whether the limit depends on the sizes of other groups (`context.blocks`).
        signed: whether it takes sizes of either sign, as `skip_spikes` needs to watch a loss.
    """

    init: Callable[[Array], Any]
    limit: Callable[[Array, Any, Context], Array]
    learn: Callable[[Array, Array, Any, Context], Any]
    uses_params: bool = False
    name: str = ""
    joint: bool = False
    signed: bool = False

    def __repr__(self) -> str:
        return self.name or "Threshold()"


ThresholdLike = ArrayLike | Callable[[Array], Any] | Threshold
"""A number or scalar array (traced, too), a schedule `step -> limit`, or a rule."""


class _ByNames(type):
    """Types that are equal if their names are, or if those of one are not known."""

    known: tuple[str, ...] | None

    def __eq__(cls, other: object) -> bool:
        return isinstance(other, _ByNames) and (
            cls.known is None or other.known is None or cls.known == other.known
        )

    def __hash__(cls) -> int:
        return hash(_ByNames)


class Names(tuple, metaclass=_ByNames):
    """The names of groups: an empty NamedTuple, whose type holds them.

    So a state has names that are static under `jit`, and neither leaves nor keys for them: nothing
    to save, restore or shard. JAX compares NamedTuples by their types. What `optax.tree.map_params`
    makes of a state has names that are not known; they fit any others, and the next update fills
    them in.
    """

    __slots__ = ()
    _fields: ClassVar[tuple[str, ...]] = ()
    known: ClassVar[tuple[str, ...] | None] = None

    @staticmethod
    def of(names: "tuple[str, ...] | list[str]") -> "Names":
        """These names."""
        return _ByNames("Names", (Names,), {"__slots__": (), "known": tuple(names)})()

    def __reduce__(self) -> Any:
        return (Names, ()) if self.known is None else (Names.of, (self.known,))

    def __repr__(self) -> str:
        return f"Names{self.known}" if self.known else "Names()"


class Reading(NamedTuple):
    """What the last step measured and did, and counts over all steps.

    There is one number per group, or per leaf where a leaf holds many groups: then
    sizes and limit are the largest in the leaf. They are packed in few arrays because a
    compiled step is cheaper with few results; read them by name.

    Attributes:
        measured: float `[4, groups]`, the four below.
        counted: int32 `[2]`, the two below.
        recent_share: float32 scalar, share of recent steps in which something was clipped: a moving
            average with the decay 0.99, corrected for its start.
        names: of the groups, in their order; read them with `telemetry.group_names`.
        size_before: `[groups]`, sizes before clipping.
        size_after: `[groups]`, sizes after clipping.
        limit: `[groups]`, what the sizes were allowed to be.
        clipped_share: `[groups]`, share of the group that was over its limit: 0 or 1 where it is
            one group.
        clipped_steps: scalar, steps in which something was clipped.
        nonfinite_steps: scalar, steps in which some size was not finite.
    """

    measured: Array
    counted: Array
    recent_share: Array
    names: Names = Names()

    size_before = property(lambda self: self.measured[..., 0, :])
    size_after = property(lambda self: self.measured[..., 1, :])
    limit = property(lambda self: self.measured[..., 2, :])
    clipped_share = property(lambda self: self.measured[..., 3, :])
    clipped_steps = property(lambda self: self.counted[..., 0])
    nonfinite_steps = property(lambda self: self.counted[..., 1])

    def __repr__(self) -> str:
        whole = getattr(self.measured, "ndim", 0) >= 2  # no placeholder of Optax or JAX
        if not whole or not all(map(is_known, self[:3])):
            packed = zip(("measured", "counted", "recent_share"), map(numbers, self), strict=False)
            return f"Reading({', '.join(f'{field}={shown}' for field, shown in packed)})"
        fields = (
            "size_before size_after limit clipped_share clipped_steps nonfinite_steps recent_share"
        ).split()
        shown = (f"{field}={numbers(getattr(self, field))}" for field in fields)
        return f"Reading({', '.join(shown)}, names={list(self.names.known or ())})"


class ClipState(NamedTuple):
    """State of one clip in an optimizer state; the same structure, shapes and dtypes at every step.

    Attributes:
        step: int32 scalar, updates completed.
        threshold: state of the threshold rule. For scopes finer than a leaf each of its arrays is a
            tree like the parameters, with a zero in place of what is not measured; so
            `optax.tree.map_params` finds it, and shards it as it does them.
        reading: what the last step measured; `optax.EmptyState` with `record=False`.
    """

    step: Array
    threshold: Any
    reading: Reading | Any

    def __repr__(self) -> str:
        threshold = jax.tree.map(_Shown, self.threshold)
        return (
            f"{type(self).__name__}(step={numbers(self.step)}, threshold={threshold}, "
            f"reading={self.reading})"
        )


class _Shown:
    """A leaf that prints in a few words."""

    def __init__(self, value: Any):
        self.text = numbers(value)

    def __repr__(self) -> str:
        return self.text
