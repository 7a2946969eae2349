"""All exceptions raised by this package. Any other exception is a bug of ours.

MoesaicError            the message says what was found, what was wanted, what to do
├── InputError          the call, or something it names, is wrong                     exit 2
│   ├── CheckpointError a checkpoint is incomplete, torn, foreign or contradicts itself
│   ├── FileError       a file is a FIFO, a device, endless, or a link that leaves its folder
│   ├── FamilyError     a model family, or a value in its config, is not supported
│   ├── PlanError       a plan cannot be made, or does not fit its checkpoint
│   ├── StaleError      a stage's input is not the one its file was made from
│   └── HeldError       another process is writing the folder
├── CheckError          a check of a result did not hold                              exit 1
├── EngineError         generation ended early, not because of the request            exit 1
│   └── BusyError       there is no room for another request now
└── FaultError          an internal check failed: a bug of ours                         exit 70
    └── PluginError     a plug-in file breaks the rule of its folder
"""


class MoesaicError(Exception):
    """Base of all deliberate errors: one sentence, no traceback needed."""

    exit_code = 2


class InputError(MoesaicError):
    """The call, or something that it names, is wrong."""


class CheckpointError(InputError):
    """A checkpoint is incomplete, torn, foreign, or contradicts itself."""


class FileError(InputError, OSError):
    """A file is not a plain one, has no end, or is a link that leaves its folder."""


class FamilyError(InputError):
    """A model family, or a value in its config, is not supported."""


class PlanError(InputError):
    """A plan cannot be made, or does not fit its checkpoint."""


class StaleError(InputError):
    """The input of a stage is not the one that its file says it was made from."""


class HeldError(InputError):
    """Another process is writing the folder."""


class CheckError(MoesaicError):
    """A check of a result did not hold."""

    exit_code = 1


class EngineError(MoesaicError):
    """Generation ended early, not because of the request."""

    exit_code = 1


class BusyError(EngineError):
    """There is no room for another request now."""


class FaultError(MoesaicError):
    """An internal check failed: a bug of ours. The message says what was found."""

    exit_code = 70


class PluginError(FaultError):
    """A plug-in file breaks the rule of its folder."""
