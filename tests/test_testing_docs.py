"""The tests on the page "Test your own transform" pass."""

import pytest
from documents import ROOT, blocks


@pytest.mark.filterwarnings("ignore:torch.triangular_solve is deprecated")
def test_the_tests_of_the_page_pass(impatient: None):
    names: dict = {}
    exec("\n".join(source for language, source in blocks(ROOT / "docs" / "testing.md") if language == "python"), names)
    tests = [value for name, value in names.items() if name.startswith("test_")]
    assert tests
    for test in tests:
        test()
