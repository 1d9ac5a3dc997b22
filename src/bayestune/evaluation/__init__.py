"""A posterior and rows → probabilities, metrics, and the record of both.

Records are made and read here and nowhere else.
"""

from bayestune.evaluation.adaptive import Adaptive, predict_adaptively
from bayestune.evaluation.evaluate import Evaluated, EvaluationOptions, evaluate_posterior
from bayestune.evaluation.gates import Bar, gate_record
from bayestune.evaluation.option_likelihoods import (
    READINGS,
    OptionRows,
    averaged_options,
    averaged_texts,
    option_rows,
)
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
    "READINGS",
    "RECORDS",
    "Adaptive",
    "Bar",
    "Evaluated",
    "EvaluationOptions",
    "OptionRows",
    "Record",
    "Result",
    "append_results",
    "averaged_options",
    "averaged_texts",
    "error_row",
    "evaluate_posterior",
    "gate_record",
    "label_of",
    "make_result",
    "option_rows",
    "predict_adaptively",
    "prediction_rows",
    "read_records",
]
