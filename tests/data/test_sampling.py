from collections import Counter
from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st

from longqlora.data.sampling import NUM_PRIORITIES, BottomK, apportion, priority, text_id

SHARES = st.lists(st.floats(0.001, 1), min_size=1, max_size=12).map(
    lambda weights: {f"s{number}": weight / sum(weights) for number, weight in enumerate(weights)}
)


def test_priorities_are_uniform_and_differ_by_seed():
    orders = [priority(str(key), seed) for seed in range(5) for key in range(2000)]
    assert len(set(orders)) == 10_000
    assert 0 <= min(orders) < max(orders) < NUM_PRIORITIES
    tenths = Counter(order * 10 // NUM_PRIORITIES for order in orders)  # expected 1000, standard deviation 30
    assert all(850 < tenths[tenth] < 1150 for tenth in range(10))


def test_a_priority_never_changes():
    assert priority("text", seed=1) == 854791800692095337 != priority("text", seed=2)
    assert priority("1:text", seed=1) != priority("text", seed=11)


def test_ids_of_texts_are_128_bits_of_their_hash():
    assert text_id("") == "99aa06d3014798d86001c324468d497f"  # XXH3's published value for no input
    assert text_id("é") == text_id("\u00e9") != text_id("e\u0301")


def kept(items, k, folder) -> list[tuple[int, str, dict]]:
    best = BottomK(k, str(folder))
    for order, key, value in items:
        best.add(order, key, value)
    return list(best)


@settings(max_examples=150, deadline=None)
@given(keys=st.lists(st.integers(0, 60), max_size=80), k=st.integers(0, 30), shuffler=st.randoms(use_true_random=False))
def test_bottom_k_is_the_sorted_head_of_the_distinct_items_in_any_order(tmp_path_factory, keys, k, shuffler):
    items = [(priority(str(key), seed=1), str(key), {"value": "x" * key}) for key in keys]
    expected = sorted({key: (order, key, value) for order, key, value in items}.values(), key=lambda item: item[:2])[:k]
    shuffler.shuffle(items)
    assert kept(items, k, tmp_path_factory.getbasetemp()) == expected


@settings(max_examples=100, deadline=None)
@given(data=st.data(), values=st.lists(st.tuples(st.integers(0, 8), st.text(max_size=3), st.integers(0, 3)), max_size=40))
def test_of_several_values_of_a_key_the_smallest_stays_however_the_items_are_spread(tmp_path_factory, data, values):
    folder = tmp_path_factory.getbasetemp()
    items = [(priority(str(key), 3), str(key), {"source": source, "size": size}) for key, source, size in values]
    k = data.draw(st.integers(0, 6))
    smallest = {}
    for order, key, value in sorted(items, key=lambda item: tuple(item[2].values()), reverse=True):
        smallest[key] = (order, key, value)
    expected = sorted(smallest.values(), key=lambda item: item[0])[:k]
    assert kept(data.draw(st.permutations(items)), k, folder) == expected
    cut = data.draw(st.integers(0, len(items)))
    parts = kept(items[:cut], k, folder) + kept(items[cut:], k, folder)  # the best of the parts' best are the best of all
    assert kept(parts, k, folder) == expected


def test_items_of_equal_priority_are_in_the_order_of_their_keys(tmp_path):
    for keys in ("abc", "cba", "bca"):
        assert [key for _, key, _ in kept([(5, key, {}) for key in keys], 3, tmp_path)] == ["a", "b", "c"]


def test_the_threshold_is_what_is_still_taken(tmp_path):
    best = BottomK(2, str(tmp_path))
    assert best.threshold == NUM_PRIORITIES
    for order in (50, 30, 40):
        best.add(order, str(order), {})
    assert best.threshold == 41
    assert BottomK(0, str(tmp_path)).threshold == 0


def test_every_item_is_equally_likely(tmp_path):
    counts = Counter()
    for seed in range(2000):
        counts.update(key for _, key, _ in kept(((priority(str(i), seed), str(i), {}) for i in range(10)), 3, tmp_path))
    assert all(500 < counts[str(i)] < 700 for i in range(10))  # expected 600, standard deviation 20.5


def highest_averages(total: int, shares: dict[str, float]) -> dict[str, int]:
    """Sainte-Laguë in exact arithmetic, from its definition: each seat to the largest quotient share / (2 seats + 1)."""
    seats = dict.fromkeys(shares, 0)
    for _ in range(total):
        best = max(seats, key=lambda name: Fraction(shares[name]) / (2 * seats[name] + 1))
        seats[best] += 1
    return seats


@settings(max_examples=200, deadline=None)
@given(total=st.integers(0, 150), shares=SHARES)
def test_apportioned_parts_add_up_and_never_shrink_as_the_total_grows(total, shares):
    parts, more = apportion(total, shares), apportion(total + 1, shares)
    assert sum(parts.values()) == total
    assert all(more[name] >= parts[name] for name in shares)
    assert max(more[name] - parts[name] for name in shares) == 1
    exact = {name: total * Fraction(share) / sum(map(Fraction, shares.values())) for name, share in shares.items()}
    if len(shares) <= 3:  # with more parts the method can be further off, where very many are tiny
        assert all(abs(parts[name] - exact[name]) <= 1 + 1e-9 for name in shares)


@settings(max_examples=50, deadline=None)
@given(total=st.integers(0, 60), weights=st.lists(st.sampled_from([2, 3, 5, 7, 11, 13]), min_size=1, max_size=5, unique=True))
def test_apportioned_parts_are_those_of_exact_arithmetic(total, weights):
    shares = {str(weight): weight / sum(weights) for weight in weights}
    parts, reference = apportion(total, shares), highest_averages(total, shares)
    quotients = sorted(Fraction(weight, 2 * seats + 1) for weight in weights for seats in range(total + 1))[::-1]
    if total and quotients[total - 1 : total] != quotients[total : total + 1]:  # no tie
        assert parts == reference


def test_apportioned_parts_of_published_shares_are_within_two_of_them():
    """Within one where no shares are equal; RedPajama's three of 4.5 % are rounded up together."""
    red_pajama = {
        "C4": 0.15,
        "CommonCrawl": 0.67,
        "Github": 0.045,
        "ArXiv": 0.025,
        "Book": 0.045,
        "Wikipedia": 0.045,
        "SE": 0.02,
    }
    for total in [*range(1, 300), 54_212]:
        assert all(abs(part - total * red_pajama[name]) < 2 for name, part in apportion(total, red_pajama).items())


def test_the_published_shares_of_38821_records():
    shares = {"natural_questions": 0.43, "book_summaries": 0.26, "evol_instruct": 0.19, "long_alpaca": 0.12}
    quotas = apportion(38_821, shares)
    assert sum(quotas.values()) == 38_821
    assert {name: round(100 * quota / 38_821) for name, quota in quotas.items()} == {
        "natural_questions": 43, "book_summaries": 26, "evol_instruct": 19, "long_alpaca": 12
    }  # fmt: skip
    assert all(abs(quotas[name] - share * 38_821) < 1 for name, share in shares.items())


def test_a_part_without_a_share_gets_nothing():
    assert apportion(7, {"a": 0.0, "b": 1.0}) == {"a": 0, "b": 7}
    assert apportion(0, {"a": 0.5, "b": 0.5}) == {"a": 0, "b": 0}
