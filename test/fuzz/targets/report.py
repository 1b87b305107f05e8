"""A run's metrics.jsonl, and the report command."""

from __future__ import annotations

from unittest import mock

from run import target
from targets.commands import command, one
from targets.data import image, written

ROC = {"fpr": [0.0, 0.001, 0.2, 1.0], "tpr": [0.0, 0.5, 0.9, 1.0]}


def _runs() -> list:
    from runtime.dist import ALONE
    from runtime.log import RunLog

    def verify(log, number, **values):
        log.record(
            "verify", step=number, epoch=0, set="lfw", accuracy=0.9, std=0.01, threshold=1.5, pairs=6000, same=3000,
            tar_at_far={"0.001": 0.9, "0.0001": None}, tar_at_far_why_not={"0.0001": "needs 10000"}, roc=ROC,
            untrained=not number, folds=[], **values,
        )  # fmt: skip

    def write(folder):
        config = {"batch_size": 4, "val_targets": ["lfw"], "resume": ""}
        with RunLog(folder / "run", ALONE, config, tensorboard=False) as log:
            log.record(
                "run", case="a", network="ir_50", batch_size=4, device={"name": "<b>", "kind": "cpu", "count": 1}
            )
            verify(log, 0)
            for number in (10, 20):
                log.record("step", step=number, epoch=0, loss=4.0, lr=0.1, accuracy=0.2, images_per_s=9.0, damaged=0)
            verify(log, 20)
            log.record("window", images=80, seconds=8.0, steps=20, images_per_s=10.0)
            log.record("end", seconds=9.0, reason="finished", steps=20)

    return [{**written(write), "run/contact_sheet.png": image(1, "PNG")}]


@target(_runs)
def metrics(folder):
    import report

    # pictures of curves are matplotlib's, and take a hundred times as long as all else
    with mock.patch("report.page.plots", return_value={}):
        report.write_report(folder / "run", folder / "out")


command(
    "report_command",
    "report.__main__",
    lambda: [one(_runs()[0], "run", "--case=b", "--output=out")],
    report__page__plots=lambda *_: {},
)


@target(_runs, weight=0.005)
def pictures(folder):
    """What a report draws of numbers; matplotlib takes a hundred times as long as a reader."""
    import report

    report.write_report(folder / "run", folder / "out")
