"""What a fit reports adds up over methods that build on each other, and is kept as one dict."""

from bayestune.posteriors import FitReport

REPORT = FitReport(2.0, 8, [{"loss": 0.5}], 100.0, {"temperature": 1.5})


def test_a_fit_that_goes_on_adds_seconds_and_keeps_the_larger_peak():
    later = REPORT.plus(1.0, 50.0, scale=2.0)
    assert later == FitReport(3.0, 8, REPORT.history, 100.0, {"temperature": 1.5, "scale": 2.0})
    assert REPORT.plus(peak_memory_mb=300.0).peak_memory_mb == 300.0


def test_a_report_is_kept_as_one_flat_dict_and_comes_back():
    kept = REPORT.as_dict()
    assert kept["temperature"] == 1.5
    assert kept["seconds"] == 2.0
    assert FitReport.of_dict(kept) == REPORT


def test_settings_that_a_fit_chose_are_those_it_ran_with():
    report = REPORT.plus(prior_std=0.4, final_std=0.2)
    asked_for = {"method": "blob", "prior_std": 0.2, "final_std": "auto"}
    assert report.settled(asked_for) == {"method": "blob", "prior_std": 0.4, "final_std": 0.2}
