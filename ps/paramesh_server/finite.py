"""The policy for NaN and infinity, where a sequenced update is applied. Pure.

    passes(pb.NON_FINITE_UNSPECIFIED, gradient.views, present)    # refuses NON_FINITE, or says whether to apply

Workers have judged before they push; this holds for whoever did not. A contribution of a step is not looked at: when
its partition sums it, the decision that it counts has been made for all partitions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from paramesh.errors import refuse
from paramesh.v1 import types_pb2 as pb

APPLY_ALL = pb.NON_FINITE_ALLOW
"""What holds for a step."""


def passes(policy: int, views: Sequence[torch.Tensor], present: Sequence[bool]) -> bool:
    """Whether an update is applied; False: skipped.

    Args:
        policy: a `pb.NonFinite`.
        views: the gradient, one tensor per segment, in the segment's dtype and already scaled.
        present: per segment, whether it has one.

    Raises:
        RequestRefused: NON_FINITE.
    """
    if policy == pb.NON_FINITE_ALLOW:
        return True
    for index, (view, there) in enumerate(zip(views, present, strict=True)):
        # One read of the gradient; it was just written, so small ones are in the cache. A sum that overflows is
        # looked at again, element by element.
        if there and not math.isfinite(view.sum().item()) and not torch.isfinite(view).all():
            if policy == pb.NON_FINITE_SKIP:
                return False
            raise refuse(
                "NON_FINITE",
                f"the gradient of segment {index} holds NaN or infinity, and the table rejects that: look at learning "
                'rate, loss and data, or create the table with non_finite "skip" or "allow"',
                segment=index,
            )
    return True
