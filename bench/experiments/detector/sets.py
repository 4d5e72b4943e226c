"""The data sets of the detector's experiments as items. Each function takes the tokenizer and returns a list."""

import random
import re
from collections.abc import Callable
from typing import Any

from bench.experiments.detector.items import Item, merge_groups, shuffled, split_of
from bench.experiments.texts import rows

PASSAGES = 200  # of the paper's protocol, whatever their split
TEST_PASSAGES = 100  # of its test part: the next ones in the order are for the test alone
DOMAINS = ("bio-medical", "education", "science")
LENGTHS = range(5, 21)  # words of a sentence in the sets that are strange or not
STRANGE = 250  # sentences per set
COMMON = """a an and are as at be by did do does for from had has have he her his how in is it its many much of on or
she that the their there they this to was were what when where which who whom whose why will with"""
STOP_WORDS = frozenset(COMMON.split())


def chat(tokenizer: Any, *messages: tuple[str, str]) -> str:
    """The prompt of a conversation, up to where the assistant answers."""
    return str(
        tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in messages],
            add_generation_prompt=True,
            tokenize=False,
        )
    )


def dialogue(tokenizer: Any) -> list[Item]:
    """HaluEval dialogue, right and hallucinated reply to the same prompt, of 8 tokens or more.

    Lengths within one token count in validation and test; within three, in training too.
    """
    found = [row for row in rows("halueval_dialogue/dev.jsonl.gz") if _gap(row) <= 3 and _shorter(row) >= 8]
    groups = merge_groups([(_plain(row["knowledge"]), _plain(_turns(row)[0][1])) for row in found])
    return _twins(
        found,
        groups,
        lambda row: chat(tokenizer, ("system", f"Knowledge: {row['knowledge'].strip()}"), *_turns(row)),
        ("right_response", "hallucinated_response"),
        lambda row: _gap(row) <= 1,
    )


def question_answering(tokenizer: Any) -> list[Item]:
    """HaluEval QA, right and hallucinated answer to the same prompt, of 3 tokens or more. Lengths as in `dialogue`."""
    found = [row for row in rows("halueval_qa/dev.jsonl.gz") if _gap(row) <= 3 and _shorter(row) >= 3]
    return _twins(
        found,
        [_plain(row["knowledge"]) for row in found],
        lambda row: _ask(tokenizer, row["knowledge"], row["question"]),
        ("right_answer", "hallucinated_answer"),
        lambda row: _gap(row) <= 1,
    )


def passage(tokenizer: Any) -> list[Item]:
    """The paper's protocol: HaluEval QA's passages with their own question, with a random one, and with one whose words
    occur in the passage as often as its own's. The model answers by itself. Other questions come from the same split.
    """
    everything = rows("halueval_qa/dev.jsonl.gz")
    pools = {
        name: [r for r in everything if split_of(_plain(r["knowledge"])) == name]
        for name in ("train", "validation", "test")
    }
    order = sorted(everything, key=lambda row: random.Random(f"passage {row['idx']}").random())
    tested = [row for row in order if split_of(_plain(row["knowledge"])) == "test"]
    chosen = order[:PASSAGES]
    chosen += [row for row in tested[:TEST_PASSAGES] if row not in chosen]
    items = []
    for row in chosen:
        group = _plain(row["knowledge"])
        others = random.Random(f"others {row['idx']}").sample([r for r in pools[split_of(group)] if r is not row], 400)
        target = word_overlap(row["question"], row["knowledge"])
        matched = min(others, key=lambda other: abs(word_overlap(other["question"], row["knowledge"]) - target))
        for kind, question in (("own", row), ("random", others[0]), ("matched", matched)):
            prompt = _ask(tokenizer, row["knowledge"], question["question"])
            labels = (int(kind != "own"),)
            items.append(Item(f"{row['idx']}:{kind}", group, prompt, (), labels, kind, row["right_answer"]))
    return items


def facts(tokenizer: Any) -> list[Item]:
    """HaluEval 2.0: a statement of ChatGPT's answer that people found right, and one that they found wrong, under the
    query; of each query the two that are nearest in length."""
    items = []
    for domain in DOMAINS:
        for row in rows(f"halueval2/dev_{domain}.jsonl.gz"):
            judged = list(zip(row["chatgpt_fact"], row["human_judge"], strict=False))
            right = [fact for fact, verdict in judged if verdict == "true"]
            wrong = [fact for fact, verdict in judged if verdict == "false"]
            if right and wrong:
                pairs = [(a, b) for a in right for b in wrong]
                pair = min(pairs, key=lambda two: abs(_count(tokenizer, two[0]) - _count(tokenizer, two[1])))
                prompt = chat(tokenizer, ("user", row["user_query"]))
                items.append(Item(f"{domain}:{row['id']}", _plain(row["user_query"]), prompt, pair, (0, 1), domain))
    return shuffled(items)


def strange(tokenizer: Any) -> list[Item]:
    """Single sentences, lower case, no closing mark, read as a user's message: ordinary sets and strange ones."""
    del tokenizer
    pools: dict[str, list[str]] = {
        "WebQuestions": [row["qText"] for row in rows("webquestions/train.jsonl.gz")],
        "EU law": _sentences(row["text"] for row in rows("eurlex/ai_act.jsonl.gz")),
        "HaluEval questions": [row["question"] for row in rows("halueval_qa/dev.jsonl.gz")],
        "GSM8K": _sentences(row["question"] for row in rows("gsm8k/dev.jsonl.gz")),
    }
    clinc = rows("clinc150/dev.jsonl.gz") + rows("clinc150/train.jsonl.gz")
    pools["CLINC150 in scope"] = [row["text"] for row in clinc if row["intent"] != "oos"]
    pools["CLINC150 oos"] = [row["text"] for row in clinc if row["intent"] == "oos"]
    items = []
    for kind, pool in pools.items():
        texts = sorted({text for text in map(_surface, pool) if len(text.split()) in LENGTHS})
        texts = random.Random(kind).sample(texts, min(STRANGE, len(texts)))
        items += [Item(f"{kind}:{text}", text, "<|im_start|>user\n", (text,), (0,), kind) for text in texts]
    return items


SETS: dict[str, Callable[[Any], list[Item]]] = {
    "dialogue": dialogue,
    "qa": question_answering,
    "passage": passage,
    "strange": strange,
    "facts": facts,
}


def word_overlap(question: str, text: str) -> float:
    """The share of a question's words, without the commonest, that occur in the text."""
    words = set(_plain(question).split()) - STOP_WORDS
    return len(words & set(_plain(text).split())) / max(len(words), 1)


def _twins(
    found: list[dict[str, Any]],
    groups: list[str],
    prompt: Callable[[dict[str, Any]], str],
    names: tuple[str, str],
    strict: Callable[[dict[str, Any]], bool],
) -> list[Item]:
    items = []
    for row, group in zip(found, groups, strict=True):
        answers = tuple(row[name].strip() for name in names)
        item = Item(str(row["idx"]), group, prompt(row), answers, (0, 1), strict=strict(row))
        if item.strict or split_of(group) == "train":
            items.append(item)
    return sorted(shuffled(items), key=lambda item: not item.strict)


def _ask(tokenizer: Any, text: str, question: str) -> str:
    return chat(tokenizer, ("user", f"{' '.join(text.split())}\n\n{question.strip()}"))


def _turns(row: dict[str, Any]) -> list[tuple[str, str]]:
    """(role, text) of a dialogue's history, in which [Human] and [Assistant] stand before each turn."""
    parts = re.split(r"\[(Human|Assistant)\]:", row["dialogue_history"])[1:]
    names = {"Human": "user", "Assistant": "assistant"}
    return [(names[who], text.strip()) for who, text in zip(parts[::2], parts[1::2], strict=True)]


def _gap(row: dict[str, Any]) -> int:
    return abs(int(row["n_tok_right"]) - int(row["n_tok_halu"]))


def _shorter(row: dict[str, Any]) -> int:
    return min(int(row["n_tok_right"]), int(row["n_tok_halu"]))


def _count(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False).input_ids)


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _sentences(texts: Any) -> list[str]:
    return [sentence for text in texts for sentence in re.split(r"(?<=[.?!;])\s+", text) if sentence[:1].isupper()]


def _surface(text: str) -> str:
    """Lower case, one line, words and no marks at the end."""
    return re.sub(r"\s+", " ", text.lower()).strip().rstrip(".?!;:,").strip()
