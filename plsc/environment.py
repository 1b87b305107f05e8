"""What PLSC's scripts read about their ranks, set where torchrun started them."""

from __future__ import annotations

import os


def share_ranks() -> None:
    """PADDLE_TRAINER_ID and its like from torchrun's RANK and its like; nothing where there is no RANK, and nothing
    that is set already is changed."""
    if "RANK" not in os.environ:
        return
    rank, size = os.environ["RANK"], os.environ.get("WORLD_SIZE", "1")
    host, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), os.environ.get("MASTER_PORT", "6070")
    first = int(port) if port.isdigit() else 6070
    endpoints = [f"{host}:{first + number}" for number in range(int(size) if size.isdigit() else 1)]
    for name, value in (
        ("PADDLE_TRAINER_ID", rank),
        ("PADDLE_TRAINERS_NUM", size),
        ("PADDLE_TRAINER_ENDPOINTS", ",".join(endpoints)),
        ("PADDLE_CURRENT_ENDPOINT", endpoints[int(rank)] if rank.isdigit() and int(rank) < len(endpoints) else ""),
        ("FLAGS_selected_gpus", os.environ.get("LOCAL_RANK", "0")),
    ):
        os.environ.setdefault(name, value)


def trainer() -> tuple[int, int]:
    """(rank, ranks), as PLSC's readers divide their data."""
    return int(os.environ.get("PADDLE_TRAINER_ID", 0)), int(os.environ.get("PADDLE_TRAINERS_NUM", 1))
