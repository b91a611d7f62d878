"""PEFT's own tests of custom models and configurations, run on CURLoRA; all of them: `python tests/peft/matrix.py`."""

import cases
import matrix
import pytest


def test_every_failure_in_pefts_own_tests_is_by_design():
    try:
        matrix.fetch(matrix.CACHE)
    except matrix.NoIndex as reason:
        pytest.skip(f"the tests of PEFT {matrix.VERSION} come from the package index: {reason}")
    outcomes = matrix.run(cases.QUICK)
    unexplained, explained, unmet = matrix.judge(outcomes)
    assert len(outcomes) > 900 and sum(outcome.status == "passed" for outcome in outcomes) > 900
    assert unexplained == [], f"{len(unexplained)} failures without a reason in tests/peft/by_design.py"
    assert unmet == [], "nothing fails for these reasons any more"
    assert explained
