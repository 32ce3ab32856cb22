"""Elements of a page: everything is escaped but markup."""

from kd_accel.report.html import GroupRow, Markup, element, joined, table

HOSTILE = """<script>alert("1")</script> & 'x'"""
ESCAPED = "&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt; &amp; &#x27;x&#x27;"


def test_texts_and_attributes_are_escaped():
    assert element("p", HOSTILE, title=HOSTILE) == f'<p title="{ESCAPED}">{ESCAPED}</p>'
    assert joined(HOSTILE, None, element("b", "x")) == f"{ESCAPED}<b>x</b>"
    assert element("img", src="a", alt=None, class_="c", aria_label="l") == '<img src="a" class="c" aria-label="l">'


def test_a_table_has_heads_for_columns_and_rows():
    text = table(["A", HOSTILE], [["r", None], GroupRow([HOSTILE, element("td", "1", style="s")])], caption="C")
    assert f'<th scope="col">A</th><th scope="col">{ESCAPED}</th>' in text and "<caption>C</caption>" in text
    assert '<tr><th scope="row">r</th><td></td></tr>' in text
    assert f'<tr class="group"><th scope="row">{ESCAPED}</th><td style="s">1</td></tr>' in text
    assert isinstance(text, Markup)
