"""Exceptions, named for the condition. All of them derive from Fp32RouterError.

None derives from ImportError: programs catch that one and take it for "not installed", and a training that asks for
the plugin must not go on without it because somebody guarded an import.
"""

from __future__ import annotations


class Fp32RouterError(RuntimeError):
    """Base of everything this plugin raises."""


class SettingsError(Fp32RouterError, ValueError):
    """A variable or an argument of enable() has a value that is not accepted."""


class TargetMissingError(Fp32RouterError):
    """This Megatron lacks, or has changed the signature of, a function that a patch was written for."""


class TargetChangedError(TargetMissingError):
    """The source of a function that a patch replaces or relies on is not that of a Megatron it was written for."""


class UnprotectedRouterError(Fp32RouterError):
    """A router tensor is below fp32 although the plugin was asked to keep it there."""


class CannotMirrorError(Fp32RouterError):
    """MEGATRON_FP32_ROUTER_LIKE names an engine whose roundings this training cannot do."""


class RanksDisagreeError(Fp32RouterError):
    """Some rank of this job runs without the plugin, or with another version, setting or Megatron."""


class DisplacedPatchError(Fp32RouterError):
    """disable() was called while somebody else's patch wraps one of ours, so ours cannot be taken off."""


class CheckpointRefusedError(Fp32RouterError):
    """Saving or loading this optimizer state would mix up parameters; nothing has been written or overwritten."""


class CombinationRefusedError(Fp32RouterError):
    """An optimizer or a wrapper that fp32 router parameters do not work with, or that no test has run."""


class ModelInUseError(Fp32RouterError):
    """protect_model() was called after DDP or an optimizer took hold of the parameters."""


class CheckpointUnreadableError(Fp32RouterError):
    """A file of a checkpoint is missing, truncated, garbled, of an unknown format, or asks for what is refused."""
