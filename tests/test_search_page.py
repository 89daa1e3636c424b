"""search.html: what it answers first, what it links to, and that nothing of a user's text is markup."""

from __future__ import annotations

import re
from typing import Any

import pytest

from edgecompress.searching.search_page import page
from search_documents import search_document

HOSTILE = "<script>document.title='executed'</script>"


def test_the_pick_and_why_come_first_and_every_trial_has_its_row() -> None:
    text = page(search_document())
    assert text.index("Trial 1 has the least latency") < text.index('id="front"') < text.index('id="trials"')
    assert 'class="verdict ship"' in text
    rows = re.findall(r'<th scope="row">(\d+)', text[text.index('id="trials"') :])
    assert rows == [str(number) for number in range(14)]
    assert "no layer can be cut" in text
    assert text.count("<svg") == 2
    assert "12, the pick" not in text
    assert "1, the pick" in text


def test_trials_link_to_their_reports_but_not_to_those_on_another_machine() -> None:
    text = page(search_document())
    links = set(re.findall(r'<a href="([^"]+)"', text))
    assert links == {f"trials/{number:04d}/report/x86.html" for number in range(11)}
    assert "its run is on another machine" in text


def test_without_a_pick_it_says_what_would_have_to_give() -> None:
    text = page(search_document(pick=None))
    assert 'class="verdict hold"' in text
    assert "Nearest: trial 2" in text
    assert "0.1\N{NO-BREAK SPACE}ms of latency" in text or "0.1 ms of latency" in text


@pytest.mark.parametrize(
    ("changes", "axis"),
    [
        ({"minimize": "size", "cost_unit": "bytes"}, "size of the int8 file, kB"),
        ({"minimize": "memory", "cost_unit": "bytes"}, "peak memory, kB"),
        ({"cost_unit": "MACs", "not_measured_because": ["rpi5 is not at hand"]}, "MACs, millions"),
    ],
)
def test_the_figure_says_what_the_cost_is(changes: dict[str, Any], axis: str) -> None:
    text = page(search_document() | changes)
    assert axis in text
    assert all(note in text for note in changes.get("not_measured_because", []))


def test_a_search_with_nothing_complete_has_a_page_too() -> None:
    text = page(search_document(count=0, pick=None) | {"front": [], "elsewhere": [], "status": "stopped"})
    assert "<svg" not in text
    assert "--resume" in text


def test_a_users_text_is_never_markup() -> None:
    text = page(search_document(recipe=HOSTILE))
    assert HOSTILE not in text
    assert "&lt;script&gt;document.title" in text
