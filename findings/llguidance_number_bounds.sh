#!/usr/bin/env bash
# llguidance: a JSON schema's bounds for a number forbid numbers between them.
#
# Expected: {"type": "number", "minimum": 0, "maximum": 0.95} allows every number from 0 to 0.95. The documentation has
#   all four bounds in its list of what is supported, and names no exception.
# What happens: decimals that the maximum begins with are forbidden: 0.9 here, 4.7 with 4.75, 1.2 and 1.23 with 1.234.
#   For negative numbers it is the minimum: -0.2 with -0.25. A model that has written 0.9 and would end there is not
#   let out and has to add a digit: 0.90, or up to 0.95. So scores that are decoded under a grammar are shifted, and a
#   valid answer has probability 0. No warning, whatever the tokenizer. Integers and bounds with one decimal are right.
#   Besides, above an exclusive minimum that is whole, some numbers that end in 0 are forbidden, like 2.20 above 2.
# Why: where digits of the bound are left, the regular expression for the rest does not match the empty string.
# Versions: llguidance 1.9.1. The same in xgrammar 0.2.9 is right.
# Output seen: of the numbers with up to three decimals and no 0 at their end, those that are forbidden between 0 and
#   0.95: 0.9; 1 and 4.75: 4.7; 0.1 and 0.25: 0.2; 0 and 1.234: 1.2 and 1.23; -0.25 and -0.1: -0.2; 0 and 1, 0.5 and
#   4.5: none. After {"score":0.9 with a maximum of 0.95 only 0 to 5 may follow.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q --no-compile --disable-pip-version-check llguidance==1.9.1

cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import json
from decimal import Decimal

from llguidance import LLMatcher, LLTokenizer


letters = LLTokenizer("byte")  # a token for each byte


def start(schema):
    matcher = LLMatcher(letters, LLMatcher.grammar_from_json_schema(json.dumps(schema)))
    assert not matcher.is_error()
    return matcher


def takes(matcher, text):
    matcher = matcher.deep_copy()
    return matcher.try_consume_tokens(list(text.encode())) == len(text) and matcher.is_accepting()


def forbidden(low, high, places):
    """Of all the numbers between the bounds with so many decimals and no 0 at their end, those that are not taken."""
    matcher = start({"type": "number", "minimum": float(low), "maximum": float(high)})
    wrong = []
    for count in range(places + 1):
        step = Decimal(1).scaleb(-count)
        number = Decimal(low).quantize(step) - step
        while number <= Decimal(high) + step:
            text = f"{number:f}"
            if count == 0 or text[-1] != "0":
                inside = Decimal(low) <= number <= Decimal(high)
                if takes(matcher, text) != inside:
                    assert inside, "numbers outside are taken"
                    wrong.append(text)
            number += step
    return wrong


for low, high, expected in (
    ("0", "0.95", ["0.9"]),
    ("1", "4.75", ["4.7"]),
    ("0.1", "0.25", ["0.2"]),
    ("0", "1.234", ["1.2", "1.23"]),
    ("-0.25", "-0.1", ["-0.2"]),
    ("0", "1", []),
    ("0.5", "4.5", []),
):
    seen = forbidden(low, high, 3)
    print(f"from {low} to {high}: forbidden are {seen}")
    assert seen == expected, "the bounds of numbers are treated in another way now"

matcher = start({"type": "object", "properties": {"score": {"type": "number", "maximum": 0.95}}, "required": ["score"]})
begun = list(b'{"score":0.9')
assert matcher.try_consume_tokens(begun) == len(begun)
mask = matcher.compute_logit_bias()
then = [chr(token) for token in range(32, 127) if mask[token]]
print('after {"score":0.9 only these may follow:', then)
assert "}" not in then
matcher = start({"type": "number", "exclusiveMinimum": 2, "maximum": 3.5})
assert takes(matcher, "2.2") and not takes(matcher, "2.20"), "2.20 is taken now"
print("seen: numbers between the bounds are forbidden")
PYTHON
