"""Gradient clipping for JAX: every method is scope x norm x threshold rule x response."""

from optaxclip import norms as norms
from optaxclip import per_example as per_example
from optaxclip import plots as plots
from optaxclip import responses as responses
from optaxclip import scopes as scopes
from optaxclip import telemetry as telemetry
from optaxclip import testing as testing
from optaxclip import thresholds as thresholds
from optaxclip._backward import clip_activation_grad as clip_activation_grad
from optaxclip._backward import clip_cotangent as clip_cotangent
from optaxclip._clip import clip as clip
from optaxclip._feedback import error_feedback as error_feedback
from optaxclip._guard import skip_nonfinite as skip_nonfinite
from optaxclip._guard import skip_spikes as skip_spikes
from optaxclip._keep import keep_params as keep_params
from optaxclip._precondition import clip_after as clip_after
from optaxclip._types import ClipState as ClipState
from optaxclip._types import Context as Context
from optaxclip._types import Norm as Norm
from optaxclip._types import Reading as Reading
from optaxclip._types import Scope as Scope
from optaxclip._types import Threshold as Threshold
from optaxclip.methods import adagc as adagc
from optaxclip.methods import adaptive_grad_clip as adaptive_grad_clip
from optaxclip.methods import autoclip as autoclip
from optaxclip.methods import clip_by_block_rms as clip_by_block_rms
from optaxclip.methods import clip_by_global_norm as clip_by_global_norm
from optaxclip.methods import clip_by_norm as clip_by_norm
from optaxclip.methods import clip_by_trust_ratio as clip_by_trust_ratio
from optaxclip.methods import clip_by_value as clip_by_value
from optaxclip.methods import clippy as clippy
from optaxclip.methods import gradient_stabilizer as gradient_stabilizer
from optaxclip.methods import growth_clip as growth_clip
from optaxclip.methods import history_clip as history_clip
from optaxclip.methods import log_norm_clip as log_norm_clip
from optaxclip.methods import max_norm as max_norm
from optaxclip.methods import qk_clip as qk_clip
from optaxclip.methods import quantile_clip as quantile_clip
from optaxclip.methods import scale_by_stable_adam as scale_by_stable_adam
from optaxclip.methods import spam_clip as spam_clip
from optaxclip.methods import spectral_clip as spectral_clip
from optaxclip.methods import zclip as zclip

__all__ = [
    "clip",
    "clip_by_block_rms",
    "clip_by_global_norm",
    "clip_by_norm",
    "clip_by_trust_ratio",
    "clip_by_value",
    "adaptive_grad_clip",
    "adagc",
    "autoclip",
    "clippy",
    "gradient_stabilizer",
    "growth_clip",
    "history_clip",
    "log_norm_clip",
    "max_norm",
    "qk_clip",
    "quantile_clip",
    "scale_by_stable_adam",
    "spam_clip",
    "spectral_clip",
    "zclip",
    "clip_activation_grad",
    "clip_cotangent",
    "clip_after",
    "error_feedback",
    "keep_params",
    "skip_nonfinite",
    "skip_spikes",
    "scopes",
    "norms",
    "thresholds",
    "responses",
    "telemetry",
    "per_example",
    "plots",
    "testing",
    "Scope",
    "Norm",
    "Threshold",
    "Context",
    "Reading",
    "ClipState",
]


def __dir__() -> list[str]:
    return __all__
