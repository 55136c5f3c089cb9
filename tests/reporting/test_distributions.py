import json

import pandas
import pytest
from sample_results import draw_twice, texts_of

from longqlora.reporting.distributions import SHOWN_SOURCES, plot_sft_shares, plot_text_lengths


@pytest.fixture
def texts(tmp_path) -> str:
    lengths = [length for number in range(SHOWN_SOURCES + 3) for length in range(1, 30 - number)]
    sources = [f"source {number}" for number in range(SHOWN_SOURCES + 3) for _ in range(1, 30 - number)]
    pandas.DataFrame({"source": sources, "num_tokens": lengths}).to_parquet(tmp_path / "texts.parquet")
    return str(tmp_path / "texts.parquet")


@pytest.fixture
def card(tmp_path) -> str:
    taken = {"nq": 1430, "books": 560, "talks": 10, "none": 0}
    content = {"records": 2000, "tokens": 123456, "sources": {name: {"taken": number} for name, number in taken.items()}}
    (tmp_path / "card.json").write_text(json.dumps(content))
    return str(tmp_path / "card.json")


@pytest.mark.parametrize(("plot", "data"), [(plot_text_lengths, "texts"), (plot_sft_shares, "card")])
def test_a_plot_is_written_as_png_and_as_the_same_svg_each_time(tmp_path, request, plot, data):
    assert draw_twice(lambda outputs: plot(request.getfixturevalue(data), outputs), tmp_path)


def test_the_histogram_names_the_largest_sources_and_gathers_the_others(tmp_path, texts):
    plot_text_lengths(texts, [str(tmp_path / "plot.svg")])
    shown = "\n".join(texts_of(tmp_path / "plot.svg"))
    assert "source 0 (29)" in shown
    assert f"source {SHOWN_SOURCES - 1} ({30 - SHOWN_SOURCES})" in shown
    assert "others (60)" in shown  # 21 + 20 + 19
    assert f"source {SHOWN_SOURCES} " not in shown
    sample = pandas.read_parquet(texts)
    assert f"{len(sample)} texts, {sample['num_tokens'].sum():,} tokens" in shown
    assert f"median ({sample['num_tokens'].median():,.0f} tokens)" in shown


def test_the_pie_names_sources_numbers_and_shares(tmp_path, card):
    plot_sft_shares(card, [str(tmp_path / "plot.svg")])
    shown = "\n".join(texts_of(tmp_path / "plot.svg"))
    assert "nq: 1,430 (72%)" in shown
    assert "books: 560 (28%)" in shown
    assert "talks: 10 (0%)" in shown
    assert "none" not in shown
    assert "2,000 records, 123,456 tokens" in shown
