"""What a profile advises, from made-up figures: each piece where its figure calls for it, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.profile.advice import advise

GIB = 2**30
GOOD: dict[str, Any] = {
    "settings": {
        **{"micro_batch_size": 2, "passes": 2, "num_workers": 2, "precision": "bf16-mixed", "log_every_n_steps": 10},
        **{"checkpoint_activations": False, "prompt_buckets": False},
    },
    "device": {"cores": 16, "threads": 8, "memory_bytes": 80 * GIB, "matmul_tflops": {"bf16": 700.0, "fp32": 300.0}},
    **{"on_gpu": True, "fused_optimizer": True, "peak_bytes": 60 * GIB, "recomputed": 0.0, "mfu": 0.5},
    **{"data_wait": 0.01, "images_per_second": 50.0, "loader_images_per_second": 400.0},
    "parts_ms": {"image encoder": 300.0, "backward": 600.0, "optimiser": 50.0, "logging and callbacks": 10.0},
    "parted_step_ms": 1000.0,
    "graph_breaks": [{"kind": "image_encoder", "breaks": 0, "reasons": []}],
    **{"compiled": False, "recompiled": 0},
    "waits": [{"place": "trainer/callbacks/guard.py:164", "call": "reads", "count": 1}],
}


def changed(**given: Any) -> dict[str, Any]:
    """Good figures, with some changed, and of dictionaries some of their entries."""
    return {**GOOD, **{key: {**GOOD[key], **new} if isinstance(new, dict) else new for key, new in given.items()}}


def test_nothing_is_advised_where_nothing_is_wrong() -> None:
    assert advise(GOOD) == []


@pytest.mark.parametrize(
    ("given", "change", "gain"),
    [
        # with half of the time lost at 50 images/s, 100 are wanted; two workers give 40, so 5, and a quarter to spare
        ({"data_wait": 0.5, "loader_images_per_second": 40.0}, "num_workers: from 2 to 7", "50%"),
        ({"settings": {"precision": "32-true"}}, "trainer.precision: bf16-mixed", "51%"),
        ({"peak_bytes": 20 * GIB}, "micro_batch_size: from 2 to 4", ""),
        (
            {"peak_bytes": 20 * GIB, "recomputed": 0.25, "settings": {"checkpoint_activations": True}},
            "checkpoint_activations: false",
            "25%",
        ),
        ({"mfu": 0.2}, "trainer.callbacks.CompileBlocks", ""),
        (
            {
                "compiled": True,
                "graph_breaks": [{"kind": "x", "breaks": 1, "reasons": [{"at": "a.py:3", "why": "print"}]}],
            },
            "a.py:3",
            "",
        ),
        ({"compiled": True, "recompiled": 4}, "model.init_args.prompt_buckets: true", ""),
        ({"waits": [{"place": "trainer/losses/x.py:7", "call": "reads", "count": 2}]}, "trainer/losses/x.py:7", ""),
        ({"parts_ms": {"optimiser": 400.0}}, "data.init_args.batch_size", "40%"),
        ({"parts_ms": {"logging and callbacks": 200.0}}, "log_every_n_steps: from 10 to 100", "20%"),
        ({"on_gpu": False, "device": {"threads": 1, "cores": 2}}, "OMP_NUM_THREADS", ""),
    ],
)
def test_each_figure_calls_for_its_change(given: dict[str, Any], change: str, gain: str) -> None:
    (advice,) = advise(changed(**given))
    assert change in advice["change"] and gain in advice["gain"], advice
