"""The tables of the documentation are what the results say."""

import pytest

from experiments import report
from experiments.harness import Table, table


def test_the_tables_of_the_documentation_are_what_the_results_say():
    assert not list(report.stale(report.pages())), "python -m experiments report --write"
    assert any("<!-- table: " in path.read_text() for path in report.pages())


def test_a_table_is_markdown():
    made = Table("name", ("a", "b"), [(1, "x|y"), ("2", None)])
    assert made.markdown() == "| a | b |\n| --- | --- |\n| 1 | x\\|y |\n| 2 |  |"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("<!-- table: nothing of bench/gram on cpu-x86-64 -->", "bench/gram has no table 'nothing'; there are cost"),
        ("<!-- table: cost of bench/gram on tpu -->", "bench/gram has no result of tpu; there are cpu-x86-64"),
        ("<!-- table: cost of bench/grams on cpu-x86-64 -->", "no experiment 'bench/grams'"),
        ("<!-- table: bench/gram -->", "no table in the form of"),
    ],
)
def test_a_table_that_there_is_not_is_an_error(line, message):
    with pytest.raises(SystemExit, match=message):
        report.render(f"{line}\n<!-- end -->\n")


def test_a_comment_without_an_end_is_an_error():
    with pytest.raises(SystemExit, match="no table in the form of"):
        report.render("<!-- table: cost of bench/gram on cpu-x86-64 -->\n| a |\n")


def test_a_part_of_an_experiment_has_tables_of_its_own():
    assert table("methods", "adaprune/from_dense/minilm", "cpu-x86-64").title == "MiniLM, STS-B: Spearman in %"
