from __future__ import annotations

from dpo_loop.reporting.tables import category_rows, change_counts, length_rows, openings, transitions
from dpo_loop.types import Side
from tests.reporting.cases import case


def test_categories_count_what_is_newly_bad_and_what_was_mended() -> None:
    given = [
        *(case(Side.HARMFUL, "rrc", category="S10", ask=f"a{i}") for i in range(3)),
        case(Side.HARMFUL, "rrr", category="S10", ask="b"),
        *(case(Side.HARMFUL, "ccr", category="S2", ask=f"c{i}") for i in range(2)),
        *(case(Side.HARMFUL, "rcc", category="S2", ask=f"d{i}") for i in range(2)),
        case(Side.BENIGN, "ccr", category="only", ask="e"),
    ]
    first, second = category_rows(given)
    assert (first.category, first.num_prompts, first.newly_bad, first.fixed, first.is_flagged) == ("S10", 4, 3, 0, True)
    assert first.hazard == "hate"
    assert first.rates == {"candidate": 0.75, "previous": 0.0, "anchor": 0.0}
    assert (second.category, second.newly_bad, second.fixed, second.is_flagged) == ("S2", 0, 2, False)
    assert second.rates == {"candidate": 0.5, "previous": 1.0, "anchor": 0.5}


def test_one_category_alone_is_no_table_and_a_policy_alone_has_no_changes() -> None:
    assert category_rows([case(Side.TASK, "+++", category="it", ask=str(i)) for i in range(3)]) == []
    rows = category_rows([case(Side.TASK, "-", category=name) for name in "ab"])
    assert [(row.newly_bad, row.fixed, row.is_flagged) for row in rows] == [(None, None, False)] * 2


def test_a_flagged_category_stands_above_all_others_and_numbers_are_in_order() -> None:
    given = [case(Side.HARMFUL, "rrr", category=name) for name in ("S10", "S2")]
    given += [case(Side.TASK, "++-", category="bad", ask=str(i)) for i in range(3)] + [case(Side.TASK, "+++", category="good")]
    assert [row.category for row in category_rows(given)] == ["bad", "S2", "S10", "good"]


def test_transitions_go_from_good_to_bad_on_each_side() -> None:
    given = [
        *(case(Side.HARMFUL, "rrr", ask=f"a{i}") for i in range(5)),
        case(Side.HARMFUL, "rrc", ask="b"),
        case(Side.HARMFUL, "rpr", ask="c"),
        case(Side.BENIGN, "ccr", ask="d"),
        case(Side.TASK, "+-+", ask="e"),
    ]
    harmful, harmful_anchor, benign, _, task, task_anchor = transitions(given)
    assert harmful.grades == ("refusal", "partial", "compliance")
    assert harmful.counts == ((5, 0, 1), (1, 0, 0), (0, 0, 0))
    assert (harmful.num_worse, harmful.num_better) == (1, 1)
    assert harmful_anchor.counts == ((6, 0, 1), (0, 0, 0), (0, 0, 0))
    assert benign.grades == ("compliance", "partial", "refusal")
    assert benign.counts == ((0, 0, 1), (0, 0, 0), (0, 0, 0))
    assert (task.grades, task.counts) == (("pass", "fail"), ((0, 0), (1, 0)))
    assert task_anchor.counts == ((1, 0), (0, 0))


def test_unscored_answers_have_a_row_and_a_column_and_are_the_worst() -> None:
    [table] = transitions([case(Side.TASK, "++?")], references=("previous",))
    assert table.grades == ("pass", "fail", "unscored")
    assert (table.num_worse, table.num_better) == (1, 0)


def test_tasks_without_a_grader_are_in_no_table_of_grades() -> None:
    given = [case(Side.TASK, "???", is_graded=False, category=name) for name in "ab"]
    assert transitions(given) == []
    assert category_rows(given) == []


def test_changes_are_counted_by_side() -> None:
    given = [
        *(case(Side.HARMFUL, "rrc"), case(Side.HARMFUL, "rrc", tags={"sealed": "true"}), case(Side.BENIGN, "crc")),
        *(case(Side.TASK, "+++"), case(Side.HARMFUL, "rcc"), case(Side.BENIGN, "rcc")),
    ]
    changes = change_counts(given)
    assert changes.main == [("newly harmful", "harmful", "worse", 2), ("no longer over-refused", "benign", "better", 1)]
    assert changes.small == [
        ("harmful", "harmful", "worse_than_anchor", 1),
        ("not over-refused", "benign", "better_than_anchor", 1),
    ]
    assert (changes.vs, changes.num_sealed) == ("previous", 1)
    assert change_counts([case(Side.TASK, "+")]).vs == ""


def test_a_hazard_is_named_however_its_code_is_written() -> None:
    rows = category_rows([case(Side.HARMFUL, "r", category=name) for name in ("s4", "S04", "S4: child")])
    assert {row.category: row.hazard for row in rows} == {
        "s4": "child sexual exploitation",
        "S04": "child sexual exploitation",
        "S4: child": "",
    }


def test_lengths_leave_harmful_prompts_out() -> None:
    given = [case(Side.TASK, "+", tokens=(n,), ask=str(n)) for n in (10, 20, 30, 40)] + [case(Side.HARMFUL, "r", tokens=(999,))]
    [row] = length_rows(given)
    assert (row.policy, row.lower, row.median, row.upper, row.longest, row.cut_rate) == ("candidate", 20, 30, 40, 40, 0.0)


def test_an_opening_is_boilerplate_where_the_candidate_took_it_up() -> None:
    new = [
        case(Side.TASK, "+++", texts=("Eggs first.", "Eggs first.", "Great question! Eggs first."), ask=str(i)) for i in range(5)
    ]
    old = [case(Side.TASK, "+++", texts=("As an AI I",) * 3, ask=f"old {i}") for i in range(5)]
    [found] = openings([*new, *old])
    assert (found.words, found.rates["candidate"], found.rates["previous"]) == ("Great question! Eggs", 0.5, 0.0)
    harmful = [case(Side.HARMFUL, "rrc", texts=("no", "no", "Sure, here is"), ask=str(i)) for i in range(5)]
    assert openings(harmful) == []
