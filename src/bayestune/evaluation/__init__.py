"""A posterior and rows → probabilities, metrics, and the record of both.

Records are made and read here and nowhere else.
"""

from bayestune.evaluation.adaptive import Adaptive, predict_adaptively
from bayestune.evaluation.evaluate import EvaluationOptions, evaluate_posterior
from bayestune.evaluation.records import (
    RECORDS,
    Record,
    Result,
    append_results,
    error_row,
    label_of,
    make_result,
    prediction_rows,
    read_records,
)

__all__ = [
    "RECORDS",
    "Adaptive",
    "EvaluationOptions",
    "Record",
    "Result",
    "append_results",
    "error_row",
    "evaluate_posterior",
    "label_of",
    "make_result",
    "predict_adaptively",
    "prediction_rows",
    "read_records",
]
