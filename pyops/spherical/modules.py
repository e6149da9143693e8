"""Loss modules of the family; constructor order follows ``torch.nn.CrossEntropyLoss``."""

from __future__ import annotations

from torch import Tensor, nn

from pyops.spherical.cross_entropy import cross_entropy
from pyops.spherical.spherical_loss import (
    mse_onehot_loss,
    spherical_softmax_loss,
    taylor_softmax_loss,
    z_loss,
)


class _LossModule(nn.Module):
    """Holds the options of one loss function; ``weight`` is a buffer, as in torch's losses."""

    _function = None
    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        inplace_backward: bool = False,
        safe_mean: bool = False,
        **options: float,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.inplace_backward = inplace_backward
        self.safe_mean = safe_mean
        self._options = options

    def forward(self, logits: Tensor, target: Tensor, target_weight: Tensor | None = None) -> Tensor:
        return type(self)._function(
            logits,
            target,
            weight=self.weight,
            target_weight=target_weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            inplace_backward=self.inplace_backward,
            safe_mean=self.safe_mean,
            **self._options,
        )

    def extra_repr(self) -> str:
        shown = {**self._options, "reduction": self.reduction, "label_smoothing": self.label_smoothing}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


class ZLoss(_LossModule):
    """Module form of :func:`pyops.z_loss` (not the log-sum-exp-squared regulariser).

    Example:
        >>> import torch, pyops
        >>> pyops.nn.ZLoss(b=10.0)
        ZLoss(a=1.0, b=10.0, eps=1e-12, reduction='mean', label_smoothing=0.0)
    """

    _function = staticmethod(z_loss)

    def __init__(self, *args, a: float = 1.0, b: float = 4.0, eps: float = 1e-12, **kwargs) -> None:
        super().__init__(*args, a=a, b=b, eps=eps, **kwargs)


class TaylorSoftmaxLoss(_LossModule):
    """Module form of :func:`pyops.taylor_softmax_loss`."""

    _function = staticmethod(taylor_softmax_loss)


class SphericalSoftmaxLoss(_LossModule):
    """Module form of :func:`pyops.spherical_softmax_loss`."""

    _function = staticmethod(spherical_softmax_loss)

    def __init__(self, *args, eps: float = 0.1, **kwargs) -> None:
        super().__init__(*args, eps=eps, **kwargs)


class MSEOneHotLoss(_LossModule):
    """Module form of :func:`pyops.mse_onehot_loss`."""

    _function = staticmethod(mse_onehot_loss)


class CrossEntropyLoss(_LossModule):
    """Module form of :func:`pyops.cross_entropy`; without ``lse_square_scale`` as ``torch.nn.CrossEntropyLoss``."""

    _function = staticmethod(cross_entropy)

    def __init__(self, *args, lse_square_scale: float = 0.0, **kwargs) -> None:
        super().__init__(*args, lse_square_scale=lse_square_scale, **kwargs)
