import json
from collections import Counter
from dataclasses import replace
from typing import get_args

import pytest

from longqlora.config.settings import InstructionSchema
from longqlora.data.instruction_schemas import SCHEMAS, Conversation, read_conversations
from longqlora.data.source_pass import RecordCounter

WORDS = ["Rome", "<P>", "Rome", "was", "founded", "in", "753", "BC", ".", "</P>", "<P>", "It", "is", "old", ".", "</P>"]
NOWHERE = {"start_token": -1, "end_token": -1}

RECORDS = {
    "natural_questions": {
        "document": "Rome is old. Founded in 753 BC.",
        "question": "when was rome founded",
        "short_answers": ["753 BC", "753"],
        "long_answer": "Founded in 753 BC.",
    },
    "natural_questions_hub": {
        "id": "1",
        "document": {"title": "Rome", "tokens": {"token": WORDS, "is_html": [word.startswith("<") for word in WORDS]}},
        "question": {"text": "when was rome founded", "tokens": ["when", "was", "rome", "founded"]},
        "annotations": {
            "long_answer": [{"start_token": 1, "end_token": 9, "candidate_index": 0}],
            "short_answers": [{"start_token": [6], "end_token": [8], "text": ["753 BC"]}],
            "yes_no_answer": [-1],
        },
    },
    "natural_questions_simplified": {
        "document_text": " ".join(WORDS),
        "question_text": "when was rome founded",
        "annotations": [
            {
                "long_answer": {"start_token": 1, "end_token": 9, "candidate_index": 0},
                "short_answers": [{"start_token": 6, "end_token": 8}],
                "yes_no_answer": "NONE",
            }
        ],
    },
    "l_eval": {
        "input": "A long report. It says much.",
        "instructions": ["What is it?", "What does it say?"],
        "outputs": ["A report.", "Much."],
        "source": "gov_report_summ",
        "evaluation": "rouge",
    },
    "lost_in_the_middle": {
        "question": "who was first",
        "answers": ["Wilhelm Röntgen", "Röntgen"],
        "ctxs": [{"title": "Prizes", "text": "Wilhelm Röntgen was first."}, {"title": "Rome", "text": "Rome is old."}],
    },
    "alpaca": {"instruction": "Add.", "input": "1 and 2", "output": "3"},
    "sharegpt": {
        "conversations": [
            {"from": "human", "value": "Hello?"},
            {"from": "gpt", "value": "Hi!"},
            {"from": "human", "value": "And now?"},
            {"from": "gpt", "value": "Bye."},
        ]
    },
    "messages": {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hello?"},
            {"role": "assistant", "content": "Hi!"},
        ]
    },
    "human_assistant": {"conversation": [{"human": "Hello?", "assistant": "Hi!"}, {"human": "And?", "assistant": "Bye."}]},
    "query_response": {"system": "Be brief.", "query": "And?", "response": "Bye.", "history": [["Hello?", "Hi!"]]},
    "booksum": {"chapter": "It was night. He slept.", "summary_text": "A man sleeps."},
    "long_alpaca": {
        "instruction": "Read this paper.\n The paper begins. We attend. It works. Now the paper ends. What is it?",
        "output": "Attention.",
    },
    "qmsum": {
        "meeting_transcripts": [{"speaker": "Ann", "content": "We start."}, {"speaker": "Bob", "content": "We end."}],
        "general_query_list": [{"query": "Summarize the meeting.", "answer": "It was short."}],
        "specific_query_list": [{"query": "Who began?", "answer": "Ann.", "relevant_text_span": [["0", "0"]]}],
    },
    "input_output": {"input": "Say yes.", "output": "Yes."},
}

NQ_DOCUMENT, NQ_TURNS = "Rome Rome was founded in 753 BC . It is old .", [("Question: when was rome founded", "753 BC")]
EXPECTED = {  # document, evidence, and what is said below the document
    "natural_questions": ("Rome is old. Founded in 753 BC.", "Founded in 753 BC.", NQ_TURNS),
    "natural_questions_hub": (NQ_DOCUMENT, "Rome was founded in 753 BC .", NQ_TURNS),
    "natural_questions_simplified": (NQ_DOCUMENT, "Rome was founded in 753 BC .", NQ_TURNS),
    "l_eval": ("A long report. It says much.", "", [("What is it?", "A report."), ("What does it say?", "Much.")]),
    "lost_in_the_middle": (
        "Document [1](Title: Prizes) Wilhelm Röntgen was first.\n\nDocument [2](Title: Rome) Rome is old.",
        "Wilhelm Röntgen",
        [("Question: who was first", "Wilhelm Röntgen")],
    ),
    "alpaca": (None, "", [("Add.\n\n1 and 2", "3")]),
    "sharegpt": (None, "", [("Hello?", "Hi!"), ("And now?", "Bye.")]),
    "messages": (None, "", [("Hello?", "Hi!")]),
    "human_assistant": (None, "", [("Hello?", "Hi!"), ("And?", "Bye.")]),
    "query_response": (None, "", [("Hello?", "Hi!"), ("And?", "Bye.")]),
    "booksum": ("It was night. He slept.", "", [("Summarise the text above.", "A man sleeps.")]),
    "qmsum": ("Ann: We start.\nBob: We end.", "", [("Summarize the meeting.", "It was short."), ("Who began?", "Ann.")]),
    "input_output": (None, "", [("Say yes.", "Yes.")]),
}


def write_lines(path, *records: dict) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_every_schema_is_a_legal_value_of_the_configuration():
    assert set(SCHEMAS) == set(get_args(InstructionSchema))


def test_every_schema_has_an_example_here():
    assert set(RECORDS) == set(SCHEMAS) == {*EXPECTED, "long_alpaca"}


@pytest.mark.parametrize("schema", EXPECTED)
def test_question_document_and_answer_survive(tmp_path, schema):
    document, evidence, turns = EXPECTED[schema]
    (conversation,) = read_conversations(write_lines(tmp_path / "x.jsonl", RECORDS[schema]), schema)
    (question, answer), *others = conversation.turns
    assert conversation.evidence == evidence
    assert conversation.system == ("Be brief." if schema in ("messages", "query_response") else "")
    assert conversation.not_learned == frozenset()
    if document is None:
        assert conversation.documents == ()
    else:
        ((begin, end),) = conversation.documents
        assert question[begin:end] == document
        assert evidence in document
        assert (begin, question[end : end + 2]) == (0, "\n\n")
        question = question[end + 2 :]
    assert [(question, answer), *others] == turns


def test_a_long_alpaca_instruction_is_kept_as_it_is_and_the_paper_in_it_found(tmp_path):
    record = RECORDS["long_alpaca"]
    (conversation,) = read_conversations(write_lines(tmp_path / "x.jsonl", record), "long_alpaca")
    assert conversation.turns == [(record["instruction"], "Attention.")]
    ((begin, end),) = conversation.documents
    assert record["instruction"][begin:end] == "We attend. It works."
    short = SCHEMAS["long_alpaca"]({"instruction": "What is attention?", "output": "A mean."})
    assert short == Conversation([("What is attention?", "A mean.")])


@pytest.mark.parametrize(
    "between",
    [
        " \n Now the first paper ends. \n The second paper begins. \n ",
        " Now the first paper ends. The second paper begins. ",
        " Now the first paper ends. ",
        "\nThe second paper begins.\n",
    ],
)
def test_both_papers_of_a_long_alpaca_instruction_are_found(between):
    begin, end = (
        "There are two papers. Memorize them.\n The first paper begins. \n ",
        " Now the second paper ends.Compare them.",
    )
    papers = ["We attend.\nThe proof begins. Now the proof ends.", "We do not.\n\nIt works."]
    question = begin + papers[0] + between + papers[1] + end
    conversation = SCHEMAS["long_alpaca"]({"instruction": question, "input": "", "output": "They differ."})
    assert [question[first:last] for first, last in conversation.documents] == papers
    assert conversation.turns == [(question, "They differ.")]


def test_messages_alternate_after_the_system_message():
    conversation = Conversation([("a", "b"), ("c", "d")], system="s")
    assert [message["role"] for message in conversation.messages()] == ["system", *["user", "assistant"] * 2]
    assert [message["content"] for message in conversation.messages()] == list("sabcd")
    assert replace(conversation, system="").messages() == conversation.messages()[1:]
    assert conversation.text() == "s\na\nb\nc\nd"


def without_answers(schema: str, **changes) -> dict:
    """A record of Natural Questions where the annotators found nothing, but for ``changes``."""
    if schema == "natural_questions":
        return {**RECORDS[schema], "short_answers": [], "long_answer": "", **changes}
    if schema == "natural_questions_hub":
        nothing = {"start_token": [], "end_token": [], "text": []}
        empty = {"long_answer": [NOWHERE], "short_answers": [nothing], "yes_no_answer": [-1]}
        return {**RECORDS[schema], "annotations": {**empty, **changes}}
    empty = {"long_answer": NOWHERE, "short_answers": [], "yes_no_answer": "NONE"}
    return {**RECORDS[schema], "annotations": [{**empty, **changes}]}


@pytest.mark.parametrize("schema", ["natural_questions", "natural_questions_hub", "natural_questions_simplified"])
def test_a_record_without_an_answer_is_none(tmp_path, schema):
    path = write_lines(tmp_path / "x.jsonl", without_answers(schema), RECORDS[schema])
    nothing, conversation = read_conversations(path, schema)
    assert nothing is None
    assert conversation.turns[0][1] == "753 BC"


@pytest.mark.parametrize(
    ("schema", "changes", "answer"),
    [
        ("natural_questions", {"long_answer": "Rome is old."}, "Rome is old."),
        ("natural_questions_hub", {"yes_no_answer": [1]}, "Yes"),
        ("natural_questions_hub", {"yes_no_answer": [0]}, "No"),
        ("natural_questions_hub", {"long_answer": [{"start_token": 9, "end_token": 15}]}, "It is old ."),
        ("natural_questions_simplified", {"yes_no_answer": "NO"}, "No"),
        ("natural_questions_simplified", {"long_answer": {"start_token": 9, "end_token": 15}}, "It is old ."),
        (
            "natural_questions_simplified",
            {"short_answers": [{"start_token": 0, "end_token": 1}, {"start_token": 6, "end_token": 8}]},
            "Rome, 753 BC",
        ),
    ],
)
def test_yes_no_and_long_answers_serve_where_there_is_no_short_one(schema, changes, answer):
    assert SCHEMAS[schema](without_answers(schema, **changes)).turns[0][1] == answer


def test_an_alpaca_record_needs_no_input():
    empty = {"input": None, "system": None, "history": None}
    for more in ({}, {"input": ""}, empty, {"input": "", "system": "", "history": []}):
        assert SCHEMAS["alpaca"]({"instruction": "Hi", "output": "Ho", **more}) == Conversation([("Hi", "Ho")])


@pytest.mark.parametrize(
    ("schema", "fields"),
    [
        ("alpaca", {"instruction": "Add.", "input": "1 and 2", "output": "3"}),
        ("long_alpaca", {"instruction": "Add.", "input": "1 and 2", "output": "3"}),
        ("query_response", {"query": "Add.\n\n1 and 2", "response": "3"}),
        ("input_output", {"input": "Add.\n\n1 and 2", "output": "3"}),
    ],
)
def test_input_history_and_system_message_are_used(schema, fields):
    earlier = {"system": "Be brief.", "history": [["Hello?", "Hi!"], ["And now?", "Bye."]]}
    turns = [("Hello?", "Hi!"), ("And now?", "Bye."), ("Add.\n\n1 and 2", "3")]
    assert SCHEMAS[schema]({**fields, **earlier}) == Conversation(turns, system="Be brief.")
    assert SCHEMAS[schema](fields) == Conversation(turns[2:])


@pytest.mark.parametrize("history", ["Hello? Hi!", ["Hello?", "Hi!"], ["ab"], [["Hello?"]], [{"user": "Hello?", "bot": "Hi!"}]])
def test_a_history_that_is_no_list_of_turns_is_malformed(tmp_path, history):
    path = write_lines(tmp_path / "x.jsonl", {**RECORDS["alpaca"], "history": history})
    with pytest.raises(ValueError, match="line 1: schema 'alpaca': history is not a list of questions with their answers"):
        list(read_conversations(path, "alpaca"))


def sharegpt(*speakers: str, **fields) -> dict:
    """A record in which each speaker says its name and place."""
    return {"conversations": [{"from": name, "value": f"{name} {place}"} for place, name in enumerate(speakers)], **fields}


def test_a_sharegpt_conversation_may_begin_with_a_system_message_and_end_unanswered():
    conversation = SCHEMAS["sharegpt"](sharegpt("system", "human", "gpt", "user", "assistant", "human"))
    assert conversation.system == "system 0"
    assert conversation.turns == [("human 1", "gpt 2"), ("user 3", "assistant 4")]


@pytest.mark.parametrize("field", ["system", "system_prompt"])
def test_the_system_message_may_be_a_field(tmp_path, field):
    fields = {field: "Be brief."}
    assert SCHEMAS["sharegpt"](sharegpt("human", "gpt", **fields)).system == "Be brief."
    assert SCHEMAS["messages"]({"messages": RECORDS["messages"]["messages"][1:], **fields}).system == "Be brief."
    assert SCHEMAS["human_assistant"]({**RECORDS["human_assistant"], **fields}).system == "Be brief."
    unused = Counter()
    path = write_lines(tmp_path / "x.jsonl", sharegpt("system", "human", "gpt", **fields))
    (conversation,) = read_conversations(path, "sharegpt", unused_fields=unused)
    assert conversation.system == "system 0"  # the message wins, and the other is not lost silently
    assert unused == {field: 1}


@pytest.mark.parametrize("blank", ["", "  ", "\n"])
def test_a_blank_system_message_is_none(blank):
    assert SCHEMAS["alpaca"]({**RECORDS["alpaca"], "system": blank}).system == ""
    record = sharegpt("system", "human", "gpt", system="Be brief.")
    record["conversations"][0]["value"] = blank
    assert SCHEMAS["sharegpt"](record).system == "Be brief."


def test_answers_before_the_first_question_are_left_out():
    assert SCHEMAS["sharegpt"](sharegpt("gpt", "human", "gpt")).turns == [("human 1", "gpt 2")]


@pytest.mark.parametrize("answers", ["gpt", "chatgpt", "bing", "bard", "model", "Assistant", "function_call"])
@pytest.mark.parametrize("questions", ["human", "user", "tool", "observation", "function_response", "Human"])
def test_every_usual_speaker_asks_or_answers(answers, questions):
    conversation = SCHEMAS["sharegpt"](sharegpt("human", answers, questions, answers))
    assert conversation == Conversation([("human 0", f"{answers} 1"), (f"{questions} 2", f"{answers} 3")])


def test_questions_in_a_row_are_one():
    conversation = SCHEMAS["sharegpt"](sharegpt("human", "human", "function_call", "observation", "observation", "gpt"))
    assert conversation.turns == [("human 0\n\nhuman 1", "function_call 2"), ("observation 3\n\nobservation 4", "gpt 5")]


@pytest.mark.parametrize("schema", ["sharegpt", "messages"])
@pytest.mark.parametrize("mark", [{"weight": 0}, {"weight": 0.0}, {"train": False}])
def test_an_answer_of_weight_0_is_only_context(schema, mark):
    def conversation(*marks: dict) -> Conversation | None:
        chat = [
            message
            for number, more in enumerate(marks)
            for message in ({"role": "user", "content": f"q{number}"}, {"role": "assistant", "content": f"a{number}", **more})
        ]
        return SCHEMAS[schema]({"conversations" if schema == "sharegpt" else schema: chat})

    turns = [("q0", "a0"), ("q1", "a1"), ("q2", "a2")]
    found = conversation(mark, {"weight": 1}, {"weight": None})
    assert found == Conversation(turns, not_learned=frozenset({0}))
    assert [message.get("learned") for message in found.messages()] == [None, False, None, None, None, None]
    assert conversation({}, mark, {"train": True}).not_learned == {1}
    assert conversation(mark, {}, mark) == Conversation(turns[:2], not_learned=frozenset({0}))  # what follows teaches nothing
    assert conversation({}, mark, mark) == Conversation(turns[:1])
    assert conversation(mark, mark) is None


def test_a_conversation_may_be_in_either_form_of_messages():
    spoken = [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Hi!"}]
    written = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hi!"}]
    merged = [{**message, "from": None, "value": None} for message in written]  # columns of a Parquet file
    parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in written]
    records = [("sharegpt", "conversations"), ("messages", "messages"), ("messages", "conversation")]
    for schema, field in records:
        for chat in (spoken, written, merged, parts):
            assert SCHEMAS[schema]({field: chat}) == Conversation([("Hello?", "Hi!")])


ODD = {
    "a system message is not the first message": sharegpt("human", "gpt", "system", "human", "gpt"),
    "two answers in a row": sharegpt("human", "gpt", "gpt"),
    "the speaker 'narrator' is none of user, human, ": sharegpt("human", "narrator"),
    "the speaker None is none of user, human, ": {"conversations": [{"role": None, "content": "?"}]},
    "the weight of a message is 0.5; it can be 0 (not learned) or 1": {
        "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!", "weight": 0.5}]
    },
    "what 'system' says is not a text": {
        "conversations": [{"from": "system", "value": 5}, *RECORDS["sharegpt"]["conversations"]]
    },
    "the system message is not a text": sharegpt("human", "gpt", system=["Be brief."]),
    "(TypeError: 'NoneType' object is not iterable); its fields are conversations; it fits no schema": {"conversations": None},
    "(KeyError: 'conversations'); its fields are id; it fits no schema": {"id": 7},
    "(KeyError: 'text'); its fields are conversations; it fits no schema": {
        "conversations": [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "!"}]
    },
    "found an empty question or answer": {"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": None}]},
}


@pytest.mark.parametrize("reason", ODD)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_an_odd_record_is_malformed_wherever_it_is(tmp_path, reason, place):
    records = [RECORDS["sharegpt"]] * 2
    path = write_lines(tmp_path / "x.jsonl", *records[:place], ODD[reason], *records[place:])
    counter = RecordCounter()
    assert len(list(read_conversations(path, "sharegpt", counter.add_malformed))) == 2
    (example,) = counter.examples
    assert example.startswith(f"{path}, line {place + 1}: ")
    assert reason in example


def test_a_schema_that_would_leave_the_odd_field_out_does_not_fit(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", {**RECORDS["alpaca"], "input": 5}, RECORDS["alpaca"])
    counter = RecordCounter()
    assert len(list(read_conversations(path, "alpaca", counter.add_malformed))) == 1
    assert "TypeError" in counter.examples[0]
    assert "it fits no schema" in counter.examples[0]


def test_a_later_record_of_another_schema_is_malformed(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", RECORDS["sharegpt"], RECORDS["alpaca"], RECORDS["sharegpt"])
    counter = RecordCounter()
    assert len(list(read_conversations(path, "sharegpt", counter.add_malformed))) == 2
    assert [example.partition("; it fits ")[2].partition("\n")[0] for example in counter.examples] == [
        "alpaca, long_alpaca, input_output"
    ]


def test_files_of_another_schema_stop_the_run_early(tmp_path):
    counter = RecordCounter()
    counter.usable = 10**6
    path = write_lines(tmp_path / "x.jsonl", {"id": 1}, RECORDS["alpaca"])
    with pytest.raises(ValueError, match=r"x\.jsonl, line 2: not a record of schema 'sharegpt'.*; it fits alpaca, long_alpaca"):
        list(read_conversations(path, "sharegpt", counter.add_malformed))
    counter = RecordCounter()
    path = write_lines(tmp_path / "y.jsonl", *[{"prompt": "?", "completion": "!"}] * 1000)
    with pytest.raises(ValueError, match=r"100 of 100 records are malformed.*it fits no schema \(natural_questions, "):
        list(read_conversations(path, "sharegpt", counter.add_malformed))


def test_fields_that_are_not_used_are_counted(tmp_path):
    unused = Counter()
    call = {"role": "assistant", "content": "Wait.", "tool_calls": [{"name": "f"}], "name": ""}
    records = [
        {**RECORDS["messages"], "tools": [{"name": "f"}], "id": 7},
        {"messages": [{"role": "user", "content": "?"}, call, {"role": "tool", "content": "1"}, call], "tools": "[]", "id": 0},
        {"messages": [], "tools": [{"name": "malformed, so not counted"}]},
    ]
    path = write_lines(tmp_path / "x.jsonl", *records)
    assert len(list(read_conversations(path, "messages", RecordCounter().add_malformed, unused_fields=unused))) == 2
    assert unused == {"tools": 1, "id": 2, "messages.tool_calls": 1}


@pytest.mark.parametrize("speakers", [(), ("system",), ("human",), ("gpt", "human")])
def test_a_sharegpt_conversation_with_no_answer_at_all_is_malformed(tmp_path, speakers):
    path = write_lines(tmp_path / "x.jsonl", sharegpt(*speakers), RECORDS["sharegpt"])
    counter = RecordCounter()
    assert len(list(read_conversations(path, "sharegpt", counter.add_malformed))) == 1
    assert counter.examples == [f"{path}, line 1: schema 'sharegpt' found an empty question or answer"]


@pytest.mark.parametrize("schema", RECORDS)
@pytest.mark.parametrize("other", RECORDS)
def test_a_record_of_another_schema_is_an_error_that_names_the_one_that_fits(tmp_path, schema, other):
    path = write_lines(tmp_path / "x.jsonl", RECORDS[schema], RECORDS[other])
    alike = [("alpaca", "long_alpaca"), ("long_alpaca", "alpaca"), ("input_output", "alpaca")]  # by their fields
    if schema == other or (schema, other) in alike:
        assert len(list(read_conversations(path, schema))) == 2
        return
    with pytest.raises(ValueError, match=rf"x\.jsonl, line 2: not a record of schema '{schema}'") as raised:
        list(read_conversations(path, schema))
    message = str(raised.value)
    assert f"its fields are {', '.join(RECORDS[other])}; it fits " in message
    assert other in message.partition("it fits ")[2].partition("\n")[0].split(", ")
    assert message.endswith("\n  " + repr(RECORDS[other])[:400] + (" …" if len(repr(RECORDS[other])) > 400 else ""))


def test_a_record_of_no_schema_is_shown_with_all_schemas(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", {"prompt": "?" * 1000, "completion": "!"})
    with pytest.raises(ValueError, match=r"fields are prompt, completion; it fits no schema \(natural_questions, ") as raised:
        list(read_conversations(path, "booksum"))
    assert "{'prompt': '???" in str(raised.value)
    assert len(str(raised.value)) < 1000


@pytest.mark.parametrize("texts", [("", "!"), ("?", ""), (" \n", "!"), ("?", None)])
def test_an_empty_question_or_answer_is_malformed(tmp_path, texts):
    good = {"input": "?", "output": "!"}
    path = write_lines(tmp_path / "x.jsonl", good, dict(zip(("input", "output"), texts, strict=True)), good)
    with pytest.raises(ValueError, match=r"x\.jsonl, line 2: schema 'input_output' found an empty question or answer"):
        list(read_conversations(path, "input_output"))
    counter = RecordCounter()
    assert len(list(read_conversations(path, "input_output", counter.add_malformed))) == 2
    assert counter.examples == [f"{path}, line 2: schema 'input_output' found an empty question or answer"]


def test_a_record_nested_too_deep_to_be_normalized_is_malformed(tmp_path):
    usable = {"instruction": "a", "output": "b"}
    deep = json.loads("[" * 300 + "]" * 300)
    (tmp_path / "x.jsonl").write_text(json.dumps(usable) + "\n" + json.dumps(usable | {"extra": deep}) + "\n")
    malformed: list = []
    assert len(list(read_conversations(str(tmp_path / "x.jsonl"), "alpaca", malformed.append))) == 1
    assert [record.line for record in malformed] == [2]


def test_a_nul_character_is_malformed(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", {"input": "?", "output": "a\0b"}, {"input": "?\0", "output": "a"})
    counter = RecordCounter()
    assert list(read_conversations(path, "input_output", counter.add_malformed)) == []
    assert counter.examples == [f"{path}, line {line}: NUL character" for line in (1, 2)]


@pytest.mark.parametrize("schema", RECORDS)
def test_line_ends_and_a_byte_order_mark_make_no_difference(tmp_path, schema):
    def changed(value, change):
        if isinstance(value, dict):
            return {key: changed(item, change) for key, item in value.items()}
        if isinstance(value, list):
            return [changed(item, change) for item in value]
        return change(value) if isinstance(value, str) and "." in value else value

    lines = [
        changed(RECORDS[schema], change)
        for change in (lambda text: f"{text}\n", lambda text: f"{text}\r\n", lambda text: f"\ufeff{text}\r")
    ]
    expected, *others = read_conversations(write_lines(tmp_path / "x.jsonl", *lines), schema)
    assert expected is not None
    assert others == [expected, expected]
