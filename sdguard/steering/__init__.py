"""Steering: ways to turn flagged samples away from a memorized picture. One file each; `fallback` tries them in order."""

from sdguard.steering.attention import ATTENTION_ATTENUATION
from sdguard.steering.baselines import EMBEDDING_NOISE, RANDOM_NUMBERS, RANDOM_TOKENS
from sdguard.steering.clamp import NORM_CLAMP
from sdguard.steering.descent import EMBEDDING_DESCENT, LID_ASCENT, TOKEN_DESCENT
from sdguard.steering.guidance import ATTRACTIVE_REPULSIVE, GUIDANCE_DELAY, OPPOSITE_GUIDANCE, WEAKENED_GUIDANCE
from sdguard.steering.method import Method, SteeringInput
from sdguard.steering.neutral import NEUTRAL_BLEND
from sdguard.steering.noise import NOISE_ADJUSTMENT, SAIL, SAIL_RELEASED
from sdguard.steering.padding import PADDING_DAMPING
from sdguard.steering.rewording import REWORDING

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        REWORDING, NEUTRAL_BLEND, PADDING_DAMPING, GUIDANCE_DELAY, OPPOSITE_GUIDANCE, WEAKENED_GUIDANCE, NORM_CLAMP, NOISE_ADJUSTMENT,
        ATTENTION_ATTENUATION, ATTRACTIVE_REPULSIVE, TOKEN_DESCENT, EMBEDDING_DESCENT, LID_ASCENT, SAIL,
    )
}  # fmt: skip
#: for comparison only; a profile's order never has them.
BASELINES: dict[str, Method] = {method.name: method for method in (RANDOM_TOKENS, RANDOM_NUMBERS, EMBEDDING_NOISE, SAIL_RELEASED)}

__all__ = ["BASELINES", "METHODS", "Method", "SteeringInput"]
