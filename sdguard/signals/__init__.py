"""Signals: pure functions from an `Observation` to one float per image, one file each."""

from sdguard.signals.agreement import AGREEMENT
from sdguard.signals.attention_entropy import ATTENTION_ENTROPY
from sdguard.signals.bottleneck_shift import BOTTLENECK_SHIFT
from sdguard.signals.bottleneck_spread import BOTTLENECK_SPREAD
from sdguard.signals.condition_jacobian import CONDITION_JACOBIAN
from sdguard.signals.denoised_norm import DENOISED_NORM
from sdguard.signals.estimate_agreement import ESTIMATE_AGREEMENT, ESTIMATE_AGREEMENT_AHEAD
from sdguard.signals.guidance_detail import GUIDANCE_DETAIL
from sdguard.signals.guidance_norm import GUIDANCE_NORM
from sdguard.signals.guidance_peak import GUIDANCE_PEAK
from sdguard.signals.lid import LID_CONDITIONAL, LID_CONTRAST, LID_GUIDED, LID_NOISY, LID_UNCONDITIONAL
from sdguard.signals.low_noise_alignment import LOW_NOISE_ALIGNMENT
from sdguard.signals.output_density import OUTPUT_DENSITY, OUTPUT_DENSITY_AHEAD
from sdguard.signals.persistence import PERSISTENCE
from sdguard.signals.prediction_change import PREDICTION_CHANGE
from sdguard.signals.sharpness import CURVATURE, SHARPNESS
from sdguard.signals.signal import Signal
from sdguard.signals.update_norm import UPDATE_NORM

#: every signal, cheapest first.
SIGNALS: tuple[Signal, ...] = (
    GUIDANCE_NORM,
    GUIDANCE_PEAK,
    GUIDANCE_DETAIL,
    BOTTLENECK_SHIFT,
    DENOISED_NORM,
    UPDATE_NORM,
    CONDITION_JACOBIAN,
    PREDICTION_CHANGE,
    PERSISTENCE,
    ESTIMATE_AGREEMENT,
    ATTENTION_ENTROPY,
    LOW_NOISE_ALIGNMENT,
    LID_NOISY,
    SHARPNESS,
    ESTIMATE_AGREEMENT_AHEAD,
    LID_CONDITIONAL,
    LID_UNCONDITIONAL,
    LID_CONTRAST,
    LID_GUIDED,
    OUTPUT_DENSITY,
    BOTTLENECK_SPREAD,
    CURVATURE,
    AGREEMENT,
    OUTPUT_DENSITY_AHEAD,
)
