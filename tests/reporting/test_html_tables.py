"""Markdown as HTML."""

from longqlora.reporting.html_tables import html_of, write_html


def test_a_table_keeps_its_cells_and_their_alignment():
    html = html_of("| system | 128 |\n|:--|--:|\n| base | **12.72** ± 0.56 |\n")
    assert '<td style="text-align:right"><strong>12.72</strong> ± 0.56</td>' in html


def test_html_in_a_label_is_shown_as_text():
    html = html_of("| system |\n|:--|\n| <script>alert(1)</script> & <b>x</b> |\n\n- a caption with <img src=x>\n")
    assert "<script" not in html
    assert "<img" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &lt;b&gt;x&lt;/b&gt;" in html


def test_the_page_names_no_other_file(tmp_path):
    (tmp_path / "a<b.md").write_text("| ± |\n|:--|\n| † |\n", encoding="utf-8")
    write_html(str(tmp_path / "a.html"), markdown=str(tmp_path / "a<b.md"))
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "<title>a&lt;b</title>" in page
    assert "†" in page
    assert not any(word in page for word in ("src=", "href=", "url(", "@import"))
