"""Which of the two commands on volumes is meant."""

from __future__ import annotations

OPTION = "--volume"


def on_volume(arguments: list[str]) -> bool:
    """Whether a command line asks about a volume."""
    return any(argument == OPTION or argument.startswith(f"{OPTION}=") for argument in arguments)


def volume_command(command: str, arguments: list[str]) -> int:
    """Run ``trainer predict --volume`` or ``trainer evaluate --volume`` and return its exit code.

    Raises:
        UserError: A mistake of the user's.
    """
    if {"-h", "--help"} & {*arguments}:  # `--volume` wants a value, which nobody who asks for help gives
        arguments = ["--help"]
    if command == "predict":
        from trainer.segment.predict import predict_volume

        return predict_volume(arguments)
    from trainer.segment.evaluate import evaluate_volume

    return evaluate_volume(arguments)
