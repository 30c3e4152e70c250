"""What binary feedback has in common: a coin with the expected feedback as its bias."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuaifair_env.data.schema import BoolArray, FloatArray

_ONE = np.float32(1.0)
_LARGEST = np.float32(80.0)


class BernoulliFeedback:
    """Feedback 1 with probability ``expected``, else 0; a 1 is a click."""

    def feedback(self, expected: FloatArray, uniforms: NDArray[np.float64]) -> FloatArray:
        """Returns ``float32 (B, K)``: 1 where ``uniforms < expected``, else 0."""
        realised: FloatArray = (uniforms < expected).astype(np.float32)
        return realised

    def clicked(self, feedback: FloatArray) -> BoolArray:
        """Says where feedback is positive."""
        clicks: BoolArray = feedback > 0
        return clicks


def sigmoid_of_negated(negated: FloatArray, bounded: bool = False) -> FloatArray:
    """Returns ``1 / (1 + exp(negated))``, in place: the sigmoid of logits that come with their sign turned.

    Args:
        negated: Minus the logits, float32; overwritten.
        bounded: True where no entry can exceed 80 (above which float32 ``exp`` overflows), which saves a pass.
    """
    if not bounded:
        np.minimum(negated, _LARGEST, out=negated)
    np.exp(negated, out=negated)
    np.add(negated, _ONE, out=negated)
    np.reciprocal(negated, out=negated)
    return negated


def sigmoid(logits: NDArray[Any]) -> FloatArray:
    """Returns click probabilities, float32, without overflow at any logit."""
    return sigmoid_of_negated(np.negative(logits, dtype=np.float32))
