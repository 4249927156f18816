"""The main job: one method, or a stack, on one model, measured beside the unmodified model.

``run`` is what ``zoo run`` calls::

    record = zoo.run("flap", "smollm2-135m", parameters={"sparsity": 0.3})
    for row in record.comparisons:
        print(row.quantity, row.gain, row.bound)

``main`` has it from beginning to end. In its order: ``commands`` reads what was typed, ``request`` holds it, ``kinds``
and ``checks`` refuse what cannot be, ``opening`` loads the models and begins the record, ``inputs`` and ``texts`` make
what they read, ``pruning`` makes smaller models, ``measuring`` puts both sides beside each other, ``pictures`` show
the tokens that stay, and ``storing`` keeps the record. Importing this package does not load torch.
"""

from zoo.runner.checks import check_picture_target, check_target
from zoo.runner.commands import command_line, parse_assignments
from zoo.runner.inputs import on_device
from zoo.runner.kinds import DEFAULT_MODELS, Kind, kind_of
from zoo.runner.main import RunInterrupted, run
from zoo.runner.request import CALIBRATION_WINDOWS, Request
from zoo.runner.storing import stored_form

__all__ = [
    "CALIBRATION_WINDOWS",
    "DEFAULT_MODELS",
    "Kind",
    "Request",
    "RunInterrupted",
    "check_picture_target",
    "check_target",
    "command_line",
    "kind_of",
    "on_device",
    "parse_assignments",
    "run",
    "stored_form",
]
