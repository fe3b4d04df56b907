"""Which of the commands on volumes is meant."""

from __future__ import annotations

OPTION, FOLDER = "--volume", "--folder"


def on_volume(command: str, arguments: list[str]) -> bool:
    """Whether a command line asks about a volume, or about a folder of them."""
    return _given(OPTION, arguments) or (command == "predict" and _given(FOLDER, arguments))


def volume_command(command: str, arguments: list[str]) -> int:
    """Run ``trainer predict --volume``, ``trainer predict --folder`` or ``trainer evaluate --volume``.

    Returns:
        Its exit code.

    Raises:
        UserError: A mistake of the user's.
    """
    folder = command == "predict" and _given(FOLDER, arguments)
    if {"-h", "--help"} & {*arguments}:  # `--volume` wants a value, which nobody who asks for help gives
        arguments = ["--help"]
    if folder:
        from trainer.segment.folder import predict_folder

        return predict_folder(arguments)
    if command == "predict":
        from trainer.segment.predict import predict_volume

        return predict_volume(arguments)
    from trainer.segment.evaluate import evaluate_volume

    return evaluate_volume(arguments)


def _given(option: str, arguments: list[str]) -> bool:
    return any(argument == option or argument.startswith(f"{option}=") for argument in arguments)
