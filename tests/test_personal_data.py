"""The sample of sentences with personal data: tags are where the values were put, and no template is in two splits."""

from fedtune import tasks
from fedtune.data.personal_data_samples import personal_data
from tests.data_examples import a_recipe

KINDS = {"PERSON", "ORGANIZATION", "LOCATION", "CREDIT_CARD", "PHONE", "EMAIL", "DATE", "ID"}


def test_every_word_has_a_tag_of_the_iob2_scheme() -> None:
    table = personal_data()["train"]
    assert len(table) > 2000
    for words, tags in zip(table["words"], table["tags"], strict=True):
        assert len(words) == len(tags)
        assert all(word.strip() for word in words)
        for before, tag in zip(["O", *tags], tags, strict=False):
            assert tag == "O" or tag[2:] in KINDS
            if tag.startswith("I-"):
                assert before[1:] == tag[1:]
    assert {tag[2:] for tags in table["tags"] for tag in tags if tag != "O"} == KINDS


def test_card_numbers_are_tagged_whole_and_plain_words_are_not() -> None:
    table = personal_data()["train"]
    row = next(row for row, words in enumerate(table["words"]) if words[:4] == ["I", "want", "to", "increase"])
    words, tags = table["words"][row], table["tags"][row]
    assert words[8] == "#"
    assert tags[9:13] == ["B-CREDIT_CARD", *["I-CREDIT_CARD"] * 3]
    assert all(len(word) == 4 and word.isdecimal() for word in words[9:13])
    assert set(tags[:9] + tags[13:]) == {"O"}


def test_it_is_the_same_each_time_and_splits_keep_templates_apart() -> None:
    assert personal_data()["train"]["words"] == personal_data()["train"]["words"]
    splits = tasks.load_data(a_recipe("task=token-classification", "data.source=sample:personal-data"))
    groups = [set(table["group"]) for table in (splits.train, splits.validation, splits.test)]
    assert sum(map(len, groups)) == len(set.union(*groups))
    assert splits.label_names[0] == "O"
