"""The report as the last step of a training, see docs/report.md."""

import logging

from detectron2.utils import comm

from ..engine.extras import report_is_possible

logger = logging.getLogger(__name__)
BY_HAND = "tools/make_report.py --config-file OUTPUT_DIR/config.yaml makes it"


def announce(cfg) -> None:
    """Says at the start of a training that there will be no report, where a package is missing and nobody has said so."""
    if cfg.REPORT == "auto" and not report_is_possible():
        logger.info(
            "there will be no report, matplotlib or supervision is missing; for one, pip install 'dn_detr_d2[report]'"
        )


def report_after_training(cfg) -> None:
    """Writes OUTPUT_DIR/report/index.html on rank 0 if REPORT asks for it.

    The training is done and its weights are written, so whatever goes wrong here is logged and no error: it must not
    turn a finished training into a failed one.
    """
    if cfg.REPORT == "never" or not comm.is_main_process() or not report_is_possible():
        return
    try:
        from .build import write_report

        logger.info("report: %s", write_report(cfg))
    except Exception as error:
        sentence = " ".join(str(error).split()) or type(error).__name__
        logger.exception("the training is done, but its report is not written: %s; %s", sentence, BY_HAND)
